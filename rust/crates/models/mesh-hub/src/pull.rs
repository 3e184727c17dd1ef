//! Fetching a model, or some layers of it, from the hub into the store.

mod files;
mod known;
mod pulled;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use mesh_model::hf::INDEX;
use mesh_store::{
    Begun, Layout, PartialFile, PartialKey, RangeSet, SignedManifest, Store, StoreError,
};

use crate::blocking::blocking;
use crate::cache;
use crate::choose::{Chosen, choose};
use crate::client::{Hub, Subject};
use crate::error::HubError;
use crate::listing::{Repo, RepoFile};
use crate::name::HubName;
use crate::partial;
use crate::watch::Watch;
pub(crate) use files::git_blob_id;
use files::{FileState, Flusher, Held, complete, copy, partials};
use known::{find, manifest_of};
pub use pulled::Pulled;

/// Options of [`pull`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PullOptions {
    /// Fetches only the files' ranges for a stage of these layers; `None` fetches the whole model.
    pub layers: Option<Range<u32>>,
}

/// Interval of checks whether another process has fetched a file.
const BUSY_PAUSE: Duration = Duration::from_millis(200);
/// Longest list of shards that is read.
const MAX_INDEX: usize = 32 << 20;
/// Maximum length of a file without a SHA-256; the hub has such digests for large ones.
const MAX_SMALL: u64 = 256 << 20;

/// Fetches the model `name` into `store`. Present files stay, partial ones are continued, and several
/// processes may do this at once. Once all files are complete and checked, the store knows the model by its
/// name on the hub, with its source.
///
/// # Errors
/// If the hub refuses, there is no room, or the disk fails. Everything that arrived is kept.
pub async fn pull(
    hub: &Hub,
    store: &Store,
    name: &HubName,
    options: &PullOptions,
    watch: Arc<dyn Watch>,
) -> Result<Pulled, HubError> {
    if hub.settings().offline
        && let Some(known) = find(store, name.to_string(), None).await?
    {
        // Without the hub, the commit of a branch cannot be determined.
        return Ok(known);
    }
    let repo = hub.open(&name.repo, name.revision(), &*watch).await?;
    let chosen = chosen(hub, &repo, name, &*watch).await?;
    // Files that are whole are of no model until all are.
    let at = store.clone();
    let _work = blocking(move || at.work()).await?;
    let mut pull = Pull {
        hub,
        store,
        source: hub.source(&repo),
        label: name.to_string(),
        repo,
        chosen,
        ranges: BTreeMap::new(),
        watch,
        fetched: 0,
    };
    match &options.layers {
        None => pull.whole().await,
        Some(layers) => pull.some(layers.clone()).await,
    }
}

/// The files that `name` means, with their lengths.
pub(crate) async fn chosen(
    hub: &Hub,
    repo: &Repo,
    name: &HubName,
    watch: &dyn Watch,
) -> Result<Chosen, HubError> {
    let index = match repo.file(INDEX) {
        Some(file) if name.which.is_none() => Some(small_file(hub, repo, file, watch).await?),
        _ => None,
    };
    let mut chosen = choose(repo, name.which.as_deref(), index.as_deref())?;
    for file in chosen.weights.iter_mut().chain(&mut chosen.others) {
        *file = hub.complete(repo, file, watch).await?;
    }
    Ok(chosen)
}

async fn small_file(
    hub: &Hub,
    repo: &Repo,
    file: &RepoFile,
    watch: &dyn Watch,
) -> Result<Vec<u8>, HubError> {
    let is_small = file.bytes.is_some_and(|bytes| bytes <= MAX_INDEX as u64);
    if is_small && let Some(path) = cache::file(hub.settings(), repo, file) {
        return std::fs::read(&path).map_err(|source| HubError::Read { path, source });
    }
    if hub.settings().offline {
        return Err(HubError::Offline {
            what: format!("{} of {}", file.path, repo.id),
        });
    }
    let subject = Subject::file(&repo.id, &repo.commit, file);
    let url = hub.file_url(repo, file);
    Ok(hub.get_all(&url, subject, MAX_INDEX, watch).await?.into())
}

struct Pull<'a> {
    hub: &'a Hub,
    store: &'a Store,
    /// URL of the repository's page at its commit, which the store records as the model's source.
    source: String,
    /// The name that was asked for.
    label: String,
    repo: Repo,
    chosen: Chosen,
    /// The ranges that are wanted of files, by their paths; of all others, everything is.
    ranges: BTreeMap<String, RangeSet>,
    watch: Arc<dyn Watch>,
    fetched: u64,
}

