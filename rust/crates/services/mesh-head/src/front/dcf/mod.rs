//! The clients' port, 7777/udp: Tasks in, Results, Partials and Errors out. Clients of DCF v5.0.0 and v5.1 are
//! served alike, each in its version.
//!
//! Here is the receiving loop, with all that can be replied at once. [`port`] runs tasks, each to its one
//! answer; [`chunk_sender`] sends those that no datagram holds; [`proof`] knows the clients that have shown
//! that they receive at their address. Clients that hold a key or token may open a session ([`door`]) and
//! seal their datagrams ([`sealed`]); then they may be anywhere.

mod chunk_sender;
mod door;
mod port;
mod proof;
mod reply;
mod sealed;

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use dcf::chunk::{self, Chunk, ChunkError, Reassembler, Share};
use dcf::{DecodeError, ErrorCode, HEADER_LEN, Header, Message, MsgType, Version};
use mesh_base::random;
use mesh_control::dedup::{Seen, TaskKey};
use mesh_control::fair::Origin;
use mesh_net::udp::{BatchSocket, Datagram, RecvBatch, SendBatch};
use tokio::time::MissedTickBehavior;
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

pub(crate) use self::door::Door;
use self::port::Port;
use self::proof::{ProofReply, Proofs};
use self::reply::{error, is_single, max_answer, queue};
pub(crate) use self::sealed::{SessionLimits, Sessions};
use crate::front::http::{ConcurrencyLimit, Keys};
use crate::locks::lock;
use crate::mesh::{Mesh, timestamp_us};
use crate::metrics::DatagramCounters;
use crate::tally::Tallies;

/// Keys, and the sessions that they open.
pub(crate) struct Clients {
    pub keys: Keys,
    pub sessions: Arc<Sessions>,
    pub concurrency: Arc<ConcurrencyLimit>,
}

/// Serves the port; never returns. Answers that are being made are in `running`.
pub(crate) async fn serve(
    mesh: Arc<Mesh>,
    socket: Arc<BatchSocket>,
    clients: Clients,
    running: TaskTracker,
) {
    let shared = (clients.sessions, clients.concurrency);
    let port = Port::new(mesh, socket.clone(), shared, running);
    let mut intake = Intake::new(port, clients.keys);
    let mut batch = RecvBatch::new();
    // One timer for all turns: other datagrams do not put it off.
    let mut room_check = tokio::time::interval(ROOM_CHECK);
    room_check.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut record = tokio::time::interval(RECORD_INTERVAL);
    record.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut review = tokio::time::interval(REVIEW_INTERVAL);
    review.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let received = tokio::select! {
            received = socket.recv(&mut batch) => received,
            _ = room_check.tick(), if !intake.chunks.is_empty() => {
                intake.look_for_room();
                continue;
            }
            _ = record.tick(), if !intake.tallies.is_empty() => {
                intake.tallies.flush();
                continue;
            }
            _ = review.tick(), if !intake.port.sessions.is_empty() => {
                intake.review_sessions();
                intake.reply_all().await;
                continue;
            }
        };
        if let Err(error) = received {
            debug!(%error, "clients' port");
            tokio::task::yield_now().await;
            continue;
        }
        for datagram in batch.datagrams() {
            intake.take(datagram);
        }
        intake.reply_all().await;
    }
}

struct Intake {
    port: Arc<Port>,
    keys: Keys,
    counters: DatagramCounters,
    /// Of sealed datagrams.
    sealed: DatagramCounters,
    chunks: Reassembler<TaskKey>,
    /// Tasks that were told lately that there is no room for their Chunks, and when, oldest first.
    without_room: VecDeque<(Instant, TaskKey)>,
    replies: SendBatch,
    proofs: Proofs,
    /// Messages that the audit trail gets.
    tallies: Tallies,
    /// Times of the last warnings: about an untrusted sender, an unknown version, a client without echoes.
    warned: Option<Instant>,
    warned_of_version: Option<Instant>,
    warned_of_mute: Option<Instant>,
}

/// Puts Tasks in Chunks together. No source of Chunks can keep the others out.
fn reassembler() -> Reassembler<TaskKey> {
    let usual = chunk::Limits::default();
    let limits = chunk::Limits {
        timeout: CHUNKS_KEPT,
        // The longest payload, with its bookkeeping. When memory runs out, the client that holds the most of
        // it gives way.
        max_bytes: usual.max_payload / 8 * 9,
        ..usual
    };
    let share = Share {
        bytes: limits.max_bytes,
        ..limits.half()
    };
    Reassembler::by_source(limits, share, |key| key.client.ip())
}

