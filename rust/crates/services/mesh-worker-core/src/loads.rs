//! When models are loaded and taken out of service: those that come from elsewhere, those that failed and are
//! tried again, and those in the watched folder.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

/// The place that a model is loaded from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Location {
    /// The file or folder that a name in the configuration means. A loaded model has [`Location::At`] its
    /// path.
    Named,
    /// The same, offered in parts.
    NamedPart,
    /// This file or folder.
    At(PathBuf),
    /// The store, under a name; files come from elsewhere if need be.
    Store(String),
    /// The same, offered in parts; layers are fetched when the head gives some to this worker.
    StorePart(String),
}

/// A model that is not served because something is wrong with it.
#[derive(Debug, Clone)]
pub struct Failure {
    /// The model's name in the configuration, or the one that it was served under.
    pub name: String,
    /// Where to load it from again.
    pub location: Location,
    /// Cause, for people.
    pub reason: String,
}

/// The one of all assignments that an order is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LoadId {
    /// A model that comes from elsewhere, by its name; true if it is offered in parts.
    Awaited(String, bool),
    /// A model that failed.
    Retry(u64),
    /// A model of the watched folder.
    Local(PathBuf),
}

/// The order to load a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoadOrder {
    /// Comes back with the result.
    pub id: LoadId,
    /// The model's name in the configuration, or the one that it is served under.
    pub name: String,
    /// Where it lies.
    pub location: Location,
}

/// What is to be done next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LoadStep {
    /// Load this model; [`Loads::may_serve`] and [`Loads::loaded`] come after that.
    Load(LoadOrder),
    /// Take the model of this name out of service; requests that run on it finish.
    Unload(String),
    /// Let others have this file or folder.
    Share(String, PathBuf),
    /// Nothing before that time, or before something changes.
    Wait(Instant),
}

/// Reasons for which a model is not loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoadError {
    /// Cause, for people.
    pub text: String,
    /// A model of that name is served already.
    pub same_name: bool,
}

/// Size and time of change of a file: equal stamps mean the same content, no longer written to.
pub type Stamp = (u64, Option<SystemTime>);

/// A model in the watched folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalModel {
    /// File or folder.
    pub path: PathBuf,
    /// Name that it is served under.
    pub name: String,
    /// Size and time of change.
    pub stamp: Stamp,
}

/// What the disk shows now.
#[derive(Debug, Default)]
pub struct Sight {
    /// The files of [`Loads::watched_files`]; `None` for one that is not there.
    pub files: BTreeMap<u64, Option<Stamp>>,
    /// The models in the watched folder, or why it cannot be listed; `None` without such a folder.
    pub folder: Option<Result<Vec<LocalModel>, String>>,
    /// Free memory in bytes, if that is known.
    pub free_memory: Option<u64>,
}

/// How ready this worker is.
#[derive(Debug, PartialEq, Eq)]
pub struct Readiness {
    /// Faults, for people.
    pub note: Option<String>,
    /// Its state.
    pub state: ReadyState,
    /// Changes of the link so far: after each the state is to be shown again.
    pub links: u64,
}

/// Whether this worker is ready.
#[derive(Debug, PartialEq, Eq)]
pub enum ReadyState {
    /// It serves all that it should.
    Ready,
    /// It is not, for this reason.
    Lacks(String),
    /// There is no link to the head, or the worker drains: that says the reason.
    Elsewhere,
}

/// Models to load, and models that others replace or lose.
#[derive(Debug, Default)]
pub struct Loads {
    /// By name, and true for those that are offered in parts: a name may be both.
    awaited: BTreeMap<(String, bool), Awaited>,
    retries: BTreeMap<u64, Retry>,
    next_retry: u64,
    /// Models that are not served because something is wrong with them, each with the cause.
    faults: BTreeMap<String, String>,
    /// Number of deaths of each model's engine.
    deaths: BTreeMap<String, u32>,
    folder: Folder,
    /// A model of the watched folder is being loaded: one at a time.
    is_loading_local: bool,
    /// A look was asked for during that load: if it fails, it is tried again.
    local_again: bool,
    draining: bool,
    is_linked: bool,
    links: u64,
    queue: Vec<LoadStep>,
}

