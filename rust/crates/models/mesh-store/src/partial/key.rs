//! Identities of partial files.

use std::fmt;

use crate::digest::Digest;

/// Identity of a partial file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PartialKey {
    /// Digest of the complete file.
    Blob(Digest),
    /// Digest of the file's source, for a file whose own digest is unknown until it is complete.
    Source(Digest),
}

impl PartialKey {
    /// The key of a file that is known by its source only: any text that always refers to the same bytes,
    /// such as a hub's repository, commit and path.
    pub fn source(text: &str) -> Self {
        PartialKey::Source(Digest::of(text))
    }

    pub(crate) fn file_name(&self) -> String {
        match self {
            PartialKey::Blob(digest) => digest.to_string(),
            PartialKey::Source(digest) => format!("source-{digest}"),
        }
    }

    pub(crate) fn of_file_name(name: &str) -> Option<Self> {
        match name.strip_prefix("source-") {
            Some(digest) => digest.parse().ok().map(PartialKey::Source),
            None => name.parse().ok().map(PartialKey::Blob),
        }
    }
}

impl fmt::Display for PartialKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PartialKey::Blob(digest) => write!(f, "blob {digest}"),
            PartialKey::Source(digest) => write!(f, "a file with source {}", digest.short()),
        }
    }
}
