//! Texts to embed: parts to workers, each part elsewhere when its worker dies, vectors back in order.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use bytes::BytesMut;
use dcf::MsgType;
use futures::{StreamExt, TryStreamExt, stream};
use mesh_control::affinity::estimate_tokens;
use mesh_control::embedding::parts;
use mesh_control::fair::{Ingress, Source};
use mesh_control::placement::Refusal;
use mesh_control::request::{AnswerError, Bounds, Lifecycle, Step};
use mesh_control::router::Requirements;
use mesh_proto::{Done, Embed, EmbedInput, EmbedText, Embeddings, ModelKind};
use tracing::{debug, info};

use super::attempts::Flight;
use super::codec::{AttemptTerms, Codec};
use super::outcome::Account;
use super::task::{EmbedTask, Embedded};
use crate::mesh::connection::{FromWorker, WorkerRequest};
use crate::mesh::{Lease, Mesh, message};
use crate::metrics::Front;
use crate::workers::requests::{embeddings_bytes, vectors};

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
    let id = task.id.clone();
    let mut account = Account::new(
        mesh,
        front,
        ("embed", &id),
        (task.origin, task.holder.clone()),
        task.model.as_ref(),
    );
    let texts = task.inputs.len();
    let result = run(mesh, task, lease).await;
    if let Ok(embedded) = &result {
        mesh.metrics.prompt_tokens.inc_by(embedded.tokens);
        mesh.metrics.embedded.inc_by(texts as u64);
    }
    account.settle(&id, &result, "embeddings");
    result
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
        Some(kind @ (ModelKind::Chat | ModelKind::Image)) => {
            let makes = match kind {
                ModelKind::Image => "images",
                _ => "text",
            };
            return Err(AnswerError::invalid(format!(
                "the model {model:?} makes {makes}, not embeddings; GET /v1/models says which makes what"
            )));
        }
        Some(ModelKind::Embed) if task.dimensions > replicas.dimensions => {
            return Err(AnswerError::invalid(format!(
                "'dimensions' is {}, but the vectors of {model:?} have {} numbers",
                task.dimensions, replicas.dimensions
            )));
        }
        None if model.is_empty() => {
            let model = "an embedding model".into();
            return Err(Refusal::NoWorker { model }.into());
        }
        Some(ModelKind::Embed) | None => {}
    }
    let weights: Vec<u64> = task.inputs.iter().map(weight).collect();
    let parts = parts(replicas.workers, &weights);
    let at_once = (2 * replicas.workers).clamp(1, MOST_AT_ONCE);
    debug!(
        request = task.id,
        texts = task.inputs.len(),
        parts = parts.len(),
        "embedding"
    );
    let ask = Requirements {
        model,
        kind: ModelKind::Embed,
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
    ask: Requirements,
    dimensions: u32,
) -> Result<Embeddings, AnswerError> {
    let id = match index {
        0 => task.id.clone(),
        index => format!("{}.{index}", task.id),
    };
    let codec = EmbedCodec {
        id,
        task,
        range,
        dimensions,
        embeddings: None,
    };
    let mut flight = Flight::new(mesh, ask, Bounds::default(), codec);
    flight.run().await?;
    let embeddings = flight.codec.embeddings;
    Ok(embeddings.expect("a part is complete when its vectors are here"))
}

/// The codec of one part: Embed out, Embeddings back. A worker sends all of them at once, so nothing is left
/// of an attempt that failed.
struct EmbedCodec<'a> {
    id: String,
    task: &'a EmbedTask,
    range: Range<usize>,
    /// Length of the vectors; 0 is unknown.
    dimensions: u32,
    embeddings: Option<Embeddings>,
}

impl Codec for EmbedCodec<'_> {
    const ENDED_EARLY: &'static str = "the worker ended the stream without an answer";
    const HAS_TOKENS: bool = false;

    fn id(&self) -> &str {
        &self.id
    }

    fn request(&self, start: &AttemptTerms<'_>) -> WorkerRequest {
        let embed = Embed {
            request_id: self.id.clone(),
            model: start.placed.model.clone(),
            inputs: self.task.inputs[self.range.clone()].to_vec(),
            prompt_name: self.task.prompt_name.clone(),
            dimensions: self.task.dimensions,
            deadline_ms: start.deadline_ms,
            progress_ms: start.progress_ms,
        };
        WorkerRequest {
            message: message(MsgType::EMBED, start.resume.attempt, &embed),
            upload: bytes::Bytes::new(),
            plain: None,
        }
    }

    fn message_bytes(&self, _: &Bounds) -> usize {
        embeddings_bytes(self.range.len(), self.dimensions)
    }

    fn read(
        &mut self,
        incoming: FromWorker,
        attempt: u32,
        answer: &mut Lifecycle,
        now: Instant,
    ) -> Option<Step> {
        let message = match incoming {
            FromWorker::Message(message) if message.kind == MsgType::EMBEDDINGS => message,
            _ => return None,
        };
        Some(match vectors(message, self.range.len(), self.dimensions) {
            Ok(embeddings) => {
                self.embeddings = Some(embeddings);
                answer.done(attempt, Done::default(), now)
            }
            Err(failure) => answer.failed(attempt, failure),
        })
    }

    fn log_rerun(&self, worker: &str, _: &Lifecycle) {
        info!(
            request = self.id,
            worker,
            texts = self.range.len(),
            "embedded again elsewhere"
        );
    }
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
