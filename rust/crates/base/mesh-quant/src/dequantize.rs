//! Rows of the file back to f32, value for value as ggml's reference functions give them.

use std::fmt;

use half::{bf16, f16};

use crate::stretch::{Stretch, stretch};
use crate::types::GgmlType;

/// Bytes that are not exactly the blocks of the elements asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WrongLength {
    /// Type of the blocks.
    pub ty: GgmlType,
    /// Bytes given.
    pub bytes: usize,
    /// Elements asked for.
    pub elements: usize,
}

impl std::error::Error for WrongLength {}

impl fmt::Display for WrongLength {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let WrongLength {
            ty,
            bytes,
            elements,
        } = self;
        let blocks = bytes / ty.type_size();
        write!(
            f,
            "{bytes} bytes of {ty} are {blocks} blocks, which do not fill {elements} elements"
        )
    }
}

/// Dequantises the blocks in `data` to `out`.
///
/// # Errors
/// If `data` is not exactly the blocks that `out.len()` elements take.
pub fn dequantize(ty: GgmlType, data: &[u8], out: &mut [f32]) -> Result<(), WrongLength> {
    if ty.bytes_for(out.len() as u64) != Some(data.len() as u64) {
        return Err(WrongLength {
            ty,
            bytes: data.len(),
            elements: out.len(),
        });
    }
    match ty {
        GgmlType::F32 => floats(data, out, f32::from_le_bytes),
        GgmlType::F16 => floats(data, out, |bytes| f16::from_le_bytes(bytes).to_f32()),
        GgmlType::BF16 => floats(data, out, |bytes| bf16::from_le_bytes(bytes).to_f32()),
        _ => {
            for (index, out) in out.as_chunks_mut().0.iter_mut().enumerate() {
                weights(ty, &stretch(ty, data, index), out);
            }
        }
    }
    Ok(())
}

fn floats<const BYTES: usize>(data: &[u8], out: &mut [f32], read: impl Fn([u8; BYTES]) -> f32) {
    for (out, bytes) in out.iter_mut().zip(data.as_chunks().0) {
        *out = read(*bytes);
    }
}

/// The weights of a stretch. Products of scales and codes are exact in f32.
fn weights(ty: GgmlType, s: &Stretch, out: &mut [f32; 32]) {
    let (d, m) = (s.scale(ty), f16::from_bits(s.m).to_f32());
    if let Some(book) = ty.codebook() {
        let values = book.values();
        return each(out, |i| {
            d * f32::from(s.codes[i / 16]) * f32::from(values[usize::from(s.q[i])])
        });
    }
    let q = |i: usize, bias: i16| f32::from(i16::from(s.q[i]) - bias);
    match ty {
        GgmlType::Q4_0 => each(out, |i| q(i, 8) * d),
        GgmlType::Q5_0 => each(out, |i| q(i, 16) * d),
        GgmlType::Q8_0 => each(out, |i| q(i, 128) * d),
        GgmlType::TQ1_0 | GgmlType::TQ2_0 => each(out, |i| q(i, 1) * d),
        GgmlType::Q2_K => each(out, |i| {
            let code = s.codes[i / 16].cast_unsigned();
            d * f32::from(code & 15) * q(i, 0) - m * f32::from(code >> 4)
        }),
        GgmlType::Q4_K | GgmlType::Q5_K => {
            let [scale, min] = s.codes.map(f32::from);
            each(out, |i| d * scale * q(i, 0) - m * min);
        }
        GgmlType::Q6_K => each(out, |i| d * f32::from(s.codes[i / 16]) * q(i, 32)),
        _ => each(out, |i| q(i, 0) * d + m),
    }
}

fn each(out: &mut [f32; 32], weight: impl Fn(usize) -> f32) {
    for (i, out) in out.iter_mut().enumerate() {
        *out = weight(i);
    }
}
