//! A trail in a folder: appended, synced in groups, published as tiles, recovered after a crash.
//!
//! | file | contents |
//! |---|---|
//! | `keys` | the public keys, with the endorsement of the node's identity |
//! | `identity.doc` | the mesh root's document about that identity |
//! | `checkpoint`, `tile/` | the published trail in the format of C2SP tlog-tiles |
//! | `epoch/N` | the checkpoint at the end of epoch N, with its SLH-DSA signature |
//! | `cosigned/N` | the checkpoint of size N with cosignatures of others |
//! | `journal` | entries behind the last full bundle, and the signed checkpoints of their groups |
//! | `chain.key` | key of the present epoch; those before are gone |

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use data_encoding::HEXLOWER;
use mesh_base::{files, random};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use zeroize::{Zeroize, Zeroizing};

use crate::chain::{ChainKey, Mac, first_link};
use crate::endorse::endorse;
use crate::folder::{CHAIN_KEY, CHECKPOINT, EPOCHS, EpochStart, JOURNAL, KEYS};
use crate::journal::{self, Frame, Header};
use crate::kept::EpochRoot;
use crate::keys::{Identity, PublicKeys, TrailKeys};
use crate::merkle::{TILE_WIDTH, Tile};
use crate::note::{Checkpoint, LONGEST_NOTE, Note};
use crate::record::{self, Event};
use crate::recover::{self, Recovered, Stored};
use crate::tiles::{Batch, bundle, bundle_path, named, read, tile_path};
use crate::trail::Trail;

pub use crate::folder::StoreError;

/// Limits of a trail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Time after which an epoch ends, in milliseconds.
    pub epoch_time: u64,
    /// Records after which an epoch ends.
    pub epoch_records: u64,
    /// Bytes of bundles that are kept; older bundles are deleted, their hashes are not. 0 is without limit.
    pub bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            epoch_time: 3_600_000,
            epoch_records: 1 << 20,
            bytes: 1 << 30,
        }
    }
}

/// A trail that is open for appending. One process at a time may have it open; [`Lock`](crate::home::Lock)
/// sees to it.
#[derive(Debug)]
pub struct Store {
    dir: PathBuf,
    limits: Limits,
    trail: Trail,
    journal: File,
    /// Number of the journal's first entry.
    base: u64,
    /// Code of the record before it.
    base_last: Mac,
    /// The entries from `base` on.
    entries: Vec<Vec<u8>>,
    /// The last signed checkpoint and its size.
    seal: Option<(u64, String)>,
    /// Size of the trail as published.
    published: u64,
    epoch: EpochStart,
    /// Bytes of all full bundles.
    bundle_bytes: u64,
    buffer: Vec<u8>,
    /// True after a failed write, until the file is put right.
    torn: bool,
}

/// Contents of `chain.key`.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ChainFile {
    epoch: u64,
    first: u64,
    since: u64,
    key: String,
}

impl Drop for ChainFile {
    fn drop(&mut self) {
        self.key.zeroize();
    }
}

impl Store {
    /// Opens the trail in `dir`; creates one of this origin if there is none. Returns what was found after a
    /// crash.
    ///
    /// # Errors
    /// If a file cannot be read or written; if the trail is damaged.
    pub fn open(
        dir: &Path,
        origin: &str,
        keys: Arc<TrailKeys>,
        identity: Option<&dyn Identity>,
        limits: Limits,
        now: u64,
    ) -> Result<(Self, Recovered), StoreError> {
        files::create_private_dir(dir)?;
        files::remove_leftovers(dir)?;
        if !dir.join(JOURNAL).exists() {
            create(dir, origin, &keys, identity, now)?;
        }
        let (chain, epoch) = read_chain(dir)?;
        let public = keys.clone();
        let Stored {
            trail,
            base,
            base_last,
            entries,
            seal,
            journal_bytes,
            recovered,
        } = recover::read(dir, keys, chain, epoch)?;
        if let Some(identity) = identity {
            endorse(dir, &public, trail.origin(), identity)?;
        }
        let path = dir.join(JOURNAL);
        let journal = open_journal(&path)?;
        if journal.metadata()?.len() > journal_bytes {
            journal.set_len(journal_bytes)?;
            journal.sync_data()?;
        }
        let mut store = Self {
            dir: dir.to_owned(),
            limits,
            trail,
            journal,
            base,
            base_last,
            entries,
            published: published_size(dir)?,
            seal,
            epoch,
            bundle_bytes: bundle_bytes(dir, base)?,
            buffer: Vec::new(),
            torn: false,
        };
        // First: nothing follows the end of an epoch in the same one.
        store.finish_epoch(now)?;
        if recovered.is_notable() {
            let (unsigned, cut_bytes) = (recovered.unsigned, recovered.cut_bytes);
            store.append(
                &Event::Recovered {
                    unsigned,
                    cut_bytes,
                },
                now,
            )?;
            store.sync(now)?;
        }
        Ok((store, recovered))
    }

