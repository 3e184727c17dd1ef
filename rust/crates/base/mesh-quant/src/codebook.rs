//! The numbers that codes stand for, for types whose codes are not the numbers themselves.

use crate::GgmlType;

/// A table of signed bytes. A weight is its code's number times a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Codebook {
    /// Q3_K: 3 bits, -4..4.
    Q3,
    /// IQ1_S and IQ1_M: 3 bits, a third of the grid plus the shift of its group, in eighths.
    Iq1,
    /// IQ2_XXS, IQ2_XS and IQ2_S: 3 bits, one of three magnitudes and the sign.
    Iq2,
    /// IQ3_XXS: 4 bits, one of eight magnitudes and the sign.
    Iq3Xxs,
    /// IQ3_S: the same with other magnitudes.
    Iq3S,
    /// IQ4_NL and IQ4_XS: 4 bits.
    Iq4,
    /// MXFP4: 4 bits, the E2M1 numbers doubled.
    Mxfp4,
}

impl Codebook {
    /// Numbers of all codes; a codebook of 3 bits fills the first half.
    pub const fn values(self) -> [i8; 16] {
        match self {
            Codebook::Q3 => [-4, -3, -2, -1, 0, 1, 2, 3, 0, 0, 0, 0, 0, 0, 0, 0],
            Codebook::Iq1 => [-7, 1, 9, 0, -9, -1, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            Codebook::Iq2 => [8, 25, 43, 0, -8, -25, -43, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            Codebook::Iq3Xxs => signed([4, 12, 20, 28, 36, 44, 52, 62]),
            Codebook::Iq3S => signed([1, 3, 5, 7, 9, 11, 13, 15]),
            Codebook::Iq4 => [
                -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113,
            ],
            Codebook::Mxfp4 => signed([0, 1, 2, 3, 4, 6, 8, 12]),
        }
    }
}

/// Magnitudes for codes below 8, then the same negated.
const fn signed(magnitudes: [i8; 8]) -> [i8; 16] {
    let mut all = [0; 16];
    let mut i = 0;
    while i < 8 {
        all[i] = magnitudes[i];
        all[i + 8] = -magnitudes[i];
        i += 1;
    }
    all
}

impl GgmlType {
    /// The numbers that this type's codes stand for, if they are not the numbers themselves.
    pub const fn codebook(self) -> Option<Codebook> {
        match self {
            GgmlType::Q3_K => Some(Codebook::Q3),
            GgmlType::IQ1_S | GgmlType::IQ1_M => Some(Codebook::Iq1),
            GgmlType::IQ2_XXS | GgmlType::IQ2_XS | GgmlType::IQ2_S => Some(Codebook::Iq2),
            GgmlType::IQ3_XXS => Some(Codebook::Iq3Xxs),
            GgmlType::IQ3_S => Some(Codebook::Iq3S),
            GgmlType::IQ4_NL | GgmlType::IQ4_XS => Some(Codebook::Iq4),
            GgmlType::MXFP4 => Some(Codebook::Mxfp4),
            _ => None,
        }
    }
}
