//! One stretch of 32 weights of any quantised type as unsigned codes with a scale and an offset.

use half::f16;

use super::WeightType;

/// 32 consecutive weights: `w[i] = d * (q[i] - bias) + m`, or per half `d * sc[i / 16] * (q[i] - bias)` for
/// Q6_K.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Stretch {
    /// Codes, `0..2^bits`.
    pub q: [u8; 32],
    /// Bits of the f16 scale: of the block, or of the super-block of 256 for the K types.
    pub d: u16,
    /// Bits of the f16 minimum (Q4_1, Q5_1) or of the super-block's `dmin` (Q4_K, Q5_K; it counts
    /// negatively).
    pub m: u16,
    /// Integer scale codes of the K types: `[scale, min]` for Q4_K and Q5_K, one per half for Q6_K.
    pub codes: [i8; 2],
}

/// Reads stretch `index` of a row in file format, of a quantised type. The row holds it: checked by the
/// callers through `row_bytes`.
#[inline(always)]
pub fn stretch(ty: WeightType, row: &[u8], index: usize) -> Stretch {
    let bytes = ty.block_bytes();
    match ty {
        WeightType::Q4_0 => {
            let b = &row[index * bytes..][..bytes];
            simple(b, 0, nibbles(&b[2..18]))
        }
        WeightType::Q4_1 => {
            let b = &row[index * bytes..][..bytes];
            simple(b, word(b, 2), nibbles(&b[4..20]))
        }
        WeightType::Q5_0 => {
            let b = &row[index * bytes..][..bytes];
            simple(b, 0, with_high_bits(nibbles(&b[6..22]), &b[2..6]))
        }
        WeightType::Q5_1 => {
            let b = &row[index * bytes..][..bytes];
            simple(b, word(b, 2), with_high_bits(nibbles(&b[8..24]), &b[4..8]))
        }
        WeightType::Q8_0 => {
            let b = &row[index * bytes..][..bytes];
            simple(b, 0, std::array::from_fn(|i| b[2 + i] ^ 0x80))
        }
        WeightType::Q4_K => {
            let b = &row[index / 8 * bytes..][..bytes];
            let part = index % 8;
            let q = &b[16 + part / 2 * 32..][..32];
            let shift = part % 2 * 4;
            Stretch {
                q: std::array::from_fn(|i| (q[i] >> shift) & 15),
                d: word(b, 0),
                m: word(b, 2),
                codes: scale_min(part, &b[4..16]),
            }
        }
        WeightType::Q5_K => {
            let b = &row[index / 8 * bytes..][..bytes];
            let part = index % 8;
            let (high, q) = (&b[16..48], &b[48 + part / 2 * 32..][..32]);
            let shift = part % 2 * 4;
            Stretch {
                q: std::array::from_fn(|i| ((q[i] >> shift) & 15) | (((high[i] >> part) & 1) << 4)),
                d: word(b, 0),
                m: word(b, 2),
                codes: scale_min(part, &b[4..16]),
            }
        }
        WeightType::Q6_K => {
            let b = &row[index / 8 * bytes..][..bytes];
            let (half, part) = (index % 8 / 4, index % 4);
            let low = &b[half * 64 + part % 2 * 32..][..32];
            let high = &b[128 + half * 32..][..32];
            let shift = part / 2 * 4;
            let scales = &b[192 + half * 8 + part * 2..][..2];
            Stretch {
                q: std::array::from_fn(|i| {
                    ((low[i] >> shift) & 15) | (((high[i] >> (2 * part)) & 3) << 4)
                }),
                d: word(b, 208),
                m: 0,
                codes: [scales[0].cast_signed(), scales[1].cast_signed()],
            }
        }
        WeightType::F32 | WeightType::F16 | WeightType::BF16 => Stretch {
            q: [0; 32],
            d: 0,
            m: 0,
            codes: [0; 2],
        },
    }
}

/// Weight `index` of a row of floats in file format.
pub(crate) fn float(ty: WeightType, row: &[u8], index: usize) -> f32 {
    match ty {
        WeightType::F32 => {
            let b = &row[4 * index..][..4];
            f32::from_le_bytes([b[0], b[1], b[2], b[3]])
        }
        WeightType::BF16 => half::bf16::from_bits(word(row, 2 * index)).to_f32(),
        _ => f16::from_bits(word(row, 2 * index)).to_f32(),
    }
}

fn simple(block: &[u8], m: u16, q: [u8; 32]) -> Stretch {
    Stretch {
        q,
        d: word(block, 0),
        m,
        codes: [1, 1],
    }
}

pub(crate) fn word(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

/// 16 bytes: weights 0..16 in the low nibbles, 16..32 in the high ones.
fn nibbles(bytes: &[u8]) -> [u8; 32] {
    std::array::from_fn(|i| (bytes[i % 16] >> (i / 16 * 4)) & 15)
}

fn with_high_bits(q: [u8; 32], bits: &[u8]) -> [u8; 32] {
    let bits = u32::from_le_bytes([bits[0], bits[1], bits[2], bits[3]]);
    std::array::from_fn(|i| q[i] | (((bits >> i) & 1) as u8) << 4)
}

/// The 6-bit scale and minimum of sub-block `j` (`get_scale_min_k4`).
fn scale_min(j: usize, s: &[u8]) -> [i8; 2] {
    let (scale, min) = if j < 4 {
        (s[j] & 63, s[j + 4] & 63)
    } else {
        (
            (s[j + 4] & 15) | ((s[j - 4] >> 6) << 4),
            (s[j + 4] >> 4) | ((s[j] >> 6) << 4),
        )
    };
    [scale.cast_signed(), min.cast_signed()]
}
