//! Tests and load programs that start a real mesh.
