//! Quantised blocks back to f32.

use mesh_quant::GgmlType;

use super::error::GgufError;

/// Dequantises the blocks in `data` to `out`, value for value as ggml's reference functions.
///
/// # Errors
/// If `data` is not exactly the blocks that `out.len()` elements take.
pub fn dequantize(ty: GgmlType, data: &[u8], out: &mut [f32]) -> Result<(), GgufError> {
    Ok(mesh_quant::dequantize(ty, data, out)?)
}
