//! The clients' port, 7777/udp: Tasks in, Results, Partials and Errors out.

mod chunk_sender;
mod proof;

use std::collections::{HashMap, HashSet, VecDeque};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use dcf::chunk::{self, Chunk, ChunkError, MAX_PAYLOAD, Reassembler, Share};
use dcf::{DecodeError, ErrorCode, HEADER_LEN, Header, Message, MsgType, Version};
use mesh_base::random;
use mesh_control::dedup::{Dedup, Run, Seen, TaskKey};
use mesh_control::fair::{Ingress, Origin, Source};
use mesh_control::placement::Refusal;
use mesh_control::registry::Worker;
use mesh_control::request::AnswerError;
use mesh_net::udp::{BatchSocket, Datagram, RecvBatch, SendBatch};
use tokio::time::MissedTickBehavior;
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

use self::chunk_sender::ChunkSender;
use self::proof::{Proofs, Verdict};
use crate::api::dcf::{DcfEmbed, DcfGenerate, DcfTask};
use crate::api::parse;
use crate::flight::drive::drive;
use crate::flight::embed::embed;
use crate::flight::event::{Event, FOR_ROOM, words};
use crate::flight::task::Task;
use crate::ids;
use crate::mesh::{Lease, Mesh, timestamp_us};
use crate::metrics::{DatagramCounters, Front};

