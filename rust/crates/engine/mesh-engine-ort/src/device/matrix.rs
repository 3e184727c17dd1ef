//! A matrix of a GGUF file as the constants of ONNX Runtime's `MatMulNBits`, weight for weight.
//!
//! `MatMulNBits` computes with `w = d·(code − z)`, z = 8 for codes of 4 bits and 128 for codes of 8. A float
//! zero point would make it many times slower, so types with a minimum, `w = d·q + m`, become `d·(q − z) +
//! m′` with `m′ = m + d·z`, and the second term is a product of its own: `x·m′` summed over a block is the
//! sum of the block's x times m′.
//!
//! | type | bits | block | code | m′ |
//! |---|---|---|---|---|
//! | Q4_0 | 4 | 32 | q | |
//! | Q4_1, Q4_K | 4 | 32 | q | m + 8d |
//! | Q5_0 | 8 | 32 | q + 112 | |
//! | Q5_1, Q5_K | 8 | 32 | q + 112 | m + 16d |
//! | Q6_K | 8 | 16 | q + 96 | |
//! | Q8_0 | 8 | 32 | q + 128 | |
//! | Q2_K, TQ1_0, TQ2_0 | 4 | 16 | q | m + 8d |
//! | IQ4_NL, MXFP4 | 8 | 32 | value of q in the codebook + 128 | |
//! | Q3_K, IQ4_XS, other IQ types | 8 | 16 | value of q in the codebook + 128 | |
//!
//! Matrices of floats stay matrices of floats.

use std::borrow::Cow;

use half::f16;
use mesh_model::{GgmlType, dequantize};
use mesh_quant::{Stretch, stretch};

/// Representation of a GGUF type as constants of the graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum MatrixForm {
    /// `[inputs, outputs]` of the graph's precision, for a plain `MatMul`.
    Plain,
    /// Codes and scales for `MatMulNBits`, with a matrix m′ if `minimum`.
    Blocks {
        bits: usize,
        block: usize,
        minimum: bool,
    },
}

impl MatrixForm {
    pub(super) fn of(ty: GgmlType) -> MatrixForm {
        let blocks = |bits, block, minimum| MatrixForm::Blocks {
            bits,
            block,
            minimum,
        };
        match ty {
            GgmlType::F32 | GgmlType::F16 | GgmlType::BF16 => MatrixForm::Plain,
            GgmlType::Q4_0 => blocks(4, 32, false),
            GgmlType::Q4_1 | GgmlType::Q4_K => blocks(4, 32, true),
            GgmlType::Q5_0 | GgmlType::Q8_0 => blocks(8, 32, false),
            GgmlType::Q5_1 | GgmlType::Q5_K => blocks(8, 32, true),
            GgmlType::Q2_K | GgmlType::TQ1_0 | GgmlType::TQ2_0 => blocks(4, 16, true),
            GgmlType::IQ4_NL | GgmlType::MXFP4 => blocks(8, 32, false),
            GgmlType::Q6_K
            | GgmlType::Q3_K
            | GgmlType::IQ1_S
            | GgmlType::IQ1_M
            | GgmlType::IQ2_XXS
            | GgmlType::IQ2_XS
            | GgmlType::IQ2_S
            | GgmlType::IQ3_XXS
            | GgmlType::IQ3_S
            | GgmlType::IQ4_XS => blocks(8, 16, false),
        }
    }
}

/// A matrix of the file: rows of `inputs` weights, one row for each output.
#[derive(Debug)]
pub(super) struct FileMatrix<'a> {
    pub(super) ty: GgmlType,
    pub(super) inputs: usize,
    pub(super) outputs: usize,
    pub(super) data: Cow<'a, [u8]>,
}

/// The constants of one or more matrices under each other.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Constants {
    /// `[outputs, inputs / block, block · bits / 8]`: of two codes in a byte the earlier one lies low.
    pub(super) codes: Vec<u8>,
    /// `[outputs, inputs / block]`.
    pub(super) scales: Vec<f32>,
    /// m′, `[inputs / block, outputs]`; empty without minima.
    pub(super) minima: Vec<f32>,
    /// `[inputs, outputs]`, of a plain matrix.
    pub(super) plain: Vec<f32>,
}

