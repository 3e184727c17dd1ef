//! Committed benchmarks; each prints a ratio against its anchor.
