//! Stages on ONNX Runtime: the graph of a range of layers built in memory, for CPUs with kernels of our own
//! as custom operators, for GPUs with ONNX Runtime's operators.
//!
//! [`OrtStage`] is a [`Stage`](mesh_engine::Stage). Loading packs the weights of its layers, reserves the KV
//! cache, and makes a session of a graph with two nodes per layer (module `graph` draws it). ONNX Runtime
//! walks the chain and owns the tensors between its nodes; the nodes call `mesh-kernels`, whose pool computes
//! on all threads.
//!
//! # Why operators of our own
//! ONNX Runtime has `MatMulNBits` and `GroupQueryAttention`, and a graph of them runs at about llama.cpp's
//! speed. Four things asked for more:
//! - GGUF's Q4_1 and K-quants have a scale and a minimum per block. `MatMulNBits` takes those only as a float
//!   `zero_points` input, which is about 70 times slower, or after a requantisation, which costs perplexity.
//! - A row must not depend, bit for bit, on other rows of its step; the library's products choose their
//!   algorithm by the number of rows.
//! - A step mixes decode rows and prompt chunks of many slots. `GroupQueryAttention` wants equal lengths.
//! - A node costs about a microsecond and a pass over its tensors. With norm, rotation, activation and
//!   residual inside, a layer has two nodes instead of eleven.
//!
//! # The second lowering
//! A GPU's execution provider cannot run our operators, so [`DeviceStage`] builds the same layers of ONNX
//! Runtime's own ones (module `device::lower`): `MatMulNBits` with the weights of the file as they are, and a
//! product of block sums for the minimum of a type; `GroupQueryAttention` with the slot's keys and values as
//! past and present, on the device from step to step; one run for each segment of a step. On a GPU weights'
//! scales, activations and KV cache are f16, the residual stream is f32. [`open`] takes a GPU where one
//! works, and says why where none does.
//!
//! **Rows are not independent there**, bit for bit, as the trait asks: products choose their algorithm by the
//! number of rows. A stream that is run again on such a stage, or moved between it and a CPU, continues with
//! the same text up to near ties. Exported KV rows have the format of the CPU's stage.
//!
//! A model that is larger than the device's memory is split: the first layers run there, the rest on the CPU
//! (module [`overflow`]). Of a mixture the device has attention and dense layers, and the CPU has the experts.
//!
//! Any GPU with a Vulkan driver is used through ONNX Runtime's WebGPU plugin (module `webgpu`), a library that is
//! loaded at run time. The plugin chooses the device itself, so module `vulkan` looks at the devices before: a
//! software renderer is refused. [`open`] measures a few decode steps and takes what is fastest.
//!
//! The graph is tested on ONNX Runtime's CPU provider, in f32 and in f16, and on WebGPU with a software renderer.
//! **It has never run on a GPU**: with `make test-gpu` and a library that has the provider, the same tests run
//! there.
//!
//! # Encoders
//! [`OrtEncoder`] runs embedding models of the BERT family the same way: two nodes per layer over
//! `mesh-kernels`, sequences of any lengths side by side.
//!
//! # Memory
//! Packed weights live in the operators, not in ONNX Runtime's initialisers; the file's pages are dropped
//! once they are packed. The KV cache is address space that the system fills as slots grow, and that
//! [`truncate`](mesh_engine::Stage::truncate) to 0 gives back.
//!
//! A [`DeviceStage`] has its weights twice, on the device and on the host, where the session keeps its
//! inputs; its slots grow by doubling, and shrink when others need what was planned for all.
//!
//! # Unsafe code
//! Module `tensors` reads the tensors of a running node through ONNX Runtime's C interface; module
//! `operators` says for each access why type and length are right, and keeps inputs apart from the outputs
//! that may lie on the same memory. Module `vulkan` calls Vulkan's functions to list devices, and `device::slots`
//! the function that copies tensors to and from a plugin's device.

mod backend;
mod cache;
mod check;
mod device;
mod encoder;
mod feed_forward;
mod graph;
mod kv;
mod latent;
mod node;
mod onnx;
mod operators;
mod options;
pub mod overflow;
mod provider;
mod requantise;
mod runtime;
mod shared;
mod size;
mod stage;
mod tensors;
mod vulkan;
mod webgpu;
mod weights;

pub use backend::{Backend, NoSuchBackend, Opened, open};
pub use cache::WeightCache;
pub use device::{Device, DeviceMemory, DeviceStage, Precision, bandwidth};
pub use encoder::OrtEncoder;
pub use mesh_kernels::Reclaim;
pub use options::{KvFormat, LoadError, OrtOptions, WeightFormat, suited_kv};
pub use overflow::{DeviceOptions, Split, SplitStage};
pub use provider::Provider;
pub use runtime::load_library;
pub use size::{matrix_bytes, memory_bytes};
pub use stage::OrtStage;
pub use vulkan::{Adapter, AdapterKind, VulkanError, adapters};
