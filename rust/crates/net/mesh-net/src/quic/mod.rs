//! Links between nodes: QUIC connections, authenticated on both sides by certificates of the mesh's root, that carry DCF
//! messages on streams.
//!
//! Three application protocols share one UDP port:
//!
//! - `hydramesh/1`: a [`Link`]. Both sides show certificates. The side that accepts opens one unidirectional stream with
//!   one Ack on it: the word that it has admitted the other. TLS 1.3 alone would let a dialler believe that it is
//!   connected before its certificate was looked at.
//! - `hydramesh-join/1`: one exchange on one bidirectional stream, after which the connection ends. A node without
//!   certificate sends a JoinRequest ([`join`]), a member sends a RenewRequest ([`renew`]); the answer is a JoinResponse
//!   or an Error. The joiner knows the head by the token's pin of the root.
//! - `hydramesh-client/1`: one exchange on one bidirectional stream. A client without certificate shows its API key or
//!   curtain token in a ClientHello ([`open_session`]); the answer is a ClientWelcome or an Error. Both derive the keys of a
//!   [session](crate::sealed) from the TLS session.
//!
//! TLS is 1.3 only, with X25519MLKEM768. Peers that offer only X25519 are refused unless [`LinkConfig::classical`]
//! allows them. New connections from unverified addresses are answered with a Retry packet, which is smaller than
//! what they sent.
//!
//! Connections that are not links yet have little time, a small window, one stream and a bounded
//! [room](rooms) for each kind. Slow peers lose their place to faster ones.
//!
//! There are three ways to notice that a peer vanished. A process that ends closes its links. One that was
//! killed leaves a closed port, whose ICMP answers end the link once the peer does not answer a probe. A
//! machine that is gone is silent for [`LinkConfig::idle_timeout`].

mod client;
mod config;
mod connector;
mod endpoint;
mod error;
mod evidence;
mod join;
mod link;
mod listener;
pub mod probe;
mod refusals;
mod rooms;
mod stream;
mod tls;

pub use client::{ClientDoor, NoSession, SessionAsk, SessionError, SessionTerms, open_session};
pub use config::LinkConfig;
pub use connector::{Connector, connect};
pub use error::{Closed, ConnectError, JoinError, StreamFailure};
pub use evidence::{report_evidence, reported_evidence};
pub use join::{join, join_again, keep_renewed, load_or_join, renew, settle};
pub use link::Link;
pub use listener::Listener;
pub use mesh_base::clock::timestamp_us;
pub use refusals::{Refusals, Refused};
pub use rustls::NamedGroup;
pub use stream::{MsgStream, RecvHalf, SendHalf};