impl Intake {
    fn new(port: Arc<Port>, keys: Keys) -> Self {
        Self {
            keys,
            counters: port.mesh.metrics.datagrams("clients"),
            sealed: port.mesh.metrics.datagrams("sealed"),
            tallies: Tallies::new(port.mesh.audit.clone(), "dcf"),
            port,
            chunks: reassembler(),
            without_room: VecDeque::new(),
            replies: SendBatch::new(),
            proofs: Proofs::new(&random::bytes(), Instant::now()),
            warned: None,
            warned_of_version: None,
            warned_of_mute: None,
        }
    }

    async fn reply_all(&mut self) {
        if !self.replies.is_empty()
            && let Err(error) = self.port.socket.send(&mut self.replies).await
        {
            debug!(%error, "replies not sent");
            self.replies.clear();
        }
    }

    fn take(&mut self, datagram: Datagram<'_>) {
        let data = datagram.data;
        let client = datagram.from;
        let version = Version::of(data);
        let message = &data[version.prefix().len()..];
        let Ok(header) = Header::decode(message) else {
            self.counters.malformed.inc();
            return;
        };
        if let Err(DecodeError::OtherVersion(byte)) = Header::decode_datagram(data) {
            self.counters.malformed.inc();
            self.warn_of_version(client, byte);
            return;
        }
        let Some(payload) = message[HEADER_LEN..].get(..header.payload_len as usize) else {
            self.counters.malformed.inc();
            return;
        };
        let key = TaskKey {
            client,
            version,
            sequence: header.sequence,
            session: None,
        };
        if header.kind() == MsgType::SEALED && version == Version::V5_0 {
            return self.take_sealed(datagram);
        }
        if !self.port.mesh.trusts(client.ip()) {
            self.counters.untrusted.inc();
            self.turn_away(key, header);
            return;
        }
        if !self.port.mesh.live().knows(client.ip()) && !self.proofs.knows(client, Instant::now()) {
            let room = message.len() - HEADER_LEN;
            if let Some(reply) = self.verify(key, client, (header.kind(), payload), room) {
                queue(&mut self.replies, &self.port.sessions, key, &reply);
            }
            return;
        }
        self.message(key, header, Bytes::copy_from_slice(payload));
    }

    /// A datagram of a session.
    fn take_sealed(&mut self, datagram: Datagram<'_>) {
        let (from, now) = (datagram.from, Instant::now());
        let Ok(message) = Message::decode_datagram(Bytes::copy_from_slice(datagram.data)) else {
            self.sealed.malformed.inc();
            return;
        };
        let Some(opened) = self.port.sessions.open(&message, now) else {
            self.sealed.untrusted.inc();
            return;
        };
        let Ok((Version::V5_0, header)) = Header::decode_datagram(&opened.inner) else {
            self.sealed.malformed.inc();
            return;
        };
        self.sealed.accepted.inc();
        let session = opened.session;
        let key = TaskKey {
            client: opened.home,
            version: Version::V5_0,
            sequence: header.sequence,
            session: Some(session),
        };
        let body = opened.inner.slice(HEADER_LEN..);
        let payload = body.slice(..header.payload_len as usize);
        // The holder of a token may name another address than its own, also one that another client has
        // proven. Until it is proven in this session, answers are no longer than what they answer.
        if !self.port.mesh.live().knows(from.ip()) && !self.port.sessions.is_at(session, from) {
            let asked = (header.kind(), &payload[..]);
            let Some(reply) = self.verify(key, from, asked, body.len()) else {
                return;
            };
            if let Some(sealed) = self.port.sessions.seal_unproven(session, &reply, now) {
                self.replies.push_parts(from, &[&sealed]);
            }
            if reply.kind == MsgType::ACK {
                // It is proven now. If the session is over, that is told with the next message.
                self.port.sessions.heard(session, from, now);
            }
            return;
        }
        if !self.port.sessions.heard(session, from, now) {
            let end = self.port.sessions.tell_end(session, key.sequence, now);
            if let Some((to, sealed)) = end {
                self.replies.push_parts(to, &[&sealed]);
            }
            return;
        }
        self.message(key, header, payload);
    }

    /// Ends the sessions that are over, and tells their clients.
    fn review_sessions(&mut self) {
        let wall = SystemTime::now();
        let again = |admitted: &_| self.keys.admit_again(admitted, wall);
        for (to, sealed) in self.port.sessions.review(Instant::now(), again) {
            self.replies.push_parts(to, &[&sealed]);
        }
    }

