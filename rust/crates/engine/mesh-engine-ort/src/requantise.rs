//! Weights in another format than the file's, in blocks of 32 as ggml defines them (ggml-common.h).

use std::sync::{Mutex, PoisonError};

use half::f16;
use mesh_kernels::Pool;
use mesh_model::file::FileError;
use mesh_model::gguf::Tensor;
use mesh_model::{GgmlType, dequantize};

use crate::options::WeightFormat;

/// The rows of a matrix with `inputs` columns in the blocks of `format`; `None` if they stay as they are:
/// because they have that format, because fewer bits than now would not be fewer, or because rows are not
/// whole blocks.
pub(crate) fn requantise(
    format: WeightFormat,
    in_layer: bool,
    tensor: &Tensor<'_>,
    inputs: usize,
    pool: &Pool,
) -> Result<Option<(GgmlType, Vec<u8>)>, FileError> {
    let Some(ty) = changed_to(format, in_layer, tensor.ty, inputs) else {
        return Ok(None);
    };
    let bytes = |ty: GgmlType| ty.bytes_for(inputs as u64).map(|bytes| bytes as usize);
    let rows = tensor.elements() as usize / inputs;
    let (Some(row_bytes), Some(source_bytes)) = (bytes(ty), bytes(tensor.ty)) else {
        return Ok(None);
    };
    let Some(total) = rows.checked_mul(row_bytes) else {
        return Ok(None);
    };
    let mut out = vec![0; total];
    let tasks: Vec<Mutex<&mut [u8]>> = out
        .chunks_mut(row_bytes * ROWS_PER_TASK)
        .map(Mutex::new)
        .collect();
    let failure = Mutex::new(None);
    pool.run(tasks.len(), &|task| {
        let mut out = tasks[task].lock().unwrap_or_else(PoisonError::into_inner);
        let mut source = vec![0; out.len() / row_bytes * source_bytes];
        if let Err(error) = (tensor.data).read_at(task * ROWS_PER_TASK * source_bytes, &mut source)
        {
            let mut failure = failure.lock().unwrap_or_else(PoisonError::into_inner);
            failure.get_or_insert(error);
            return;
        }
        let mut row = vec![0.0; inputs];
        for (out, source) in out
            .chunks_mut(row_bytes)
            .zip(source.chunks_exact(source_bytes))
        {
            dequantize(tensor.ty, source, &mut row).expect("a whole row of the tensor's type");
            let (blocks, _) = row.as_chunks::<BLOCK>();
            for (out, block) in out.chunks_mut(ty.type_size()).zip(blocks) {
                match ty {
                    GgmlType::Q8_0 => q8_0(block, out),
                    _ => q4_1(block, out),
                }
            }
        }
    });
    drop(tasks);
    match failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(error) => Err(error),
        None => Ok(Some((ty, out))),
    }
}

/// The type that a matrix of type `now` gets, if it gets another.
pub(crate) fn changed_to(
    format: WeightFormat,
    in_layer: bool,
    now: GgmlType,
    inputs: usize,
) -> Option<GgmlType> {
    // Q4_1 has 5 bits a weight, the scales among them.
    let four_bits = 8 * now.type_size() <= 5 * now.block_size();
    let floats = now.block_size() == 1;
    let ty = match format {
        WeightFormat::Int8 if now != GgmlType::Q8_0 => GgmlType::Q8_0,
        WeightFormat::Int4 if in_layer && !four_bits => GgmlType::Q4_1,
        WeightFormat::Int4 if !in_layer && floats => GgmlType::Q8_0,
        _ => return None,
    };
    (inputs != 0 && inputs.is_multiple_of(BLOCK)).then_some(ty)
}

/// Scale, then signed bytes: the largest weight becomes 127 or -127.
fn q8_0(block: &[f32; BLOCK], out: &mut [u8]) {
    let largest = block.iter().fold(0.0f32, |most, x| most.max(x.abs()));
    let d = f16::from_f32(largest / 127.0);
    out[..2].copy_from_slice(&d.to_le_bytes());
    let scale = inverse(d);
    for (out, x) in out[2..].iter_mut().zip(block) {
        *out = ((x * scale).round() as i8).max(-127).cast_unsigned();
    }
}