    /// Name of the trail.
    pub fn origin(&self) -> &str {
        self.trail.origin()
    }

    /// Number of records.
    pub fn size(&self) -> u64 {
        self.trail.size()
    }

    /// The present epoch.
    pub fn epoch(&self) -> u64 {
        self.trail.epoch()
    }

    /// The last epochs that have ended, as they are signed.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub fn ended_epochs(&self, most: usize) -> io::Result<Vec<EpochRoot>> {
        let first = self.epoch().saturating_sub(most as u64);
        let mut ended = Vec::new();
        for epoch in first..self.epoch() {
            let path = self.dir.join(EPOCHS).join(epoch.to_string());
            let note = read(&path, LONGEST_NOTE)?;
            if let Some(note) = note
                && let Ok(Checkpoint { size, root, .. }) =
                    Note::parse(&note).map(|note| note.checkpoint)
            {
                let note = Sha256::digest(&note).into();
                ended.push(EpochRoot {
                    epoch,
                    size,
                    root,
                    note,
                });
            }
        }
        Ok(ended)
    }

    /// Number of records that are signed and on disk.
    pub fn synced(&self) -> u64 {
        self.seal.as_ref().map_or(0, |(size, _)| *size)
    }

    /// The last signed checkpoint: that of all synced records.
    pub fn checkpoint(&self) -> Option<&str> {
        self.seal.as_ref().map(|(_, note)| note.as_str())
    }

    /// Appends a record, at this time in milliseconds since the Unix epoch, and returns its number. It is
    /// handed to the system: it survives the death of the process, and after [`sync`](Self::sync) that of the
    /// machine.
    ///
    /// # Errors
    /// If it cannot be written. The trail is as before then.
    pub fn append(&mut self, event: &Event, now: u64) -> Result<u64, StoreError> {
        let number = self.trail.size();
        let prepared = self.trail.prepare(event, now);
        self.write(&Frame::Entry(&prepared.entry))?;
        self.entries.push(self.trail.commit(prepared));
        Ok(number)
    }

    fn write(&mut self, frame: &Frame<'_>) -> Result<(), StoreError> {
        if self.torn {
            // The system may have dropped what it could not write, so all of it is written again.
            self.rewrite_journal(0)?;
        }
        self.buffer.clear();
        journal::push(frame, &mut self.buffer);
        let written = self.journal.write_all(&self.buffer);
        self.torn = written.is_err();
        Ok(written.map_err(|error| named(&self.dir.join(JOURNAL), "append to", &error))?)
    }

    /// Signs all records so far together, and waits until they are on disk. Returns the number of records
    /// that are safe.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn sync(&mut self, now: u64) -> Result<u64, StoreError> {
        let size = self.trail.size();
        if self.synced() < size {
            let note = self.trail.signed_checkpoint(now / 1000);
            self.write(&Frame::Seal(note.as_bytes()))?;
            let synced = self.journal.sync_data();
            self.torn = synced.is_err();
            synced.map_err(|error| named(&self.dir.join(JOURNAL), "sync", &error))?;
            self.seal = Some((size, note));
        }
        Ok(size)
    }

    /// Ends an epoch that is due, publishes what is new, deletes what is beyond the limit.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn maintain(&mut self, now: u64) -> Result<(), StoreError> {
        let records = self.size().saturating_sub(self.epoch.first);
        let is_due = now.saturating_sub(self.epoch.since) >= self.limits.epoch_time;
        // An epoch without records may go on.
        if records >= self.limits.epoch_records || (is_due && records > 0) {
            self.end_epoch(now)?;
        }
        self.prune(now)?;
        self.publish(now)
    }

    /// Ends the epoch: its root gets an SLH-DSA signature, and the key of the chain moves on.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn end_epoch(&mut self, now: u64) -> Result<(), StoreError> {
        let next = self.trail.chain().next();
        self.end_epoch_with(next, false, now)
    }

    /// Ends the epoch and begins the next one with a fresh key, which is returned: whoever keeps it elsewhere
    /// can check the codes of all records from here on.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn rekey(&mut self, now: u64) -> Result<ChainKey, StoreError> {
        let fresh = random::bytes();
        self.end_epoch_with(ChainKey::new(self.epoch() + 1, fresh), true, now)?;
        Ok(ChainKey::new(self.epoch(), fresh))
    }

    fn end_epoch_with(
        &mut self,
        next: ChainKey,
        fresh_key: bool,
        now: u64,
    ) -> Result<(), StoreError> {
        let size = self.size() + 1;
        self.append(&Event::EpochEnd { size, fresh_key }, now)?;
        self.sync(now)?;
        self.seal_epoch(next, now)
    }

    /// Goes on where a crash interrupted the end of an epoch.
    fn finish_epoch(&mut self, now: u64) -> Result<(), StoreError> {
        let last = self.entries.last();
        let ended = last.and_then(|entry| {
            let (text, _) = record::split(entry).ok()?;
            let record = record::Record::read(text).ok()?;
            match record::event(text)? {
                Event::EpochEnd { fresh_key, .. } if record.epoch == self.epoch() => {
                    Some(fresh_key)
                }
                _ => None,
            }
        });
        // A fresh key that was not stored is lost, and so is its copy.
        if let Some(fresh) = ended {
            self.sync(now)?;
            let next = match fresh {
                true => ChainKey::new(self.epoch() + 1, random::bytes()),
                false => self.trail.chain().next(),
            };
            self.seal_epoch(next, now)?;
        }
        Ok(())
    }

    fn seal_epoch(&mut self, next: ChainKey, now: u64) -> Result<(), StoreError> {
        let note = self.trail.signed_epoch(now / 1000);
        let path = self.dir.join(EPOCHS).join(self.epoch().to_string());
        let mut batch = Batch::default();
        batch.write(&path, note.as_bytes())?;
        batch.sync()?;
        let epoch = EpochStart {
            first: self.size(),
            since: now,
        };
        write_chain(&self.dir, &next, epoch)?;
        self.trail.begin_epoch(next);
        self.epoch = epoch;
        Ok(())
    }

    /// Writes the tiles and the checkpoint of all records, and drops full bundles from the journal.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn publish(&mut self, now: u64) -> Result<(), StoreError> {
        let size = self.sync(now)?;
        if size == self.published {
            return Ok(());
        }
        let mut batch = Batch::default();
        let whole = self.entries.len() / TILE_WIDTH * TILE_WIDTH;
        let mut bytes = 0;
        let first = self.base / TILE_WIDTH as u64;
        for (index, entries) in (first..).zip(self.entries[..whole].chunks(TILE_WIDTH)) {
            let bundle = bundle(entries);
            bytes += bundle.len() as u64;
            batch.write(&self.dir.join(bundle_path(index, TILE_WIDTH)), &bundle)?;
        }
        let partial: Vec<Tile> = self.trail.edge().partial_tiles().collect();
        for tile in self.trail.full_tiles().iter().chain(&partial) {
            let path = tile_path(tile.level, tile.index, tile.hashes.len());
            batch.write(&self.dir.join(path), tile.hashes.as_flattened())?;
        }
        let rest = &self.entries[whole..];
        if !rest.is_empty() {
            let path = bundle_path(first + (whole / TILE_WIDTH) as u64, rest.len());
            batch.write(&self.dir.join(path), &bundle(rest))?;
        }
        batch.sync()?;
        let (_, note) = self.seal.as_ref().expect("it was synced above");
        batch.write(&self.dir.join(CHECKPOINT), note.as_bytes())?;
        batch.sync()?;
        self.bundle_bytes += bytes;
        if whole > 0 {
            self.rewrite_journal(whole)?;
            self.trail.forget_full_tiles();
        }
        let before = std::mem::replace(&mut self.published, size);
        remove_partial(&self.dir, before, size);
        Ok(())
    }

    /// Replaces the journal by one without its first `whole` entries.
    fn rewrite_journal(&mut self, whole: usize) -> Result<(), StoreError> {
        let base = self.base + whole as u64;
        let before = whole.checked_sub(1).map(|index| &self.entries[index]);
        let before = before.map(|entry| record::split(entry).expect("it was made here").1);
        let last = before.unwrap_or(self.base_last);
        let header = Header {
            origin: self.trail.origin().to_owned(),
            base,
            last: HEXLOWER.encode(&last),
        };
        let mut bytes = header_frame(&header);
        for entry in &self.entries[whole..] {
            journal::push(&Frame::Entry(entry), &mut bytes);
        }
        if let Some((_, note)) = self
            .seal
            .as_ref()
            .filter(|(size, _)| *size == self.trail.size())
        {
            journal::push(&Frame::Seal(note.as_bytes()), &mut bytes);
        }
        let path = self.dir.join(JOURNAL);
        let replaced = files::replace(&path, &bytes, files::PRIVATE);
        replaced.map_err(|error| named(&path, "replace", &error))?;
        self.journal = open_journal(&path)?;
        self.torn = false;
        self.entries.drain(..whole);
        (self.base, self.base_last) = (base, last);
        Ok(())
    }

    /// Deletes the oldest bundles if all of them have more bytes than the limit, and records it.
    fn prune(&mut self, now: u64) -> Result<(), StoreError> {
        let limit = self.limits.bytes;
        if limit == 0 || self.bundle_bytes <= limit {
            return Ok(());
        }
        // A bit more than needed, so that there are not many such records.
        let wanted = limit - limit / 16;
        let (mut left, mut first) = (self.bundle_bytes, 0);
        let mut doomed = Vec::new();
        for index in first_bundle(&self.dir, self.base)..self.base / TILE_WIDTH as u64 {
            if left <= wanted {
                break;
            }
            let path = self.dir.join(bundle_path(index, TILE_WIDTH));
            left = left.saturating_sub(fs::metadata(&path).map_or(0, |found| found.len()));
            first = (index + 1) * TILE_WIDTH as u64;
            doomed.push(path);
        }
        if doomed.is_empty() {
            return Ok(());
        }
        self.append(&Event::Prune { first }, now)?;
        self.sync(now)?;
        for path in doomed {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(named(&path, "delete", &error).into());
                }
                _ => {}
            }
        }
        self.bundle_bytes = left;
        Ok(())
    }
}

