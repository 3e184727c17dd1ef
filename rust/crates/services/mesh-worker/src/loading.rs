//! Models that come while the worker runs: those that are fetched, and those that appear in the watched
//! folder.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use mesh_machine::Memory;
use mesh_service::health::Health;
use mesh_service::notify;
use mesh_store::local;
use tokio::sync::watch;

use crate::config::Config;
use crate::error::WorkerError;
use crate::host::Host;
use crate::models::is_at_hand;
use crate::served::{Failure, ServedModel, Source};

/// Models that are still to come, and the worker's readiness.
pub(crate) struct Loading {
    host: Arc<Host>,
    health: Health,
    state: Mutex<State>,
    /// Number of requests to look again; see [`Loading::look_again`].
    looks: watch::Sender<u64>,
    /// Held while a model of the watched folder is loaded: one at a time.
    local: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct State {
    linked: bool,
    /// Models to come, each with the obstacle, if it is known.
    pending: BTreeMap<String, Option<String>>,
    /// Number of deaths of each model's engine.
    deaths: BTreeMap<String, u32>,
    watched: Watched,
}

/// Models that [`Loading::watch_folder`] serves, which withdraws and loads them as their files change. When
/// an engine dies, [`Loading::again`] may load the same file only as long as its model is still the same one
/// here.
#[derive(Default)]
struct Watched {
    loads: u64,
    /// By path, each with the number of its load.
    served: BTreeMap<PathBuf, u64>,
}

/// One load of a model in the watched folder.
#[derive(Debug, Clone, PartialEq, Eq)]
struct WatchedLoad {
    path: PathBuf,
    number: u64,
}

impl Watched {
    fn appeared(&mut self, path: &Path) {
        self.loads += 1;
        self.served.insert(path.to_owned(), self.loads);
    }

    fn vanished(&mut self, path: &Path) {
        self.served.remove(path);
    }

    /// The load that a failed model came from, if it lies in the folder and the configuration does not name
    /// it.
    fn load_of(&self, source: &Source) -> Option<WatchedLoad> {
        let Source::At(path) = source else {
            return None;
        };
        let number = *self.served.get(path)?;
        let path = path.clone();
        Some(WatchedLoad { path, number })
    }

    /// True if the folder's watcher has withdrawn that load, and does the rest of the work.
    fn took_over(&self, load: Option<&WatchedLoad>) -> bool {
        load.is_some_and(|load| self.served.get(&load.path) != Some(&load.number))
    }
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
        let models: Vec<String> = config.models.iter().filter(absent).cloned().collect();
        let shards: Vec<String> = config.ring.models.iter().filter(absent).cloned().collect();
        let pending = models.iter().chain(&shards).cloned();
        let loading = Arc::new(Loading {
            host: host.clone(),
            health: health.clone(),
            state: Mutex::new(State {
                pending: pending.map(|name| (name, None)).collect(),
                ..State::default()
            }),
            looks: watch::Sender::new(0),
            local: tokio::sync::Mutex::default(),
        });
        for failure in failures {
            let again = loading
                .clone()
                .again(failure, None, config.clone(), TRY_AGAIN);
            tokio::spawn(again);
        }
        for name in models {
            tokio::spawn(loading.clone().load(name, config.clone(), false));
        }
        for name in shards {
            tokio::spawn(loading.clone().load(name, config.clone(), true));
        }
        let at_hand: Vec<PathBuf> = config
            .models
            .iter()
            .chain(&config.ring.models)
            .filter_map(|name| local::resolve(name, &config.folders()).ok())
            .collect();
        let sharing = loading.clone();
        tokio::spawn(async move {
            for path in at_hand {
                let name = mesh_model::model::model_name(&path);
                sharing.host.stored().adopt(&name, &path).await;
            }
        });
        if let Some(folder) = &config.local_models {
            let watch = loading.clone().watch_folder(folder.clone(), config.clone());
            tokio::spawn(watch);
        }
        if !loading.lock().pending.is_empty() {
            tokio::spawn(loading.clone().tell());
        }
        loading
    }

    /// Looks for models again now: in the folder, also for those in it that were refused, and for those that
    /// should come from elsewhere, without waiting for the next attempt.
    pub(crate) fn look_again(&self) {
        self.looks.send_modify(|count| *count += 1);
    }

    /// Notes that the link to the head is up or down.
    pub(crate) fn linked(&self, linked: bool) {
        self.lock().linked = linked;
        // A lost link reports its reason by itself.
        if linked {
            self.show();
        }
    }

