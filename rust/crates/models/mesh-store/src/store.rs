//! The store: a folder of blobs, partial files and manifests.
//!
//! ```text
//! blobs/<sha256>                  whole files; never written to once they are there
//! partial/<sha256>, .have         files in the making, with their have-maps (see `partial`)
//! partial/source-<sha256>, .have  the same for files whose digest is not known yet
//! manifests/<fingerprint>.json    manifests in canonical form
//! manifests/<fingerprint>.sig     their signatures
//! models/<fingerprint>/…          a model's folder: links to its blobs and partial files
//! names/<sha256 of name>.json     a name, the fingerprint that it means, where it comes from
//! pins/<fingerprint>              locked while a process has the model loaded; its time is that of the last use
//! local.json                      fingerprints of files outside the store
//! tmp/, lock
//! ```
//!
//! Files come into being under `tmp/` and are renamed to where they belong once they are on disk. Whatever a crash leaves
//! behind is either used again (partial files) or removed by [`Store::gc`].

mod contents;

use std::fs::{File, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::error::StoreError;
use crate::files::{self, Owners};
use crate::local::LocalIndex;
use crate::manifest::{MAX_MANIFEST, Manifest, ManifestFile, PieceId};
use crate::partial::{HaveMap, PartialFile, PartialKey, have_path};
use crate::ranges::RangeSet;
use crate::room::Limits;
use crate::signature::{MAX_SIGNATURES, SignedManifest};

pub use contents::{Contents, DamagedModel, StoredModel};

/// A store in a folder. Cheap to clone. Several processes may use one folder at once.
#[derive(Debug, Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    root: PathBuf,
    limits: Limits,
    /// Users whose files are trusted, besides this user and the system: the owner of the store's folder.
    owners: Owners,
}

/// Outcome of [`Store::begin`].
#[derive(Debug)]
pub enum Begun {
    /// Path of the file, which is complete.
    Whole(PathBuf),
    /// The file, to write its missing ranges.
    Partial(PartialFile),
}

/// Location of a file and the ranges of it that are present.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Presence {
    /// The file: a blob, a partial file, or one outside the store. `None` if nothing of it is present.
    pub path: Option<PathBuf>,
    /// Ranges of the file that are present.
    pub have: RangeSet,
}

/// A name of a model in the store, with its origin.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Named {
    /// Name that resolves to the model.
    pub name: String,
    /// Fingerprint of the model.
    pub fingerprint: Digest,
    /// Origin, for people: a hub's repository and commit, or a path.
    pub source: Option<String>,
    /// Confirmation of a name that another worker gave: the hub, a signature or a pin. Absent if it was not
    /// confirmed, or recorded before confirmations existed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vouched: Option<String>,
}

impl Named {
    /// True if the name comes from another worker and is not confirmed.
    pub fn is_hearsay(&self) -> bool {
        self.vouched.is_none() && self.is_from_worker()
    }

    /// True if the name comes from another worker, confirmed or not.
    pub fn is_from_worker(&self) -> bool {
        let source = self.source.as_deref().unwrap_or_default();
        source.starts_with(FROM_WORKER)
    }
}

/// Keeps a model from being evicted as long as it lives, also over processes.
#[derive(Debug)]
pub struct Pin {
    fingerprint: Digest,
    /// Locked shared.
    _file: File,
}

/// A mark of work in progress; see [`Store::work`].
#[derive(Debug)]
pub struct Work {
    /// Locked.
    _file: tempfile::NamedTempFile,
}

/// Held while the store's folders change.
#[derive(Debug)]
pub(crate) struct StoreLock {
    _file: File,
}

impl Store {
    /// Opens the store in the folder `root`, which is created if it is not there, with default [`Limits`].
    ///
    /// # Errors
    /// If the folder cannot be used.
    pub fn open(root: impl Into<PathBuf>) -> Result<Self, StoreError> {
        Self::open_with(root, Limits::default())
    }

