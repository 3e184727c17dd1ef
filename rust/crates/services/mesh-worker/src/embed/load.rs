//! Loads embedding models.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use mesh_engine::{EmbedRequest, Embedding, Engine, EngineHandle};
use mesh_engine_ort::{OrtEncoder, OrtOptions, Reclaim};
use mesh_model::EncoderModel;
use mesh_proto::{ModelCard, ModelKind};

use crate::config::Config;
use crate::error::WorkerError;
use crate::generate;
use crate::served::ServedModel;

/// Loads the model in `folder`, starts its engine and lets it embed something, which also measures its
/// speed. It is called as its folder is unless there is a `name`.
pub(crate) fn load(
    folder: &Path,
    name: Option<&str>,
    config: &Config,
) -> Result<ServedModel, WorkerError> {
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
    let weights = model.weights_path();
    let fingerprint = config.fingerprints().fingerprint(&weights);
    let fingerprint = fingerprint.map_err(|error| WorkerError::fingerprint(&weights, &error))?;
    let options = OrtOptions {
        max_rows: config.embed.batch_tokens,
        ..generate::load::options(config)
    };
    let encoder = OrtEncoder::load(&model, &options).map_err(|source| WorkerError::Load {
        name: name.clone(),
        source: Box::new(source),
    })?;
    let queue_limit = config.queue_limit.max(config.slots as usize);
    let start = |_| Ok(Embedding::new(Box::new(encoder), queue_limit));
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
    Ok(ServedModel::new(
        folder,
        Arc::new(model),
        engine,
        card,
        "cpu",
    ))
}

fn dtype(model: &EncoderModel) -> String {
    let tensors = model.tensors().tensors();
    let largest = tensors.max_by_key(|tensor| tensor.data.len());
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
            Ok(answer) if answer.iter().flatten().all(|x| x.is_finite()) => continue,
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

/// Enough to measure by, few enough to keep the start short.
const WARM_UP_TOKENS: u32 = 32;
const WARM_UP_TEXTS: usize = 16;
