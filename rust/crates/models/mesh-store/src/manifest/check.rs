//! Parsing and checking untrusted manifests.

use std::collections::HashSet;

use super::{MAX_MANIFEST, MAX_PIECE, Manifest, ManifestFile, VERSION};
use crate::digest::Digest;

/// Errors of a manifest's bytes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages name the fields")]
pub enum ManifestError {
    /// More bytes than a manifest may have.
    #[error("the manifest has {bytes} bytes, more than the limit of {MAX_MANIFEST}")]
    TooLong { bytes: usize },
    /// The bytes are not the expected JSON.
    #[error("the manifest is malformed: {reason}")]
    Malformed { reason: String },
    /// Written by another version.
    #[error(
        "the manifest has version {version}, this program reads {VERSION}: use the same release on all nodes"
    )]
    Version { version: u32 },
    /// Valid JSON that differs from the canonical form.
    #[error("the manifest is not in canonical form: its fingerprint would not be its own")]
    NotCanonical,
    /// A name or a path that is not allowed.
    #[error("the manifest's {what} {value:?} is not allowed: {reason}")]
    Text {
        /// Kind of the text, such as name or path.
        what: &'static str,
        value: String,
        reason: &'static str,
    },
    /// More entries than the limit allows.
    #[error("the manifest has {count} {what}, more than the limit of {limit}")]
    TooMany {
        what: &'static str,
        count: usize,
        limit: usize,
    },
    /// Two files of one path, or one that would lie within another.
    #[error("the manifest names the file {path:?} twice, or as a folder of another")]
    SamePath { path: String },
    /// Pieces that do not cover their file.
    #[error("the manifest's piece {piece} of {path:?} {reason}")]
    Piece {
        path: String,
        piece: usize,
        reason: &'static str,
    },
    /// A tensor that is outside its file, or overlaps another one.
    #[error("the manifest's tensor {tensor:?} of {path:?} {reason}")]
    Tensor {
        path: String,
        tensor: String,
        reason: &'static str,
    },
    /// Not the manifest that was asked for.
    #[error("the manifest has the fingerprint {found}, but {wanted} was expected: it was altered")]
    Fingerprint { found: Digest, wanted: Digest },
}

impl ManifestError {
    fn malformed(reason: impl ToString) -> Self {
        let reason = reason.to_string();
        Self::Malformed { reason }
    }
}

// Limits far above known models: the largest have some hundred files and about a hundred thousand tensors.
const MAX_FILES: usize = 4096;
const MAX_TENSORS: usize = 1 << 18;
const MAX_LAYER: u32 = 1 << 16;
const MAX_NAME: usize = 256;
const MAX_PATH: usize = 512;
const MAX_TENSOR_NAME: usize = 512;

impl Manifest {
    /// Parses the canonical form; the bytes may come from anywhere.
    ///
    /// # Errors
    /// If it is anything but the canonical form of a manifest whose files, pieces and tensors agree with each
    /// other.
    pub fn parse(bytes: &[u8]) -> Result<Manifest, ManifestError> {
        if bytes.len() > MAX_MANIFEST {
            return Err(ManifestError::TooLong { bytes: bytes.len() });
        }
        let manifest: Manifest = serde_json::from_slice(bytes).map_err(ManifestError::malformed)?;
        manifest.check()?;
        if manifest.to_bytes() != bytes {
            return Err(ManifestError::NotCanonical);
        }
        Ok(manifest)
    }

    /// As [`Manifest::parse`], for the manifest of a model that is known by its fingerprint.
    ///
    /// # Errors
    /// As there, and if it has another fingerprint.
    pub fn parse_expected(bytes: &[u8], wanted: &Digest) -> Result<Manifest, ManifestError> {
        if bytes.len() > MAX_MANIFEST {
            return Err(ManifestError::TooLong { bytes: bytes.len() });
        }
        let found = Digest::of(bytes);
        if found != *wanted {
            let wanted = *wanted;
            return Err(ManifestError::Fingerprint { found, wanted });
        }
        Self::parse(bytes)
    }

