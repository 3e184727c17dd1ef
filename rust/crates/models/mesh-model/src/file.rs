//! Model files, read piece by piece.
//!
//! Files are never mapped into memory: if a mapped file is truncated, or a disk or a server fails, the next
//! access ends the process with SIGBUS. A read fails with an error that concerns one file only.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use sha2::{Digest, Sha256};

/// Reasons why a file could not be read.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages name the fields")]
pub enum FileError {
    /// The file could not be opened.
    #[error("cannot open model file {}: {source}", path.display())]
    Open { path: PathBuf, source: io::Error },
    /// A folder, a socket, a device.
    #[error("{} is not a regular file: give the path of a model file", path.display())]
    NotAFile { path: PathBuf },
    /// The disk, the file system or a file server failed, or the file was cut short.
    #[error(
        "cannot read {len} bytes of {} at byte {at}: {source}; check the disk and whether somebody writes to the file, \
         then fetch it again", path.display()
    )]
    Read {
        path: PathBuf,
        /// The offset of the first byte.
        at: u64,
        /// Number of bytes that were asked for.
        len: u64,
        source: io::Error,
    },
    /// The file was written to or replaced since it was opened.
    #[error(
        "{} changed while it was read: write model files under another name and rename them when they are whole",
        path.display()
    )]
    Changed { path: PathBuf },
}

/// Opens a regular file for reading. Does not block on a named pipe at the path, even if it has just replaced
/// the file.
///
/// # Errors
/// If it cannot be opened, or is a folder, a pipe, a device or a socket ([`io::ErrorKind::InvalidInput`]).
pub fn open_regular(path: &Path) -> io::Result<File> {
    let regular = |metadata: Metadata| match metadata.is_file() {
        true => Ok(()),
        false => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "it is not a regular file",
        )),
    };
    // Opening a device can have effects. The opened file may differ from the one that was examined.
    regular(std::fs::metadata(path)?)?;
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    regular(file.metadata()?)?;
    Ok(file)
}

