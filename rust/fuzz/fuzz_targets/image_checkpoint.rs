//! Any safetensors file is a model of images or an error, and its tensors lie within the file.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_diffusion::checkpoint::{Checkpoint, Module};

fuzz_target!(|data: (&[u8], u16)| {
    // The length of the header is right: to lie about it is another target's subject.
    let (header, tail) = data;
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header);
    bytes.resize(bytes.len() + usize::from(tail), 0);
    let length = bytes.len() as u64;
    let Ok(checkpoint) = Checkpoint::from_bytes(bytes) else {
        return;
    };
    for module in [Module::TextEncoder, Module::TextEncoder2, Module::Unet, Module::Vae] {
        for weight in checkpoint.weights(module).into_iter().flat_map(|weights| weights.iter()) {
            assert!(weight.data.len() as u64 <= length);
            weight.data.read().unwrap();
        }
    }
});
