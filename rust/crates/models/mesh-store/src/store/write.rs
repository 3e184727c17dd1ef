//! Files that arrive in a store.

use std::io;
use std::path::PathBuf;

use super::root::{Store, WORK};
use crate::digest::Digest;
use crate::error::StoreError;
use crate::files;
use crate::partial::{HaveMap, PartialFile, PartialKey, have_path};

/// Outcome of [`Store::begin`].
#[derive(Debug)]
pub enum Begun {
    /// Path of the file, which is complete.
    Whole(PathBuf),
    /// The file, to write its missing ranges.
    Partial(PartialFile),
}

/// A mark of work in progress; see [`Store::work`].
#[derive(Debug)]
pub struct Work {
    /// Locked.
    _file: tempfile::NamedTempFile,
}

impl Store {
    /// Marks work in progress until it is dropped: files that arrive meanwhile do not count as leftovers.
    ///
    /// # Errors
    /// If the disk fails.
    pub fn work(&self) -> Result<Work, StoreError> {
        let tmp = self.tmp();
        let work = || -> io::Result<tempfile::NamedTempFile> {
            let _lock = self.lock().map_err(io::Error::other)?;
            let file = tempfile::Builder::new().prefix(WORK).tempfile_in(&tmp)?;
            file.as_file().lock()?;
            Ok(file)
        };
        let file = work().map_err(StoreError::io("write to", &tmp))?;
        Ok(Work { _file: file })
    }

    /// Begins or continues a file of `bytes` bytes, of which `wanted` are needed. Makes room for them: see
    /// [`Store::admit`]. Pin a model before fetching it, so that it is not evicted for its own files.
    ///
    /// # Errors
    /// If there is no room, another process writes the same file, or the disk fails.
    pub fn begin(&self, key: PartialKey, bytes: u64, wanted: u64) -> Result<Begun, StoreError> {
        let _lock = self.lock()?;
        if let PartialKey::Blob(digest) = key
            && let Some(path) = self.blob(&digest)
        {
            return Ok(Begun::Whole(path));
        }
        let have = HaveMap::read(&have_path(&self.partial_path(&key)));
        let have = have.map_or(0, |map| map.ranges().bytes());
        self.make_room(wanted.saturating_sub(have), Some(key))?;
        PartialFile::open(self, key, bytes, wanted).map(Begun::Partial)
    }

    /// Stores a small file and returns its digest.
    ///
    /// # Errors
    /// If there is no room, or the disk fails.
    pub fn put(&self, bytes: &[u8]) -> Result<Digest, StoreError> {
        let digest = Digest::of(bytes);
        let _lock = self.lock()?;
        if self.blob(&digest).is_none() {
            let path = self.blob_path(&digest);
            self.make_room(bytes.len() as u64, None)?;
            files::replace(&path, &self.tmp(), bytes).map_err(StoreError::io("write", &path))?;
        }
        Ok(digest)
    }
}