/// Serves the port; never returns. Answers that are being made are in `running`.
pub(crate) async fn serve(mesh: Arc<Mesh>, socket: Arc<BatchSocket>, running: TaskTracker) {
    let counters = mesh.metrics.datagrams("clients");
    let dedup = Mutex::new(Dedup::new(mesh.config.dedup_limits()));
    let port = Arc::new(Port {
        mesh,
        large: ChunkSender::new(socket.clone(), running.clone()),
        socket,
        dedup,
        waits: Mutex::default(),
        acks: Mutex::default(),
        running,
    });
    let mut intake = Intake {
        port,
        counters,
        chunks: reassembler(),
        without_room: VecDeque::new(),
        replies: SendBatch::new(),
        proofs: Proofs::new(&random::bytes(), Instant::now()),
        warned: None,
        warned_of_version: None,
        warned_of_mute: None,
    };
    let mut batch = RecvBatch::new();
    // One timer for all turns: other datagrams do not put it off.
    let mut room_check = tokio::time::interval(ROOM_CHECK);
    room_check.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let received = tokio::select! {
            received = intake.port.socket.recv(&mut batch) => received,
            _ = room_check.tick(), if !intake.chunks.is_empty() => {
                intake.look_for_room();
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
        if !intake.replies.is_empty()
            && let Err(error) = intake.port.socket.send(&mut intake.replies).await
        {
            debug!(%error, "replies not sent");
            intake.replies.clear();
        }
    }
}

/// State that tasks need to answer.
struct Port {
    mesh: Arc<Mesh>,
    socket: Arc<BatchSocket>,
    large: Arc<ChunkSender>,
    dedup: Mutex<Dedup>,
    /// Causes of the waits of running tasks, in words; no entry for a task whose answer grows.
    waits: Mutex<HashMap<TaskKey, String>>,
    /// Running tasks that asked for Acks.
    acks: Mutex<HashSet<TaskKey>>,
    running: TaskTracker,
}

/// State of the receiving loop.
struct Intake {
    port: Arc<Port>,
    counters: DatagramCounters,
    chunks: Reassembler<TaskKey>,
    /// Tasks that were told lately that there is no room for their Chunks, and when, oldest first.
    without_room: VecDeque<(Instant, TaskKey)>,
    replies: SendBatch,
    proofs: Proofs,
    /// Time of the last warning about an untrusted sender.
    warned: Option<Instant>,
    /// Time of the last warning about a sender of an unknown version.
    warned_of_version: Option<Instant>,
    /// Time of the last warning about a client that does not answer Challenges.
    warned_of_mute: Option<Instant>,
}

/// A client as it is answered.
#[derive(Debug, Clone, Copy)]
struct Peer {
    address: SocketAddr,
    version: Version,
}

impl Peer {
    fn task(self, sequence: u32) -> TaskKey {
        TaskKey {
            client: self.address,
            version: self.version,
            sequence,
        }
    }
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
    fn take(&mut self, datagram: Datagram<'_>) {
        let data = datagram.data;
        let peer = Peer {
            address: datagram.from,
            version: Version::of(data),
        };
        let message = &data[peer.version.prefix().len()..];
        let Ok(header) = Header::decode(message) else {
            self.counters.malformed.inc();
            return;
        };
        let decoded = Header::decode_datagram(data);
        if let Err(DecodeError::OtherVersion(byte)) = decoded {
            self.counters.malformed.inc();
            self.warn_of_version(peer.address, byte);
            return;
        }
        let Some(payload) = message[HEADER_LEN..].get(..header.payload_len as usize) else {
            self.counters.malformed.inc();
            return;
        };
        if !self.port.mesh.trusts(peer.address.ip()) {
            self.counters.untrusted.inc();
            self.turn_away(peer, header);
            return;
        }
        if !self.port.mesh.live().knows(peer.address.ip())
            && !self.proofs.knows(peer.address, Instant::now())
        {
            let room = message.len() - HEADER_LEN;
            return self.verify(peer, header, payload, room);
        }
        if !header.kind().is_assigned() {
            self.counters.unexpected.inc();
            let text = format!("message type {:#04x} is not known here", header.msg_type);
            self.refuse(peer, header.sequence, ErrorCode::INVALID_PAYLOAD, &text);
            return;
        }
        let payload = Bytes::copy_from_slice(payload);
        match header.kind() {
            MsgType::TASK => {
                self.counters.accepted.inc();
                self.task(peer, header.sequence, payload);
            }
            MsgType::CHUNK => self.chunk(peer, header.sequence, payload),
            // A shim asks after a task whose client does not.
            MsgType::HEALTH if payload == ASK_AFTER_TASK => {
                self.counters.accepted.inc();
                let key = peer.task(header.sequence);
                if self.port.dedup().is_running(key) {
                    self.send_ack(key);
                }
            }
            MsgType::HEALTH => {
                self.counters.accepted.inc();
                let text = self
                    .port
                    .mesh
                    .health
                    .unready_reason()
                    .unwrap_or_else(|| "ready".into());
                let text = text[..text.floor_char_boundary(peer.version.max_answer())].to_owned();
                self.reply(
                    peer,
                    &Message::new(MsgType::HEALTH, header.sequence, timestamp_us(), text),
                );
            }
            MsgType::CHALLENGE_REPLY => {
                let ack = Message::new(MsgType::ACK, header.sequence, timestamp_us(), "");
                self.reply(peer, &ack);
            }
            // Nothing that may itself be an answer is answered: two ends would never stop.
            _ => {
                self.counters.unexpected.inc();
            }
        }
    }

    /// Answers a client that has not shown yet that it has the address that it sends from.
    fn verify(&mut self, peer: Peer, header: Header, payload: &[u8], room: usize) {
        let is_task = matches!(header.kind(), MsgType::TASK | MsgType::CHUNK);
        if is_task
            && self.proofs.is_mute(peer.address.ip(), Instant::now())
            && is_due(&mut self.warned_of_mute)
        {
            warn!(
                source = %peer.address.ip(),
                version = ?peer.version,
                "a DCF client does not answer Challenges and gets no answers: it seems to be of an older version; update it, or list its network in unverified_networks"
            );
        }
        let message = (header.kind(), payload);
        let verdict = self.proofs.ask(peer.address, message, room, Instant::now());
        let (kind, payload) = match verdict {
            Verdict::Challenge(cookie) => (MsgType::CHALLENGE, Bytes::copy_from_slice(&cookie)),
            Verdict::Verified => (MsgType::ACK, Bytes::new()),
            Verdict::Health => (MsgType::HEALTH, Bytes::new()),
            Verdict::Silence => {
                self.counters.untrusted.inc();
                return;
            }
        };
        let answer = Message::new(kind, header.sequence, timestamp_us(), payload);
        self.reply(peer, &answer);
    }

    /// Tells a stranger why there is no answer, in no more bytes than the stranger sent.
    fn turn_away(&mut self, peer: Peer, header: Header) {
        if is_due(&mut self.warned) {
            warn!(source = %peer.address.ip(), "plain DCF from an untrusted address; add its network to trusted_networks to accept it");
        }
        let room = (header.payload_len as usize)
            .saturating_sub(1)
            .min(NOT_TRUSTED.len());
        if header.kind() == MsgType::TASK && room > 0 {
            let text = &NOT_TRUSTED[..room];
            self.refuse(peer, header.sequence, ErrorCode::UNAUTHORIZED, text);
        }
    }

    fn warn_of_version(&mut self, source: SocketAddr, byte: u8) {
        if is_due(&mut self.warned_of_version) {
            warn!(%source, "datagrams that begin with {byte:#04x} are dropped: DCF v5.0.0 and v5.1 (0x51) are understood, and the client seems to speak another version");
        }
    }

    fn chunk(&mut self, peer: Peer, sequence: u32, payload: Bytes) {
        let key = peer.task(sequence);
        let now = Instant::now();
        self.look_for_room();
        let is_over =
            |(at, _): &(Instant, TaskKey)| now.saturating_duration_since(*at) >= NO_ROOM_FOR;
        while self.without_room.front().is_some_and(is_over) {
            self.without_room.pop_front();
        }
        // One Error for all of its Chunks; a part of it would only take room.
        if self.without_room.iter().any(|(_, refused)| *refused == key) {
            self.counters.accepted.inc();
            return;
        }
        let pushed = Chunk::parse(&payload).and_then(|chunk| self.chunks.push(key, &chunk, now));
        match pushed {
            Err(failure @ ChunkError::NoRoom) => {
                self.counters.accepted.inc();
                if self.without_room.len() >= MOST_WITHOUT_ROOM {
                    self.without_room.pop_front();
                }
                self.without_room.push_back((now, key));
                self.refuse(peer, sequence, ErrorCode::WORKER_BUSY, &failure.to_string());
            }
            Ok(None) => {
                self.counters.accepted.inc();
            }
            Ok(Some(payload)) => {
                self.counters.accepted.inc();
                self.task(peer, sequence, payload);
            }
            Err(failure) => {
                self.counters.malformed.inc();
                let code = match failure {
                    ChunkError::Corrupt { .. } => ErrorCode::CHUNK_MISSING,
                    _ => ErrorCode::INVALID_PAYLOAD,
                };
                self.refuse(peer, sequence, code, &failure.to_string());
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
    fn task(&mut self, peer: Peer, sequence: u32, payload: Bytes) {
        let key = peer.task(sequence);
        let seen = self.port.dedup().task(key, &payload, Instant::now());
        match seen {
            Seen::Answered(answer) if answer.is_single_answer(peer.version) => {
                self.reply(peer, &answer);
            }
            Seen::Answered(answer) => self.port.large.send_again(key, &answer),
            Seen::Running if self.port.wants_acks(key) => self.send_ack(key),
            Seen::Running => {}
            Seen::New(run) => {
                // Its payload, and the request parsed from it, as long as it runs.
                let bytes = 2 * payload.len() as u64 + PER_TASK;
                let origin = Origin::of(peer.address.ip());
                let lease = match self.port.mesh.lease(origin, bytes) {
                    Ok(lease) => lease,
                    Err(error) => {
                        self.port.dedup().forget(key, run);
                        let code = ErrorCode::WORKER_BUSY;
                        return self.refuse(peer, sequence, code, &error.to_string());
                    }
                };
                // Chunks left over from the answer to an earlier task of that name are not part of this one.
                self.port.large.stop(key);
                let port = self.port.clone();
                self.port
                    .running
                    .spawn(async move { port.answer(key, run, payload, lease).await });
            }
        }
    }

    /// Reports that a task runs, and the cause of its wait.
    fn send_ack(&mut self, key: TaskKey) {
        let ack = self.port.ack(key);
        queue(&mut self.replies, (key.client, key.version), &ack);
    }

    fn refuse(&mut self, peer: Peer, sequence: u32, code: ErrorCode, text: &str) {
        self.reply(peer, &error(peer.version, sequence, code, text));
    }

    fn reply(&mut self, to: Peer, message: &Message) {
        queue(&mut self.replies, (to.address, to.version), message);
    }
}

impl Port {
    /// Runs a task and sends its one answer.
    async fn answer(&self, key: TaskKey, run: Run, payload: Bytes, mut lease: Lease) {
        let TaskKey {
            client,
            version,
            sequence,
        } = key;
        let _waits = Waits { port: self, key };
        let result = match self.read(key, payload.clone()).await {
            Ok(DcfTask::Generate(task)) => self.generate(key, run, task, payload).await,
            Ok(DcfTask::Embed(task)) => {
                let origin = Origin::of(client.ip());
                self.embed(task, origin, &mut lease).await
            }
            Err(failure) => Err(failure),
        };
        let (answer, keep) = match result {
            Err(failure) => {
                let (code, keep) = code_of(&failure);
                (error(version, sequence, code, &failure.to_string()), keep)
            }
            Ok(payload) if payload.len() > MAX_PAYLOAD => {
                let (len, limit) = (payload.len(), MAX_PAYLOAD);
                let failure = ChunkError::TooLarge { len, limit };
                let answer = error(version, sequence, ErrorCode::INTERNAL, &failure.to_string());
                (answer, true)
            }
            Ok(payload) => (
                Message::new(MsgType::RESULT, sequence, timestamp_us(), payload),
                true,
            ),
        };
        {
            let mut dedup = self.dedup();
            if !dedup.is_current(key, run) {
                return;
            }
            if keep {
                dedup.finished(key, run, answer.clone(), Instant::now());
            } else {
                dedup.forget(key, run);
            }
        }
        if !answer.is_single_answer(version) {
            return self.large.send(key, &answer);
        }
        let mut batch = SendBatch::new();
        queue(&mut batch, (client, version), &answer);
        if let Err(error) = self.socket.send(&mut batch).await {
            debug!(%error, %client, "answer not sent");
        }
    }

    /// Parses a payload. Acknowledges it, if it asks for that.
    async fn read(&self, key: TaskKey, payload: Bytes) -> Result<DcfTask, AnswerError> {
        let rejected = |text: String| AnswerError::Rejected {
            code: ErrorCode::INVALID_PAYLOAD,
            text,
        };
        let parsed = parse::parsed(&self.mesh.reading, payload, DcfTask::parse).await;
        let task = parsed.map_err(|_| rejected("the request could not be read".to_owned()))?;
        let task = task.map_err(|invalid| rejected(invalid.message))?;
        if task.ack() {
            self.acks().insert(key);
            let mut batch = SendBatch::new();
            queue(&mut batch, (key.client, key.version), &self.ack(key));
            if let Err(error) = self.socket.try_send(&mut batch) {
                debug!(%error, client = %key.client, "ack not sent");
            }
        }
        Ok(task)
    }

    /// Returns true if a running task asked for Acks.
    fn wants_acks(&self, key: TaskKey) -> bool {
        self.acks().contains(&key)
    }

    fn ack(&self, key: TaskKey) -> Message {
        let what = self.waits().get(&key).cloned().unwrap_or_default();
        Message::new(MsgType::ACK, key.sequence, timestamp_us(), what)
    }

    fn acks(&self) -> MutexGuard<'_, HashSet<TaskKey>> {
        self.acks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Vectors as the body of `/v1/embeddings` has them.
    async fn embed(
        &self,
        task: DcfEmbed,
        origin: Origin,
        lease: &mut Lease,
    ) -> Result<Bytes, AnswerError> {
        let mut asked = task.asked;
        let mut task = std::mem::take(&mut asked.task);
        task.id = ids::fresh("dcf");
        task.origin = origin;
        let embedded = embed(&self.mesh, Front::Dcf, task, lease).await?;
        Ok(asked.answer(&embedded).into())
    }

    /// The text of an answer; meanwhile Partials go out where they were asked for.
    async fn generate(
        &self,
        key: TaskKey,
        run: Run,
        task: DcfGenerate,
        payload: Bytes,
    ) -> Result<Bytes, AnswerError> {
        // A worker of DCF v5 cannot stream; without any other worker, the whole answer at once is better than
        // none.
        let old_workers_only = || {
            self.mesh
                .with_registry(|registry| registry.iter().all(Worker::is_legacy))
        };
        let fits = payload.len() <= Version::V5_1.max_payload();
        let plain = fits && (!task.stream || old_workers_only());
        let stream = task.stream;
        let task = Task {
            id: ids::fresh("dcf"),
            model: task.model,
            prompt: Arc::new(task.prompt),
            params: task.params,
            // Clients here have no keys.
            salt: 0,
            legacy: plain.then_some(payload),
            source: Source {
                ingress: Ingress::Dcf,
                origin: Origin::of(key.client.ip()),
            },
        };
        let mut text = String::new();
        let mut whole = None;
        let mut failure = None;
        let grow = |text: &mut String, piece: &str| {
            if stream && !piece.is_empty() && self.dedup().is_current(key, run) {
                self.send_partial(key, text.len(), piece);
            }
            text.push_str(piece);
        };
        let mut waits = false;
        let emit = |event| match event {
            Event::Queued => {
                waits = true;
                self.waits().insert(key, FOR_ROOM.to_owned());
            }
            Event::Waits(progress) => {
                waits = true;
                self.waits().insert(key, words(&progress));
            }
            Event::Placed(_) => {}
            Event::Delta(delta) => {
                if std::mem::take(&mut waits) {
                    self.waits().remove(&key);
                }
                grow(&mut text, &delta.text);
            }
            Event::Complete(complete) => grow(&mut text, &complete.done.text),
            Event::Whole(bytes) => whole = Some(bytes),
            Event::Failed(error) => failure = Some(error),
        };
        drive(&self.mesh, Front::Dcf, task, emit, std::future::pending()).await;

        match failure {
            Some(failure) => Err(failure),
            None => Ok(whole.unwrap_or_else(|| text.into())),
        }
    }

    /// Sends a piece of an answer now or never: the Result has all of it.
    fn send_partial(&self, key: TaskKey, offset: usize, piece: &str) {
        let (client, version) = (key.client, key.version);
        let Ok(offset) = u32::try_from(offset) else {
            return;
        };
        let partial = Message::partial(key.sequence, timestamp_us(), offset, piece);
        if !partial.is_single_answer(version) {
            return;
        }
        let mut batch = SendBatch::new();
        queue(&mut batch, (client, version), &partial);
        if let Err(error) = self.socket.try_send(&mut batch) {
            debug!(%error, %client, "partial not sent");
        }
    }

    fn waits(&self) -> MutexGuard<'_, HashMap<TaskKey, String>> {
        self.waits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn dedup(&self) -> MutexGuard<'_, Dedup> {
        self.dedup.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Forgets the cause of a task's wait when the task has ended.
struct Waits<'a> {
    port: &'a Port,
    key: TaskKey,
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.port.waits().remove(&self.key);
        self.port.acks().remove(&self.key);
    }
}

fn queue(batch: &mut SendBatch, (to, version): (SocketAddr, Version), message: &Message) {
    let header = message.header().encode();
    batch.push_parts(to, &[version.prefix(), &header, &message.payload]);
}

/// An Error in one datagram: Chunks do not tell the kind of their message.
fn error(version: Version, sequence: u32, code: ErrorCode, text: &str) -> Message {
    let limit = LONGEST_ERROR.min(version.max_answer() - 1);
    let text = &text[..text.floor_char_boundary(limit)];
    Message::error(sequence, timestamp_us(), code, text)
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

/// The DCF code of a failure, and whether a repeat of the task gets the same failure again. Where it is over
/// in a moment, the repeat had better be a new try.
fn code_of(failure: &AnswerError) -> (ErrorCode, bool) {
    match failure {
        AnswerError::Refused(Refusal::QueueFull { .. }) => (ErrorCode::WORKER_BUSY, false),
        AnswerError::Refused(
            Refusal::NoWorker { .. }
            | Refusal::NoRing { .. }
            | Refusal::NoneAnswers { .. }
            | Refusal::TooOld { .. },
        ) => (ErrorCode::NO_WORKERS, false),
        AnswerError::Refused(Refusal::UnknownModel { .. }) => (ErrorCode::UNKNOWN_MODEL, false),
        AnswerError::Refused(Refusal::TooLong { .. }) => (ErrorCode::CONTEXT_TOO_LONG, true),
        AnswerError::Rejected { code, .. } => (*code, true),
        AnswerError::QueueTimeout(_) => (ErrorCode::WORKER_BUSY, false),
        AnswerError::Timeout(_) | AnswerError::Stalled(_) => (ErrorCode::TIMEOUT, true),
        AnswerError::WorkersFailed { .. } | AnswerError::WorkersDied { .. } => {
            (ErrorCode::INFERENCE_FAILED, true)
        }
        AnswerError::TooMuch(_) => (ErrorCode::WORKER_BUSY, false),
        AnswerError::ShuttingDown => (ErrorCode::DRAINING, false),
    }
}

/// Payload of a Health that asks whether the task with its sequence runs; it is answered by an Ack if so.
const ASK_AFTER_TASK: &[u8] = b"task";
/// ASCII, so that any part of it is text.
const NOT_TRUSTED: &str = "your address is not trusted here: see trusted_networks";
/// Bytes that a task is charged besides its payload, for the answer that it may become.
const PER_TASK: u64 = 16 << 10;
/// Most bytes of an Error's text, which may quote the client's payload.
const LONGEST_ERROR: usize = 4096;
const WARN_EVERY: Duration = Duration::from_secs(60);
/// How often unfinished payloads make room for requests.
const ROOM_CHECK: Duration = Duration::from_millis(100);
/// Time for which Chunks of a Task are dropped after an Error said that there is no room for them.
const NO_ROOM_FOR: Duration = Duration::from_secs(2);
const MOST_WITHOUT_ROOM: usize = 64;
/// Time that Chunks of a Task wait for the others.
const CHUNKS_KEPT: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_fits_a_datagram_however_much_it_quotes() {
        for version in [Version::V5_0, Version::V5_1] {
            let error = error(version, 1, ErrorCode::UNKNOWN_MODEL, &"é".repeat(100_000));
            assert!(error.is_single_answer(version) && error.error_body().is_some());
        }
    }

    #[test]
    fn failures_that_pass_are_not_kept() {
        let refused = |refusal| code_of(&AnswerError::Refused(refusal));
        assert_eq!(
            refused(Refusal::QueueFull {
                limit: 1,
                whose: Source::default(),
                yours: 1,
                sources: 1
            }),
            (ErrorCode::WORKER_BUSY, false)
        );
        assert_eq!(
            refused(Refusal::NoWorker {
                model: String::new()
            }),
            (ErrorCode::NO_WORKERS, false)
        );
        assert_eq!(
            code_of(&AnswerError::ShuttingDown),
            (ErrorCode::DRAINING, false)
        );
        let failed = AnswerError::WorkersFailed {
            attempts: 1,
            workers: 1,
            last: String::new(),
        };
        assert_eq!(code_of(&failed), (ErrorCode::INFERENCE_FAILED, true));
    }
}
