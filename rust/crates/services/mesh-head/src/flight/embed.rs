//! Drives one request for embeddings: parts to workers, each part elsewhere when its worker dies, vectors back in order.

use std::future::Future;
use std::ops::Range;
use std::pin::pin;
use std::sync::Arc;
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use dcf::{ErrorCode, Message, MsgType};
use futures::{StreamExt, TryStreamExt, stream};
use mesh_net::quic::{Link, MsgStream, StreamFailure};
use mesh_proto::{Done, Embed, EmbedInput, EmbedText, Embeddings, ModelKind, Progress};
use prost::Message as _;
use tracing::{debug, info, warn};

use crate::core::affinity::estimate_tokens;
use crate::core::embedding::{Cut, check};
use crate::core::fair::{Ingress, Origin, Source};
use crate::core::placement::{Ended, Refusal};
use crate::core::request::{Answer, AnswerError, Failure, Fault, Step};
use crate::core::router::{Ask, Purpose};
use crate::drive::{Deaths, deadline_ms, error_of, gets_on, outcome_of, progress_ms};
use crate::mesh::{Assignment, Lease, Mesh, Route, timestamp_us};
use crate::metrics::{Front, Outcome};

/// Texts to embed, whichever front end they came through.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct EmbedTask {
    /// Request id in the logs of all services.
    pub id: String,
    /// Model name; the first embedding model where there is none.
    pub model: Option<String>,
    /// The texts.
    pub inputs: Vec<EmbedInput>,
    /// Name of the prompt that the model puts in front.
    pub prompt_name: String,
    /// Length of the vectors; 0 is the model's own.
    pub dimensions: u32,
    /// The client that it comes from.
    pub origin: Origin,
}

/// All vectors of a request.
#[derive(Debug, Clone, PartialEq)]
pub struct Embedded {
    /// The model that made them.
    pub model: String,
    /// Length of one vector.
    pub dimensions: u32,
    /// f32, little-endian, vector after vector in the order of the texts.
    pub vectors: Bytes,
    /// Tokens that the model saw, over all texts.
    pub tokens: u64,
}

/// Runs a task to its end. Dropping the future cancels it. The memory of its answer is added to `lease`.
///
/// # Errors
/// Why there are no vectors.
pub async fn embed(
    mesh: &Arc<Mesh>,
    front: Front,
    task: EmbedTask,
    lease: &mut Lease,
) -> Result<Embedded, AnswerError> {
    let mut account = Account {
        mesh,
        front,
        started: Instant::now(),
        outcome: Outcome::Cancelled,
    };
    let id = task.id.clone();
    let texts = task.inputs.len();
    let result = run(mesh, task, lease).await;
    account.outcome = match &result {
        Ok(embedded) => {
            mesh.metrics.prompt_tokens.inc_by(embedded.tokens);
            mesh.metrics.embedded.inc_by(texts as u64);
            Outcome::Complete
        }
        Err(error) => outcome_of(error),
    };
    if let Err(error) = &result
        && matches!(account.outcome, Outcome::Failed | Outcome::Timeout)
    {
        warn!(request = id, %error, "no embeddings");
    }
    result
}

/// Books a request however it ends, also if the client goes away.
struct Account<'a> {
    mesh: &'a Mesh,
    front: Front,
    started: Instant,
    outcome: Outcome,
}

impl Drop for Account<'_> {
    fn drop(&mut self) {
        let seconds = self.started.elapsed().as_secs_f64();
        self.mesh
            .metrics
            .request_ended(self.front, self.outcome, seconds);
    }
}

