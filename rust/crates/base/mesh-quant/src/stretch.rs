//! One stretch of 32 weights of any quantised type as unsigned codes with a scale and an offset.

use half::f16;

use crate::{GgmlType, grid_types};

/// 32 consecutive weights: `w[i] = d * (q[i] - bias) + m`, or per half `d * sc[i / 16] * (q[i] - bias)` for
/// Q6_K. For types with a [`Codebook`](crate::Codebook), `scale * sc[i / 16] * values[q[i]]`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Stretch {
    /// Codes, `0..2^bits`.
    pub q: [u8; 32],
    /// Bits of the f16 scale: of the block, or of the super-block of 256 for types that have such. MXFP4: its
    /// exponent.
    pub d: u16,
    /// Bits of the f16 minimum (Q4_1, Q5_1) or of the super-block's `dmin` (Q2_K, Q4_K, Q5_K; it counts
    /// negatively; TQ1_0 and TQ2_0: `d` again).
    pub m: u16,
    /// Integer scale codes: `[scale, min]` for Q4_K and Q5_K; one per half for the others, in Q2_K, TQ1_0 and
    /// TQ2_0 with the scale in the low nibble and the minimum in the high one.
    pub codes: [i8; 2],
}

impl Stretch {
    /// The number that the scale codes, or the codes of a block with one scale, are multiplied by.
    pub fn scale(&self, ty: GgmlType) -> f32 {
        let d = f16::from_bits(self.d).to_f32();
        match ty {
            GgmlType::MXFP4 => power_of_two(self.d as u8),
            GgmlType::IQ3_XXS => d * 0.25,
            GgmlType::IQ1_S
            | GgmlType::IQ1_M
            | GgmlType::IQ2_XXS
            | GgmlType::IQ2_XS
            | GgmlType::IQ2_S => d * 0.125,
            _ => d,
        }
    }
}

/// `2^(exponent - 128)`: half an E8M0 number, because E2M1 numbers are stored doubled.
fn power_of_two(exponent: u8) -> f32 {
    let exponent = u32::from(exponent);
    f32::from_bits(match exponent {
        0 | 1 => 0x20_0000 << exponent,
        _ => (exponent - 1) << 23,
    })
}