    /// Takes models out of service whose engines are gone, and loads them again later.
    pub(crate) fn look_after(self: &Arc<Self>, config: &Arc<Config>) {
        let failures: Vec<(Failure, Option<WatchedLoad>)> = {
            // A model that the folder's watcher withdraws meanwhile does not count as a failure.
            let state = self.lock();
            let with_load = |failure: Failure| {
                let load = state.watched.load_of(&failure.source);
                (failure, load)
            };
            self.host.bury().into_iter().map(with_load).collect()
        };
        for (failure, load) in failures {
            tracing::error!(
                model = failure.name,
                error = failure.reason,
                "model not served any more; it is loaded again"
            );
            let deaths = {
                let mut state = self.lock();
                let deaths = state.deaths.entry(failure.name.clone()).or_default();
                *deaths = (*deaths + 1).min(8);
                *deaths
            };
            // An engine that dies each time must not keep the machine busy.
            let pause = (TRY_AGAIN * 2u32.pow(deaths - 1)).min(TRY_LATER);
            let again = self.clone().again(failure, load, config.clone(), pause);
            tokio::spawn(again);
            self.show();
        }
    }

    /// Loads a model that failed when its file has changed, or after a while. One that the folder's watcher
    /// served is loaded only after a while: the watcher handles a change or a loss of its file.
    async fn again(
        self: Arc<Self>,
        failure: Failure,
        watched: Option<WatchedLoad>,
        config: Arc<Config>,
        mut pause: Duration,
    ) {
        let Failure {
            name,
            source,
            mut reason,
        } = failure;
        loop {
            let changed = wait_for_change(&name, &source, &config, pause).await;
            let loaded = match &watched {
                None => self.load_again(&name, &source, None, &config).await,
                Some(load) => {
                    let _one = self.local.lock().await;
                    if self.lock().watched.took_over(Some(load)) {
                        return;
                    }
                    if changed {
                        continue;
                    }
                    let load = watched.clone();
                    self.load_again(&name, &source, load, &config).await
                }
            };
            let (failed, done) = match loaded {
                Ok(()) => {
                    tracing::info!(model = name, "the model is served now");
                    (None, true)
                }
                // Another task loaded it.
                Err(WorkerError::SameName { .. }) if matches!(source, Source::At(_)) => {
                    (None, true)
                }
                Err(error) => (Some(error.to_string()), false),
            };
            {
                let state = self.lock();
                if state.watched.took_over(watched.as_ref()) {
                    return;
                }
                self.host.set_failed(&name, failed.clone());
            }
            self.show();
            if done {
                return;
            }
            if let Some(text) = failed.filter(|text| *text != reason) {
                tracing::error!(model = name, error = text, "model still not served");
                reason = text;
            }
            pause = (pause * 2).min(READ_AGAIN);
        }
    }

    async fn load_again(
        self: &Arc<Self>,
        name: &str,
        source: &Source,
        watched: Option<WatchedLoad>,
        config: &Arc<Config>,
    ) -> Result<(), WorkerError> {
        if let Source::Store(name) = source {
            return self.whole(name, config).await;
        }
        let (loading, host, config) = (self.clone(), self.host.clone(), config.clone());
        let (name, source) = (name.to_owned(), source.clone());
        let load = move || {
            let path = match &source {
                Source::Shard => {
                    host.rings().add_file(&name)?;
                    host.look_at_shards();
                    return Ok(());
                }
                Source::At(path) => path.clone(),
                Source::Named | Source::Store(_) => path_of(&name, &config)?,
            };
            let called = matches!(source, Source::At(_)).then_some(&*name);
            let loaded = ServedModel::load(&path, called, None, &config, Some(host.templates()))?;
            let state = loading.lock();
            match state.watched.took_over(watched.as_ref()) {
                true => Ok(()),
                false => host.add(loaded),
            }
        };
        let loaded = tokio::task::spawn_blocking(load).await;
        loaded.map_err(|error| WorkerError::Internal(error.to_string()))?
    }

