//! Any bytes are a GGUF file or an error, and what a file says about its tensors is true.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_model::{Gguf, ModelConfig};

fuzz_target!(|data: &[u8]| {
    // Most inputs would fail at the magic number; this spares the fuzzer finding it.
    let bytes = [b"GGUF", data].concat();
    let Ok(gguf) = Gguf::from_bytes(bytes) else {
        return;
    };
    for (_, value) in gguf.metadata_iter() {
        let _ = value.describe();
    }
    for tensor in gguf.tensors().iter() {
        assert_eq!(
            tensor.ty.bytes_for(tensor.elements()),
            Some(tensor.data.len() as u64)
        );
    }
    let _ = ModelConfig::read(&gguf);
});
