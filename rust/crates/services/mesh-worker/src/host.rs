//! The models of this worker, each with its engine.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use futures::future::join_all;
use mesh_engine::Load as EngineLoad;
use mesh_model::encoder;
use mesh_model::image::is_image_model;
use mesh_proto::{Load, ModelCard, ModelSpeed};
use mesh_worker_core::{Failure, Location};

use crate::codec::{Codec, ModelEngine};
use crate::config::Config;
use crate::error::{WorkerError, unpanicked};
use crate::generate::load::learn_turn_end;
use crate::lock::lock;
use crate::models::{Models, may_be_fetched, path_of};
use crate::preparations::Preparations;
use crate::rings::Rings;
use crate::served::ServedModel;
use crate::templates::Templates;
use crate::vram::Vram;
use crate::{embed, generate, image};

/// All models of this worker.
pub(crate) struct Host {
    served: Mutex<Vec<Arc<ServedModel>>>,
    pub(crate) stored: Arc<Models>,
    pub(crate) rings: Arc<Rings>,
    pub(crate) templates: Templates,
    pub(crate) preparations: Preparations,
    pub(crate) vram: Vram,
}

impl Host {
    /// Loads every model of `config` that is a file at hand, starts its engine and lets it answer once, which
    /// also measures its speed. Blocks for as long as that takes. A fault of one model becomes a [`Failure`]
    /// of that model alone.
    ///
    /// # Errors
    /// If names in the configuration contradict each other, or none of them stands for a model.
    pub(crate) fn load(
        config: &Arc<Config>,
        models: Arc<Models>,
        templates: Templates,
    ) -> Result<(Self, Vec<Failure>), WorkerError> {
        let found = find(config)?;
        let vram = Vram::new(config);
        let mut failures = Vec::new();
        let mut loaded = Vec::new();
        for (name, path) in found {
            let load =
                |path: PathBuf| ServedModel::load(&path, None, None, config, &templates, &vram);
            match path.and_then(load) {
                Ok(model) => loaded.push(model),
                Err(error) => failures.push(Failure {
                    name,
                    location: Location::Named,
                    reason: error.to_string(),
                }),
            }
        }
        // Measured while nothing computes.
        let (rings, unusable) = Rings::open(config, models.clone());
        failures.extend(unusable);
        let host = Host {
            served: Mutex::default(),
            stored: models,
            rings,
            templates,
            preparations: Preparations::default(),
            vram,
        };
        for model in loaded {
            host.add(&mut Some(model))?;
        }
        for (name, model) in host.rings.models_held() {
            learn_turn_end(&model, &name, &host.templates);
        }
        for failure in &failures {
            tracing::error!(
                model = failure.name,
                error = failure.reason,
                "model not served; other models are, and this one is tried again when its file changes, and later"
            );
        }
        Ok((host, failures))
    }

    /// True if anything is served or offered here.
    pub(crate) fn serves(&self) -> bool {
        !self.models().is_empty() || self.rings.has_ring_models()
    }

    /// Serves one more model, if there is one. With an error it stays the caller's: its engine ends when it
    /// is dropped, which takes a while.
    pub(crate) fn add(&self, model: &mut Option<ServedModel>) -> Result<(), WorkerError> {
        let mut served = lock(&self.served);
        if let Some(ServedModel { card, .. }) = model
            && served.iter().any(|other| other.card.name == card.name)
        {
            let name = card.name.clone();
            return Err(WorkerError::SameName { name });
        }
        served.extend(model.take().map(Arc::new));
        Ok(())
    }

    /// Stops serving the model called `name`. Its running requests may finish as long as the result is held.
    pub(crate) fn remove(&self, name: &str) -> Option<Arc<ServedModel>> {
        let mut served = lock(&self.served);
        let index = served.iter().position(|other| other.card.name == name)?;
        Some(served.remove(index))
    }

    /// The models that are served whole.
    pub(crate) fn models(&self) -> Vec<Arc<ServedModel>> {
        lock(&self.served).clone()
    }

    pub(crate) fn cards(&self) -> Vec<ModelCard> {
        let models = self.models();
        models.iter().map(|served| served.card.clone()).collect()
    }

    /// The model of this kind called `name`, whole here or driven from here; the first one if there is no name.
    pub(crate) fn find<W: Codec>(&self, name: &str) -> Option<ModelEngine<W>> {
        let of_name = |served: &&Arc<ServedModel>| name.is_empty() || served.card.name == name;
        let models = self.models();
        let mut whole = models.iter().filter(of_name).filter_map(|s| s.as_kind());
        let whole = whole.next().cloned();
        whole.or_else(|| W::of_ring(self.rings.find(name)?))
    }

