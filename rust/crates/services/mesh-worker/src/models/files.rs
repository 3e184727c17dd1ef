//! The files of a replica: which pieces are on the disk, and how they are read for other workers.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use mesh_share::PieceSet;
use mesh_store::{PieceId, Store};
use mesh_worker_core::PieceMap;

use crate::core::CoreHandle;
use crate::lock::lock;

/// The files of a replica. Its pieces that are here are known to the core.
pub(crate) struct ReplicaFiles {
    map: Arc<PieceMap>,
    store: Store,
    core: CoreHandle,
    /// Files that were opened to be read from, with the paths that they had then.
    open: Mutex<HashMap<u32, (PathBuf, Arc<File>)>>,
}

/// The pieces of a model that are in the store. Blocks.
pub(super) fn pieces_in(store: &Store, map: &PieceMap) -> PieceSet {
    let mut here = PieceSet::none(map.count());
    for (index, file) in (0..).zip(&map.manifest().files) {
        let presence = store.presence(&map.fingerprint(), file);
        for (piece, range) in (0..).zip(&file.pieces) {
            if presence.have.contains(&range.range()) {
                here.insert(map.number(PieceId { file: index, piece }));
            }
        }
    }
    here
}

impl ReplicaFiles {
    pub(super) fn new(map: Arc<PieceMap>, store: &Store, core: &CoreHandle) -> Arc<Self> {
        Arc::new(ReplicaFiles {
            map,
            store: store.clone(),
            core: core.clone(),
            open: Mutex::default(),
        })
    }

    pub(crate) fn map(&self) -> &Arc<PieceMap> {
        &self.map
    }

    /// Checks which of its pieces are in the store. Blocks.
    pub(super) fn look(&self) {
        let here = pieces_in(&self.store, &self.map);
        let fingerprint = self.map.fingerprint();
        self.core
            .change(|core| core.catalogue.look_result(&fingerprint, here));
    }

    pub(super) fn here(&self) -> PieceSet {
        self.core.with(|core| {
            let replica = core.catalogue.replica(&self.map.fingerprint());
            replica.map_or_else(|| PieceSet::none(self.map.count()), |r| r.here().clone())
        })
    }

    pub(crate) fn pieces_here(&self) -> u64 {
        self.here().len().into()
    }

    /// A whole file, of at most `limit` bytes. Blocks for as long as the disk takes.
    pub(super) fn content(&self, file: u32, limit: u64) -> io::Result<Vec<u8>> {
        let gone = || io::Error::other("it is not here any more");
        let described = self.map.manifest().files.get(file as usize);
        let described = described.ok_or_else(gone)?;
        if described.bytes > limit {
            return Err(io::Error::other(format!("it has over {limit} bytes")));
        }
        let mut content = Vec::new();
        for piece in self.map.files([file]).iter() {
            content.extend_from_slice(&self.read(piece)?.ok_or_else(gone)?);
        }
        Ok(content)
    }

    /// A piece's bytes, compared with the manifest; none if it is not here. Blocks for as long as the disk
    /// takes.
    pub(super) fn read(&self, piece: u32) -> io::Result<Option<Bytes>> {
        let fingerprint = self.map.fingerprint();
        let here = self.core.with(|core| {
            let replica = core.catalogue.replica(&fingerprint);
            replica.is_some_and(|replica| replica.here().contains(piece))
        });
        let Some((id, _, described)) = self.map.piece(piece).filter(|_| here) else {
            return Ok(None);
        };
        let file = self.file(id.file)?;
        let mut bytes = vec![0; described.bytes as usize];
        file.read_exact_at(&mut bytes, described.offset)?;
        if !described.is(&bytes) {
            // The disk is faulty, or another program wrote into the file.
            self.core
                .with(|core| core.catalogue.piece_lost(&fingerprint, piece));
            return Err(io::Error::other(format!(
                "piece {piece} is damaged on this machine's disk"
            )));
        }
        Ok(Some(bytes.into()))
    }

    fn file(&self, index: u32) -> io::Result<Arc<File>> {
        let missing = || io::Error::other("the file is gone");
        let mut open = lock(&self.open);
        if let Some((path, file)) = open.get(&index)
            && path.exists()
        {
            return Ok(file.clone());
        }
        let described = self.map.manifest().files.get(index as usize);
        let described = described.ok_or_else(missing)?;
        let presence = self.store.presence(&self.map.fingerprint(), described);
        let path = presence.path.ok_or_else(missing)?;
        let file = Arc::new(mesh_model::file::open_regular(&path)?);
        open.insert(index, (path, file.clone()));
        Ok(file)
    }

    /// Path to load it from, as the store links it: see [`mesh_store::Manifest::path_in`].
    pub(crate) fn path(&self) -> Result<PathBuf, mesh_store::StoreError> {
        let folder = self.store.folder(&self.map.fingerprint())?;
        Ok(self.map.manifest().path_in(&folder))
    }
}
