//! The pieces of a model, numbered through all its files.

use std::ops::Range;

use mesh_share::{PieceSet, Wanted};
use mesh_store::{Digest, Manifest, ManifestFile, Piece, PieceId, SignedManifest};

use crate::names::is_hub_name;

/// A model's manifest, with its pieces numbered through all its files.
#[derive(Debug)]
pub struct PieceMap {
    fingerprint: Digest,
    signed: SignedManifest,
    /// Pieces by number.
    ids: Vec<PieceId>,
    /// Number of each file's first piece.
    first: Vec<u32>,
}

impl PieceMap {
    /// Numbers the pieces of the model with this manifest.
    pub fn new(signed: SignedManifest) -> Self {
        let mut first = Vec::new();
        let mut next = 0;
        for file in &signed.manifest.files {
            first.push(next);
            next += file.pieces.len() as u32;
        }
        PieceMap {
            fingerprint: signed.manifest.fingerprint(),
            ids: signed.manifest.pieces().collect(),
            first,
            signed,
        }
    }

    /// The manifest with its signatures.
    pub fn signed(&self) -> &SignedManifest {
        &self.signed
    }

    /// The manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.signed.manifest
    }

    /// Digest of the manifest.
    pub fn fingerprint(&self) -> Digest {
        self.fingerprint
    }

    /// Fingerprint under which the model is served: see [`Manifest::file_fingerprint`].
    pub fn file_fingerprint(&self) -> String {
        self.manifest().file_fingerprint()
    }

    /// Name under which it is served if it was wanted as `name`: the manifest's own name, unless that has the
    /// form of a hub name.
    pub fn served_as(&self, name: &str) -> String {
        self.plain_name().unwrap_or(name).to_owned()
    }

    /// The manifest's own name, unless that has the form of a hub name.
    pub(crate) fn plain_name(&self) -> Option<&str> {
        let name = self.manifest().name.as_str();
        (!is_hub_name(name)).then_some(name)
    }

    /// Number of pieces.
    pub fn count(&self) -> u32 {
        self.ids.len() as u32
    }

    /// The piece with this number.
    pub fn id(&self, piece: u32) -> Option<PieceId> {
        self.ids.get(piece as usize).copied()
    }

    /// The piece with this number: where it is, its file, and what the manifest says of it.
    pub fn piece(&self, piece: u32) -> Option<(PieceId, &ManifestFile, &Piece)> {
        let id = self.id(piece)?;
        let (file, described) = self.manifest().piece(id)?;
        Some((id, file, described))
    }

    /// Number of a piece; `u32::MAX` if its file does not exist.
    pub fn number(&self, id: PieceId) -> u32 {
        let first = self.first.get(id.file as usize);
        first.map_or(u32::MAX, |first| first + id.piece)
    }

    /// All pieces.
    pub fn all(&self) -> PieceSet {
        PieceSet::all(self.count())
    }

    /// Pieces that are needed to know the model without its weights: headers, and files without tensors.
    pub fn headers(&self) -> PieceSet {
        let files = (0..).zip(&self.manifest().files);
        let ids = files.flat_map(|(file, described)| {
            let pieces = described.pieces_of(0..described.header());
            pieces.map(move |piece| PieceId { file, piece })
        });
        PieceSet::of(self.count(), ids.map(|id| self.number(id)))
    }

    /// Pieces that a stage of these layers, of `total`, needs.
    pub fn layers(&self, layers: Range<u32>, total: u32) -> PieceSet {
        let ids = self.manifest().pieces_for(layers, total);
        PieceSet::of(self.count(), ids.into_iter().map(|id| self.number(id)))
    }

    /// All pieces of these files.
    pub fn files(&self, files: impl IntoIterator<Item = u32>) -> PieceSet {
        let pieces = files.into_iter().flat_map(|file| {
            let described = self.manifest().files.get(file as usize);
            let count = described.map_or(0, |described| described.pieces.len() as u32);
            (0..count).map(move |piece| PieceId { file, piece })
        });
        PieceSet::of(self.count(), pieces.map(|id| self.number(id)))
    }

    /// Bytes of these pieces.
    pub fn bytes_of(&self, pieces: &PieceSet) -> u64 {
        let pieces = pieces.iter().filter_map(|piece| self.piece(piece));
        pieces.map(|(.., piece)| u64::from(piece.bytes)).sum()
    }

    /// A piece as the swarm wants it.
    pub fn wanted(&self, piece: u32) -> Option<Wanted> {
        let (_, file, described) = self.piece(piece)?;
        Some(Wanted {
            piece,
            bytes: described.bytes,
            sha256: *described.sha256.as_bytes(),
            urgent: described.offset < file.header(),
        })
    }
}
