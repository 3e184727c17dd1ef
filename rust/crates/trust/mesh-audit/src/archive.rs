//! A trail as it is read: the state of a head, also while it writes, or an export.

use std::io;
use std::path::{Path, PathBuf};

use crate::folder::{CHECKPOINT, COSIGNED, DOCUMENT, EPOCHS, JOURNAL, KEYS};
use crate::journal::{self, Frame, Header};
use crate::keys::PublicKeys;
use crate::merkle::{Edge, TILE_WIDTH, Tile, leaf_hash};
use crate::note::{LONGEST_NOTE, Note};
use crate::recover::{LONGEST_JOURNAL, edge_at};
use crate::tiles::{
    Batch, LONGEST_BUNDLE, TILE_BYTES, bundle, bundle_path, read, tile_path, unbundle,
};

/// A trail in a folder, as it was when it was opened.
#[derive(Debug)]
pub struct Archive {
    dir: PathBuf,
    published: Option<Vec<u8>>,
    journal: Option<Vec<u8>>,
}

/// The journal of an archive, as far as it can be read.
#[derive(Debug)]
pub(crate) struct JournalView<'a> {
    pub header: Option<Header>,
    /// Offsets and entries.
    pub entries: Vec<(usize, &'a [u8])>,
    /// Offsets of signed groups, the number of entries before, and their notes.
    pub seals: Vec<(usize, usize, &'a [u8])>,
    /// Offset behind the last whole frame.
    pub end: usize,
    /// Bytes behind it.
    pub rest: usize,
    pub seal_behind: Option<usize>,
}

/// Errors of reading.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ArchiveError {
    /// A file cannot be read or written.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The folder holds no trail.
    #[error("{} holds no audit trail: it has neither `checkpoint` nor `journal`", .0.display())]
    None(PathBuf),
    /// A file is not what it should be.
    #[error("{}: {reason}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The damage.
        reason: String,
    },
}

impl Archive {
    /// Opens the trail in a folder.
    ///
    /// # Errors
    /// If there is none, or it cannot be read.
    pub fn open(dir: &Path) -> Result<Self, ArchiveError> {
        // In this order: what the checkpoint covers was in the journal, or is in tiles by now.
        let published = read(&dir.join(CHECKPOINT), LONGEST_NOTE)?;
        let journal = read(&dir.join(JOURNAL), LONGEST_JOURNAL)?;
        if published.is_none() && journal.is_none() {
            return Err(ArchiveError::None(dir.to_owned()));
        }
        Ok(Self {
            dir: dir.to_owned(),
            published,
            journal,
        })
    }

    /// Its folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The published checkpoint, as it is in its file.
    pub fn published(&self) -> Option<&[u8]> {
        self.published.as_deref()
    }

    /// The public keys that lie beside the trail.
    ///
    /// # Errors
    /// If they cannot be read.
    pub fn keys(&self) -> Result<PublicKeys, ArchiveError> {
        let path = self.dir.join(KEYS);
        let text = read(&path, LONGEST_NOTE)?.unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        PublicKeys::read(&text).map_err(|reason| ArchiveError::Damaged { path, reason })
    }

