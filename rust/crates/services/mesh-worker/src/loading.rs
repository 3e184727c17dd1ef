//! Loads models as the core orders it: those that are fetched, those that failed, and those that appear in the
//! watched folder.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_machine::Memory;
use mesh_service::health::Health;
use mesh_service::notify;
use mesh_store::{Pin, local};
use mesh_worker_core::loads::ReadyState;
use mesh_worker_core::{
    Failure, LoadError, LoadId, LoadOrder, LoadStep, Loads, LocalModel, Location, Readiness, Sight,
    Stamp,
};

use crate::config::Config;
use crate::core::CoreHandle;
use crate::error::WorkerError;
use crate::generate::load::learn_turn_end;
use crate::host::Host;
use crate::models::{ReplicaFiles, is_at_hand, path_of};
use crate::served::ServedModel;

/// Carries out the core's loads, and shows the worker's readiness.
pub(crate) struct Loading {
    config: Arc<Config>,
    core: CoreHandle,
    host: Arc<Host>,
    health: Health,
}

/// A model of the store whose files are here as far as they are needed.
struct Fetched {
    files: Arc<ReplicaFiles>,
    path: PathBuf,
    pin: Option<Pin>,
}

impl Loading {
    /// Begins to load, in the background, the models that are not at hand, and to retry those that failed.
    pub(crate) fn begin(
        config: &Arc<Config>,
        host: &Arc<Host>,
        health: &Health,
        failures: Vec<Failure>,
    ) -> Arc<Self> {
        let absent = |name: &&String| {
            let failed = failures.iter().any(|failure| failure.name == **name);
            !failed && !is_at_hand(name, config)
        };
        let whole: Vec<String> = config.models.iter().filter(absent).cloned().collect();
        let parts: Vec<String> = config.ring.models.iter().filter(absent).cloned().collect();
        let names = || config.models.iter().chain(&config.ring.models);
        let named = names().filter_map(|name| path_of(name, config).ok());
        let loads = Loads::new(whole, parts, failures, named, Instant::now());
        let loading = Arc::new(Loading {
            config: config.clone(),
            core: host.stored.core().clone(),
            host: host.clone(),
            health: health.clone(),
        });
        loading.core.change(|core| core.loads = loads);
        let folders = config.folders();
        let at_hand = names().filter_map(|name| local::resolve(name, &folders).ok());
        let at_hand: Vec<PathBuf> = at_hand.collect();
        let sharing = host.clone();
        tokio::spawn(async move {
            for path in at_hand {
                let name = mesh_model::model::model_name(&path);
                sharing.stored.adopt(&name, &path).await;
            }
        });
        tokio::spawn(loading.clone().run());
        loading
    }

    /// Looks for models again now, without waiting for the next attempt.
    pub(crate) fn look_again(&self) {
        self.core
            .change(|core| core.loads.look_again(Instant::now()));
    }

    pub(crate) fn linked(&self, linked: bool) {
        self.core.change(|core| core.loads.linked(linked));
    }

    /// Takes models out of service whose engines are gone; the core has them loaded again later.
    pub(crate) fn look_after(&self) {
        // A model that the folder withdraws meanwhile does not count as a failure.
        let (any, looked_at) = self.core.with(|core| {
            let (dead, looked_at) = self.host.bury();
            let any = !dead.is_empty();
            for failure in dead {
                core.loads.died(failure, Instant::now());
            }
            (any, looked_at)
        });
        // Gigabytes may be freed here: not under the core's lock.
        drop(looked_at);
        if any {
            self.core.change(|_| ());
        }
    }