    /// As [`Store::open`], with limits.
    ///
    /// # Errors
    /// If the folder cannot be used.
    pub fn open_with(root: impl Into<PathBuf>, limits: Limits) -> Result<Self, StoreError> {
        let root = root.into();
        files::create_private_dir(&root).map_err(StoreError::io("create", &root))?;
        let mut folders = Vec::with_capacity(FOLDERS.len());
        for folder in FOLDERS {
            let path = root.join(folder);
            files::create_private_dir(&path).map_err(StoreError::io("create", &path))?;
            // Not what a link leads to.
            let found =
                std::fs::symlink_metadata(&path).map_err(StoreError::io("look at", &path))?;
            folders.push(found.uid());
        }
        let found = std::fs::metadata(&root).map_err(StoreError::io("look at", &root))?;
        let me = nix::unistd::geteuid().as_raw();
        let owners = Owners::of(&found, &folders, me).map_err(|index| StoreError::Foreign {
            path: root.join(FOLDERS[index]),
        })?;
        if let Some(user) = owners.other() {
            tracing::warn!(
                root = %root.display(),
                user,
                "the store's models were put there by another user, who is trusted with them, as the folder is not open to everybody"
            );
        }
        for path in FOLDERS
            .iter()
            .map(|folder| root.join(folder))
            .chain([root.clone()])
        {
            close_to_others(&path);
        }
        Ok(Store {
            inner: Arc::new(Inner {
                root,
                limits,
                owners,
            }),
        })
    }

