//! Writes the files of a model that is fetched.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use mesh_share::PieceSet;
use mesh_store::{Begun, PartialFile, PartialKey, Store, StoreError};

use super::files::ReplicaFiles;

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
        for id in wanted.iter().filter_map(|piece| files.map().id(piece)) {
            if let Some((_, piece)) = files.map().manifest().piece(id) {
                *bytes.entry(id.file).or_default() += u64::from(piece.bytes);
            }
        }
        let mut open = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        for (index, bytes) in bytes {
            let Some(file) = files.map().manifest().files.get(index as usize) else {
                continue;
            };
            let here = files.here();
            let first = files.map().number(mesh_store::PieceId {
                file: index,
                piece: 0,
            });
            let last = first + file.pieces.len() as u32;
            let had = PieceSet::of(
                files.map().count(),
                (first..last).filter(|p| here.contains(*p)),
            );
            match open.get(&index) {
                Some(_) => self.store.admit(bytes)?,
                None => {
                    let key = PartialKey::Blob(file.sha256);
                    let wanted = bytes + files.map().bytes_of(&had);
                    let begun = patiently(|| self.store.begin(key, file.bytes, wanted))?;
                    if let Begun::Partial(partial) = begun {
                        open.insert(index, Arc::new(partial));
                    }
                }
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
        let found = files
            .map()
            .id(piece)
            .and_then(|id| Some((id, files.map().manifest().piece(id)?)));
        let Some((id, (_, described))) = found else {
            return Err(format!("there is no piece {piece}"));
        };
        let open = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        let file = open.get(&id.file).cloned();
        drop(open);
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
        let mut open = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        let closing: Vec<u32> = open
            .iter()
            .filter(|(_, file)| all || file.is_complete())
            .map(|(index, _)| *index)
            .collect();
        let closing: Vec<(u32, Arc<PartialFile>)> = closing
            .iter()
            .filter_map(|index| open.remove_entry(index))
            .collect();
        drop(open);
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
        let closed: Vec<Result<(), StoreError>> = closing
            .into_iter()
            .map(|(index, file)| close(index, file))
            .collect();
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