/// The bytes of the regular file at `path`; `None` if nothing is there.
///
/// # Errors
/// As [`open_regular`] and [`read_all`].
pub fn read_limited(path: &Path, limit: u64) -> io::Result<Option<Vec<u8>>> {
    match open_regular(path) {
        Ok(file) => read_all(file, limit).map(Some),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// The bytes of `file`.
///
/// # Errors
/// If it has over `limit` bytes ([`io::ErrorKind::FileTooLarge`]), or cannot be read.
pub fn read_all(file: File, limit: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    // It may grow while it is read.
    if file.metadata()?.len() <= limit {
        file.take(limit + 1).read_to_end(&mut bytes)?;
        if bytes.len() as u64 <= limit {
            return Ok(bytes);
        }
    }
    let reason = format!("it has more than {limit} bytes");
    Err(io::Error::new(io::ErrorKind::FileTooLarge, reason))
}

/// SHA-256 of all bytes of `reader`, at a good second per gigabyte.
///
/// # Errors
/// If reading fails.
pub fn sha256(mut reader: impl Read) -> io::Result<[u8; 32]> {
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match reader.read(&mut buffer) {
            Ok(0) => return Ok(hasher.finalize().into()),
            Ok(n) => hasher.update(&buffer[..n]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// True if the name of the file at `path` ends with a dot and `extension`, in upper or lower case.
pub fn has_extension(path: &Path, extension: &str) -> bool {
    path.extension()
        .is_some_and(|found| found.eq_ignore_ascii_case(extension))
}

/// Has `data` write the `bytes` bytes of a tensor to `out`.
///
/// # Errors
/// If writing fails, or `data` writes more or fewer bytes.
pub(crate) fn write_tensor<W: Write>(
    out: &mut W,
    name: &str,
    bytes: u64,
    data: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> io::Result<()> {
    let mut counted = Counted {
        inner: out,
        written: 0,
    };
    data(&mut counted)?;
    match counted.written {
        written if written == bytes => Ok(()),
        written => Err(io::Error::other(format!(
            "tensor {name} takes {bytes} bytes, but {written} were written"
        ))),
    }
}

/// Counts the bytes that are written through it.
struct Counted<'a, W> {
    inner: &'a mut W,
    written: u64,
}

impl<W: Write> Write for Counted<'_, W> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let n = self.inner.write(data)?;
        self.written += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// An open file, or bytes in memory.
#[derive(Debug)]
pub(crate) enum ModelFile {
    File {
        path: PathBuf,
        file: File,
        stamp: Stamp,
    },
    Memory(Vec<u8>),
}

/// Metadata that shows that a file was written to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Stamp {
    len: u64,
    modified: Option<SystemTime>,
}

impl ModelFile {
    pub(crate) fn open(path: &Path) -> Result<Self, FileError> {
        let failed = |source: io::Error| match source.kind() {
            io::ErrorKind::InvalidInput => FileError::NotAFile { path: path.into() },
            _ => FileError::Open {
                path: path.into(),
                source,
            },
        };
        let file = open_regular(path).map_err(failed)?;
        let stamp = Stamp::of(&file.metadata().map_err(failed)?);
        Ok(ModelFile::File {
            path: path.into(),
            file,
            stamp,
        })
    }

    pub(crate) fn from_bytes(bytes: Vec<u8>) -> Self {
        ModelFile::Memory(bytes)
    }

    /// All bytes, if they are in memory.
    pub(crate) fn in_memory(&self) -> Option<&[u8]> {
        match self {
            ModelFile::File { .. } => None,
            ModelFile::Memory(bytes) => Some(bytes),
        }
    }

    /// Length of the file at opening.
    pub(crate) fn len(&self) -> u64 {
        match self {
            ModelFile::File { stamp, .. } => stamp.len,
            ModelFile::Memory(bytes) => bytes.len() as u64,
        }
    }

    pub(crate) fn path(&self) -> Option<&Path> {
        match self {
            ModelFile::File { path, .. } => Some(path),
            ModelFile::Memory(_) => None,
        }
    }

    /// Fills `out` with the bytes from byte `at` on.
    pub(crate) fn read_at(&self, at: u64, out: &mut [u8]) -> Result<(), FileError> {
        match self {
            ModelFile::File { path, file, .. } => {
                file.read_exact_at(out, at)
                    .map_err(|source| FileError::Read {
                        path: path.clone(),
                        at,
                        len: out.len() as u64,
                        source: match source.kind() {
                            io::ErrorKind::UnexpectedEof => {
                                io::Error::new(source.kind(), "the file ends before them")
                            }
                            _ => source,
                        },
                    })
            }
            ModelFile::Memory(bytes) => {
                let start = usize::try_from(at).unwrap_or(usize::MAX);
                let found = bytes.get(start..).and_then(|rest| rest.get(..out.len()));
                let found = found.ok_or_else(|| FileError::Read {
                    path: PathBuf::new(),
                    at,
                    len: out.len() as u64,
                    source: io::ErrorKind::UnexpectedEof.into(),
                })?;
                out.copy_from_slice(found);
                Ok(())
            }
        }
    }

    /// Makes `head`, the first bytes of the file, `len` bytes long.
    pub(crate) fn lengthen(&self, head: &mut Vec<u8>, len: usize) -> Result<(), FileError> {
        let from = head.len();
        head.resize(len.max(from), 0);
        self.read_at(from as u64, &mut head[from..])
    }

    /// Fails if the file's length or time of change is no longer the one at opening.
    pub(crate) fn check_unchanged(&self) -> Result<(), FileError> {
        let ModelFile::File { path, file, stamp } = self else {
            return Ok(());
        };
        let metadata = file.metadata().map_err(|source| FileError::Open {
            path: path.clone(),
            source,
        })?;
        match Stamp::of(&metadata) == *stamp {
            true => Ok(()),
            false => Err(FileError::Changed { path: path.clone() }),
        }
    }
}

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        Stamp {
            len: metadata.len(),
            modified: metadata.modified().ok(),
        }
    }
}