    /// A message of a client that is served.
    fn message(&mut self, key: TaskKey, header: Header, payload: Bytes) {
        if !header.kind().is_assigned() {
            self.counters.unexpected.inc();
            let text = format!("message type {:#04x} is not known here", header.msg_type);
            self.refuse(key, ErrorCode::INVALID_PAYLOAD, &text);
            return;
        }
        match header.kind() {
            MsgType::TASK => {
                self.accepted(key, MsgType::TASK, payload.len());
                self.task(key, payload);
            }
            MsgType::CHUNK => self.chunk(key, payload),
            // A shim asks after a task whose client does not.
            MsgType::HEALTH if payload == ASK_AFTER_TASK => {
                self.accepted(key, MsgType::HEALTH, payload.len());
                if lock(&self.port.dedup).is_running(key) {
                    self.send_ack(key);
                }
            }
            MsgType::HEALTH => {
                self.accepted(key, MsgType::HEALTH, payload.len());
                let unready = self.port.mesh.health.unready_reason();
                let text = unready.unwrap_or_else(|| "ready".into());
                let text = text[..text.floor_char_boundary(max_answer(key))].to_owned();
                self.reply(key, MsgType::HEALTH, text);
            }
            MsgType::CHALLENGE_REPLY => {
                self.tallies
                    .count(MsgType::CHALLENGE_REPLY, key.client.ip(), payload.len());
                self.reply(key, MsgType::ACK, "");
            }
            // Nothing that may itself be an answer is answered: two ends would never stop.
            _ => {
                self.counters.unexpected.inc();
            }
        }
    }

    /// Counts a message that was accepted.
    fn accepted(&mut self, key: TaskKey, kind: MsgType, bytes: usize) {
        self.counters.accepted.inc();
        self.tallies.count(kind, key.client.ip(), bytes);
    }

    /// The answer to a client that has not shown yet that it has the address that it sends from.
    fn verify(
        &mut self,
        key: TaskKey,
        client: SocketAddr,
        message: (MsgType, &[u8]),
        room: usize,
    ) -> Option<Message> {
        let now = Instant::now();
        if matches!(message.0, MsgType::TASK | MsgType::CHUNK)
            && self.proofs.is_mute(client.ip(), now)
            && is_due(&mut self.warned_of_mute)
        {
            warn!(
                source = %client.ip(),
                version = ?key.version,
                "a DCF client does not answer Challenges and gets no answers: it seems to be of an older version; update it, or list its network in unverified_networks"
            );
        }
        let (kind, payload) = match self.proofs.ask(client, message, room, now) {
            ProofReply::Challenge(cookie) => (MsgType::CHALLENGE, Bytes::from(cookie.to_vec())),
            ProofReply::Verified => {
                self.tallies.count(message.0, client.ip(), message.1.len());
                (MsgType::ACK, Bytes::new())
            }
            ProofReply::Health => (MsgType::HEALTH, Bytes::new()),
            ProofReply::Silence => {
                self.counters.untrusted.inc();
                return None;
            }
        };
        Some(Message::new(kind, key.sequence, timestamp_us(), payload))
    }

    /// Tells a stranger why there is no answer, in no more bytes than the stranger sent.
    fn turn_away(&mut self, key: TaskKey, header: Header) {
        if is_due(&mut self.warned) {
            warn!(source = %key.client.ip(), "plain DCF from an untrusted address; add its network to trusted_networks to accept it");
        }
        let room = (header.payload_len as usize)
            .saturating_sub(1)
            .min(NOT_TRUSTED.len());
        if header.kind() == MsgType::TASK && room > 0 {
            self.refuse(key, ErrorCode::UNAUTHORIZED, &NOT_TRUSTED[..room]);
        }
    }

    fn warn_of_version(&mut self, source: SocketAddr, byte: u8) {
        if is_due(&mut self.warned_of_version) {
            warn!(%source, "datagrams that begin with {byte:#04x} are dropped: DCF v5.0.0 and v5.1 (0x51) are understood, and the client seems to speak another version");
        }
    }

    fn chunk(&mut self, key: TaskKey, payload: Bytes) {
        let now = Instant::now();
        self.look_for_room();
        let is_over =
            |(at, _): &(Instant, TaskKey)| now.saturating_duration_since(*at) >= NO_ROOM_FOR;
        while self.without_room.front().is_some_and(is_over) {
            self.without_room.pop_front();
        }
        // One Error for all of its Chunks; a part of it would only take room.
        let bytes = payload.len();
        if self.without_room.iter().any(|(_, refused)| *refused == key) {
            return self.accepted(key, MsgType::CHUNK, bytes);
        }
        let pushed = Chunk::parse(&payload).and_then(|chunk| self.chunks.push(key, &chunk, now));
        match pushed {
            Err(failure @ ChunkError::NoRoom) => {
                self.accepted(key, MsgType::CHUNK, bytes);
                if self.without_room.len() >= MOST_WITHOUT_ROOM {
                    self.without_room.pop_front();
                }
                self.without_room.push_back((now, key));
                self.refuse(key, ErrorCode::WORKER_BUSY, &failure.to_string());
            }
            Ok(None) => self.accepted(key, MsgType::CHUNK, bytes),
            Ok(Some(payload)) => {
                self.accepted(key, MsgType::CHUNK, bytes);
                self.task(key, payload);
            }
            Err(failure) => {
                self.counters.malformed.inc();
                let code = match failure {
                    ChunkError::Corrupt { .. } => ErrorCode::CHUNK_MISSING,
                    _ => ErrorCode::INVALID_PAYLOAD,
                };
                self.refuse(key, code, &failure.to_string());
            }
        }
    }

