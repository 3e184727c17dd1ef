//! A model of the store that others may have pieces of: which are here, and how they are read.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError, RwLock};

use bytes::Bytes;
use mesh_proto::HeldModel;
use mesh_share::{PieceSet, Wanted};
use mesh_store::{Digest, Manifest, PieceId, SignedManifest, Store};
use tokio::sync::watch;

use super::origin;

/// See the module's page. Its pieces are numbered through all its files.
pub(crate) struct Held {
    pub(super) fingerprint: Digest,
    pub(super) signed: SignedManifest,
    store: Store,
    /// By number.
    ids: Vec<PieceId>,
    /// Number of each file's first piece.
    first: Vec<u32>,
    here: RwLock<PieceSet>,
    /// What it goes by besides the manifest's name.
    names: Mutex<Vec<String>>,
    /// Files that were opened to be read from, with the paths that they had then.
    open: Mutex<HashMap<u32, (PathBuf, std::sync::Arc<File>)>>,
    /// Counts the changes of what is here.
    changes: watch::Sender<u64>,
}

impl Held {
    /// A model whose manifest is in the store, with what is there of it.
    pub(super) fn new(store: &Store, fingerprint: Digest, signed: SignedManifest) -> Self {
        let ids: Vec<PieceId> = signed.manifest.pieces().collect();
        let mut first = Vec::new();
        let mut next = 0;
        for file in &signed.manifest.files {
            first.push(next);
            next += file.pieces.len() as u32;
        }
        let held = Held {
            here: RwLock::new(PieceSet::none(next)),
            fingerprint,
            signed,
            store: store.clone(),
            ids,
            first,
            names: Mutex::default(),
            open: Mutex::default(),
            changes: watch::Sender::new(0),
        };
        held.look();
        held
    }

    /// Finds out what of it is in the store.
    pub(super) fn look(&self) {
        let mut here = PieceSet::none(self.pieces());
        for (index, file) in (0..).zip(&self.manifest().files) {
            let presence = self.store.presence(&self.fingerprint, file);
            for (piece, range) in (0..).zip(&file.pieces) {
                if presence.have.contains(&range.range()) {
                    here.insert(self.number(PieceId { file: index, piece }));
                }
            }
        }
        *self.here.write().unwrap_or_else(PoisonError::into_inner) = here;
        self.changes.send_modify(|count| *count += 1);
    }

    pub(crate) fn manifest(&self) -> &Manifest {
        &self.signed.manifest
    }

    /// Its fingerprint.
    pub(crate) fn fingerprint(&self) -> Digest {
        self.fingerprint
    }

    /// What tells it from other models where it is served: the digest of its file, the manifest's where there are several.
    pub(crate) fn file_fingerprint(&self) -> String {
        match &self.manifest().files[..] {
            [only] => only.sha256.to_string(),
            _ => self.fingerprint.to_string(),
        }
    }

    /// How many pieces it has.
    pub(super) fn pieces(&self) -> u32 {
        self.ids.len() as u32
    }

    pub(super) fn id(&self, piece: u32) -> Option<PieceId> {
        self.ids.get(piece as usize).copied()
    }

    pub(super) fn number(&self, id: PieceId) -> u32 {
        self.first
            .get(id.file as usize)
            .map_or(u32::MAX, |first| first + id.piece)
    }

