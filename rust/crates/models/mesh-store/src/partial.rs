//! Files of which only some bytes are here.
//!
//! A partial file has its full length from the start, and holes where nothing was written yet: a model file
//! of which the header and some layers are present opens like a whole one. Beside it lies its *have-map*, the
//! list of the ranges that are present. The map is replaced as a whole, after its ranges have reached the
//! disk: after a kill or a power loss it may list fewer bytes than there are, never more.

mod have_map;
mod key;

use std::fs::{File, TryLockError};
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard};

use crate::digest::Digest;
use crate::error::StoreError;
use crate::files;
use crate::manifest::ManifestFile;
use crate::ranges::RangeSet;
use crate::store::Store;
pub(crate) use have_map::{HaveMap, have_path};
pub use key::PartialKey;

/// A partial file that this process alone may write. Its methods block for as long as the disk takes.
#[derive(Debug)]
pub struct PartialFile {
    store: Store,
    key: PartialKey,
    file: File,
    bytes: u64,
    wanted: u64,
    written: Mutex<Written>,
    /// Held while the have-map is written.
    flushing: Mutex<()>,
}

#[derive(Debug)]
struct Written {
    have: RangeSet,
    /// Bytes written since the have-map was.
    unflushed: u64,
}

/// Bytes after which the have-map is written: the maximum loss when the process is killed.
const FLUSH_EVERY: u64 = 16 << 20;

