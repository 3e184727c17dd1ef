//! Verification: every byte of a trail, and where it differs from what was signed.
//!
//! Records and hashes vouch for each other, and a tile's hashes for those of the tile below. Where two
//! differ, the next higher hash, or the signed root, tells which of the two was changed.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::PathBuf;

use sha2::{Digest, Sha256};

use crate::archive::{Archive, ArchiveError, JournalView};
use crate::chain::{ChainKey, Mac, first_link};
use crate::folder::{CHECKPOINT, COSIGNED, EPOCHS, JOURNAL, KEYS};
use crate::kept::EpochRoot;
use crate::keys::{PublicKeys, Vkey};
use crate::merkle::{Edge, Hash, TILE_WIDTH, Tile, leaf_hash, root_of};
use crate::note::{Checkpoint, Note, NoteError};
use crate::record::{self, Event, Record};
use crate::recover::link;
use crate::tiles::{bundle_path, hashes, read, tile_path, unbundle};

/// Knowledge to verify with, beyond what lies in the trail's folder.
#[derive(Debug, Default)]
pub struct Options {
    /// Keys that the trail has to be signed with. Without them, those in the folder are believed.
    pub trusted: Vec<Vkey>,
    /// Key of an epoch: the codes of its records and of later ones are checked.
    pub chain: Option<ChainKey>,
    /// Keys of witnesses, whose cosignatures have to hold.
    pub witnesses: Vec<Vkey>,
    /// Checkpoints that were seen earlier: the trail has to continue them.
    pub earlier: Vec<Note>,
    /// Epochs of this trail as other nodes keep them.
    pub kept: Vec<EpochRoot>,
    /// True if a process writes the trail now: its last record may be incomplete.
    pub live: bool,
}

/// A place in a trail that is not as it was signed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// The file, below the trail's folder.
    pub file: PathBuf,
    /// First and last byte of the place in the file, where it can be told.
    pub bytes: Option<(u64, u64)>,
    /// Numbers of the first and the last record.
    pub records: Option<(u64, u64)>,
    /// The finding in words.
    pub text: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file.display())?;
        match self.bytes {
            Some((first, last)) if first == last => write!(f, ", byte {first}")?,
            Some((first, last)) => write!(f, ", bytes {first} to {last}")?,
            None => {}
        }
        match self.records {
            Some((first, last)) if first == last => write!(f, ", record {first}")?,
            Some((first, last)) => write!(f, ", records {first} to {last}")?,
            None => {}
        }
        write!(f, ": {}", self.text)
    }
}

/// Result of a verification.
#[derive(Debug, Default)]
pub struct Report {
    /// Name of the trail.
    pub origin: String,
    /// Number of records.
    pub size: u64,
    /// Of these, records under a signature.
    pub signed: u64,
    /// Records that were deleted to keep within the limit; their hashes are there.
    pub pruned: u64,
    /// Epochs that have ended.
    pub epochs: u64,
    /// Records whose codes of the chain were checked.
    pub coded: u64,
    /// Times of the first and the last record that was read, in milliseconds since the Unix epoch.
    pub times: Option<(u64, u64)>,
    /// Names of witnesses with a cosignature that holds, and the sizes that they saw.
    pub witnessed: Vec<(String, u64)>,
    /// Public key of the identity that endorses the trail's keys.
    pub identity: Option<Vec<u8>>,
    /// Epochs, as other nodes keep them, that it was compared with.
    pub kept: usize,
    /// Everything that is wrong. Empty means that the trail is as it was signed.
    pub findings: Vec<Finding>,
}

/// Verifies a trail.
///
/// # Errors
/// If the folder holds no trail, or a file cannot be read. What is wrong with the trail is in the report.
pub fn verify(archive: &Archive, options: &Options) -> Result<Report, ArchiveError> {
    let mut report = Report::default();
    let keys = match archive.keys() {
        Ok(keys) => keys,
        Err(ArchiveError::Damaged { reason, .. }) => {
            report.find(KEYS, None, None, reason);
            return Ok(report);
        }
        Err(error) => return Err(error),
    };
    report.origin = keys.log().name().to_owned();
    report.identity = keys.identity_key();
    for key in [keys.log(), keys.epochs()] {
        if !options.trusted.is_empty() && !options.trusted.contains(&key) {
            let id = data_encoding::HEXLOWER.encode(&key.id());
            report.find(
                KEYS,
                None,
                None,
                format!("the key {id} is not one of those to be trusted"),
            );
        }
    }
    let mut walk = Walk {
        archive,
        options,
        view: archive.journal(),
        keys,
        heads: BTreeMap::new(),
        edge: Edge::default(),
        report,
        last: None,
        chain: None,
        expected: None,
        ended: Vec::new(),
        published: 0,
        base: 0,
        kept: 0,
    };
    walk.run()?;
    Ok(walk.report)
}

