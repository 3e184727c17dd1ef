//! Texts to generate: chats and completions. What another worker goes on after are the tokens so far.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use dcf::MsgType;
use mesh_api::paths;
use mesh_control::request::{AnswerError, Bounds, Complete, Lifecycle, Step};
use mesh_proto::{Done, Generate, ModelKind, Prompt, RequestPhase};
use tokio::sync::mpsc;
use tracing::{debug, info};

use super::attempts::Flight;
use super::codec::{AttemptTerms, Codec};
use super::event::Event;
use super::outcome::Account;
use super::task::GenerateTask;
use crate::ids;
use crate::mesh::connection::{FromWorker, WorkerRequest};
use crate::mesh::{Mesh, message};
use crate::metrics::Front;
use crate::workers::requests::read;

/// Starts a task; dropping the receiver cancels it.
pub(crate) fn submit(
    mesh: &Arc<Mesh>,
    front: Front,
    task: GenerateTask,
) -> mpsc::UnboundedReceiver<Event> {
    // Unbounded, yet bounded by the context: a slow client must not hold a worker's slot for longer than the
    // answer takes.
    let (sender, receiver) = mpsc::unbounded_channel();
    let mesh = mesh.clone();
    tokio::spawn(async move {
        let gone = sender.closed();
        generate(&mesh, front, task, |event| drop(sender.send(event)), gone).await;
    });
    receiver
}

/// Runs a task to its end, or until `gone`.
pub(crate) async fn generate(
    mesh: &Arc<Mesh>,
    front: Front,
    task: GenerateTask,
    emit: impl FnMut(Event) + Send,
    gone: impl Future<Output = ()> + Send,
) {
    let id = task.id.clone();
    let mut account = Account::new(
        mesh,
        front,
        ("generate", &id),
        (task.source.origin, task.holder.clone()),
        task.model.as_ref(),
    );
    let mut flight = flight(mesh, task, emit);
    account.model.clone_from(&flight.ask.model);
    let gone = pin!(gone);
    let result = tokio::select! {
        biased;
        result = run(&mut flight) => Some(result),
        () = gone => None,
    };
    let metrics = &mesh.metrics;
    metrics.tokens.inc_by(flight.answer.tokens().len() as u64);
    if let Some(result) = &result {
        account.settle(&id, result, "answer");
    }
    debug!(
        request = id,
        ?front,
        outcome = ?account.outcome,
        seconds = account.started.elapsed().as_secs_f64(),
        reruns = flight.answer.failures(),
        "request ended"
    );
    drop(account);
    match result {
        Some(Ok(complete)) => {
            if let Some(first_token) = complete.first_token {
                metrics.first_token(first_token.as_secs_f64());
            }
            let done = &complete.done;
            metrics.prompt_tokens.inc_by(u64::from(done.prompt_tokens));
            metrics.cached_tokens.inc_by(u64::from(done.cached_tokens));
            (flight.codec.emit)(Event::Complete(complete));
        }
        Some(Err(error)) => (flight.codec.emit)(Event::Failed(error)),
        None => {}
    }
}

fn flight<E: FnMut(Event) + Send>(
    mesh: &Arc<Mesh>,
    mut task: GenerateTask,
    emit: E,
) -> Flight<'_, GenerateCodec<E>> {
    // Known to the head, so that an attempt elsewhere draws the same tokens.
    task.params.seed.get_or_insert_with(ids::unique);
    let named = task.model.take();
    let known = named.as_ref().is_some_and(|name| mesh.knows_model(name));
    let model = named.or_else(|| mesh.default_model()).unwrap_or_default();
    let mut ask = task.ask(&model);
    // Workers that take plain tasks do not report their models; a request that names a model of the mesh means
    // that one.
    ask.plain &= !known;
    let bounds = task.bounds();
    let codec = GenerateCodec {
        task,
        emit,
        told: None,
    };
    Flight::new(mesh, ask, bounds, codec)
}

async fn run<E: FnMut(Event) + Send>(
    flight: &mut Flight<'_, GenerateCodec<E>>,
) -> Result<Complete, AnswerError> {
    let model = &flight.ask.model;
    if flight.mesh.shutdown.is_draining() {
        return Err(AnswerError::ShuttingDown);
    }
    let (makes, path) = match flight.mesh.replicas(model).kind {
        Some(ModelKind::Embed) => ("embeddings", paths::EMBEDDINGS),
        Some(ModelKind::Image) => ("images", paths::IMAGES),
        Some(ModelKind::Chat) | None => return flight.run().await,
    };
    Err(AnswerError::invalid(format!(
        "the model {model:?} makes {makes}, not text; POST {path} asks for those"
    )))
}

/// The codec: Generate out, Tokens and Done back, or the whole answer to a plain task.
struct GenerateCodec<E> {
    task: GenerateTask,
    emit: E,
    /// Time at which the client last heard the cause of the request's wait.
    told: Option<Instant>,
}

impl<E: FnMut(Event) + Send> Codec for GenerateCodec<E> {
    const ENDED_EARLY: &'static str = "the worker ended the stream before the answer was complete";
    const HAS_TOKENS: bool = true;

    fn id(&self) -> &str {
        &self.task.id
    }

    fn request(&self, start: &AttemptTerms<'_>) -> WorkerRequest {
        let generate = Generate {
            request_id: self.task.id.clone(),
            model: start.placed.model.clone(),
            prompt: Some(Prompt::clone(&self.task.prompt)),
            params: Some(self.task.params.clone()),
            generated: start.answer.tokens().to_vec(),
            text_sent: start.resume.text_sent,
            deadline_ms: start.deadline_ms,
            progress_ms: start.progress_ms,
            cache_salt: self.task.salt,
        };
        WorkerRequest {
            message: message(MsgType::GENERATE, start.resume.attempt, &generate),
            upload: bytes::Bytes::new(),
            plain: self.task.plain.clone(),
        }
    }

    fn message_bytes(&self, bounds: &Bounds) -> usize {
        bounds.message()
    }

    fn read(
        &mut self,
        incoming: FromWorker,
        attempt: u32,
        answer: &mut Lifecycle,
        now: Instant,
    ) -> Option<Step> {
        let message = match incoming {
            FromWorker::Message(message) => message,
            FromWorker::Whole(text) => {
                (self.emit)(Event::Whole(text));
                return Some(answer.done(attempt, Done::default(), now));
            }
            FromWorker::End => return None,
        };
        let step = match message.kind {
            MsgType::TOKENS => read(message).map(|tokens| answer.tokens_came(attempt, tokens, now)),
            MsgType::DONE => read(message).map(|done| answer.done(attempt, done, now)),
            // A newer worker may say more than this head understands.
            _ => return None,
        };
        Some(step.unwrap_or_else(|failure| answer.failed(attempt, failure)))
    }

    fn tell(&mut self, event: Event) {
        if let Event::Waits(progress) = &event {
            let now = Instant::now();
            // A client that does not read must not pile them up.
            let is_news = self.told.is_none_or(|at| now - at >= TELL_EVERY);
            if progress.phase() == RequestPhase::Decoding || !is_news {
                return;
            }
            self.told = Some(now);
        }
        (self.emit)(event);
    }

    fn log_rerun(&self, worker: &str, answer: &Lifecycle) {
        info!(
            request = self.task.id,
            worker,
            tokens = answer.tokens().len(),
            "run again elsewhere after the tokens so far"
        );
    }
}

/// Least time between two messages to a client about the cause of its request's wait.
const TELL_EVERY: Duration = Duration::from_millis(100);
