//! The folder of a trail: names of its files, and errors in using them.

use std::io;
use std::path::PathBuf;

/// A trail cannot be opened or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// A file operation failed.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// Something that was signed and on disk is not there as it was.
    #[error("the audit trail {} is damaged: {reason}; `hydramesh audit verify` shows where", dir.display())]
    Damaged {
        /// Folder of the trail.
        dir: PathBuf,
        /// The damage.
        reason: String,
    },
}

/// Beginning of the present epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct EpochStart {
    /// Its first record.
    pub first: u64,
    /// Its time in milliseconds since the Unix epoch.
    pub since: u64,
}

/// Names of files and folders; `store` says what they contain.
pub(crate) const JOURNAL: &str = "journal";
pub(crate) const CHECKPOINT: &str = "checkpoint";
pub(crate) const KEYS: &str = "keys";
pub(crate) const DOCUMENT: &str = "identity.doc";
pub(crate) const EPOCHS: &str = "epoch";
pub(crate) const COSIGNED: &str = "cosigned";
pub(crate) const CHAIN_KEY: &str = "chain.key";
