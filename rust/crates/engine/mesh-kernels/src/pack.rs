//! From file rows to panels, and back for single rows.

// Loops over the 32 weights of a block use several arrays at once.
#![allow(clippy::needless_range_loop)]

use half::f16;
use mesh_quant::{Stretch, stretch};

use crate::WeightType;
use crate::layout::{BLOCK, GROUP, Layout, PANEL, Scales};

/// Packs the 16 rows of a panel (fewer in the last one: the rest stays zero) into `panel`, which is zeroed.
pub(crate) fn panel(
    layout: Layout,
    ty: WeightType,
    k: usize,
    rows: &[u8],
    row_bytes: usize,
    panel: &mut [u8],
) {
    for (column, row) in rows.chunks_exact(row_bytes).take(PANEL).enumerate() {
        match layout.quantised() {
            None => floats(layout, ty, k, row, column, panel),
            Some((_, Scales::Signed)) => signed_from_q4_0(k, row, column, panel),
            Some((_, Scales::Coded)) if ty == WeightType::Q4_1 => {
                coded_from_q4_1(k, row, column, panel);
            }
            Some((bits, Scales::Block)) if ty == WeightType::Q8_0 && layout != Layout::Q8 => {
                fewer_from_q8_0(layout, bits, k, row, column, panel);
            }
            Some((bits, scales)) => quantised(layout, ty, bits, scales, k, row, column, panel),
        }
    }
}

#[allow(clippy::too_many_arguments)]
fn quantised(
    layout: Layout,
    ty: WeightType,
    bits: u32,
    scales: Scales,
    k: usize,
    row: &[u8],
    column: usize,
    panel: &mut [u8],
) {
    for index in 0..k / BLOCK {
        let at = layout.block_offset(index);
        let codes_at = at + scales.bytes();
        // The common types keep their bytes: whole words are moved.
        match ty {
            WeightType::Q4_0 | WeightType::IQ4_NL => {
                let b = &row[index * 18..][..18];
                put(panel, at + 2 * column, &b[..2]);
                words(panel, codes_at + 4 * column, &b[2..], 0);
                continue;
            }
            WeightType::Q4_1 => {
                let b = &row[index * 20..][..20];
                put(panel, at + 2 * column, &b[..2]);
                put(panel, at + 32 + 2 * column, &b[2..4]);
                words(panel, codes_at + 4 * column, &b[4..], 0);
                continue;
            }
            WeightType::Q8_0 => {
                let b = &row[index * 34..][..34];
                put(panel, at + 2 * column, &b[..2]);
                words(panel, codes_at + 4 * column, &b[2..], 0x8080_8080);
                continue;
            }
            _ => {}
        }
        let s = stretch(ty, row, index);
        put_scales(layout, ty, scales, index, column, &s, panel);
        put_codes(bits, &mut panel[codes_at..], column, &s.q);
    }
}

/// Stores the scales of a stretch, the first of a group also what multiplies the group's codes.
fn put_scales(
    layout: Layout,
    ty: WeightType,
    scales: Scales,
    index: usize,
    column: usize,
    s: &Stretch,
    panel: &mut [u8],
) {
    let at = layout.block_offset(index);
    if scales.head_bytes() > 0 && index.is_multiple_of(GROUP) {
        let head = at - scales.head_bytes();
        if scales == Scales::Halves {
            put(panel, head + 4 * column, &s.scale(ty).to_le_bytes());
        } else {
            put(panel, head + 2 * column, &s.d.to_le_bytes());
            // K types take their minimum away.
            put(panel, head + 32 + 2 * column, &(s.m ^ 0x8000).to_le_bytes());
        }
    }
    match scales {
        Scales::Coded | Scales::Halves | Scales::Nibbles => {
            panel[at + column] = s.codes[0].cast_unsigned();
            panel[at + 16 + column] = s.codes[1].cast_unsigned();
        }
        // Packed by itself, see `signed_from_q4_0`.
        Scales::Signed => {}
        Scales::Block => put(panel, at + 2 * column, &s.d.to_le_bytes()),
        Scales::BlockMin => {
            put(panel, at + 2 * column, &s.d.to_le_bytes());
            put(panel, at + 32 + 2 * column, &s.m.to_le_bytes());
        }
        // Exponent 1 stands for zero: the two scales below the normal numbers are dropped.
        Scales::Exponent => panel[at + column] = (s.d as u8).max(1),
    }
}

