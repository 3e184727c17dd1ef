//! Reading a trail in order to append to it, also after a crash.

use std::io;
use std::path::Path;
use std::sync::Arc;

use data_encoding::HEXLOWER;

use crate::chain::{ChainKey, Mac};
use crate::folder::{EpochStart, JOURNAL, KEYS, StoreError};
use crate::journal::{self, Frame, Header};
use crate::keys::{PublicKeys, TrailKeys};
use crate::merkle::{Edge, MOST_LEVELS, root_of, width};
use crate::note::{LONGEST_NOTE, Note};
use crate::record;
use crate::tiles;
use crate::tiles::TileReader;
use crate::trail::{Prepared, Trail};

/// A trail as a crash or an orderly end left it.
#[derive(Debug)]
pub(crate) struct Stored {
    pub trail: Trail,
    pub base: u64,
    pub base_last: Mac,
    pub entries: Vec<Vec<u8>>,
    pub seal: Option<(u64, String)>,
    pub journal_bytes: u64,
    pub recovered: Recovered,
}

/// Report of an opening.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Recovered {
    /// Number of records that the trail has.
    pub records: u64,
    /// Of these, records behind the last signed group: no one was told that they are safe.
    pub unsigned: u64,
    /// Bytes of an incomplete record that are cut off.
    pub cut_bytes: u64,
}

impl Recovered {
    /// True after a crash.
    pub fn is_notable(&self) -> bool {
        self.unsigned > 0 || self.cut_bytes > 0
    }
}

/// Reads the trail in `dir`. Entries of the present epoch are checked by their codes, those before by the
/// last signature.
pub(crate) fn read(
    dir: &Path,
    keys: Arc<TrailKeys>,
    chain: ChainKey,
    epoch: EpochStart,
) -> Result<Stored, StoreError> {
    let damaged = |reason: String| StoreError::Damaged {
        dir: dir.to_owned(),
        reason,
    };
    let path = dir.join(JOURNAL);
    let bytes = existing(&path, LONGEST_JOURNAL)?;
    let scan = journal::scan(&bytes);
    if let Some(seal) = scan.seal_behind {
        let end = scan.end;
        return Err(damaged(format!(
            "the journal cannot be read at byte {end}, before the signed group at byte {seal}"
        )));
    }
    let mut frames = scan.frames.iter();
    let header = match frames.next() {
        Some((_, Frame::Header(text))) => serde_json::from_slice::<Header>(text).ok(),
        _ => None,
    };
    let header = header.ok_or_else(|| damaged("the journal has no beginning".to_owned()))?;
    let base_last =
        link(&header).ok_or_else(|| damaged("the journal's beginning is not one".to_owned()))?;
    check_keys(dir, &keys, &header.origin).map_err(damaged)?;
    let edge = edge_at(dir, header.base)
        .map_err(|error| damaged(format!("its tiles cannot be read: {error}")))?;
    let mut trail = Trail::resume(&header.origin, keys.clone(), chain, base_last, edge);
    let (mut entries, mut seal) = (Vec::new(), None);
    for (offset, frame) in frames {
        match frame {
            Frame::Entry(entry) => {
                let checked = next(&trail, epoch, entry);
                let prepared = checked.map_err(|reason| {
                    damaged(format!(
                        "the record at byte {offset} of the journal {reason}"
                    ))
                })?;
                entries.push(trail.commit(prepared));
            }
            Frame::Seal(note) => {
                let text = String::from_utf8_lossy(note).into_owned();
                let note = Note::parse(note);
                let note = note
                    .ok()
                    .filter(|note| note.checkpoint == trail.checkpoint());
                let note = note.ok_or_else(|| {
                    let size = trail.size();
                    damaged(format!("the group at byte {offset} of the journal is not that of the {size} records before"))
                })?;
                seal = Some((trail.size(), text, note));
            }
            Frame::Header(_) => {
                return Err(damaged(format!(
                    "the journal begins again at byte {offset}"
                )));
            }
        }
    }
    let own = keys.log_vkey(trail.origin());
    if let Some((size, _, note)) = &seal {
        note.verify(&own)
            .map_err(|error| damaged(format!("the group of {size} records: {error}")))?;
    } else if header.base > 0 {
        return Err(damaged("the journal has no signed group".to_owned()));
    }
    let signed = seal.as_ref().map_or(0, |(size, ..)| *size);
    let recovered = Recovered {
        records: trail.size(),
        unsigned: trail.size() - signed,
        cut_bytes: (bytes.len() - scan.end) as u64,
    };
    Ok(Stored {
        trail,
        base: header.base,
        base_last,
        entries,
        seal: seal.map(|(size, text, _)| (size, text)),
        journal_bytes: scan.end as u64,
        recovered,
    })
}

fn existing(path: &Path, most: usize) -> io::Result<Vec<u8>> {
    tiles::read(path, most)?.ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::NotFound,
            format!("{} is missing", path.display()),
        )
    })
}

/// Code of the record before a journal.
pub(crate) fn link(header: &Header) -> Option<Mac> {
    let last = HEXLOWER.decode(header.last.as_bytes()).ok()?;
    let last = last.try_into().ok()?;
    header.base.is_multiple_of(256).then_some(last)
}

fn check_keys(dir: &Path, keys: &TrailKeys, origin: &str) -> Result<(), String> {
    let text = tiles::read(&dir.join(KEYS), LONGEST_NOTE).map_err(|error| error.to_string())?;
    let text = text.and_then(|text| String::from_utf8(text).ok());
    let public = PublicKeys::read(&text.unwrap_or_default())
        .map_err(|reason| format!("its file of public keys: {reason}"))?;
    let same = public.log() == keys.log_vkey(origin) && public.epochs() == keys.epoch_vkey(origin);
    same.then_some(())
        .ok_or_else(|| "it was made with other keys than those of this node".to_owned())
}

/// The entry as the next one of the trail.
fn next(trail: &Trail, epoch: EpochStart, entry: &[u8]) -> Result<Prepared, String> {
    let (text, mac) = record::split(entry).map_err(|error| error.to_string())?;
    if trail.size() >= epoch.first && trail.chain().mac(trail.last(), text) != mac {
        return Err("does not have the code of the chain".to_owned());
    }
    Ok(Prepared::stored(entry.to_owned(), mac))
}

/// The edge of the tree of `base` entries, a multiple of 256, by the full tiles on disk.
pub(crate) fn edge_at(dir: &Path, base: u64) -> io::Result<Edge> {
    let mut tiles = TileReader::new(dir, base);
    let mut levels = vec![Vec::new()];
    for level in 1..MOST_LEVELS as u8 {
        let end = base >> (8 * level);
        let first = end - width(base, level) as u64;
        let hashes = (first..end).map(|index| Ok(root_of(tiles.tile(level - 1, index)?)));
        levels.push(hashes.collect::<io::Result<_>>()?);
    }
    let edge = Edge::from_partial_tiles(base, levels);
    edge.ok_or_else(|| io::Error::other(format!("{base} is not a multiple of 256")))
}

/// Journals are much shorter: they begin anew with every publication.
pub(crate) const LONGEST_JOURNAL: usize = 1 << 30;
