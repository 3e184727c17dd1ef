//! Connections to workers: their QUIC links, and the UDP port for heartbeats and workers of DCF v5.0.0 and
//! v5.1.
//!
//! - [`links`]: Hello and Welcome, and everything that comes on a control stream;
//! - [`proofs`]: the head's own questions to workers;
//! - [`requests`]: requests on streams of their own, as far as questions and clients' requests share them;
//! - [`bus`]: the worker bus.

pub(crate) mod bus;
pub(crate) mod links;
mod proofs;
pub(crate) mod requests;