fn floats(layout: Layout, ty: WeightType, k: usize, row: &[u8], column: usize, panel: &mut [u8]) {
    let bytes = layout.float_bytes();
    debug_assert_eq!(bytes, ty.type_size());
    for i in 0..k {
        put(
            panel,
            (i * PANEL + column) * bytes,
            &row[i * bytes..][..bytes],
        );
    }
}

/// Q4_0 with its scales as signed 8-bit codes per group of 256 weights: 0.539 bytes a weight where the file
/// has 0.5625. Their factor has the range of an f32, as scales of an f16's size are divided by 127, and is
/// rounded up, so that the largest code fits.
fn signed_from_q4_0(k: usize, row: &[u8], column: usize, panel: &mut [u8]) {
    let layout = Layout::Q4Signed;
    let blocks = k / BLOCK;
    let bytes = |index: usize| &row[index * 18..][..18];
    let scale = |index: usize| f16::from_bits(word(bytes(index), 0)).to_f32();
    for start in (0..blocks).step_by(GROUP) {
        let group = start..(start + GROUP).min(blocks);
        let largest = group.clone().fold(0.0, |a: f32, i| a.max(scale(i).abs()));
        let factor = ((largest / 127.0).to_bits() + 0xffff) & 0xffff_0000;
        let head = layout.block_offset(start) - Scales::Signed.head_bytes();
        put(panel, head + 2 * column, &factor.to_le_bytes()[2..]);
        let factor = f32::from_bits(factor);
        let inverse = if factor == 0.0 { 0.0 } else { 1.0 / factor };
        for index in group {
            let at = layout.block_offset(index);
            let code = nearest(scale(index) * inverse).clamp(-127.0, 127.0);
            panel[at + column] = (code as i8).cast_unsigned();
            words(panel, at + 16 + 4 * column, &bytes(index)[2..], 0);
        }
    }
}

/// Q4_1 with its scales and minima as 8-bit codes per group of 256 weights: 0.578 bytes a weight where the
/// file has 0.625. The minimum compensates the rounding of the scale, so that a block's mean stays.
fn coded_from_q4_1(k: usize, row: &[u8], column: usize, panel: &mut [u8]) {
    let layout = Layout::Q4Coded;
    let blocks = k / BLOCK;
    for start in (0..blocks).step_by(GROUP) {
        let group = start..(start + GROUP).min(blocks);
        let read = |index: usize| {
            let b = &row[index * 20..][..20];
            let number = |at| f16::from_bits(word(b, at)).to_f32();
            let sum: u32 = b[4..]
                .iter()
                .map(|&q| u32::from(q & 15) + u32::from(q >> 4))
                .sum();
            (number(0), number(2), sum as f32 / BLOCK as f32)
        };
        let signed = |code: f32, scale: f32| if scale == 0.0 { 0.0 } else { code / scale };
        let largest_d = group
            .clone()
            .map(|i| read(i).0)
            .fold(0.0, |a: f32, d| if d.abs() > a.abs() { d } else { a });
        let scale_d = f16::from_f32(largest_d / 255.0);
        let codes: Vec<(f32, f32)> = group
            .clone()
            .map(|i| {
                let (d, m, mean) = read(i);
                let code = nearest(signed(d, scale_d.to_f32())).clamp(0.0, 255.0);
                (code, m + (d - code * scale_d.to_f32()) * mean)
            })
            .collect();
        let largest_m = codes.iter().fold(0.0, |a: f32, c| a.max(c.1.abs()));
        let scale_m = f16::from_f32(largest_m / 127.0);
        let head = layout.block_offset(start) - Scales::Coded.head_bytes();
        put(panel, head + 2 * column, &scale_d.to_bits().to_le_bytes());
        put(
            panel,
            head + 32 + 2 * column,
            &scale_m.to_bits().to_le_bytes(),
        );
        for (index, (code, min)) in group.zip(codes) {
            let at = layout.block_offset(index);
            let min = nearest(signed(min, scale_m.to_f32())).clamp(-127.0, 127.0);
            panel[at + column] = code as u8;
            panel[at + 16 + column] = (min as i8).cast_unsigned();
            words(panel, at + 32 + 4 * column, &row[index * 20 + 4..][..16], 0);
        }
    }
}