/// Scale, minimum, then nibbles: the smallest weight becomes 0, the largest 15.
fn q4_1(block: &[f32; BLOCK], out: &mut [u8]) {
    let least = block.iter().copied().fold(f32::INFINITY, f32::min);
    let most = block.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let m = f16::from_f32(least);
    let d = f16::from_f32((most - least) / 15.0);
    out[..2].copy_from_slice(&d.to_le_bytes());
    out[2..4].copy_from_slice(&m.to_le_bytes());
    let scale = inverse(d);
    let code = |x: f32| (((x - m.to_f32()) * scale).round() as u8).min(15);
    let (low, high) = block.split_at(BLOCK / 2);
    for ((out, low), high) in out[4..].iter_mut().zip(low).zip(high) {
        *out = code(*low) | code(*high) << 4;
    }
}

/// Codes are made with the scale that is stored, not with the one before rounding.
fn inverse(d: f16) -> f32 {
    match d.to_f32() {
        d if d > 0.0 => 1.0 / d,
        _ => 0.0,
    }
}

/// Weights in a block.
const BLOCK: usize = 32;
const ROWS_PER_TASK: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;

    fn weights(rows: usize, inputs: usize) -> Vec<f32> {
        let mut state = 1u32;
        (0..rows * inputs)
            .map(|_| {
                state = state.wrapping_mul(1664525).wrapping_add(1013904223);
                (state >> 8) as f32 / (1 << 24) as f32 - 0.4
            })
            .collect()
    }

    fn bytes(data: &[f32]) -> Vec<u8> {
        data.iter().flat_map(|x| x.to_le_bytes()).collect()
    }

    fn tensor<'a>(ty: GgmlType, dims: &'a [u64], data: &'a [u8]) -> Tensor<'a> {
        Tensor {
            name: "blk.0.ffn_up.weight",
            ty,
            dims,
            data: data.into(),
        }
    }

    #[test]
    fn weights_are_off_by_half_a_step_at_most() {
        let (rows, inputs) = (37, 96);
        let weights = weights(rows, inputs);
        let file = bytes(&weights);
        let dims = [inputs as u64, rows as u64];
        let tensor = tensor(GgmlType::F32, &dims, &file);
        // A block spans at most 1: a step is 1/15, or at most 0.6/127; f16 scale and minimum round once more.
        for (format, ggml, most) in [
            (WeightFormat::Int8, GgmlType::Q8_0, 0.6 / 127.0 * 0.6),
            (WeightFormat::Int4, GgmlType::Q4_1, 1.0 / 15.0 * 0.52),
        ] {
            let pool = Pool::new(2);
            let (_, packed) = requantise(format, true, &tensor, inputs, &pool)
                .unwrap()
                .expect("changed");
            let mut back = vec![0.0; rows * inputs];
            dequantize(ggml, &packed, &mut back).expect("whole blocks");
            let worst = weights.iter().zip(&back).map(|(a, b)| (a - b).abs());
            let worst = worst.fold(0.0, f32::max);
            assert!(worst <= most, "{format:?}: {worst} > {most}");
            assert!(
                worst > most / 3.0,
                "{format:?}: {worst} is too good to be true"
            );
        }
    }

    #[test]
    fn what_has_the_format_already_stays() {
        let pool = Pool::new(1);
        let file = vec![0; 34 * 2];
        let eight = tensor(GgmlType::Q8_0, &[32, 2], &file);
        assert!(
            requantise(WeightFormat::Int8, true, &eight, 32, &pool)
                .unwrap()
                .is_none()
        );
        assert!(
            requantise(WeightFormat::File, true, &eight, 32, &pool)
                .unwrap()
                .is_none()
        );
        assert!(
            requantise(WeightFormat::Int4, false, &eight, 32, &pool)
                .unwrap()
                .is_none()
        );
        let (ty, data) = requantise(WeightFormat::Int4, true, &eight, 32, &pool)
            .unwrap()
            .expect("fewer");
        assert_eq!((ty, data), (GgmlType::Q4_1, vec![0; 40]));
        // Floats outside of the layers keep 8 bits.
        let floats = bytes(&weights(2, 32));
        let floats = tensor(GgmlType::F32, &[32, 2], &floats);
        let (ty, _) = requantise(WeightFormat::Int4, false, &floats, 32, &pool)
            .unwrap()
            .expect("fewer");
        assert_eq!(ty, GgmlType::Q8_0);
        // Rows of 33 are not whole blocks.
        let odd = bytes(&weights(1, 66));
        let odd = tensor(GgmlType::F32, &[33, 2], &odd);
        assert!(
            requantise(WeightFormat::Int8, true, &odd, 33, &pool)
                .unwrap()
                .is_none()
        );
    }
}
