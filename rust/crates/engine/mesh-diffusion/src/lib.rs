//! Image generation with Stable Diffusion, all but the matrix work.
//!
//! The [`sampler`] leads latents from noise to a picture, one prediction of the model at a time, and its state after
//! any step resumes elsewhere bit for bit. [`noise`] is torch's, so that a seed gives the picture that it gives elsewhere.
//! [`tokenizer`] and [`prompt`] turn texts into what text encoders want; [`png`] writes and reads files.
//!
//! [`imaging`] is the workload of an engine: it queues requests, lets them take turns step by step, and asks a loaded
//! model, a [`Diffuser`], for predictions.

#![forbid(unsafe_code)]

pub mod checkpoint;
pub mod config;
pub mod imaging;
pub mod noise;
pub mod png;
pub mod preview;
pub mod prompt;
pub mod sampler;
#[cfg(any(test, feature = "synth"))]
pub mod synth;
pub mod tokenizer;

pub use imaging::{
    Conditioning, Diffuser, DiffuserInfo, Image, ImageEvent, ImageRequest, Imaging, ImagingOptions,
    InitImage, LatentShape, Progress, TextEmbedding,
};
pub use preview::LatentColours;
pub use prompt::{Chunk, Prompt};
pub use sampler::{Prediction, SamplerConfig, SamplerKind, TimestepSpacing};
pub use tokenizer::ClipTokenizer;
