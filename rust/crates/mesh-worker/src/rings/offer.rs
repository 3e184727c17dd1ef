//! What this worker can hold parts of, measured.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use arcanum_profiler::{Profile, ProfileOptions, choose_format};
use mesh_engine_ort::{OrtOptions, Reclaim, WeightFormat};
use mesh_model::Model;
use mesh_proto::{ModelCard, NodeProfile};
use mesh_store::{FingerprintCache, local};

use super::Shard;
use crate::config::Config;
use crate::error::WorkerError;
use crate::host;
use crate::models::{Held, may_be_fetched};

/// Opens those models of `config.shards` that are files at hand and finds out what they cost here. What was measured before is kept
/// in the state directory.
pub(super) fn measure(config: &Arc<Config>) -> Result<(Vec<Shard>, NodeProfile), WorkerError> {
    if config.shards.is_empty() {
        return Ok((Vec::new(), NodeProfile::default()));
    }
    let mut paths = Vec::new();
    for name in &config.shards {
        match local::resolve(name, &config.folders()) {
            Ok(path) => paths.push(path),
            // It comes later, from elsewhere.
            Err(_) if may_be_fetched(name) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let options = profile_options(config, paths.first().cloned());
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
        let card = host::card(&name, path, &model, &fingerprint);
        shards.push(measure_one(model, card, &mut profile, &options, config)?);
    }
    Ok((shards, NodeProfile::from(&profile)))
}

/// The same for the model `held`, called `name`, of which the header at least is here, at `path`.
pub(super) fn measure_stored(
    name: &str,
    path: &Path,
    held: &Arc<Held>,
    config: &Arc<Config>,
) -> Result<(Shard, NodeProfile), WorkerError> {
    let options = profile_options(config, None);
    let mut profile = Profile::take(&options);
    let model = Model::open(path)?;
    let fingerprint = held.file_fingerprint();
    // Speeds are kept under it, and the file's own bytes need not be there: weights that are holes are zeros, and no kernel looks
    // at values.
    model.know_fingerprint(&fingerprint);
    let card = host::card(name, path, &model, &fingerprint);
    let mut shard = measure_one(model, card, &mut profile, &options, config)?;
    shard.held = Some(held.clone());
    Ok((shard, NodeProfile::from(&profile)))
}

/// Opens the model `held` anew: it may have been written to since it was opened the last time.
pub(super) fn open_stored(held: &Held) -> Result<Model, String> {
    let open = || {
        let path = held.path().map_err(|error| error.to_string())?;
        Model::open(path).map_err(|error| error.to_string())
    };
    // The file moves when it becomes whole, which may be just now.
    open().or_else(|_| open())
}

fn profile_options(config: &Config, model: Option<PathBuf>) -> ProfileOptions {
    ProfileOptions {
        state_dir: Some(config.state_dir.clone()),
        model,
        threads: config.threads,
        memory_limit: config.ring.memory,
        reserved_for: config.reserved_for.clone(),
        library: config.ort_library.clone(),
        ..ProfileOptions::default()
    }
}

fn measure_one(
    model: Model,
    card: ModelCard,
    profile: &mut Profile,
    options: &ProfileOptions,
    config: &Config,
) -> Result<Shard, WorkerError> {
    let name = &card.name;
    let failed = |reason: String| WorkerError::Measure {
        name: name.clone(),
        reason,
    };
    let _reclaim = Reclaim;
    let mut speeds = Vec::new();
    for &format in config.ring.format.candidates() {
        let speed = profile.layers(&model, format, options);
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
    Ok(Shard {
        offer: speed.offer(card.clone()),
        format: choice.format,
        card,
        model,
        held: None,
    })
}

/// How parts are loaded; slots and context are the ring's.
pub(super) fn options(config: &Config, format: WeightFormat) -> OrtOptions {
    OrtOptions {
        weights: format,
        ..host::options(config)
    }
}