    async fn run(self: Arc<Self>) {
        if let Some(folder) = &self.config.local_models {
            warn_if_open_to_all(folder);
        }
        let mut changes = self.core.changes();
        let mut next_look = Instant::now();
        let mut shown = None;
        loop {
            let now = Instant::now();
            match self.core.with(|core| core.loads.poll(now)) {
                LoadStep::Load(order) => {
                    tokio::spawn(self.clone().load(order));
                }
                LoadStep::Unload(name) => {
                    if let Some(removed) = self.host.remove(&name) {
                        tokio::spawn(async move { removed.engine.drain().await });
                    }
                }
                LoadStep::Share(name, path) => {
                    let host = self.host.clone();
                    tokio::spawn(async move { host.stored.adopt(&name, &path).await });
                }
                LoadStep::Wait(_) if now >= next_look => {
                    next_look = now + WATCH;
                    self.look().await;
                }
                LoadStep::Wait(until) => {
                    self.show(&mut shown);
                    // Progress is shown as it is made.
                    let awaiting = self.core.with(|core| core.loads.is_awaiting());
                    let show = if awaiting { now + SHOW } else { until };
                    changes.next_until(until.min(next_look).min(show)).await;
                }
            }
        }
    }

    async fn look(&self) {
        let watched = self.core.with(|core| core.loads.watched_files());
        if watched.is_empty() && self.config.local_models.is_none() {
            return;
        }
        let config = self.config.clone();
        let looked = tokio::task::spawn_blocking(move || {
            let files = watched.into_iter().map(|(id, name, location)| {
                let path = match location {
                    Location::At(path) => Some(path),
                    _ => path_of(&name, &config).ok(),
                };
                (id, path.and_then(|path| stamp_of(&path)))
            });
            Sight {
                files: files.collect(),
                folder: config.local_models.as_deref().map(models_in),
                free_memory: Memory::read(Path::new("/")).available,
            }
        });
        if let Ok(sight) = looked.await {
            self.core
                .with(|core| core.loads.seen(sight, Instant::now()));
        }
    }

    async fn load(self: Arc<Self>, order: LoadOrder) {
        let loaded = self.fetch_and_load(&order).await;
        self.core.change(|core| {
            // A success is noted already.
            if let Err(error) = loaded {
                let error = LoadError {
                    text: error.to_string(),
                    same_name: matches!(error, WorkerError::SameName { .. }),
                };
                core.loads.loaded(&order.id, Err(error), Instant::now());
            }
        });
    }

    async fn fetch_and_load(self: &Arc<Self>, order: &LoadOrder) -> Result<(), WorkerError> {
        let fetched = match &order.location {
            Location::Store(name) => self.fetch(name, true).await.map(Some),
            // Its layers are fetched when the head gives some to this worker.
            Location::StorePart(name) => self.fetch(name, false).await.map(Some),
            _ => Ok(None),
        };
        let fetched = fetched.map_err(|reason| WorkerError::Fetch {
            name: order.name.clone(),
            reason,
        })?;
        let (loading, order) = (self.clone(), order.clone());
        tokio::task::spawn_blocking(move || loading.load_now(&order, fetched)).await?
    }

    /// Fetches all of a model, or what planning with it needs.
    async fn fetch(&self, name: &str, all: bool) -> Result<Fetched, String> {
        let models = &self.host.stored;
        let files = models.obtain(name).await?;
        let pieces = match all {
            true => files.map().all(),
            false => files.map().headers(),
        };
        models.fetch(&files, pieces).await?;
        Ok(Fetched {
            pin: all.then(|| models.pin(&files)).flatten(),
            path: models.path(&files).await?,
            files,
        })
    }