impl Report {
    fn find(
        &mut self,
        file: impl Into<PathBuf>,
        bytes: Option<(u64, u64)>,
        records: Option<(u64, u64)>,
        text: impl Into<String>,
    ) {
        self.findings.push(Finding {
            file: file.into(),
            bytes,
            records,
            text: text.into(),
        });
    }
}

/// A signed head, and where it stands.
struct Head {
    file: PathBuf,
    bytes: Option<(u64, u64)>,
    root: Hash,
}

struct Walk<'a> {
    archive: &'a Archive,
    options: &'a Options,
    view: Option<JournalView<'a>>,
    keys: PublicKeys,
    /// Signed heads by size.
    heads: BTreeMap<u64, Vec<Head>>,
    edge: Edge,
    report: Report,
    /// Code of the record before, where it is known.
    last: Option<Mac>,
    /// Key of the epoch that is being read.
    chain: Option<ChainKey>,
    /// Epoch of the next record.
    expected: Option<u64>,
    /// Sizes at the ends of epochs, as records tell.
    ended: Vec<(u64, u64)>,
    published: u64,
    base: u64,
    /// The first record that has to be there.
    kept: u64,
}

/// The entries of one bundle, from whichever file has them.
struct Block {
    start: u64,
    /// Width of the tile on disk; 0 if there is none.
    width: usize,
    file: PathBuf,
    /// From the file of the bundle: offsets and entries.
    disk: Vec<(usize, Vec<u8>)>,
    /// First and last byte of what lies behind its entries.
    rest: Option<(u64, u64)>,
    hashes: Option<Vec<Hash>>,
}

