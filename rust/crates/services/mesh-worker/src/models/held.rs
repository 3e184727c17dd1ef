//! A model of the store, its pieces that are here, and how they are read for other workers.

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
use mesh_store::{Digest, Manifest, Named, PieceId, SignedManifest, Store};
use tokio::sync::watch;

use super::origin;

/// See the module's page. Its pieces are numbered through all its files.
pub(crate) struct Held {
    pub(super) fingerprint: Digest,
    pub(super) signed: SignedManifest,
    store: Store,
    /// Pieces by number.
    ids: Vec<PieceId>,
    /// Number of each file's first piece.
    first: Vec<u32>,
    here: RwLock<PieceSet>,
    /// Names besides the manifest's own, each vouched for.
    names: Mutex<Vec<String>>,
    /// Names that another worker once gave it, not vouched for.
    hearsay: Mutex<Vec<String>>,
    /// Files that were opened to be read from, with the paths that they had then.
    open: Mutex<HashMap<u32, (PathBuf, std::sync::Arc<File>)>>,
    /// Counts the changes of the pieces that are here.
    changes: watch::Sender<u64>,
}

impl Held {
    /// A model whose manifest is in the store, with its pieces that are there.
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
            hearsay: Mutex::default(),
            open: Mutex::default(),
            changes: watch::Sender::new(0),
        };
        held.look();
        held
    }

    /// Checks which of its pieces are in the store.
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

    pub(crate) fn fingerprint(&self) -> Digest {
        self.fingerprint
    }

    /// Fingerprint under which it is served: the digest of its file, or of the manifest where there are
    /// several files.
    pub(crate) fn file_fingerprint(&self) -> String {
        match &self.manifest().files[..] {
            [only] => only.sha256.to_string(),
            _ => self.fingerprint.to_string(),
        }
    }

    /// Number of its pieces.
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

    /// The subset of these pieces that is missing here.
    pub(super) fn missing(&self, pieces: &PieceSet) -> PieceSet {
        let mut missing = pieces.clone();
        missing.subtract(&self.here());
        missing
    }

    /// All pieces of the model.
    pub(super) fn all(&self) -> PieceSet {
        PieceSet::all(self.pieces())
    }

    /// Pieces that are needed to know the model without its weights: headers, and files without tensors.
    pub(super) fn headers(&self) -> PieceSet {
        let files = (0..).zip(&self.manifest().files);
        let ids = files.flat_map(|(file, described)| {
            let pieces = described.pieces_of(0..described.header());
            pieces.map(move |piece| PieceId { file, piece })
        });
        PieceSet::of(self.pieces(), ids.map(|id| self.number(id)))
    }

    /// Pieces that a stage of these layers, of `total`, needs.
    pub(super) fn layers(&self, layers: Range<u32>, total: u32) -> PieceSet {
        let ids = self.manifest().pieces_for(layers, total);
        PieceSet::of(self.pieces(), ids.into_iter().map(|id| self.number(id)))
    }

    /// All of these files.
    pub(super) fn files(&self, files: impl IntoIterator<Item = u32>) -> PieceSet {
        let pieces = files.into_iter().flat_map(|file| {
            let described = self.manifest().files.get(file as usize);
            let count = described.map_or(0, |described| described.pieces.len() as u32);
            (0..count).map(move |piece| PieceId { file, piece })
        });
        PieceSet::of(self.pieces(), pieces.map(|id| self.number(id)))
    }

    /// A whole file, of at most `limit` bytes. Blocks for as long as the disk takes.
    pub(super) fn content(&self, file: u32, limit: u64) -> io::Result<Vec<u8>> {
        let gone = || io::Error::other("it is not here any more");
        let described = self.manifest().files.get(file as usize).ok_or_else(gone)?;
        if described.bytes > limit {
            return Err(io::Error::other(format!("it has over {limit} bytes")));
        }
        let mut content = Vec::new();
        for piece in self.files([file]).iter() {
            content.extend_from_slice(&self.read(piece)?.ok_or_else(gone)?);
        }
        Ok(content)
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

    /// A piece's bytes, compared with the manifest; none if it is not here. Blocks for as long as the disk
    /// takes.
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
            // The disk is faulty, or another program wrote into the file.
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

    /// Adds the name `name`. Returns true if it is new.
    pub(super) fn add_name(&self, name: &str) -> bool {
        let mut names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        let news = !names.iter().any(|known| known == name);
        if news {
            names.push(name.to_owned());
        }
        news
    }

    /// Takes in a name from the store. For names of the hub another worker's word does not count: the name
    /// waits until it is vouched for.
    pub(super) fn add_known(&self, named: &Named) {
        if named.is_hearsay() && origin::is_name(&named.name) {
            let mut hearsay = self.hearsay.lock().unwrap_or_else(PoisonError::into_inner);
            hearsay.push(named.name.clone());
        } else {
            self.add_name(&named.name);
        }
    }

    /// Returns true if another worker once called it so and the name is not vouched for.
    pub(super) fn is_said_to_be(&self, name: &str) -> bool {
        let hearsay = self.hearsay.lock().unwrap_or_else(PoisonError::into_inner);
        hearsay.iter().any(|said| said.eq_ignore_ascii_case(name))
    }

    /// Returns true if all its names are another worker's word.
    fn is_hearsay(&self) -> bool {
        let hearsay = self.hearsay.lock().unwrap_or_else(PoisonError::into_inner);
        let names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        names.is_empty() && !hearsay.is_empty()
    }

    /// Name under which to look it up at the head: one that is vouched for, else its fingerprint. A manifest
    /// may call itself as it likes.
    pub(super) fn title(&self) -> String {
        let names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        let first = names.first().cloned();
        first.unwrap_or_else(|| self.fingerprint.to_string())
    }

    /// Name under which it is served if it was wanted as `asked`: the manifest's own name, unless that has
    /// the form of a hub name.
    pub(crate) fn served_as(&self, asked: &str) -> String {
        match self.has_plain_name() {
            true => self.manifest().name.clone(),
            false => asked.to_owned(),
        }
    }

    fn has_plain_name(&self) -> bool {
        !origin::is_name(&self.manifest().name)
    }

    /// Its name on the hub, if that is known.
    pub(super) fn hub_name(&self) -> Option<String> {
        let names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        names.iter().find(|name| origin::is_name(name)).cloned()
    }

    /// Returns true if it goes by this name.
    pub(super) fn is_called(&self, name: &str) -> bool {
        let own = self
            .own_name()
            .is_some_and(|own| own.eq_ignore_ascii_case(name));
        own || self.is_named(name)
    }

    /// Returns true if it goes by this name in the store, or `name` is its fingerprint. The manifest's own
    /// name does not count.
    pub(super) fn is_named(&self, name: &str) -> bool {
        let names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        names.iter().any(|known| known.eq_ignore_ascii_case(name))
            || self.fingerprint.to_string() == name
    }

    /// Returns true if it has any name in the store.
    pub(super) fn has_names(&self) -> bool {
        let names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        !names.is_empty()
    }

    /// The manifest's own name, where that counts.
    pub(super) fn own_name(&self) -> Option<&str> {
        let counts = self.has_plain_name() && !self.is_hearsay();
        counts.then_some(&self.manifest().name)
    }

    /// Description for the head; `keeps_name` is true if it still goes by the manifest's own name.
    pub(super) fn to_proto(&self, keeps_name: bool) -> HeldModel {
        let own = self.own_name().filter(|_| keeps_name);
        let names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        let mut names = names.clone();
        if let Some(own) = own.filter(|own| !names.iter().any(|name| name == own)) {
            names.insert(0, own.to_owned());
        }
        HeldModel {
            fingerprint: self.fingerprint.to_string(),
            names,
            bytes: self.manifest().bytes(),
            pieces: Some(self.here().to_proto()),
            signed: !self.signed.signatures.is_empty(),
        }
    }

    /// Path to load it from: the file, or the folder of a model of several files. Names as the store links
    /// them.
    pub(crate) fn path(&self) -> Result<PathBuf, mesh_store::StoreError> {
        let folder = self.store.folder(&self.fingerprint)?;
        Ok(match &self.manifest().files[..] {
            [only] => folder.join(only.relative_path()),
            _ => folder,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HUB: &str = "org/m-GGUF:Q8_0";

    fn held(store: &Store, called: &str) -> Held {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("m.bin"), b"bytes").unwrap();
        let files = ["m.bin".into()];
        let manifest = Manifest::of_files(called, folder.path(), &files, &|_| ()).unwrap();
        let signed = SignedManifest::unsigned(manifest);
        let fingerprint = store.put_manifest(&signed).unwrap();
        Held::new(store, fingerprint, signed)
    }

    fn known(store: &Store, held: &Held) {
        for named in store.names().unwrap() {
            held.add_known(&named);
        }
    }

    #[test]
    fn what_another_worker_once_called_a_model_is_no_name_of_the_hubs() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let model = held(&store, "m");
        // As an earlier release left it.
        let fingerprint = model.fingerprint();
        store.name(HUB, &fingerprint, Some("worker liar")).unwrap();
        known(&store, &model);
        assert!(!model.is_called(HUB) && !model.is_called("m"));
        assert!(model.is_said_to_be(HUB));
        assert!(model.to_proto(true).names.is_empty());
        assert_eq!(model.hub_name(), None);
        // What this machine got from the hub itself, and any vouched model, is.
        for vouched in [true, false] {
            match vouched {
                true => store.name_from_worker(HUB, &fingerprint, "a", "the hub"),
                false => store.name(HUB, &fingerprint, Some("http://hub/org/m/tree/0")),
            }
            .unwrap();
            let model = held(&store, "m");
            known(&store, &model);
            assert!(model.is_called(HUB) && model.is_called("m"));
            assert_eq!(model.hub_name().as_deref(), Some(HUB));
        }
    }

    #[test]
    fn a_manifest_gives_itself_no_name_of_the_hubs() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let model = held(&store, "org/other");
        model.add_name("mine");
        assert!(!model.is_called("org/other") && model.is_called("mine"));
        assert_eq!(model.served_as("mine"), "mine");
        assert_eq!(model.to_proto(true).names, ["mine"]);
        assert_eq!(held(&store, "plain").served_as("org/plain"), "plain");
    }
}