    /// The store in the folder `root`, if there is one: none is made. A folder that is missing or empty has none.
    ///
    /// # Errors
    /// If something else is there, or the folder cannot be used.
    pub fn find(root: impl Into<PathBuf>) -> Result<Option<Self>, StoreError> {
        let root = root.into();
        if MARKS.iter().all(|mark| root.join(mark).is_dir()) {
            return Self::open(root).map(Some);
        }
        match std::fs::read_dir(&root).map(|mut items| items.next().is_none()) {
            Ok(true) => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) if error.kind() != io::ErrorKind::NotADirectory => {
                Err(StoreError::io("look into", &root)(error))
            }
            Ok(false) | Err(_) => Err(StoreError::NoStore { path: root }),
        }
    }

    /// Root folder of the store.
    pub fn root(&self) -> &Path {
        &self.inner.root
    }

    pub(crate) fn owners(&self) -> Owners {
        self.inner.owners
    }

    /// Limits on the bytes of the store.
    pub fn limits(&self) -> Limits {
        self.inner.limits
    }

    /// Path of the complete file with this digest, if the store has it.
    pub fn blob(&self, digest: &Digest) -> Option<PathBuf> {
        Some(self.blob_path(digest)).filter(|path| self.is_own_file(path))
    }

    /// True if there is a file at `path` that belongs to a trusted owner.
    pub(crate) fn is_own_file(&self, path: &Path) -> bool {
        files::is_own(path, self.owners()) && path.is_file()
    }

    /// Marks work in progress until it is dropped: files that arrive meanwhile do not count as leftovers.
    ///
    /// # Errors
    /// If the disk fails.
    pub fn work(&self) -> Result<Work, StoreError> {
        let tmp = self.tmp();
        let work = || -> io::Result<tempfile::NamedTempFile> {
            let _lock = self.lock().map_err(io::Error::other)?;
            let file = tempfile::Builder::new().prefix(WORK).tempfile_in(&tmp)?;
            file.as_file().lock()?;
            Ok(file)
        };
        let file = work().map_err(StoreError::io("write to", &tmp))?;
        Ok(Work { _file: file })
    }

    /// Begins or continues a file of `bytes` bytes, of which `wanted` are needed. Makes room for them: see
    /// [`Store::admit`]. Pin a model before fetching it, so that it is not evicted for its own files.
    ///
    /// # Errors
    /// If there is no room, another process writes the same file, or the disk fails.
    pub fn begin(&self, key: PartialKey, bytes: u64, wanted: u64) -> Result<Begun, StoreError> {
        let _lock = self.lock()?;
        if let PartialKey::Blob(digest) = key
            && let Some(path) = self.blob(&digest)
        {
            return Ok(Begun::Whole(path));
        }
        let have = HaveMap::read(&have_path(&self.partial_path(&key)));
        let have = have.map_or(0, |map| map.ranges().bytes());
        self.make_room(wanted.saturating_sub(have), Some(key))?;
        PartialFile::open(self, key, bytes, wanted).map(Begun::Partial)
    }

    /// Stores a small file and returns its digest.
    ///
    /// # Errors
    /// If there is no room, or the disk fails.
    pub fn put(&self, bytes: &[u8]) -> Result<Digest, StoreError> {
        let digest = Digest::of(bytes);
        let _lock = self.lock()?;
        let path = self.blob_path(&digest);
        if !self.is_own_file(&path) {
            self.make_room(bytes.len() as u64, None)?;
            files::replace(&path, &self.tmp(), bytes).map_err(StoreError::io("write", &path))?;
        }
        Ok(digest)
    }

    /// The ranges of a model's file that are present: in the store or, for a model outside it
    /// ([`Store::adopt`]), there.
    pub fn presence(&self, fingerprint: &Digest, file: &ManifestFile) -> Presence {
        let is_whole = |path: &Path| {
            std::fs::metadata(path).is_ok_and(|found| found.is_file() && found.len() == file.bytes)
        };
        let is_own = |path: &Path| files::is_own(path, self.owners()) && is_whole(path);
        let whole = |path| Presence {
            path: Some(path),
            have: RangeSet::whole(file.bytes),
        };
        let blob = self.blob_path(&file.sha256);
        if is_own(&blob) {
            return whole(blob);
        }
        if let Some(path) = LocalIndex::read(self).find(fingerprint, &file.path) {
            return whole(path);
        }
        let partial = self.partial_path(&PartialKey::Blob(file.sha256));
        let map = HaveMap::read(&have_path(&partial)).filter(|map| map.bytes == file.bytes);
        match map.filter(|_| is_own(&partial)) {
            Some(map) => Presence {
                path: Some(partial),
                have: map.ranges(),
            },
            None => Presence {
                path: None,
                have: RangeSet::default(),
            },
        }
    }

    /// The bytes of a piece of the model `fingerprint`, checked; none if it is not here.
    ///
    /// # Errors
    /// If it is here, and damaged.
    pub fn read_piece(
        &self,
        fingerprint: &Digest,
        manifest: &Manifest,
        id: PieceId,
    ) -> Result<Option<Vec<u8>>, StoreError> {
        use std::os::unix::fs::FileExt;

        let Some((file, piece)) = manifest.piece(id) else {
            return Ok(None);
        };
        let presence = self.presence(fingerprint, file);
        let Some(path) = presence
            .path
            .filter(|_| presence.have.contains(&piece.range()))
        else {
            return Ok(None);
        };
        let mut bytes = vec![0; piece.bytes as usize];
        File::open(&path)
            .and_then(|open| open.read_exact_at(&mut bytes, piece.offset))
            .map_err(StoreError::io("read", &path))?;
        file.check_piece(id.piece, &bytes)?;
        Ok(Some(bytes))
    }

    /// Keeps a manifest with its signatures; signatures that it had before stay.
    ///
    /// # Errors
    /// If the manifest contradicts itself, or the disk fails.
    pub fn put_manifest(&self, signed: &SignedManifest) -> Result<Digest, StoreError> {
        signed.manifest.check()?;
        let bytes = signed.manifest.to_bytes();
        let fingerprint = Digest::of(&bytes);
        let _lock = self.lock()?;
        let mut merged = SignedManifest::unsigned(signed.manifest.clone());
        let known = match self.read_signatures(&fingerprint) {
            // Damaged signatures have no use.
            Err(error @ StoreError::Damaged { .. }) => {
                tracing::warn!(%error, "signatures are lost");
                let path = self.signatures_path(&fingerprint);
                files::remove(&path).map_err(StoreError::io("remove", &path))?;
                Vec::new()
            }
            read => read?,
        };
        known
            .into_iter()
            .for_each(|signature| merged.add(signature));
        let new = signed.signatures.iter().cloned();
        new.for_each(|signature| merged.add(signature));
        // The oldest go where there are too many.
        let excess = merged.signatures.len().saturating_sub(MAX_SIGNATURES);
        merged.signatures.drain(..excess);

        let write = |path: PathBuf, bytes: &[u8]| {
            files::replace(&path, &self.tmp(), bytes).map_err(StoreError::io("write", &path))
        };
        if !merged.signatures.is_empty() {
            write(
                self.signatures_path(&fingerprint),
                &merged.signatures_to_bytes(),
            )?;
        }
        // The manifest, which makes it a model, is written last. This also repairs a damaged one.
        let path = self.manifest_path(&fingerprint);
        let is_there = files::read_limited(&path, MAX_MANIFEST as u64)
            .is_ok_and(|known| known.is_some_and(|known| known == bytes));
        if !is_there {
            write(path, &bytes)?;
        }
        Ok(fingerprint)
    }

    /// The manifest of a model, if the store has it.
    ///
    /// # Errors
    /// If it is damaged, or the disk fails.
    pub fn manifest(&self, fingerprint: &Digest) -> Result<Option<SignedManifest>, StoreError> {
        let path = self.manifest_path(fingerprint);
        let bytes = files::read_limited(&path, MAX_MANIFEST as u64)
            .map_err(StoreError::io("read", &path))?;
        let Some(bytes) = bytes else {
            return Ok(None);
        };
        let manifest = Manifest::parse_expected(&bytes, fingerprint);
        Ok(Some(SignedManifest {
            manifest: manifest.map_err(StoreError::damaged(&path))?,
            signatures: self.read_signatures(fingerprint)?,
        }))
    }

    /// Makes `name` refer to the model `fingerprint`, and replaces its earlier meaning.
    ///
    /// # Errors
    /// If the disk fails.
    pub fn name(
        &self,
        name: &str,
        fingerprint: &Digest,
        source: Option<&str>,
    ) -> Result<(), StoreError> {
        self.set_name(Named {
            name: name.to_owned(),
            fingerprint: *fingerprint,
            source: source.map(str::to_owned),
            vouched: None,
        })
    }

    /// Makes `name` refer to a model that came from the worker `worker`; `vouched` is the confirmation of the
    /// name.
    ///
    /// # Errors
    /// If the disk fails.
    pub fn name_from_worker(
        &self,
        name: &str,
        fingerprint: &Digest,
        worker: &str,
        vouched: &str,
    ) -> Result<(), StoreError> {
        self.set_name(Named {
            name: name.to_owned(),
            fingerprint: *fingerprint,
            source: Some(format!("{FROM_WORKER}{worker}")),
            vouched: Some(vouched.to_owned()),
        })
    }

    fn set_name(&self, named: Named) -> Result<(), StoreError> {
        let name = named.name.as_str();
        let path = self.name_path(name);
        let json = serde_json::to_vec(&named).expect("texts are JSON");
        let _lock = self.lock()?;
        files::replace(&path, &self.tmp(), &json).map_err(StoreError::io("write", &path))
    }

    /// All names, in their order. One that cannot be read is left out.
    ///
    /// # Errors
    /// If they cannot be listed.
    pub fn names(&self) -> Result<Vec<Named>, StoreError> {
        let mut names: Vec<Named> = Vec::new();
        for path in self.list("names")? {
            let json = files::read_limited(&path, MAX_NAME_FILE).ok().flatten();
            let named = json.and_then(|json| serde_json::from_slice(&json).ok());
            match named {
                Some(named) => names.push(named),
                None => {
                    tracing::warn!(path = %path.display(), "the store's name is unreadable and left out")
                }
            }
        }
        names.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(names)
    }

    /// The model's folder, to load it from, with links to the files that are present. A partial file has its
    /// full length, with holes.
    ///
    /// # Errors
    /// If the store does not have the model, or the disk fails.
    pub fn folder(&self, fingerprint: &Digest) -> Result<PathBuf, StoreError> {
        let signed = self.manifest(fingerprint)?;
        let signed = signed.ok_or(StoreError::NoModel {
            fingerprint: *fingerprint,
        })?;
        let _lock = self.lock()?;
        let models = self.root().join("models");
        let name = PathBuf::from(fingerprint.to_string());
        let folder = files::create_within(&models, &name, self.owners())
            .map_err(StoreError::io("create", &models.join(&name)))?;
        for file in &signed.manifest.files {
            let relative = file.relative_path();
            let link = folder.join(&relative);
            let parent = relative.parent().unwrap_or(Path::new(""));
            files::create_within(&folder, parent, self.owners())
                .map_err(StoreError::io("create", &link))?;
            let target = self.presence(fingerprint, file).path;
            self.link(target.as_deref(), &link)
                .map_err(StoreError::io("link", &link))?;
        }
        Ok(folder)
    }

    /// Has `link` lead to `target`.
    fn link(&self, target: Option<&Path>, link: &Path) -> io::Result<()> {
        let Some(target) = target else {
            return files::remove(link);
        };
        let target = std::path::absolute(target)?;
        if std::fs::read_link(link).is_ok_and(|known| known == target) {
            return Ok(());
        }
        let new = tempfile::TempDir::new_in(self.tmp())?;
        let new = new.path().join("link");
        std::os::unix::fs::symlink(target, &new)?;
        std::fs::rename(&new, link)
    }

    /// Keeps the model from being evicted, and notes that it is used now.
    ///
    /// # Errors
    /// If the store does not have it, or the disk fails.
    pub fn pin(&self, fingerprint: &Digest) -> Result<Pin, StoreError> {
        let path = self.pin_path(fingerprint);
        let _lock = self.lock()?;
        if !self.manifest_path(fingerprint).is_file() {
            return Err(StoreError::NoModel {
                fingerprint: *fingerprint,
            });
        }
        let pin = || -> io::Result<File> {
            let file = files::open_own(&path, self.owners())?;
            // Exclusive locks are only held for a moment, and under the store's lock.
            file.lock_shared()?;
            file.set_modified(SystemTime::now())?;
            Ok(file)
        };
        Ok(Pin {
            fingerprint: *fingerprint,
            _file: pin().map_err(StoreError::io("lock", &path))?,
        })
    }

    /// Time of the model's last pin, or else of its arrival.
    pub(crate) fn last_used(&self, fingerprint: &Digest) -> SystemTime {
        let time = |path: PathBuf| std::fs::metadata(path).and_then(|found| found.modified());
        time(self.pin_path(fingerprint))
            .or_else(|_| time(self.manifest_path(fingerprint)))
            .unwrap_or(SystemTime::UNIX_EPOCH)
    }

    /// Fingerprints of all manifests.
    pub(crate) fn fingerprints(&self) -> Result<Vec<Digest>, StoreError> {
        let manifests = self.list("manifests")?.into_iter();
        let names = manifests.filter_map(|path| {
            let name = path
                .file_name()?
                .to_str()?
                .strip_suffix(".json")?
                .to_owned();
            name.parse().ok()
        });
        Ok(names.collect())
    }

    fn read_signatures(
        &self,
        fingerprint: &Digest,
    ) -> Result<Vec<crate::signature::Signature>, StoreError> {
        let path = self.signatures_path(fingerprint);
        let bytes = files::read_limited(&path, MAX_SIGNATURE_FILE)
            .map_err(StoreError::io("read", &path))?;
        match bytes {
            Some(bytes) => {
                SignedManifest::parse_signatures(&bytes).map_err(StoreError::damaged(&path))
            }
            None => Ok(Vec::new()),
        }
    }

    /// Waits for its turn.
    pub(crate) fn lock(&self) -> Result<StoreLock, StoreError> {
        let path = self.root().join("lock");
        let opened = files::open_own(&path, self.owners());
        let locked = opened.and_then(|file| file.lock().map(|()| file));
        Ok(StoreLock {
            _file: locked.map_err(StoreError::io("lock", &path))?,
        })
    }

    /// Paths in one of the store's folders.
    pub(crate) fn list(&self, folder: &str) -> Result<Vec<PathBuf>, StoreError> {
        let path = self.root().join(folder);
        let listed: io::Result<Vec<PathBuf>> =
            std::fs::read_dir(&path).and_then(|items| items.map(|item| Ok(item?.path())).collect());
        listed.map_err(StoreError::io("list", &path))
    }

    pub(crate) fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.root().join("blobs").join(digest.to_string())
    }

    pub(crate) fn partial_path(&self, key: &PartialKey) -> PathBuf {
        self.root().join("partial").join(key.file_name())
    }

    pub(crate) fn manifest_path(&self, fingerprint: &Digest) -> PathBuf {
        self.root()
            .join("manifests")
            .join(format!("{fingerprint}.json"))
    }

    pub(crate) fn signatures_path(&self, fingerprint: &Digest) -> PathBuf {
        self.root()
            .join("manifests")
            .join(format!("{fingerprint}.sig"))
    }

    pub(crate) fn pin_path(&self, fingerprint: &Digest) -> PathBuf {
        self.root().join("pins").join(fingerprint.to_string())
    }

    pub(crate) fn name_path(&self, name: &str) -> PathBuf {
        self.root()
            .join("names")
            .join(format!("{}.json", Digest::of(name)))
    }

    pub(crate) fn tmp(&self) -> PathBuf {
        self.root().join("tmp")
    }
}

