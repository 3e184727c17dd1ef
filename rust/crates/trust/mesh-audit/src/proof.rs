//! Proofs that a record is in a trail: files in the format of C2SP's tlog-proof, which hold without the
//! trail.

use std::fmt::Write as _;

use data_encoding::BASE64;

use crate::archive::{Archive, ArchiveError};
use crate::keys::Vkey;
use crate::merkle::{Hash, inclusion_proof, leaf_hash, root_by_inclusion};
use crate::note::{LONGEST_NOTE, Note, NoteError};
use crate::record::LONGEST_ENTRY;
use crate::tiles::TileReader;

/// A proof, with the entry that it proves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proof {
    /// The entry.
    pub entry: Vec<u8>,
    /// Its number.
    pub index: u64,
    hashes: Vec<Hash>,
    note: Note,
    note_text: String,
}

/// Reasons for which there is no proof, or it does not hold.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProofError {
    /// The trail cannot be read.
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    /// The record is not under the published checkpoint.
    #[error(
        "record {index} is not published: the checkpoint covers {size} records; a head publishes every few seconds and when it stops"
    )]
    Unpublished {
        /// Number of the record.
        index: u64,
        /// Size of the published trail.
        size: u64,
    },
    /// The entry was deleted, or is lost.
    #[error(
        "record {0} is not there: it was deleted to keep within the limit, or the trail is damaged"
    )]
    Gone(u64),
    /// The file is not a proof.
    #[error("it is not a proof: {0}")]
    Form(&'static str),
    /// The checkpoint is not one, or not signed.
    #[error("its checkpoint: {0}")]
    Note(#[from] NoteError),
    /// The entry is not under the signed root.
    #[error("the record is not in the trail with this root, or the proof was changed")]
    Root,
}

impl Proof {
    /// Proves that record `index` is in the published trail.
    ///
    /// # Errors
    /// If it is not there; if files cannot be read.
    pub fn of(archive: &Archive, index: u64) -> Result<Self, ProofError> {
        let text = archive.published().unwrap_or_default();
        let note = Note::parse(text)?;
        let size = note.checkpoint.size;
        if index >= size {
            return Err(ProofError::Unpublished { index, size });
        }
        let mut entry = None;
        archive.entries(index, |n, bytes| {
            entry = (n == index).then(|| bytes.to_vec());
            false
        })?;
        let entry = entry.ok_or(ProofError::Gone(index))?;
        let mut tiles = TileReader::new(archive.dir(), size);
        let hashes = inclusion_proof(&mut tiles, index, size).map_err(ArchiveError::Io)?;
        let proof = Self {
            entry,
            index,
            hashes,
            note,
            note_text: String::from_utf8_lossy(text).into_owned(),
        };
        proof.check_root()?;
        Ok(proof)
    }

    /// The proof as text. Its line `extra` is the entry, which the format leaves to the application.
    pub fn to_text(&self) -> String {
        let mut text = format!(
            "{TITLE}\nextra {}\nindex {}\n",
            BASE64.encode(&self.entry),
            self.index
        );
        for hash in &self.hashes {
            let _ = writeln!(text, "{}", BASE64.encode(hash));
        }
        text + "\n" + &self.note_text
    }

    /// Reads a proof.
    ///
    /// # Errors
    /// If it is not one.
    pub fn parse(text: &str) -> Result<Self, ProofError> {
        let failed = ProofError::Form;
        if text.len() > LONGEST_PROOF {
            return Err(failed("it is too long"));
        }
        let (head, note_text) = text
            .split_once("\n\n")
            .ok_or(failed("it has no checkpoint"))?;
        let mut lines = head.split('\n');
        if lines.next() != Some(TITLE) {
            return Err(failed("its first line is another one"));
        }
        let extra = lines.next().and_then(|line| line.strip_prefix("extra "));
        let entry = extra.and_then(|entry| BASE64.decode(entry.as_bytes()).ok());
        let entry = entry.ok_or(failed("it has no record in its line extra"))?;
        let index = lines.next().and_then(|line| line.strip_prefix("index "));
        let number = index.and_then(|index| index.parse::<u64>().ok());
        let number = number.filter(|number| Some(number.to_string().as_str()) == index);
        let index = number.ok_or(failed("it has no number in its line index"))?;
        let hash = |line: &str| {
            let hash = BASE64.decode(line.as_bytes()).ok()?;
            Hash::try_from(hash).ok()
        };
        let hashes: Option<Vec<Hash>> = lines.map(hash).collect();
        Ok(Self {
            entry,
            index,
            hashes: hashes.ok_or(failed("a line is not a hash"))?,
            note: Note::parse(note_text.as_bytes())?,
            note_text: note_text.to_owned(),
        })
    }

    /// Checks that the entry is in the trail that this key signs.
    ///
    /// # Errors
    /// If it is not, or the checkpoint is not signed with the key.
    pub fn verify(&self, key: &Vkey) -> Result<(), ProofError> {
        if self.note.checkpoint.origin != key.name() {
            return Err(NoteError::Unsigned(key.name().to_owned()).into());
        }
        self.note.verify(key)?;
        self.check_root()
    }

    fn check_root(&self) -> Result<(), ProofError> {
        let checkpoint = &self.note.checkpoint;
        let leaf = leaf_hash(&self.entry);
        let root = root_by_inclusion(&leaf, self.index, checkpoint.size, &self.hashes);
        match root == Some(checkpoint.root) {
            true => Ok(()),
            false => Err(ProofError::Root),
        }
    }
}

const TITLE: &str = "c2sp.org/tlog-proof@v1";
const LONGEST_PROOF: usize = LONGEST_NOTE + 2 * LONGEST_ENTRY + 64 * 45;
