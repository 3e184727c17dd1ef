//! Proofs: the head asks each worker a question now and then, and the answer shows that tokens come back and
//! that they are those of the other workers.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use dcf::{ErrorCode, MsgType};
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use mesh_control::image::ArrivingImage;
use mesh_control::registry::WorkerId;
use mesh_control::registry::proofs::Proof;
use mesh_control::request::{Bounds, Delta, Failure, Lifecycle, Step};
use mesh_control::spotcheck::{self, Position, Sample};
use mesh_net::quic::{Link, MsgStream, StreamFailure};
use mesh_proto::{
    Chat, ChatMessage, Embed, EmbedInput, EmbedText, Generate, GenerateParams, ImageData,
    ImageTask, ModelKind, Progress, Prompt, RequestPhase, Tokens,
};
use tracing::{debug, info, warn};

use super::requests::{self, WorkerReply, gets_on, progress_ms};
use crate::ids;
use crate::mesh::{Mesh, RingRole, message};

/// Keeps the proof fresh that this worker answers, and that its answers are those of the others: asks it a
/// question when it joins, after a failure, when it has been idle for long, and now and then.
pub(super) async fn prove(mesh: Arc<Mesh>, id: WorkerId, link: Link) {
    // Side by side: one may wait in its model's queue for long.
    let mut running = FuturesUnordered::new();
    let mut under_way = BTreeSet::new();
    while link.close_reason().is_none() {
        for proof in mesh.proofs_due(id, &under_way) {
            under_way.insert(proof.model.clone());
            let (mesh, link) = (&mesh, &link);
            running.push(async move {
                if !prove_model(mesh, id, link, &proof).await {
                    // Whatever the registry makes of that, the questions end: a closed link refuses at once.
                    tokio::time::sleep(PROOF_PAUSE).await;
                }
                proof.model
            });
        }
        tokio::select! {
            Some(model) = running.next(), if !running.is_empty() => {
                under_way.remove(&model);
                mesh.tick();
            }
            () = tokio::time::sleep(PROOF_PAUSE) => {}
        }
    }
}

/// Asks the question of a proof. True if it was answered.
async fn prove_model(mesh: &Mesh, id: WorkerId, link: &Link, proof: &Proof) -> bool {
    let mut probe = Probe {
        mesh,
        id,
        proof,
        asked: Instant::now(),
        alive: Instant::now(),
        got_on: Instant::now(),
        told: None,
    };
    let asked = probe.asked;
    let model = proof.model.as_str();
    let proven = match proof.kind {
        ModelKind::Chat => probe.tokens(link).await,
        ModelKind::Embed => probe.one_vector(link).await,
        ModelKind::Image => probe.one_image(link).await,
    };
    let sample = match proven {
        Ok(sample) => Some(sample),
        Err(Unproven::Failed(reason) | Unproven::Refused(reason)) => {
            info!(
                worker = link.node_name(),
                model, reason, "no token came back"
            );
            None
        }
        Err(Unproven::Silent) => {
            warn!(
                worker = link.node_name(),
                model, "no token came back in time"
            );
            if let Some(ring) = proof.ring
                && matches!(mesh.ring_role(id, ring), RingRole::Serves(since) if since <= asked)
            {
                mesh.suspect(id, ring, "a token that was asked of it did not come");
            }
            None
        }
        Err(Unproven::Needless) => return false,
        Err(Unproven::Declined(reason)) => {
            if mesh.declined(id, model) {
                debug!(
                    worker = link.node_name(),
                    model, reason, "asked again later"
                );
                return false;
            }
            info!(
                worker = link.node_name(),
                model, reason, "it declines all questions, and no token comes from it"
            );
            None
        }
    };
    let answered = sample.is_some();
    mesh.proved(id, proof, sample, asked);
    answered
}

