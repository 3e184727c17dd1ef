//! What can be wrong with keys, certificates and state files.

use std::io;
use std::path::{Path, PathBuf};

/// Why a root, an identity or a token store cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrustError {
    /// A file or directory of the state directory.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file that is there and makes no sense.
    #[error("{} is damaged: {reason}; restore it from a backup", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The node has not joined.
    #[error("{} holds no certificate: this node has not joined a mesh; give it a token from `hydramesh token create`", dir.display())]
    NoIdentity {
        /// The state directory.
        dir: PathBuf,
    },
    /// A certificate that is not for this node, or not of this mesh.
    #[error("the certificate does not fit: {0}")]
    Mismatch(String),
    /// A name that cannot stand in a certificate.
    #[error("`{0}` is no usable name: take 1 to 63 letters, digits, dots, dashes and underscores")]
    Name(String),
    /// A certificate request that cannot be read, or whose signature does not fit its key.
    #[error("the certificate request is not valid: {0}")]
    Request(String),
    /// The cryptographic library refused.
    #[error("certificate operation failed: {0}")]
    Crypto(String),
}

impl TrustError {
    pub(crate) fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io {
            action,
            path: path.to_owned(),
            source,
        }
    }

    pub(super) fn damaged(path: &Path, reason: impl ToString) -> Self {
        Self::Damaged {
            path: path.to_owned(),
            reason: reason.to_string(),
        }
    }
}

impl From<rcgen::Error> for TrustError {
    fn from(error: rcgen::Error) -> Self {
        Self::Crypto(error.to_string())
    }
}