fn create(
    dir: &Path,
    origin: &str,
    keys: &TrailKeys,
    identity: Option<&dyn Identity>,
    now: u64,
) -> Result<(), StoreError> {
    if dir.join(CHECKPOINT).exists() {
        return Err(StoreError::Damaged {
            dir: dir.to_owned(),
            reason: "its journal is missing".to_owned(),
        });
    }
    let public = PublicKeys::new(keys, origin, identity).to_text();
    files::replace(&dir.join(KEYS), public.as_bytes(), files::PUBLIC)?;
    let epoch = EpochStart {
        first: 0,
        since: now,
    };
    write_chain(dir, &ChainKey::new(0, random::bytes()), epoch)?;
    let header = Header {
        origin: origin.to_owned(),
        base: 0,
        last: HEXLOWER.encode(&first_link(origin)),
    };
    // It makes the folder a trail, so it comes last.
    files::replace(&dir.join(JOURNAL), &header_frame(&header), files::PRIVATE)?;
    Ok(())
}

fn header_frame(header: &Header) -> Vec<u8> {
    let text = serde_json::to_vec(header).expect("texts and numbers are JSON");
    let mut bytes = Vec::new();
    journal::push(&Frame::Header(&text), &mut bytes);
    bytes
}

fn open_journal(path: &Path) -> io::Result<File> {
    let opened = OpenOptions::new()
        .append(true)
        .mode(files::PRIVATE)
        .open(path);
    opened.map_err(|error| named(path, "open", &error))
}