impl Constants {
    /// Reads matrices of the same form and number of inputs, on `threads` threads.
    pub(super) fn read(matrices: &[FileMatrix<'_>], threads: usize) -> Constants {
        let Some(first) = matrices.first() else {
            return Constants::default();
        };
        let (form, inputs) = (MatrixForm::of(first.ty), first.inputs);
        let outputs: usize = matrices.iter().map(|matrix| matrix.outputs).sum();
        match form {
            MatrixForm::Plain => {
                let mut rows = vec![0.0; outputs * inputs];
                let mut at = 0;
                for matrix in matrices {
                    let out = &mut rows[at..][..matrix.outputs * inputs];
                    // The loader has checked that the data is as long as the dimensions say.
                    let read = dequantize(matrix.ty, &matrix.data, out);
                    debug_assert!(read.is_ok());
                    at += out.len();
                }
                Constants {
                    plain: transpose(&rows, outputs, inputs),
                    ..Constants::default()
                }
            }
            MatrixForm::Blocks {
                bits,
                block,
                minimum,
            } => {
                let (row_codes, row_blocks) = (inputs * bits / 8, inputs / block);
                let mut codes = vec![0; outputs * row_codes];
                let mut scales = vec![0.0; outputs * row_blocks];
                let mut minima = vec![0.0; if minimum { outputs * row_blocks } else { 0 }];
                let mut rest = (&mut codes[..], &mut scales[..], &mut minima[..]);
                for matrix in matrices {
                    let take = |n: usize| n * matrix.outputs;
                    let (codes, more_codes) = rest.0.split_at_mut(take(row_codes));
                    let (scales, more_scales) = rest.1.split_at_mut(take(row_blocks));
                    let with_minima = if minimum { take(row_blocks) } else { 0 };
                    let (minima, more_minima) = rest.2.split_at_mut(with_minima);
                    rest = (more_codes, more_scales, more_minima);
                    read_rows(matrix, bits, block, (codes, scales, minima), threads);
                }
                Constants {
                    minima: match minimum {
                        true => transpose(&minima, outputs, row_blocks),
                        false => minima,
                    },
                    codes,
                    scales,
                    plain: Vec::new(),
                }
            }
        }
    }
}

/// Fills codes, scales and, if there are any, minima, row by row.
fn read_rows(
    matrix: &FileMatrix<'_>,
    bits: usize,
    block: usize,
    (codes, scales, minima): (&mut [u8], &mut [f32], &mut [f32]),
    threads: usize,
) {
    let ty = matrix.ty;
    let row_bytes = matrix.data.len() / matrix.outputs.max(1);
    let (row_codes, row_blocks) = (matrix.inputs * bits / 8, matrix.inputs / block);
    let share = matrix.outputs.div_ceil(threads.max(1)).max(1);
    std::thread::scope(|scope| {
        let mut minima = minima;
        for ((data, codes), scales) in matrix
            .data
            .chunks(share * row_bytes)
            .zip(codes.chunks_mut(share * row_codes))
            .zip(scales.chunks_mut(share * row_blocks))
        {
            let count = if minima.is_empty() { 0 } else { scales.len() };
            let (mine, others) = std::mem::take(&mut minima).split_at_mut(count);
            minima = others;
            scope.spawn(move || {
                for (i, row) in data.chunks_exact(row_bytes).enumerate() {
                    let codes = &mut codes[i * row_codes..][..row_codes];
                    let scales = &mut scales[i * row_blocks..][..row_blocks];
                    let minima = mine.get_mut(i * row_blocks..(i + 1) * row_blocks);
                    read_row(ty, row, bits, codes, scales, minima);
                }
            });
        }
    });
}

fn read_row(
    ty: GgmlType,
    row: &[u8],
    bits: usize,
    codes: &mut [u8],
    scales: &mut [f32],
    mut minima: Option<&mut [f32]>,
) {
    let values = ty.codebook().map(|book| book.values());
    // Of one stretch: two where blocks have 16 weights.
    let count = scales.len() * 4 * bits / codes.len().max(1);
    for (index, codes) in codes.chunks_exact_mut(4 * bits).enumerate() {
        let weights = stretch(ty, row, index);
        let Scale { scale, minimum } = Scale::of(ty, &weights);
        scales[count * index..][..count].copy_from_slice(&scale[..count]);
        if let Some(minima) = &mut minima {
            minima[count * index..][..count].copy_from_slice(&minimum[..count]);
        }
        if bits == 4 {
            for (code, pair) in codes.iter_mut().zip(weights.q.as_chunks::<2>().0) {
                *code = pair[0] | pair[1] << 4;
            }
        } else {
            for (code, q) in codes.iter_mut().zip(weights.q) {
                *code = match values {
                    Some(values) => values[usize::from(q)].cast_unsigned() ^ 0x80,
                    None => q + offset(ty),
                };
            }
        }
    }
}

/// Number added to the file's code so that 128 stands for 0, or for the middle where the type has a minimum.
fn offset(ty: GgmlType) -> u8 {
    match ty {
        GgmlType::Q5_0 | GgmlType::Q5_1 | GgmlType::Q5_K => 112,
        GgmlType::Q6_K => 96,
        _ => 0,
    }
}

struct Scale {
    /// Scales of both halves of the stretch.
    scale: [f32; 2],
    /// m′ of both halves.
    minimum: [f32; 2],
}

impl Scale {
    fn of(ty: GgmlType, weights: &Stretch) -> Scale {
        let d = weights.scale(ty);
        let m = f16::from_bits(weights.m).to_f32();
        let [first, second] = weights.codes.map(f32::from);
        // The code that the graph takes for 0.
        let middle = match ty {
            GgmlType::Q5_1 | GgmlType::Q5_K => 16.0,
            _ => 8.0,
        };
        match ty {
            GgmlType::Q4_K | GgmlType::Q5_K => Scale {
                scale: [d * first; 2],
                minimum: [middle * d * first - m * second; 2],
            },
            GgmlType::Q2_K | GgmlType::TQ1_0 | GgmlType::TQ2_0 => {
                let codes = weights.codes.map(i8::cast_unsigned);
                let scale = codes.map(|code| d * f32::from(code & 15));
                let less = codes.map(|code| m * f32::from(code >> 4));
                Scale {
                    scale,
                    minimum: [0, 1].map(|half| middle * scale[half] - less[half]),
                }
            }
            _ if ty == GgmlType::Q6_K || ty.codebook().is_some() => Scale {
                scale: [d * first, d * second],
                minimum: [0.0; 2],
            },
            _ => Scale {
                scale: [d; 2],
                minimum: [middle * d + m; 2],
            },
        }
    }
}

/// `[rows, columns]` to `[columns, rows]`.
fn transpose(numbers: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    let mut out = vec![0.0; numbers.len()];
    for (r, row) in numbers.chunks_exact(columns.max(1)).enumerate() {
        for (c, number) in row.iter().enumerate() {
            out[c * rows + r] = *number;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use mesh_model::synth::{Shape, Tokens, random_model};
    use mesh_model::{Architecture, Model};

    use super::*;

    /// Weight `[output][input]` by the definition of `MatMulNBits`, plus m′.
    fn weight(c: &Constants, form: MatrixForm, shape: (usize, usize), at: (usize, usize)) -> f32 {
        let ((outputs, inputs), (output, input)) = (shape, at);
        let MatrixForm::Blocks {
            bits,
            block,
            minimum,
        } = form
        else {
            return c.plain[input * outputs + output];
        };
        let code = match bits {
            4 => c.codes[(output * inputs + input) / 2] >> (4 * (input % 2)) & 15,
            _ => c.codes[output * inputs + input],
        };
        let zero = if bits == 4 { 8 } else { 128 };
        let scale = c.scales[output * (inputs / block) + input / block];
        let m = match minimum {
            true => c.minima[input / block * outputs + output],
            false => 0.0,
        };
        scale * (i32::from(code) - zero) as f32 + m
    }

    #[test]
    fn every_type_keeps_its_weights() {
        for ty in GgmlType::ALL {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("tiny.gguf");
            let shape = Shape::tiny(Architecture::Llama);
            random_model(&shape, ty, Tokens::Bytes, &path).unwrap();
            let model = Model::open(&path).unwrap();
            let names = ["blk.0.attn_q.weight", "blk.0.attn_k.weight"];
            let tensors = names.map(|name| model.tensors().get(name).unwrap());
            let matrices = tensors.map(|tensor| FileMatrix {
                ty: tensor.ty,
                inputs: tensor.dims[0] as usize,
                outputs: tensor.dims[1] as usize,
                data: tensor.data.read().unwrap(),
            });
            let constants = Constants::read(&matrices, 3);
            let expected = tensors.map(|tensor| tensor.to_f32().unwrap()).concat();
            let inputs = matrices[0].inputs;
            let outputs = expected.len() / inputs;
            for (i, expected) in expected.iter().enumerate() {
                let at = (i / inputs, i % inputs);
                let found = weight(&constants, MatrixForm::of(ty), (outputs, inputs), at);
                // m′ is a sum, so the last bits of f32 may differ.
                assert!(
                    (found - expected).abs() <= 1e-6 * expected.abs().max(0.1),
                    "{ty} {at:?}: {found} instead of {expected}"
                );
            }
        }
    }
}
