//! Small things that several layers share.
//!
//! - [`addresses`]: all addresses of a host name, in the order to try them, and the race between them;
//! - [`clock`]: dates and differences of clocks in words;
//! - [`listen`]: sockets that accept IPv4 and IPv6;
//! - [`routes`]: from which of this machine's addresses a UDP peer is answered;
//! - [`tokens`]: how many tokens a text has at least.

pub mod addresses;
pub mod clock;
pub mod listen;
pub mod routes;
pub mod tokens;
