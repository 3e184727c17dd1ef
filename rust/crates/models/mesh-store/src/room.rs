//! Admission of new files, eviction of models, and removal of leftovers.

use std::collections::{HashMap, HashSet};
use std::fs::TryLockError;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use mesh_model::file::open_regular;
use nix::sys::statvfs::statvfs;

use crate::digest::Digest;
use crate::error::{NoRoom, StoreError};
use crate::files;
use crate::manifest::Manifest;
use crate::partial::{HaveMap, PartialKey, have_path};
use crate::store::{Store, WORK};

pub use crate::store::Limits;

/// Files and models that [`Store::gc`] removed, or would remove.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GcReport {
    /// Entries in the order of removal.
    pub removed: Vec<Removed>,
    /// Bytes that the store occupies afterwards.
    pub used: u64,
}

/// A removed file or model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Removed {
    /// Description, for people.
    pub what: String,
    /// Fingerprint of the model; `None` for other files.
    pub model: Option<Digest>,
    /// Bytes that the removal frees.
    pub bytes: u64,
}

impl GcReport {
    /// Bytes that were freed.
    pub fn freed(&self) -> u64 {
        self.removed.iter().map(|removed| removed.bytes).sum()
    }
}

/// Minimum age of files without a model before their removal: a manifest for them may be about to be stored.
const LEFTOVER_AGE: Duration = Duration::from_secs(24 * 3600);

/// Partial files of no model: a download that broke off may be taken up again.
const PARTIAL_AGE: Duration = Duration::from_secs(7 * 24 * 3600);

/// Something that may go. The store's lock is held from the survey to the removal.
enum Victim<'a> {
    Leftover(&'a Path, &'static str),
    Model(&'a Digest, &'a Manifest),
}

/// The store's files and their uses.
#[derive(Default)]
struct Survey {
    /// Models by fingerprint, the least recently used first.
    models: Vec<(Digest, Manifest)>,
    /// Models that must stay.
    kept: HashSet<Digest>,
    uses: Uses,
    /// Files that no model needs.
    leftovers: Vec<(PathBuf, &'static str)>,
    /// Models whose manifest cannot be read, so that the files they need are unknown.
    damaged: HashSet<Digest>,
}

/// Number of models that have a file with this digest.
type Uses = HashMap<Digest, usize>;

impl Store {
    /// Makes room for `bytes` more, by evicting models that were not used for the longest time. Pinned ones
    /// and such as are being fetched stay. Room that running fetches were promised counts as taken. Nothing
    /// is evicted if it would not suffice.
    ///
    /// # Errors
    /// If there is not enough room.
    pub fn admit(&self, bytes: u64) -> Result<(), StoreError> {
        let _lock = self.lock()?;
        self.make_room(bytes, None)
    }

    /// Bytes that the store's files take on disk.
    ///
    /// # Errors
    /// If they cannot be listed.
    pub fn used(&self) -> Result<u64, StoreError> {
        let blobs = self.list("blobs")?;
        // Have-maps are bookkeeping.
        let mut partial = self.list("partial")?;
        partial.retain(|path| partial_key(path).is_some());
        let files = blobs.iter().chain(&partial);
        Ok(files.map(|path| files::allocated(path)).sum())
    }

    /// Removes a model: its manifest, names and links, and those of its files that no other model has. Gives
    /// the bytes that this frees. Of one whose manifest is damaged the files are not known; [`Store::gc`]
    /// removes those that are left over.
    ///
    /// # Errors
    /// If a process has it loaded or fetches it, the store does not have it, or the disk fails.
    pub fn remove(&self, fingerprint: &Digest) -> Result<u64, StoreError> {
        let _lock = self.lock()?;
        let mut survey = self.survey(SystemTime::now())?;
        if survey.damaged.contains(fingerprint) {
            // Its files are left over from then on.
            return match self.is_pinned(fingerprint)? {
                true => Err(StoreError::Pinned {
                    name: fingerprint.to_string(),
                }),
                false => self.remove_records(fingerprint).map(|()| 0),
            };
        }
        let found = survey.models.iter().find(|(known, _)| known == fingerprint);
        let (_, manifest) = found.ok_or(StoreError::NoModel {
            fingerprint: *fingerprint,
        })?;
        if survey.kept.contains(fingerprint) {
            return Err(StoreError::Pinned {
                name: manifest.name.clone(),
            });
        }
        let files = release(manifest, &mut survey.uses);
        let freed = files.iter().map(|digest| self.weight(digest)).sum();
        self.remove_model(fingerprint, &files)?;
        Ok(freed)
    }

