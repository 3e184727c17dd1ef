//! Tasks that run: from a payload to its one answer.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use bytes::Bytes;
use dcf::chunk::{ChunkError, MAX_PAYLOAD};
use dcf::{ErrorCode, Message, MsgType};
use mesh_control::dedup::{Dedup, Run, TaskKey};
use mesh_control::fair::{Ingress, Source};
use mesh_control::placement::Refusal;
use mesh_control::registry::Registry;
use mesh_control::request::AnswerError;
use mesh_curtain::Need;
use mesh_net::udp::{BatchSocket, SendBatch};
use tokio_util::task::TaskTracker;
use tracing::debug;

use super::chunk_sender::ChunkSender;
use super::reply::{error, is_single, queue};
use super::sealed::Sessions;
use crate::api::dcf::{DcfEmbed, DcfGenerate, DcfImage, DcfTask};
use crate::api::parse;
use crate::flight::embed::embed;
use crate::flight::event::{Event, FOR_ROOM, next_step, words};
use crate::flight::generate::generate;
use crate::flight::image;
use crate::flight::task::{GenerateTask, ImageRequest};
use crate::front::http::{ApiError, Client, ConcurrencyLimit, Pass, served_as};
use crate::ids;
use crate::locks::lock;
use crate::mesh::{Lease, Mesh, timestamp_us};
use crate::metrics::Front;
use crate::workers::MOST_TASK_BYTES;

pub(super) struct Port {
    pub(super) mesh: Arc<Mesh>,
    pub(super) socket: Arc<BatchSocket>,
    pub(super) large: Arc<ChunkSender>,
    pub(super) dedup: Mutex<Dedup>,
    /// Causes of the waits of running tasks, in words; no entry for a task whose answer grows.
    waits: Mutex<HashMap<TaskKey, String>>,
    /// Running tasks that asked for Acks.
    acks: Mutex<HashSet<TaskKey>>,
    pub(super) running: TaskTracker,
    pub(super) sessions: Arc<Sessions>,
    /// Shared with the HTTP API: what a key or token runs counts together.
    concurrency: Arc<ConcurrencyLimit>,
}

/// The reason for which a task gets no answer.
struct Failed {
    code: ErrorCode,
    text: String,
    /// A repeat of the task gets it again.
    keep: bool,
}

impl Port {
    pub(super) fn new(
        mesh: Arc<Mesh>,
        socket: Arc<BatchSocket>,
        (sessions, concurrency): (Arc<Sessions>, Arc<ConcurrencyLimit>),
        running: TaskTracker,
    ) -> Arc<Self> {
        Arc::new(Self {
            large: ChunkSender::new(socket.clone(), sessions.clone(), running.clone()),
            dedup: Mutex::new(Dedup::new(mesh.config.dedup_limits())),
            mesh,
            socket,
            waits: Mutex::default(),
            acks: Mutex::default(),
            running,
            sessions,
            concurrency,
        })
    }

    /// The client of a task; `None` if its session is over.
    pub(super) fn client(&self, key: TaskKey) -> Option<Client> {
        match key.session {
            None => Some(Client::at(key.client.ip())),
            Some(session) => self.sessions.client(session),
        }
    }

    /// Admits a task as the HTTP API does. Plain DCF has no limit for each client: behind an address there
    /// may be a shim with many.
    fn enter(&self, key: TaskKey, client: &Client) -> Result<Option<Pass>, Failed> {
        if key.session.is_none() {
            return Ok(None);
        }
        let pass = self.concurrency.enter(client, 1);
        let limit = self.mesh.config.http.concurrent_requests;
        pass.map(Some).ok_or_else(|| Failed {
            code: ErrorCode::RATE_LIMITED,
            text: ApiError::too_many(limit).message,
            keep: false,
        })
    }

    /// Runs a task and sends its one answer.
    pub(super) async fn answer(&self, key: TaskKey, run: Run, payload: Bytes, mut lease: Lease) {
        let _waits = Waits { port: self, key };
        let result = self.run(key, run, payload, &mut lease).await;
        let (answer, keep) = match result {
            Err(failed) => (error(key, failed.code, &failed.text), failed.keep),
            Ok(payload) if payload.len() > MAX_PAYLOAD => {
                let (len, limit) = (payload.len(), MAX_PAYLOAD);
                let failure = ChunkError::TooLarge { len, limit };
                (error(key, ErrorCode::INTERNAL, &failure.to_string()), true)
            }
            Ok(payload) => {
                let kind = MsgType::RESULT;
                (
                    Message::new(kind, key.sequence, timestamp_us(), payload),
                    true,
                )
            }
        };
        {
            let mut dedup = lock(&self.dedup);
            if !dedup.is_current(key, run) {
                return;
            }
            if keep {
                dedup.finished(key, run, answer.clone(), Instant::now());
            } else {
                dedup.forget(key, run);
            }
        }
        if !is_single(key, &answer) {
            return self.large.send(key, &answer);
        }
        let mut batch = SendBatch::new();
        queue(&mut batch, &self.sessions, key, &answer);
        if let Err(error) = self.socket.send(&mut batch).await {
            debug!(%error, client = %key.client, "answer not sent");
        }
    }

