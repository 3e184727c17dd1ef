//! The embedding models of this worker: loaded, warmed up, and asked by the head with Embed.

use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use bytes::{BufMut, BytesMut};
use dcf::{ErrorCode, Message, MsgType};
use mesh_engine::embed::scheduler::EmbedConfig;
use mesh_engine::embed::shorten;
use mesh_engine::{EmbedRequest, Embedding, Engine, EngineHandle, RequestError};
use mesh_engine_ort::{OrtEncoder, OrtOptions, Reclaim};
use mesh_model::{EncoderError, EncoderModel};
use mesh_net::quic::{MsgStream, timestamp_us};
use mesh_proto::{Embed, EmbedText, Embeddings, ModelCard, ModelKind, Progress};
use mesh_store::{FingerprintCache, Pin};
use prost::Message as _;
use tracing::Instrument;

use crate::answer::refuse;
use crate::config::Config;
use crate::error::WorkerError;
use crate::generate;
use crate::host::{self, Host};
use crate::life::{self, Life};
use crate::preparations;

/// One embedding model with its engine.
pub(crate) struct HostedEncoder {
    pub(crate) model: EncoderModel,
    pub(crate) engine: EngineHandle<Embedding>,
    /// The model's description for the head.
    pub(crate) card: ModelCard,
    pub(crate) source: host::Source,
    /// Ends the engine's thread when dropped.
    _engine: Engine<Embedding>,
    /// Keeps its files in the store.
    pub(crate) _pin: Option<Pin>,
}

impl HostedEncoder {
    /// Loads the model in `folder`, starts its engine and lets it embed something, which also measures its
    /// speed. It is called as its folder is unless there is a `name`.
    pub(crate) fn load(
        folder: &Path,
        name: Option<&str>,
        config: &Config,
    ) -> Result<Self, WorkerError> {
        let started = Instant::now();
        let _reclaim = Reclaim;
        let failed = |source| WorkerError::Encoder {
            name: folder.display().to_string(),
            source,
        };
        let mut model = EncoderModel::open(folder).map_err(failed)?;
        let name = name.map_or_else(|| model.name(), str::to_owned);
        if let Some(prompts) = config.embed.prompts.get(&name) {
            model.set_prompts(prompts.clone());
        }
        let cache = FingerprintCache::new(config.state_dir.join("fingerprints.json"));
        let weights = model.weights_path();
        let fingerprint = cache.fingerprint(&weights).map_err(|error| {
            WorkerError::Internal(format!("fingerprint of {}: {error}", weights.display()))
        })?;
        let options = OrtOptions {
            max_rows: config.embed.batch_tokens,
            ..host::options(config)
        };
        let encoder = OrtEncoder::load(&model, &options).map_err(|source| WorkerError::Load {
            name: name.clone(),
            source: Box::new(source),
        })?;
        let limits = EmbedConfig {
            queue_limit: config.queue_limit.max(config.slots as usize),
        };
        let start = |_| Ok(Embedding::new(Box::new(encoder), limits));
        let engine = Engine::start_with(&name, start).map_err(|source| WorkerError::Start {
            name: name.clone(),
            source,
        })?;
        let handle = engine.handle();
        warm_up(&handle, &name)?;
        let load = handle.load();
        let info = handle.info();
        let card = ModelCard {
            architecture: model.config().architecture.clone(),
            fingerprint: model.fingerprint(&fingerprint),
            context: u32::try_from(info.max_tokens).unwrap_or(u32::MAX),
            slots: config.slots,
            prefill_tps: load.prefill_tps,
            file_bytes: model.tensors().file_len(),
            quantization: dtype(&model),
            layer_end: u32::try_from(model.config().layers).unwrap_or(u32::MAX),
            kind: ModelKind::Embed.into(),
            dimensions: u32::try_from(info.dimensions).unwrap_or(u32::MAX),
            name,
            ..ModelCard::default()
        };
        tracing::info!(
            model = card.name,
            seconds = started.elapsed().as_secs_f64(),
            weight_mib = info.weight_bytes >> 20,
            dimensions = card.dimensions,
            tokens_per_second = card.prefill_tps,
            "embedding model loaded"
        );
        Ok(HostedEncoder {
            model,
            engine: handle,
            card,
            source: host::Source::At(folder.into()),
            _engine: engine,
            _pin: None,
        })
    }
}

/// Type of the largest tensor.
fn dtype(model: &EncoderModel) -> String {
    let largest = model
        .tensors()
        .tensors()
        .max_by_key(|tensor| tensor.data.len());
    largest.map_or_else(String::new, |tensor| format!("{:?}", tensor.dtype))
}

