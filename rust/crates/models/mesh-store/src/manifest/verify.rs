//! Checks of files against their manifest.

use std::io;
use std::num::NonZero;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::ManifestFile;
use super::build::Progress;

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
        wanted: u64,
    },
    /// A piece has other bytes.
    #[error("{}", piece_message(path, *piece, *offset, *bytes))]
    Piece {
        /// The file, as the manifest names it.
        path: String,
        piece: u32,
        offset: u64,
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
    /// The error for a piece that does not match.
    pub fn bad_piece(&self, piece: u32) -> VerifyError {
        let wanted = self.pieces.get(piece as usize);
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
        let work = || -> io::Result<Vec<u32>> {
            let (mut bad, mut buffer) = (Vec::new(), Vec::new());
            while let Some(&index) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                let Some(piece) = self.pieces.get(index as usize) else {
                    bad.push(index);
                    continue;
                };
                buffer.resize(piece.bytes as usize, 0);
                let read = file.read_exact_at(&mut buffer, piece.offset);
                read.inspect_err(|_| stop.store(true, Ordering::Relaxed))?;
                progress(piece.bytes.into());
                if !piece.is(&buffer) {
                    bad.push(index);
                }
            }
            Ok(bad)
        };
        let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
        let threads = cores.min(pieces.len()).clamp(1, 8);
        let found: io::Result<Vec<Vec<u32>>> = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
            let done = workers.into_iter();
            done.map(|worker| worker.join().expect("reading does not panic"))
                .collect()
        });
        let mut bad = found.map_err(failed)?.concat();
        bad.sort_unstable();
        Ok(bad)
    }
}
