//! The memory map behind an open file, the one place with `unsafe`.

use std::fs::{File, Metadata};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use memmap2::Mmap;

/// Why a file could not be mapped.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MapError {
    #[error("cannot open model file {}: {source}", path.display())]
    Open {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{} is not a regular file", path.display())]
    NotAFile { path: PathBuf },
    #[error("{} changed while it was in use", path.display())]
    Changed { path: PathBuf },
}

/// The bytes of a file, mapped read-only, or bytes in memory.
#[derive(Debug)]
pub(crate) enum FileMap {
    Mapped {
        path: PathBuf,
        map: Mmap,
        file: File,
        stamp: Stamp,
    },
    Memory(Vec<u8>),
}

/// What shows that a file was written to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Stamp {
    len: u64,
    modified: Option<SystemTime>,
}

impl FileMap {
    pub(crate) fn open(path: &Path) -> Result<Self, MapError> {
        let failed = |source| MapError::Open {
            path: path.into(),
            source,
        };
        // Looked at before it is opened: to open a named pipe would wait for its writer.
        if !std::fs::metadata(path).map_err(failed)?.is_file() {
            return Err(MapError::NotAFile { path: path.into() });
        }
        let file = File::open(path).map_err(failed)?;
        let stamp = Stamp::of(&file.metadata().map_err(failed)?);
        if stamp.len == 0 {
            // An empty range cannot be mapped everywhere.
            return Ok(FileMap::Memory(Vec::new()));
        }
        // SAFETY: the map is read-only, private to this struct and handed out as `&[u8]` of plain bytes, no value of which
        // is invalid. Another process may still write to the file; `Gguf::check_unchanged` says what that means.
        #[allow(unsafe_code)]
        let map = unsafe { Mmap::map(&file) }.map_err(failed)?;
        Ok(FileMap::Mapped {
            path: path.into(),
            map,
            file,
            stamp,
        })
    }

    pub(crate) fn from_bytes(bytes: Vec<u8>) -> Self {
        FileMap::Memory(bytes)
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        match self {
            FileMap::Mapped { map, .. } => map,
            FileMap::Memory(bytes) => bytes,
        }
    }

    pub(crate) fn len(&self) -> u64 {
        self.bytes().len() as u64
    }

    pub(crate) fn path(&self) -> Option<&Path> {
        match self {
            FileMap::Mapped { path, .. } => Some(path),
            FileMap::Memory(_) => None,
        }
    }

    pub(crate) fn check_unchanged(&self) -> Result<(), MapError> {
        let FileMap::Mapped {
            path, file, stamp, ..
        } = self
        else {
            return Ok(());
        };
        let failed = |source| MapError::Open {
            path: path.clone(),
            source,
        };
        if Stamp::of(&file.metadata().map_err(failed)?) != *stamp {
            return Err(MapError::Changed { path: path.clone() });
        }
        Ok(())
    }

    #[cfg(unix)]
    pub(crate) fn release_pages(&self) {
        if let FileMap::Mapped { map, path, .. } = self {
            // SAFETY: the map is of a file and read-only, so that the pages dropped are read from the file again; the bytes
            // behind a borrowed slice stay the same.
            #[allow(unsafe_code)]
            let released = unsafe { map.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) };
            if let Err(error) = released {
                tracing::debug!(path = %path.display(), %error, "the pages of the model file were not released");
            }
        }
    }

    #[cfg(not(unix))]
    pub(crate) fn release_pages(&self) {}
}

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        Stamp {
            len: metadata.len(),
            modified: metadata.modified().ok(),
        }
    }
}