impl Pin {
    /// Fingerprint of the pinned model.
    pub fn fingerprint(&self) -> Digest {
        self.fingerprint
    }
}

/// Bytes that a file takes on disk: less than its length where it has holes.
pub(crate) fn allocated(path: &Path) -> u64 {
    std::fs::metadata(path).map_or(0, |found| found.blocks() * 512)
}

/// Takes from others the right to write into a folder of this user's.
fn close_to_others(path: &Path) {
    let Ok(found) = std::fs::metadata(path) else {
        return;
    };
    let mode = found.permissions().mode() & 0o7777;
    if mode & files::OTHERS_WRITE == 0 {
        return;
    }
    let closed = Permissions::from_mode(mode & !files::OTHERS_WRITE);
    let own = found.uid() == nix::unistd::geteuid().as_raw();
    if own && std::fs::set_permissions(path, closed).is_ok() {
        tracing::warn!(path = %path.display(), mode = format!("{mode:o}"), "everybody could write into the store's folder: no longer");
    } else {
        tracing::warn!(
            path = %path.display(),
            mode = format!("{mode:o}"),
            "everybody can write into the store's folder: `chmod o-w` it, or keep the store elsewhere"
        );
    }
}

/// Prefix of files that mark work in progress.
pub(crate) const WORK: &str = "work-";

/// Prefix of the source of names that came from another worker.
const FROM_WORKER: &str = "worker ";

const FOLDERS: [&str; 7] = [
    "blobs",
    "partial",
    "manifests",
    "models",
    "names",
    "pins",
    "tmp",
];

/// Folders that identify a store. Ollama's folder has the first two as well.
const MARKS: [&str; 3] = ["blobs", "manifests", "pins"];

/// Longest files of these kinds that are read.
const MAX_NAME_FILE: u64 = 64 << 10;
const MAX_SIGNATURE_FILE: u64 = 1 << 20;

#[cfg(test)]
mod tests;
