//! Any bytes are a safetensors file or an error, and its tensors cover its data exactly.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_model::safetensors::Safetensors;

fuzz_target!(|data: (&[u8], u8)| {
    // The length of the header is right in most inputs: to lie about it is easy enough.
    let (header, tail) = data;
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header);
    bytes.resize(bytes.len() + usize::from(tail), 0);
    let Ok(file) = Safetensors::from_bytes(bytes) else {
        return;
    };
    let mut covered = 0;
    for tensor in file.tensors() {
        assert_eq!(
            tensor.elements() * tensor.dtype.size(),
            tensor.data.len() as u64
        );
        covered += tensor.data.len();
        let _ = tensor.to_f32();
    }
    assert_eq!(covered, usize::from(tail));
});