/// Proof that vectors come out, and the first measurement of the speed.
fn warm_up(engine: &EngineHandle<Embedding>, name: &str) -> Result<(), WorkerError> {
    let info = engine.info();
    let vocab = u32::try_from(info.vocab).unwrap_or(u32::MAX).max(1);
    let length = WARM_UP_TOKENS.min(u32::try_from(info.max_tokens).unwrap_or(u32::MAX));
    // Any tokens will do; spread over the vocabulary they touch as much of its table as text does.
    let sequence: Vec<u32> = (0..length).map(|i| i.wrapping_mul(7919) % vocab).collect();
    // The first batch pays for memory that the second finds.
    for texts in [1, WARM_UP_TEXTS] {
        let request = EmbedRequest {
            id: "warm-up".to_owned(),
            sequences: vec![sequence.clone(); texts],
            deadline: None,
        };
        let answer = futures::executor::block_on(engine.submit(request).last_event());
        let reason = match answer {
            Ok(answer) if answer.vectors.iter().flatten().all(|x| x.is_finite()) => continue,
            Ok(_) => "its vectors have numbers that are not finite".to_owned(),
            Err(error) => error.to_string(),
        };
        return Err(WorkerError::Broken {
            name: name.to_owned(),
            reason,
        });
    }
    Ok(())
}

/// Answers the Embed that `first` is. Ends early when the head breaks the stream off, which cancels the
/// request.
pub(crate) async fn serve(stream: MsgStream, first: Message, host: &Arc<Host>) {
    let arrived = Instant::now();
    let sequence = first.sequence;
    let embed = match Embed::decode(first.payload) {
        Ok(embed) => embed,
        Err(error) => {
            tracing::warn!(%error, "the head sent an Embed that cannot be read");
            let text = format!("the Embed cannot be read: {error}");
            return refuse(stream, sequence, ErrorCode::INVALID_PAYLOAD, &text).await;
        }
    };
    let span = tracing::info_span!("request", id = embed.request_id);
    async {
        let (mut send, mut recv) = stream.split();
        let answer = {
            let mut life = Life::new(embed.progress_ms);
            let at = Stage::default();
            let mut answering = std::pin::pin!(answer(host, embed, arrived, &at));
            let mut broken_off = std::pin::pin!(async {
                // Messages are ignored, and the end of the head's side does not end the request; only an
                // error does.
                while let Ok(message) = recv.recv().await {
                    if message.is_none() {
                        std::future::pending::<()>().await;
                    }
                }
            });
            loop {
                tokio::select! {
                    biased;
                    answer = &mut answering => break answer,
                    () = &mut broken_off => {
                        tracing::debug!("cancelled");
                        return;
                    }
                    () = life.due() => {
                        if let Err(failure) = send.send(life::message(sequence, at.progress())).await {
                            tracing::debug!(%failure, "the head is gone");
                            return;
                        }
                    }
                }
            }
        };
        let message = match answer {
            Ok(embeddings) => Message::new(
                MsgType::EMBEDDINGS,
                sequence,
                timestamp_us(),
                embeddings.encode_to_vec(),
            ),
            Err(refusal) => {
                tracing::debug!(%refusal, "refused");
                let text = refusal.to_string();
                Message::error(sequence, timestamp_us(), refusal.code(), &text)
            }
        };
        if let Err(failure) = send.send(message).await {
            tracing::debug!(%failure, "the head is gone");
            return;
        }
        let _ = send.finish();
        // Sent data must arrive before the stream's halves are dropped.
        send.stopped().await;
    }
    .instrument(span)
    .await;
}