    async fn load(self: Arc<Self>, name: String, config: Arc<Config>, in_parts: bool) {
        let mut told = String::new();
        let mut pause = TRY_AGAIN;
        let mut looks = self.looks.subscribe();
        loop {
            let started = Instant::now();
            let loaded = match in_parts {
                true => self.offer(&name).await,
                false => self.whole(&name, &config).await,
            };
            match loaded {
                Ok(()) => {
                    tracing::info!(
                        model = name,
                        seconds = started.elapsed().as_secs_f64(),
                        "the model came from elsewhere and is loaded"
                    );
                    self.lock().pending.remove(&name);
                    self.show();
                    return;
                }
                Err(error) => {
                    let text = error.to_string();
                    if text != told {
                        tracing::error!(
                            model = name,
                            error = text,
                            "model not loaded, trying again"
                        );
                        told.clone_from(&text);
                    }
                    self.lock().pending.insert(name.clone(), Some(text));
                    self.show();
                    tokio::select! {
                        () = tokio::time::sleep(pause) => {}
                        Ok(()) = looks.changed() => {}
                    }
                    pause = (pause * 2).min(TRY_LATER);
                }
            }
        }
    }

    /// Fetches a model and serves it whole.
    async fn whole(&self, name: &str, config: &Arc<Config>) -> Result<(), WorkerError> {
        let models = self.host.stored();
        let failed = |reason: String| WorkerError::Fetch {
            name: name.to_owned(),
            reason,
        };
        let held = models.obtain(name).await.map_err(failed)?;
        models.fetch_all(&held).await.map_err(failed)?;
        let pin = models.pin(&held);
        let path = models.path(&held).await.map_err(failed)?;
        let (config, host, asked) = (config.clone(), self.host.clone(), name.to_owned());
        let loaded = tokio::task::spawn_blocking(move || {
            let (name, fingerprint) = (held.served_as(&asked), held.file_fingerprint());
            let templates = Some(host.templates());
            ServedModel::load(&path, Some(&name), Some(&fingerprint), &config, templates)
        });
        let loaded = loaded
            .await
            .map_err(|error| WorkerError::Internal(error.to_string()))??;
        let source = Source::Store(name.to_owned());
        self.host.add(loaded.pinned(pin).from(source))
    }

    /// Fetches the pieces that planning with a model needs, and offers its layers. The layers are fetched
    /// when the head gives some to this worker.
    async fn offer(&self, name: &str) -> Result<(), WorkerError> {
        let models = self.host.stored();
        let failed = |reason: String| WorkerError::Fetch {
            name: name.to_owned(),
            reason,
        };
        let held = models.obtain(name).await.map_err(failed)?;
        models.fetch_headers(&held).await.map_err(failed)?;
        let path = models.path(&held).await.map_err(failed)?;
        let (host, asked) = (self.host.clone(), name.to_owned());
        let added = tokio::task::spawn_blocking(move || {
            let name = held.served_as(&asked);
            host.rings().add(&name, &path, &held)?;
            host.look_at_shards();
            Ok(())
        });
        added
            .await
            .map_err(|error| WorkerError::Internal(error.to_string()))?
    }