/// A request that only shows whether a token comes back, and which.
struct Probe<'a> {
    mesh: &'a Mesh,
    id: WorkerId,
    proof: &'a Proof,
    asked: Instant,
    /// Time of the worker's last sign of life.
    alive: Instant,
    /// Time at which the probe was sent, or its last token came.
    got_on: Instant,
    /// Time at which the worker last reported the cause of the probe's wait.
    told: Option<Instant>,
}

enum Unproven {
    Failed(String),
    /// The worker says that the question is at fault.
    Refused(String),
    /// Neither a token nor a sign of life.
    Silent,
    /// A real answer's token came meanwhile, or the worker is busy with real requests, whose tokens will
    /// come.
    Needless,
    /// The worker has no room for it, or drains.
    Declined(String),
}

impl From<Failure> for Unproven {
    fn from(failure: Failure) -> Self {
        Self::Failed(match failure {
            Failure::Error {
                code: code @ (ErrorCode::WORKER_BUSY | ErrorCode::DRAINING),
                text,
            } => return Self::Declined(format!("{code}: {text}")),
            Failure::Error {
                code: code @ ErrorCode::INVALID_PAYLOAD,
                text,
            } => return Self::Refused(format!("{code}: {text}")),
            Failure::Lost(text) | Failure::Died(text) | Failure::Nonsense(text) => text,
            Failure::Error { code, text } => format!("{code}: {text}"),
        })
    }
}

impl From<StreamFailure> for Unproven {
    fn from(failure: StreamFailure) -> Self {
        Self::Failed(failure.to_string())
    }
}

