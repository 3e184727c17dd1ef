//! Random matrices in file format, and a reference in f64.
#![allow(dead_code)]

use half::f16;
use mesh_kernels::{Isa, WeightType};
use mesh_quant::{dequantize, scale_block};

/// A small generator: the tests need the same numbers every time.
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A uniform number in -1..1.
    pub(crate) fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    pub(crate) fn floats(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.unit()).collect()
    }
}

/// `n` rows of `k` random weights of about ±1/8.
pub(crate) fn random_rows(ty: WeightType, n: usize, k: usize, rng: &mut Rng) -> Vec<u8> {
    let blocks = n * k / ty.block_size();
    let mut out = Vec::with_capacity(blocks * ty.type_size());
    for _ in 0..blocks {
        let mut block: Vec<u8> = (0..ty.type_size()).map(|_| rng.next() as u8).collect();
        let d = 0.002 + 0.004 * (rng.unit() + 1.0);
        let mut put = |at: usize, v: f32| {
            block[at..at + 2].copy_from_slice(&f16::from_f32(v).to_le_bytes());
        };
        match ty {
            WeightType::F32 => block.copy_from_slice(&(rng.unit() / 8.0).to_le_bytes()),
            WeightType::F16 => put(0, rng.unit() / 8.0),
            WeightType::BF16 => {
                let v = half::bf16::from_f32(rng.unit() / 8.0);
                block.copy_from_slice(&v.to_le_bytes());
            }
            WeightType::Q4_0 | WeightType::Q5_0 => put(0, d),
            WeightType::Q8_0 => put(0, d / 8.0),
            WeightType::Q4_1 | WeightType::Q5_1 => {
                put(0, d);
                put(2, -8.0 * d);
            }
            WeightType::Q4_K | WeightType::Q5_K => {
                put(0, d / 32.0);
                put(2, d / 8.0);
            }
            WeightType::Q6_K => put(208, d / 200.0),
            _ => scale_block(ty, 8.0 * d, &mut block),
        }
        out.extend(block);
    }
    out
}

/// Rows of file bytes as floats.
pub(crate) fn dequantized(ty: WeightType, n: usize, k: usize, rows: &[u8]) -> Vec<f32> {
    let bytes = ty.row_bytes(k).expect("whole blocks");
    let mut out = vec![0.0; n * k];
    for (row, out) in rows.chunks_exact(bytes).zip(out.chunks_exact_mut(k)) {
        dequantize(ty, row, out).expect("one row");
    }
    out
}

/// `x · wᵀ` in f64.
pub(crate) fn product(w: &[f32], x: &[f32], k: usize) -> Vec<f64> {
    x.chunks_exact(k)
        .flat_map(|x| {
            w.chunks_exact(k).map(|w| {
                x.iter()
                    .zip(w)
                    .map(|(&x, &w)| f64::from(x) * f64::from(w))
                    .sum()
            })
        })
        .collect()
}

/// Rows as the kernels round them: 8 bits per 32.
pub(crate) fn rounded(x: &[f32]) -> Vec<f32> {
    x.chunks(32)
        .flat_map(|block| {
            let peak = block.iter().fold(0.0_f32, |a, v| a.max(v.abs()));
            let (scale, inverse) = (peak / 127.0, if peak > 0.0 { 127.0 / peak } else { 0.0 });
            block
                .iter()
                .map(move |v| (v * inverse).round_ties_even() * scale)
                .collect::<Vec<_>>()
        })
        .collect()
}

/// Largest difference relative to the root mean square of `want`.
pub(crate) fn error(got: &[f32], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let square: f64 = want.iter().map(|v| v * v).sum::<f64>() / want.len().max(1) as f64;
    let worst = got
        .iter()
        .zip(want)
        .map(|(&g, &w)| (f64::from(g) - w).abs())
        .fold(0.0, |a, b| if b > a || b.is_nan() { b } else { a });
    worst / square.sqrt().max(1e-30)
}

pub(crate) fn bits(v: &[f32]) -> Vec<u32> {
    v.iter().map(|v| v.to_bits()).collect()
}

/// The instruction sets of this CPU by group: all of a group give the same bits.
pub(crate) fn groups() -> [Vec<Isa>; 2] {
    let (rounding, fused) = Isa::available()
        .into_iter()
        .partition(|isa| isa.rounds_products());
    [rounding, fused]
}