fn write_chain(dir: &Path, chain: &ChainKey, epoch: EpochStart) -> io::Result<()> {
    let contents = ChainFile {
        epoch: chain.epoch(),
        first: epoch.first,
        since: epoch.since,
        key: HEXLOWER.encode(chain.bytes()),
    };
    let text = Zeroizing::new(serde_json::to_vec(&contents)?);
    files::replace(&dir.join(CHAIN_KEY), &text, files::PRIVATE)
}

/// Key of the present epoch, and its beginning.
pub(crate) fn read_chain(dir: &Path) -> Result<(ChainKey, EpochStart), StoreError> {
    let path = dir.join(CHAIN_KEY);
    let damaged = |reason: &str| StoreError::Damaged {
        dir: dir.to_owned(),
        reason: format!("{}: {reason}", path.display()),
    };
    let text = read(&path, 4096)?.ok_or_else(|| damaged("it is missing"))?;
    let text = Zeroizing::new(text);
    let contents: ChainFile =
        serde_json::from_slice(&text).map_err(|_| damaged("it is not a key"))?;
    let key = HEXLOWER.decode(contents.key.as_bytes()).map(Zeroizing::new);
    let key = key.ok().and_then(|key| <[u8; 32]>::try_from(&key[..]).ok());
    let key = key.ok_or_else(|| damaged("its key has not 32 bytes"))?;
    let epoch = EpochStart {
        first: contents.first,
        since: contents.since,
    };
    Ok((ChainKey::new(contents.epoch, key), epoch))
}