    /// The pieces that are here.
    pub(super) fn here(&self) -> PieceSet {
        self.here
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Number of pieces that are here.
    pub(crate) fn pieces_here(&self) -> u64 {
        u64::from(self.here().len())
    }

    /// A piece has been verified and written.
    pub(super) fn has(&self, piece: u32) {
        let mut here = self.here.write().unwrap_or_else(PoisonError::into_inner);
        here.insert(piece);
        drop(here);
        self.changes.send_modify(|count| *count += 1);
    }

    /// Wakes when there is more of it here.
    pub(super) fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// What is lacking of these pieces.
    pub(super) fn missing(&self, pieces: &PieceSet) -> PieceSet {
        let mut missing = pieces.clone();
        missing.subtract(&self.here());
        missing
    }

    /// All of it.
    pub(super) fn all(&self) -> PieceSet {
        PieceSet::all(self.pieces())
    }

    /// What is needed to know the model without any of its weights: headers, and files without tensors.
    pub(super) fn headers(&self) -> PieceSet {
        let files = (0..).zip(&self.manifest().files);
        let ids = files.flat_map(|(file, described)| {
            let pieces = described.pieces_of(0..described.header());
            pieces.map(move |piece| PieceId { file, piece })
        });
        PieceSet::of(self.pieces(), ids.map(|id| self.number(id)))
    }

    /// What a stage of these layers needs, of `total`.
    pub(super) fn layers(&self, layers: Range<u32>, total: u32) -> PieceSet {
        let ids = self.manifest().pieces_for(layers, total);
        PieceSet::of(self.pieces(), ids.into_iter().map(|id| self.number(id)))
    }

    /// Bytes of these pieces.
    pub(super) fn bytes_of(&self, pieces: &PieceSet) -> u64 {
        let ids = pieces.iter().filter_map(|piece| self.id(piece));
        let pieces = ids.filter_map(|id| self.manifest().piece(id));
        pieces.map(|(_, piece)| u64::from(piece.bytes)).sum()
    }

    /// A piece as the swarm wants it.
    pub(super) fn wanted(&self, piece: u32) -> Option<Wanted> {
        let id = self.id(piece)?;
        let (file, described) = self.manifest().piece(id)?;
        Some(Wanted {
            piece,
            bytes: described.bytes,
            sha256: *described.sha256.as_bytes(),
            urgent: described.offset < file.header(),
        })
    }

    /// A piece's bytes, compared with the manifest; none if it is not here. Blocks for as long as the disk takes.
    pub(super) fn read(&self, piece: u32) -> io::Result<Option<Bytes>> {
        let here = self
            .here
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .contains(piece);
        let found = self
            .id(piece)
            .and_then(|id| Some((id, self.manifest().piece(id)?)));
        let Some((id, (_, described))) = found.filter(|_| here) else {
            return Ok(None);
        };
        let file = self.file(id.file)?;
        let mut bytes = vec![0; described.bytes as usize];
        file.read_exact_at(&mut bytes, described.offset)?;
        if !described.is(&bytes) {
            // The disk, or somebody who wrote into a file outside the store.
            let mut here = self.here.write().unwrap_or_else(PoisonError::into_inner);
            here.remove(piece);
            return Err(io::Error::other(format!(
                "piece {piece} is damaged on this machine's disk"
            )));
        }
        Ok(Some(bytes.into()))
    }

    fn file(&self, index: u32) -> io::Result<std::sync::Arc<File>> {
        let missing = || io::Error::other("the file is gone");
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((path, file)) = open.get(&index)
            && path.exists()
        {
            return Ok(file.clone());
        }
        let described = self.manifest().files.get(index as usize);
        let described = described.ok_or_else(missing)?;
        let presence = self.store.presence(&self.fingerprint, described);
        let path = presence.path.ok_or_else(missing)?;
        let file = std::sync::Arc::new(mesh_model::file::open_regular(&path)?);
        open.insert(index, (path, file.clone()));
        Ok(file)
    }

    /// Has it go by `name`, too. Says whether that is news.
    pub(super) fn add_name(&self, name: &str) -> bool {
        let mut names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        let news = !names.iter().any(|known| known == name);
        if news {
            names.push(name.to_owned());
        }
        news
    }

    /// What it goes by on the hub, if that is known.
    pub(super) fn hub_name(&self) -> Option<String> {
        let names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        names.iter().find(|name| origin::is_name(name)).cloned()
    }

    /// Whether it goes by this name.
    pub(super) fn is_called(&self, name: &str) -> bool {
        let names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        self.manifest().name.eq_ignore_ascii_case(name)
            || names.iter().any(|known| known.eq_ignore_ascii_case(name))
            || self.fingerprint.to_string() == name
    }

    /// What the head is told of it.
    pub(super) fn to_proto(&self) -> HeldModel {
        let names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        let mut names = names.clone();
        names.insert(0, self.manifest().name.clone());
        HeldModel {
            fingerprint: self.fingerprint.to_string(),
            names,
            bytes: self.manifest().bytes(),
            pieces: Some(self.here().to_proto()),
            signed: !self.signed.signatures.is_empty(),
        }
    }

    /// What is opened to load it: the file, or the folder of a model of several. Names as the store links them.
    pub(crate) fn path(&self) -> Result<PathBuf, mesh_store::StoreError> {
        let folder = self.store.folder(&self.fingerprint)?;
        Ok(match &self.manifest().files[..] {
            [only] => folder.join(only.relative_path()),
            _ => folder,
        })
    }
}
