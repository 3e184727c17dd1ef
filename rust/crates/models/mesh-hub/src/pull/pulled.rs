//! The result of a pull.

use std::path::PathBuf;

use mesh_store::Digest;

/// Result of [`crate::pull()`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pulled {
    /// Name of the model.
    pub name: String,
    /// The repository, as the hub spells it.
    pub repo: String,
    /// Commit of the repository.
    pub commit: String,
    /// Fingerprint of the model; `None` if only some layers were fetched.
    pub fingerprint: Option<Digest>,
    /// Path to open: a GGUF file, the first part of one, or a folder; `None` if only some layers were fetched.
    pub path: Option<PathBuf>,
    /// Total length of the model's files in bytes.
    pub bytes: u64,
    /// Bytes of the model that are present now.
    pub present: u64,
    /// Bytes that this call fetched.
    pub fetched: u64,
    /// Number of layers of the model.
    pub layers: u32,
}
