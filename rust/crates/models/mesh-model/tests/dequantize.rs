//! Dequantisation against ggml's Python reference; `data/make_dequant.py` made the file.

use mesh_model::{GgmlType, Gguf, GgufError, dequantize};

fn reference() -> Gguf {
    Gguf::open(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/data/dequant.gguf"
    ))
    .unwrap()
}

#[test]
fn every_type_gives_the_reference_values_bit_for_bit() {
    let gguf = reference();
    for ty in GgmlType::ALL {
        let tensor = gguf.tensors().get(ty.name()).unwrap();
        assert_eq!(tensor.ty, ty);
        let expected = gguf
            .tensors()
            .get(&format!("{ty}.expected"))
            .unwrap()
            .to_f32()
            .unwrap();
        assert!(expected.len() >= 2 * ty.block_size());
        let values = tensor.to_f32().unwrap();
        for (i, (value, expected)) in values.iter().zip(&expected).enumerate() {
            assert_eq!(
                value.to_bits(),
                expected.to_bits(),
                "{ty} element {i}: {value} is not {expected}"
            );
        }
        assert_eq!(values.len(), expected.len(), "{ty}");
    }
}

#[test]
fn data_that_does_not_fill_the_output_is_refused() {
    for ty in GgmlType::ALL {
        let data = vec![0; ty.type_size()];
        let mut out = vec![0.0; ty.block_size()];
        dequantize(ty, &data, &mut out).unwrap();
        for (bytes, elements) in [
            (data.len() - 1, out.len()),
            (data.len(), 2 * out.len()),
            (0, out.len()),
        ] {
            let result = dequantize(ty, &data[..bytes], &mut vec![0.0; elements]);
            assert!(
                matches!(result, Err(GgufError::Dequantize { .. })),
                "{ty} {bytes} {elements}"
            );
        }
    }
}
