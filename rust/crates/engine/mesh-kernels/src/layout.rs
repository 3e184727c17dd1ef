//! Memory layout of packed weights.
//!
//! A matrix is cut into panels of 16 outputs (columns of the product), a panel into blocks of 32 inputs. The
//! bytes of a panel's block are the scales of its 16 columns followed by its codes, so one pass over a panel
//! reads memory front to back. A 64-byte vector of codes holds 16 columns of 4 consecutive inputs, which is
//! what one VNNI instruction multiplies with 4 broadcast activations.
//!
//! | part | bytes | contents |
//! |---|---|---|
//! | scales, [`Scales::Block`] | 32 | f16 d × 16 |
//! | scales, [`Scales::BlockMin`] | 64 | f16 d × 16, f16 m × 16 |
//! | scales, [`Scales::Coded`] | 32 | u8 scale code × 16, i8 minimum code × 16 |
//! | scales, [`Scales::Signed`] | 16 | i8 scale code × 16 |
//! | scales, [`Scales::Halves`] | 32 | i8 scale code × 16 for inputs 0..16, the same for 16..32 |
//! | scales, [`Scales::Nibbles`] | 32 | the same with a scale code in the low nibble, a minimum code in the high |
//! | scales, [`Scales::Exponent`] | 16 | the power of two × 16, as the exponent of an E8M0 number |
//! | low bits (2, 3 bits) | 128 | bit pair g of vector j: inputs 16j+4g.. |
//! | bit 2 (3 bits) | 64 | byte of column c, i: bit g is that of input 4g+i |
//! | low bits (4, 5, 6 bits) | 256 | vector j: low nibbles inputs 4j.., high nibbles inputs 16+4j.. |
//! | bit 4 (5 bits) | 64 | byte of column c, i: bit g is that of input 4g+i |
//! | bits 4, 5 (6 bits) | 128 | as above, two bits per group: vector 0 groups 0..4, vector 1 groups 4..8 |
//! | codes (8 bits) | 512 | vector g: inputs 4g.. |
//!
//! Panels with scale codes have 64 bytes in front of every 8 blocks, which multiply the codes: f32 D × 16 for
//! `Halves`, else f16 D × 16 and f16 M × 16; for `Signed` 32 bytes, bf16 D × 16. Floats are stored as
//! `[k][16]` per panel.
//!
//! Codes of a layout with a [`Codebook`] are indices into it. The types of 1 to 3 bits whose groups of weights
//! come from a grid have few different numbers, so that codes of 3 or 4 bits hold them exactly.

use mesh_quant::Codebook;

/// Outputs (columns of the product) per panel.
pub(crate) const PANEL: usize = 16;
/// Inputs per block, the unit of scaling.
pub(crate) const BLOCK: usize = 32;
/// Blocks per group of layouts with scale codes.
pub(crate) const GROUP: usize = 8;

/// The layouts of packed weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Layout {
    /// Q4_0.
    Q4,
    /// Q4_0 with coded scales.
    Q4Signed,
    /// Q4_1.
    Q4Min,
    /// Q4_K, and Q4_1 with coded scales.
    Q4Coded,
    /// Q5_0, and Q8_0 rounded to 5 bits.
    Q5,
    /// Q5_1.
    Q5Min,
    /// Q5_K.
    Q5Coded,
    /// Q8_0 rounded to 6 bits.
    Q6,
    /// Q6_K.
    Q6Halves,
    /// Q8_0.
    Q8,
    /// Q2_K, and TQ1_0 and TQ2_0 with a minimum.
    Q2Nibbles,
    /// Q3_K, and the IQ1 and IQ2 types.
    Book3Halves(Codebook),
    /// IQ4_NL.
    Book4(Codebook),
    /// MXFP4.
    Book4Exponent(Codebook),
    /// IQ4_XS, IQ3_XXS and IQ3_S.
    Book4Halves(Codebook),
    /// F16.
    F16,
    /// BF16.
    Bf16,
    /// F32.
    F32,
}

/// Placement and encoding of a layout's scales.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scales {
    /// One f16 per block and column.
    Block,
    /// An f16 scale and minimum per block and column.
    BlockMin,
    /// 8-bit codes per block and column, with f16 factors per group.
    Coded,
    /// A signed 8-bit code per block and column, with a bf16 factor per group.
    Signed,
    /// An 8-bit code per 16 inputs and column, with an f32 factor per group.
    Halves,
    /// 4-bit codes of scale and minimum per 16 inputs and column, with f16 factors per group.
    Nibbles,
    /// A power of two per block and column.
    Exponent,
}