    /// Loads of all engines, those of rings driven from here included, each with its model's name.
    pub(crate) fn loads(&self) -> Vec<(String, EngineLoad)> {
        let (models, rings) = (self.models(), self.rings.engines());
        let whole = models.iter();
        let whole = whole.map(|served| (served.card.name.clone(), served.engine.load()));
        let driven = rings
            .into_iter()
            .map(|(name, engine)| (name, engine.load()));
        whole.chain(driven).collect()
    }

    pub(crate) fn load_report(&self, draining: bool) -> Load {
        let mut report = Load {
            draining,
            resident_bytes: mesh_service::metrics::resident_bytes().unwrap_or(0),
            ..Load::default()
        };
        for (name, load) in self.loads() {
            report.running += load.running;
            report.queued += load.queued;
            report.kv_tokens_used += load.kv_tokens_used;
            report.kv_tokens_total += load.kv_tokens_total;
            report.prefill_backlog += load.prefill_backlog;
            report.draining |= load.draining;
            report.speeds.push(ModelSpeed {
                name,
                decode_tps: load.decode_tps,
                prefill_tps: load.prefill_tps,
                queued: Some(load.queued),
            });
        }
        report
    }

    pub(crate) async fn drain(&self) {
        let (models, rings) = (self.models(), self.rings.engines());
        let whole = join_all(models.iter().map(|served| served.engine.drain()));
        let driven = join_all(rings.iter().map(|(_, engine)| engine.drain()));
        // Parts that this worker runs for rings: the head moves them elsewhere when it hears of the drain.
        tokio::join!(whole, driven, self.rings.emptied());
    }

    /// Takes models out of service whose engines are gone. The models that were looked at come with the
    /// result: an engine's memory is freed when the last holder drops it, which takes a while.
    pub(crate) fn bury(&self) -> (Vec<Failure>, Vec<Arc<ServedModel>>) {
        let models = self.models();
        let mut dead = Vec::new();
        for served in &models {
            let Some(death) = served.engine.death() else {
                continue;
            };
            let name = served.card.name.clone();
            let error = WorkerError::EngineDead {
                name: name.clone(),
                reason: death.to_string(),
            };
            self.remove(&name);
            dead.push(Failure {
                name,
                location: served.location.clone(),
                reason: error.to_string(),
            });
        }
        (dead, models)
    }
}

impl ServedModel {
    /// Loads the model at `path` and lets its engine work once, which proves that it can and measures its
    /// speed. It is called as its file is unless there is a `name`; its fingerprint is computed unless it is
    /// known. Blocks. A panic is an error of this model.
    pub(crate) fn load(
        path: &Path,
        name: Option<&str>,
        known: Option<&str>,
        config: &Config,
        templates: &Templates,
        vram: &Vram,
    ) -> Result<Self, WorkerError> {
        let load = || {
            if is_image_model(path) {
                return image::load(path, name, known, config);
            }
            match path.is_dir() && encoder::is_encoder(path) {
                true => embed::load::load(path, name, config),
                false => generate::load::load(path, name, known, config, templates, vram),
            }
        };
        unpanicked("loading", path, load)
    }
}

/// A model's name in the configuration, and where it lies or why it cannot be found.
pub(crate) type Resolved = (String, Result<PathBuf, WorkerError>);

/// The models that the names in the configuration stand for, without those that come from elsewhere.
pub(crate) fn find(config: &Config) -> Result<Vec<Resolved>, WorkerError> {
    let mut found = Vec::new();
    let mut names = HashSet::new();
    for name in &config.models {
        match path_of(name, config) {
            Ok(path) => {
                let called = mesh_model::model::model_name(&path);
                if !names.insert(called.clone()) {
                    return Err(WorkerError::SameName { name: called });
                }
                found.push((name.clone(), Ok(path)));
            }
            // It comes later, from elsewhere.
            Err(_) if may_be_fetched(name) => {}
            Err(error) => found.push((name.clone(), Err(error.into()))),
        }
    }
    // If no other model is available, a mistake in the configuration is best seen at once; and another try
    // costs nothing.
    let all_missing =
        found.len() == config.models.len() && found.iter().all(|(_, path)| path.is_err());
    let alone = config.ring.models.is_empty() && config.local_models.is_none();
    match found.iter_mut().next() {
        Some((_, Err(_))) if all_missing && alone => {
            let (_, error) = found.swap_remove(0);
            error.map(|_| Vec::new())
        }
        _ => Ok(found),
    }
}
