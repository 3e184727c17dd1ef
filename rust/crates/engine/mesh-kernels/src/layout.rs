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
//! | scales, [`Scales::Halves`] | 32 | i8 scale code × 16 for inputs 0..16, the same for 16..32 |
//! | low bits (4, 5, 6 bits) | 256 | vector j: low nibbles inputs 4j.., high nibbles inputs 16+4j.. |
//! | bit 4 (5 bits) | 64 | byte of column c, i: bit g is that of input 4g+i |
//! | bits 4, 5 (6 bits) | 128 | as above, two bits per group: vector 0 groups 0..4, vector 1 groups 4..8 |
//! | codes (8 bits) | 512 | vector g: inputs 4g.. |
//!
//! `Coded` and `Halves` panels have 64 bytes in front of every 8 blocks: f16 D × 16 and f16 M × 16, which
//! multiply the codes. Floats are stored as `[k][16]` per panel.

/// Outputs (columns of the product) per panel.
pub(crate) const PANEL: usize = 16;
/// Inputs per block, the unit of scaling.
pub(crate) const BLOCK: usize = 32;
/// Blocks per group of [`Scales::Coded`] and [`Scales::Halves`].
pub(crate) const GROUP: usize = 8;
/// Bytes in front of a group.
pub(crate) const GROUP_HEAD: usize = 64;

/// The layouts of packed weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Layout {
    /// Q4_0.
    Q4,
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
    /// An 8-bit code per 16 inputs and column, with an f16 factor per group.
    Halves,
}

impl Scales {
    /// Bytes per panel block.
    pub(crate) const fn bytes(self) -> usize {
        match self {
            Scales::Block | Scales::Coded | Scales::Halves => 32,
            Scales::BlockMin => 64,
        }
    }

    /// True if each group of 8 blocks starts with factors for its scale codes.
    pub(crate) const fn grouped(self) -> bool {
        matches!(self, Scales::Coded | Scales::Halves)
    }
}

impl Layout {
    /// Bits per weight and scales of a quantised layout; `None` for floats.
    pub(crate) const fn quantised(self) -> Option<(u32, Scales)> {
        match self {
            Layout::Q4 => Some((4, Scales::Block)),
            Layout::Q4Min => Some((4, Scales::BlockMin)),
            Layout::Q4Coded => Some((4, Scales::Coded)),
            Layout::Q5 => Some((5, Scales::Block)),
            Layout::Q5Min => Some((5, Scales::BlockMin)),
            Layout::Q5Coded => Some((5, Scales::Coded)),
            Layout::Q6 => Some((6, Scales::Block)),
            Layout::Q6Halves => Some((6, Scales::Halves)),
            Layout::Q8 => Some((8, Scales::Block)),
            Layout::F16 | Layout::Bf16 | Layout::F32 => None,
        }
    }

    /// Number subtracted from a code before it is scaled, for layouts without a minimum.
    pub(crate) const fn bias(self) -> i32 {
        match self {
            Layout::Q4 => 8,
            Layout::Q5 => 16,
            Layout::Q6 | Layout::Q6Halves => 32,
            Layout::Q8 => 128,
            _ => 0,
        }
    }

    /// Bytes of a panel of `k` inputs.
    pub(crate) const fn panel_bytes(self, k: usize) -> usize {
        match self.quantised() {
            Some((bits, scales)) => {
                let blocks = k / BLOCK;
                let heads = if scales.grouped() {
                    blocks.div_ceil(GROUP) * GROUP_HEAD
                } else {
                    0
                };
                blocks * (scales.bytes() + code_bytes(bits)) + heads
            }
            None => k * PANEL * self.float_bytes(),
        }
    }

    /// Byte offset of block `index` within a quantised panel, including the heads of groups before it.
    pub(crate) const fn block_offset(self, index: usize) -> usize {
        match self.quantised() {
            Some((bits, scales)) => {
                let heads = if scales.grouped() {
                    (index / GROUP + 1) * GROUP_HEAD
                } else {
                    0
                };
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
        4 => 256,
        5 => 320,
        6 => 384,
        _ => 512,
    }
}
