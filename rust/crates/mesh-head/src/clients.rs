//! The clients' port, 7777/udp: Tasks in, Results, Partials and Errors out.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use dcf::chunk::{self, Chunk, ChunkError, MAX_PAYLOAD, Reassembler};
use dcf::{ErrorCode, HEADER_LEN, Header, MAX_DATAGRAM_PAYLOAD, Message, MsgType};
use mesh_net::udp::{BatchSocket, Datagram, RecvBatch, SendBatch};
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

use crate::chunk_sender::ChunkSender;
use crate::core::dedup::{Dedup, Run, Seen, TaskKey};
use crate::core::placement::Refusal;
use crate::core::registry::Worker;
use crate::core::request::AnswerError;
use crate::drive::{Event, drive};
use crate::ids;
use crate::mesh::{Mesh, timestamp_us};
use crate::metrics::{DatagramCounters, Front};
use crate::task::{DcfEmbed, DcfGenerate, DcfTask, Task};

/// Serves the port for ever. Answers that are being made are in `running`.
pub async fn serve(mesh: Arc<Mesh>, socket: Arc<BatchSocket>, running: TaskTracker) {
    let counters = mesh.metrics.datagrams("clients");
    let dedup = Mutex::new(Dedup::new(mesh.config.dedup_limits()));
    let port = Arc::new(Port {
        mesh,
        large: ChunkSender::new(socket.clone(), running.clone()),
        socket,
        dedup,
        running,
    });
    let mut intake = Intake {
        port,
        counters,
        chunks: Reassembler::new(chunk::Limits::default()),
        replies: SendBatch::new(),
        warned: None,
    };
    let mut batch = RecvBatch::new();
    loop {
        if let Err(error) = intake.port.socket.recv(&mut batch).await {
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

/// What tasks need to answer.
struct Port {
    mesh: Arc<Mesh>,
    socket: Arc<BatchSocket>,
    large: Arc<ChunkSender>,
    dedup: Mutex<Dedup>,
    running: TaskTracker,
}

/// What the receiving loop holds.
struct Intake {
    port: Arc<Port>,
    counters: DatagramCounters,
    chunks: Reassembler<TaskKey>,
    replies: SendBatch,
    /// When a stranger was last warned about.
    warned: Option<Instant>,
}

impl Intake {
    fn take(&mut self, datagram: Datagram<'_>) {
        let from = datagram.from;
        let Ok(header) = Header::decode(datagram.data) else {
            self.counters.malformed.inc();
            return;
        };
        if datagram.data.len() - HEADER_LEN < header.payload_len as usize {
            self.counters.malformed.inc();
            return;
        }
        if !self.port.mesh.config.trusts(from.ip()) {
            self.counters.untrusted.inc();
            self.turn_away(from, header);
            return;
        }
        if !header.kind().is_assigned() {
            self.counters.unexpected.inc();
            let text = format!("message type {:#04x} is not known here", header.msg_type);
            self.reply(
                from,
                &error(header.sequence, ErrorCode::INVALID_PAYLOAD, &text),
            );
            return;
        }
        let payload = &datagram.data[HEADER_LEN..HEADER_LEN + header.payload_len as usize];
        match header.kind() {
            MsgType::TASK => {
                self.counters.accepted.inc();
                self.task(from, header.sequence, Bytes::copy_from_slice(payload));
            }
            MsgType::CHUNK => self.chunk(from, header.sequence, Bytes::copy_from_slice(payload)),
            MsgType::HEALTH => {
                self.counters.accepted.inc();
                let text = self
                    .port
                    .mesh
                    .health
                    .unready_reason()
                    .unwrap_or_else(|| "ready".into());
                self.reply(
                    from,
                    &Message::new(MsgType::HEALTH, header.sequence, timestamp_us(), text),
                );
            }
            // Nothing that may itself be an answer is answered: two ends would never stop.
            _ => {
                self.counters.unexpected.inc();
            }
        }
    }

    /// Tells a stranger why there is no answer, in no more bytes than the stranger sent.
    fn turn_away(&mut self, from: SocketAddr, header: Header) {
        let now = Instant::now();
        if self.warned.is_none_or(|at| now - at >= WARN_EVERY) {
            self.warned = Some(now);
            warn!(source = %from.ip(), "plain DCF from an untrusted address; add its network to trusted_networks to accept it");
        }
        let room = (header.payload_len as usize)
            .saturating_sub(1)
            .min(NOT_TRUSTED.len());
        if header.kind() == MsgType::TASK && room > 0 {
            self.reply(
                from,
                &error(
                    header.sequence,
                    ErrorCode::UNAUTHORIZED,
                    &NOT_TRUSTED[..room],
                ),
            );
        }
    }

    fn chunk(&mut self, from: SocketAddr, sequence: u32, payload: Bytes) {
        let pushed = Chunk::parse(&payload)
            .and_then(|chunk| self.chunks.push((from, sequence), &chunk, Instant::now()));
        match pushed {
            Ok(None) => {
                self.counters.accepted.inc();
            }
            Ok(Some(payload)) => {
                self.counters.accepted.inc();
                self.task(from, sequence, payload);
            }
            Err(failure) => {
                self.counters.malformed.inc();
                let code = match failure {
                    ChunkError::Corrupt { .. } => ErrorCode::CHUNK_MISSING,
                    _ => ErrorCode::INVALID_PAYLOAD,
                };
                self.reply(from, &error(sequence, code, &failure.to_string()));
            }
        }
    }

    fn task(&mut self, from: SocketAddr, sequence: u32, payload: Bytes) {
        let key = (from, sequence);
        let task = match DcfTask::parse(&payload) {
            Ok(task) => task,
            Err(invalid) => {
                return self.reply(
                    from,
                    &error(sequence, ErrorCode::INVALID_PAYLOAD, &invalid.message),
                );
            }
        };
        let seen = self.port.dedup().task(key, &payload, Instant::now());
        match seen {
            Seen::Answered(answer) if answer.fits_datagram() => self.reply(from, &answer),
            Seen::Answered(answer) => self.port.large.send_again(key, &answer),
            Seen::Running => self.acknowledge(&task, key),
            Seen::New(run) => {
                // What is left of the answer to an earlier task of that name is nothing to this one.
                self.port.large.stop(key);
                self.acknowledge(&task, key);
                let port = self.port.clone();
                self.port
                    .running
                    .spawn(async move { port.answer(key, run, task, payload).await });
            }
        }
    }

    fn acknowledge(&mut self, task: &DcfTask, (from, sequence): TaskKey) {
        if task.ack() {
            self.reply(
                from,
                &Message::new(MsgType::ACK, sequence, timestamp_us(), Bytes::new()),
            );
        }
    }

    fn reply(&mut self, to: SocketAddr, message: &Message) {
        queue(&mut self.replies, to, message);
    }
}

impl Port {
    /// Runs a task and sends its one answer.
    async fn answer(&self, key: TaskKey, run: Run, task: DcfTask, payload: Bytes) {
        let (client, sequence) = key;
        let result = match task {
            DcfTask::Generate(task) => self.generate(key, run, task, payload).await,
            DcfTask::Embed(task) => self.embed(task).await,
        };
        let (answer, keep) = match result {
            Err(failure) => {
                let (code, keep) = code_of(&failure);
                (error(sequence, code, &failure.to_string()), keep)
            }
            Ok(payload) if payload.len() > MAX_PAYLOAD => {
                let (len, limit) = (payload.len(), MAX_PAYLOAD);
                let failure = ChunkError::TooLarge { len, limit };
                let answer = error(sequence, ErrorCode::INTERNAL, &failure.to_string());
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
        if !answer.fits_datagram() {
            return self.large.send(key, &answer);
        }
        let mut batch = SendBatch::new();
        queue(&mut batch, client, &answer);
        if let Err(error) = self.socket.send(&mut batch).await {
            debug!(%error, %client, "answer not sent");
        }
    }

    /// Vectors as the body of `/v1/embeddings` has them.
    async fn embed(&self, task: DcfEmbed) -> Result<Bytes, AnswerError> {
        let mut asked = task.asked;
        let mut task = std::mem::take(&mut asked.task);
        task.id = ids::fresh("dcf");
        let embedded = crate::embed::embed(&self.mesh, Front::Dcf, task).await?;
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
        let (client, sequence) = key;
        // A v5.0.0 worker cannot stream; where there is no other, the whole answer at once is better than none.
        let old_workers_only = || {
            self.mesh
                .with_registry(|registry| registry.iter().all(Worker::is_legacy))
        };
        let plain = payload.len() <= MAX_DATAGRAM_PAYLOAD && (!task.stream || old_workers_only());
        let stream = task.stream;
        let task = Task {
            id: ids::fresh("dcf"),
            model: task.model,
            prompt: task.prompt,
            params: task.params,
            legacy: plain.then_some(payload),
        };
        let mut text = String::new();
        let mut whole = None;
        let mut failure = None;
        let grow = |text: &mut String, piece: &str| {
            if stream && !piece.is_empty() && self.dedup().is_current(key, run) {
                self.send_partial(client, sequence, text.len(), piece);
            }
            text.push_str(piece);
        };
        let emit = |event| match event {
            Event::Placed(_) => {}
            Event::Delta(delta) => grow(&mut text, &delta.text),
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
    fn send_partial(&self, client: SocketAddr, sequence: u32, offset: usize, piece: &str) {
        let Ok(offset) = u32::try_from(offset) else {
            return;
        };
        let partial = Message::partial(sequence, timestamp_us(), offset, piece);
        if !partial.fits_datagram() {
            return;
        }
        let mut batch = SendBatch::new();
        queue(&mut batch, client, &partial);
        if let Err(error) = self.socket.try_send(&mut batch) {
            debug!(%error, %client, "partial not sent");
        }
    }

    fn dedup(&self) -> MutexGuard<'_, Dedup> {
        self.dedup.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn queue(batch: &mut SendBatch, to: SocketAddr, message: &Message) {
    batch.push_parts(to, &[&message.header().encode(), &message.payload]);
}

/// An Error in one datagram: Chunks do not say what kind of message they were.
fn error(sequence: u32, code: ErrorCode, text: &str) -> Message {
    let text = &text[..text.floor_char_boundary(LONGEST_ERROR)];
    Message::error(sequence, timestamp_us(), code, text)
}

/// The DCF code of a failure, and whether a repeat of the task gets the same failure again. Where it is over in a moment,
/// the repeat had better be a new try.
fn code_of(failure: &AnswerError) -> (ErrorCode, bool) {
    match failure {
        AnswerError::Refused(Refusal::QueueFull { .. }) => (ErrorCode::WORKER_BUSY, false),
        AnswerError::Refused(
            Refusal::NoWorker { .. } | Refusal::NoRing { .. } | Refusal::TooOld { .. },
        ) => (ErrorCode::NO_WORKERS, false),
        AnswerError::Refused(Refusal::UnknownModel { .. }) => (ErrorCode::UNKNOWN_MODEL, false),
        AnswerError::Rejected { code, .. } => (*code, true),
        AnswerError::Timeout(_) => (ErrorCode::TIMEOUT, true),
        AnswerError::WorkersFailed { .. } => (ErrorCode::INFERENCE_FAILED, true),
        AnswerError::ShuttingDown => (ErrorCode::DRAINING, false),
    }
}

/// ASCII, so that any part of it is text.
const NOT_TRUSTED: &str = "your address is not trusted here: see trusted_networks";
/// Bytes of an Error's text; it may quote what the client sent.
const LONGEST_ERROR: usize = 4096;
const WARN_EVERY: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_fits_a_datagram_however_much_it_quotes() {
        let error = error(1, ErrorCode::UNKNOWN_MODEL, &"é".repeat(100_000));
        assert!(error.fits_datagram() && error.error_body().is_some());
    }

    #[test]
    fn failures_that_pass_are_not_kept() {
        let refused = |refusal| code_of(&AnswerError::Refused(refusal));
        assert_eq!(
            refused(Refusal::QueueFull { limit: 1 }),
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
            last: String::new(),
        };
        assert_eq!(code_of(&failed), (ErrorCode::INFERENCE_FAILED, true));
    }
}
