//! Helpers of several test modules.

use std::path::{Path, PathBuf};

use mesh_model::synth::{self, Shape, Tokens};
use mesh_model::{Architecture, GgmlType};

use crate::manifest::{Manifest, ManifestFile};
use crate::partial::{PartialFile, PartialKey};
use crate::room::Limits;
use crate::store::{Begun, Store};

/// A store without limits, in a folder that goes with it.
pub(crate) fn store() -> (tempfile::TempDir, Store) {
    store_of(None)
}

/// A store of at most so many bytes.
pub(crate) fn store_of(bytes: Option<u64>) -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let limits = Limits {
        bytes,
        keep_free: 0,
    };
    let store = Store::open_with(dir.path().join("store"), limits).unwrap();
    (dir, store)
}

/// `len` bytes that look like nothing else of another `seed`.
pub(crate) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    fastrand::Rng::with_seed(seed).fill(&mut bytes);
    bytes
}

/// A small GGUF file of this family in `dir`.
pub(crate) fn gguf(dir: &Path, architecture: Architecture) -> PathBuf {
    let path = dir.join("tiny.gguf");
    let shape = Shape::tiny(architecture);
    let bytes = synth::random_model_bytes(&shape, GgmlType::Q4_0, Tokens::Bytes);
    std::fs::write(&path, bytes).unwrap();
    path
}

/// A safetensors file with tensors of these names, each of `len` bytes.
pub(crate) fn safetensors(names: &[&str], len: usize) -> Vec<u8> {
    let tensor = |i: usize| {
        let offsets = [i * len, (i + 1) * len];
        serde_json::json!({"dtype": "U8", "shape": [len], "data_offsets": offsets})
    };
    let header: serde_json::Map<_, _> = names
        .iter()
        .enumerate()
        .map(|(i, name)| ((*name).to_owned(), tensor(i)))
        .collect();
    let header = serde_json::to_vec(&header).unwrap();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header);
    file.extend(noise(names.len() as u64, names.len() * len));
    file
}

/// The manifest of the only file in it, `bytes`.
pub(crate) fn manifest_of(name: &str, bytes: &[u8]) -> Manifest {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("weights.bin"), bytes).unwrap();
    Manifest::of_files(name, dir.path(), &["weights.bin".into()], &|_| ()).unwrap()
}

/// Begins a file that is not there yet.
pub(crate) fn begin(store: &Store, file: &ManifestFile) -> PartialFile {
    match store.begin(PartialKey::Blob(file.sha256), file.bytes, file.bytes) {
        Ok(Begun::Partial(partial)) => partial,
        other => panic!("{other:?}"),
    }
}