async fn run(
    mesh: &Arc<Mesh>,
    task: EmbedTask,
    lease: &mut Lease,
) -> Result<Embedded, AnswerError> {
    if mesh.shutdown.is_draining() {
        return Err(AnswerError::ShuttingDown);
    }
    let model = match &task.model {
        Some(model) => model.clone(),
        None => mesh.first_encoder().unwrap_or_default(),
    };
    let replicas = mesh.replicas(&model);
    match replicas.kind {
        Some(ModelKind::Chat) => {
            return Err(AnswerError::Rejected {
                code: ErrorCode::INVALID_PAYLOAD,
                text: format!(
                    "the model {model:?} makes text, not embeddings; GET /v1/models says which makes what"
                ),
            });
        }
        Some(ModelKind::Embed) if task.dimensions > replicas.dimensions => {
            return Err(AnswerError::Rejected {
                code: ErrorCode::INVALID_PAYLOAD,
                text: format!(
                    "'dimensions' is {}, but the vectors of {model:?} have {} numbers",
                    task.dimensions, replicas.dimensions
                ),
            });
        }
        Some(ModelKind::Embed) => {}
        None if model.is_empty() => {
            return Err(Refusal::NoWorker {
                model: "an embedding model".into(),
            }
            .into());
        }
        None => {}
    }
    let weights: Vec<u64> = task.inputs.iter().map(weight).collect();
    let parts = Cut::new(replicas.workers).parts(&weights);
    let at_once = (2 * replicas.workers).clamp(1, MOST_AT_ONCE);
    debug!(
        request = task.id,
        texts = task.inputs.len(),
        parts = parts.len(),
        "embedding"
    );
    let ask = Ask {
        model,
        purpose: Purpose::Embed,
        // Parts of one request must come from the same weights.
        fingerprint: replicas.fingerprint,
        source: Source {
            ingress: Ingress::Embeddings,
            origin: task.origin,
        },
        ..Ask::default()
    };
    let task = &task;
    // All parts have vectors of one length, whatever a worker says of its own.
    let dimensions = match task.dimensions {
        0 => replicas.dimensions,
        asked => asked,
    };
    lease.add(memory_of(task.inputs.len(), dimensions))?;
    let answers: Vec<Embeddings> = stream::iter(parts.into_iter().enumerate())
        .map(|(index, range)| {
            let tokens: u64 = weights[range.clone()].iter().sum();
            let ask = Ask {
                prompt_tokens: u32::try_from(tokens).unwrap_or(u32::MAX),
                ..ask.clone()
            };
            part(mesh, task, index, range, ask, dimensions)
        })
        .buffered(at_once)
        .try_collect()
        .await?;
    let mut vectors = BytesMut::with_capacity(answers.iter().map(|a| a.vectors.len()).sum());
    for answer in &answers {
        vectors.extend_from_slice(&answer.vectors);
    }
    let tokens = answers.iter().flat_map(|answer| &answer.tokens);
    Ok(Embedded {
        model: ask.model,
        dimensions: answers.first().map_or(0, |answer| answer.dimensions),
        vectors: vectors.freeze(),
        tokens: tokens.map(|&tokens| u64::from(tokens)).sum(),
    })
}

