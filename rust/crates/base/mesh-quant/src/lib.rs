//! The weight types of GGUF files, block by block, exactly as ggml defines them (ggml-common.h, ggml-quants.c).
//!
//! - [`GgmlType`]: numbers, names and block sizes;
//! - [`stretch`]: 32 consecutive weights of a quantised row as small codes with scales, which is what packing
//!   for the kernels starts from;
//! - [`Codebook`]: the numbers that the codes of some types stand for;
//! - [`dequantize`]: weights as f32, bit for bit as ggml's reference functions give them;
//! - [`scale_block`]: scales for blocks of random bits.
//!
//! Any bytes are valid blocks: every index into a grid or a codebook has exactly the bits that the table has
//! entries for.

mod codebook;
mod dequantize;
mod grid;
mod grid_types;
mod random;
mod stretch;
mod types;

pub use codebook::Codebook;
pub use dequantize::{WrongLength, dequantize};
pub use random::scale_block;
pub use stretch::{Stretch, stretch};
pub use types::{GgmlType, foreign_type_name};