/// Q8_0 rounded to `bits` bits with the scale that loses least among a few.
fn fewer_from_q8_0(
    layout: Layout,
    bits: u32,
    k: usize,
    row: &[u8],
    column: usize,
    panel: &mut [u8],
) {
    let bias = layout.bias() as f32;
    for index in 0..k / BLOCK {
        let b = &row[index * 34..][..34];
        let d = f16::from_bits(word(b, 0)).to_f32();
        let mut q = [0.0_f32; BLOCK];
        let mut extreme = 0.0_f32;
        for i in 0..BLOCK {
            q[i] = f32::from(b[2 + i].cast_signed());
            if q[i].abs() > extreme.abs() {
                extreme = q[i];
            }
        }
        // The extreme value maps to the lowest code exactly, as in ggml's own symmetric types; neighbours of
        // that scale are tried, and the other sign, which leaves more room for the rest.
        let mut best = (f32::INFINITY, 0.0, [layout.bias() as u8; BLOCK]);
        for divisor in [-bias, 1.0 - bias, 2.0 - bias, bias - 1.0, bias - 2.0] {
            let scale = f16::from_f32(d * extreme / divisor).to_f32();
            let ratio = if scale == 0.0 { 0.0 } else { d / scale };
            let mut codes = [0.0_f32; BLOCK];
            let mut error = 0.0;
            for i in 0..BLOCK {
                codes[i] = nearest(q[i] * ratio).clamp(-bias, bias - 1.0);
                let off = d * q[i] - scale * codes[i];
                error += off * off;
            }
            if error < best.0 {
                best = (error, scale, codes.map(|c| (c + bias) as u8));
            }
        }
        let at = layout.block_offset(index);
        let scale = f16::from_f32(best.1).to_bits();
        put(panel, at + 2 * column, &scale.to_le_bytes());
        put_codes(bits, &mut panel[at + 32..], column, &best.2);
    }
}

/// Rounds half to even, for |v| < 2^22; `f32::round` is a library call where SSE 4.1 is not given.
fn nearest(v: f32) -> f32 {
    const MAGIC: f32 = 12_582_912.0;
    (v + MAGIC) - MAGIC
}

fn put(panel: &mut [u8], at: usize, bytes: &[u8]) {
    panel[at..at + bytes.len()].copy_from_slice(bytes);
}

/// Copies `bytes` word by word to every 64th byte.
#[inline(always)]
fn words(panel: &mut [u8], at: usize, bytes: &[u8], flip: u32) {
    for (j, w) in bytes.chunks_exact(4).enumerate() {
        let w = u32::from_le_bytes([w[0], w[1], w[2], w[3]]) ^ flip;
        panel[at + 64 * j..][..4].copy_from_slice(&w.to_le_bytes());
    }
}

fn put_codes(bits: u32, codes: &mut [u8], column: usize, q: &[u8; 32]) {
    for (i, &q) in q.iter().enumerate() {
        let (group, lane) = (i / 4, 4 * column + i % 4);
        match bits {
            2 | 3 => codes[64 * (group / 4) + lane] |= (q & 3) << (2 * (group % 4)),
            8 => codes[64 * group + lane] = q,
            _ => codes[64 * (group % 4) + lane] |= (q & 15) << (group / 4 * 4),
        }
        match bits {
            3 => codes[128 + lane] |= (q >> 2) << group,
            5 => codes[256 + lane] |= (q >> 4) << group,
            6 => codes[256 + 64 * (group / 4) + lane] |= (q >> 4) << (2 * (group % 4)),
            _ => {}
        }
    }
}