impl Probe<'_> {
    /// A few tokens, with the worker's probabilities of others in their place. The question looks like a
    /// client's: a worker that recognised it as the head's could answer only such questions honestly.
    async fn tokens(&mut self, link: &Link) -> Result<Sample, Unproven> {
        let text = self.proof.question.text.clone();
        let message = ChatMessage {
            role: "user".into(),
            content: text.clone(),
        };
        let chat = Chat {
            messages: vec![message],
            ..Chat::default()
        };
        match self.tokens_after(link, Prompt::Chat(chat)).await {
            // A model whose chat template cannot be used goes on with texts.
            Err(Unproven::Refused(_)) => self.tokens_after(link, Prompt::Text(text)).await,
            answered => answered,
        }
    }

    async fn tokens_after(&mut self, link: &Link, prompt: Prompt) -> Result<Sample, Unproven> {
        let params = GenerateParams {
            max_tokens: Some(spotcheck::TOKENS),
            // A model may have nothing to say to this.
            ignore_eos: true,
            temperature: Some(0.0),
            seed: Some(ids::unique()),
            logprobs: Some(spotcheck::ALTERNATIVES),
            ..Default::default()
        };
        let generate = Generate {
            request_id: ids::fresh("req"),
            model: self.proof.model.clone(),
            prompt: Some(prompt),
            params: Some(params),
            progress_ms: progress_ms(self.mesh),
            ..Default::default()
        };
        let request = message(MsgType::GENERATE, 1, &generate);
        let mut stream = self.while_alive(requests::open(link, request)).await??;
        let bounds = Bounds {
            tokens: spotcheck::TOKENS,
            alternatives: Some(spotcheck::ALTERNATIVES),
            ..Bounds::default()
        };
        stream.limit(bounds.message());
        // Checks the tokens as those of any answer are checked.
        let limits = self.mesh.config.request_limits();
        let mut answer = Lifecycle::new(limits, self.asked).within(bounds);
        let resume = answer.placed(self.id, Duration::ZERO, Instant::now());
        let attempt = resume.attempt;
        let mut positions = Vec::new();
        let (mut first, mut last) = (None, Instant::now());
        let mut after_first = 0;
        loop {
            let said = self.next(&mut stream).await?;
            let now = Instant::now();
            let step = match said {
                WorkerReply::Work(message) if message.kind == MsgType::TOKENS => {
                    let tokens: Tokens = requests::read(message)?;
                    if !tokens.tokens.is_empty() {
                        match first {
                            None => first = Some(now),
                            Some(_) => after_first += tokens.tokens.len() as u32,
                        }
                        last = now;
                        (self.alive, self.got_on) = (now, now);
                    }
                    answer.tokens_came(attempt, tokens, now)
                }
                WorkerReply::Work(message) if message.kind == MsgType::DONE => {
                    answer.done(attempt, requests::read(message)?, now)
                }
                WorkerReply::Progress(_) | WorkerReply::Work(_) => answer.idled(attempt, now),
                WorkerReply::Failed(failure) => return Err(failure.into()),
            };
            match step {
                Step::Wait | Step::Advanced(_) => {}
                Step::Emit(delta) => positions.extend(positions_of(&delta)),
                Step::Complete(_) => {
                    let _ = stream.finish();
                    if let Some(first) = first {
                        self.measured(after_first, last - first);
                    }
                    if positions.is_empty() {
                        return Err(Unproven::Failed("its answer is empty".into()));
                    }
                    return Ok(Sample::Text(positions));
                }
                Step::Again(_) | Step::Fail(..) => {
                    stream.reset(ErrorCode::CANCELLED);
                    let text = "it sent what was not asked for";
                    return Err(Unproven::Failed(text.into()));
                }
            }
        }
    }

    fn measured(&self, tokens: u32, took: Duration) {
        if tokens < LEAST_MEASURED {
            return;
        }
        self.mesh.with_worker(self.id, |worker| {
            let batch = worker.assigned.saturating_add(1);
            if let Some(model) = worker.model_mut(&self.proof.model) {
                model.decoded(tokens, took, batch.min(model.card.slots.max(1)));
            }
        });
    }

    /// The same for an embedding model: one text becomes one vector.
    async fn one_vector(&mut self, link: &Link) -> Result<Sample, Unproven> {
        let embed = Embed {
            request_id: ids::fresh("req"),
            model: self.proof.model.clone(),
            inputs: vec![EmbedInput {
                text: Some(EmbedText::Text(self.proof.question.text.clone())),
            }],
            progress_ms: progress_ms(self.mesh),
            ..Default::default()
        };
        let dimensions = self.proof.dimensions;
        let request = message(MsgType::EMBED, 0, &embed);
        let mut stream = self.while_alive(requests::open(link, request)).await??;
        stream.limit(requests::embeddings_bytes(1, dimensions));
        loop {
            match self.next(&mut stream).await? {
                WorkerReply::Work(message) if message.kind == MsgType::EMBEDDINGS => {
                    let embeddings = requests::vectors(message, 1, dimensions)?;
                    let _ = stream.finish();
                    let numbers = embeddings.vectors.as_chunks::<4>().0.iter();
                    let numbers = numbers.map(|bytes| f32::from_le_bytes(*bytes));
                    return Ok(Sample::Vector(numbers.collect()));
                }
                WorkerReply::Progress(_) => {}
                WorkerReply::Work(message) => {
                    debug!(kind = %message.kind, "unexpected on a request's stream");
                }
                WorkerReply::Failed(failure) => return Err(failure.into()),
            }
        }
    }

    /// The same for a model that makes images: a small one in a few steps, by whose pixels workers are compared.
    async fn one_image(&mut self, link: &Link) -> Result<Sample, Unproven> {
        let card = self.mesh.image_card(&self.proof.model);
        let side = card
            .map_or(0, |card| card.least_side)
            .clamp(64, LARGEST_PROBE);
        let prompt = self.proof.question.text.clone();
        let hashed = |hash: u32, byte| hash.wrapping_mul(31).wrapping_add(u32::from(byte));
        let seed = u64::from(prompt.bytes().fold(7, hashed));
        let task = ImageTask {
            request_id: ids::fresh("req"),
            model: self.proof.model.clone(),
            prompt,
            width: side,
            height: side,
            steps: PROBE_STEPS,
            guidance: 5.0,
            seed,
            sampler: "ddim".to_owned(),
            progress_ms: progress_ms(self.mesh),
            ..ImageTask::default()
        };
        let mut arriving = ArrivingImage::new(&task);
        let request = message(MsgType::IMAGE_TASK, 1, &task);
        let mut stream = self.while_alive(requests::open(link, request)).await??;
        stream.limit(arriving.message_bytes());
        loop {
            match self.next(&mut stream).await? {
                WorkerReply::Work(message) if message.kind == MsgType::IMAGE_STEP => {
                    let taken = arriving.step(1, requests::read(message)?);
                    taken.map_err(Failure::Nonsense)?;
                    let now = Instant::now();
                    (self.alive, self.got_on) = (now, now);
                }
                WorkerReply::Work(message) if message.kind == MsgType::IMAGE_DATA => {
                    let part: ImageData = requests::read(message)?;
                    let taken = arriving.data(1, &part).map_err(Failure::Nonsense)?;
                    if let Some(file) = taken {
                        let _ = stream.finish();
                        let pixels = pixels(&file).map_err(Failure::Nonsense)?;
                        return Ok(Sample::Vector(pixels));
                    }
                }
                WorkerReply::Progress(_) => {}
                WorkerReply::Work(message) => {
                    debug!(kind = %message.kind, "unexpected on a request's stream");
                }
                WorkerReply::Failed(failure) => return Err(failure.into()),
            }
        }
    }

    /// The worker's next message, as long as it shows life.
    async fn next(&mut self, stream: &mut MsgStream) -> Result<WorkerReply, Unproven> {
        let Some(message) = self.while_alive(stream.recv()).await?? else {
            return Err(Unproven::Failed("it ended the stream".into()));
        };
        let said = requests::reply_in(message);
        if let WorkerReply::Progress(progress) = &said {
            self.lives(progress)?;
        }
        Ok(said)
    }

    /// The output of `future`, as long as the worker shows life.
    async fn while_alive<T>(&mut self, future: impl Future<Output = T>) -> Result<T, Unproven> {
        let limit = self.mesh.config.first_token_limit;
        let mut future = std::pin::pin!(future);
        loop {
            let due = self.alive + limit;
            if let Ok(outcome) = tokio::time::timeout_at(due.into(), &mut future).await {
                return Ok(outcome);
            }
            let now = Instant::now();
            let seen = self.last_token();
            if seen.is_some_and(|at| at >= self.asked) {
                return Err(Unproven::Needless);
            }
            // An older worker does not report the cause of a wait, but its reports say whether requests wait.
            let busy = self.mesh.is_busy(self.id);
            // One step of a slow machine may take longer. A ring that stands still must be found out, and has
            // others to ask.
            let lately = |at| now.saturating_duration_since(at) < TOLD;
            let slow = self.proof.ring.is_none() && self.told.is_some_and(lately);
            if !slow && (self.told.is_some() || !busy) {
                return Err(Unproven::Silent);
            }
            self.alive = now;
            self.is_needed(!slow)?;
        }
    }

    fn lives(&mut self, progress: &Progress) -> Result<(), Unproven> {
        let now = Instant::now();
        self.told = Some(now);
        if let Some(moment) = now.checked_sub(Duration::from_millis(progress.quiet_ms)) {
            self.alive = self.alive.max(moment);
        }
        if gets_on(progress) {
            self.mesh
                .with_worker(self.id, |worker| worker.gave_sign(&self.proof.model, now));
        }
        self.is_needed(progress.phase() == RequestPhase::Queued)
    }

    /// Gives the probe up if it waited for long and real answers prove that tokens come, or if it is `queued`
    /// behind them.
    fn is_needed(&self, queued: bool) -> Result<(), Unproven> {
        let limit = self.mesh.config.first_token_limit;
        let waited = self.asked.elapsed();
        if waited < limit {
            return Ok(());
        }
        let proven = self.last_token().is_some_and(|at| at >= self.asked);
        if proven || queued {
            return Err(Unproven::Needless);
        }
        // Signs of life are words only. One token does not take so long.
        if self.got_on.elapsed() >= limit.saturating_mul(SIGNS_FOR) {
            return Err(Unproven::Silent);
        }
        Ok(())
    }

    /// Arrival of the last token of a client's answer by this model.
    fn last_token(&self) -> Option<Instant> {
        self.mesh.with_registry(|registry| {
            let worker = registry.get(self.id)?;
            let mut models = worker.models.iter();
            let meant = models.find(|model| model.card.name == self.proof.model);
            meant.and_then(|model| model.last_token())
        })
    }
}