    /// Removes leftovers of crashes, then models until the store has at most `limit` bytes (by default its
    /// own limit), the least recently used first. With `dry_run` nothing is removed.
    ///
    /// # Errors
    /// If the store cannot be listed, or the disk fails.
    pub fn gc(&self, limit: Option<u64>, dry_run: bool) -> Result<GcReport, StoreError> {
        let _lock = self.lock()?;
        let survey = self.survey(SystemTime::now())?;
        let mut uses = survey.uses.clone();
        let mut report = GcReport {
            used: self.used()?,
            ..GcReport::default()
        };
        let limit = limit.or(self.limits().bytes).unwrap_or(u64::MAX);
        for victim in self.victims(&survey) {
            if matches!(victim, Victim::Model(..)) && report.used <= limit {
                break;
            }
            self.evict(&victim, &mut uses, &mut report, dry_run)?;
        }
        Ok(report)
    }

    /// As [`Store::admit`]; the caller holds the lock. Room that was promised to `except` does not count.
    pub(crate) fn make_room(
        &self,
        needed: u64,
        except: Option<PartialKey>,
    ) -> Result<(), StoreError> {
        let promised = self.promised(except)?;
        let available = self.available(promised)?;
        if needed <= available {
            return Ok(());
        }
        let survey = self.survey(SystemTime::now())?;
        let victims = self.victims(&survey);

        // Plan first, so that no model is evicted in vain.
        let mut uses = survey.uses.clone();
        let mut freed = 0;
        let mut going = 0;
        while available + freed < needed && going < victims.len() {
            freed += self.release(&victims[going], &mut uses).0;
            going += 1;
        }
        if available + freed < needed {
            let by_disk = self.disk_available()?.saturating_sub(promised);
            return Err(StoreError::NoRoom(NoRoom {
                root: self.root().to_owned(),
                needed,
                available,
                evictable: freed,
                limit: self.limits().bytes.filter(|_| available < by_disk),
            }));
        }
        let (mut uses, mut report) = (survey.uses.clone(), GcReport::default());
        for victim in &victims[..going] {
            self.evict(victim, &mut uses, &mut report, false)?;
        }
        for Removed { what, bytes, .. } in &report.removed {
            tracing::info!(what, bytes, "evicted to make room");
        }
        Ok(())
    }

    /// Bytes that may still be written.
    fn available(&self, promised: u64) -> Result<u64, StoreError> {
        let by_disk = self.disk_available()?;
        let by_limit = match self.limits().bytes {
            Some(limit) => limit.saturating_sub(self.used()?),
            None => u64::MAX,
        };
        Ok(by_disk.min(by_limit).saturating_sub(promised))
    }

    fn disk_available(&self) -> Result<u64, StoreError> {
        let found = statvfs(self.root())
            .map_err(|error| StoreError::io("look at", self.root())(error.into()))?;
        let free = found.blocks_available() as u64 * found.fragment_size() as u64;
        Ok(free.saturating_sub(self.limits().keep_free))
    }

    /// Bytes that running fetches will still write.
    fn promised(&self, except: Option<PartialKey>) -> Result<u64, StoreError> {
        let mut promised = 0;
        for path in self.list("partial")? {
            let Some(key) = partial_key(&path) else {
                continue;
            };
            if Some(key) == except || !is_written(&path) {
                continue;
            }
            if let Some(map) = HaveMap::read(&have_path(&path)) {
                promised += map.wanted.saturating_sub(map.ranges().bytes());
            }
        }
        Ok(promised)
    }