impl PartialFile {
    /// Opens or creates it. The caller holds the store's lock.
    pub(crate) fn open(
        store: &Store,
        key: PartialKey,
        bytes: u64,
        wanted: u64,
    ) -> Result<PartialFile, StoreError> {
        let path = store.partial_path(&key);
        let map = have_path(&path);
        let io = |action| StoreError::io(action, &path);
        let file = files::open_to_write(&path, store.owners()).map_err(io("open"))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let key = key.to_string();
                return Err(StoreError::Busy { key });
            }
            Err(TryLockError::Error(error)) => return Err(io("lock")(error)),
        }
        let length = file.metadata().map_err(io("look at"))?.len();
        // A map of an earlier file with that name does not apply to this one.
        let have = HaveMap::read(&map).filter(|map| map.bytes == bytes && length == bytes);
        let have = have.map(|map| map.ranges()).unwrap_or_default();
        if length != bytes || have.is_empty() {
            files::remove(&map).map_err(StoreError::io("remove", &map))?;
            file.set_len(0).map_err(io("empty"))?;
            file.set_len(bytes).map_err(io("extend"))?;
            file.sync_all().map_err(io("write"))?;
            files::sync_parent(&path).map_err(io("write"))?;
        }
        let partial = PartialFile {
            store: store.clone(),
            key,
            file,
            bytes,
            wanted: wanted.min(bytes),
            written: Mutex::new(Written { have, unflushed: 0 }),
            flushing: Mutex::default(),
        };
        partial.flush()?;
        Ok(partial)
    }

    /// Identity of the file.
    pub fn key(&self) -> PartialKey {
        self.key
    }

    /// Path of the file until it is complete.
    pub fn path(&self) -> PathBuf {
        self.store.partial_path(&self.key)
    }

    /// Length of the whole file.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Ranges that have been written; not all of them may be on disk.
    pub fn have(&self) -> RangeSet {
        self.written().have.clone()
    }

    /// Ranges that have not been written.
    pub fn missing(&self) -> Vec<Range<u64>> {
        self.written().have.missing(0..self.bytes)
    }

    /// True if all bytes of the file have been written.
    pub fn is_complete(&self) -> bool {
        self.written().have.contains(&(0..self.bytes))
    }

    /// Writes `data` at `offset`; the range then counts as present. Every 16 MiB the file is synced to disk.
    ///
    /// # Errors
    /// If it does not lie in the file, or the disk fails.
    pub fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), StoreError> {
        let range = self.within(offset, data.len() as u64)?;
        self.file
            .write_all_at(data, offset)
            .map_err(StoreError::io("write", &self.path()))?;
        let mut written = self.written();
        written.have.insert(range);
        written.unflushed += data.len() as u64;
        let due = written.unflushed >= FLUSH_EVERY;
        drop(written);
        match due {
            true => self.flush(),
            false => Ok(()),
        }
    }

    /// Reads the bytes of `range`; `None` unless all of them are present.
    ///
    /// # Errors
    /// If it does not lie in the file, or the disk fails.
    pub fn read_at(&self, range: Range<u64>) -> Result<Option<Vec<u8>>, StoreError> {
        let len = range.end.saturating_sub(range.start);
        self.within(range.start, len)?;
        if !self.written().have.contains(&range) {
            return Ok(None);
        }
        let mut bytes = vec![0; len as usize];
        self.file
            .read_exact_at(&mut bytes, range.start)
            .map_err(StoreError::io("read", &self.path()))?;
        Ok(Some(bytes))
    }

    /// Counts `range` as absent again, on disk as well: its bytes turned out to be wrong.
    ///
    /// # Errors
    /// If the disk fails.
    pub fn forget(&self, range: Range<u64>) -> Result<(), StoreError> {
        self.written().have.remove(range);
        self.flush()
    }

    /// Checks the pieces that are present against `file`, drops the bad ones and returns their indices.
    ///
    /// # Errors
    /// If the file has another length, or the disk fails.
    pub fn repair(&self, file: &ManifestFile) -> Result<Vec<u32>, StoreError> {
        let present = file.pieces_in(&self.have());
        let bad = file.bad_pieces(&self.path(), &present, &|_| ())?;
        for &index in &bad {
            let range = file.pieces[index as usize].range();
            self.written().have.remove(range);
        }
        if !bad.is_empty() {
            self.flush()?;
        }
        Ok(bad)
    }

    /// Syncs everything written so far to disk, and then the have-map.
    ///
    /// # Errors
    /// If the disk fails.
    pub fn flush(&self) -> Result<(), StoreError> {
        let _one = self.flushing.lock().expect("nobody panics with it");
        let (have, unflushed) = {
            let written = self.written();
            (written.have.clone(), written.unflushed)
        };
        let path = self.path();
        if unflushed > 0 {
            let synced = self.file.sync_data();
            synced.map_err(StoreError::io("write", &path))?;
        }
        let map = HaveMap::new(self.bytes, self.wanted, &have);
        let path = have_path(&path);
        let json = serde_json::to_vec(&map).expect("numbers are JSON");
        files::replace(&path, &self.store.tmp(), &json).map_err(StoreError::io("write", &path))?;
        let mut written = self.written();
        written.unflushed = written.unflushed.saturating_sub(unflushed);
        Ok(())
    }

    /// Makes it a blob if it is complete and has the digest of its key. The digest is computed from the disk,
    /// at a good second per gigabyte. A file with another digest is discarded; if its manifest is known,
    /// [`PartialFile::repair`] keeps the good pieces.
    ///
    /// # Errors
    /// If it is not whole or is another file, or the disk fails.
    pub fn complete(self) -> Result<Digest, StoreError> {
        self.complete_checked(None)
    }

    /// The same for a file of which every piece was compared with `file` before it was written.
    /// [`StoreError::Mismatch`] means then that `file` contradicts itself: where the disk gives back other
    /// pieces than it got, only those are forgotten, and the error is [`StoreError::Spoiled`].
    ///
    /// # Errors
    /// As [`PartialFile::complete`].
    pub fn complete_as(self, file: &ManifestFile) -> Result<Digest, StoreError> {
        self.complete_checked(Some(file))
    }

    fn digest_on_disk(&self) -> Result<Digest, StoreError> {
        // This open file, not another one at the same path.
        let mut reader = &self.file;
        reader
            .seek(SeekFrom::Start(0))
            .and_then(|_| Digest::of_reader(reader))
            .map_err(StoreError::io("read", &self.path()))
    }

    /// Its digest; `wanted`, unless the disk gives the pieces of `file` back as they are, and the same other
    /// digest twice.
    fn digest_of_pieces(&self, file: &ManifestFile, wanted: Digest) -> Result<Digest, StoreError> {
        let found = self.digest_on_disk()?;
        if found == wanted {
            return Ok(found);
        }
        let pieces = self.repair(file)?.len();
        match self.digest_on_disk()? {
            again if pieces == 0 && (again == found || again == wanted) => Ok(again),
            _ => Err(StoreError::Spoiled {
                key: self.key.to_string(),
                pieces,
            }),
        }
    }

    fn complete_checked(self, file: Option<&ManifestFile>) -> Result<Digest, StoreError> {
        let path = self.path();
        let missing = self.bytes - self.written().have.bytes();
        if missing > 0 {
            self.flush()?;
            return Err(StoreError::Incomplete {
                key: self.key.to_string(),
                missing,
            });
        }
        let synced = self.file.sync_all();
        synced.map_err(StoreError::io("write", &path))?;
        let wanted = match self.key {
            PartialKey::Blob(digest) => Some(digest),
            PartialKey::Source(_) => file.map(|file| file.sha256),
        };
        let found = match (file, wanted) {
            (Some(file), Some(wanted)) => self.digest_of_pieces(file, wanted)?,
            _ => self.digest_on_disk()?,
        };
        if let Some(wanted) = wanted.filter(|wanted| *wanted != found) {
            self.forget(0..self.bytes)?;
            return Err(StoreError::Mismatch {
                key: self.key.to_string(),
                found,
                wanted,
            });
        }
        let blob = self.store.blob_path(&found);
        let _lock = self.store.lock()?;
        let finish = || -> io::Result<()> {
            // Blobs do not change; a mode without write permission prevents accidents.
            self.file
                .set_permissions(std::fs::Permissions::from_mode(0o444))?;
            // Over a blob that is there already: it has the same bytes.
            let hashed = self.file.metadata()?;
            let there = std::fs::symlink_metadata(&path)?;
            if (there.dev(), there.ino()) != (hashed.dev(), hashed.ino()) {
                return Err(io::Error::other(
                    "another file lies there than the one that was written: see who can write to the store's folder",
                ));
            }
            std::fs::rename(&path, &blob)?;
            files::sync_parent(&blob)?;
            files::remove(&have_path(&path))?;
            files::sync_parent(&path)
        };
        finish().map_err(StoreError::io("store", &blob))?;
        Ok(found)
    }

    /// Removes the file and its have-map.
    ///
    /// # Errors
    /// If the disk fails.
    pub fn discard(self) -> Result<(), StoreError> {
        let path = self.path();
        let _lock = self.store.lock()?;
        files::remove(&have_path(&path))
            .and_then(|()| files::remove(&path))
            .map_err(StoreError::io("remove", &path))
    }

    fn within(&self, offset: u64, len: u64) -> Result<Range<u64>, StoreError> {
        let end = offset.saturating_add(len);
        match end <= self.bytes {
            true => Ok(offset..end),
            false => Err(StoreError::Outside {
                offset,
                end,
                bytes: self.bytes,
            }),
        }
    }

    fn written(&self) -> MutexGuard<'_, Written> {
        self.written.lock().expect("nobody panics with it")
    }
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init)]
mod tests;