/// Size of the published checkpoint; 0 if there is none that can be read.
fn published_size(dir: &Path) -> io::Result<u64> {
    let note = read(&dir.join(CHECKPOINT), crate::note::LONGEST_NOTE)?;
    let note = note.and_then(|note| Note::parse(&note).ok());
    Ok(note.map_or(0, |note| note.checkpoint.size))
}

/// Index of the first bundle that is there.
fn first_bundle(dir: &Path, base: u64) -> u64 {
    // Bundles are deleted from the beginning on.
    let count = base / TILE_WIDTH as u64;
    let (mut low, mut high) = (0, count);
    while low < high {
        let middle = low + (high - low) / 2;
        match dir.join(bundle_path(middle, TILE_WIDTH)).exists() {
            true => high = middle,
            false => low = middle + 1,
        }
    }
    low
}

fn bundle_bytes(dir: &Path, base: u64) -> io::Result<u64> {
    let indices = first_bundle(dir, base)..base / TILE_WIDTH as u64;
    let lengths = indices.map(|index| {
        let found = fs::metadata(dir.join(bundle_path(index, TILE_WIDTH)));
        found.map_or(0, |found| found.len())
    });
    Ok(lengths.sum())
}

/// Removes the partial tiles of an earlier publication. One that stays is of no harm.
fn remove_partial(dir: &Path, before: u64, now: u64) {
    let remove = |path: PathBuf| {
        let path = dir.join(path);
        let _ = fs::remove_file(&path);
        // The folder `.p` of a tile that is full now.
        let _ = path.parent().map(fs::remove_dir);
    };
    for level in 0..crate::merkle::MOST_LEVELS as u8 {
        let place = |size: u64| {
            let index = size.checked_shr(8 * (u32::from(level) + 1)).unwrap_or(0);
            (index, crate::merkle::width(size, level))
        };
        let (index, width) = place(before);
        if width > 0 && place(now) != (index, width) {
            remove(tile_path(level, index, width));
            if level == 0 {
                remove(bundle_path(index, width));
            }
        }
    }
}
