//! The transports: batched UDP, QUIC links with mesh-issued certificates, join tokens.
//!
//! - [`udp`]: many datagrams per system call, for heartbeats and DCF clients;
//! - [`trust`]: the mesh's own root, identities and certificates of nodes, join tokens, and [`trust::Admission`], which
//!   decides who joins (`arcanum-attestor` implements it);
//! - [`quic`]: mutually authenticated links that carry DCF messages on streams;
//! - [`seal`]: AEAD for datagrams between nodes, with keys exported from a link;
//! - [`sealed`]: sessions of clients that hold a key or token, whose datagrams are sealed;
//! - [`discovery`]: finding heads and workers on the LAN.
//!
//! Joining: the operator creates a [`trust::JoinToken`] at the head. [`quic::join`] connects with the
//! token's pin of the mesh root instead of a certificate, hands in the secret with a certificate request and a proof of the
//! node's identity, whose keys never leave the node, and stores the certificate in the state directory as a
//! [`trust::NodeIdentity`]. From then on
//! [`quic::Connector`] and [`quic::Listener`] accept only certificates of that root, on both sides.

#![forbid(unsafe_code)]

pub mod discovery;
mod files;
pub mod quic;
pub mod seal;
pub mod sealed;
pub mod trust;
pub mod udp;
