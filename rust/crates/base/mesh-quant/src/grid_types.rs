//! The types whose weights are looked up in a grid, 32 weights at a time.
//!
//! A code is the number of a magnitude with the sign above it; [`Codebook`](crate::Codebook) has the numbers
//! that they stand for. Scale codes are odd: `2s + 1`, which [`Stretch::scale`] multiplies.

use crate::grid::{self, Grid};
use crate::stretch::{Stretch, word};

/// 8 bytes per stretch: four grid indices, then four indices of signs and the scale in a word.
pub(crate) fn iq2_xxs(b: &[u8], part: usize) -> Stretch {
    let quants = &b[2 + 8 * part..][..8];
    let packed = long(quants, 4);
    Stretch {
        q: codes(
            &grid::IQ2_XXS,
            2,
            |i| quants[i].into(),
            |i| even_signs(packed >> (7 * i)),
        ),
        d: word(b, 0),
        m: 0,
        codes: [odd((packed >> 28) as u8); 2],
    }
}

/// A word per 8 weights: 9 bits of grid index, 7 of signs. A nibble of scale per 16.
pub(crate) fn iq2_xs(b: &[u8], part: usize) -> Stretch {
    let entry = |i: usize| word(b, 2 + 8 * part + 2 * i);
    Stretch {
        q: codes(
            &grid::IQ2_XS,
            2,
            |i| usize::from(entry(i) & 511),
            |i| even_signs((entry(i) >> 9).into()),
        ),
        d: word(b, 0),
        m: 0,
        codes: nibbles(b[66 + part]).map(odd),
    }
}

/// Low bytes of the grid indices, signs, upper bit pairs of the indices, a nibble of scale per 16.
pub(crate) fn iq2_s(b: &[u8], part: usize) -> Stretch {
    let high = usize::from(b[66 + part]);
    Stretch {
        q: codes(
            &grid::IQ2_S,
            2,
            |i| usize::from(b[2 + 4 * part + i]) | (high >> (2 * i) & 3) << 8,
            |i| b[34 + 4 * part + i],
        ),
        d: word(b, 0),
        m: 0,
        codes: nibbles(b[74 + part]).map(odd),
    }
}

/// Eight grid indices per stretch; then, for each stretch, four indices of signs and the scale in a word.
pub(crate) fn iq3_xxs(b: &[u8], part: usize) -> Stretch {
    let packed = long(b, 66 + 4 * part);
    Stretch {
        q: codes(
            &grid::IQ3_XXS,
            3,
            |i| b[2 + 8 * part + i].into(),
            |i| even_signs(packed >> (7 * i)),
        ),
        d: word(b, 0),
        m: 0,
        codes: [odd((packed >> 28) as u8); 2],
    }
}

/// Low bytes of the grid indices, their ninth bits, signs, a nibble of scale per 32.
pub(crate) fn iq3_s(b: &[u8], part: usize) -> Stretch {
    let high = usize::from(b[66 + part]);
    Stretch {
        q: codes(
            &grid::IQ3_S,
            3,
            |i| usize::from(b[2 + 8 * part + i]) | (high >> i & 1) << 8,
            |i| b[74 + 4 * part + i],
        ),
        d: word(b, 0),
        m: 0,
        codes: [odd(nibbles(b[106 + part / 2])[part % 2]); 2],
    }
}

/// Low bytes of the grid indices, then a word per stretch: four times three upper bits of an index, three
/// bits of scale, the direction of the shift.
pub(crate) fn iq1_s(b: &[u8], part: usize) -> Stretch {
    let high = usize::from(word(b, 34 + 2 * part));
    Stretch {
        q: codes(
            &grid::IQ1,
            2,
            |i| usize::from(b[2 + 4 * part + i]) | (high >> (3 * i) & 7) << 8,
            |_| if high >> 15 == 1 { 0xff } else { 0 },
        ),
        d: word(b, 0),
        m: 0,
        codes: [odd((high >> 12) as u8 & 7); 2],
    }
}

/// Low bytes of the grid indices, a nibble for each with three upper bits and the direction of the shift,
/// four words with four 3-bit scales each. The upper nibbles of those words make up the f16 scale.
pub(crate) fn iq1_m(b: &[u8], part: usize) -> Stretch {
    let nibble = |i: usize| usize::from(nibbles(b[32 + 2 * part + i / 2])[i % 2]);
    let scales = |i: usize| word(b, 48 + 2 * i);
    let scale = |half: usize| (scales(part / 2) >> (6 * (part % 2) + 3 * half)) as u8 & 7;
    Stretch {
        q: codes(
            &grid::IQ1,
            2,
            |i| usize::from(b[4 * part + i]) | (nibble(i) & 7) << 8,
            |i| if nibble(i) & 8 != 0 { 0xff } else { 0 },
        ),
        d: (0..4).fold(0, |d, i| d | scales(i) >> 12 << (4 * i)),
        m: 0,
        codes: [odd(scale(0)), odd(scale(1))],
    }
}

/// Codes of 32 weights: numbers of magnitudes from the grid, `bits` bits each, under sign bits. `index` gives
/// the grid index of each group of weights, `signs` the signs of each eight weights, the first one lowest.
#[inline(always)]
fn codes(
    grid: &Grid,
    bits: u32,
    index: impl Fn(usize) -> usize,
    signs: impl Fn(usize) -> u8,
) -> [u8; 32] {
    let mut q = [0; 32];
    for (i, q) in q.chunks_exact_mut(grid.group).enumerate() {
        for (q, magnitude) in q.iter_mut().zip(grid.entry(index(i))) {
            *q = magnitude;
        }
    }
    for (i, q) in q.chunks_exact_mut(8).enumerate() {
        let signs = signs(i);
        for (j, q) in q.iter_mut().enumerate() {
            *q |= (signs >> j & 1) << bits;
        }
    }
    q
}

/// Eight signs of which an even number is negative, from the first seven.
fn even_signs(seven: u32) -> u8 {
    let seven = seven as u8 & 127;
    seven | (seven.count_ones() as u8 & 1) << 7
}

fn odd(scale: u8) -> i8 {
    (2 * scale + 1).cast_signed()
}

fn nibbles(byte: u8) -> [u8; 2] {
    [byte & 15, byte >> 4]
}

fn long(bytes: &[u8], at: usize) -> u32 {
    u32::from(word(bytes, at)) | u32::from(word(bytes, at + 2)) << 16
}
