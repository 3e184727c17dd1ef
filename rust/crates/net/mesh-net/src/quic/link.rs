//! One authenticated connection between two nodes.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use bytes::Bytes;
use dcf::ErrorCode;
use quinn::crypto::rustls::HandshakeData;
use quinn::{Connection, ConnectionError, RecvStream, SendStream};
use rustls::NamedGroup;
use rustls::pki_types::CertificateDer;

use super::error::{Closed, StreamFailure};
use super::stream::MsgStream;
use crate::trust::{DenyList, EXPELLED, Expellable, Member, Refusal, Role, TrustError};

/// An authenticated connection to another node of the mesh. Clones are the same link; it closes when the last clone and
/// the last of its streams are dropped, or by [`close`](Self::close).
#[derive(Clone)]
pub struct Link {
    inner: Arc<Inner>,
}

struct Inner {
    connection: Connection,
    peer: Member,
    max_message: usize,
    /// Set when the peer's port was found closed.
    gone: AtomicBool,
    /// Number of reports that the peer's port is closed.
    reports: AtomicU32,
    /// True while such a report is being checked.
    suspected: AtomicBool,
}

impl Link {
    pub(super) fn new(connection: Connection, peer: Member, max_message: usize) -> Self {
        Self {
            inner: Arc::new(Inner {
                connection,
                peer,
                max_message,
                gone: AtomicBool::new(false),
                reports: AtomicU32::new(0),
                suspected: AtomicBool::new(false),
            }),
        }
    }

    /// The peer's id: SHA-256 of its ML-DSA key, lower-case hex.
    pub fn node_id(&self) -> &str {
        &self.inner.peer.node_id
    }

    /// The peer's name, for people; not unique.
    pub fn node_name(&self) -> &str {
        &self.inner.peer.name
    }

    /// The peer's role in the mesh.
    pub fn role(&self) -> Role {
        self.inner.peer.role
    }

    /// Contents of the peer's certificate.
    pub fn peer(&self) -> &Member {
        &self.inner.peer
    }

    /// The peer's address; it may change when the peer moves.
    pub fn remote_addr(&self) -> SocketAddr {
        canonical(self.inner.connection.remote_address())
    }

    /// Our own address on the path to the peer, if the system reports it.
    pub fn local_ip(&self) -> Option<IpAddr> {
        Some(self.inner.connection.local_ip()?.to_canonical())
    }

    /// Estimated round-trip time.
    pub fn rtt(&self) -> Duration {
        self.inner.connection.rtt()
    }

    /// Packets that came from the peer so far. Each was authenticated, so a new one is a sign of life; an idle link gets some
    /// every [`keep_alive`](super::LinkConfig::keep_alive).
    pub fn packets_received(&self) -> u64 {
        self.inner.connection.stats().udp_rx.datagrams
    }

    /// True if the peer answers a probe within `limit`. Packets that it sent before the probe do not count.
    pub async fn answers(&self, limit: Duration) -> bool {
        let connection = &self.inner.connection;
        // Packets that are under way when its process ends arrive within this time.
        tokio::time::sleep(self.rtt().max(SUSPICION)).await;
        let before = self.packets_received();
        let deadline = tokio::time::Instant::now() + limit;
        while connection.close_reason().is_none() && tokio::time::Instant::now() < deadline {
            self.ask();
            tokio::time::sleep(SIGN_OF_LIFE).await;
            if self.packets_received() > before {
                return true;
            }
        }
        false
    }

    /// The key exchange group of the handshake; [`NamedGroup::X25519MLKEM768`] between our own nodes.
    pub fn handshake_group(&self) -> Option<NamedGroup> {
        Some(handshake_data(&self.inner.connection)?.negotiated_key_exchange_group)
    }

    /// A number that is unique among the links of this process.
    pub fn id(&self) -> usize {
        self.inner.connection.stable_id()
    }

    /// Opens a stream; waits while the peer has as many as it allows. The peer sees it with the first message.
    pub async fn open(&self) -> Result<MsgStream, StreamFailure> {
        self.stream(self.inner.connection.open_bi().await)
    }

    /// The next stream that the peer opens.
    pub async fn accept(&self) -> Result<MsgStream, StreamFailure> {
        self.stream(self.inner.connection.accept_bi().await)
    }

    /// Waits for the end of the link and returns its cause.
    pub async fn closed(&self) -> Closed {
        let error = self.inner.connection.closed().await;
        self.reason(error)
    }

    /// Cause of the link's end; `None` while it is open.
    pub fn close_reason(&self) -> Option<Closed> {
        let error = self.inner.connection.close_reason()?;
        Some(self.reason(error))
    }

    /// Closes the link at once, its streams with it. The peer sees [`Closed::ByPeer`] with this code and text.
    pub fn close(&self, code: ErrorCode, text: &str) {
        close(&self.inner.connection, code, text);
    }

    /// Has the link end as soon as its peer is on the list.
    pub(super) fn guarded_by(&self, deny_list: &DenyList) {
        let link: Arc<dyn Expellable> = self.inner.clone();
        deny_list.guard(&link);
    }

    /// A key that only the two ends of this link can compute (RFC 8446, section 7.5). Same label and context, same key.
    pub fn export_key(&self, label: &str, context: &[u8]) -> Result<[u8; 32], TrustError> {
        let mut key = [0; 32];
        self.inner
            .connection
            .export_keying_material(&mut key, label.as_bytes(), context)
            .map_err(|error| TrustError::Crypto(format!("no key for `{label}`: {error:?}")))?;
        Ok(key)
    }