fn get_code(bits: u32, codes: &[u8], column: usize, i: usize) -> u8 {
    let (group, lane) = (i / 4, 4 * column + i % 4);
    let low = match bits {
        2 | 3 => (codes[64 * (group / 4) + lane] >> (2 * (group % 4))) & 3,
        8 => codes[64 * group + lane],
        _ => (codes[64 * (group % 4) + lane] >> (group / 4 * 4)) & 15,
    };
    match bits {
        3 => low | (((codes[128 + lane] >> group) & 1) << 2),
        5 => low | (((codes[256 + lane] >> group) & 1) << 4),
        6 => low | (((codes[256 + 64 * (group / 4) + lane] >> (2 * (group % 4))) & 3) << 4),
        _ => low,
    }
}

/// Writes the weights of one column of a panel to `out`.
pub(crate) fn unpack_column(layout: Layout, panel: &[u8], column: usize, out: &mut [f32]) {
    let Some((bits, scales)) = layout.quantised() else {
        let ty = match layout {
            Layout::F32 => WeightType::F32,
            Layout::Bf16 => WeightType::BF16,
            _ => WeightType::F16,
        };
        for (i, out) in out.iter_mut().enumerate() {
            *out = float(ty, panel, i * PANEL + column);
        }
        return;
    };
    let number = |at: usize| f16::from_bits(word(panel, at)).to_f32();
    let code = |at: usize| f32::from(panel[at].cast_signed());
    let values = layout.codebook().map(|book| book.values());
    for (index, out) in out.chunks_exact_mut(BLOCK).enumerate() {
        let at = layout.block_offset(index);
        let head = layout.block_offset(index / GROUP * GROUP) - scales.head_bytes();
        let codes = &panel[at + scales.bytes()..];
        // Scale and minimum of each half.
        let (d, m) = match scales {
            Scales::Block => ([number(at + 2 * column); 2], [0.0; 2]),
            Scales::BlockMin => (
                [number(at + 2 * column); 2],
                [number(at + 32 + 2 * column); 2],
            ),
            Scales::Coded => (
                [f32::from(panel[at + column]) * number(head + 2 * column); 2],
                [code(at + 16 + column) * number(head + 32 + 2 * column); 2],
            ),
            Scales::Signed => {
                let d = float(WeightType::BF16, &panel[head..], column);
                ([code(at + column) * d; 2], [0.0; 2])
            }
            Scales::Halves => {
                let d = float(WeightType::F32, &panel[head..], column);
                (
                    [code(at + column) * d, code(at + 16 + column) * d],
                    [0.0; 2],
                )
            }
            Scales::Nibbles => {
                let d = number(head + 2 * column);
                let m = number(head + 32 + 2 * column);
                let pair = [panel[at + column], panel[at + 16 + column]];
                (
                    pair.map(|pair| f32::from(pair & 15) * d),
                    pair.map(|pair| f32::from(pair >> 4) * m),
                )
            }
            Scales::Exponent => (
                [f32::from_bits(u32::from(panel[at + column]).saturating_sub(1) << 23); 2],
                [0.0; 2],
            ),
        };
        for (i, out) in out.iter_mut().enumerate() {
            let q = get_code(bits, codes, column, i);
            let q = match values {
                Some(values) => values[usize::from(q)].into(),
                None => i32::from(q) - layout.bias(),
            };
            *out = d[i / 16] * q as f32 + m[i / 16];
        }
    }
}

/// Weight `index` of a row of floats.
fn float(ty: WeightType, row: &[u8], index: usize) -> f32 {
    match ty {
        WeightType::F32 => {
            let b = &row[4 * index..][..4];
            f32::from_le_bytes([b[0], b[1], b[2], b[3]])
        }
        WeightType::BF16 => half::bf16::from_bits(word(row, 2 * index)).to_f32(),
        _ => f16::from_bits(word(row, 2 * index)).to_f32(),
    }
}

fn word(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}