/// A model that comes from elsewhere.
#[derive(Debug)]
struct Awaited {
    /// Time of the next attempt; `None` while one is under way.
    due: Option<Instant>,
    began: Instant,
    pause: Duration,
    /// A look was asked for during an attempt.
    again: bool,
    obstacle: Option<String>,
}

/// A model that failed.
#[derive(Debug)]
struct Retry {
    name: String,
    location: Location,
    reason: String,
    /// The load of the watched folder's that failed. The folder handles a change or a loss of its file; the
    /// retry ends with that load.
    load: Option<(PathBuf, u64)>,
    pause: Duration,
    /// `None` while it is being loaded.
    wait: Option<Wait>,
}

/// A wait until a file has changed and is no longer written to, or until that time.
#[derive(Debug)]
struct Wait {
    until: Instant,
    first: Option<Option<Stamp>>,
    last: Option<Stamp>,
    changed: bool,
}

impl Wait {
    fn until(until: Instant) -> Option<Self> {
        Some(Wait {
            until,
            first: None,
            last: None,
            changed: false,
        })
    }
}

/// The folder whose models are served as they appear, and withdrawn when they vanish.
#[derive(Debug, Default)]
struct Folder {
    /// Models that the configuration names: they are there already.
    named: BTreeSet<PathBuf>,
    known: BTreeMap<PathBuf, Local>,
    /// Those that cannot be served as they are, each with its name.
    refused: BTreeMap<PathBuf, (String, Stamp)>,
    loads: u64,
    complaint: String,
}

#[derive(Debug)]
struct Local {
    name: String,
    stamp: Stamp,
    state: LocalState,
}

#[derive(Debug, PartialEq)]
enum LocalState {
    Seen,
    Loading,
    /// Served, by the load with this number.
    Served(u64),
}

impl Loads {
    /// Models that come from elsewhere, `whole` and in `parts`, and failures to try again. The watched folder
    /// leaves those alone that are `named`.
    pub fn new(
        whole: impl IntoIterator<Item = String>,
        parts: impl IntoIterator<Item = String>,
        failures: Vec<Failure>,
        named: impl IntoIterator<Item = PathBuf>,
        now: Instant,
    ) -> Self {
        let whole = whole.into_iter().map(|name| (name, false));
        let awaited = whole.chain(parts.into_iter().map(|name| (name, true)));
        let awaited = awaited.map(|key| {
            let awaited = Awaited {
                due: Some(now),
                began: now,
                pause: TRY_AGAIN,
                again: false,
                obstacle: None,
            };
            (key, awaited)
        });
        let mut loads = Loads {
            awaited: awaited.collect(),
            ..Loads::default()
        };
        loads.folder.named.extend(named);
        for failure in failures {
            loads.try_again(failure, None, TRY_AGAIN, now);
        }
        loads
    }

    /// What is to be done next.
    pub fn poll(&mut self, now: Instant) -> LoadStep {
        if !self.queue.is_empty() {
            return self.queue.remove(0);
        }
        if self.draining {
            return LoadStep::Wait(now + TRY_LATER);
        }
        if let Some(order) = self.due_awaited(now).or_else(|| self.due_retry(now)) {
            return LoadStep::Load(order);
        }
        let awaited = self.awaited.values().filter_map(|awaited| awaited.due);
        let retries = self.retries.values();
        let retries = retries.filter_map(|retry| Some(retry.wait.as_ref()?.until));
        // The end of the load before it is a change.
        let retries = retries.filter(|until| *until > now);
        LoadStep::Wait(awaited.chain(retries).min().unwrap_or(now + TRY_LATER))
    }

    fn due_awaited(&mut self, now: Instant) -> Option<LoadOrder> {
        let mut all = self.awaited.iter_mut();
        let ((name, in_parts), due) =
            all.find(|(_, awaited)| awaited.due.is_some_and(|due| due <= now))?;
        (due.due, due.began, due.again) = (None, now, false);
        Some(LoadOrder {
            id: LoadId::Awaited(name.clone(), *in_parts),
            name: name.clone(),
            location: match in_parts {
                true => Location::StorePart(name.clone()),
                false => Location::Store(name.clone()),
            },
        })
    }

