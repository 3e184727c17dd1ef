//! Quantised matrix products, attention and a thread pool for CPUs.
//!
//! - [`QMatrix`] holds weights of any GGUF type, repacked so that 16 outputs lie side by side (layout.rs);
//!   [`linear`], [`gate_up`] and [`feed_forward`] multiply with it, with norm, bias, residual and activation
//!   fused in.
//! - [`mixture`] is a feed-forward layer of [`Experts`]: it chooses a few of them for each row, and reads only
//!   those.
//! - [`attention`] rotates, stores and attends over a [`KvCache`] of f16 or f32 rows, one contiguous region
//!   per slot.
//! - [`encode_attention`] and [`layer_norm`] are for encoders: sequences of any lengths side by side, each
//!   attending to all of itself.
//! - [`Pool`] runs the loops; every operator takes one, and its [`Isa`].
//!
//! **Rows are independent, bit for bit.** A row's result is made by the same operations in the same order,
//! independent of other rows in the call, of the cuts in a prompt and of the number of threads:
//! - products: integer dot products of 32 inputs are exact; the floats are added block by block in the order
//!   of the inputs, in one accumulator per output, in every kernel;
//! - attention: positions are cut into chunks of 128 at absolute multiples of 128, the visible part of a
//!   chunk is summed in the order of its positions, chunks are merged in order; the thread that computed a
//!   chunk does not matter;
//! - norms: one fixed tree per row.
//!
//! The same holds across the instruction sets of a group (isa.rs): those that fuse multiplication and
//! addition (AVX2, AVX-VNNI, AVX-512, NEON) and those that do not (portable, SSE4.1, AVX). The groups differ in
//! rounding.
//!
//! Unsafe code: SIMD loads and stores through pointers whose ranges the safe callers have checked
//! (simd/mod.rs states the rules), output buffers written by the tasks of one loop in disjoint parts, and the
//! memory of buffers and caches.

mod attention;
mod encoder;
mod error;
mod experts;
mod gemm;
mod grouping;
mod isa;
mod layout;
mod linear;
mod matrix;
mod mem;
mod norm;
mod pack;
mod pool;
mod rope;
mod simd;

pub use attention::{Attention, KvCache, KvFormat, KvSegment, KvShape, attention};
pub use encoder::{encode_attention, layer_norm};
pub use error::KernelError;
pub use experts::{Expert, ExpertMatrix, Experts, MixtureLayer, SharedExpert, mixture};
pub use gemm::acts::RmsNorm;
pub use isa::{Isa, UnknownIsa};
pub use linear::{Activation, FeedForward, Gate, Linear, Residual, feed_forward, gate_up, linear};
pub use matrix::{EightBit, PackOptions, QMatrix};
pub use mem::Reclaim;
/// Storage type of a matrix's weights in the file.
pub use mesh_quant::GgmlType as WeightType;
pub use norm::{add_rms_norm, rms_norm, rms_norm_columns};
pub use pool::{Pool, PoolOptions, in_background};
pub use rope::{Rope, RopeOptions, RopeStyle};
