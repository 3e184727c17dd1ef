//! Fingerprints of models in folders, remembered between restarts.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use mesh_model::file::open_regular;
use mesh_model::gguf::split;
use mesh_model::hf::{Folder, is_hugging_face};
use serde::{Deserialize, Serialize};

use super::stamp::{MAX_INDEX, MAX_REMEMBERED, Stamp};
use crate::digest::Digest;
use crate::files;

/// Digests of files that were hashed before, kept in a small JSON file so that a restart need not read
/// gigabytes again. A digest counts only as long as the file's path, length and time of change are the same.
#[derive(Debug)]
pub struct FingerprintCache {
    pub(super) path: PathBuf,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Remembered {
    files: Vec<Digested>,
}

#[derive(Debug, Clone, Serialize, Deserialize, PartialEq, Eq)]
struct Digested {
    #[serde(flatten)]
    stamp: Stamp,
    sha256: String,
}

impl FingerprintCache {
    /// A cache in the file at `path`, which need not exist.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        FingerprintCache { path: path.into() }
    }

    /// The fingerprint of the model at `path` ([`mesh_model::Model::fingerprint`]), remembered or computed. A
    /// cache that cannot be read or written only costs time.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub fn fingerprint(&self, path: &Path) -> io::Result<String> {
        self.fingerprint_until(path, &AtomicBool::new(false))
    }

    /// Like [`FingerprintCache::fingerprint`], but fails once `stop` is set.
    ///
    /// # Errors
    /// If a file cannot be read, and when it is given up.
    pub fn fingerprint_until(&self, path: &Path, stop: &AtomicBool) -> io::Result<String> {
        if let Some(parts) = split::parts(path) {
            let digests = parts.iter().map(|part| self.digest(part, stop));
            let digests: io::Result<Vec<String>> = digests.collect();
            return Ok(split::fingerprint(&digests?));
        }
        if !is_hugging_face(path) {
            return self.digest(path, stop);
        }
        let folder = Folder::open(path).map_err(io::Error::other)?;
        let fingerprint = folder.fingerprint(|path| self.digest(path, stop));
        fingerprint.map_err(io::Error::other)
    }

    /// SHA-256 of one file in hexadecimal, whatever lies around it.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn file(&self, path: &Path) -> io::Result<String> {
        self.digest(path, &AtomicBool::new(false))
    }

    /// SHA-256 of one file in hexadecimal.
    fn digest(&self, path: &Path, stop: &AtomicBool) -> io::Result<String> {
        let stamp = Stamp::of(path)?;
        let mut remembered = self.read();
        if let Some(known) = remembered.files.iter().find(|file| file.stamp == stamp) {
            return Ok(known.sha256.clone());
        }
        let file = open_regular(&stamp.path)?;
        let sha256 = Digest::of_reader(Stoppable { file, stop })?.to_string();
        if Stamp::of(path)? != stamp {
            return Err(io::Error::other("it changed while it was read"));
        }
        remembered
            .files
            .retain(|file| file.stamp.path != stamp.path);
        let excess = (remembered.files.len() + 1).saturating_sub(MAX_REMEMBERED);
        remembered.files.drain(..excess);
        remembered.files.push(Digested {
            stamp,
            sha256: sha256.clone(),
        });
        if let Err(error) = self.write(&remembered) {
            tracing::warn!(path = %self.path.display(), %error, "cannot remember the fingerprint of a model file");
        }
        Ok(sha256)
    }

    fn read(&self) -> Remembered {
        let json = files::read_limited(&self.path, MAX_INDEX).ok().flatten();
        json.and_then(|json| serde_json::from_slice(&json).ok())
            .unwrap_or_default()
    }

    fn write(&self, remembered: &Remembered) -> io::Result<()> {
        let parent = self.path.parent().unwrap_or(Path::new("."));
        files::replace(&self.path, parent, &serde_json::to_vec(remembered)?)
    }
}

/// A reader that fails once it is told to stop.
struct Stoppable<'a> {
    file: File,
    stop: &'a AtomicBool,
}

impl Read for Stoppable<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.stop.load(Ordering::Relaxed) {
            true => Err(io::Error::other("nobody needs it any more")),
            false => self.file.read(buffer),
        }
    }
}
