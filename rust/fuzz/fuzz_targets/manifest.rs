//! Any bytes are a manifest in canonical form or an error; what a manifest says about its files holds together.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_store::{Digest, Manifest};

fuzz_target!(|data: &[u8]| {
    let Ok(manifest) = Manifest::parse(data) else {
        return;
    };
    assert_eq!(manifest.to_bytes(), data);
    assert_eq!(manifest.fingerprint(), Digest::of(data));
    for file in &manifest.files {
        let covered: u64 = file.pieces.iter().map(|piece| u64::from(piece.bytes)).sum();
        assert_eq!(covered, file.bytes);
        assert!(file.tensors.iter().all(|tensor| tensor.range().end <= file.bytes));
        assert!(file.relative_path().is_relative());
    }
    let layers = manifest.layers();
    let all = manifest.pieces_for(0..layers, layers);
    let first = manifest.pieces_for(0..1, layers);
    assert!(first.iter().all(|id| layers == 0 || all.contains(id)));
    assert!(manifest.bytes_of(&all) <= manifest.bytes());
});
