//! Small things that several layers share.
//!
//! - [`addresses`]: all addresses of a host name, in the order to try them, and the race between them;
//! - [`allocator`]: settings of glibc's allocator for memory that was freed;
//! - [`backoff`]: pauses between attempts;
//! - [`clock`]: dates, timestamps, and differences of clocks in words;
//! - [`datagrams`]: many datagrams with one system call;
//! - [`files`]: replacing files whole, modes of files with secrets, and what killed processes leave behind;
//! - [`listen`]: sockets that accept IPv4 and IPv6;
//! - [`places`]: a bounded number of places, shared among sources;
//! - [`random`]: random numbers;
//! - [`routes`]: the local address to answer a UDP peer from;
//! - [`sync`]: locks that outlive a panic;
//! - [`token_bucket`]: a limit on a rate;
//! - [`tokens`]: a lower bound on the number of tokens of a text;
//! - [`units`]: durations and sizes as text.
//!
//! With the feature `tokio`, which is on by default, there are futures: [`addresses::race()`] and
//! [`addresses::resolve`], [`datagrams::ErrorQueue`], [`listen::tcp`] and [`places::Room`]. Crates that decide and
//! do no I/O build without it.
//!
//! `unsafe` is confined to [`datagrams`] and one call in [`allocator`].
//!
//! Tasks of established crates are not repeated here: data-encoding has hexadecimal digits, strsim distances
//! of words.

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
pub mod sync;
pub mod token_bucket;
pub mod tokens;
pub mod units;
