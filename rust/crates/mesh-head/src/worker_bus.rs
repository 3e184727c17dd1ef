//! The worker bus, 7778/udp: sealed heartbeats of the mesh's workers; heartbeats and Results of v5.0.0 workers.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use bytes::Bytes;
use dcf::chunk::{self, Chunk, Reassembler};
use dcf::{Message, MsgType};
use mesh_net::seal::{self, Opener};
use mesh_net::udp::{BatchSocket, Datagram, RecvBatch};
use mesh_proto::Load;
use prost::Message as _;
use tracing::{debug, info};

use crate::core::registry::WorkerId;
use crate::mesh::Mesh;
use crate::metrics::DatagramCounters;

/// Sends Tasks to v5.0.0 workers, from the socket that their Results come to.
#[derive(Debug, Clone)]
pub struct BusSender(Arc<BatchSocket>);

impl BusSender {
    /// A sender on the bus's own socket.
    pub fn new(socket: Arc<BatchSocket>) -> Self {
        Self(socket)
    }

    /// Sends one message.
    ///
    /// # Errors
    /// The kernel's.
    pub async fn send(&self, message: &Message, worker: SocketAddr) -> io::Result<()> {
        self.0.send_to(&message.encode_datagram(), worker).await
    }
}

/// The keys of sealed heartbeats, by session.
#[derive(Debug, Default)]
pub struct Sessions(Mutex<HashMap<u64, (WorkerId, Opener)>>);

impl Sessions {
    /// A worker has a session.
    pub fn open(&self, session: u64, worker: WorkerId, opener: Opener) {
        self.lock().insert(session, (worker, opener));
    }

    /// Its link is over.
    pub fn close(&self, session: u64) {
        self.lock().remove(&session);
    }

    /// The worker that sealed this message, and what it says.
    fn unseal(&self, message: &Message) -> Option<(WorkerId, Bytes)> {
        let session = seal::session(message)?;
        let mut sessions = self.lock();
        let (worker, opener) = sessions.get_mut(&session)?;
        Some((*worker, opener.open(message).ok()?))
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, (WorkerId, Opener)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Serves the bus for ever.
pub async fn serve(mesh: Arc<Mesh>, socket: Arc<BatchSocket>) {
    let counters = mesh.metrics.datagrams("workers");
    let mut bus = WorkerBus {
        mesh,
        counters,
        chunks: Reassembler::new(chunk::Limits::default()),
    };
    let mut batch = RecvBatch::new();
    loop {
        match socket.recv(&mut batch).await {
            Ok(_) => batch.datagrams().for_each(|datagram| bus.take(datagram)),
            Err(error) => {
                debug!(%error, "worker bus");
                tokio::task::yield_now().await;
            }
        }
    }
}

struct WorkerBus {
    mesh: Arc<Mesh>,
    counters: DatagramCounters,
    chunks: Reassembler<(SocketAddr, u32)>,
}

impl WorkerBus {
    fn take(&mut self, datagram: Datagram<'_>) {
        let from = datagram.from;
        // Looked at before anything is copied: most junk ends here.
        let Ok(header) = dcf::Header::decode(datagram.data) else {
            self.counters.malformed.inc();
            return;
        };
        if header.kind() != MsgType::SEALED_HEARTBEAT && !self.mesh.config.trusts(from.ip()) {
            self.counters.untrusted.inc();
            return;
        }
        let Ok(message) = dcf::decode_datagram(Bytes::copy_from_slice(datagram.data)) else {
            self.counters.malformed.inc();
            return;
        };
        let counter = match message.kind {
            MsgType::SEALED_HEARTBEAT => self.sealed_heartbeat(&message),
            MsgType::HEARTBEAT => self.heartbeat(from, &message),
            MsgType::RESULT | MsgType::ERROR | MsgType::NACK => self.result(from, message),
            MsgType::CHUNK => self.chunk(from, &message),
            _ => &self.counters.unexpected,
        };
        counter.inc();
    }

    fn sealed_heartbeat(&self, message: &Message) -> &Counter {
        let Some((worker, plaintext)) = self.mesh.sessions.unseal(message) else {
            return &self.counters.untrusted;
        };
        match Load::decode(plaintext) {
            Ok(load) => {
                self.mesh.clock_heard(worker, message.timestamp_us);
                self.mesh.report(worker, load);
                &self.counters.accepted
            }
            Err(_) => &self.counters.malformed,
        }
    }

    fn heartbeat(&self, from: SocketAddr, message: &Message) -> &Counter {
        let digits = std::str::from_utf8(&message.payload)
            .ok()
            .map(|text| text.trim_end_matches(['\0', '\n', '\r', ' ']));
        let port = digits
            .and_then(|digits| digits.parse::<u16>().ok())
            .filter(|port| *port != 0);
        let Some(port) = port else {
            return &self.counters.malformed;
        };
        let address = SocketAddr::new(from.ip(), port);
        if self.mesh.legacy_heartbeat(address) {
            info!(%address, "v5.0.0 worker joined");
        }
        &self.counters.accepted
    }

    fn result(&self, from: SocketAddr, message: Message) -> &Counter {
        if self.mesh.exchange.deliver(from, message) {
            &self.counters.accepted
        } else {
            &self.counters.unexpected
        }
    }

    fn chunk(&mut self, from: SocketAddr, message: &Message) -> &Counter {
        let Ok(chunk) = Chunk::parse(&message.payload) else {
            return &self.counters.malformed;
        };
        if !self.mesh.exchange.awaits(from, message.sequence) {
            return &self.counters.unexpected;
        }
        match self
            .chunks
            .push((from, message.sequence), &chunk, Instant::now())
        {
            Ok(None) => &self.counters.accepted,
            Ok(Some(payload)) => self.result(
                from,
                Message {
                    kind: MsgType::RESULT,
                    payload,
                    ..message.clone()
                },
            ),
            Err(_) => &self.counters.malformed,
        }
    }
}

type Counter = mesh_service::metrics::prometheus_client::metrics::counter::Counter;