    fn due_retry(&mut self, now: Instant) -> Option<LoadOrder> {
        let folder = &self.folder;
        // One that is being loaded ends with the result of that.
        self.retries
            .retain(|_, retry| retry.wait.is_none() || !folder.took_over(retry.load.as_ref()));
        for (id, retry) in &mut self.retries {
            let wait = retry.wait.as_ref();
            let Some(wait) = wait.filter(|wait| wait.changed || wait.until <= now) else {
                continue;
            };
            let changed = wait.changed || wait.first.is_some_and(|first| first != wait.last);
            if retry.load.is_some() && changed {
                // It is the folder's to load.
                retry.wait = Wait::until(now + retry.pause);
            } else if retry.load.is_none() || !self.is_loading_local {
                self.is_loading_local |= retry.load.is_some();
                retry.wait = None;
                return Some(LoadOrder {
                    id: LoadId::Retry(*id),
                    name: retry.name.clone(),
                    location: retry.location.clone(),
                });
            }
        }
        None
    }

    /// The models whose files are to be looked at, by number: each with its name and location.
    pub fn watched_files(&self) -> Vec<(u64, String, Location)> {
        let waiting = self.retries.iter().filter(|(_, retry)| {
            let of_store = matches!(retry.location, Location::Store(_) | Location::StorePart(_));
            retry.wait.is_some() && !of_store
        });
        let files = waiting.map(|(id, retry)| (*id, retry.name.clone(), retry.location.clone()));
        files.collect()
    }

    /// Takes in what the disk shows now.
    pub fn seen(&mut self, sight: Sight, now: Instant) {
        for (id, now_there) in sight.files {
            let retry = self.retries.get_mut(&id);
            if let Some(wait) = retry.and_then(|retry| retry.wait.as_mut()) {
                let before = *wait.first.get_or_insert(now_there);
                let is_settled = now_there.is_some() && now_there == wait.last;
                wait.changed |= is_settled && now_there != before;
                wait.last = now_there;
            }
        }
        match sight.folder {
            None => {}
            Some(Ok(models)) => self.folder_seen(models, sight.free_memory, now),
            Some(Err(error)) if error == self.folder.complaint => {}
            Some(Err(error)) => {
                tracing::warn!(error, "the folder of local models cannot be watched");
                self.folder.complaint = error;
            }
        }
    }

    fn folder_seen(&mut self, models: Vec<LocalModel>, free: Option<u64>, now: Instant) {
        let there: BTreeSet<PathBuf> = models.iter().map(|model| model.path.clone()).collect();
        for model in models {
            if !self.folder.named.contains(&model.path) {
                self.local_seen(model, free, now);
            }
        }
        let (queue, faults) = (&mut self.queue, &mut self.faults);
        self.folder.known.retain(|path, local| {
            let stays = there.contains(path) || local.state == LocalState::Loading;
            if !stays {
                if let LocalState::Served(_) = local.state {
                    tracing::info!(model = local.name, "a local model is gone");
                    queue.push(LoadStep::Unload(local.name.clone()));
                }
                // Of one whose engine had died, or that was refused before a reload.
                faults.remove(&local.name);
            }
            stays
        });
        self.folder.refused.retain(|path, (name, _)| {
            let stays = there.contains(path);
            if !stays {
                faults.remove(name);
            }
            stays
        });
    }

    fn local_seen(&mut self, model: LocalModel, free: Option<u64>, now: Instant) {
        let LocalModel { path, name, stamp } = model;
        let Some(local) = self.folder.known.get_mut(&path) else {
            let state = LocalState::Seen;
            let local = Local { name, stamp, state };
            self.folder.known.insert(path, local);
            return;
        };
        let settled = local.stamp == stamp;
        match local.state {
            LocalState::Loading => {}
            LocalState::Served(_) if settled => {}
            LocalState::Served(_) => {
                tracing::info!(
                    model = local.name,
                    "a local model changed, it is loaded anew"
                );
                (local.state, local.stamp) = (LocalState::Seen, stamp);
                self.queue.push(LoadStep::Unload(local.name.clone()));
                // An earlier problem was the old file's.
                self.faults.remove(&local.name);
            }
            LocalState::Seen if !settled => local.stamp = stamp,
            LocalState::Seen => {
                let refused = self.folder.refused.get(&path);
                let refused = refused.is_some_and(|(_, refused)| *refused == stamp);
                if refused || self.is_loading_local || self.draining {
                    return;
                }
                local.state = LocalState::Loading;
                (self.is_loading_local, self.local_again) = (true, false);
                let id = LoadId::Local(path.clone());
                let needed = stamp.0.saturating_mul(5) / 4;
                if let Some(free) = free.filter(|free| needed > *free) {
                    let text = format!(
                        "model {name}: it takes {} bytes and more, and {free} bytes of memory are free",
                        stamp.0
                    );
                    let same_name = false;
                    return self.loaded(&id, Err(LoadError { text, same_name }), now);
                }
                let location = Location::At(path);
                let order = LoadOrder { id, name, location };
                self.queue.push(LoadStep::Load(order));
            }
        }
    }