/// Reasons for which texts are not embedded.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error("this worker does not serve an embedding model called {name:?}")]
    UnknownModel { name: String },
    #[error("no texts were given")]
    Nothing,
    #[error("{texts} texts are more than the limit of {MOST_TEXTS}")]
    TooMany { texts: usize },
    #[error("dimensions is {asked}, but the model's vectors have {there} numbers")]
    Dimensions { asked: u32, there: usize },
    #[error("text {index}: {source}")]
    Text { index: usize, source: EncoderError },
    #[error(transparent)]
    Engine(#[from] RequestError),
    #[error(transparent)]
    Full(#[from] preparations::Full),
    #[error("the texts could not be prepared: {0}")]
    Failed(String),
}

impl Refusal {
    fn code(&self) -> ErrorCode {
        match self {
            Refusal::UnknownModel { .. } => ErrorCode::UNKNOWN_MODEL,
            Refusal::Engine(error) => generate::code(error),
            Refusal::Full(_) => ErrorCode::WORKER_BUSY,
            Refusal::Failed(_) => ErrorCode::INTERNAL,
            _ => ErrorCode::INVALID_PAYLOAD,
        }
    }
}

/// Progress of the answer to an Embed.
#[derive(Default)]
struct Stage {
    /// Time at which its texts began to be tokenised. Until then it waits for other requests, which does not
    /// count as silence.
    tokenising: OnceLock<Instant>,
    /// Set when this engine has the texts.
    engine: OnceLock<EngineHandle<Embedding>>,
}

impl Stage {
    fn progress(&self) -> Progress {
        match self.engine.get() {
            Some(engine) => life::of_encoder(engine),
            None => life::preparing(self.tokenising.get().copied()),
        }
    }
}

/// The vectors of `embed`.
async fn answer(
    host: &Arc<Host>,
    embed: Embed,
    arrived: Instant,
    at: &Stage,
) -> Result<Embeddings, Refusal> {
    let Some(hosted) = host.find_encoder(&embed.model) else {
        return Err(Refusal::UnknownModel { name: embed.model });
    };
    let there = hosted.engine.info().dimensions;
    if embed.dimensions as usize > there {
        return Err(Refusal::Dimensions {
            asked: embed.dimensions,
            there,
        });
    }
    if embed.inputs.is_empty() {
        return Err(Refusal::Nothing);
    }
    if embed.inputs.len() > MOST_TEXTS {
        return Err(Refusal::TooMany {
            texts: embed.inputs.len(),
        });
    }
    let deadline = (embed.deadline_ms > 0)
        .then(|| arrived.checked_add(Duration::from_millis(embed.deadline_ms)))
        .flatten();
    let dimensions = match embed.dimensions {
        0 => there,
        dimensions => dimensions as usize,
    };
    let id = embed.request_id.clone();
    let texts = embed.inputs.iter().map(|input| input.text.as_ref());
    let place = host
        .preparations()
        .enter(preparations::bytes_to_embed(texts))
        .await?;
    let _ = at.tokenising.set(Instant::now());
    // Many texts take milliseconds to tokenise; other streams go on meanwhile.
    let model = hosted.clone();
    let sequences = preparations::prepare(place, move || tokenise(&model.model, &embed))
        .await
        .map_err(|error| Refusal::Failed(error.to_string()))??;
    let tokens = sequences.iter().map(|s| s.len() as u32).collect();
    let request = EmbedRequest {
        id,
        sequences,
        deadline,
    };
    let reply = hosted.engine.submit(request);
    let _ = at.engine.set(hosted.engine.clone());
    let embedded = reply.last_event().await?;
    let mut vectors = BytesMut::with_capacity(embedded.vectors.len() * dimensions * 4);
    for mut vector in embedded.vectors {
        shorten(&mut vector, dimensions);
        vector.iter().for_each(|&x| vectors.put_f32_le(x));
    }
    Ok(Embeddings {
        dimensions: u32::try_from(dimensions).unwrap_or(u32::MAX),
        vectors: vectors.freeze(),
        tokens,
        total_us: u64::try_from(arrived.elapsed().as_micros()).unwrap_or(u64::MAX),
    })
}

fn tokenise(model: &EncoderModel, embed: &Embed) -> Result<Vec<Vec<u32>>, Refusal> {
    let prompt = (!embed.prompt_name.is_empty()).then_some(embed.prompt_name.as_str());
    let inputs = embed.inputs.iter().enumerate();
    inputs
        .map(|(index, input)| {
            let tokenised = match &input.text {
                Some(EmbedText::Text(text)) => model.tokenise(text, prompt),
                Some(EmbedText::Tokens(list)) => model.wrap_tokens(&list.tokens),
                None => model.tokenise("", prompt),
            };
            match tokenised {
                Ok(tokenised) => Ok(tokenised.tokens),
                Err(source) => Err(Refusal::Text { index, source }),
            }
        })
        .collect()
}

/// Texts of one Embed; heads cut larger requests.
const MOST_TEXTS: usize = 2048;

/// Enough to measure by, few enough to keep the start short.
const WARM_UP_TOKENS: u32 = 32;
const WARM_UP_TEXTS: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_that_wait_for_a_place_are_not_silent() {
        let at = Stage::default();
        assert_eq!(at.progress().quiet_ms, 0, "however long ago it arrived");
        let begun = Instant::now().checked_sub(Duration::from_secs(2));
        at.tokenising.set(begun.unwrap()).unwrap();
        assert!(at.progress().quiet_ms >= 2000);
    }
}
