//! Any `config.json` becomes keys or an error; the keys are a whole GGUF file.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_model::ModelConfig;
use mesh_model::hf::keys_of_config;

fuzz_target!(|data: &[u8]| {
    let Ok(keys) = keys_of_config(data) else {
        return;
    };
    assert!(keys.string("general.architecture").is_ok_and(|name| name.is_some()));
    // Without tensors it is no model.
    assert!(ModelConfig::from_gguf(&keys).is_err());
});
