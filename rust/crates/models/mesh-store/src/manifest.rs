//! Manifests: the files of a model, down to pieces that can be fetched and checked one by one.

mod build;
mod check;
mod verify;

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::{Path, PathBuf};

use mesh_model::gguf::split;
use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::layout::{self, Selection};
use crate::ranges::RangeSet;

pub use build::{BuildError, Progress, model_files};
pub use check::ManifestError;
pub use verify::VerifyError;

/// The version of manifests that this crate writes and reads.
pub const VERSION: u32 = 1;

/// Maximum length of a piece in bytes.
pub const MAX_PIECE: u32 = 4 << 20;

/// Maximum length of a manifest in bytes. That of a model of 1 TB has about half of it.
pub const MAX_MANIFEST: usize = 64 << 20;

/// A model's files, pieces and tensors with their digests.
///
/// Its canonical form is JSON with the fields in the order in which they stand here and without spaces;
/// [`Manifest::parse`] takes no other. The SHA-256 of that is the model's fingerprint: two models with the
/// same fingerprint have the same bytes in all their files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of the format; [`VERSION`].
    pub version: u32,
    /// Name that users call the model by.
    pub name: String,
    /// Files of the model; no two have the same path.
    pub files: Vec<ManifestFile>,
}

/// A file of a model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ManifestFile {
    /// Relative to the model's folder, with `/` between the parts.
    pub path: String,
    /// Length in bytes.
    pub bytes: u64,
    /// Digest of the whole file.
    pub sha256: Digest,
    /// Pieces, back to back over the whole file. They end where the layer changes, so that a stage can fetch
    /// just its own.
    pub pieces: Vec<Piece>,
    /// The file's tensors, ascending by offset.
    pub tensors: Vec<TensorRange>,
}

/// A piece of a file: the unit of fetching and of checking before use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Piece {
    /// Position in the file.
    pub offset: u64,
    /// Length, from 1 to [`MAX_PIECE`].
    pub bytes: u32,
    /// SHA-256 of the piece.
    pub sha256: Digest,
}

/// A tensor in a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorRange {
    /// Name of the tensor.
    pub name: String,
    /// Position in the file.
    pub offset: u64,
    /// Length in bytes.
    pub bytes: u64,
    /// SHA-256 of the tensor's bytes.
    pub sha256: Digest,
    /// The layer that it belongs to; none for embeddings, norms outside of layers, and the output.
    pub layer: Option<u32>,
}

/// A piece of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PieceId {
    /// Index in [`Manifest::files`].
    pub file: u32,
    /// Index in [`ManifestFile::pieces`].
    pub piece: u32,
}

