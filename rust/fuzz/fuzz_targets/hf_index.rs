//! Any `model.safetensors.index.json` names files of its own folder only, or is an error.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_model::hf::files_of_index;

fuzz_target!(|data: &[u8]| {
    let Ok(files) = files_of_index(data) else {
        return;
    };
    assert!((1..=1024).contains(&files.len()));
    for file in files {
        assert!(!file.contains(['/', '\\', '\0']) && file != ".." && file.len() > 11);
    }
});
