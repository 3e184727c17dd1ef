//! Writes the files of a model that is fetched.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use mesh_share::PieceSet;
use mesh_store::{Begun, PartialFile, PartialKey, Store, StoreError};

use super::files::ReplicaFiles;
use crate::lock::lock;

/// The files of a model that are written, each opened when its first piece is wanted.
pub(super) struct Writer {
    store: Store,
    files: Mutex<HashMap<u32, Arc<PartialFile>>>,
}

impl Writer {
    pub(super) fn new(store: &Store) -> Self {
        Writer {
            store: store.clone(),
            files: Mutex::default(),
        }
    }

    /// Opens the files that these pieces belong to, and makes room for them.
    pub(super) fn begin(&self, files: &ReplicaFiles, wanted: &PieceSet) -> Result<(), StoreError> {
        let mut bytes: BTreeMap<u32, u64> = BTreeMap::new();
        for (id, _, piece) in wanted.iter().filter_map(|piece| files.map().piece(piece)) {
            *bytes.entry(id.file).or_default() += u64::from(piece.bytes);
        }
        let mut open = lock(&self.files);
        for (index, bytes) in bytes {
            let Some(file) = files.map().manifest().files.get(index as usize) else {
                continue;
            };
            if open.contains_key(&index) {
                self.store.admit(bytes)?;
                continue;
            }
            let (here, all) = (files.here(), files.map().files([index]));
            let had = all.iter().filter(|piece| here.contains(*piece));
            let had = PieceSet::of(files.map().count(), had);
            let key = PartialKey::Blob(file.sha256);
            let wanted = bytes + files.map().bytes_of(&had);
            let begun = patiently(|| self.store.begin(key, file.bytes, wanted))?;
            if let Begun::Partial(partial) = begun {
                open.insert(index, Arc::new(partial));
            }
        }
        Ok(())
    }

    /// Writes a verified piece. Blocks.
    pub(super) fn write(
        &self,
        files: &ReplicaFiles,
        piece: u32,
        data: &[u8],
    ) -> Result<(), String> {
        let Some((id, _, described)) = files.map().piece(piece) else {
            return Err(format!("there is no piece {piece}"));
        };
        let file = lock(&self.files).get(&id.file).cloned();
        let Some(file) = file else {
            // It came twice, and the file is a blob by now.
            return match files.here().contains(piece) {
                true => Ok(()),
                false => Err("its file is not open".to_owned()),
            };
        };
        file.write_at(described.offset, data)
            .map_err(|error| error.to_string())
    }

    /// Makes blobs of files that are whole, and closes them; with `all`, the others, too. Blocks.
    pub(super) fn close(&self, files: &ReplicaFiles, all: bool) -> Result<(), StoreError> {
        let closing: Vec<_> = lock(&self.files)
            .extract_if(|_, file| all || file.is_complete())
            .collect();
        let close = |index: u32, file: Arc<PartialFile>| {
            file.flush()?;
            // A piece that comes twice may be about to be written into it; then the next one makes the blob.
            if file.is_complete()
                && let Ok(file) = Arc::try_unwrap(file)
                && let Some(described) = files.map().manifest().files.get(index as usize)
            {
                file.complete_as(described)?;
            }
            Ok(())
        };
        // The first error is told; the other files are kept for all that.
        let closed = closing.into_iter().map(|(index, file)| close(index, file));
        let closed: Vec<Result<(), StoreError>> = closed.collect();
        closed.into_iter().collect()
    }
}

/// Tries again for a while where another writer is still at work.
fn patiently<T>(mut work: impl FnMut() -> Result<T, StoreError>) -> Result<T, StoreError> {
    let mut attempts = 0;
    loop {
        match work() {
            Err(StoreError::Busy { .. }) if attempts < BUSY_ATTEMPTS => {
                attempts += 1;
                std::thread::sleep(BUSY_PAUSE);
            }
            done => return done,
        }
    }
}

const BUSY_ATTEMPTS: u32 = 100;
const BUSY_PAUSE: Duration = Duration::from_millis(100);
