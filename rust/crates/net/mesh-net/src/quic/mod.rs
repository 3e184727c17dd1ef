//! Links between nodes: QUIC connections, authenticated on both sides by certificates of the mesh's root, that carry DCF
//! messages on streams.
//!
//! Two application protocols share one UDP port:
//!
//! - `hydramesh/1`: a [`Link`]. Both sides show certificates. The side that accepts opens one unidirectional stream with
//!   one Ack on it: the word that it has admitted the other. TLS 1.3 alone would let a dialler believe that it is
//!   connected before its certificate was looked at.
//! - `hydramesh-join/1`: one exchange on one bidirectional stream, after which the connection ends. A node without
//!   certificate sends a JoinRequest ([`join`]), a member sends a RenewRequest ([`renew`]); the answer is a JoinResponse
//!   or an Error. The joiner knows the head by the token's pin of the root.
//!
//! TLS is 1.3 only, with X25519MLKEM768 preferred; X25519 alone is there for peers without ML-KEM. New connections
//! from unverified addresses are answered with a Retry packet, which is smaller than what they sent.
//!
//! Connections that are not links yet have little time, a small window, one stream and a bounded
//! [room](rooms) for each kind. Slow peers lose their place to faster ones.
//!
//! There are three ways to notice that a peer vanished. A process that ends closes its links. One that was
//! killed leaves a closed port, whose ICMP answers end the link once the peer does not answer a probe. A
//! machine that is gone is silent for [`LinkConfig::idle_timeout`].

mod connector;
mod endpoint;
mod error;
mod join;
mod link;
mod listener;
pub mod probe;
mod rooms;
mod stream;
pub(crate) mod tls;

pub use connector::{Connector, connect};
pub use error::{Closed, ConnectError, JoinError, StreamFailure};
pub use join::{join, join_again, keep_renewed, load_or_join, renew, settle};
pub use link::Link;
pub(crate) use link::WeakLink;
pub use listener::Listener;
pub use mesh_base::clock::timestamp_us;
pub use rustls::NamedGroup;
pub use stream::{MsgStream, RecvHalf, SendHalf};

use std::sync::Arc;
use std::time::Duration;

use quinn::congestion::CubicConfig;
use quinn::{AckFrequencyConfig, Connection, IdleTimeout, TransportConfig, VarInt};

/// Limits and times of links.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkConfig {
    /// Silence after which a side probes the peer.
    pub keep_alive: Duration,
    /// Silence after which a link ends. Links are expensive to lose, so it is long enough for a process that
    /// is stopped for a while or waits for a processor. Use [`Link::answers`] to find out sooner.
    pub idle_timeout: Duration,
    /// Time limit for connecting and admission.
    pub handshake_timeout: Duration,
    /// Largest payload of one message, bytes.
    pub max_message: usize,
    /// Streams that a peer may have open at once.
    pub max_streams: u32,
    /// Bytes of one stream that a peer may send ahead of its reader.
    pub stream_window: u32,
    /// Bytes over all streams of a link that a peer may send ahead of their readers.
    pub link_window: u32,
}

impl Default for LinkConfig {
    fn default() -> Self {
        Self {
            keep_alive: Duration::from_millis(500),
            idle_timeout: Duration::from_secs(5),
            handshake_timeout: Duration::from_secs(5),
            max_message: dcf::DEFAULT_MAX_PAYLOAD,
            max_streams: 1024,
            stream_window: 4 << 20,
            link_window: 32 << 20,
        }
    }
}

impl LinkConfig {
    /// Transport for unauthenticated connections: one stream and a small window.
    fn transport_for_strangers(&self) -> Arc<TransportConfig> {
        let mut transport = self.transport();
        if let Some(transport) = Arc::get_mut(&mut transport) {
            transport
                .max_concurrent_bidi_streams(1u32.into())
                .max_concurrent_uni_streams(0u32.into())
                .receive_window(self.link_window.min(STRANGERS_WINDOW).into());
        }
        transport
    }

    /// Raises the limits of a connection to those of a link, once the peer is admitted.
    fn open_windows(&self, connection: &Connection) {
        connection.set_max_concurrent_bi_streams(self.max_streams.into());
        connection.set_receive_window(self.link_window.into());
    }

    fn transport(&self) -> Arc<TransportConfig> {
        let mut acks = AckFrequencyConfig::default();
        acks.ack_eliciting_threshold(ACK_PACKETS.into())
            .max_ack_delay(Some(ACK_DELAY));
        let mut transport = TransportConfig::default();
        // Beyond 2^62 ms quinn has no number; use its maximum.
        let idle = IdleTimeout::try_from(self.idle_timeout).unwrap_or_else(|_| VarInt::MAX.into());
        transport
            .keep_alive_interval(Some(self.keep_alive))
            .max_idle_timeout(Some(idle))
            .max_concurrent_bidi_streams(self.max_streams.into())
            .max_concurrent_uni_streams(ADMISSION_STREAMS.into())
            .stream_receive_window(self.stream_window.into())
            .receive_window(self.link_window.into())
            .send_window(self.link_window.into())
            .initial_rtt(INITIAL_RTT)
            // For liveness probes only; their contents are not read.
            .datagram_receive_buffer_size(Some(64))
            .ack_frequency_config(Some(acks))
            .congestion_controller_factory(Arc::new(CubicConfig::default()));
        Arc::new(transport)
    }
}

const LINK_PROTOCOL: &[u8] = b"hydramesh/1";
const JOIN_PROTOCOL: &[u8] = b"hydramesh-join/1";

/// The accepting side opens exactly one unidirectional stream, for its word of admission.
const ADMISSION_STREAMS: u32 = 1;

/// Bytes that a peer may send ahead before it is admitted: one exchange of a join.
const STRANGERS_WINDOW: u32 = 96 << 10;

/// Packets after which they are acknowledged at once. A row of a small model is two packets, and an acknowledgement for each would be
/// sent before the row is looked at.
const ACK_PACKETS: u32 = 8;

/// Maximum delay of an acknowledgement.
const ACK_DELAY: Duration = Duration::from_millis(10);

/// Meshes live on LANs: a lost first packet is sent again after three of these, not after quinn's second.
const INITIAL_RTT: Duration = Duration::from_millis(50);
