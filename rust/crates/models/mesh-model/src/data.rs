//! The bytes of tensors: a range of a file, bytes in memory, or a matrix that lies scattered.

use std::borrow::Cow;
use std::io;
use std::path::PathBuf;

use crate::file::{FileError, ModelFile};
use crate::gather::Gather;

/// A range of a file that has not been read yet, or bytes in memory.
#[derive(Debug, Clone, Copy)]
pub struct Data<'a>(DataSource<'a>);

#[derive(Debug, Clone, Copy)]
enum DataSource<'a> {
    File {
        file: &'a ModelFile,
        at: u64,
        len: usize,
    },
    Memory(&'a [u8]),
    /// Bytes `at..at + len` of a matrix that lies scattered.
    Gathered {
        gather: &'a Gather,
        files: &'a [ModelFile],
        at: usize,
        len: usize,
    },
}

impl ModelFile {
    /// The bytes at `at`, which were checked to lie within the file as it was when it was opened.
    pub(crate) fn data(&self, at: u64, len: usize) -> Data<'_> {
        Data(DataSource::File {
            file: self,
            at,
            len,
        })
    }
}

impl<'a> Data<'a> {
    pub(crate) fn gathered(gather: &'a Gather, files: &'a [ModelFile], len: usize) -> Self {
        Data(DataSource::Gathered {
            gather,
            files,
            at: 0,
            len,
        })
    }

    /// The bytes of a range of which every piece lies all over the file, for a caller that would read it piece
    /// by piece. `None` for all others.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn gather(&self) -> Result<Option<Vec<u8>>, FileError> {
        match self.0 {
            DataSource::Gathered { gather, .. } if gather.crosses_rows() => {
                self.read().map(|bytes| Some(bytes.into_owned()))
            }
            _ => Ok(None),
        }
    }

    /// Length of the range in bytes.
    pub fn len(&self) -> usize {
        match self.0 {
            DataSource::File { len, .. } | DataSource::Gathered { len, .. } => len,
            DataSource::Memory(bytes) => bytes.len(),
        }
    }

    /// True if it is empty.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Offset of the first byte in the file; of a matrix that lies scattered, of its first element.
    pub fn offset(&self) -> u64 {
        match self.0 {
            DataSource::File { at, .. } => at,
            DataSource::Memory(_) => 0,
            DataSource::Gathered { gather, .. } => gather.offset(),
        }
    }

    /// Reads all bytes of the range.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn read(&self) -> Result<Cow<'a, [u8]>, FileError> {
        match self.0 {
            DataSource::Memory(bytes) => Ok(Cow::Borrowed(bytes)),
            DataSource::File { len, .. } | DataSource::Gathered { len, .. } => {
                let mut out = vec![0; len];
                self.read_at(0, &mut out)?;
                Ok(Cow::Owned(out))
            }
        }
    }

    /// Fills `out` with the bytes from `at` on.
    ///
    /// # Errors
    /// If the file cannot be read, or there are not so many.
    pub fn read_at(&self, at: usize, out: &mut [u8]) -> Result<(), FileError> {
        let within = at
            .checked_add(out.len())
            .is_some_and(|end| end <= self.len());
        let outside = || FileError::Read {
            path: PathBuf::new(),
            at: at as u64,
            len: out.len() as u64,
            source: io::ErrorKind::UnexpectedEof.into(),
        };
        if !within {
            return Err(outside());
        }
        match self.0 {
            DataSource::File { file, at: from, .. } => file.read_at(from + at as u64, out),
            DataSource::Memory(bytes) => {
                out.copy_from_slice(&bytes[at..at + out.len()]);
                Ok(())
            }
            DataSource::Gathered {
                gather,
                files,
                at: from,
                ..
            } => gather.read_at(files, from + at, out),
        }
    }

    /// A part of the range; `None` if it does not lie within.
    pub fn part(&self, at: usize, len: usize) -> Option<Data<'a>> {
        let end = at.checked_add(len).filter(|end| *end <= self.len())?;
        Some(Data(match self.0 {
            DataSource::Memory(bytes) => DataSource::Memory(&bytes[at..end]),
            DataSource::File { file, at: from, .. } => DataSource::File {
                file,
                at: from + at as u64,
                len,
            },
            DataSource::Gathered {
                gather,
                files,
                at: from,
                ..
            } => DataSource::Gathered {
                gather,
                files,
                at: from + at,
                len,
            },
        }))
    }

    /// Passes the bytes to `visit` in order, a piece at a time.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn each(&self, mut visit: impl FnMut(&[u8])) -> Result<(), FileError> {
        if let DataSource::Memory(bytes) = self.0 {
            visit(bytes);
            return Ok(());
        }
        if let Some(bytes) = self.gather()? {
            visit(&bytes);
            return Ok(());
        }
        let mut buffer = vec![0; PIECE.min(self.len())];
        let mut at = 0;
        while at < self.len() {
            let piece = &mut buffer[..PIECE.min(self.len() - at)];
            self.read_at(at, piece)?;
            visit(piece);
            at += piece.len();
        }
        Ok(())
    }
}

impl<'a> From<&'a [u8]> for Data<'a> {
    fn from(bytes: &'a [u8]) -> Self {
        Data(DataSource::Memory(bytes))
    }
}

/// Enough to make a system call cheap, little enough for a cache.
const PIECE: usize = 1 << 20;