    /// Admits what the rights of a client allow.
    fn require(&self, client: &Client, need: Need<'_>) -> Result<(), ApiError> {
        client.papers.require(need).inspect_err(|_| {
            if let (Some(refused), Some(from)) = (client.papers.too_narrow("dcf"), client.address) {
                self.mesh.audit.refused_credential(refused, from);
            }
        })
    }

    /// Makes the payload of the answer.
    async fn run(
        &self,
        key: TaskKey,
        run: Run,
        payload: Bytes,
        lease: &mut Lease,
    ) -> Result<Bytes, Failed> {
        let client = self.client(key).ok_or_else(|| Failed {
            code: ErrorCode::UNAUTHORIZED,
            text: "the session is over: open another".to_owned(),
            keep: false,
        })?;
        let task = self.read(key, payload.clone()).await?;
        let _pass = self.enter(key, &client)?;
        let answer = match task {
            DcfTask::Generate(mut task) => {
                if !client.papers.is_for_all_models() {
                    task.model = task.model.map(|name| served_as(&self.mesh, name));
                    // The default may change until the request is placed.
                    task.model = task.model.or_else(|| self.mesh.default_model());
                    let model = task.model.as_deref().unwrap_or("*");
                    self.require(&client, Need::Infer(model))?;
                }
                self.generate(key, run, task, payload, &client).await?
            }
            DcfTask::Embed(task) => {
                self.require(&client, Need::Embed)?;
                self.embed(task, &client, lease).await?
            }
            DcfTask::Image(task) => {
                self.require(&client, Need::Image)?;
                self.image(key, task, payload, &client, lease).await?
            }
        };
        Ok(answer)
    }

    /// Parses a payload. Acknowledges it, if it asks for that.
    async fn read(&self, key: TaskKey, payload: Bytes) -> Result<DcfTask, AnswerError> {
        let parsed = parse::parsed(&self.mesh.reading, payload, DcfTask::parse).await;
        let unread = |_| AnswerError::invalid("the request could not be read".to_owned());
        let task = parsed.map_err(unread)?;
        let task = task.map_err(|invalid| AnswerError::invalid(invalid.message))?;
        if task.ack() {
            lock(&self.acks).insert(key);
            self.send_now(key, &self.ack(key));
        }
        Ok(task)
    }

    pub(super) fn wants_acks(&self, key: TaskKey) -> bool {
        lock(&self.acks).contains(&key)
    }

    pub(super) fn ack(&self, key: TaskKey) -> Message {
        let cause = lock(&self.waits).get(&key).cloned().unwrap_or_default();
        Message::new(MsgType::ACK, key.sequence, timestamp_us(), cause)
    }

    /// Vectors as the body of `/v1/embeddings` has them.
    async fn embed(
        &self,
        task: DcfEmbed,
        client: &Client,
        lease: &mut Lease,
    ) -> Result<Bytes, AnswerError> {
        let mut asked = task.asked;
        let mut task = std::mem::take(&mut asked.task);
        task.id = ids::fresh("dcf");
        task.origin = client.origin();
        task.holder = client.papers.holder();
        let embedded = embed(&self.mesh, Front::Dcf, task, lease).await?;
        Ok(asked.answer(&embedded).into())
    }

    /// The PNG file of an image.
    async fn image(
        &self,
        key: TaskKey,
        task: DcfImage,
        payload: Bytes,
        client: &Client,
        lease: &mut Lease,
    ) -> Result<Bytes, AnswerError> {
        let request = ImageRequest {
            id: ids::fresh("dcf"),
            plain: (payload.len() <= MOST_TASK_BYTES).then_some(payload),
            origin: client.origin(),
            holder: client.papers.holder(),
            ..task.request
        };
        let tell = |event| {
            let wait = match event {
                Event::Queued => FOR_ROOM.to_owned(),
                Event::Waits(progress) => words(&progress),
                Event::Stepped { step, steps, .. } => next_step(step, steps),
                _ => return,
            };
            lock(&self.waits).insert(key, wait);
        };
        let made = image::make(&self.mesh, Front::Dcf, request, lease, tell).await?;
        Ok(made.png)
    }

