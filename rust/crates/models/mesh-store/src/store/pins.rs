//! Pins: models in use, which are not evicted.

use std::fs::{File, TryLockError};
use std::io;
use std::path::PathBuf;
use std::time::SystemTime;

use super::root::Store;
use crate::digest::Digest;
use crate::error::StoreError;
use crate::files;

/// Keeps a model from being evicted as long as it lives, also over processes.
#[derive(Debug)]
pub struct Pin {
    fingerprint: Digest,
    /// Locked shared.
    _file: File,
}

impl Pin {
    /// Fingerprint of the pinned model.
    pub fn fingerprint(&self) -> Digest {
        self.fingerprint
    }
}

impl Store {
    /// Keeps the model from being evicted, and notes that it is used now.
    ///
    /// # Errors
    /// If the store does not have it, or the disk fails.
    pub fn pin(&self, fingerprint: &Digest) -> Result<Pin, StoreError> {
        let path = self.pin_path(fingerprint);
        let _lock = self.lock()?;
        if !self.manifest_path(fingerprint).is_file() {
            return Err(StoreError::NoModel {
                fingerprint: *fingerprint,
            });
        }
        let pin = || -> io::Result<File> {
            let file = files::open_own(&path, self.owners())?;
            // Exclusive locks are only held for a moment, and under the store's lock.
            file.lock_shared()?;
            file.set_modified(SystemTime::now())?;
            Ok(file)
        };
        Ok(Pin {
            fingerprint: *fingerprint,
            _file: pin().map_err(StoreError::io("lock", &path))?,
        })
    }

    /// Time of the model's last pin, or else of its arrival.
    pub(crate) fn last_used(&self, fingerprint: &Digest) -> SystemTime {
        let time = |path: PathBuf| std::fs::metadata(path).and_then(|found| found.modified());
        time(self.pin_path(fingerprint))
            .or_else(|_| time(self.manifest_path(fingerprint)))
            .unwrap_or(SystemTime::UNIX_EPOCH)
    }

    /// True if a process has the model loaded. The caller holds the store's lock; otherwise this check would
    /// look like a pin to others.
    pub(crate) fn is_pinned(&self, fingerprint: &Digest) -> Result<bool, StoreError> {
        let path = self.pin_path(fingerprint);
        if !path.exists() {
            return Ok(false);
        }
        let opened = files::open_own(&path, self.owners());
        let file = opened.map_err(StoreError::io("open", &path))?;
        match file.try_lock() {
            Ok(()) => Ok(false),
            Err(TryLockError::WouldBlock) => Ok(true),
            Err(TryLockError::Error(error)) => Err(StoreError::io("lock", &path)(error)),
        }
    }
}
