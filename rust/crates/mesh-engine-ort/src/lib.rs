//! Stages on ONNX Runtime: the graph built in memory, CPU kernels as custom operators.

mod graph;
mod kv;
mod onnx;
mod operators;
mod options;
mod runtime;
mod shared;
mod stage;
mod tensors;
mod weights;

pub use options::{LoadError, OrtOptions};
pub use stage::OrtStage;