    /// True if a model that is loaded now may be served.
    pub fn may_serve(&self, id: &LoadId) -> bool {
        if self.draining {
            return false;
        }
        match id {
            LoadId::Awaited(..) | LoadId::Local(_) => true,
            LoadId::Retry(id) => {
                let retry = self.retries.get(id);
                retry.is_some_and(|retry| !self.folder.took_over(retry.load.as_ref()))
            }
        }
    }

    /// Result of [`LoadStep::Load`].
    pub fn loaded(&mut self, id: &LoadId, result: Result<(), LoadError>, now: Instant) {
        match id {
            LoadId::Awaited(name, in_parts) => {
                self.awaited_loaded(&(name.clone(), *in_parts), result, now);
            }
            LoadId::Retry(id) => self.retry_loaded(*id, result, now),
            LoadId::Local(path) => self.local_loaded(path, result),
        }
    }

    fn awaited_loaded(
        &mut self,
        key: &(String, bool),
        result: Result<(), LoadError>,
        now: Instant,
    ) {
        let Some(awaited) = self.awaited.get_mut(key) else {
            return;
        };
        let name = key.0.as_str();
        let Err(LoadError { text, .. }) = result else {
            let seconds = now.saturating_duration_since(awaited.began).as_secs_f64();
            tracing::info!(
                model = name,
                seconds,
                "the model came from elsewhere and is loaded"
            );
            self.awaited.remove(key);
            return;
        };
        if awaited.obstacle.as_ref() != Some(&text) {
            tracing::error!(model = name, error = text, "model not loaded, trying again");
        }
        awaited.obstacle = Some(text);
        awaited.due = Some(match awaited.again {
            true => now,
            false => now + awaited.pause,
        });
        awaited.pause = (awaited.pause * 2).min(TRY_LATER);
    }

    fn retry_loaded(&mut self, id: u64, result: Result<(), LoadError>, now: Instant) {
        let Some(mut retry) = self.retries.remove(&id) else {
            return;
        };
        self.is_loading_local &= retry.load.is_none();
        if self.folder.took_over(retry.load.as_ref()) {
            return;
        }
        let failed = match result {
            Ok(()) => {
                tracing::info!(model = retry.name, "the model is served now");
                None
            }
            // Loaded for another reason.
            Err(error) if error.same_name && matches!(retry.location, Location::At(_)) => None,
            Err(error) => Some(error.text),
        };
        let Some(text) = failed else {
            self.faults.remove(&retry.name);
            return;
        };
        self.faults.insert(retry.name.clone(), text.clone());
        if text != retry.reason {
            tracing::error!(model = retry.name, error = text, "model still not served");
            retry.reason = text;
        }
        retry.pause = (retry.pause * 2).min(READ_AGAIN);
        retry.wait = Wait::until(now + retry.pause);
        self.retries.insert(id, retry);
    }

    fn local_loaded(&mut self, path: &Path, result: Result<(), LoadError>) {
        self.is_loading_local = false;
        let Some(local) = self.folder.known.get_mut(path) else {
            return;
        };
        let name = local.name.clone();
        match result {
            Ok(()) => {
                tracing::info!(model = name, "a local model appeared and is served");
                self.folder.loads += 1;
                local.state = LocalState::Served(self.folder.loads);
                self.faults.remove(&name);
                self.queue.push(LoadStep::Share(name, path.to_owned()));
            }
            Err(LoadError { text, .. }) => {
                tracing::error!(path = %path.display(), error = text, "local model not served");
                local.state = LocalState::Seen;
                if !self.local_again {
                    let refused = (name.clone(), local.stamp);
                    self.folder.refused.insert(path.to_owned(), refused);
                }
                self.faults.insert(name, text);
            }
        }
    }