    /// Loads a model and serves or offers it; a success is noted in the core. Blocks.
    fn load_now(&self, order: &LoadOrder, fetched: Option<Fetched>) -> Result<(), WorkerError> {
        let host = &self.host;
        let templates = &host.templates;
        let load = |path: &Path, name: Option<&str>, fingerprint: Option<&str>| {
            ServedModel::load(path, name, fingerprint, &self.config, templates, &host.vram)
        };
        let loaded = match (&order.location, fetched) {
            (Location::StorePart(name), Some(fetched)) => {
                let name = fetched.files.map().served_as(name);
                let (name, model) = host.rings.add(&name, &fetched.path, &fetched.files)?;
                learn_turn_end(&model, &name, templates);
                None
            }
            (Location::NamedPart, _) => {
                let (name, model) = host.rings.add_file(&order.name)?;
                learn_turn_end(&model, &name, templates);
                None
            }
            (Location::Store(name), Some(Fetched { files, path, pin })) => {
                let served_as = files.map().served_as(name);
                let fingerprint = files.map().file_fingerprint();
                let loaded = load(&path, Some(&served_as), Some(&fingerprint))?;
                Some(loaded.stored(name, pin))
            }
            (Location::At(path), _) => Some(load(path, Some(&order.name), None)?),
            _ => Some(load(&path_of(&order.name, &self.config)?, None, None)?),
        };
        self.serve(&order.id, loaded)
    }

    /// Serves a model that was loaded, unless it is not wanted any more. One offered in parts is there
    /// already.
    fn serve(&self, id: &LoadId, mut loaded: Option<ServedModel>) -> Result<(), WorkerError> {
        // What is not served is dropped outside: its engine ends, which takes a while.
        self.core.with(|core| {
            if core.loads.may_serve(id) {
                self.host.add(&mut loaded)?;
            }
            // Under the same lock: should its engine die at once, the core knows whose load it was.
            core.loads.loaded(id, Ok(()), Instant::now());
            Ok(())
        })
    }

    fn show(&self, shown: &mut Option<Readiness>) {
        let serves = self.host.serves();
        let status = self.core.with(|core| {
            let lacking = core.catalogue.lacking();
            let readiness = core.loads.readiness(serves, lacking);
            if shown.as_ref() == Some(&readiness) {
                return None;
            }
            let shown = shown.insert(readiness);
            // Under the lock: a link lost, or a drain begun, after this look has the last word.
            self.health.set_note(shown.note.clone());
            match &shown.state {
                // A lost link, or a drain, reports its reason by itself.
                ReadyState::Elsewhere => None,
                ReadyState::Ready => {
                    self.health.set_ready();
                    shown.note.clone()
                }
                ReadyState::Lacks(text) => {
                    self.health.set_unready(text.clone());
                    Some(text.clone())
                }
            }
        });
        if let Some(status) = status {
            notify::status(&status);
        }
    }
}

fn warn_if_open_to_all(folder: &Path) {
    let everybody = |found: std::fs::Metadata| found.permissions().mode() & 0o1002 == 0o002;
    if std::fs::metadata(folder).is_ok_and(everybody) {
        tracing::warn!(
            folder = %folder.display(),
            "everybody on this machine can put models there and take others away, and they are served: `chmod o-w` it"
        );
    }
}

/// Metadata that shows that something at a path changed.
fn stamp_of(path: &Path) -> Option<Stamp> {
    let model = local::look_at(path.to_owned())?;
    Some((model.bytes, model.changed()))
}

fn models_in(folder: &Path) -> Result<Vec<LocalModel>, String> {
    let models = local::list(&[folder.to_owned()]).map_err(|error| error.to_string())?;
    let models = models.into_iter().map(|model| LocalModel {
        stamp: (model.bytes, model.changed()),
        path: model.path,
        name: model.name,
    });
    Ok(models.collect())
}

const SHOW: Duration = Duration::from_millis(250);
/// A look at a folder costs next to nothing, and works on every file system.
const WATCH: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamp_tells_whether_a_file_changed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.gguf");
        assert_eq!(stamp_of(&path), None);
        std::fs::write(&path, "as it was").unwrap();
        let before = stamp_of(&path);
        assert!(before.is_some() && before == stamp_of(&path));
        std::fs::write(&path, "damaged").unwrap();
        assert_ne!(stamp_of(&path), before);
        let models = models_in(folder.path()).unwrap();
        assert_eq!(models.len(), 1);
        assert_eq!(Some(models[0].stamp), stamp_of(&path));
    }
}
