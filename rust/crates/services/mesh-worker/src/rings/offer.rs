//! Measures the models of which this worker can hold parts.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use mesh_engine_ort::Reclaim;
use mesh_machine::{ProfileOptions, Profiler, choose_format};
use mesh_model::Model;
use mesh_proto::{ModelCard, NodeProfile};
use mesh_store::local;
use mesh_worker_core::{Failure, Location};

use super::ring_model::RingModel;
use crate::config::Config;
use crate::error::{WorkerError, unpanicked};
use crate::generate::load as chat;
use crate::models::{ReplicaFiles, may_be_fetched};

/// Opens those models of `config.ring.models` that are files at hand and measures their cost here. Earlier
/// measurements are kept in the state directory. A fault of one model becomes a [`Failure`] of that model
/// alone.
pub(super) fn measure(config: &Arc<Config>) -> (Vec<RingModel>, NodeProfile, Vec<Failure>) {
    if config.ring.models.is_empty() {
        return (Vec::new(), NodeProfile::default(), Vec::new());
    }
    let mut failures = Vec::new();
    let mut fail = |name: &str, error: WorkerError| {
        failures.push(Failure {
            name: name.to_owned(),
            location: Location::NamedPart,
            reason: error.to_string(),
        });
    };
    let mut paths = Vec::new();
    for name in &config.ring.models {
        match local::resolve(name, &config.folders()) {
            Ok(path) => paths.push((name, path)),
            // It comes later, from elsewhere.
            Err(_) if may_be_fetched(name) => {}
            Err(error) => fail(name, error.into()),
        }
    }
    let options = profile_options(config, paths.first().map(|(_, path)| path.clone()));
    let mut profiler = Profiler::take(options);
    let mut ring_models: Vec<RingModel> = Vec::new();
    for (configured, path) in &paths {
        let name = mesh_model::model::model_name(path);
        let ring_model = match ring_models.iter().any(|other| other.card.name == name) {
            true => Err(WorkerError::SameName { name }),
            false => measure_path(path, &mut profiler, config),
        };
        match ring_model {
            Ok(ring_model) => ring_models.push(ring_model),
            Err(error) => fail(configured, error),
        }
    }
    (ring_models, NodeProfile::from(&profiler.profile), failures)
}

/// The same for one name in the configuration.
pub(super) fn measure_file(
    name: &str,
    config: &Arc<Config>,
) -> Result<(RingModel, NodeProfile), WorkerError> {
    let path = local::resolve(name, &config.folders())?;
    let options = profile_options(config, Some(path.clone()));
    let mut profiler = Profiler::take(options);
    let ring_model = measure_path(&path, &mut profiler, config)?;
    Ok((ring_model, NodeProfile::from(&profiler.profile)))
}

/// Opens and measures a model. A panic is an error of this model.
fn measure_path(
    path: &Path,
    profiler: &mut Profiler,
    config: &Config,
) -> Result<RingModel, WorkerError> {
    let measure = || {
        let model = Model::open(path)?;
        let fingerprint = config.fingerprints().fingerprint(path);
        let fingerprint = fingerprint.map_err(|error| WorkerError::fingerprint(path, &error))?;
        let card = chat::card(&model.name(), &model, &fingerprint);
        measure_one(model, card, profiler, config)
    };
    unpanicked("measuring", path, measure)
}

/// The same for the replica called `name`, of which the header at least is here, at `path`.
pub(super) fn measure_stored(
    name: &str,
    path: &Path,
    files: &Arc<ReplicaFiles>,
    config: &Arc<Config>,
) -> Result<(RingModel, NodeProfile), WorkerError> {
    let mut profiler = Profiler::take(profile_options(config, None));
    let model = Model::open(path)?;
    let fingerprint = files.map().file_fingerprint();
    // Speeds are kept under it, and the file's own bytes need not be there: weights that are holes are zeros,
    // and no kernel looks at values.
    model.know_fingerprint(&fingerprint);
    let card = chat::card(name, &model, &fingerprint);
    let mut ring_model = measure_one(model, card, &mut profiler, config)?;
    ring_model.files = Some(files.clone());
    Ok((ring_model, NodeProfile::from(&profiler.profile)))
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
    profiler: &mut Profiler,
    config: &Config,
) -> Result<RingModel, WorkerError> {
    let name = &card.name;
    let failed = |reason: String| WorkerError::Measure {
        name: name.clone(),
        reason,
    };
    let _reclaim = Reclaim;
    let mut speeds = Vec::new();
    for &format in config.ring.format.candidates() {
        let speed = profiler.layers(&model, format);
        speeds.push(speed.map_err(|error| failed(error.to_string()))?);
    }
    let choice = choose_format(&speeds)
        .ok_or_else(|| failed("no weight format could be measured".to_owned()))?;
    let mut measured = speeds.iter();
    let speed = measured.find(|speed| speed.format == choice.format.name());
    let speed = speed.ok_or_else(|| failed("its weight format was not measured".to_owned()))?;
    tracing::info!(
        model = name,
        format = speed.format,
        reason = choice.reason,
        layer_mib = speed.layer_bytes as f64 / f64::from(1 << 20),
        decode_us = speed.decode_us,
        prefill_us = speed.prefill_us,
        "model offered in parts"
    );
    Ok(RingModel {
        offer: speed.offer(card.clone()),
        format: choice.format,
        card,
        model: model.into(),
        files: None,
    })
}