/// One part on one worker after the other, until one answers.
async fn part(
    mesh: &Arc<Mesh>,
    task: &EmbedTask,
    index: usize,
    range: Range<usize>,
    mut ask: Ask,
    dimensions: u32,
) -> Result<Embeddings, AnswerError> {
    let id = match index {
        0 => task.id.clone(),
        index => format!("{}.{index}", task.id),
    };
    let texts = range.len();
    let mut answer = Answer::new(mesh.config.request_limits(), Instant::now());
    let mut deaths = Deaths::default();
    let mut rerun = false;
    loop {
        let placing = mesh.place(ask.clone(), rerun);
        let assignment = match tokio::time::timeout_at(answer.deadline().into(), placing).await {
            Ok(Ok(assignment)) => assignment,
            Ok(Err(refusal)) => return Err(refusal.into()),
            Err(_) => {
                let late = Instant::now().max(answer.deadline());
                return Err(match answer.time_passed(late) {
                    Step::Fail(error, _) => error,
                    _ => AnswerError::QueueTimeout(mesh.config.queue_timeout),
                });
            }
        };
        let placed = &assignment.placed;
        let began = Instant::now();
        deaths.review(&mut answer, mesh);
        let resume = answer.placed(placed.worker, placed.estimate.finish, began);
        answer.set_second_opinion(mesh.another(&ask, placed.worker));
        debug!(
            request = id,
            worker = placed.name,
            attempt = resume.attempt,
            texts,
            "placed"
        );
        let embed = Embed {
            request_id: id.clone(),
            model: placed.model.clone(),
            inputs: task.inputs[range.clone()].to_vec(),
            prompt_name: task.prompt_name.clone(),
            dimensions: task.dimensions,
            deadline_ms: deadline_ms(&answer),
            progress_ms: progress_ms(mesh),
        };
        let step = match &assignment.route {
            Route::Link(link) => {
                let asking = ask_for_part(
                    &mut answer,
                    &assignment,
                    link,
                    embed,
                    resume.attempt,
                    dimensions,
                );
                match asking.await {
                    Ok(Ok(embeddings)) => {
                        answer.done(resume.attempt, Done::default(), Instant::now());
                        if let Some(rejected) = answer.contradicted() {
                            mesh.contradicted(rejected.worker, placed, &rejected.text);
                        }
                        assignment.prefilled();
                        assignment.end(Ended::Complete);
                        return Ok(embeddings);
                    }
                    Ok(Err(failure)) => {
                        let failure = deaths.of(failure, &assignment, &mut answer, mesh);
                        if link.close_reason().is_some() {
                            // The link's own task will notice, too, but the next attempt must not find the worker there.
                            mesh.leave(placed.worker);
                        }
                        answer.failed(resume.attempt, failure)
                    }
                    Err(step) => step,
                }
            }
            Route::Legacy(_) | Route::Gone => {
                let gone = Failure::Lost("the worker left".into());
                answer.failed(resume.attempt, gone)
            }
        };
        match step {
            Step::Again(ended) => {
                if ended == Ended::Failed {
                    if matches!(answer.fault(), Fault::Silence | Fault::Worker) {
                        mesh.at_fault(&placed.key, &placed.name, &placed.model, began);
                    }
                    mesh.metrics.reruns.inc();
                    info!(
                        request = id,
                        worker = placed.name,
                        texts,
                        "embedded again elsewhere"
                    );
                }
                assignment.end(ended);
                ask.avoid = answer.avoided();
                ask.alone = answer.is_suspect();
                rerun = true;
            }
            Step::Fail(error, ended) => {
                assignment.end(ended);
                return Err(error);
            }
            // Neither comes of a failure.
            Step::Wait | Step::Emit(_) | Step::Complete(_) => {
                return Err(AnswerError::Stalled(mesh.config.request_timeout));
            }
        }
    }
}

/// Asks a worker for one part, for as long as it shows life; else what the answer's core makes of the time that passed.
async fn ask_for_part(
    answer: &mut Answer,
    assignment: &Assignment,
    link: &Link,
    embed: Embed,
    attempt: u32,
    dimensions: u32,
) -> Result<Result<Embeddings, Failure>, Step> {
    let texts = embed.inputs.len();
    let mut exchange = pin!(open(link, embed, attempt));
    let mut stream = loop {
        match timeout_at(answer.next_timer(), &mut exchange).await {
            Some(Ok(stream)) => break stream,
            Some(Err(failure)) => return Ok(Err(failure)),
            None => time_passed(answer, assignment)?,
        }
    };
    stream.limit(bytes_of(texts, dimensions));
    loop {
        match timeout_at(answer.next_timer(), next(&mut stream, texts, dimensions)).await {
            Some(Ok(Said::Vectors(embeddings))) => {
                let _ = stream.finish();
                return Ok(Ok(embeddings));
            }
            Some(Ok(Said::Lives(progress))) => {
                let seen = assignment.last_token_of_worker();
                match answer.progressed(attempt, &progress, seen, Instant::now()) {
                    Step::Wait => {}
                    step => return Err(step),
                }
                if gets_on(&progress) {
                    assignment.gave_sign();
                }
            }
            Some(Ok(Said::Other)) => match answer.idled(attempt, Instant::now()) {
                Step::Wait => {}
                step => return Err(step),
            },
            Some(Err(failure)) => return Ok(Err(failure)),
            None => time_passed(answer, assignment)?,
        }
    }
}

