//! Finds fetched models and libraries, starts real services and speaks to them, for tests and benchmarks.

#![forbid(unsafe_code)]

pub mod paths;
