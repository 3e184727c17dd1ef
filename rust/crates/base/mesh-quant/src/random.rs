//! Scales for blocks of random bits, for made-up weights.

use half::f16;

use crate::GgmlType;

/// Gives a block of random bits scales with which its elements lie around 0 with about this standard deviation.
/// Floats are left alone.
///
/// # Panics
/// If `block` is not one block of the type.
pub fn scale_block(ty: GgmlType, deviation: f32, block: &mut [u8]) {
    assert_eq!(block.len(), ty.type_size(), "one block of {ty}");
    if ty == GgmlType::TQ2_0 {
        // Two bits also hold the code 3, whose weight, 2, is not ternary.
        block[..64]
            .iter_mut()
            .for_each(|pairs| *pairs &= !(*pairs << 1 & 0xaa));
    }
    match ty {
        GgmlType::MXFP4 => block[0] = (128.0 + (deviation / spread(ty)).log2()).round() as u8,
        // The f16 scale lies in the upper nibbles of the four words with the scales.
        GgmlType::IQ1_M => {
            let bits = f16::from_f32(deviation / spread(ty)).to_bits();
            for i in 0..4 {
                let high = &mut block[49 + 2 * i];
                *high = *high & 15 | (bits >> (4 * i) << 4) as u8;
            }
        }
        _ => {
            let d = deviation / spread(ty);
            for (at, share) in f16_scales(ty) {
                block[at..at + 2].copy_from_slice(&f16::from_f32(share * d).to_le_bytes());
            }
        }
    }
}

/// Positions of a block's f16 scales, as shares of its first one.
fn f16_scales(ty: GgmlType) -> Vec<(usize, f32)> {
    match ty {
        GgmlType::F32 | GgmlType::F16 | GgmlType::BF16 | GgmlType::MXFP4 | GgmlType::IQ1_M => {
            vec![]
        }
        GgmlType::Q4_1 => vec![(0, 1.0), (2, -7.5)],
        GgmlType::Q5_1 => vec![(0, 1.0), (2, -15.5)],
        GgmlType::Q2_K => vec![(80, 1.0), (82, 1.5)],
        GgmlType::Q4_K => vec![(0, 1.0), (2, 7.5)],
        GgmlType::Q5_K => vec![(0, 1.0), (2, 15.5)],
        GgmlType::Q3_K => vec![(108, 1.0)],
        GgmlType::Q6_K => vec![(208, 1.0)],
        GgmlType::TQ1_0 => vec![(52, 1.0)],
        GgmlType::TQ2_0 => vec![(64, 1.0)],
        _ => vec![(0, 1.0)],
    }
}

/// Standard deviation of the elements of random bits with the scale 1.
///
/// A uniform n-bit number has deviation 2ⁿ/√12 and mean (2ⁿ − 1)/2; where a scale is itself random bits, its
/// root mean square stands in.
fn spread(ty: GgmlType) -> f32 {
    let uniform = |bits: i32| 2f32.powi(bits) / 12f32.sqrt();
    // Scale and minimum are independent numbers of as many bits: both add to the spread.
    let with_minimum = |scale_bits: i32, bits: i32| {
        let [scale, code] = [scale_bits, bits].map(|bits| (2f32.powi(bits) - 1.0) / 2.0);
        let rms = scale.hypot(uniform(scale_bits));
        (rms * uniform(bits)).hypot(2f32.sqrt() * code * uniform(scale_bits))
    };
    // Of odd scale codes of 4 bits.
    let odd = 18.5;
    match ty {
        GgmlType::F32 | GgmlType::F16 | GgmlType::BF16 => 1.0,
        GgmlType::Q4_0 | GgmlType::Q4_1 => uniform(4),
        GgmlType::Q5_0 | GgmlType::Q5_1 => uniform(5),
        GgmlType::Q8_0 => uniform(8),
        GgmlType::Q2_K => with_minimum(4, 2),
        GgmlType::Q4_K => with_minimum(6, 4),
        GgmlType::Q5_K => with_minimum(6, 5),
        GgmlType::Q3_K => uniform(6) * uniform(3),
        GgmlType::Q6_K => uniform(8) * uniform(6),
        GgmlType::IQ1_S | GgmlType::IQ1_M => 9.2 * 0.8,
        GgmlType::IQ2_XXS | GgmlType::IQ2_XS | GgmlType::IQ2_S => odd * 3.0,
        GgmlType::IQ3_XXS => odd * 7.5,
        GgmlType::IQ3_S => odd * 8.0,
        GgmlType::IQ4_NL => 70.0,
        GgmlType::IQ4_XS => uniform(6) * 70.0,
        GgmlType::TQ1_0 => 0.8,
        GgmlType::TQ2_0 => 0.7,
        GgmlType::MXFP4 => 5.9,
    }
}
