//! Stable Diffusion 1, 2 and XL on libtorch.
//!
//! [`TchDiffuser`] loads a model from a [`Checkpoint`](mesh_diffusion::checkpoint::Checkpoint) and computes it: CLIP text
//! encoders, the UNet, and the autoencoder or a tiny one in its place. CPUs, CUDA and ROCm run the same code; ROCm's devices have
//! CUDA's names in libtorch. No gradients are recorded.
//!
//! Weights are read from the file piece by piece into the tensors that compute, so that loading takes hardly more memory than
//! the model. Weights of convolutions lie with their channels innermost, and so do all activations that come from them:
//! libtorch then neither reorders them before each convolution nor between convolutions and attention.
//!
//! Every call into libtorch goes through the form that returns an error. An error names the block of the network and becomes a
//! [`StageError`](mesh_engine::StageError); the model can be used on.
//!
//! `unsafe` is in `memory` alone, for settings of the C library.

#![deny(unsafe_code)]

mod clip;
mod diffuser;
mod error;
mod load;
mod memory;
mod nn;
mod options;
mod parts;
mod tiles;
mod tiny;
mod unet;
mod vae;
mod weight;

pub use diffuser::TchDiffuser;
pub use error::LoadError;
pub use memory::share_memory;
pub use options::{Device, Offload, Options, Precision, WeightForm};
