//! Rotary position embedding (RoPE) of query and key heads.

// Index loops are inlined into the kernels, and vectorised there; iterator chains are not always.
#![allow(clippy::needless_range_loop)]

use std::sync::OnceLock;

use crate::KernelError;
use crate::error::expect_len;

/// Pairing of a head's elements for rotation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopeStyle {
    /// `(2i, 2i + 1)`: llama, whose GGUF files are permuted to it.
    Interleaved,
    /// `(i, i + dim / 2)`: qwen2, qwen3 and others that Hugging Face calls rotate-half.
    Halves,
}

/// Parameters of the rotation angles.
#[derive(Debug, Clone, Copy)]
pub struct RopeOptions<'a> {
    /// Pairing of the elements.
    pub style: RopeStyle,
    /// Elements of a head that are rotated, from its start; even.
    pub dim: usize,
    /// Pair i turns by `position * scale * base^(-2i / dim) / factors[i]`.
    pub base: f32,
    /// Factor of the position: 1, or below it for linearly stretched contexts.
    pub scale: f32,
    /// One divisor per pair (Llama 3's `rope_freqs`), or none.
    pub factors: Option<&'a [f32]>,
    /// Most positions there can be: the context length.
    pub positions: usize,
}

/// Sines and cosines for the positions of a context, computed when a position is first met: a model that
/// could take 131,072 tokens would have 64 MB of them, and few conversations come near.
#[derive(Debug)]
pub struct Rope {
    style: RopeStyle,
    dim: usize,
    positions: usize,
    /// Radians per position of each pair.
    speeds: Vec<f64>,
    /// Each of [`BLOCK`] positions, `[BLOCK][cos × dim/2, sin × dim/2]`.
    blocks: Box<[OnceLock<Box<[f32]>>]>,
}

/// Positions that are computed together.
const BLOCK: usize = 256;

impl Rope {
    /// A table for `options`, filled as positions are used.
    ///
    /// # Errors
    /// When `dim` is odd or zero, the factors are not `dim / 2`, or there are absurdly many positions.
    pub fn new(options: &RopeOptions<'_>) -> Result<Rope, KernelError> {
        let RopeOptions { dim, positions, .. } = *options;
        if dim == 0 || !dim.is_multiple_of(2) || dim > 1024 {
            return Err(KernelError::Dimension {
                what: "number of rotated elements",
                value: dim,
                need: "it must be even and at most 1024",
            });
        }
        if positions > 1 << 22 {
            return Err(KernelError::Dimension {
                what: "number of positions",
                value: positions,
                need: "it must be at most 4194304",
            });
        }
        if let Some(factors) = options.factors {
            expect_len("the rotation factors", factors.len(), dim / 2)?;
        }
        let speeds: Vec<f64> = (0..dim / 2)
            .map(|i| {
                let factor = options.factors.map_or(1.0, |f| f64::from(f[i]));
                let power = -2.0 * i as f64 / dim as f64;
                f64::from(options.scale) * f64::from(options.base).powf(power) / factor
            })
            .collect();
        let blocks = positions.div_ceil(BLOCK);
        Ok(Rope {
            style: options.style,
            dim,
            positions,
            speeds,
            blocks: std::iter::repeat_with(OnceLock::new).take(blocks).collect(),
        })
    }

    /// The angles of a block, in f64 until the end.
    #[cold]
    fn block(&self, index: usize) -> Box<[f32]> {
        let mut block = Vec::with_capacity(BLOCK * self.dim);
        for position in index * BLOCK..(index + 1) * BLOCK {
            let angle = |speed: &f64| position as f64 * speed;
            block.extend(self.speeds.iter().map(|s| angle(s).cos() as f32));
            block.extend(self.speeds.iter().map(|s| angle(s).sin() as f32));
        }
        block.into_boxed_slice()
    }

    /// Elements of a head that are rotated.
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// Most positions there can be.
    pub fn positions(&self) -> usize {
        self.positions
    }

    /// Rotates one head in place.
    ///
    /// # Errors
    /// When the head is shorter than the rotated elements or the position is beyond the context.
    pub fn rotate(&self, head: &mut [f32], position: usize) -> Result<(), KernelError> {
        if head.len() < self.dim {
            return Err(KernelError::Length {
                what: "the head to rotate",
                got: head.len(),
                need: self.dim,
            });
        }
        if position >= self.positions {
            return Err(KernelError::OutOfRange {
                what: "position",
                index: position,
                count: self.positions,
            });
        }
        self.turn(head, position);
        Ok(())
    }

    /// The same where both were checked before.
    #[inline(always)]
    pub(crate) fn turn(&self, head: &mut [f32], position: usize) {
        let half = self.dim / 2;
        let index = position / BLOCK;
        let block = self.blocks[index].get_or_init(|| self.block(index));
        let angles = &block[position % BLOCK * self.dim..][..2 * half];
        let (cos, sin) = (&angles[..half], &angles[half..2 * half]);
        match self.style {
            RopeStyle::Interleaved => {
                let head = &mut head[..2 * half];
                for i in 0..half {
                    let (a, b) = (head[2 * i], head[2 * i + 1]);
                    head[2 * i] = a * cos[i] - b * sin[i];
                    head[2 * i + 1] = a * sin[i] + b * cos[i];
                }
            }
            RopeStyle::Halves => {
                let (first, second) = head[..2 * half].split_at_mut(half);
                for i in 0..half {
                    let (a, b) = (first[i], second[i]);
                    first[i] = a * cos[i] - b * sin[i];
                    second[i] = a * sin[i] + b * cos[i];
                }
            }
        }
    }
}
