//! Why the store cannot do something.

use std::io;
use std::path::{Path, PathBuf};

use crate::digest::Digest;
use crate::manifest::{BuildError, ManifestError, VerifyError};
use crate::signature::SignatureError;

/// Why the store cannot do something.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The system refuses.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// With which file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Not enough room, even without everything that may go.
    #[error("{0}")]
    NoRoom(NoRoom),
    /// Another process writes the same file.
    #[error("{key} is being fetched by another process; wait for it, or end it")]
    Busy {
        /// Which file.
        key: String,
    },
    /// Bytes that do not lie in their file.
    #[error("bytes {offset} to {end} do not lie in a file of {bytes} bytes")]
    Outside {
        /// Position.
        offset: u64,
        /// Position of the end.
        end: u64,
        /// Length of the file.
        bytes: u64,
    },
    /// A file that is not whole yet.
    #[error("{missing} bytes of {key} are still missing")]
    Incomplete {
        /// Which file.
        key: String,
        /// Bytes that are missing.
        missing: u64,
    },
    /// A file that is another one than it should be.
    #[error(
        "{key} has SHA-256 {found}, but {wanted} was expected: what was fetched is damaged or was altered; it has to be fetched again"
    )]
    Mismatch {
        /// Which file.
        key: String,
        /// Its digest.
        found: Digest,
        /// The digest it should have.
        wanted: Digest,
    },
    /// The disk does not give back what was written to it.
    #[error(
        "the disk does not give back what was written to {key}: {pieces} pieces differ and are fetched again; see to the disk (dmesg, smartctl) if it goes on"
    )]
    Spoiled {
        /// Which file.
        key: String,
        /// Pieces that differ.
        pieces: usize,
    },
    /// No such model.
    #[error(
        "the store has no model {fingerprint}; `hydramesh models list` shows those that it has"
    )]
    NoModel {
        /// The fingerprint.
        fingerprint: Digest,
    },
    /// A model that somebody uses.
    #[error("{name} is loaded by a process, and stays until that has ended")]
    Pinned {
        /// The model.
        name: String,
    },
    /// A folder of something else.
    #[error("{} is no store of models; name an empty folder, or one that `hydramesh models pull` or a worker made", path.display())]
    NoStore {
        /// The folder.
        path: PathBuf,
    },
    /// One of the store's folders that somebody else made.
    #[error("{} belongs to another user, who may have put anything there: remove it, or keep the store elsewhere", path.display())]
    Foreign {
        /// The folder.
        path: PathBuf,
    },
    /// A manifest or signatures in the store that are no longer what was written.
    #[error("{} is damaged: {reason}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A manifest that is none.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// Signatures that are none.
    #[error(transparent)]
    Signature(#[from] SignatureError),
    /// Bytes that are not what their manifest says.
    #[error(transparent)]
    Verify(#[from] VerifyError),
    /// A file of which no manifest can be made.
    #[error(transparent)]
    Build(#[from] BuildError),
}

impl StoreError {
    /// For `map_err`.
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| StoreError::Io {
            action,
            path,
            source,
        }
    }

    /// For `map_err`.
    pub(crate) fn damaged<E: std::error::Error>(path: &Path) -> impl FnOnce(E) -> Self {
        let path = path.to_owned();
        move |error| StoreError::Damaged {
            path,
            reason: error.to_string(),
        }
    }
}

/// Why there is no room, in bytes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "no room for {needed} more bytes in {}: {} {evictable} bytes of models that no process uses could go; free some space, \
     raise the limit, or unload models", root.display(), self.limit_message()
)]
pub struct NoRoom {
    /// The store.
    pub root: PathBuf,
    /// What was asked for.
    pub needed: u64,
    /// What may still be written before the limit or the disk is full.
    pub available: u64,
    /// What could be evicted.
    pub evictable: u64,
    /// The store's size limit, if that is what is reached; otherwise the disk is.
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
