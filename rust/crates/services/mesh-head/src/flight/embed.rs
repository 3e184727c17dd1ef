//! Drives one request for embeddings: parts to workers, each part elsewhere when its worker dies, vectors
//! back in order.

use std::future::Future;
use std::ops::Range;
use std::pin::pin;
use std::sync::Arc;
use std::time::Instant;

use bytes::BytesMut;
use dcf::ErrorCode;
use futures::{StreamExt, TryStreamExt, stream};
use mesh_control::affinity::estimate_tokens;
use mesh_control::embedding::BatchLimits;
use mesh_control::fair::{Ingress, Source};
use mesh_control::placement::{AttemptEnd, Refusal};
use mesh_control::request::{AnswerError, Failure, Fault, Lifecycle, Step};
use mesh_control::router::{Purpose, Requirements};
use mesh_net::quic::Link;
use mesh_proto::{Done, Embed, EmbedInput, EmbedText, Embeddings, ModelKind};
use tracing::{debug, info, warn};

use super::deaths::Deaths;
use super::outcome::{deadline_ms, outcome_of};
use super::task::{EmbedTask, Embedded};
use crate::mesh::{Assignment, Lease, Mesh, Route};
use crate::metrics::{Front, Outcome};
use crate::workers::requests::{
    Said, embeddings_bytes, gets_on, next_embeddings, open_embed, progress_ms,
};

/// Runs a task to its end. Dropping the future cancels it. The memory of its answer is added to `lease`.
///
/// # Errors
/// Why there are no vectors.
pub(crate) async fn embed(
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

/// Counts a request however it ends, also if the client goes away.
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
    let parts = BatchLimits::new(replicas.workers).parts(&weights);
    let at_once = (2 * replicas.workers).clamp(1, MOST_AT_ONCE);
    debug!(
        request = task.id,
        texts = task.inputs.len(),
        parts = parts.len(),
        "embedding"
    );
    let ask = Requirements {
        model,
        purpose: Purpose::Embed,
        // Parts of one request must come from the same weights.
        fingerprint: replicas.fingerprint,
        source: Source {
            ingress: Ingress::Embeddings,
            origin: task.origin,
        },
        ..Requirements::default()
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
            let ask = Requirements {
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
    mut ask: Requirements,
    dimensions: u32,
) -> Result<Embeddings, AnswerError> {
    let id = match index {
        0 => task.id.clone(),
        index => format!("{}.{index}", task.id),
    };
    let texts = range.len();
    let mut answer = Lifecycle::new(mesh.config.request_limits(), Instant::now());
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
                        assignment.end(AttemptEnd::Complete);
                        return Ok(embeddings);
                    }
                    Ok(Err(failure)) => {
                        let failure = deaths.of(failure, &assignment, &mut answer, mesh);
                        if link.close_reason().is_some() {
                            // The link's own task will notice, too, but the next attempt must not find the
                            // worker there.
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
                if ended == AttemptEnd::Failed {
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

/// Asks a worker for one part, for as long as it shows life; else returns the decision of the answer's core
/// on the time that passed.
async fn ask_for_part(
    answer: &mut Lifecycle,
    assignment: &Assignment,
    link: &Link,
    embed: Embed,
    attempt: u32,
    dimensions: u32,
) -> Result<Result<Embeddings, Failure>, Step> {
    let texts = embed.inputs.len();
    let mut exchange = pin!(open_embed(link, embed, attempt));
    let mut stream = loop {
        match timeout_at(answer.next_timer(), &mut exchange).await {
            Some(Ok(stream)) => break stream,
            Some(Err(failure)) => return Ok(Err(failure)),
            None => time_passed(answer, assignment)?,
        }
    };
    stream.limit(embeddings_bytes(texts, dimensions));
    loop {
        match timeout_at(
            answer.next_timer(),
            next_embeddings(&mut stream, texts, dimensions),
        )
        .await
        {
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

fn time_passed(answer: &mut Lifecycle, assignment: &Assignment) -> Result<(), Step> {
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

/// Tokens of a text, estimated.
fn weight(input: &EmbedInput) -> u64 {
    match &input.text {
        Some(EmbedText::Text(text)) => u64::from(estimate_tokens(text.len())),
        Some(EmbedText::Tokens(list)) => list.tokens.len() as u64,
        None => 0,
    }
}

/// Bytes of memory that `texts` vectors take on their way to a client.
fn memory_of(texts: usize, dimensions: u32) -> u64 {
    let numbers = (texts as u64).saturating_mul(u64::from(dimensions));
    numbers.saturating_mul(BYTES_A_NUMBER)
}

/// A number as it comes, as it is put together, and in the answer's JSON.
const BYTES_A_NUMBER: u64 = 20;
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