    pub(super) fn downgrade(&self) -> WeakLink {
        WeakLink(Arc::downgrade(&self.inner))
    }

    /// The peer's port was reported closed. An ICMP message is easily forged, so the peer is asked for a sign of life. If a closed
    /// port is reported for that as well, and nothing arrives, it is believed soon; without another report, which systems send at a
    /// limited rate, later.
    pub(super) fn reported_closed(self) {
        self.inner.reports.fetch_add(1, Ordering::Relaxed);
        if !self.inner.suspected.swap(true, Ordering::Relaxed) {
            tokio::spawn(async move {
                self.suspect().await;
                self.inner.suspected.store(false, Ordering::Relaxed);
            });
        }
    }

    async fn suspect(&self) {
        let connection = &self.inner.connection;
        let reports = || self.inner.reports.load(Ordering::Relaxed);
        let (before, known) = (self.packets_received(), reports());
        let has_ended = || self.packets_received() != before || connection.close_reason().is_some();
        let rtt = self.rtt();
        let soon = (rtt * 3).max(SIGN_OF_LIFE);
        let limit = (rtt * 3).max(SUSPICION);
        let mut silent = Duration::ZERO;
        while silent < limit {
            // A live peer acknowledges it. If it cannot be sent, silence is the only evidence.
            self.ask();
            let asked = Instant::now();
            tokio::time::sleep(soon).await;
            // A process that sleeps longer than it wanted to had no processor, and an answer may be waiting
            // for one, too.
            if asked.elapsed() < soon + OVERSLEPT {
                silent += soon;
            } else {
                tokio::time::sleep(soon).await;
            }
            if has_ended() {
                return;
            }
            if silent >= soon && reports() != known {
                break;
            }
        }
        if !has_ended() {
            self.inner.gone.store(true, Ordering::Relaxed);
            self.close(ErrorCode::TIMEOUT, "your port is closed");
        }
    }

    /// Asks the peer for a sign of life: if it lives, [`packets_received`](Self::packets_received) grows; if its port is closed, the
    /// link ends soon.
    pub fn ask(&self) {
        // If it cannot be sent, the next keep-alive asks.
        let probe = Bytes::from_static(&[0]);
        let _ = self.inner.connection.send_datagram(probe);
    }

    fn reason(&self, error: ConnectionError) -> Closed {
        match Closed::from(error) {
            Closed::ByUs if self.inner.gone.load(Ordering::Relaxed) => Closed::Gone,
            reason => reason,
        }
    }

    fn stream(
        &self,
        halves: Result<(SendStream, RecvStream), ConnectionError>,
    ) -> Result<MsgStream, StreamFailure> {
        match halves {
            Ok(halves) => Ok(MsgStream::new(halves, self.inner.max_message)),
            Err(error) => Err(StreamFailure::Link(self.reason(error))),
        }
    }
}

impl Expellable for Inner {
    fn peer(&self) -> &Member {
        &self.peer
    }

    fn is_open(&self) -> bool {
        self.connection.close_reason().is_none()
    }

    fn expel(&self, refusal: &Refusal) {
        let (peer, node) = (&self.peer.name, &self.peer.node_id);
        tracing::info!(peer, node, "link closed: the node is expelled");
        close(&self.connection, EXPELLED, &refusal.to_string());
    }
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Link")
            .field("peer", &self.inner.peer.name)
            .field("address", &self.remote_addr())
            .field("closed", &self.close_reason())
            .finish_non_exhaustive()
    }
}

/// A handle that does not keep the link open.
#[derive(Debug)]
pub(super) struct WeakLink(Weak<Inner>);

impl WeakLink {
    pub(super) fn upgrade(&self) -> Option<Link> {
        self.0.upgrade().map(|inner| Link { inner })
    }
}

/// The peer sees [`Closed::ByPeer`] with this code and text.
pub(super) fn close(connection: &Connection, code: ErrorCode, text: &str) {
    connection.close(u32::from(code.0).into(), text.as_bytes());
}

pub(super) fn handshake_data(connection: &Connection) -> Option<HandshakeData> {
    let data = connection.handshake_data()?.downcast().ok()?;
    Some(*data)
}

/// The peer's own certificate, which rustls has checked against the root.
pub(super) fn peer_certificate(connection: &Connection) -> Option<CertificateDer<'static>> {
    let chain = connection.peer_identity()?;
    let chain: Box<Vec<CertificateDer<'static>>> = chain.downcast().ok()?;
    chain.into_iter().next()
}

/// An IPv4 peer of a dual-stack socket under its IPv4 address; an IPv6 peer without its scope.
pub(super) fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// Time for which a suspected peer may be silent if no further report of a closed port came, counted while
/// this process ran.
const SUSPICION: Duration = Duration::from_millis(200);
/// Oversleeping by more than this shows that the process waited for a processor.
const OVERSLEPT: Duration = Duration::from_millis(20);
/// Minimum wait for a sign of life after a probe: the acknowledgement may be delayed by 10 ms and wait behind
/// a step of up to 20 ms, and a loaded machine needs more time.
const SIGN_OF_LIFE: Duration = Duration::from_millis(40);
