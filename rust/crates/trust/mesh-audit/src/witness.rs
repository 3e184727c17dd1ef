//! Cosignatures of witnesses, and records that bind two trails.

use std::io;
use std::path::{Path, PathBuf};

use data_encoding::{BASE64, HEXLOWER};
use mesh_base::files;
use serde::{Deserialize, Serialize};

use crate::archive::{Archive, ArchiveError};
use crate::folder::COSIGNED;
use crate::keys::TrailKeys;
use crate::merkle::{Hash, consistency_proof, is_consistent, root};
use crate::note::{Checkpoint, Note, NoteError};
use crate::record::{self, Event};
use crate::tiles::{TileReader, named, read};

/// Reasons for which a checkpoint gets no cosignature.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WitnessError {
    /// The trail cannot be read.
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    /// Its checkpoint is not signed.
    #[error("the checkpoint: {0}")]
    Note(#[from] NoteError),
    /// The trail does not continue the one that was cosigned before.
    #[error(
        "{origin} was cosigned with {seen} records, and now it has {size} that do not continue them"
    )]
    Inconsistent {
        /// Name of the trail.
        origin: String,
        /// Size that was cosigned.
        seen: u64,
        /// Size now.
        size: u64,
    },
}

impl From<io::Error> for WitnessError {
    fn from(error: io::Error) -> Self {
        Self::Archive(error.into())
    }
}

/// The last cosigned head of a trail.
#[derive(Debug, Serialize, Deserialize)]
struct Seen {
    origin: String,
    size: u64,
    root: String,
}

/// A witness: it cosigns checkpoints of trails that continue what it cosigned before.
#[derive(Debug)]
pub struct Witness<'a> {
    /// Its name as a signer.
    pub name: &'a str,
    /// Its keys.
    pub keys: &'a TrailKeys,
    /// The folder in which it remembers what it cosigned.
    pub memory: &'a Path,
}

impl Witness<'_> {
    /// Cosigns the published checkpoint of a trail, at this time in seconds since the Unix epoch: the
    /// checkpoint with the new line.
    ///
    /// # Errors
    /// If the checkpoint is not signed by the trail's key, or does not continue what was cosigned before.
    pub fn cosign(&self, archive: &Archive, seconds: u64) -> Result<String, WitnessError> {
        let text = archive.published().unwrap_or_default();
        let note = Note::parse(text)?;
        note.verify(&archive.keys()?.log())?;
        let head = &note.checkpoint;
        let path = self.memory.join(file_name(&head.origin));
        if let Some(seen) = self.seen(&path)? {
            let consistent = is_continued(archive, &seen, head)?;
            if seen.origin != head.origin || !consistent {
                return Err(WitnessError::Inconsistent {
                    origin: head.origin.clone(),
                    seen: seen.size,
                    size: head.size,
                });
            }
        }
        let seen = Seen {
            origin: head.origin.clone(),
            size: head.size,
            root: BASE64.encode(&head.root),
        };
        files::create_private_dir(self.memory)?;
        let contents = serde_json::to_vec(&seen).map_err(io::Error::from)?;
        // Before the signature goes out, so that no crash makes it forget one.
        files::replace(&path, &contents, files::PUBLIC)?;
        let line = head.cosign(self.name, self.keys, seconds);
        Ok(String::from_utf8_lossy(text).into_owned() + &line)
    }

    fn seen(&self, path: &Path) -> io::Result<Option<Seen>> {
        let Some(text) = read(path, 4096)? else {
            return Ok(None);
        };
        let seen = serde_json::from_slice(&text);
        seen.map(Some)
            .map_err(|error| named(path, "read", &error.into()))
    }
}

fn file_name(origin: &str) -> String {
    HEXLOWER.encode(&crate::chain::first_link(origin)) + ".json"
}

fn is_continued(archive: &Archive, seen: &Seen, head: &Checkpoint) -> io::Result<bool> {
    let old: Option<Hash> = BASE64
        .decode(seen.root.as_bytes())
        .ok()
        .and_then(|root| root.try_into().ok());
    let (Some(old), true) = (old, seen.size <= head.size) else {
        return Ok(false);
    };
    let mut tiles = TileReader::new(archive.dir(), head.size);
    let proof = consistency_proof(&mut tiles, seen.size, head.size)?;
    Ok(is_consistent(
        (seen.size, &old),
        (head.size, &head.root),
        &proof,
    ))
}

/// Keeps a cosigned checkpoint beside the trail, where verification finds it.
///
/// # Errors
/// If it is not signed by the trail's key; if it cannot be written.
pub fn keep(archive: &Archive, cosigned: &str) -> Result<PathBuf, WitnessError> {
    let note = Note::parse(cosigned.as_bytes())?;
    note.verify(&archive.keys()?.log())?;
    let folder = archive.dir().join(COSIGNED);
    files::create_private_dir(&folder)?;
    let unique = crate::merkle::leaf_hash(cosigned.as_bytes());
    let unique = HEXLOWER.encode(&unique[..4]);
    let path = folder.join(format!("{}-{unique}", note.checkpoint.size));
    files::replace(&path, cosigned.as_bytes(), files::PUBLIC)?;
    Ok(path)
}

/// The record that binds the head of another trail.
pub fn merge_of(other: &Checkpoint) -> Event {
    Event::Merge {
        origin: (&other.origin).into(),
        size: other.size,
        root: BASE64.encode(&other.root).into(),
    }
}

/// Numbers of the records of `trail` that bind heads of `other`, each with whether `other` has such a head.
///
/// # Errors
/// If a file cannot be read.
pub fn merges(trail: &Archive, other: &Archive) -> Result<Vec<(u64, bool)>, ArchiveError> {
    let name = other.keys()?.log().name().to_owned();
    let mut bound = Vec::new();
    trail.entries(0, |n, entry| {
        let text = record::split(entry).map(|(text, _)| text);
        if let Ok(Some(Event::Merge { origin, size, root })) = text.map(record::event)
            && origin.to_string() == name
        {
            bound.push((n, size, root.to_string()));
        }
        true
    })?;
    let published = other.published_size();
    let mut tiles = TileReader::new(other.dir(), published);
    let mut merges = Vec::new();
    for (n, size, wanted) in bound {
        let holds = size <= published && BASE64.encode(&root(&mut tiles, size)?) == wanted;
        merges.push((n, holds));
    }
    Ok(merges)
}
