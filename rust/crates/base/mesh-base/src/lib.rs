//! Small things that several layers share.
//!
//! - [`addresses`]: all addresses of a host name, in the order to try them, and the race between them;
//! - [`allocator`]: what becomes of memory that was freed;
//! - [`clock`]: dates and differences of clocks in words;
//! - [`files`]: modes of files with secrets, and what killed processes leave behind;
//! - [`listen`]: sockets that accept IPv4 and IPv6;
//! - [`places`]: a bounded number of places, shared among sources;
//! - [`routes`]: from which of this machine's addresses a UDP peer is answered;
//! - [`tokens`]: how many tokens a text has at least.

pub mod addresses;
pub mod allocator;
pub mod clock;
pub mod files;
pub mod listen;
pub mod places;
pub mod routes;
pub mod tokens;