    /// Checks all rules except the canonical form.
    ///
    /// # Errors
    /// If something is not as [`Manifest`] says.
    pub fn check(&self) -> Result<(), ManifestError> {
        if self.version != VERSION {
            let version = self.version;
            return Err(ManifestError::Version { version });
        }
        check_text("name", &self.name, MAX_NAME)?;
        limit("files", self.files.len(), MAX_FILES)?;
        let tensors = self.files.iter().map(|file| file.tensors.len()).sum();
        limit("tensors", tensors, MAX_TENSORS)?;
        if self.files.is_empty() {
            return Err(ManifestError::malformed("it has no files"));
        }
        let mut total = 0u64;
        let mut paths: HashSet<&str> = HashSet::new();
        // On some disks these are one file.
        let mut folded: HashSet<String> = HashSet::new();
        for file in &self.files {
            check_path(&file.path)?;
            let overflow = || ManifestError::malformed("the lengths of its files overflow");
            total = total.checked_add(file.bytes).ok_or_else(overflow)?;
            if !paths.insert(&file.path) || !folded.insert(file.path.to_lowercase()) {
                let path = file.path.clone();
                return Err(ManifestError::SamePath { path });
            }
        }
        for file in &self.files {
            let mut parents = file.path.match_indices('/').map(|(at, _)| &file.path[..at]);
            if let Some(parent) = parents.find(|parent| paths.contains(parent)) {
                let path = parent.into();
                return Err(ManifestError::SamePath { path });
            }
            file.check_pieces()?;
            file.check_tensors()?;
        }
        Ok(())
    }
}

impl ManifestFile {
    fn check_pieces(&self) -> Result<(), ManifestError> {
        let failed = |piece, reason| ManifestError::Piece {
            path: self.path.clone(),
            piece,
            reason,
        };
        let mut at = 0u64;
        for (i, piece) in self.pieces.iter().enumerate() {
            if piece.bytes == 0 || piece.bytes > MAX_PIECE {
                return Err(failed(i, "is empty or longer than 4 MiB"));
            }
            if piece.offset != at {
                return Err(failed(i, "does not begin where the one before ends"));
            }
            at = at
                .checked_add(piece.bytes.into())
                .filter(|&end| end <= self.bytes)
                .ok_or_else(|| failed(i, "ends behind its file"))?;
        }
        match at == self.bytes {
            true => Ok(()),
            false => Err(failed(self.pieces.len(), "is missing: the file is longer")),
        }
    }

    fn check_tensors(&self) -> Result<(), ManifestError> {
        let mut at = 0u64;
        let mut names: HashSet<&str> = HashSet::new();
        for tensor in &self.tensors {
            let failed = |reason| ManifestError::Tensor {
                path: self.path.clone(),
                tensor: tensor.name.chars().take(MAX_TENSOR_NAME).collect(),
                reason,
            };
            if tensor.name.is_empty() || tensor.name.len() > MAX_TENSOR_NAME {
                return Err(failed("has a name that is empty or too long"));
            }
            if !names.insert(&tensor.name) {
                return Err(failed("is listed twice"));
            }
            if tensor.offset < at {
                return Err(failed("lies over the one before it"));
            }
            if tensor.layer.is_some_and(|layer| layer > MAX_LAYER) {
                return Err(failed("belongs to a layer that no model has"));
            }
            at = tensor
                .offset
                .checked_add(tensor.bytes)
                .filter(|&end| end <= self.bytes)
                .ok_or_else(|| failed("ends behind its file"))?;
        }
        Ok(())
    }
}

fn limit(what: &'static str, count: usize, limit: usize) -> Result<(), ManifestError> {
    match count <= limit {
        true => Ok(()),
        false => Err(ManifestError::TooMany { what, count, limit }),
    }
}

/// Names are shown in terminals and become parts of paths.
fn check_text(what: &'static str, value: &str, limit: usize) -> Result<(), ManifestError> {
    let reason = if value.is_empty() {
        "it is empty"
    } else if value.len() > limit {
        "it is too long"
    } else if value.chars().any(char::is_control) {
        "it has control characters"
    } else {
        return Ok(());
    };
    Err(ManifestError::Text {
        what,
        value: value.chars().take(limit).collect(),
        reason,
    })
}

/// A path that stays in its folder on every system.
fn check_path(path: &str) -> Result<(), ManifestError> {
    check_text("path", path, MAX_PATH)?;
    let is_plain = |part: &str| !matches!(part, "" | "." | "..") && part.len() <= 255;
    let reason = if path.contains(['\\', ':']) {
        "it has a backslash or a colon"
    } else if !path.split('/').all(is_plain) {
        "it leaves its folder, or has an empty or too long part"
    } else {
        return Ok(());
    };
    Err(ManifestError::Text {
        what: "path",
        value: path.into(),
        reason,
    })
}