impl Scales {
    /// Bytes per panel block.
    pub(crate) const fn bytes(self) -> usize {
        match self {
            Scales::Block | Scales::Coded | Scales::Halves | Scales::Nibbles => 32,
            Scales::BlockMin => 64,
            Scales::Signed | Scales::Exponent => 16,
        }
    }

    /// Bytes in front of each group of 8 blocks: factors for its scale codes, if it has any.
    pub(crate) const fn head_bytes(self) -> usize {
        match self {
            Scales::Block | Scales::BlockMin | Scales::Exponent => 0,
            Scales::Signed => 32,
            Scales::Coded | Scales::Halves | Scales::Nibbles => 64,
        }
    }
}

impl Layout {
    /// Bits per weight and scales of a quantised layout; `None` for floats.
    pub(crate) const fn quantised(self) -> Option<(u32, Scales)> {
        match self {
            Layout::Q4 => Some((4, Scales::Block)),
            Layout::Q4Signed => Some((4, Scales::Signed)),
            Layout::Q4Min => Some((4, Scales::BlockMin)),
            Layout::Q4Coded => Some((4, Scales::Coded)),
            Layout::Q5 => Some((5, Scales::Block)),
            Layout::Q5Min => Some((5, Scales::BlockMin)),
            Layout::Q5Coded => Some((5, Scales::Coded)),
            Layout::Q6 => Some((6, Scales::Block)),
            Layout::Q6Halves => Some((6, Scales::Halves)),
            Layout::Q8 => Some((8, Scales::Block)),
            Layout::Q2Nibbles => Some((2, Scales::Nibbles)),
            Layout::Book3Halves(_) => Some((3, Scales::Halves)),
            Layout::Book4(_) => Some((4, Scales::Block)),
            Layout::Book4Exponent(_) => Some((4, Scales::Exponent)),
            Layout::Book4Halves(_) => Some((4, Scales::Halves)),
            Layout::F16 | Layout::Bf16 | Layout::F32 => None,
        }
    }

    /// The numbers that the codes stand for, if they are not the numbers themselves.
    pub(crate) const fn codebook(self) -> Option<Codebook> {
        match self {
            Layout::Book3Halves(book)
            | Layout::Book4(book)
            | Layout::Book4Exponent(book)
            | Layout::Book4Halves(book) => Some(book),
            _ => None,
        }
    }

    /// Number that is subtracted before scaling from a code of a layout without a minimum, or that the
    /// products have been added to a codebook's numbers: those of the narrower ones stay below 128 then.
    pub(crate) const fn bias(self) -> i32 {
        match self {
            Layout::Q4 | Layout::Q4Signed => 8,
            Layout::Q5 => 16,
            Layout::Q6 | Layout::Q6Halves => 32,
            Layout::Book3Halves(_) | Layout::Book4Exponent(_) => 64,
            Layout::Q8 | Layout::Book4(_) | Layout::Book4Halves(_) => 128,
            _ => 0,
        }
    }

    /// Bytes of a panel of `k` inputs.
    pub(crate) const fn panel_bytes(self, k: usize) -> usize {
        match self.quantised() {
            Some((bits, scales)) => {
                let blocks = k / BLOCK;
                let heads = blocks.div_ceil(GROUP) * scales.head_bytes();
                blocks * (scales.bytes() + code_bytes(bits)) + heads
            }
            None => k * PANEL * self.float_bytes(),
        }
    }

    /// Byte offset of block `index` within a quantised panel, including the heads of groups before it.
    pub(crate) const fn block_offset(self, index: usize) -> usize {
        match self.quantised() {
            Some((bits, scales)) => {
                let heads = (index / GROUP + 1) * scales.head_bytes();
                index * (scales.bytes() + code_bytes(bits)) + heads
            }
            None => 0,
        }
    }

    /// Bytes per weight of a float layout.
    pub(crate) const fn float_bytes(self) -> usize {
        match self {
            Layout::F32 => 4,
            _ => 2,
        }
    }
}

/// Bytes of the codes of a panel's block.
pub(crate) const fn code_bytes(bits: u32) -> usize {
    match bits {
        2 => 128,
        3 => 192,
        4 => 256,
        5 => 320,
        6 => 384,
        _ => 512,
    }
}