fn time_passed(answer: &mut Answer, assignment: &Assignment) -> Result<(), Step> {
    let now = Instant::now();
    if answer.waits_untold(now) && assignment.is_busy() {
        answer.excused_until(now);
    }
    match answer.time_passed(now) {
        Step::Wait => Ok(()),
        step => Err(step),
    }
}

/// The output of `future`, or `None` if it is not ready before `due`.
async fn timeout_at<T>(due: Option<Instant>, future: impl Future<Output = T>) -> Option<T> {
    let due = due.unwrap_or_else(Instant::now);
    tokio::time::timeout_at(due.into(), future).await.ok()
}

/// Bytes of an answer with so many vectors; 0 is of an unknown length.
pub(crate) fn bytes_of(texts: usize, dimensions: u32) -> usize {
    let dimensions = match dimensions {
        0 => LONGEST_VECTOR,
        known => known as usize,
    };
    // A vector, and the number of its tokens.
    texts
        .saturating_mul(dimensions * 4 + 8)
        .saturating_add(64 << 10)
}

/// A worker's message on the stream of an Embed.
pub(crate) enum Said {
    Vectors(Embeddings),
    Lives(Progress),
    /// Something that this version does not know.
    Other,
}

/// Opens the stream of an Embed. Dropped early it is reset, which cancels the request there.
pub(crate) async fn open(link: &Link, embed: Embed, attempt: u32) -> Result<MsgStream, Failure> {
    let body = embed.encode_to_vec();
    let message = Message::new(MsgType::EMBED, attempt, timestamp_us(), body);
    let mut stream = link.open().await.map_err(lost)?;
    stream.send(message).await.map_err(lost)?;
    Ok(stream)
}

/// The next message on the stream of an Embed of so many texts.
pub(crate) async fn next(
    stream: &mut MsgStream,
    texts: usize,
    dimensions: u32,
) -> Result<Said, Failure> {
    let Some(message) = stream.recv().await.map_err(lost)? else {
        let text = "the worker ended the stream without an answer";
        return Err(Failure::Lost(text.to_owned()));
    };
    let unreadable =
        |kind: MsgType| Failure::Nonsense(format!("the worker sent a {kind} that cannot be read"));
    match message.kind {
        MsgType::EMBEDDINGS => {
            let embeddings =
                Embeddings::decode(message.payload).map_err(|_| unreadable(MsgType::EMBEDDINGS))?;
            check(&embeddings, texts, dimensions).map_err(Failure::Nonsense)?;
            Ok(Said::Vectors(embeddings))
        }
        MsgType::PROGRESS => Progress::decode(message.payload)
            .map(Said::Lives)
            .map_err(|_| unreadable(MsgType::PROGRESS)),
        MsgType::ERROR => Err(error_of(&message)),
        other => {
            debug!(kind = %other, "unexpected on a request's stream");
            Ok(Said::Other)
        }
    }
}

fn lost(error: StreamFailure) -> Failure {
    Failure::Lost(error.to_string())
}

/// Tokens of a text, estimated.
fn weight(input: &EmbedInput) -> u64 {
    match &input.text {
        Some(EmbedText::Text(text)) => u64::from(estimate_tokens(text.len())),
        Some(EmbedText::Tokens(list)) => list.tokens.len() as u64,
        None => 0,
    }
}

/// Bytes of memory that so many vectors take on their way to a client.
fn memory_of(texts: usize, dimensions: u32) -> u64 {
    let numbers = (texts as u64).saturating_mul(u64::from(dimensions));
    numbers.saturating_mul(BYTES_A_NUMBER)
}

/// A number as it comes, as it is put together, and in the answer's JSON.
const BYTES_A_NUMBER: u64 = 20;
/// Numbers of a vector whose length nobody knows.
const LONGEST_VECTOR: usize = 8192;
/// Parts of one request that are under way at once.
const MOST_AT_ONCE: usize = 32;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_texts_count_with_their_vectors() {
        assert!(memory_of(2048, 1024) >= 40_000_000);
        assert_eq!(memory_of(usize::MAX, u32::MAX), u64::MAX);
    }
}
