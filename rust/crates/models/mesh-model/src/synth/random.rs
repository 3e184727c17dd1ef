//! Random numbers and random blocks of every tensor type.

use half::{bf16, f16};

use crate::gguf::GgmlType;

/// SplitMix64 (<https://prng.di.unimi.it/splitmix64.c>): fast, and the same everywhere.
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Random(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ z >> 31
    }

    /// From the uniform distribution around 0 with this standard deviation.
    fn uniform(&mut self, deviation: f32) -> f32 {
        let unit = (self.next() >> 40) as f32 / (1u64 << 24) as f32;
        (2.0 * unit - 1.0) * 3f32.sqrt() * deviation
    }

    /// Fills `out` with blocks whose elements lie around 0 with about this standard deviation.
    pub(super) fn fill_blocks(&mut self, ty: GgmlType, deviation: f32, out: &mut [u8]) {
        match ty {
            GgmlType::F32 => self.fill_floats(out, |v| v.to_le_bytes(), deviation),
            GgmlType::F16 => self.fill_floats(out, |v| f16::from_f32(v).to_le_bytes(), deviation),
            GgmlType::BF16 => self.fill_floats(out, |v| bf16::from_f32(v).to_le_bytes(), deviation),
            _ => {
                self.fill_bits(out);
                let scales = block_scales(ty, deviation);
                for block in out.chunks_exact_mut(ty.type_size()) {
                    for &(at, scale) in &scales {
                        block[at..at + 2].copy_from_slice(&scale.to_le_bytes());
                    }
                }
            }
        }
    }

    fn fill_floats<const N: usize>(
        &mut self,
        out: &mut [u8],
        encode: impl Fn(f32) -> [u8; N],
        deviation: f32,
    ) {
        for element in out.as_chunks_mut::<N>().0 {
            *element = encode(self.uniform(deviation));
        }
    }

    fn fill_bits(&mut self, out: &mut [u8]) {
        let (words, rest) = out.as_chunks_mut::<8>();
        for word in words {
            *word = self.next().to_le_bytes();
        }
        let last = self.next().to_le_bytes();
        rest.copy_from_slice(&last[..rest.len()]);
    }
}

/// Positions and values of a block's f16 scales, so that random bits elsewhere give elements around 0.
///
/// A uniform n-bit number has deviation 2ⁿ/√12 and mean (2ⁿ − 1)/2; where a scale is itself random bits, its
/// root mean square stands in.
fn block_scales(ty: GgmlType, deviation: f32) -> Vec<(usize, f16)> {
    let uniform = |bits: i32| 2f32.powi(bits) / 12f32.sqrt();
    let scales: &[(usize, f32)] = match ty {
        GgmlType::Q4_0 | GgmlType::Q5_0 => {
            let bits = if ty == GgmlType::Q4_0 { 4 } else { 5 };
            &[(0, deviation / uniform(bits))]
        }
        GgmlType::Q4_1 | GgmlType::Q5_1 => {
            let (bits, mean) = if ty == GgmlType::Q4_1 {
                (4, 7.5)
            } else {
                (5, 15.5)
            };
            let d = deviation / uniform(bits);
            &[(0, d), (2, -mean * d)]
        }
        GgmlType::Q8_0 => &[(0, deviation / uniform(8))],
        GgmlType::Q4_K | GgmlType::Q5_K => {
            // Scale and minimum are independent 6-bit numbers: both add to the spread.
            let mean = if ty == GgmlType::Q4_K { 7.5 } else { 15.5 };
            let bits = if ty == GgmlType::Q4_K { 4 } else { 5 };
            let rms = (31.5f32.powi(2) + uniform(6).powi(2)).sqrt();
            let spread = ((rms * uniform(bits)).powi(2) + 2.0 * (mean * uniform(6)).powi(2)).sqrt();
            let d = deviation / spread;
            &[(0, d), (2, mean * d)]
        }
        GgmlType::Q6_K => &[(208, deviation / (uniform(8) * uniform(6)))],
        GgmlType::F32 | GgmlType::F16 | GgmlType::BF16 => &[],
    };
    scales
        .iter()
        .map(|&(at, scale)| (at, f16::from_f32(scale)))
        .collect()
}