    /// The text of an answer; meanwhile Partials go out where they were asked for.
    async fn generate(
        &self,
        key: TaskKey,
        run: Run,
        task: DcfGenerate,
        payload: Bytes,
        client: &Client,
    ) -> Result<Bytes, AnswerError> {
        // A plain task is not answered with a stream; without any worker of the mesh, the whole answer at once
        // is better than none.
        let only_plain = || self.mesh.with_registry(Registry::takes_only_plain);
        let fits = payload.len() <= MOST_TASK_BYTES;
        let plain = fits && (!task.stream || only_plain());
        let stream = task.stream;
        let task = GenerateTask {
            id: ids::fresh("dcf"),
            model: task.model,
            prompt: Arc::new(task.prompt),
            params: task.params,
            salt: client.salt,
            holder: client.papers.holder(),
            plain: plain.then_some(payload),
            source: Source {
                ingress: Ingress::Dcf,
                origin: client.origin(),
            },
        };
        let mut text = String::new();
        let mut whole = None;
        let mut failure = None;
        let grow = |text: &mut String, piece: &str| {
            if stream && !piece.is_empty() && lock(&self.dedup).is_current(key, run) {
                self.send_partial(key, text.len(), piece);
            }
            text.push_str(piece);
        };
        let mut waits = false;
        let emit = |event| match event {
            Event::Queued => {
                waits = true;
                lock(&self.waits).insert(key, FOR_ROOM.to_owned());
            }
            Event::Waits(progress) => {
                waits = true;
                lock(&self.waits).insert(key, words(&progress));
            }
            Event::Placed(_) | Event::Stepped { .. } => {}
            Event::Delta(delta) => {
                if std::mem::take(&mut waits) {
                    lock(&self.waits).remove(&key);
                }
                grow(&mut text, &delta.text);
            }
            Event::Complete(complete) => grow(&mut text, &complete.done.text),
            Event::Whole(bytes) => whole = Some(bytes),
            Event::Failed(error) => failure = Some(error),
        };
        generate(&self.mesh, Front::Dcf, task, emit, std::future::pending()).await;

        match failure {
            Some(failure) => Err(failure),
            None => Ok(whole.unwrap_or_else(|| text.into())),
        }
    }

    /// Sends a piece of an answer now or never: the Result has all of it.
    fn send_partial(&self, key: TaskKey, offset: usize, piece: &str) {
        let Ok(offset) = u32::try_from(offset) else {
            return;
        };
        let partial = Message::partial(key.sequence, timestamp_us(), offset, piece);
        if is_single(key, &partial) {
            self.send_now(key, &partial);
        }
    }

    fn send_now(&self, key: TaskKey, message: &Message) {
        let mut batch = SendBatch::new();
        queue(&mut batch, &self.sessions, key, message);
        if let Err(error) = self.socket.try_send(&mut batch) {
            debug!(%error, client = %key.client, kind = %message.kind, "not sent");
        }
    }
}

/// Forgets the cause of a task's wait when the task has ended.
struct Waits<'a> {
    port: &'a Port,
    key: TaskKey,
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        lock(&self.port.waits).remove(&self.key);
        lock(&self.port.acks).remove(&self.key);
    }
}

impl From<AnswerError> for Failed {
    fn from(failure: AnswerError) -> Self {
        let (code, keep) = code_of(&failure);
        let text = failure.to_string();
        Self { code, text, keep }
    }
}

/// A right is missing.
impl From<ApiError> for Failed {
    fn from(error: ApiError) -> Self {
        Self {
            code: ErrorCode::UNAUTHORIZED,
            text: error.message,
            keep: false,
        }
    }
}

/// The DCF code of a failure, and whether a repeat of the task gets the same failure again. Where it is over
/// in a moment, the repeat had better be a new try.
fn code_of(failure: &AnswerError) -> (ErrorCode, bool) {
    match failure {
        AnswerError::Refused(Refusal::QueueFull { .. })
        | AnswerError::QueueTimeout(_)
        | AnswerError::TooMuch(_) => (ErrorCode::WORKER_BUSY, false),
        AnswerError::Refused(
            Refusal::NoWorker { .. }
            | Refusal::NoRing { .. }
            | Refusal::NoneAnswers { .. }
            | Refusal::TooOld { .. },
        ) => (ErrorCode::NO_WORKERS, false),
        AnswerError::Refused(Refusal::UnknownModel { .. }) => (ErrorCode::UNKNOWN_MODEL, false),
        AnswerError::Refused(Refusal::TooLong { .. }) => (ErrorCode::CONTEXT_TOO_LONG, true),
        AnswerError::Rejected { code, .. } => (*code, true),
        AnswerError::Timeout(_) | AnswerError::Stalled(_) => (ErrorCode::TIMEOUT, true),
        AnswerError::WorkersFailed { .. } | AnswerError::WorkersDied { .. } => {
            (ErrorCode::INFERENCE_FAILED, true)
        }
        AnswerError::ShuttingDown => (ErrorCode::DRAINING, false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