impl Manifest {
    /// Encodes the manifest in its canonical form.
    pub fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("numbers, texts and lists are JSON")
    }

    /// SHA-256 of the canonical form.
    pub fn fingerprint(&self) -> Digest {
        Digest::of(self.to_bytes())
    }

    /// Length of all files.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes).sum()
    }

    /// The first part, if the files are the parts of a split GGUF file.
    pub fn first_part(&self) -> Option<&ManifestFile> {
        let first = split::first_of(self.files.iter().map(|file| &*file.path))?;
        self.files.iter().find(|file| file.path == first)
    }

    /// Path to open the model whose files lie in `folder`: the file, the first part of a split one, or the
    /// folder of a model of several files.
    pub fn path_in(&self, folder: &Path) -> PathBuf {
        match (&self.files[..], self.first_part()) {
            ([file], _) | (_, Some(file)) => folder.join(file.relative_path()),
            _ => folder.into(),
        }
    }

    /// Digest under which the model is served, wherever its files lie: that of its file, that of the parts of
    /// a split one ([`split::fingerprint`]), or the manifest's where there are other files.
    pub fn file_fingerprint(&self) -> String {
        match (&self.files[..], self.first_part()) {
            ([only], _) => only.sha256.to_string(),
            (files, Some(_)) => {
                let mut parts: Vec<&ManifestFile> = files.iter().collect();
                parts.sort_by(|a, b| a.path.cmp(&b.path));
                let digests: Vec<Digest> = parts.into_iter().map(|part| part.sha256).collect();
                split::fingerprint(&digests)
            }
            _ => self.fingerprint().to_string(),
        }
    }

    /// Number of layers: one more than the highest that a tensor belongs to.
    pub fn layers(&self) -> u32 {
        let tensors = self.files.iter().flat_map(|file| &file.tensors);
        let highest = tensors.filter_map(|tensor| tensor.layer).max();
        highest.map_or(0, |layer| layer.saturating_add(1))
    }

    /// All pieces, in the order of the files.
    pub fn pieces(&self) -> impl Iterator<Item = PieceId> + '_ {
        (0..).zip(&self.files).flat_map(|(file, held)| {
            (0..held.pieces.len() as u32).map(move |piece| PieceId { file, piece })
        })
    }

    /// The pieces that a stage of `layers` needs, of `total` layers in all: every file's header and every
    /// file without tensors, the tensors of those layers, the embedding if it is the first stage, the output
    /// matrix and the last norm (or the embedding, where that serves for the output, too) if it is the last,
    /// and what belongs to no layer otherwise. In the order of the files.
    pub fn pieces_for(&self, layers: Range<u32>, total: u32) -> Vec<PieceId> {
        let tensors = self.files.iter().flat_map(|file| &file.tensors);
        let names = tensors.map(|tensor| tensor.name.as_str());
        let selection = Selection::new(layers, total, names);
        let mut ids = Vec::new();
        for (index, file) in (0..).zip(&self.files) {
            let mut wanted: BTreeSet<u32> = file.pieces_of(0..file.header()).collect();
            for tensor in &file.tensors {
                let role = match tensor.layer {
                    Some(layer) => layout::Role::Layer(layer),
                    None => layout::role(&tensor.name),
                };
                if selection.wants(role) {
                    wanted.extend(file.pieces_of(tensor.range()));
                }
            }
            let file = index;
            ids.extend(wanted.into_iter().map(|piece| PieceId { file, piece }));
        }
        ids
    }

    /// The file and the piece that `id` means, if there is one.
    pub fn piece(&self, id: PieceId) -> Option<(&ManifestFile, &Piece)> {
        let file = self.files.get(id.file as usize)?;
        Some((file, file.pieces.get(id.piece as usize)?))
    }

    /// Bytes of these pieces; ids that mean none count nothing.
    pub fn bytes_of<'a>(&self, ids: impl IntoIterator<Item = &'a PieceId>) -> u64 {
        let pieces = ids.into_iter().filter_map(|&id| self.piece(id));
        pieces.map(|(_, piece)| u64::from(piece.bytes)).sum()
    }
}

impl ManifestFile {
    /// Bytes before the first tensor; for a file without tensors its length.
    pub fn header(&self) -> u64 {
        // Ascending by offset.
        let first = self.tensors.first();
        first.map_or(self.bytes, |tensor| tensor.offset)
    }

    /// The pieces with bytes in `range`.
    pub fn pieces_of(&self, range: Range<u64>) -> Range<u32> {
        if range.is_empty() {
            return 0..0;
        }
        let pieces = &self.pieces;
        let first = pieces.partition_point(|piece| piece.range().end <= range.start);
        let end = pieces.partition_point(|piece| piece.offset < range.end);
        first as u32..end as u32
    }

    /// The pieces of which all bytes are in `have`, by their indices.
    pub fn pieces_in(&self, have: &RangeSet) -> Vec<u32> {
        let pieces = (0..).zip(&self.pieces);
        let here = pieces.filter(|(_, piece)| have.contains(&piece.range()));
        here.map(|(index, _)| index).collect()
    }

    /// Path of the file relative to the model's folder.
    pub fn relative_path(&self) -> PathBuf {
        self.path.split('/').collect()
    }
}

impl Piece {
    /// Its bytes in the file.
    pub fn range(&self) -> Range<u64> {
        // Checked by parse not to overflow.
        self.offset..self.offset + u64::from(self.bytes)
    }

    /// True if length and digest of `bytes` are those of this piece.
    pub fn is(&self, bytes: &[u8]) -> bool {
        bytes.len() == self.bytes as usize && Digest::of(bytes) == self.sha256
    }
}

impl TensorRange {
    /// Its bytes in the file.
    pub fn range(&self) -> Range<u64> {
        self.offset..self.offset + self.bytes
    }
}

#[cfg(test)]
mod tests;
