//! Errors of the store.

use std::io;
use std::path::{Path, PathBuf};

use crate::digest::Digest;
use crate::manifest::{BuildError, ManifestError, VerifyError};
use crate::signature::SignatureError;

/// Errors of the store.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages name the fields")]
pub enum StoreError {
    /// A file operation failed.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    /// Too little room, even after evicting everything that may be evicted.
    #[error("{0}")]
    NoRoom(NoRoom),
    /// Another process writes the same file.
    #[error("{key} is being fetched by another process; wait for it, or end it")]
    Busy { key: String },
    /// Bytes that do not lie in their file.
    #[error("bytes {offset} to {end} do not lie in a file of {bytes} bytes")]
    Outside { offset: u64, end: u64, bytes: u64 },
    /// A file that is not whole yet.
    #[error("{missing} bytes of {key} are still missing")]
    Incomplete { key: String, missing: u64 },
    /// A file that is another one than it should be.
    #[error(
        "{key} has SHA-256 {found}, but {wanted} was expected: what was fetched is damaged or was altered; it has to be fetched again"
    )]
    Mismatch {
        key: String,
        found: Digest,
        wanted: Digest,
    },
    /// The disk does not return what was written to it.
    #[error(
        "the disk does not give back what was written to {key}: {pieces} pieces differ and are fetched again; see to the disk (dmesg, smartctl) if it goes on"
    )]
    Spoiled { key: String, pieces: usize },
    /// The store has no such model.
    #[error(
        "the store has no model {fingerprint}; `hydramesh models list` shows those that it has"
    )]
    NoModel { fingerprint: Digest },
    /// A model that a process has loaded.
    #[error("{name} is loaded by a process, and stays until that has ended")]
    Pinned { name: String },
    /// A folder of something else.
    #[error("{} is no store of models; name an empty folder, or one that `hydramesh models pull` or a worker made", path.display())]
    NoStore { path: PathBuf },
    /// A folder of the store that belongs to another user.
    #[error("{} belongs to another user, who may have put anything there: remove it, or keep the store elsewhere", path.display())]
    Foreign { path: PathBuf },
    /// A manifest or signatures in the store are no longer as written.
    #[error("{} is damaged: {reason}", path.display())]
    Damaged { path: PathBuf, reason: String },
    /// The bytes are not a valid manifest.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// The bytes are not valid signatures.
    #[error(transparent)]
    Signature(#[from] SignatureError),
    /// The bytes do not match their manifest.
    #[error(transparent)]
    Verify(#[from] VerifyError),
    /// A file of which no manifest can be made.
    #[error(transparent)]
    Build(#[from] BuildError),
}

impl StoreError {
    /// Returns a function for `map_err`.
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| StoreError::Io {
            action,
            path,
            source,
        }
    }

    /// Returns a function for `map_err`.
    pub(crate) fn damaged<E: std::error::Error>(path: &Path) -> impl FnOnce(E) -> Self {
        let path = path.to_owned();
        move |error| StoreError::Damaged {
            path,
            reason: error.to_string(),
        }
    }
}

/// Missing room in the store, in bytes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "no room for {needed} more bytes in {}: {} {evictable} bytes of models that no process uses could go; free some space, \
     raise the limit, or unload models", root.display(), self.limit_message()
)]
pub struct NoRoom {
    /// Root folder of the store.
    pub root: PathBuf,
    /// Bytes that were requested.
    pub needed: u64,
    /// Bytes that may still be written before the limit or the disk is full.
    pub available: u64,
    /// Bytes of models that could be evicted.
    pub evictable: u64,
    /// Size limit of the store if that was reached; `None` if the disk is full.
    pub limit: Option<u64>,
}

impl NoRoom {
    fn limit_message(&self) -> String {
        match self.limit {
            Some(limit) => format!(
                "its limit is {limit} bytes, of which {} are free, and",
                self.available
            ),
            None => format!("{} bytes of the disk may be used, and", self.available),
        }
    }
}
