//! The memory that layers take on a device, before they are loaded. It is exactly that of the graph's constants
//! (module `lower`).

use std::ops::Range;

use mesh_model::gguf::Tensor;
use mesh_model::{ModelConfig, Tensors};

use super::matrix::MatrixForm;
use super::tensors::Precision;

/// Bytes of the constants of layer `number`, without a mixture of experts if it has one.
pub(super) fn layer(
    tensors: &Tensors,
    config: &ModelConfig,
    number: u32,
    precision: Precision,
) -> u64 {
    let prefix = format!("blk.{number}.");
    let mixture = config.mixture_of(number).is_some();
    let own = tensors.iter().filter(|tensor| {
        let name = tensor.name.strip_prefix(&prefix);
        name.is_some_and(|name| {
            let in_mixture = name.starts_with("ffn_") || name == config.ffn_norm();
            !(mixture && in_mixture)
        })
    });
    own.map(|tensor| constant(&tensor, precision))
        .fold(0, u64::saturating_add)
}

/// Bytes of the final norm and of the output matrix.
pub(super) fn head(tensors: &Tensors, config: &ModelConfig, precision: Precision) -> u64 {
    let matrix = match config.tied_embeddings {
        true => "token_embd.weight",
        false => "output.weight",
    };
    ["output_norm.weight", matrix]
        .iter()
        .filter_map(|name| tensors.get(name))
        .map(|tensor| constant(&tensor, precision))
        .fold(0, u64::saturating_add)
}

/// Bytes of the tables of rotations that `layers` need for so many positions.
pub(super) fn rotations(
    config: &ModelConfig,
    layers: Range<u32>,
    positions: usize,
    precision: Precision,
) -> u64 {
    let mut done = [false; 2];
    let mut bytes = 0;
    for number in layers {
        let windowed = config.window_of(number).is_some();
        if !std::mem::replace(&mut done[usize::from(windowed)], true) {
            let columns = config.rope_of(number).frequencies().len();
            bytes += (2 * positions * columns * precision.bytes()) as u64;
        }
    }
    bytes
}

fn constant(tensor: &Tensor<'_>, precision: Precision) -> u64 {
    let number = precision.bytes() as u64;
    let numbers = tensor
        .dims
        .iter()
        .fold(1, |all: u64, dim| all.saturating_mul(*dim));
    if tensor.dims.len() < 2 {
        // Norms of the residual stream are f32; those of heads, and biases, have the graph's precision.
        let of_heads =
            tensor.name.ends_with("_q_norm.weight") || tensor.name.ends_with("_k_norm.weight");
        let narrow = of_heads || tensor.name.ends_with(".bias");
        return numbers.saturating_mul(if narrow { number } else { 4 });
    }
    match MatrixForm::of(tensor.ty) {
        MatrixForm::Plain => numbers.saturating_mul(number),
        MatrixForm::Blocks {
            bits,
            block,
            minimum,
        } => {
            let codes = numbers / 8 * bits as u64;
            let columns = 1 + u64::from(minimum);
            let scales = (numbers / block as u64).saturating_mul(number * columns);
            codes.saturating_add(scales)
        }
    }
}
