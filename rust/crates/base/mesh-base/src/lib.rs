//! Small things that several layers share.
//!
//! - [`addresses`]: all addresses of a host name, in the order to try them, and the race between them;
//! - [`allocator`]: what becomes of memory that was freed;
//! - [`backoff`]: pauses between attempts;
//! - [`clock`]: dates, timestamps, and differences of clocks in words;
//! - [`datagrams`]: many datagrams with one system call;
//! - [`files`]: replacing files whole, modes of files with secrets, and what killed processes leave behind;
//! - [`listen`]: sockets that accept IPv4 and IPv6;
//! - [`places`]: a bounded number of places, shared among sources;
//! - [`random`]: random numbers;
//! - [`routes`]: from which of this machine's addresses a UDP peer is answered;
//! - [`tokens`]: how many tokens a text has at least;
//! - [`units`]: durations and sizes as text.
//!
//! `unsafe` is confined to [`datagrams`] and one call in [`allocator`].
//!
//! What crates do well is not here: hexadecimal digits are data-encoding's, distances between words strsim's.

#![deny(unsafe_code)]

pub mod addresses;
pub mod allocator;
pub mod backoff;
pub mod clock;
#[allow(unsafe_code)]
pub mod datagrams;
pub mod files;
pub mod listen;
pub mod places;
pub mod random;
pub mod routes;
pub mod tokens;
pub mod units;