    /// Unfinished payloads have the memory that requests leave, and no more.
    fn look_for_room(&mut self) {
        self.chunks.expire(Instant::now());
        let left = usize::try_from(self.port.mesh.unleased());
        self.chunks.set_room(left.unwrap_or(usize::MAX));
    }

    /// Nothing of the payload is looked at here, where all clients wait.
    fn task(&mut self, key: TaskKey, payload: Bytes) {
        let seen = lock(&self.port.dedup).task(key, &payload, Instant::now());
        match seen {
            Seen::Answered(answer) if is_single(key, &answer) => {
                queue(&mut self.replies, &self.port.sessions, key, &answer);
            }
            Seen::Answered(answer) => self.port.large.send_again(key, &answer),
            Seen::Running if self.port.wants_acks(key) => self.send_ack(key),
            Seen::Running => {}
            Seen::New(run) => {
                // Its payload, and the request parsed from it, as long as it runs.
                let bytes = 2 * payload.len() as u64 + PER_TASK;
                let client = self.port.client(key);
                let origin = client.map_or(Origin::Unknown, |client| client.origin());
                let lease = match self.port.mesh.lease(origin, bytes) {
                    Ok(lease) => lease,
                    Err(error) => {
                        lock(&self.port.dedup).forget(key, run);
                        return self.refuse(key, ErrorCode::WORKER_BUSY, &error.to_string());
                    }
                };
                // Chunks left over from the answer to an earlier task of that name are not part of this one.
                self.port.large.stop(key);
                let port = self.port.clone();
                let answer = async move { port.answer(key, run, payload, lease).await };
                self.port.running.spawn(answer);
            }
        }
    }

    /// Reports that a task runs, and the cause of its wait.
    fn send_ack(&mut self, key: TaskKey) {
        queue(
            &mut self.replies,
            &self.port.sessions,
            key,
            &self.port.ack(key),
        );
    }

    fn refuse(&mut self, key: TaskKey, code: ErrorCode, text: &str) {
        queue(
            &mut self.replies,
            &self.port.sessions,
            key,
            &error(key, code, text),
        );
    }

    fn reply(&mut self, key: TaskKey, kind: MsgType, payload: impl Into<Bytes>) {
        let message = Message::new(kind, key.sequence, timestamp_us(), payload);
        queue(&mut self.replies, &self.port.sessions, key, &message);
    }
}

/// True if it is time for another warning; if so, that is noted.
fn is_due(warned: &mut Option<Instant>) -> bool {
    let now = Instant::now();
    let due = warned.is_none_or(|at| now - at >= WARN_EVERY);
    if due {
        *warned = Some(now);
    }
    due
}

/// Payload of a Health that asks whether the task with its sequence runs; it is answered by an Ack if so.
const ASK_AFTER_TASK: &[u8] = b"task";
/// ASCII, so that any part of it is text.
const NOT_TRUSTED: &str = "your address is not trusted here: see trusted_networks";
/// Bytes that a task is charged besides its payload, for the answer that it may become.
const PER_TASK: u64 = 16 << 10;
const WARN_EVERY: Duration = Duration::from_secs(60);
/// Time for which Chunks of a Task are dropped after an Error said that there is no room for them.
const NO_ROOM_FOR: Duration = Duration::from_secs(2);
const MOST_WITHOUT_ROOM: usize = 64;
/// Time that Chunks of a Task wait for the others.
const CHUNKS_KEPT: Duration = Duration::from_secs(60);
/// How often counted messages go to the audit trail.
const RECORD_INTERVAL: Duration = Duration::from_secs(1);
/// How often sessions are looked after: the end of a key or token ends its sessions within this time.
const REVIEW_INTERVAL: Duration = Duration::from_secs(1);
/// How often unfinished payloads make room for requests.
const ROOM_CHECK: Duration = Duration::from_millis(100);
