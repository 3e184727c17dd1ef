//! Stages on ONNX Runtime: the graph of a range of layers built in memory, CPU kernels as custom operators.
//!
//! [`OrtStage`] is a [`Stage`](mesh_engine::Stage). Loading packs the weights of its layers, reserves the KV cache, and makes
//! a session of a graph with two nodes per layer (module `graph` draws it). ONNX Runtime walks the chain and owns the
//! tensors between its nodes; the nodes call `mesh-kernels`, whose pool computes on all threads.
//!
//! # Why operators of our own
//! ONNX Runtime has `MatMulNBits` and `GroupQueryAttention`, and a graph of them runs at about llama.cpp's speed. Four things
//! asked for more:
//! - GGUF's Q4_1 and K-quants have a scale and a minimum per block. `MatMulNBits` takes those only as a float `zero_points`
//!   input, which is about 70 times slower, or after a requantisation, which costs perplexity.
//! - A row must not depend, bit for bit, on what shares its step; the library's products choose their algorithm by the number
//!   of rows.
//! - A step mixes decode rows and prompt chunks of many slots. `GroupQueryAttention` wants equal lengths.
//! - A node costs about a microsecond and a pass over its tensors. With norm, rotation, activation and residual inside, a
//!   layer has two nodes instead of eleven.
//!
//! There is no second lowering to the standard operators: GPUs are the other engine's, and on CPUs it would be slower. It has
//! its place beside `graph` if an execution provider ever needs it.
//!
//! # Memory
//! Packed weights live in the operators, not in ONNX Runtime's initialisers; the file's pages are dropped once they are
//! packed. The KV cache is address space that the system fills as slots grow, and that
//! [`truncate`](mesh_engine::Stage::truncate) to 0 gives back.
//!
//! # Unsafe code
//! Module `tensors` reads the tensors of a running node through ONNX Runtime's C interface; module `operators` says for each
//! access why type and length are right, and keeps inputs apart from the outputs that may lie on the same memory.

mod graph;
mod kv;
mod onnx;
mod operators;
mod options;
mod requantise;
mod runtime;
mod shared;
mod stage;
mod tensors;
mod weights;

pub use options::{LoadError, OrtOptions, WeightFormat};
pub use stage::OrtStage;
