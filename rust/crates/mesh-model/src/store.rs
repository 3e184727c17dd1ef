//! Model files in folders: by name, listed, verified.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// A model file in a folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The file's name without `.gguf`.
    pub name: String,
    /// The file.
    pub path: PathBuf,
    /// Its length.
    pub bytes: u64,
}

/// Why a model could not be found.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// A folder could not be listed.
    #[error("cannot list the model folder {}: {source}", path.display())]
    List {
        /// The folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// No file of that name.
    #[error("no model {name:?}: {}", known_names(known))]
    NotFound {
        /// What was asked for.
        name: String,
        /// The names that there are.
        known: Vec<String>,
    },
    /// Several files answer to a name.
    #[error("model {name:?} is ambiguous: it may be any of {}; give more of the name or a path", known.join(", "))]
    Ambiguous {
        /// What was asked for.
        name: String,
        /// The names that begin so.
        known: Vec<String>,
    },
    /// A file is not what it should be.
    #[error("{} has SHA-256 {found}, but {wanted} was expected: it is damaged or another model, fetch it again", path.display())]
    Mismatch {
        /// The file.
        path: PathBuf,
        /// Its digest.
        found: String,
        /// The digest it should have.
        wanted: String,
    },
    /// A file could not be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

fn known_names(known: &[String]) -> String {
    match known {
        [] => "the model folders hold no .gguf file; put one there or give a path".into(),
        names => format!("there are {}", names.join(", ")),
    }
}

/// All `.gguf` files directly in `dirs`, by name. A folder that does not exist holds none; of files with one name the first
/// folder's counts.
///
/// # Errors
/// If a folder exists but cannot be listed.
pub fn list(dirs: &[PathBuf]) -> Result<Vec<Entry>, StoreError> {
    let mut entries: Vec<Entry> = Vec::new();
    for dir in dirs {
        let failed = |source| StoreError::List {
            path: dir.clone(),
            source,
        };
        let listing = match std::fs::read_dir(dir) {
            Ok(listing) => listing,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(failed(error)),
        };
        for item in listing {
            let path = item.map_err(failed)?.path();
            let is_gguf = path
                .extension()
                .is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"));
            let Ok(metadata) = std::fs::metadata(&path) else {
                // A dangling link, or gone since the listing.
                continue;
            };
            let name = model_name(&path);
            if is_gguf && metadata.is_file() && !entries.iter().any(|entry| entry.name == name) {
                entries.push(Entry {
                    name,
                    path,
                    bytes: metadata.len(),
                });
            }
        }
    }
    entries.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(entries)
}

/// The file that `name` means: a path to a file, the name of a model in `dirs`, or the only one whose name begins so,
/// whatever its case.
///
/// # Errors
/// If there is none, or several.
pub fn resolve(name: &str, dirs: &[PathBuf]) -> Result<PathBuf, StoreError> {
    let path = Path::new(name);
    if path.is_file() {
        return Ok(path.into());
    }
    let mut entries = list(dirs)?;
    let wanted = name.strip_suffix(".gguf").unwrap_or(name);
    if let Some(i) = entries.iter().position(|entry| entry.name == wanted) {
        return Ok(entries.swap_remove(i).path);
    }
    let lower = wanted.to_lowercase();
    let known: Vec<String> = entries.iter().map(|entry| entry.name.clone()).collect();
    entries.retain(|entry| !lower.is_empty() && entry.name.to_lowercase().starts_with(&lower));
    match &entries[..] {
        [only] => Ok(only.path.clone()),
        [] => Err(StoreError::NotFound {
            name: name.into(),
            known,
        }),
        several => Err(StoreError::Ambiguous {
            name: name.into(),
            known: several.iter().map(|entry| entry.name.clone()).collect(),
        }),
    }
}

/// The name a model file goes by: its own without `.gguf`.
pub fn model_name(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    match name
        .len()
        .checked_sub(5)
        .and_then(|cut| name.split_at_checked(cut))
    {
        Some((stem, end)) if end.eq_ignore_ascii_case(".gguf") => stem.to_owned(),
        _ => name.into_owned(),
    }
}

/// Checks that the file at `path` has the digest `wanted` (SHA-256 in hexadecimal).
///
/// # Errors
/// If it has another, or cannot be read.
pub fn verify(path: &Path, wanted: &str) -> Result<(), StoreError> {
    let found = sha256_file(path).map_err(|source| StoreError::Read {
        path: path.into(),
        source,
    })?;
    if !found.eq_ignore_ascii_case(wanted) {
        return Err(StoreError::Mismatch {
            path: path.into(),
            found,
            wanted: wanted.into(),
        });
    }
    Ok(())
}

/// SHA-256 of a file in hexadecimal.
///
/// # Errors
/// If it cannot be read.
pub fn sha256_file(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let n = file.read(&mut buffer)?;
        if n == 0 {
            break;
        }
        hasher.update(&buffer[..n]);
    }
    Ok(hasher
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect())
}

/// Digests of files that were hashed before, kept in a small JSON file so that a restart need not read gigabytes again.
/// A digest counts only as long as the file's path, length and time of change are the same.
#[derive(Debug)]
pub struct FingerprintCache {
    path: PathBuf,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Remembered {
    files: Vec<Digested>,
}

#[derive(Debug, Clone, Serialize, Deserialize, PartialEq, Eq)]
struct Digested {
    path: PathBuf,
    bytes: u64,
    modified_ns: u64,
    sha256: String,
}

/// Files remembered at most; the oldest entries go first.
const MAX_REMEMBERED: usize = 1000;

impl FingerprintCache {
    /// A cache in the file at `path`, which need not exist.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        FingerprintCache { path: path.into() }
    }

    /// SHA-256 of the file at `path`, remembered or computed. A cache that cannot be read or written only costs time.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn fingerprint(&self, path: &Path) -> io::Result<String> {
        let path = path.canonicalize()?;
        let metadata = std::fs::metadata(&path)?;
        let modified = metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH);
        let modified_ns = modified
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
            .as_nanos() as u64;
        let bytes = metadata.len();

        let mut remembered = self.read();
        let known = remembered.files.iter().find(|file| {
            file.path == path && file.bytes == bytes && file.modified_ns == modified_ns
        });
        if let Some(known) = known {
            return Ok(known.sha256.clone());
        }
        let sha256 = sha256_file(&path)?;
        remembered.files.retain(|file| file.path != path);
        let excess = (remembered.files.len() + 1).saturating_sub(MAX_REMEMBERED);
        remembered.files.drain(..excess);
        remembered.files.push(Digested {
            path,
            bytes,
            modified_ns,
            sha256: sha256.clone(),
        });
        if let Err(error) = self.write(&remembered) {
            tracing::warn!(path = %self.path.display(), %error, "cannot remember the fingerprint of a model file");
        }
        Ok(sha256)
    }

    fn read(&self) -> Remembered {
        std::fs::read(&self.path)
            .ok()
            .and_then(|bytes| serde_json::from_slice(&bytes).ok())
            .unwrap_or_default()
    }

    fn write(&self, remembered: &Remembered) -> io::Result<()> {
        let new = self.path.with_extension("new");
        std::fs::write(&new, serde_json::to_vec(remembered)?)?;
        std::fs::rename(&new, &self.path)
    }
}

#[cfg(test)]
mod tests;
