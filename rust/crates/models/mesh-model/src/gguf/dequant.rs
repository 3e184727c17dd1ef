//! Quantised blocks back to f32, value for value as ggml's reference functions give them.
//!
//! The layouts are those of ggml's `ggml-common.h`. Every block holds its elements in the order written here,
//! low nibbles before high nibbles; scales are f16 unless said otherwise.

use half::{bf16, f16};

use super::error::GgufError;
use super::types::GgmlType;

/// Dequantises the blocks in `data` to `out`.
///
/// # Errors
/// If `data` is not exactly the blocks that `out.len()` elements take.
pub fn dequantize(ty: GgmlType, data: &[u8], out: &mut [f32]) -> Result<(), GgufError> {
    if ty.bytes_for(out.len() as u64) != Some(data.len() as u64) {
        return Err(GgufError::Dequantize {
            ty,
            bytes: data.len(),
            blocks: data.len() / ty.type_size(),
            elements: out.len(),
        });
    }
    match ty {
        GgmlType::F32 => blocks::<4, 1>(data, out, |b, y| y[0] = f32::from_le_bytes(*b)),
        GgmlType::F16 => blocks::<2, 1>(data, out, |b, y| y[0] = half_at(b, 0)),
        GgmlType::BF16 => blocks::<2, 1>(data, out, |b, y| y[0] = bf16::from_le_bytes(*b).to_f32()),
        GgmlType::Q4_0 => blocks(data, out, q4_0),
        GgmlType::Q4_1 => blocks(data, out, q4_1),
        GgmlType::Q5_0 => blocks(data, out, q5_0),
        GgmlType::Q5_1 => blocks(data, out, q5_1),
        GgmlType::Q8_0 => blocks(data, out, q8_0),
        GgmlType::Q4_K => blocks(data, out, q4_k),
        GgmlType::Q5_K => blocks(data, out, q5_k),
        GgmlType::Q6_K => blocks(data, out, q6_k),
    }
    Ok(())
}

fn blocks<const BYTES: usize, const ELEMENTS: usize>(
    data: &[u8],
    out: &mut [f32],
    one: impl Fn(&[u8; BYTES], &mut [f32; ELEMENTS]),
) {
    let (blocks, _) = data.as_chunks::<BYTES>();
    let (outs, _) = out.as_chunks_mut::<ELEMENTS>();
    for (block, out) in blocks.iter().zip(outs) {
        one(block, out);
    }
}

/// Scale d, then 16 bytes of nibbles; element = (nibble − 8) · d.
fn q4_0(block: &[u8; 18], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    for (j, byte) in block[2..].iter().enumerate() {
        out[j] = f32::from(i16::from(byte & 15) - 8) * d;
        out[j + 16] = f32::from(i16::from(byte >> 4) - 8) * d;
    }
}

/// Scale d, minimum m, then 16 bytes of nibbles; element = nibble · d + m.
fn q4_1(block: &[u8; 20], out: &mut [f32; 32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    for (j, byte) in block[4..].iter().enumerate() {
        out[j] = f32::from(byte & 15) * d + m;
        out[j + 16] = f32::from(byte >> 4) * d + m;
    }
}

/// Scale d, 32 fifth bits, then 16 bytes of nibbles; element = (5-bit value − 16) · d.
fn q5_0(block: &[u8; 22], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    let high = u32_at(block, 2);
    for (j, byte) in block[6..].iter().enumerate() {
        out[j] = f32::from(i16::from(byte & 15 | fifth_bit(high, j)) - 16) * d;
        out[j + 16] = f32::from(i16::from(byte >> 4 | fifth_bit(high, j + 16)) - 16) * d;
    }
}

/// Scale d, minimum m, 32 fifth bits, then 16 bytes of nibbles; element = 5-bit value · d + m.
fn q5_1(block: &[u8; 24], out: &mut [f32; 32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    let high = u32_at(block, 4);
    for (j, byte) in block[8..].iter().enumerate() {
        out[j] = f32::from(byte & 15 | fifth_bit(high, j)) * d + m;
        out[j + 16] = f32::from(byte >> 4 | fifth_bit(high, j + 16)) * d + m;
    }
}

/// Scale d, then 32 signed bytes.
fn q8_0(block: &[u8; 34], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    for (y, &q) in out.iter_mut().zip(&block[2..]) {
        *y = f32::from(q as i8) * d;
    }
}

/// Super-scales d and dmin, eight 6-bit pairs of scale and minimum in 12 bytes, then 128 bytes of nibbles:
/// each 32 bytes hold one group of 32 in their low nibbles and the next in their high nibbles.
fn q4_k(block: &[u8; 144], out: &mut [f32; 256]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    for (group, y) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (scale, min) = k_scale_min(&block[4..16], group);
        let (d, m) = (d * scale, dmin * min);
        let quants = &block[16 + group / 2 * 32..][..32];
        for (y, &q) in y.iter_mut().zip(quants) {
            *y = d * f32::from(nibble(q, group)) - m;
        }
    }
}

/// As Q4_K, with 32 bytes of fifth bits before the nibbles: bit `group` of byte `j` belongs to element `j` of
/// that group.
fn q5_k(block: &[u8; 176], out: &mut [f32; 256]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    let high = &block[16..48];
    for (group, y) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (scale, min) = k_scale_min(&block[4..16], group);
        let (d, m) = (d * scale, dmin * min);
        let quants = &block[48 + group / 2 * 32..][..32];
        for ((y, &q), &h) in y.iter_mut().zip(quants).zip(high) {
            let fifth = (h >> group & 1) << 4;
            *y = d * f32::from(nibble(q, group) | fifth) - m;
        }
    }
}

/// 128 bytes of low nibbles, 64 bytes of upper bit pairs, sixteen signed 8-bit scales, super-scale d. Each
/// half of the block is four runs of 32: run r takes its nibbles from bytes `32·(r mod 2)` on (low nibbles
/// for runs 0 and 1) and its upper bits from bit pair r.
fn q6_k(block: &[u8; 210], out: &mut [f32; 256]) {
    let d = half_at(block, 208);
    for (i, y) in out.iter_mut().enumerate() {
        let (side, run, j) = (i / 128, i / 32 % 4, i % 32);
        let low = nibble(block[side * 64 + run % 2 * 32 + j], run / 2);
        let high = block[128 + side * 32 + j] >> (2 * run) & 3;
        let scale = block[192 + i / 16] as i8;
        *y = d * f32::from(scale) * f32::from(i16::from(low | high << 4) - 32);
    }
}

/// The 6-bit scale and minimum of one of the eight groups of a Q4_K or Q5_K block. The first four pairs lie
/// in the low six bits of bytes 0..4 and 4..8; of the others, the low nibbles lie in bytes 8..12 and the
/// upper two bits on top of 0..8.
fn k_scale_min(packed: &[u8], group: usize) -> (f32, f32) {
    let (scale, min) = if group < 4 {
        (packed[group] & 63, packed[group + 4] & 63)
    } else {
        (
            packed[group + 4] & 15 | packed[group - 4] >> 6 << 4,
            packed[group + 4] >> 4 | packed[group] >> 6 << 4,
        )
    };
    (scale.into(), min.into())
}

/// The low nibble for even `which`, the high one for odd.
fn nibble(byte: u8, which: usize) -> u8 {
    byte >> (4 * (which & 1)) & 15
}

fn fifth_bit(high: u32, element: usize) -> u8 {
    ((high >> element & 1) << 4) as u8
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

fn u32_at(block: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]])
}
