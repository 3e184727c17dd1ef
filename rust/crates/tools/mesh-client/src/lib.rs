//! Clients of a mesh: [`dcf_udp`] sends a task as datagrams through a shim or straight to a head, [`http`] speaks the
//! head's OpenAI API and its own endpoints. The command line, the tests and the benchmarks all use these.

#![forbid(unsafe_code)]

pub mod dcf_udp;
pub mod http;
pub mod sse;
