//! Limits and times of links, and the QUIC transport that they make.

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
    /// is stopped for a while or waits for a processor. Use [`Link::answers`](super::Link::answers) to find out sooner.
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
    /// Also accept peers that can only exchange keys by X25519, which a quantum computer would break.
    pub classical: bool,
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
            classical: false,
        }
    }
}

impl LinkConfig {
    /// Transport for unauthenticated connections: one stream and a small window.
    pub(super) fn transport_for_strangers(&self) -> Arc<TransportConfig> {
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
    pub(super) fn open_windows(&self, connection: &Connection) {
        connection.set_max_concurrent_bi_streams(self.max_streams.into());
        connection.set_receive_window(self.link_window.into());
    }

    pub(super) fn transport(&self) -> Arc<TransportConfig> {
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
