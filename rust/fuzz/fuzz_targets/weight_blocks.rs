//! Any bytes are weights of every type, and packing for the kernels keeps them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_kernels::QMatrix;
use mesh_quant::{GgmlType, dequantize};

fuzz_target!(|data: &[u8]| {
    let Some((&first, data)) = data.split_first() else {
        return;
    };
    let ty = GgmlType::ALL[usize::from(first) % GgmlType::ALL.len()];
    let row_blocks = usize::from(first) / GgmlType::ALL.len() + 1;
    let (k, row) = (row_blocks * ty.block_size(), row_blocks * ty.type_size());
    let rows = data.len() / row;
    let data = &data[..rows * row];
    let mut weights = vec![0.0; rows * k];
    dequantize(ty, data, &mut weights).expect("whole blocks");
    if rows == 0 {
        return;
    }
    let matrix = QMatrix::pack(ty, rows, k, data).expect("whole rows");
    assert_eq!(
        QMatrix::packed_bytes(ty, rows, k, Default::default()),
        Some(matrix.bytes() as u64)
    );
    let mut packed = vec![0.0; k];
    for (index, weights) in weights.chunks_exact(k).enumerate() {
        matrix.dequantize_row(index, &mut packed).expect("a row");
        for (packed, weight) in packed.iter().zip(weights) {
            // MXFP4's two scales below the normal numbers are dropped.
            let near = (packed - weight).abs() <= 1e-6 * weight.abs().max(1e-30);
            assert!(
                near || !packed.is_finite() || !weight.is_finite() || with_minimum(ty),
                "{ty}: {packed} instead of {weight}"
            );
        }
    }
});

/// The sum of two numbers of any size may lose all its digits.
fn with_minimum(ty: GgmlType) -> bool {
    use GgmlType::{Q2_K, Q4_1, Q4_K, Q5_1, Q5_K, TQ1_0, TQ2_0};
    matches!(ty, Q2_K | Q4_1 | Q4_K | Q5_1 | Q5_K | TQ1_0 | TQ2_0)
}
