//! The shim: a bidirectional UDP bridge from clients to a live head.