/// The colours of a small PNG file whose size is known, as numbers around 0, so that their direction tells images
/// apart.
fn pixels(file: &[u8]) -> Result<Vec<f32>, String> {
    let unread = |error| format!("the worker sent a PNG file that cannot be read: {error}");
    let limits = png::Limits {
        bytes: MOST_PROBE_BYTES,
    };
    let decoder = png::Decoder::new_with_limits(std::io::Cursor::new(file), limits);
    let mut reader = decoder.read_info().map_err(unread)?;
    let size = reader.output_buffer_size().unwrap_or(usize::MAX);
    if size > MOST_PROBE_BYTES {
        return Err(format!(
            "the worker sent a PNG file of {size} bytes of pixels"
        ));
    }
    let mut colours = vec![0; size];
    let frame = reader.next_frame(&mut colours).map_err(unread)?;
    let colours = &colours[..frame.buffer_size().min(size)];
    Ok(colours.iter().map(|&c| f32::from(c) - 127.5).collect())
}

/// The tokens of a piece of an answer, with the alternatives that came with them.
fn positions_of(delta: &Delta) -> Vec<Position> {
    let tokens = delta.tokens.iter().enumerate();
    let positions = tokens.map(|(index, token)| {
        let said = delta.logprobs.get(index);
        let top = said.into_iter().flat_map(|said| &said.top);
        Position {
            token: *token,
            logprob: said.map_or(0.0, |said| said.logprob),
            top: top.map(|top| (top.token, top.logprob)).collect(),
        }
    });
    positions.collect()
}

