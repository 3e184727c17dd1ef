//! Models on disk: GGUF, safetensors, tokenizer, chat template, streaming detokenisation.
//!
//! [`Model::open`] reads a GGUF file ([`Gguf`]) or a folder from Hugging Face ([`hf`]): the [`Tensors`], the
//! shape of the network ([`ModelConfig`]), the [`Tokenizer`] and the [`ChatTemplate`]. All four are read
//! through the trait [`Checkpoint`], which describes a stored model. Nothing in a file is trusted: every
//! count, length and offset is checked before it is used, and errors name the faulty field.

#![forbid(unsafe_code)]

pub mod chat;
pub mod checkpoint;
pub mod config;
pub mod data;
pub mod encoder;
pub mod file;
mod gather;
pub mod gguf;
pub mod hf;
pub mod image;
pub mod model;
pub mod safetensors;
#[cfg(any(test, feature = "synth"))]
pub mod synth;
pub mod text;
pub mod tokenizer;

pub use chat::{ChatError, ChatTemplate, Message, RenderRequest, Rendered};
pub use checkpoint::Checkpoint;
pub use config::{
    Activation, Architecture, ConfigError, LatentAttention, Mixture, ModelConfig, Rope,
    RopeScaling, RopeStyle, SharedExpert, SlidingWindow,
};
pub use encoder::{EncoderError, EncoderModel};
pub use gguf::{GgmlType, Gguf, GgufError, SplitError, Tensor, Tensors, dequantize};
pub use model::{Model, ModelError};
pub use text::TextStream;
pub use tokenizer::{EncodeOptions, Tokenizer, TokenizerError};
