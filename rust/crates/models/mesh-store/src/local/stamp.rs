//! Detecting that a file changed.

use std::fs::Metadata;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// Path, length and time of change, to detect that a file changed.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq, Eq)]
pub(crate) struct Stamp {
    pub(crate) path: PathBuf,
    bytes: u64,
    modified_ns: u64,
}

impl Stamp {
    pub(crate) fn of(path: &Path) -> io::Result<Stamp> {
        let path = path.canonicalize()?;
        let metadata = std::fs::metadata(&path)?;
        Ok(Stamp {
            path,
            bytes: metadata.len(),
            modified_ns: modified_ns(&metadata),
        })
    }
}

fn modified_ns(metadata: &Metadata) -> u64 {
    let modified = metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH);
    let since = modified.duration_since(UNIX_EPOCH).unwrap_or_default();
    since.as_nanos() as u64
}

/// Files remembered at most; the oldest entries go first.
pub(super) const MAX_REMEMBERED: usize = 1000;

/// Longest file of that kind that is read.
pub(super) const MAX_INDEX: u64 = 16 << 20;
