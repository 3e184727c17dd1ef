//! The head: registry, router, DCF and OpenAI front ends.
#![forbid(unsafe_code)]
pub mod core;