    /// The engine of a model died, and the model was taken out of service: it is loaded again later.
    pub fn died(&mut self, failure: Failure, now: Instant) {
        let (model, error) = (&failure.name, &failure.reason);
        tracing::error!(
            model,
            error,
            "model not served any more; it is loaded again"
        );
        let deaths = self.deaths.entry(failure.name.clone()).or_default();
        *deaths = (*deaths + 1).min(8);
        // An engine that dies each time must not keep the machine busy.
        let pause = (TRY_AGAIN * 2u32.pow(*deaths - 1)).min(TRY_LATER);
        let load = match &failure.location {
            Location::At(path) => self.folder.load_of(path),
            _ => None,
        };
        self.try_again(failure, load, pause, now);
    }

    fn try_again(
        &mut self,
        failure: Failure,
        load: Option<(PathBuf, u64)>,
        pause: Duration,
        now: Instant,
    ) {
        let (name, reason) = (failure.name, failure.reason);
        self.faults.insert(name.clone(), reason.clone());
        let retry = Retry {
            name,
            location: failure.location,
            reason,
            load,
            pause,
            wait: Wait::until(now + pause),
        };
        self.retries.insert(self.next_retry, retry);
        self.next_retry += 1;
    }

    /// Looks for models again now: in the folder, also for those in it that were refused, and for those that
    /// come from elsewhere, without waiting for the next attempt.
    pub fn look_again(&mut self, now: Instant) {
        self.folder.refused.clear();
        self.local_again |= self.is_loading_local;
        for awaited in self.awaited.values_mut() {
            awaited.again = true;
            awaited.due = awaited.due.map(|_| now);
        }
    }

    /// The worker drains: nothing more is loaded or served.
    pub fn drain(&mut self) {
        self.draining = true;
    }

    /// The link to the head is up or down. A worker without a head is linked.
    pub fn linked(&mut self, linked: bool) {
        self.is_linked = linked;
        self.links += 1;
    }

    /// True if models have yet to come from elsewhere.
    pub fn is_awaiting(&self) -> bool {
        !self.awaited.is_empty()
    }

    /// The models that are not served because something is wrong with them, each with the cause.
    pub fn faults(&self) -> &BTreeMap<String, String> {
        &self.faults
    }

    /// How ready the worker is. `serves` is whether it serves or offers anything, `lacking` what its downloads
    /// lack.
    pub fn readiness(&self, serves: bool, lacking: String) -> Readiness {
        let faults = self.faults.iter();
        let faults = faults.map(|(name, reason)| format!("{name} is not served: {reason}"));
        let mut faults: Vec<String> = faults.collect();
        let note = (!faults.is_empty()).then(|| faults.join("; "));
        let links = self.links;
        let state = |state| Readiness { note, state, links };
        if !self.is_linked || self.draining {
            return state(ReadyState::Elsewhere);
        }
        if self.awaited.is_empty() && (faults.is_empty() || serves) {
            return state(ReadyState::Ready);
        }
        let mut texts = vec![lacking];
        for ((name, _), awaited) in &self.awaited {
            let obstacle = awaited.obstacle.clone();
            texts.push(obstacle.unwrap_or_else(|| format!("{name} is not loaded yet")));
        }
        // A name that is awaited both whole and in parts.
        texts.dedup();
        texts.append(&mut faults);
        texts.retain(|text| !text.is_empty());
        state(ReadyState::Lacks(texts.join("; ")))
    }
}

impl Folder {
    /// The load that serves the model at this path, if it is one of the folder's.
    fn load_of(&self, path: &Path) -> Option<(PathBuf, u64)> {
        match self.known.get(path)?.state {
            LocalState::Served(load) => Some((path.to_owned(), load)),
            _ => None,
        }
    }

    /// True if that load was withdrawn: the folder does the rest of the work.
    fn took_over(&self, load: Option<&(PathBuf, u64)>) -> bool {
        load.is_some_and(|(path, _)| self.load_of(path).as_ref() != load)
    }
}

/// Interval between attempts: a model may load once another has ended, or a disk was cleared.
const TRY_AGAIN: Duration = Duration::from_secs(5);
const TRY_LATER: Duration = Duration::from_secs(300);
/// A file that does not change is read again at most so often: to read tens of gigabytes keeps a disk busy
/// for minutes.
const READ_AGAIN: Duration = Duration::from_secs(1800);

#[cfg(test)]
mod tests;