    /// Serves the models in the folder, and withdraws those that vanish from it.
    async fn watch_folder(self: Arc<Self>, folder: PathBuf, config: Arc<Config>) {
        let host = &self.host;
        let everybody = |found: std::fs::Metadata| found.permissions().mode() & 0o1002 == 0o002;
        if std::fs::metadata(&folder).is_ok_and(everybody) {
            tracing::warn!(
                folder = %folder.display(),
                "everybody on this machine can put models there and take others away, and they are served: `chmod o-w` it"
            );
        }
        let mut looks = self.looks.subscribe();
        // By path: the stamp at the last look, and the name that it is served by.
        let mut known: BTreeMap<PathBuf, (Stamp, Option<String>)> = BTreeMap::new();
        let mut refused: BTreeMap<PathBuf, Stamp> = BTreeMap::new();
        let named: Vec<PathBuf> = config
            .models
            .iter()
            .chain(&config.ring.models)
            .filter_map(|name| {
                let encoder = mesh_model::encoder::find(name, &config.folders());
                encoder.or_else(|| local::resolve(name, &config.folders()).ok())
            })
            .collect();
        let mut complaint = String::new();
        loop {
            let listed = {
                let folder = folder.clone();
                tokio::task::spawn_blocking(move || local::list(&[folder])).await
            };
            let models = match listed {
                Ok(Ok(models)) => models,
                Ok(Err(error)) => {
                    let text = error.to_string();
                    if text != complaint {
                        tracing::warn!(
                            error = text,
                            "the folder of local models cannot be watched"
                        );
                        complaint = text;
                    }
                    tokio::time::sleep(WATCH).await;
                    continue;
                }
                Err(_) => return,
            };
            let mut seen = BTreeMap::new();
            for model in models {
                // Models that the configuration names are there already.
                if named.contains(&model.path) {
                    continue;
                }
                let changed = std::fs::metadata(&model.path).and_then(|found| found.modified());
                let stamp = (model.bytes, changed.ok());
                let before = known.get(&model.path).cloned();
                let (settled, served) = match before {
                    Some((old, served)) => (old == stamp, served),
                    None => (false, None),
                };
                let served = match served {
                    Some(name) if settled => Some(name),
                    Some(name) => {
                        tracing::info!(model = name, "a local model changed, it is loaded anew");
                        self.withdraw(&model.path, &name);
                        // An earlier problem was the old file's.
                        host.set_failed(&name, None);
                        self.show();
                        None
                    }
                    None if settled && refused.get(&model.path) != Some(&stamp) => {
                        let _one = self.local.lock().await;
                        let appeared = self.appear(&model, &config).await;
                        let served = match appeared {
                            Ok(name) => {
                                host.set_failed(&name, None);
                                Some(name)
                            }
                            Err(error) => {
                                tracing::error!(path = %model.path.display(), %error, "local model not served");
                                host.set_failed(&model.name, Some(error.to_string()));
                                refused.insert(model.path.clone(), stamp);
                                None
                            }
                        };
                        self.show();
                        served
                    }
                    None => None,
                };
                seen.insert(model.path, (stamp, served));
            }
            for (path, (_, served)) in known {
                if !seen.contains_key(&path)
                    && let Some(name) = served
                {
                    tracing::info!(model = name, "a local model is gone");
                    self.withdraw(&path, &name);
                    // Of one whose engine had died.
                    host.set_failed(&name, None);
                    self.show();
                }
            }
            refused.retain(|path, _| {
                let there = seen.contains_key(path);
                if !there {
                    host.set_failed(&mesh_model::model::model_name(path), None);
                    self.show();
                }
                there
            });
            known = seen;
            tokio::select! {
                () = tokio::time::sleep(WATCH) => {}
                Ok(()) = looks.changed() => refused.clear(),
            }
        }
    }

    async fn appear(
        &self,
        model: &local::LocalModel,
        config: &Arc<Config>,
    ) -> Result<String, WorkerError> {
        let refuse = |reason: String| WorkerError::Fetch {
            name: model.name.clone(),
            reason,
        };
        if let Some(free) = Memory::read(Path::new("/")).available
            && model.bytes.saturating_mul(5) / 4 > free
        {
            return Err(refuse(format!(
                "it takes {} bytes and more, and {free} bytes of memory are free",
                model.bytes
            )));
        }
        let (path, name, config) = (model.path.clone(), model.name.clone(), config.clone());
        let (called, templates) = (name.clone(), self.host.clone());
        let loaded = tokio::task::spawn_blocking(move || {
            let templates = Some(templates.templates());
            ServedModel::load(&path, Some(&called), None, &config, templates)
        });
        let loaded = loaded
            .await
            .map_err(|error| WorkerError::Internal(error.to_string()))??;
        {
            let mut state = self.lock();
            self.host.add(loaded)?;
            state.watched.appeared(&model.path);
        }
        tracing::info!(model = name, "a local model appeared and is served");
        let (host, path, called) = (self.host.clone(), model.path.clone(), name.clone());
        tokio::spawn(async move { host.stored().adopt(&called, &path).await });
        Ok(name)
    }

    /// Takes a model of the folder out of service; requests that run on it finish.
    fn withdraw(&self, path: &Path, name: &str) {
        let mut state = self.lock();
        state.watched.vanished(path);
        if let Some(removed) = self.host.remove(name) {
            tokio::spawn(async move { removed.engine.drain().await });
        }
    }

    /// Keeps the shown state of pending models up to date until none is left.
    async fn tell(self: Arc<Self>) {
        while !self.lock().pending.is_empty() {
            self.show();
            tokio::time::sleep(SHOW).await;
        }
    }