    fn survey(&self, now: SystemTime) -> Result<Survey, StoreError> {
        let mut survey = Survey::default();
        for fingerprint in self.fingerprints()? {
            match self.manifest(&fingerprint) {
                Ok(Some(signed)) => survey.models.push((fingerprint, signed.manifest)),
                Ok(None) => {}
                Err(error) => {
                    tracing::warn!(%fingerprint, %error, "a manifest of the store is unreadable: no file of the store counts as left over");
                    survey.damaged.insert(fingerprint);
                }
            }
        }
        survey
            .models
            .sort_by_key(|(fingerprint, _)| self.last_used(fingerprint));
        for (fingerprint, manifest) in &survey.models {
            let digests: HashSet<Digest> = manifest.files.iter().map(|file| file.sha256).collect();
            let fetched = digests
                .iter()
                .any(|digest| is_written(&self.partial_path(&PartialKey::Blob(*digest))));
            if fetched || self.is_pinned(fingerprint)? {
                survey.kept.insert(*fingerprint);
            }
            for digest in digests {
                *survey.uses.entry(digest).or_default() += 1;
            }
        }
        if survey.damaged.is_empty() {
            survey.leftovers = self.leftovers(&survey, now)?;
        }
        Ok(survey)
    }

    fn leftovers(
        &self,
        survey: &Survey,
        now: SystemTime,
    ) -> Result<Vec<(PathBuf, &'static str)>, StoreError> {
        // After a clock change anything may look old. Files that arrived since the oldest unfinished work
        // began are in use anyway.
        let begun = self.oldest_work()?;
        let is_old = |path: &Path, age| {
            let modified = std::fs::symlink_metadata(path).and_then(|found| found.modified());
            modified.is_ok_and(|at| {
                let live = begun.is_some_and(|begun| at >= begun);
                !live && now.duration_since(at).is_ok_and(|since| since > age)
            })
        };
        let mut leftovers = Vec::new();
        for path in self.list("tmp")? {
            if is_old(&path, LEFTOVER_AGE) && !is_written(&path) {
                leftovers.push((path, "a temporary file"));
            }
        }
        for path in self.list("blobs")? {
            let digest: Option<Digest> = file_name(&path).parse().ok();
            let needed = digest.is_some_and(|digest| survey.uses.contains_key(&digest));
            if !needed && is_old(&path, LEFTOVER_AGE) {
                leftovers.push((path, "a file of no model"));
            }
        }
        for path in self.list("partial")? {
            if path.extension().is_some_and(|end| end == "have") {
                if !path.with_extension("").exists() {
                    leftovers.push((path, "the map of a partial file that is gone"));
                }
                continue;
            }
            let needed = match partial_key(&path) {
                Some(PartialKey::Blob(digest)) => survey.uses.contains_key(&digest),
                _ => false,
            };
            if !needed && is_old(&path, PARTIAL_AGE) && !is_written(&path) {
                leftovers.push((have_path(&path), "the map of a partial file of no model"));
                leftovers.push((path, "a partial file of no model"));
            }
        }
        let models: HashSet<Digest> = survey.models.iter().map(|(known, _)| *known).collect();
        let of_no_model = |path: &Path| {
            let stem = path.file_stem().unwrap_or_default().to_string_lossy();
            let digest: Result<Digest, _> = stem.parse();
            digest.is_ok_and(|digest| !models.contains(&digest))
        };
        let mut gone = |folder, what, counts: &dyn Fn(&Path) -> bool| {
            let mut paths = self.list(folder)?;
            paths.retain(|path| of_no_model(path) && counts(path));
            leftovers.extend(paths.into_iter().map(|path| (path, what)));
            Ok::<_, StoreError>(())
        };
        gone("models", "the folder of a model that is gone", &|_| true)?;
        gone("pins", "the lock of a model that is gone", &|_| true)?;
        gone(
            "manifests",
            "the signatures of a model that is gone",
            &|path| path.extension().is_some_and(|end| end == "sig") && is_old(path, LEFTOVER_AGE),
        )?;
        for named in self.names()? {
            if !models.contains(&named.fingerprint) {
                let path = self.name_path(&named.name);
                leftovers.push((path, "the name of a model that is gone"));
            }
        }
        Ok(leftovers)
    }

    /// Time at which the oldest unfinished work began.
    fn oldest_work(&self) -> Result<Option<SystemTime>, StoreError> {
        let tmp = self.list("tmp")?.into_iter();
        let work = tmp.filter(|path| file_name(path).starts_with(WORK) && is_written(path));
        let begun = work.filter_map(|path| std::fs::symlink_metadata(path).ok()?.modified().ok());
        Ok(begun.min())
    }

