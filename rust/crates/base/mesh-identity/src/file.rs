//! Key files: written once, for their owner only.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use mesh_base::files;
use zeroize::Zeroizing;

use crate::key::{IdentityKey, KeyError};

/// Errors of key files.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeyFileError {
    /// A file operation failed.
    #[error("cannot {action} the identity key {}: {source}", path.display())]
    Io {
        /// The operation that failed.
        action: &'static str,
        /// Path of the file.
        path: PathBuf,
        /// Error from the operating system.
        source: io::Error,
    },
    /// The file holds no key.
    #[error("the identity key {} is damaged: {reason}; restore it from a backup, or let the node join anew as another one (`mesh-worker new-identity`)", path.display())]
    Damaged {
        /// Path of the file.
        path: PathBuf,
        /// Description of the damage.
        reason: KeyError,
    },
}

impl IdentityKey {
    /// Reads a key file; `None` if it does not exist.
    ///
    /// # Errors
    /// If it cannot be read or holds no key. It is never replaced.
    pub fn load(path: &Path) -> Result<Option<Self>, KeyFileError> {
        let failed = |source| KeyFileError::Io {
            action: "read",
            path: path.to_owned(),
            source,
        };
        let file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(failed(source)),
        };
        let mut text = Zeroizing::new(String::new());
        file.take(LONGEST_FILE)
            .read_to_string(&mut text)
            .map_err(failed)?;
        let key = Self::from_pem(&text).map_err(|reason| KeyFileError::Damaged {
            path: path.to_owned(),
            reason,
        })?;
        Ok(Some(key))
    }

    /// The key in this file; a missing one is created with mode 0600. Of two processes that create it at once, both get
    /// the same key.
    ///
    /// # Errors
    /// As [`load`](Self::load); or if it cannot be written.
    pub fn load_or_create(path: &Path) -> Result<Self, KeyFileError> {
        if let Some(key) = Self::load(path)? {
            return Ok(key);
        }
        let key = Self::generate();
        match files::create_new(path, key.to_pem().as_bytes(), files::PRIVATE) {
            Ok(true) => Ok(key),
            Ok(false) => match Self::load(path)? {
                Some(key) => Ok(key),
                // It was removed again at this very moment.
                None => Self::load_or_create(path),
            },
            Err(source) => Err(KeyFileError::Io {
                action: "write",
                path: path.to_owned(),
                source,
            }),
        }
    }
}

/// A key file has some 130 bytes.
const LONGEST_FILE: u64 = 64 << 10;

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_key_is_made_once_and_is_readable_by_its_owner_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("identity.key");
        assert!(IdentityKey::load(&path).unwrap().is_none());
        let threads = [(); 4].map(|()| {
            let path = path.clone();
            std::thread::spawn(move || IdentityKey::load_or_create(&path).unwrap().node_id())
        });
        let ids = threads.map(|thread| thread.join().unwrap());
        assert!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_damaged_key_is_named_and_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("identity.key");
        let key = IdentityKey::load_or_create(&path).unwrap();
        let whole = key.to_pem();
        for damaged in [
            "",
            "junk",
            &whole[..whole.len() / 2],
            "-----BEGIN PRIVATE KEY-----",
        ] {
            std::fs::write(&path, damaged).unwrap();
            let error = IdentityKey::load_or_create(&path).unwrap_err().to_string();
            assert!(error.contains("identity.key is damaged"), "{error}");
            assert_eq!(std::fs::read_to_string(&path).unwrap(), damaged);
        }
    }
}