    fn show(&self) {
        let state = self.lock();
        let failed = self.host.failed();
        let mut failed: Vec<String> = failed
            .iter()
            .map(|(name, reason)| format!("{name} is not served: {reason}"))
            .collect();
        self.health
            .set_note((!failed.is_empty()).then(|| failed.join("; ")));
        if !state.linked {
            return;
        }
        if state.pending.is_empty() && (failed.is_empty() || self.host.serves()) {
            self.health.set_ready();
            if !failed.is_empty() {
                notify::status(&failed.join("; "));
            }
            return;
        }
        let mut texts = vec![self.host.stored().lacking()];
        for (name, error) in &state.pending {
            match error {
                Some(error) => texts.push(error.clone()),
                None => texts.push(format!("{name} is not loaded yet")),
            }
        }
        texts.append(&mut failed);
        texts.retain(|text| !text.is_empty());
        let text = texts.join("; ");
        notify::status(&text);
        self.health.set_unready(text);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Size and time of change of a file: equal stamps mean the same content, no longer written to.
type Stamp = (u64, Option<SystemTime>);

/// The file or folder that a name in the configuration means.
fn path_of(name: &str, config: &Config) -> Result<PathBuf, WorkerError> {
    let folders = config.folders();
    match mesh_model::encoder::find(name, &folders) {
        Some(folder) => Ok(folder),
        None => Ok(local::resolve(name, &folders)?),
    }
}

/// Metadata that shows that something at a path changed.
async fn look(name: &str, source: &Source, config: &Arc<Config>) -> Option<Stamp> {
    let (name, source, config) = (name.to_owned(), source.clone(), config.clone());
    let look = move || {
        let path = match source {
            Source::At(path) => path,
            _ => path_of(&name, &config).ok()?,
        };
        let changed = std::fs::metadata(&path).and_then(|found| found.modified());
        Some((local::look_at(path)?.bytes, changed.ok()))
    };
    tokio::task::spawn_blocking(look).await.ok().flatten()
}

/// Returns when the file at the model's path has changed and is no longer written to, or when time is up;
/// true if the file is another one than before.
async fn wait_for_change(
    name: &str,
    source: &Source,
    config: &Arc<Config>,
    pause: Duration,
) -> bool {
    let until = Instant::now() + pause;
    let first = look(name, source, config).await;
    let mut last = first;
    while Instant::now() < until {
        tokio::time::sleep(WATCH).await;
        let now = look(name, source, config).await;
        if now != first && now == last && now.is_some() {
            return true;
        }
        last = now;
    }
    last != first
}

/// Interval between attempts: a model may load once another has ended, or a disk was cleared.
const TRY_AGAIN: Duration = Duration::from_secs(5);
const TRY_LATER: Duration = Duration::from_secs(300);
/// A file that does not change is read again at most so often: to read tens of gigabytes keeps a disk busy
/// for minutes.
const READ_AGAIN: Duration = Duration::from_secs(1800);
const SHOW: Duration = Duration::from_millis(250);
/// A look at a folder costs next to nothing, and works on every file system.
const WATCH: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_that_the_watcher_took_over_is_not_loaded_by_others() {
        let mut watched = Watched::default();
        let path = PathBuf::from("/models/a.gguf");
        let source = Source::At(path.clone());
        // Such as one that the configuration names.
        assert_eq!(watched.load_of(&source), None);
        assert!(!watched.took_over(None));

        watched.appeared(&path);
        assert_eq!(watched.load_of(&Source::Named), None);
        let load = watched.load_of(&source);
        assert!(load.is_some() && !watched.took_over(load.as_ref()));
        watched.vanished(&path);
        assert!(watched.took_over(load.as_ref()));
        // Loaded again: it is another one.
        watched.appeared(&path);
        assert!(watched.took_over(load.as_ref()));
        assert!(!watched.took_over(watched.load_of(&source).as_ref()));
    }

    #[tokio::test]
    async fn a_wait_tells_whether_the_file_changed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.gguf");
        let config = Arc::new(Config::default());
        let wait = |path: &Path, pause| {
            let (source, config) = (Source::At(path.into()), config.clone());
            tokio::spawn(async move { wait_for_change("a", &source, &config, pause).await })
        };
        std::fs::write(&path, "as it was").unwrap();
        let (same, long) = (Duration::from_millis(10), Duration::from_secs(60));
        assert!(!wait(&path, same).await.unwrap());

        let begun = Instant::now();
        let changes = wait(&path, long);
        tokio::time::sleep(Duration::from_secs(1)).await;
        std::fs::write(&path, "damaged").unwrap();
        assert!(changes.await.unwrap() && begun.elapsed() < long);

        // It may come back until time is up.
        let vanishes = wait(&path, Duration::from_secs(3));
        tokio::time::sleep(Duration::from_secs(1)).await;
        std::fs::remove_file(&path).unwrap();
        assert!(vanishes.await.unwrap());
    }
}
