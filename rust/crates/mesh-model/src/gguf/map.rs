//! The memory map behind an open file, the one place with `unsafe`.

use std::fs::{File, Metadata};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use memmap2::Mmap;

use super::error::GgufError;

/// The bytes of a file, mapped read-only, or bytes in memory.
#[derive(Debug)]
pub(super) enum FileMap {
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
pub(super) struct Stamp {
    len: u64,
    modified: Option<SystemTime>,
}

impl FileMap {
    pub(super) fn open(path: &Path) -> Result<Self, GgufError> {
        let failed = |source| GgufError::Open {
            path: path.into(),
            source,
        };
        // Looked at before it is opened: to open a named pipe would wait for its writer.
        if !std::fs::metadata(path).map_err(failed)?.is_file() {
            return Err(GgufError::NotAFile { path: path.into() });
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

    pub(super) fn from_bytes(bytes: Vec<u8>) -> Self {
        FileMap::Memory(bytes)
    }

    pub(super) fn bytes(&self) -> &[u8] {
        match self {
            FileMap::Mapped { map, .. } => map,
            FileMap::Memory(bytes) => bytes,
        }
    }

    pub(super) fn path(&self) -> Option<&Path> {
        match self {
            FileMap::Mapped { path, .. } => Some(path),
            FileMap::Memory(_) => None,
        }
    }

    pub(super) fn check_unchanged(&self) -> Result<(), GgufError> {
        let FileMap::Mapped {
            path, file, stamp, ..
        } = self
        else {
            return Ok(());
        };
        let failed = |source| GgufError::Open {
            path: path.clone(),
            source,
        };
        if Stamp::of(&file.metadata().map_err(failed)?) != *stamp {
            return Err(GgufError::Changed { path: path.clone() });
        }
        Ok(())
    }

    #[cfg(unix)]
    pub(super) fn release_pages(&self) {
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
    pub(super) fn release_pages(&self) {}
}

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        Stamp {
            len: metadata.len(),
            modified: metadata.modified().ok(),
        }
    }
}