/// Reads stretch `index` of a row in file format, of a quantised type. The row holds it: checked by the
/// callers.
#[inline(always)]
pub fn stretch(ty: GgmlType, row: &[u8], index: usize) -> Stretch {
    let bytes = ty.type_size();
    match ty {
        GgmlType::Q4_0 => {
            let b = &row[index * bytes..][..bytes];
            simple(b, 0, nibbles(&b[2..18]))
        }
        GgmlType::Q4_1 => {
            let b = &row[index * bytes..][..bytes];
            simple(b, word(b, 2), nibbles(&b[4..20]))
        }
        GgmlType::Q5_0 => {
            let b = &row[index * bytes..][..bytes];
            simple(b, 0, with_high_bits(nibbles(&b[6..22]), &b[2..6]))
        }
        GgmlType::Q5_1 => {
            let b = &row[index * bytes..][..bytes];
            simple(b, word(b, 2), with_high_bits(nibbles(&b[8..24]), &b[4..8]))
        }
        GgmlType::Q8_0 => {
            let b = &row[index * bytes..][..bytes];
            simple(b, 0, std::array::from_fn(|i| b[2 + i] ^ 0x80))
        }
        GgmlType::Q4_K => {
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
        GgmlType::Q5_K => {
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
        GgmlType::Q6_K => {
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
        GgmlType::Q2_K => {
            let b = &row[index / 8 * bytes..][..bytes];
            let part = index % 8;
            Stretch {
                q: pairs(&b[16..80], part),
                d: word(b, 80),
                m: word(b, 82),
                codes: [b[2 * part], b[2 * part + 1]].map(u8::cast_signed),
            }
        }
        GgmlType::Q3_K => {
            let b = &row[index / 8 * bytes..][..bytes];
            let part = index % 8;
            let low = pairs(&b[32..96], part);
            Stretch {
                q: std::array::from_fn(|i| low[i] | (b[i] >> part & 1) << 2),
                d: word(b, 108),
                m: 0,
                codes: [0, 1].map(|half| six_bits(&b[96..108], 2 * part + half)),
            }
        }
        GgmlType::IQ4_NL => {
            let b = &row[index * bytes..][..bytes];
            simple(b, 0, nibbles(&b[2..18]))
        }
        GgmlType::IQ4_XS => {
            let b = &row[index / 8 * bytes..][..bytes];
            let part = index % 8;
            let low = b[4 + part / 2] >> (part % 2 * 4) & 15;
            let high = (word(b, 2) >> (2 * part)) as u8 & 3;
            Stretch {
                q: nibbles(&b[8 + 16 * part..][..16]),
                d: word(b, 0),
                m: 0,
                codes: [(low | high << 4).cast_signed() - 32; 2],
            }
        }
        GgmlType::MXFP4 => {
            let b = &row[index * bytes..][..bytes];
            Stretch {
                q: nibbles(&b[1..17]),
                d: b[0].into(),
                m: 0,
                codes: [1, 1],
            }
        }
        GgmlType::TQ1_0 => {
            let b = &row[index / 8 * bytes..][..bytes];
            ternary(
                std::array::from_fn(|i| trit(b, index % 8 * 32 + i)),
                word(b, 52),
            )
        }
        GgmlType::TQ2_0 => {
            let b = &row[index / 8 * bytes..][..bytes];
            ternary(pairs(&b[..64], index % 8), word(b, 64))
        }
        GgmlType::IQ1_S => grid_types::iq1_s(&row[index / 8 * bytes..][..bytes], index % 8),
        GgmlType::IQ1_M => grid_types::iq1_m(&row[index / 8 * bytes..][..bytes], index % 8),
        GgmlType::IQ2_XXS => grid_types::iq2_xxs(&row[index / 8 * bytes..][..bytes], index % 8),
        GgmlType::IQ2_XS => grid_types::iq2_xs(&row[index / 8 * bytes..][..bytes], index % 8),
        GgmlType::IQ2_S => grid_types::iq2_s(&row[index / 8 * bytes..][..bytes], index % 8),
        GgmlType::IQ3_XXS => grid_types::iq3_xxs(&row[index / 8 * bytes..][..bytes], index % 8),
        GgmlType::IQ3_S => grid_types::iq3_s(&row[index / 8 * bytes..][..bytes], index % 8),
        GgmlType::F32 | GgmlType::F16 | GgmlType::BF16 => Stretch {
            q: [0; 32],
            d: 0,
            m: 0,
            codes: [0; 2],
        },
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

/// Stretch `part` of 64 bytes of bit pairs: each 32 bytes hold four stretches, the first one lowest.
fn pairs(bytes: &[u8], part: usize) -> [u8; 32] {
    let bytes = &bytes[part / 4 * 32..][..32];
    std::array::from_fn(|i| bytes[i] >> (part % 4 * 2) & 3)
}

/// Scale `index` of Q3_K's sixteen, less 32: the low four bits lie in nibbles, those of the first eight low,
/// the upper two in pairs behind them.
fn six_bits(packed: &[u8], index: usize) -> i8 {
    let low = packed[index % 8] >> (index / 8 * 4) & 15;
    let high = packed[8 + index % 4] >> (index / 4 * 2) & 3;
    (low | high << 4).cast_signed() - 32
}

/// Codes of -1, 0 and 1 as Q2_K has them: one scale for all, and as much taken away again.
fn ternary(q: [u8; 32], d: u16) -> Stretch {
    Stretch {
        q,
        d,
        m: d,
        codes: [0x11; 2],
    }
}

/// Digit `index` of a block of TQ1_0: a byte is a fraction of 256 with five base-3 digits, or four in the last
/// four bytes. Digit by digit, bytes 0..32 come first, then 32..48, then 48..52.
fn trit(block: &[u8], index: usize) -> u8 {
    const POWERS: [u8; 5] = [1, 3, 9, 27, 81];
    let (start, first, bytes) = match index {
        0..160 => (0, 0, 32),
        160..240 => (160, 32, 16),
        _ => (240, 48, 4),
    };
    let (digit, byte) = ((index - start) / bytes, (index - start) % bytes);
    let fraction = block[first + byte].wrapping_mul(POWERS[digit]);
    ((u16::from(fraction) * 3) >> 8) as u8
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
