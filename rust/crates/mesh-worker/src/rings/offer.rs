//! What this worker can hold parts of, measured.

use std::sync::Arc;

use arcanum_profiler::{Profile, ProfileOptions, choose_format};
use mesh_engine_ort::{OrtOptions, WeightFormat};
use mesh_model::Model;
use mesh_proto::{ModelCard, NodeProfile};
use mesh_store::{FingerprintCache, local};

use super::Shard;
use crate::config::Config;
use crate::error::WorkerError;
use crate::host;

/// Opens the models of `config.shards` and finds out what they cost here. What was measured before is kept in the state
/// directory.
pub(super) fn measure(config: &Arc<Config>) -> Result<(Vec<Shard>, NodeProfile), WorkerError> {
    if config.shards.is_empty() {
        return Ok((Vec::new(), NodeProfile::default()));
    }
    let mut paths = Vec::new();
    for name in &config.shards {
        paths.push(local::resolve(name, &config.model_dirs)?);
    }
    let options = ProfileOptions {
        state_dir: Some(config.state_dir.clone()),
        model: paths.first().cloned(),
        threads: config.threads,
        memory_limit: config.ring.memory,
        reserved_for: config.reserved_for.clone(),
        library: config.ort_library.clone(),
        ..ProfileOptions::default()
    };
    let mut profile = Profile::take(&options);
    let mut shards: Vec<Shard> = Vec::new();
    for path in &paths {
        let model = Model::open(path)?;
        let name = model.name();
        if shards.iter().any(|other| other.card.name == name) {
            return Err(WorkerError::SameName { name });
        }
        let cache = FingerprintCache::new(config.state_dir.join("fingerprints.json"));
        let fingerprint = cache.fingerprint(path).map_err(|error| {
            WorkerError::Internal(format!("fingerprint of {}: {error}", path.display()))
        })?;
        let failed = |reason: String| WorkerError::Measure {
            name: name.clone(),
            reason,
        };
        let mut speeds = Vec::new();
        for &format in config.ring.format.candidates() {
            let speed = profile.layers(&model, format, &options);
            speeds.push(speed.map_err(|error| failed(error.to_string()))?);
        }
        let choice = choose_format(&speeds)
            .ok_or_else(|| failed("no weight format could be measured".to_owned()))?;
        let speed = speeds
            .iter()
            .find(|speed| speed.format == choice.format.name())
            .ok_or_else(|| failed("its weight format was not measured".to_owned()))?;
        tracing::info!(
            model = name,
            format = speed.format,
            reason = choice.reason,
            layer_mib = speed.layer_bytes as f64 / f64::from(1 << 20),
            decode_us = speed.decode_us,
            prefill_us = speed.prefill_us,
            "model offered in parts"
        );
        let card = ModelCard {
            slots: 0,
            ..host::card(path, &model, &fingerprint)
        };
        shards.push(Shard {
            offer: speed.offer(card.clone()),
            format: choice.format,
            card,
            model,
        });
    }
    Ok((shards, NodeProfile::from(&profile)))
}

/// How parts are loaded; slots and context are the ring's.
pub(super) fn options(config: &Config, format: WeightFormat) -> OrtOptions {
    OrtOptions {
        weights: format,
        ..host::options(config)
    }
}
