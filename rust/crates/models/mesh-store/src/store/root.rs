//! The store's folder: its paths, its lock, its owners and its limits.

use std::fmt::Display;
use std::fs::{File, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::digest::Digest;
use crate::error::StoreError;
use crate::files::{self, Owners};
use crate::partial::PartialKey;

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

/// Limits on the bytes of a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Maximum bytes of all its files; `None` allows as many as the disk has.
    pub bytes: Option<u64>,
    /// Bytes of the disk to leave free.
    pub keep_free: u64,
}

impl Default for Limits {
    /// No limit but the disk, of which 1 GiB stays free.
    fn default() -> Self {
        Limits {
            bytes: None,
            keep_free: 1 << 30,
        }
    }
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
        for folder in FOLDERS {
            close_to_others(&root.join(folder));
        }
        close_to_others(&root);
        Ok(Store {
            inner: Arc::new(Inner {
                root,
                limits,
                owners,
            }),
        })
    }

    /// The store in the folder `root`, if there is one: none is made. A folder that is missing or empty has
    /// none.
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
        let is_own_file = |path: &PathBuf| files::is_own(path, self.owners()) && path.is_file();
        Some(self.blob_path(digest)).filter(is_own_file)
    }

    /// Waits for its turn to change the store's folders, which lasts as long as the file is open.
    pub(crate) fn lock(&self) -> Result<File, StoreError> {
        let path = self.root().join("lock");
        let opened = files::open_own(&path, self.owners());
        let locked = opened.and_then(|file| file.lock().map(|()| file));
        locked.map_err(StoreError::io("lock", &path))
    }

    /// Paths in one of the store's folders.
    pub(crate) fn list(&self, folder: &str) -> Result<Vec<PathBuf>, StoreError> {
        let path = self.root().join(folder);
        let listed: io::Result<Vec<PathBuf>> =
            std::fs::read_dir(&path).and_then(|items| items.map(|item| Ok(item?.path())).collect());
        listed.map_err(StoreError::io("list", &path))
    }

    pub(crate) fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.path("blobs", digest)
    }

    pub(crate) fn partial_path(&self, key: &PartialKey) -> PathBuf {
        self.path("partial", key.file_name())
    }

    pub(crate) fn manifest_path(&self, fingerprint: &Digest) -> PathBuf {
        self.path("manifests", format_args!("{fingerprint}.json"))
    }

    pub(crate) fn signatures_path(&self, fingerprint: &Digest) -> PathBuf {
        self.path("manifests", format_args!("{fingerprint}.sig"))
    }

    pub(crate) fn pin_path(&self, fingerprint: &Digest) -> PathBuf {
        self.path("pins", fingerprint)
    }

    pub(crate) fn name_path(&self, name: &str) -> PathBuf {
        self.path("names", format_args!("{}.json", Digest::of(name)))
    }

    fn path(&self, folder: &str, name: impl Display) -> PathBuf {
        self.root().join(folder).join(name.to_string())
    }

    pub(crate) fn tmp(&self) -> PathBuf {
        self.root().join("tmp")
    }
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
