//! Any `config.json` becomes keys or an error.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_model::hf::keys_of_config;
use mesh_model::{Checkpoint, ModelConfig};

fuzz_target!(|data: &[u8]| {
    let Ok(keys) = keys_of_config(data) else {
        return;
    };
    assert!(keys.string("general.architecture").is_ok_and(|name| name.is_some()));
    // Without tensors it is no model.
    assert!(ModelConfig::read(&keys).is_err());
});
