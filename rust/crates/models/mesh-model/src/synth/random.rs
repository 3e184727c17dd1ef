//! Random numbers and random blocks of every tensor type.

use half::{bf16, f16};
use mesh_quant::{GgmlType, scale_block};

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
                for block in out.chunks_exact_mut(ty.type_size()) {
                    scale_block(ty, deviation, block);
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