    /// The mesh root's document about the identity that endorses the keys, if it lies beside the trail.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn document(&self) -> io::Result<Option<Vec<u8>>> {
        read(&self.dir.join(DOCUMENT), LONGEST_NOTE)
    }

    /// Size of the published checkpoint; 0 if there is none that can be read.
    pub fn published_size(&self) -> u64 {
        let note = self
            .published
            .as_ref()
            .and_then(|note| Note::parse(note).ok());
        note.map_or(0, |note| note.checkpoint.size)
    }

    pub(crate) fn journal(&self) -> Option<JournalView<'_>> {
        let bytes = self.journal.as_ref()?;
        let scan = journal::scan(bytes);
        let mut view = JournalView {
            header: None,
            entries: Vec::new(),
            seals: Vec::new(),
            end: scan.end,
            rest: bytes.len() - scan.end,
            seal_behind: scan.seal_behind,
        };
        for (offset, frame) in scan.frames {
            match frame {
                Frame::Header(text) if offset == 0 => {
                    view.header = serde_json::from_slice(text).ok()
                }
                Frame::Entry(entry) => view.entries.push((offset, entry)),
                Frame::Seal(note) => view.seals.push((offset, view.entries.len(), note)),
                // Only a damaged journal has two; the entries behind do not fit then.
                Frame::Header(_) => view.header = None,
            }
        }
        Some(view)
    }

    /// Entries of a full bundle, or of the partial one of this width. `None` if there is no such file.
    pub(crate) fn bundle(&self, index: u64, width: usize) -> io::Result<Option<Vec<u8>>> {
        read(&self.dir.join(bundle_path(index, width)), LONGEST_BUNDLE)
    }

    pub(crate) fn tile(&self, level: u8, index: u64, width: usize) -> io::Result<Option<Vec<u8>>> {
        read(&self.dir.join(tile_path(level, index, width)), TILE_BYTES)
    }

    /// Calls `take` with the number and the bytes of every entry from `first` on that is there, until it
    /// returns false.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub fn entries(
        &self,
        first: u64,
        mut take: impl FnMut(u64, &[u8]) -> bool,
    ) -> Result<(), ArchiveError> {
        let view = self.journal();
        let base = view
            .as_ref()
            .and_then(|view| view.header.as_ref())
            .map(|header| header.base);
        let published = self.published_size();
        let end = base.unwrap_or(published);
        let width = TILE_WIDTH as u64;
        for index in first / width..end.div_ceil(width) {
            let partial = (end - index * width).min(width) as usize;
            let Some(bytes) = self.bundle(index, partial)? else {
                continue;
            };
            for (n, (_, entry)) in (index * width..).zip(unbundle(&bytes).0) {
                if n >= first && !take(n, entry) {
                    return Ok(());
                }
            }
        }
        if let (Some(view), Some(base)) = (view, base) {
            for (n, (_, entry)) in (base..).zip(view.entries) {
                if n >= first && !take(n, entry) {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// Writes the trail to a new folder, up to the last signed group: public keys, checkpoint, tiles, epochs
    /// and cosigned checkpoints, without any secret. Returns its size.
    ///
    /// # Errors
    /// If the folder is not empty; if something cannot be read or written.
    pub fn export(&self, to: &Path) -> Result<u64, ArchiveError> {
        if to.exists() && to.read_dir()?.next().is_some() {
            return Err(io::Error::new(
                io::ErrorKind::AlreadyExists,
                format!("{} is not empty: name a new folder", to.display()),
            )
            .into());
        }
        let mut batch = Batch::default();
        let view = self.journal();
        let base = view
            .as_ref()
            .and_then(|view| view.header.as_ref())
            .map(|header| header.base);
        let seal = view.as_ref().and_then(|view| view.seals.last());
        let (note, tail): (&[u8], &[(usize, &[u8])]) = match (&view, seal) {
            (Some(view), Some((_, count, note))) => (note, &view.entries[..*count]),
            _ => (self.published.as_deref().unwrap_or_default(), &[]),
        };
        let note = Note::parse(note).map(|parsed| (parsed, note));
        let (parsed, note) = note.map_err(|error| ArchiveError::Damaged {
            path: self.dir.join(CHECKPOINT),
            reason: error.to_string(),
        })?;
        let size = parsed.checkpoint.size;
        let start = base.filter(|_| seal.is_some()).unwrap_or(size / 256 * 256);
        self.copy_tiles(start, &mut batch, to)?;
        let mut edge = edge_at(&self.dir, start)?;
        if seal.is_none() {
            self.copy_partial(size, &mut batch, to)?;
        } else {
            self.write_tail(tail, start, &mut edge, &mut batch, to)?;
        }
        for name in [KEYS, DOCUMENT, EPOCHS, COSIGNED] {
            copy_all(&self.dir.join(name), &to.join(name), &mut batch)?;
        }
        batch.write(&to.join(CHECKPOINT), note)?;
        batch.sync()?;
        Ok(size)
    }

    /// Copies the full tiles and bundles of the first `end` entries.
    fn copy_tiles(&self, end: u64, batch: &mut Batch, to: &Path) -> io::Result<()> {
        for level in 0..crate::merkle::MOST_LEVELS as u8 {
            for index in 0..end.checked_shr(8 * (u32::from(level) + 1)).unwrap_or(0) {
                let tile = self.tile(level, index, TILE_WIDTH)?;
                // A gap is for verification to tell.
                if let Some(tile) = tile {
                    batch.write(&to.join(tile_path(level, index, TILE_WIDTH)), &tile)?;
                }
                if level == 0
                    && let Some(bundle) = self.bundle(index, TILE_WIDTH)?
                {
                    batch.write(&to.join(bundle_path(index, TILE_WIDTH)), &bundle)?;
                }
                // Not too many open files.
                if index % 64 == 63 {
                    batch.sync()?;
                }
            }
            batch.sync()?;
        }
        Ok(())
    }

    fn copy_partial(&self, size: u64, batch: &mut Batch, to: &Path) -> io::Result<()> {
        for level in 0..crate::merkle::MOST_LEVELS as u8 {
            let index = size.checked_shr(8 * (u32::from(level) + 1)).unwrap_or(0);
            let width = crate::merkle::width(size, level);
            if width > 0
                && let Some(tile) = self.tile(level, index, width)?
            {
                batch.write(&to.join(tile_path(level, index, width)), &tile)?;
            }
            if level == 0
                && width > 0
                && let Some(bundle) = self.bundle(index, width)?
            {
                batch.write(&to.join(bundle_path(index, width)), &bundle)?;
            }
        }
        Ok(())
    }

    /// Writes the tiles of what the journal has.
    fn write_tail(
        &self,
        tail: &[(usize, &[u8])],
        start: u64,
        edge: &mut Edge,
        batch: &mut Batch,
        to: &Path,
    ) -> io::Result<()> {
        let mut full: Vec<Tile> = Vec::new();
        for (index, entries) in (start / 256..).zip(tail.chunks(TILE_WIDTH)) {
            let owned: Vec<Vec<u8>> = entries.iter().map(|(_, entry)| entry.to_vec()).collect();
            batch.write(&to.join(bundle_path(index, owned.len())), &bundle(&owned))?;
            for entry in &owned {
                edge.push(leaf_hash(entry), &mut full);
            }
        }
        full.extend(edge.partial_tiles());
        for tile in full {
            let path = tile_path(tile.level, tile.index, tile.hashes.len());
            batch.write(&to.join(path), tile.hashes.as_flattened())?;
        }
        Ok(())
    }
}

/// Copies a file, or the files of a folder, if there are any.
fn copy_all(from: &Path, to: &Path, batch: &mut Batch) -> io::Result<()> {
    if from.is_dir() {
        for entry in from.read_dir()? {
            let entry = entry?;
            let name = entry.file_name();
            if entry.file_type()?.is_file()
                && let Some(bytes) = read(&entry.path(), LONGEST_NOTE)?
            {
                batch.write(&to.join(name), &bytes)?;
            }
        }
    } else if let Some(bytes) = read(from, LONGEST_NOTE)? {
        batch.write(to, &bytes)?;
    }
    Ok(())
}
