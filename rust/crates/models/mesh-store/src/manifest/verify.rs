//! Checks of files against their manifest.

use std::io;
use std::num::NonZero;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::build::Progress;
use super::{ManifestFile, Piece};

/// Differences between a file and its manifest.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages name the fields")]
pub enum VerifyError {
    /// The file could not be read.
    #[error("cannot read {}: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    /// The file has another length.
    #[error("{} has {found} bytes, its manifest says {wanted}: it is cut short or another file", path.display())]
    Length {
        path: PathBuf,
        found: u64,
        /// The length in the manifest.
        wanted: u64,
    },
    /// A piece has other bytes.
    #[error("{}", piece_message(path, *piece, *offset, *bytes))]
    Piece {
        /// The file, as the manifest names it.
        path: String,
        piece: u32,
        /// Position of the piece in the file.
        offset: u64,
        /// Length of the piece in bytes.
        bytes: u32,
    },
}

fn piece_message(path: &str, piece: u32, offset: u64, bytes: u32) -> String {
    let end = offset + u64::from(bytes);
    format!(
        "piece {piece} of {path} (bytes {offset} to {end}) does not have the SHA-256 that the manifest says: it is damaged or \
         was altered"
    )
}

impl ManifestFile {
    /// Checks received bytes against piece `piece` of this file.
    ///
    /// # Errors
    /// If they do not match.
    pub fn check_piece(&self, piece: u32, bytes: &[u8]) -> Result<(), VerifyError> {
        match self.pieces.get(piece as usize) {
            Some(wanted) if wanted.is(bytes) => Ok(()),
            wanted => Err(self.bad(piece, wanted)),
        }
    }

    /// The error for a piece that does not match.
    pub(crate) fn bad(&self, piece: u32, wanted: Option<&Piece>) -> VerifyError {
        VerifyError::Piece {
            path: self.path.clone(),
            piece,
            offset: wanted.map_or(self.bytes, |piece| piece.offset),
            bytes: wanted.map_or(0, |piece| piece.bytes),
        }
    }

    /// Reads those `pieces` of the file at `path` and gives the indices of the bad ones, ascending. Several
    /// threads; a piece whose index means none is bad.
    ///
    /// # Errors
    /// If the file cannot be read, or has another length.
    pub fn bad_pieces(
        &self,
        path: &Path,
        pieces: &[u32],
        progress: Progress<'_>,
    ) -> Result<Vec<u32>, VerifyError> {
        let failed = |source| VerifyError::Read {
            path: path.into(),
            source,
        };
        let file = mesh_model::file::open_regular(path).map_err(failed)?;
        let found = file.metadata().map_err(failed)?.len();
        if found != self.bytes {
            return Err(VerifyError::Length {
                path: path.into(),
                found,
                wanted: self.bytes,
            });
        }
        let next = AtomicUsize::new(0);
        let stop = AtomicBool::new(false);
        let bad = Mutex::new(Vec::new());
        let work = || -> io::Result<()> {
            let mut buffer = Vec::new();
            while let Some(&index) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                let piece = self.pieces.get(index as usize);
                let whole = match piece {
                    Some(piece) => {
                        buffer.resize(piece.bytes as usize, 0);
                        let read = file.read_exact_at(&mut buffer, piece.offset);
                        read.inspect_err(|_| stop.store(true, Ordering::Relaxed))?;
                        progress(piece.bytes.into());
                        piece.is(&buffer)
                    }
                    None => false,
                };
                if !whole {
                    bad.lock().expect("nobody panics with it").push(index);
                }
            }
            Ok(())
        };
        let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
        let threads = cores.min(pieces.len()).clamp(1, 8);
        let done: io::Result<Vec<()>> = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
            let done = workers.into_iter();
            done.map(|worker| worker.join().expect("reading does not panic"))
                .collect()
        });
        done.map_err(failed)?;
        let mut bad = bad.into_inner().expect("all threads have ended");
        bad.sort_unstable();
        Ok(bad)
    }

    /// Checks every piece of the file at `path`.
    ///
    /// # Errors
    /// For the first bad piece, or if the file cannot be read or has another length.
    pub fn verify(&self, path: &Path, progress: Progress<'_>) -> Result<(), VerifyError> {
        let all: Vec<u32> = (0..self.pieces.len() as u32).collect();
        match self.bad_pieces(path, &all, progress)?.first() {
            Some(&piece) => Err(self.bad(piece, self.pieces.get(piece as usize))),
            None => Ok(()),
        }
    }
}
