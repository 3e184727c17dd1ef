//! Workers of DCF v5.0.0 and v5.1, which have no identity, where the operator admits those.
//!
//! Heartbeats, Results and Chunks come on the worker bus; Tasks leave from the same socket. Each worker
//! becomes a [`Connection`](crate::mesh::connection::Connection) whose streams are one Task and one Result,
//! so that no other module knows these versions. The rules for choosing such workers are in
//! `mesh-control`, `registry/plain.rs`.

mod tasks;

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use dcf::chunk::{self, Chunk, Reassembler};
use dcf::{Message, MsgType, Version};
use mesh_net::udp::{BatchSocket, Datagram, SendBatch};
use tracing::{debug, info, warn};

use self::tasks::{LegacyConnection, LegacyWorker, Tasks};
use crate::mesh::{Mesh, timestamp_us};
use crate::workers::verdict::Verdict;

/// The part of the worker bus that such workers use.
pub(super) struct LegacyBus {
    mesh: Arc<Mesh>,
    socket: Arc<BatchSocket>,
    tasks: Arc<Tasks>,
    chunks: Reassembler<PieceKey>,
    refused: RefusedSources,
    replies: SendBatch,
}

/// The worker that sends pieces of an answer, and the task that they belong to.
type PieceKey = (LegacyWorker, u32);

impl LegacyBus {
    pub(super) fn new(mesh: Arc<Mesh>, socket: Arc<BatchSocket>) -> Self {
        let limits = chunk::Limits {
            timeout: CHUNKS_KEPT,
            ..chunk::Limits::default()
        };
        Self {
            mesh,
            socket,
            tasks: Arc::default(),
            chunks: Reassembler::by_source(limits, limits.half(), |(worker, _): &PieceKey| {
                worker.address.ip()
            }),
            refused: RefusedSources::default(),
            replies: SendBatch::new(),
        }
    }

    /// Takes a datagram with a header of this version and kind.
    pub(super) fn take(
        &mut self,
        datagram: &Datagram<'_>,
        version: Version,
        kind: MsgType,
    ) -> Verdict {
        let from = LegacyWorker {
            address: datagram.from,
            version,
        };
        if !self.mesh.live().admits_without_identity(from.address.ip()) {
            if kind == MsgType::HEARTBEAT {
                self.refuse(from);
            }
            return Verdict::Untrusted;
        }
        let Ok(message) = Message::decode_datagram(Bytes::copy_from_slice(datagram.data)) else {
            return Verdict::Malformed;
        };
        let (kind, bytes) = (message.kind, message.payload.len());
        let verdict = match message.kind {
            MsgType::HEARTBEAT => self.heartbeat(from, &message),
            MsgType::RESULT | MsgType::ERROR | MsgType::NACK => self.result(from, message),
            MsgType::CHUNK => self.chunk(from, &message),
            MsgType::HEALTH => self.health(from, &message),
            _ => Verdict::Unexpected,
        };
        if verdict == Verdict::Accepted {
            self.mesh.audit.message("bus", kind, from.address, bytes);
        }
        verdict
    }

    /// Sends the answers to the datagrams that were taken.
    pub(super) async fn reply(&mut self) {
        if !self.replies.is_empty()
            && let Err(error) = self.socket.send(&mut self.replies).await
        {
            debug!(%error, "replies not sent");
            self.replies.clear();
        }
    }

    /// Tells a worker why it is not admitted, and how it would be.
    fn refuse(&mut self, from: LegacyWorker) {
        let (source, version) = (from.address.ip().to_canonical(), from.version);
        if !self.refused.is_news(source, Instant::now()) {
            return;
        }
        if !self.mesh.live().dcf.legacy_workers {
            warn!(%source, "refusing a worker of DCF {version}: it cannot prove who it is, and would get clients' prompts. To admit such workers set dcf.legacy_workers = true, and for other machines than this one dcf.legacy_worker_networks");
        } else {
            warn!(%source, "refusing a worker of DCF {version}: its address is in none of dcf.legacy_worker_networks");
        }
    }

    fn heartbeat(&self, from: LegacyWorker, message: &Message) -> Verdict {
        let text = std::str::from_utf8(&message.payload).unwrap_or_default();
        let digits = text.trim_end_matches(['\0', '\n', '\r', ' ']);
        let Ok(port @ 1..) = digits.parse::<u16>() else {
            return Verdict::Malformed;
        };
        let worker = LegacyWorker {
            address: SocketAddr::new(from.address.ip(), port),
            ..from
        };
        let connection = LegacyConnection {
            worker,
            socket: self.socket.clone(),
            tasks: self.tasks.clone(),
        };
        let (address, version) = (worker.address, worker.version);
        let mesh = &self.mesh;
        if mesh.plain_heartbeat(address, version, Arc::new(connection)) {
            let (name, from) = (format!("DCF {version}"), address.to_string());
            mesh.audit
                .joined("", &name, "without identity", &from, None);
            info!(%address, %version, "worker without an identity joined");
        }
        Verdict::Accepted
    }

    /// A worker asks whether its head is there.
    fn health(&mut self, from: LegacyWorker, asked: &Message) -> Verdict {
        let answer = Message::new(MsgType::HEALTH, asked.sequence, timestamp_us(), "");
        let header = answer.header().encode();
        self.replies
            .push_parts(from.address, &[from.version.prefix(), &header]);
        Verdict::Accepted
    }

    fn result(&self, from: LegacyWorker, message: Message) -> Verdict {
        match self.tasks.deliver(from, message) {
            true => Verdict::Accepted,
            false => Verdict::Unexpected,
        }
    }

    fn chunk(&mut self, from: LegacyWorker, message: &Message) -> Verdict {
        let Ok(chunk) = Chunk::parse(&message.payload) else {
            return Verdict::Malformed;
        };
        if !self.tasks.awaits(from, message.sequence) {
            return Verdict::Unexpected;
        }
        let key = (from, message.sequence);
        match self.chunks.push(key, &chunk, Instant::now()) {
            Ok(None) => Verdict::Accepted,
            Ok(Some(payload)) => {
                let result = Message {
                    kind: MsgType::RESULT,
                    payload,
                    ..message.clone()
                };
                self.result(from, result)
            }
            Err(_) => Verdict::Malformed,
        }
    }
}

/// The sources whose heartbeats were refused, so that each is named in the log now and then, and no flood of
/// them fills it.
#[derive(Debug, Default)]
struct RefusedSources {
    /// Time at which each was last named.
    named: HashMap<IpAddr, Instant>,
}

impl RefusedSources {
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

/// Payload bytes of a Task that a worker of either version can be sent: it has to fit one datagram.
pub(crate) const MOST_TASK_BYTES: usize = Version::V5_1.max_payload();

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
        let mut refused = RefusedSources::default();
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
