//! The memory that weights take, before they are loaded.

use mesh_kernels::{PackOptions, QMatrix};
use mesh_model::gguf::Tensor;
use mesh_model::{GgmlType, Model};

use crate::options::WeightFormat;
use crate::requantise::changed_to;
use crate::weights::transposed_type;

/// Bytes that a model's matrices take in memory with these weights, packed for the kernels. It may be more
/// than the file has: types of 1 to 3 bits whose weights come from a grid are packed as codes of 3 or 4 bits.
pub fn memory_bytes(model: &Model, format: WeightFormat) -> u64 {
    let tensors = model.tensors().iter();
    tensors
        .map(|tensor| matrix_bytes(&tensor, format))
        .fold(0, u64::saturating_add)
}

/// The same of one tensor; vectors and stacks of biases count as nothing.
pub fn matrix_bytes(tensor: &Tensor<'_>, format: WeightFormat) -> u64 {
    let [inputs, outputs @ ..] = tensor.dims else {
        return 0;
    };
    if outputs.is_empty() || tensor.name.ends_with(".bias") {
        return 0;
    }
    let in_layer = tensor.name.starts_with("blk.");
    let rows = outputs.iter().product::<u64>();
    let (Ok(inputs), Ok(rows)) = (usize::try_from(*inputs), usize::try_from(rows)) else {
        return u64::MAX;
    };
    // Transposed at the load (weights/latent.rs).
    if let (&[plain, rank, heads], true) = (tensor.dims, tensor.name.ends_with(".attn_k_b.weight"))
    {
        let (Ok(rank), Ok(rows)) = (usize::try_from(rank), usize::try_from(plain * heads)) else {
            return u64::MAX;
        };
        let packed = packed(transposed_type(tensor.ty), rows, rank);
        return packed.unwrap_or(tensor.data.len() as u64);
    }
    let ty = changed_to(format, in_layer, tensor.ty, inputs).unwrap_or(tensor.ty);
    packed(ty, rows, inputs).unwrap_or(tensor.data.len() as u64)
}

fn packed(ty: GgmlType, rows: usize, inputs: usize) -> Option<u64> {
    QMatrix::packed_bytes(ty, rows, inputs, pack_options(true))
}

/// Options of the kernels for [`OrtOptions::compact`](crate::OrtOptions::compact).
pub(crate) fn pack_options(compact: bool) -> PackOptions {
    PackOptions {
        coded_scales: compact,
        ..PackOptions::default()
    }
}
