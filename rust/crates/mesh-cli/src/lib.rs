//! The hydramesh command line.