    /// Leftovers, then models that may go and have something to free, the least recently used first.
    fn victims<'a>(&self, survey: &'a Survey) -> Vec<Victim<'a>> {
        let leftovers = survey.leftovers.iter();
        let leftovers = leftovers.map(|(path, what)| Victim::Leftover(path, what));
        let models = survey.models.iter().filter(|(fingerprint, manifest)| {
            let mut files = manifest.files.iter();
            !survey.kept.contains(fingerprint) && files.any(|file| self.weight(&file.sha256) > 0)
        });
        let models = models.map(|(fingerprint, manifest)| Victim::Model(fingerprint, manifest));
        leftovers.chain(models).collect()
    }

    /// Bytes that a file takes, whole or in part.
    fn weight(&self, digest: &Digest) -> u64 {
        files::allocated(&self.blob_path(digest))
            + files::allocated(&self.partial_path(&PartialKey::Blob(*digest)))
    }

    /// Bytes that would be freed, and the files of a model that would go; `uses` is then as it would be.
    fn release(&self, victim: &Victim<'_>, uses: &mut Uses) -> (u64, Vec<Digest>) {
        match victim {
            Victim::Leftover(path, _) => (files::allocated(path), Vec::new()),
            Victim::Model(_, manifest) => {
                let files = release(manifest, uses);
                let bytes = files.iter().map(|digest| self.weight(digest)).sum();
                (bytes, files)
            }
        }
    }

    /// Removes the victim, or only reports it.
    fn evict(
        &self,
        victim: &Victim<'_>,
        uses: &mut Uses,
        report: &mut GcReport,
        dry_run: bool,
    ) -> Result<(), StoreError> {
        let (bytes, files) = self.release(victim, uses);
        let (what, model) = match *victim {
            Victim::Leftover(path, what) => (format!("{what} ({})", file_name(path)), None),
            Victim::Model(fingerprint, manifest) => {
                let what = format!("model {} ({})", manifest.name, fingerprint.short());
                (what, Some(*fingerprint))
            }
        };
        match *victim {
            _ if dry_run => {}
            Victim::Leftover(path, _) => remove_any(path)?,
            Victim::Model(fingerprint, _) => self.remove_model(fingerprint, &files)?,
        }
        report.used = report.used.saturating_sub(bytes);
        report.removed.push(Removed { what, model, bytes });
        Ok(())
    }

    /// Removes a model with these files. The manifest is removed first: if this is interrupted, the rest
    /// belongs to no model and is removed by the next `gc`.
    fn remove_model(&self, fingerprint: &Digest, files: &[Digest]) -> Result<(), StoreError> {
        self.remove_records(fingerprint)?;
        for digest in files {
            let partial = self.partial_path(&PartialKey::Blob(*digest));
            for path in [have_path(&partial), partial, self.blob_path(digest)] {
                remove_any(&path)?;
            }
        }
        Ok(())
    }

    /// Removes all of a model but its files.
    fn remove_records(&self, fingerprint: &Digest) -> Result<(), StoreError> {
        remove_any(&self.manifest_path(fingerprint))?;
        remove_any(&self.signatures_path(fingerprint))?;
        for named in self.names()? {
            if named.fingerprint == *fingerprint {
                remove_any(&self.name_path(&named.name))?;
            }
        }
        remove_any(&self.root().join("models").join(fingerprint.to_string()))?;
        remove_any(&self.pin_path(fingerprint))
    }
}

/// Removes a model from `uses`; returns the files that no other model has.
fn release(manifest: &Manifest, uses: &mut Uses) -> Vec<Digest> {
    let digests: HashSet<Digest> = manifest.files.iter().map(|file| file.sha256).collect();
    let mut free = Vec::new();
    for digest in digests {
        let left = uses.entry(digest).or_insert(1);
        *left = left.saturating_sub(1);
        if *left == 0 {
            uses.remove(&digest);
            free.push(digest);
        }
    }
    free
}

/// True if a process has the partial file open. The caller holds the store's lock.
fn is_written(path: &Path) -> bool {
    let Ok(file) = open_regular(path) else {
        return false;
    };
    matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock))
}

fn partial_key(path: &Path) -> Option<PartialKey> {
    PartialKey::of_file_name(path.file_name()?.to_str()?)
}

fn file_name(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

/// Removes a file, or a folder of links, that may be absent.
fn remove_any(path: &Path) -> Result<(), StoreError> {
    let removed = match std::fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => std::fs::remove_dir_all(path),
        Ok(_) => files::remove(path),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    };
    removed.map_err(StoreError::io("remove", path))
}

#[cfg(test)]
mod tests;
