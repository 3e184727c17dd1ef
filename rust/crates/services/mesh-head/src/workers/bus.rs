//! The worker bus, 7778/udp: sealed heartbeats of the mesh's workers; heartbeats and Results of workers of
//! DCF v5.0.0 and v5.1, which have no identity, where the operator admits those.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use dcf::chunk::{self, Chunk, Reassembler};
use dcf::{DecodeError, Message, MsgType, Version};
use mesh_net::udp::{BatchSocket, Datagram, RecvBatch, SendBatch};
use mesh_proto::Load;
use prost::Message as _;
use tracing::{debug, info, warn};

use crate::mesh::exchange::LegacyWorker;
use crate::mesh::{Mesh, timestamp_us};
use crate::metrics::DatagramCounters;

/// Serves the bus; never returns.
pub(crate) async fn serve(mesh: Arc<Mesh>, socket: Arc<BatchSocket>) {
    let counters = mesh.metrics.datagrams("workers");
    let mut bus = WorkerBus {
        mesh,
        counters,
        chunks: reassembler(),
        refused: Refused::default(),
        replies: SendBatch::new(),
    };
    let mut batch = RecvBatch::new();
    loop {
        match socket.recv(&mut batch).await {
            Ok(_) => {
                batch.datagrams().for_each(|datagram| bus.take(datagram));
                if !bus.replies.is_empty()
                    && let Err(error) = socket.send(&mut bus.replies).await
                {
                    debug!(%error, "replies not sent");
                    bus.replies.clear();
                }
            }
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
    chunks: Reassembler<PieceKey>,
    refused: Refused,
    replies: SendBatch,
}

/// The worker that sends pieces of an answer, their version, and the task that they belong to.
type PieceKey = (SocketAddr, Version, u32);

fn reassembler() -> Reassembler<PieceKey> {
    let limits = chunk::Limits {
        timeout: CHUNKS_KEPT,
        ..chunk::Limits::default()
    };
    Reassembler::by_source(limits, limits.half(), |key| key.0.ip())
}

/// The sources whose heartbeats were refused, so that each is named in the log now and then, and no flood of
/// them fills it.
#[derive(Debug, Default)]
struct Refused {
    /// Time at which each was last named.
    named: HashMap<IpAddr, Instant>,
}

impl Refused {
    /// True if this source is named in the log now.
    fn is_news(&mut self, source: IpAddr, now: Instant) -> bool {
        let is_old = |at: &Instant| now.saturating_duration_since(*at) >= NAME_EVERY;
        if self.named.get(&source).is_some_and(|at| !is_old(at)) {
            return false;
        }
        if self.named.len() >= NAMED_SOURCES {
            self.named.retain(|_, at| !is_old(at));
        }
        // A full table is a flood of made-up addresses, and one more name helps no one.
        let room = self.named.len() < NAMED_SOURCES;
        if room {
            self.named.insert(source, now);
        }
        room
    }
}

impl WorkerBus {
    fn take(&mut self, datagram: Datagram<'_>) {
        let from = datagram.from;
        // Looked at before anything is copied: most junk ends here.
        let (version, header) = match dcf::Header::decode_datagram(datagram.data) {
            Ok(framed) => framed,
            Err(error) => {
                self.counters.malformed.inc();
                if matches!(error, DecodeError::OtherVersion(_)) {
                    debug!(%from, %error, "dropped");
                }
                return;
            }
        };
        let sealed = header.kind() == MsgType::SEALED_HEARTBEAT;
        if !sealed && !self.mesh.admits_legacy_worker(from.ip()) {
            self.counters.untrusted.inc();
            if header.kind() == MsgType::HEARTBEAT {
                self.refuse(from, version);
            }
            return;
        }
        let Ok(message) = dcf::decode_datagram(Bytes::copy_from_slice(datagram.data)) else {
            self.counters.malformed.inc();
            return;
        };
        let worker = LegacyWorker {
            address: from,
            version,
        };
        let counter = match message.kind {
            MsgType::SEALED_HEARTBEAT => self.sealed_heartbeat(&message),
            MsgType::HEARTBEAT => self.heartbeat(worker, &message),
            MsgType::RESULT | MsgType::ERROR | MsgType::NACK => self.result(worker, message),
            MsgType::CHUNK => self.chunk(worker, &message),
            MsgType::HEALTH => self.health(worker, &message),
            _ => &self.counters.unexpected,
        };
        counter.inc();
    }

    /// Tells a worker why it is not admitted, and how it would be.
    fn refuse(&mut self, from: SocketAddr, version: Version) {
        let source = from.ip().to_canonical();
        if !self.refused.is_news(source, Instant::now()) {
            return;
        }
        if !self.mesh.live().dcf.legacy_workers {
            warn!(%source, "refusing a worker of DCF {version}: it cannot prove who it is, and would get clients' prompts. To admit such workers set dcf.legacy_workers = true, and for other machines than this one dcf.legacy_worker_networks");
        } else {
            warn!(%source, "refusing a worker of DCF {version}: its address is in none of dcf.legacy_worker_networks");
        }
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

    fn heartbeat(&self, from: LegacyWorker, message: &Message) -> &Counter {
        let digits = std::str::from_utf8(&message.payload)
            .ok()
            .map(|text| text.trim_end_matches(['\0', '\n', '\r', ' ']));
        let port = digits
            .and_then(|digits| digits.parse::<u16>().ok())
            .filter(|port| *port != 0);
        let Some(port) = port else {
            return &self.counters.malformed;
        };
        let worker = LegacyWorker {
            address: SocketAddr::new(from.address.ip(), port),
            ..from
        };
        if self.mesh.legacy_heartbeat(worker) {
            info!(address = %worker.address, version = %worker.version, "worker without an identity joined");
        }
        &self.counters.accepted
    }

    /// A worker asks whether its head is there.
    fn health(&mut self, from: LegacyWorker, asked: &Message) -> &Counter {
        let answer = Message::new(
            MsgType::HEALTH,
            asked.sequence,
            timestamp_us(),
            Bytes::new(),
        );
        let header = answer.header().encode();
        self.replies
            .push_parts(from.address, &[from.version.prefix(), &header]);
        &self.counters.accepted
    }

    fn result(&self, from: LegacyWorker, message: Message) -> &Counter {
        if self.mesh.exchange.deliver(from, message) {
            &self.counters.accepted
        } else {
            &self.counters.unexpected
        }
    }

    fn chunk(&mut self, from: LegacyWorker, message: &Message) -> &Counter {
        let Ok(chunk) = Chunk::parse(&message.payload) else {
            return &self.counters.malformed;
        };
        if !self.mesh.exchange.awaits(from, message.sequence) {
            return &self.counters.unexpected;
        }
        let key = (from.address, from.version, message.sequence);
        match self.chunks.push(key, &chunk, Instant::now()) {
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

/// Time that Chunks of a Result wait for the others, as DCF v5.1 does it.
const CHUNKS_KEPT: Duration = Duration::from_secs(60);
/// Interval at which one source of refused heartbeats is named.
const NAME_EVERY: Duration = Duration::from_secs(3_600);
/// Sources that are named within that time.
const NAMED_SOURCES: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_source_is_named_once_an_hour_and_a_flood_only_so_often() {
        let mut refused = Refused::default();
        let start = Instant::now();
        let source = |number: u32| IpAddr::from(number.to_be_bytes());
        assert!(refused.is_news(source(1), start));
        assert!(!refused.is_news(source(1), start + NAME_EVERY / 2));
        assert!(refused.is_news(source(1), start + NAME_EVERY));
        let flood = start + NAME_EVERY;
        let named = (2..10_000).filter(|number| refused.is_news(source(*number), flood));
        assert_eq!(named.count(), NAMED_SOURCES - 1);
        assert_eq!(refused.named.len(), NAMED_SOURCES);
        assert!(refused.is_news(source(77_777), flood + NAME_EVERY));
    }
}
