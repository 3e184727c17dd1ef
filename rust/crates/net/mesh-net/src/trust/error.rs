//! Errors of keys, certificates and state files.

use std::io;
use std::path::{Path, PathBuf};

use mesh_identity::KeyFileError;

use super::names;
use super::succession_error::SuccessionError;

/// Errors of a root, an identity or a token store.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrustError {
    /// A file operation in the state directory failed.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// The operation that failed.
        action: &'static str,
        /// Path of the file or directory.
        path: PathBuf,
        /// Error from the operating system.
        source: io::Error,
    },
    /// The contents of a file are invalid.
    #[error("{} is damaged: {reason}; {}", path.display(), remedy(path))]
    Damaged {
        /// Path of the file.
        path: PathBuf,
        /// Description of the damage.
        reason: String,
    },
    /// A file is missing although others of its set exist.
    #[error("{} is missing, while {} is there; {}", path.display(), beside.display(), remedy(path))]
    Missing {
        /// Path of the file.
        path: PathBuf,
        /// A file of the set that exists.
        beside: PathBuf,
    },
    /// The files are valid but do not belong together.
    #[error("{} does not belong to the files beside it: {reason}; {}", path.display(), remedy(path))]
    MixedUp {
        /// Path of the file.
        path: PathBuf,
        /// The mismatch.
        reason: String,
    },
    /// The list of expelled nodes is full.
    #[error("{} holds {most} expelled nodes, and takes no more; readmit some that are gone for good (`hydramesh nodes readmit`)", path.display())]
    ListFull {
        /// Path of the file.
        path: PathBuf,
        /// Maximum number of entries.
        most: usize,
    },
    /// A node cannot be readmitted because another one has its name.
    #[error(
        "another node is called {name:?} by now ({holder}): expel that one first (`hydramesh nodes expel {holder}`), or let this machine join as a new node: remove its node.key and node.crt and give it a token"
    )]
    NameTaken {
        /// Name that both nodes have.
        name: String,
        /// Node id of the node that has the name now.
        holder: String,
    },
    /// There are too many open join tokens.
    #[error(
        "there are {most} open join tokens, and no more are made; `hydramesh token list` shows them, `hydramesh token revoke ID` withdraws one"
    )]
    TooManyTokens {
        /// Maximum number of open tokens.
        most: usize,
    },
    /// The node has not joined.
    #[error("{} holds no certificate: this node has not joined a mesh; give it a token from `hydramesh token create`", dir.display())]
    NoIdentity {
        /// Path of the state directory.
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
    /// The file of an identity key.
    #[error(transparent)]
    IdentityKey(#[from] KeyFileError),
    /// A certificate is asked for of a root that is not the mesh's, or no longer.
    #[error(
        "{}… is no root of this mesh now, which is {}…: if it was rotated while this node was away, join again with a token \
         (`hydramesh token create`)", &named[..named.len().min(16)], &current[..current.len().min(16)]
    )]
    RootReplaced {
        /// Digest of the root that was asked for.
        named: String,
        /// Digest of the root.
        current: String,
    },
    /// A succession of mesh roots that this node does not accept.
    #[error(transparent)]
    Succession(#[from] SuccessionError),
    /// A root or identity key cannot be rotated now, or by this program.
    #[error("{0}")]
    NotRotated(String),
    /// A request for an intermediate, or its papers, cannot be used.
    #[error("{0}")]
    Intermediate(String),
    /// The intermediate has ended.
    #[error(
        "the intermediate by which this head issues certificates ended on {until}: make a request for a new one (`hydramesh root intermediate request`), sign it where root.key is, install it, and restart the head"
    )]
    IntermediateEnded {
        /// Its end.
        until: String,
    },
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

    /// True if the file that it names has this name.
    pub fn is_about(&self, name: &str) -> bool {
        match self {
            Self::Damaged { path, .. }
            | Self::Missing { path, .. }
            | Self::MixedUp { path, .. } => path.file_name().is_some_and(|found| found == name),
            _ => false,
        }
    }

    /// A file of `path` is missing while `beside` is there.
    pub fn missing(path: &Path, beside: &Path) -> Self {
        Self::Missing {
            path: path.to_owned(),
            beside: beside.to_owned(),
        }
    }

    /// The contents of `path` are invalid.
    pub fn damaged(path: &Path, reason: impl ToString) -> Self {
        Self::Damaged {
            path: path.to_owned(),
            reason: reason.to_string(),
        }
    }
}

/// Remedy for a file of the state directory that cannot be used.
fn remedy(path: &Path) -> &'static str {
    match path.file_name().and_then(|name| name.to_str()) {
        Some(names::ROOT_KEY | names::ROOT_CREDENTIAL) => {
            "restore it from a backup. Without it this mesh cannot be kept: to found another, move the state directory away and \
             let every worker join again"
        }
        Some(names::INTERMEDIATE | names::NEXT_INTERMEDIATE) => {
            "restore it from a backup, or remove it, make a request for a new intermediate (`hydramesh root intermediate request`), \
             sign it where root.key is, and install it"
        }
        Some(names::ROOT_CERTIFICATE) => {
            "restore it from a backup, or copy root.crt from the state directory of the head or of any worker of this mesh: it is \
             the same file on all of them"
        }
        Some(names::NODE_KEY) => {
            "restore it from a backup. Without it a worker becomes another node with a new token (`hydramesh token create`), and a \
             head gives itself a new identity when node.crt is removed"
        }
        Some(names::IDENTITY_KEY | names::IDENTITY_CREDENTIAL) => {
            "restore it from a backup. Without it a worker becomes another node with a new token (`mesh-worker new-identity`), and \
             a head gives itself a new identity when node.crt is removed"
        }
        Some(names::NODE_CERTIFICATE) => {
            "restore it from a backup, or give this worker a new token (`hydramesh token create`); a head issues itself another \
             when the file is removed"
        }
        Some(names::TOKENS) => {
            "restore it from a backup, or remove it: then no token that was made before is good any more"
        }
        Some(names::EXPELLED) => {
            "restore it from a backup. At the head, {\"expelled\": {}} in it lets all expelled nodes in again; a worker gets it again \
             from its head when it is removed"
        }
        Some(names::MEMBERS) => {
            "restore it from a backup, or remove it: members are noted again when they connect"
        }
        Some(names::ROOT_HISTORY) => {
            "restore it from a backup, or remove it: then a root that is being replaced is not accepted here any more"
        }
        _ => "restore it from a backup",
    }
}

impl From<rustls::Error> for TrustError {
    fn from(error: rustls::Error) -> Self {
        Self::Crypto(error.to_string())
    }
}

impl From<rcgen::Error> for TrustError {
    fn from(error: rcgen::Error) -> Self {
        Self::Crypto(error.to_string())
    }
}