impl Pull<'_> {
    async fn whole(&mut self) -> Result<Pulled, HubError> {
        let files: Vec<RepoFile> = self.chosen.files().cloned().collect();
        let Some(held) = self.begin(&files).await? else {
            return self.now_known().await;
        };
        self.fetch(&files, &held).await?;
        let paths = self.finish(&files, held).await?;
        self.register(paths).await
    }

    async fn some(&mut self, layers: Range<u32>) -> Result<Pulled, HubError> {
        if let Some(known) = self.known().await? {
            return self.holds(known, &layers);
        }
        let weights = self.chosen.weights.clone();
        let Some((layouts, have)) = self.layouts(&weights).await? else {
            return self.holds(self.now_known().await?, &layers);
        };
        let (ranges, total) = partial::wanted_ranges(&layouts, layers.clone())
            .map_err(|reason| self.unfit(reason))?;
        // What is here of other layers stays.
        let kept = |(ranges, have): (RangeSet, RangeSet)| -> RangeSet {
            ranges.iter().chain(have.iter()).collect()
        };
        let ranges = ranges.into_iter().zip(have).map(kept);
        let paths = weights.iter().map(|file| file.path.clone());
        self.ranges = paths.zip(ranges).collect();
        let files: Vec<RepoFile> = self.chosen.files().cloned().collect();
        let bytes = files.iter().map(bytes).sum();
        let Some(held) = self.begin(&files).await? else {
            return self.holds(self.now_known().await?, &layers);
        };
        self.fetch(&files, &held).await?;
        self.check_pieces(&held).await?;
        let mut here: BTreeMap<PartialKey, u64> = BTreeMap::new();
        for file in &files {
            let key = self.key(file);
            let partial = held[&key].partial();
            let bytes = partial.map_or(self.wanted(file), |partial| partial.have().bytes());
            here.insert(key, bytes);
        }
        Ok(Pulled {
            bytes,
            present: here.into_values().sum(),
            layers: total,
            ..self.pulled()
        })
    }

    fn wanted(&self, file: &RepoFile) -> u64 {
        let ranges = self.ranges.get(&file.path);
        ranges.map_or_else(|| bytes(file), RangeSet::bytes)
    }

    fn missing(&self, file: &RepoFile, partial: &PartialFile) -> Vec<Range<u64>> {
        let Some(ranges) = self.ranges.get(&file.path) else {
            return partial.missing();
        };
        let have = partial.have();
        ranges
            .iter()
            .flat_map(|range| have.missing(range))
            .collect()
    }

    /// The model that another process has brought.
    async fn now_known(&self) -> Result<Pulled, HubError> {
        self.known().await?.ok_or_else(|| HubError::Changed {
            repo: self.repo.id.clone(),
            path: self.chosen.name.clone(),
            reason: "another process removed it just now".to_owned(),
        })
    }

    /// A whole model, of which only some layers were asked for.
    fn holds(&self, known: Pulled, layers: &Range<u32>) -> Result<Pulled, HubError> {
        match partial::check_layers(layers, known.layers) {
            Ok(()) => Ok(known),
            Err(reason) => Err(self.unfit(reason)),
        }
    }

    fn unfit(&self, reason: String) -> HubError {
        HubError::Choice {
            repo: self.repo.id.clone(),
            reason,
        }
    }

    fn pulled(&self) -> Pulled {
        Pulled {
            name: self.chosen.name.clone(),
            repo: self.repo.id.clone(),
            commit: self.repo.commit.clone(),
            fingerprint: None,
            path: None,
            bytes: 0,
            present: 0,
            fetched: self.fetched,
            layers: 0,
        }
    }

    fn key(&self, file: &RepoFile) -> PartialKey {
        match file.sha256 {
            Some(sha256) => PartialKey::Blob(sha256),
            None => PartialKey::source(&format!("{}/{}", self.source, file.path)),
        }
    }

    /// The model, if the store has all of it from this very commit.
    async fn known(&self) -> Result<Option<Pulled>, HubError> {
        let known = find(self.store, self.label.clone(), Some(self.source.clone())).await?;
        Ok(known.map(|known| Pulled {
            fetched: self.fetched,
            ..known
        }))
    }

    /// Opens all files in the store, each for this process alone, and reserves room for them; waits where
    /// other processes write to them. `None` if the model was completed by another process.
    async fn begin(&self, files: &[RepoFile]) -> Result<Option<Held>, HubError> {
        let mut held = Held::new();
        // In one order everywhere, so that two processes do not wait for each other.
        let by_key: BTreeMap<PartialKey, &RepoFile> =
            files.iter().map(|file| (self.key(file), file)).collect();
        let mut waited = true;
        for (&key, file) in &by_key {
            let (bytes, share) = (bytes(file), self.wanted(file));
            if matches!(key, PartialKey::Source(_)) && bytes > MAX_SMALL {
                return Err(self.unfit(format!(
                    "the hub tells no SHA-256 of {}, which has {bytes} bytes",
                    file.path
                )));
            }
            let begun = loop {
                // The process that wrote the file may have completed the model.
                if std::mem::take(&mut waited) && self.known().await?.is_some() {
                    return Ok(None);
                }
                let store = self.store.clone();
                match blocking(move || store.begin(key, bytes, share)).await {
                    Err(StoreError::Busy { .. }) => {
                        let reason = format!("another process is fetching {}", file.path);
                        self.watch.waiting(&reason, BUSY_PAUSE);
                        tokio::time::sleep(BUSY_PAUSE).await;
                        waited = true;
                    }
                    Err(StoreError::NoRoom(one)) => {
                        let here = |key: &PartialKey, file: &RepoFile| match held.get(key) {
                            Some(FileState::Partial(partial)) => partial.have().bytes(),
                            Some(FileState::Whole(_)) => u64::MAX,
                            None if is_blob(self.store, file) => u64::MAX,
                            None => 0,
                        };
                        let missing = by_key
                            .iter()
                            .map(|(key, file)| self.wanted(file).saturating_sub(here(key, file)));
                        let all = missing.sum();
                        return Err(self.no_room(held, all, StoreError::NoRoom(one)).await);
                    }
                    begun => break begun?,
                }
            };
            let begun = match begun {
                Begun::Whole(path) => FileState::Whole(path),
                Begun::Partial(partial) => FileState::Partial(Arc::new(partial)),
            };
            held.insert(key, begun);
        }
        Ok(Some(held))
    }

    /// Removes files that were begun in vain, and computes the room that is missing for all of them.
    async fn no_room(&self, held: Held, all: u64, one: StoreError) -> HubError {
        let store = self.store.clone();
        let ended = blocking(move || {
            for held in held.into_values() {
                if let FileState::Partial(partial) = held
                    && let Ok(partial) = Arc::try_unwrap(partial)
                    && partial.have().is_empty()
                {
                    partial.discard()?;
                }
            }
            store.admit(all)
        });
        ended.await.err().unwrap_or(one).into()
    }

    /// Layouts of these files and the ranges of them that are present; fetches the headers of files that are
    /// missing. `None` if another process has fetched the model meanwhile.
    async fn layouts(
        &mut self,
        weights: &[RepoFile],
    ) -> Result<Option<(Vec<Layout>, Vec<RangeSet>)>, HubError> {
        // A header's length is not known before it is there; a few megabytes are what most have.
        let guess = |file: &RepoFile| RangeSet::whole(bytes(file).min(8 << 20));
        let guesses = weights.iter().map(|file| (file.path.clone(), guess(file)));
        self.ranges = guesses.collect();
        let Some(held) = self.begin(weights).await? else {
            return Ok(None);
        };
        let mut layouts = Vec::with_capacity(weights.len());
        let mut have = Vec::with_capacity(weights.len());
        let flusher = Flusher::start(&held);
        for file in weights {
            let layout = match &held[&self.key(file)] {
                FileState::Whole(path) => {
                    have.push(RangeSet::whole(bytes(file)));
                    let (path, name) = (path.clone(), file.path.clone());
                    blocking(move || partial::layout_of(&path, &name))
                        .await?
                        .map_err(|reason| HubError::header(&self.repo.id, &file.path, reason))?
                }
                FileState::Partial(partial) => {
                    let before = partial.have().bytes();
                    let layout =
                        partial::header(self.hub, &self.repo, file, partial, &self.watch).await;
                    self.fetched += partial.have().bytes() - before;
                    have.push(partial.have());
                    layout?
                }
            };
            layouts.push(layout);
        }
        flusher.end().await?;
        Ok(Some((layouts, have)))
    }

    /// Fetches what is missing of these files.
    async fn fetch(&mut self, files: &[RepoFile], held: &Held) -> Result<(), HubError> {
        let flusher = Flusher::start(held);
        let have = |held: &Held| -> u64 {
            let partials = partials(held).into_iter();
            partials.map(|partial| partial.have().bytes()).sum()
        };
        let before = have(held);
        // Two files with the same bytes are one.
        let mut begun = BTreeSet::new();
        let mut fetches = Vec::new();
        let (mut all, mut to_come) = (0, 0);
        for file in files {
            let key = self.key(file);
            if !begun.insert(key) {
                continue;
            }
            all += self.wanted(file);
            if let Some(partial) = held[&key].partial() {
                let ranges = self.missing(file, partial);
                let lengths = ranges.iter().map(|range| range.end - range.start);
                to_come += lengths.sum::<u64>();
                fetches.push(self.fetch_one(file, partial.clone(), ranges));
            }
        }
        self.watch.planned(to_come, all - to_come);
        let fetched = futures::future::try_join_all(fetches).await;
        // Also after an error: what has arrived is kept.
        let flushed = flusher.end().await;
        self.fetched += have(held) - before;
        fetched?;
        flushed
    }

    async fn fetch_one(
        &self,
        file: &RepoFile,
        partial: Arc<PartialFile>,
        ranges: Vec<Range<u64>>,
    ) -> Result<(), HubError> {
        if ranges.is_empty() {
            return Ok(());
        }
        if let Some(path) = cache::file(self.hub.settings(), &self.repo, file) {
            tracing::debug!(path = %path.display(), "a file is taken from the hub's cache on this machine");
            let watch = self.watch.clone();
            return blocking(move || copy(&path, &partial, &ranges, &*watch)).await;
        }
        let (hub, watch) = (self.hub, self.watch.clone());
        hub.fetch(&self.repo, file, ranges, partial, watch).await
    }

    /// Checks complete files and makes blobs of them; returns the path of each file of the model.
    async fn finish(
        &self,
        files: &[RepoFile],
        mut held: Held,
    ) -> Result<Vec<(PathBuf, PathBuf)>, HubError> {
        let mut blobs: BTreeMap<PartialKey, PathBuf> = BTreeMap::new();
        // Those without a SHA-256 last: until then they are found by where they come from, if this is ended
        // here.
        for file in files {
            let key = self.key(file);
            let path = match held.remove(&key) {
                None => continue,
                Some(FileState::Whole(path)) => path,
                Some(FileState::Partial(partial)) => {
                    let (store, file, repo) =
                        (self.store.clone(), file.clone(), self.repo.id.clone());
                    blocking(move || complete(&store, partial, &file, &repo)).await?
                }
            };
            blobs.insert(key, path);
        }
        let path_of = |file: &RepoFile| ((&file.path).into(), blobs[&self.key(file)].clone());
        Ok(files.iter().map(path_of).collect())
    }

    /// Makes the manifest, and has the store know the model.
    async fn register(&self, mut paths: Vec<(PathBuf, PathBuf)>) -> Result<Pulled, HubError> {
        // As they stand in a folder, so that the same model has the same fingerprint, wherever it is from.
        paths.sort();
        let bytes = self.chosen.files().map(bytes).sum();
        self.watch.checking(bytes);
        let (store, watch) = (self.store.clone(), self.watch.clone());
        let (name, label) = (self.chosen.name.clone(), self.label.clone());
        let source = self.source.clone();
        let (fingerprint, path, layers) = blocking(move || {
            let manifest = manifest_of(&name, &paths, &*watch)?;
            let signed = SignedManifest::unsigned(manifest);
            let fingerprint = store.put_manifest(&signed)?;
            store.name(&label, &fingerprint, Some(&source))?;
            let path = signed.manifest.path_in(&store.folder(&fingerprint)?);
            Ok::<_, HubError>((fingerprint, path, signed.manifest.layers()))
        })
        .await?;
        Ok(Pulled {
            fingerprint: Some(fingerprint),
            path: Some(path),
            bytes,
            present: bytes,
            layers,
            ..self.pulled()
        })
    }

    /// Checks the pieces of partial files, where the store knows a manifest with their digests.
    async fn check_pieces(&self, held: &Held) -> Result<(), HubError> {
        let partials = partials(held);
        let (store, repo) = (self.store.clone(), self.repo.id.clone());
        blocking(move || {
            let models = store.models()?;
            let files = || models.iter().flat_map(|model| &model.signed.manifest.files);
            for partial in partials {
                let known = files().find(|file| PartialKey::Blob(file.sha256) == partial.key());
                if let Some(file) = known
                    && let [bad, ..] = partial.repair(file)?[..]
                {
                    return Err(HubError::Damaged {
                        repo,
                        path: file.path.clone(),
                        kind: "a piece's SHA-256",
                        found: format!("wrong in piece {bad}"),
                        wanted: file.pieces[bad as usize].sha256.to_string(),
                    });
                }
            }
            Ok(())
        })
        .await
    }
}

fn bytes(file: &RepoFile) -> u64 {
    file.bytes.expect("Hub::complete has filled it in")
}

fn is_blob(store: &Store, file: &RepoFile) -> bool {
    let blob = file.sha256.and_then(|sha256| store.blob(&sha256));
    blob.is_some()
}