/// Steps of an image that shows whether a worker makes any.
const PROBE_STEPS: u32 = 2;

/// Pixels of its side at most, where a model makes none of 64.
const LARGEST_PROBE: u32 = 256;

/// Bytes of its pixels, and of what is needed to read them.
const MOST_PROBE_BYTES: usize = 1 << 20;

/// Interval between looks for workers that have to prove themselves.
const PROOF_PAUSE: Duration = Duration::from_millis(250);

/// Time for which a worker's report on a probe counts.
const TOLD: Duration = Duration::from_secs(10);

/// Multiples of `first_token_limit` for which signs of life without a token keep a probe going.
const SIGNS_FOR: u32 = 4;

/// Least tokens of a probe whose time shows a speed.
const LEAST_MEASURED: u32 = 4;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pixels_of_a_png_file_are_compared_and_junk_is_not() {
        let mut file = Vec::new();
        let mut encoder = png::Encoder::new(&mut file, 2, 1);
        encoder.set_color(png::ColorType::Rgb);
        let mut writer = encoder.write_header().unwrap();
        writer.write_image_data(&[0, 255, 127, 0, 0, 0]).unwrap();
        writer.finish().unwrap();
        let read = pixels(&file).unwrap();
        assert_eq!(read, [-127.5, 127.5, -0.5, -127.5, -127.5, -127.5]);
        assert!(pixels(&file[..file.len() - 20]).is_err());
        assert!(pixels(b"GIF89a").is_err());
    }
}