impl Walk<'_> {
    fn run(&mut self) -> Result<(), ArchiveError> {
        self.read_checkpoint();
        self.read_journal();
        self.read_epochs()?;
        self.read_cosigned()?;
        for note in &self.options.earlier {
            let checkpoint = note.checkpoint.clone();
            if checkpoint.origin == self.report.origin {
                self.head("(an earlier checkpoint)", None, &checkpoint);
            } else {
                let text = format!(
                    "an earlier checkpoint is of another trail, {}",
                    checkpoint.origin
                );
                self.report.find(CHECKPOINT, None, None, text);
            }
        }
        self.report.kept = self.options.kept.len();
        for kept in &self.options.kept {
            let file = format!("(epoch {}, as a node kept it)", kept.epoch);
            let checkpoint = kept.checkpoint(&self.report.origin);
            self.head(file, None, &checkpoint);
        }
        let tail = self.view.as_ref().map_or(0, |view| view.entries.len()) as u64;
        let size = self.published.max(self.base + tail);
        self.report.size = size;
        self.kept = self.find_kept(size)?;
        self.last = Some(first_link(&self.report.origin));
        self.check_heads();
        for index in 0..size.div_ceil(TILE_WIDTH as u64) {
            self.block(index, size)?;
        }
        let missing: Vec<u64> = self
            .heads
            .keys()
            .copied()
            .filter(|head| *head > size)
            .collect();
        for head in missing {
            for found in self.heads.remove(&head).unwrap_or_default() {
                let text = format!("{head} records were signed, and {size} are there");
                self.report
                    .find(found.file, found.bytes, Some((size, head - 1)), text);
            }
        }
        self.check_epochs();
        Ok(())
    }

    fn read_checkpoint(&mut self) {
        match self.archive.published() {
            Some(note) => {
                if let Some(note) = self.own_note(CHECKPOINT, None, note, &[]) {
                    self.published = note.checkpoint.size;
                    self.head(CHECKPOINT, None, &note.checkpoint);
                }
            }
            None if self.view.is_none() => {
                self.report.find(CHECKPOINT, None, None, "it is missing");
            }
            None => {}
        }
    }

    /// A note that the trail's own key signed, and `more` keys, and nobody else.
    fn own_note(
        &mut self,
        file: impl Into<PathBuf>,
        bytes: Option<(u64, u64)>,
        note: &[u8],
        more: &[Vkey],
    ) -> Option<Note> {
        let own = self.keys.log();
        let keys: Vec<&Vkey> = std::iter::once(&own).chain(more).collect();
        let checked = Note::parse(note).and_then(|note| {
            for key in &keys {
                note.verify(key)?;
            }
            match note.checkpoint.origin == own.name() && note.is_only_of(&keys) {
                true => Ok(note),
                false => Err(NoteError::Checkpoint(
                    "it is of another trail, or has a line of another key",
                )),
            }
        });
        checked
            .map_err(|error| self.report.find(file, bytes, None, error.to_string()))
            .ok()
    }

    fn head(
        &mut self,
        file: impl Into<PathBuf>,
        bytes: Option<(u64, u64)>,
        checkpoint: &Checkpoint,
    ) {
        let head = Head {
            file: file.into(),
            bytes,
            root: checkpoint.root,
        };
        self.report.signed = self.report.signed.max(checkpoint.size);
        self.heads.entry(checkpoint.size).or_default().push(head);
    }

    fn read_journal(&mut self) {
        let Some(view) = self.view.take() else {
            self.base = self.published;
            return;
        };
        let header = view.header.clone().filter(|header| link(header).is_some());
        match header {
            Some(header) if header.origin == self.report.origin => self.base = header.base,
            _ => {
                let text = "its beginning is missing, or that of another trail";
                self.report
                    .find(JOURNAL, Some((0, view.end as u64)), None, text);
                self.base = self.published;
            }
        }
        for (offset, count, note) in &view.seals {
            let bytes = Some((*offset as u64, (offset + note.len()) as u64));
            let Some(note) = self.own_note(JOURNAL, bytes, note, &[]) else {
                continue;
            };
            let size = self.base + *count as u64;
            if note.checkpoint.size == size {
                self.head(JOURNAL, bytes, &note.checkpoint);
            } else {
                let text = format!(
                    "a group of {} records was signed behind record {size}",
                    note.checkpoint.size
                );
                self.report.find(JOURNAL, bytes, None, text);
            }
        }
        let incomplete = view.rest > 0 && !(self.options.live && view.seal_behind.is_none());
        if incomplete {
            let bytes = Some((view.end as u64, (view.end + view.rest - 1) as u64));
            let next = self.base + view.entries.len() as u64;
            let text = match view.seal_behind {
                Some(_) => "it was changed before a signed group",
                None => "its last record is incomplete, or was changed",
            };
            self.report.find(JOURNAL, bytes, Some((next, next)), text);
        }
        self.view = Some(view);
    }

    fn read_epochs(&mut self) -> io::Result<()> {
        let epochs = self.keys.epochs();
        for epoch in 0.. {
            let file = PathBuf::from(EPOCHS).join(epoch.to_string());
            let Some(note) = read(&self.archive.dir().join(&file), crate::note::LONGEST_NOTE)?
            else {
                break;
            };
            self.report.epochs = epoch + 1;
            let mut kept = self.options.kept.iter();
            let digest: Hash = Sha256::digest(&note).into();
            if kept.any(|kept| kept.epoch == epoch && kept.note != digest) {
                let text = "a node kept another signed checkpoint of this epoch";
                self.report.find(&file, None, None, text);
            }
            if let Some(note) = self.own_note(&file, None, &note, std::slice::from_ref(&epochs)) {
                self.head(&file, None, &note.checkpoint);
            }
        }
        Ok(())
    }

    fn read_cosigned(&mut self) -> io::Result<()> {
        let Ok(folder) = self.archive.dir().join(COSIGNED).read_dir() else {
            return Ok(());
        };
        for entry in folder {
            let entry = entry?;
            let file = PathBuf::from(COSIGNED).join(entry.file_name());
            let note = read(&entry.path(), crate::note::LONGEST_NOTE)?.unwrap_or_default();
            let own = self.keys.log();
            let checked = Note::parse(&note).and_then(|note| note.verify(&own).map(|_| note));
            let note = match checked {
                Ok(note) => note,
                Err(error) => {
                    self.report.find(file, None, None, error.to_string());
                    continue;
                }
            };
            self.head(&file, None, &note.checkpoint);
            for witness in &self.options.witnesses {
                match note.verify(witness) {
                    Ok(_) => {
                        let seen = (witness.name().to_owned(), note.checkpoint.size);
                        self.report.witnessed.push(seen);
                    }
                    Err(NoteError::Unsigned(_)) => {}
                    Err(error) => self.report.find(&file, None, None, error.to_string()),
                }
            }
        }
        self.report.witnessed.sort();
        Ok(())
    }

    /// The first record that has to be there, by the last record about deleted ones.
    fn find_kept(&self, size: u64) -> Result<u64, ArchiveError> {
        let is_whole = size < TILE_WIDTH as u64 || self.archive.bundle(0, TILE_WIDTH)?.is_some();
        if is_whole {
            return Ok(0);
        }
        let mut kept = 0;
        self.archive.entries(0, |_, entry| {
            let text = record::split(entry).map(|(text, _)| text);
            if let Ok(Some(Event::Prune { first })) = text.map(record::event) {
                kept = kept.max(first);
            }
            true
        })?;
        Ok(kept)
    }

    /// Checks one bundle of entries against its hashes.
    fn block(&mut self, index: u64, size: u64) -> io::Result<()> {
        let start = index * TILE_WIDTH as u64;
        let end = size.min(start + TILE_WIDTH as u64);
        let block = self.load(index, end)?;
        let of_disk: Vec<Option<Hash>> = (start..end)
            .map(|n| self.entry(&block, n).map(leaf_hash))
            .collect();
        let entries_right = self.judge(&block, &of_disk);
        let mut full = Vec::new();
        let mut wrong = Vec::new();
        for (at, n) in (start..end).enumerate() {
            let stored = block
                .hashes
                .as_ref()
                .and_then(|hashes| hashes.get(at).copied());
            let leaf = match (of_disk[at], stored) {
                (Some(leaf), Some(stored)) if leaf != stored => {
                    wrong.push(n);
                    if entries_right { leaf } else { stored }
                }
                (Some(leaf), _) => leaf,
                (None, Some(stored)) => {
                    if n < self.kept {
                        self.report.pruned += 1;
                    } else {
                        wrong.push(n);
                    }
                    stored
                }
                (None, None) => {
                    wrong.push(n);
                    [0; 32]
                }
            };
            let is_right = of_disk[at] == Some(leaf);
            self.edge.push(leaf, &mut full);
            self.record(&block, n, is_right);
            self.check_heads();
            if self.edge.size() == self.published {
                self.check_partial_tiles()?;
            }
        }
        self.tell_wrong(&block, &wrong, entries_right);
        if block.rest.is_some() || block.disk.len() > block.width {
            let text = "there is more than its records, or a length was changed";
            self.report.find(&block.file, block.rest, None, text);
        }
        if block.hashes.is_none() && block.width > 0 {
            let file = tile_path(0, index, block.width);
            self.report.find(
                file,
                None,
                Some((start, end - 1)),
                "it is missing, or has another length",
            );
        }
        for tile in full.iter().filter(|tile| tile.level > 0) {
            let below = start + TILE_WIDTH as u64;
            if below <= self.published.max(self.base) {
                self.check_tile(tile)?;
            }
        }
        Ok(())
    }

    fn load(&self, index: u64, end: u64) -> io::Result<Block> {
        let start = index * TILE_WIDTH as u64;
        let on_disk = self.published.max(self.base);
        let width = on_disk.saturating_sub(start).min(TILE_WIDTH as u64) as usize;
        let mut block = Block {
            start,
            width,
            file: bundle_path(index, width),
            disk: Vec::new(),
            rest: None,
            hashes: None,
        };
        debug_assert!(start < end);
        if width == 0 {
            return Ok(block);
        }
        if let Some(bytes) = self.archive.bundle(index, width)? {
            let (entries, end) = unbundle(&bytes);
            block.rest = (end < bytes.len()).then(|| (end as u64, bytes.len() as u64 - 1));
            block.disk = entries
                .into_iter()
                .map(|(at, entry)| (at, entry.to_vec()))
                .collect();
        }
        let tile = self.archive.tile(0, index, width)?;
        block.hashes = tile
            .and_then(|tile| hashes(&tile))
            .filter(|hashes| hashes.len() == width);
        Ok(block)
    }

    /// The entry with this number: from its bundle, or from the journal if it is not published.
    fn entry<'b>(&'b self, block: &'b Block, n: u64) -> Option<&'b [u8]> {
        let at = (n - block.start) as usize;
        match at < block.width {
            true => block.disk.get(at).map(|(_, entry)| &entry[..]),
            false => self.journal_entry(n).map(|(_, entry)| entry),
        }
    }

    fn journal_entry(&self, n: u64) -> Option<(usize, &[u8])> {
        let at = usize::try_from(n.checked_sub(self.base)?).ok()?;
        let view = self.view.as_ref()?;
        view.entries.get(at).copied()
    }

    /// Where entries and hashes differ: true if the entries are as they were signed.
    fn judge(&self, block: &Block, entries: &[Option<Hash>]) -> bool {
        let Some(hashes) = &block.hashes else {
            return true;
        };
        let Some(entries) = entries.iter().copied().collect::<Option<Vec<Hash>>>() else {
            return false;
        };
        if entries[..hashes.len().min(entries.len())] == hashes[..] {
            return true;
        }
        if block.width == TILE_WIDTH {
            let parent = self.parent(block.start / TILE_WIDTH as u64);
            return parent.is_some_and(|parent| root_of(&entries) == parent)
                || (parent.is_none() && self.leads_to_head(block, &entries));
        }
        self.leads_to_head(block, &entries)
    }

    /// Hash of a full tile, as the tile above has it.
    fn parent(&self, index: u64) -> Option<Hash> {
        let above = index / TILE_WIDTH as u64;
        let on_disk = self.published >> 8;
        let width = (on_disk - (above << 8).min(on_disk)).min(TILE_WIDTH as u64) as usize;
        let tile = self.archive.tile(1, above, width).ok()??;
        let hashes = hashes(&tile).filter(|hashes| hashes.len() == width)?;
        hashes.get((index % TILE_WIDTH as u64) as usize).copied()
    }

    /// True if these entries lead to the root of the next signed head.
    fn leads_to_head(&self, block: &Block, entries: &[Hash]) -> bool {
        let mut heads = self
            .heads
            .range(block.start + 1..=block.start + entries.len() as u64);
        let Some((size, heads)) = heads.next_back() else {
            return false;
        };
        let mut edge = self.edge.clone();
        for leaf in &entries[..(size - block.start) as usize] {
            edge.push(*leaf, &mut Vec::new());
        }
        let root = edge.root();
        heads.iter().any(|head| head.root == root)
    }

    /// Reports differences, neighbours together.
    fn tell_wrong(&mut self, block: &Block, wrong: &[u64], entries_right: bool) {
        for run in wrong.chunk_by(|a, b| a + 1 == *b) {
            let (first, last) = (run[0], run[run.len() - 1]);
            let (from, to) = (
                (first - block.start) as usize,
                (last - block.start) as usize,
            );
            if entries_right && block.hashes.is_some() {
                let file = tile_path(0, block.start / TILE_WIDTH as u64, block.width);
                let bytes = Some((from as u64 * 32, to as u64 * 32 + 31));
                self.report
                    .find(file, bytes, Some((first, last)), "the hash was changed");
                continue;
            }
            let (file, span) = match (block.disk.get(from), self.journal_entry(first)) {
                (None, Some((at, entry))) if from >= block.width => (
                    PathBuf::from(JOURNAL),
                    Some((at as u64, (at + entry.len()) as u64)),
                ),
                (Some((at, _)), _) => {
                    let end = block
                        .disk
                        .get(to)
                        .map_or(*at, |(at, entry)| at + entry.len());
                    (
                        block.file.clone(),
                        Some((*at as u64, (end.max(at + 1) - 1) as u64)),
                    )
                }
                (None, _) => (block.file.clone(), None),
            };
            let text = match self.entry(block, first) {
                None => "it is missing".to_owned(),
                Some(entry) => match other_number(entry, first) {
                    Some(other) => format!("it was changed: record {other} stands here"),
                    None => "it was changed".to_owned(),
                },
            };
            self.report.find(file, span, Some((first, last)), text);
        }
    }

    /// Checks the text of a record whose bytes are right, and its code.
    fn record(&mut self, block: &Block, n: u64, is_right: bool) {
        let entry = self
            .entry(block, n)
            .filter(|_| is_right)
            .map(<[u8]>::to_vec);
        let before = self.last.take();
        let Some(entry) = entry else {
            self.expected = None;
            return;
        };
        // The copy in the journal is the newer one.
        if let (Some((at, copy)), true) = (self.journal_entry(n), n < self.published)
            && copy != entry
        {
            let bytes = Some((at as u64, (at + copy.len()) as u64));
            self.report.find(
                JOURNAL,
                bytes,
                Some((n, n)),
                "it differs from the published record",
            );
        }
        let place = Some((n, n));
        let read =
            record::split(&entry).and_then(|(text, mac)| Ok((Record::read(text)?, text, mac)));
        let (record, text, mac) = match read {
            Ok(read) => read,
            Err(error) => {
                return self
                    .report
                    .find(&block.file, None, place, error.to_string());
            }
        };
        if record.n != n {
            let text = format!("it says that it is record {}", record.n);
            self.report.find(&block.file, None, place, text);
        }
        if self.expected.is_some_and(|epoch| epoch != record.epoch) {
            let text = format!("it is of epoch {}, out of turn", record.epoch);
            self.report.find(&block.file, None, place, text);
        }
        let first = self.report.times.map_or(record.at, |(first, _)| first);
        self.report.times = Some((first, record.at));
        self.follow_chain(record.epoch);
        if let (Some(chain), Some(before)) = (&self.chain, before) {
            match chain.mac(&before, text) == mac {
                true => self.report.coded += 1,
                false => {
                    let text = "its code is not that of the chain's key";
                    self.report.find(&block.file, None, place, text);
                }
            }
        }
        if self
            .view
            .as_ref()
            .and_then(|view| view.header.as_ref())
            .is_some_and(|header| header.base == n + 1 && link(header) != Some(mac))
        {
            let text = "its beginning is not chained to the record before";
            self.report.find(JOURNAL, None, place, text);
        }
        self.last = Some(mac);
        self.expected = Some(record.epoch);
        if let Some(Event::EpochEnd { size, fresh_key }) = record::event(text) {
            self.ended.push((record.epoch, size));
            self.expected = Some(record.epoch + 1);
            if fresh_key {
                self.chain = None;
            }
        }
    }

    /// Moves the key of the chain to this epoch, if it is known.
    fn follow_chain(&mut self, epoch: u64) {
        if let Some(given) = &self.options.chain
            && given.epoch() == epoch
            && self
                .chain
                .as_ref()
                .is_none_or(|chain| chain.epoch() != epoch)
        {
            self.chain = Some(ChainKey::new(epoch, *given.bytes()));
        }
        if let Some(chain) = &self.chain
            && chain.epoch() + 1 == epoch
        {
            self.chain = Some(chain.next());
        }
        self.chain.take_if(|chain| chain.epoch() != epoch);
    }

    fn check_heads(&mut self) {
        let size = self.edge.size();
        let Some(heads) = self.heads.remove(&size) else {
            return;
        };
        let root = self.edge.root();
        for head in heads.into_iter().filter(|head| head.root != root) {
            let text = format!("the {size} records before do not have the root that was signed");
            let records = size.checked_sub(1).map(|last| (0, last));
            self.report.find(head.file, head.bytes, records, text);
        }
    }

    fn check_partial_tiles(&mut self) -> io::Result<()> {
        let tiles: Vec<Tile> = self
            .edge
            .partial_tiles()
            .filter(|tile| tile.level > 0)
            .collect();
        tiles.iter().try_for_each(|tile| self.check_tile(tile))
    }

    /// Compares a tile above level 0 with the one on disk.
    fn check_tile(&mut self, tile: &Tile) -> io::Result<()> {
        let width = tile.hashes.len();
        let file = tile_path(tile.level, tile.index, width);
        let bytes = self.archive.tile(tile.level, tile.index, width)?;
        let found = bytes
            .and_then(|bytes| hashes(&bytes))
            .filter(|hashes| hashes.len() == width);
        let Some(found) = found else {
            self.report
                .find(file, None, None, "it is missing, or has another length");
            return Ok(());
        };
        let below = 1_u64 << (8 * u32::from(tile.level));
        for (at, (found, wanted)) in found.iter().zip(&tile.hashes).enumerate() {
            if found != wanted {
                let bytes = Some((at as u64 * 32, at as u64 * 32 + 31));
                let first = (tile.index * TILE_WIDTH as u64 + at as u64) * below;
                let text = "the hash, or all of these records with their hashes, were changed";
                self.report
                    .find(&file, bytes, Some((first, first + below - 1)), text);
            }
        }
        Ok(())
    }

    fn check_epochs(&mut self) {
        let known = self.report.epochs;
        for (epoch, size) in std::mem::take(&mut self.ended) {
            // The signature is made right behind the record.
            let is_last = size == self.report.size && self.options.live;
            if epoch >= known && !is_last {
                let file = PathBuf::from(EPOCHS).join(epoch.to_string());
                self.report.find(
                    file,
                    None,
                    Some((size - 1, size - 1)),
                    "the root of this epoch is missing",
                );
            }
        }
    }
}

/// Number that an entry gives itself, if that is another one.
fn other_number(entry: &[u8], n: u64) -> Option<u64> {
    let (text, _) = record::split(entry).ok()?;
    let record = Record::read(text).ok()?;
    (record.n != n).then_some(record.n)
}
