//! Errors of model folders.

use std::path::PathBuf;

use crate::gguf::GgufError;
use crate::safetensors::{Dtype, SafetensorsError};

/// Errors of reading a model in Hugging Face's form.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HfError {
    /// A required file is missing.
    #[error("{} is missing: {remedy}", path.display())]
    Missing {
        /// Path of the file.
        path: PathBuf,
        /// Remedy for the user.
        remedy: &'static str,
    },
    /// A file could not be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// Path of the file.
        path: PathBuf,
        /// Error from the operating system.
        source: std::io::Error,
    },
    /// The path is not of a regular file.
    #[error("{} is not a regular file", path.display())]
    NotAFile {
        /// Path that the error is about.
        path: PathBuf,
    },
    /// A file larger than any real one; it was not read.
    #[error(
        "{} has {bytes} bytes, over the limit of {limit}: it is damaged or not meant to be read", path.display()
    )]
    TooLarge {
        /// Path of the file.
        path: PathBuf,
        /// Length of the file in bytes.
        bytes: u64,
        /// The most that is accepted.
        limit: u64,
    },
    /// A link that leads out of the folder.
    #[error(
        "{} is a link to {}, which is outside the model's folder: put the file itself there", path.display(), target.display()
    )]
    Outside {
        /// Path of the file.
        path: PathBuf,
        /// Target of the link.
        target: PathBuf,
    },
    /// A name in the index that is not the name of a file in the folder.
    #[error(
        "model.safetensors.index.json names the file {name:?}: only .safetensors files in the model's own folder can be named"
    )]
    ShardName {
        /// The name.
        name: String,
    },
    /// JSON that does not parse, or lacks what is needed.
    #[error("{file} is malformed: {message}")]
    Json {
        /// Name of the file.
        file: String,
        /// Error from the parser, with its position.
        message: String,
    },
    /// A value that no network has.
    #[error("{file}: {key:?} is {value}: {reason}")]
    Value {
        /// Name of the file.
        file: &'static str,
        /// Name of the key.
        key: String,
        /// Value of the key.
        value: String,
        /// Rule that the value breaks.
        reason: String,
    },
    /// A network of another family.
    #[error(
        "architecture {found:?} is not supported: use a model of LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, \
         Qwen3ForCausalLM or Gemma3ForCausalLM"
    )]
    Architecture {
        /// Architecture in the file.
        found: String,
    },
    /// A feature that the engines do not have.
    #[error("the model needs {feature}, which is not supported: choose another model")]
    Unsupported {
        /// Description of the feature.
        feature: String,
    },
    /// A file of weights.
    #[error("{}: {source}", path.display())]
    Weights {
        /// Path of the file.
        path: PathBuf,
        /// Error of the file.
        #[source]
        source: Box<SafetensorsError>,
    },
    /// A tensor of a type that the engines cannot compute with.
    #[error("tensor {tensor:?} has type {dtype}: only F32, F16 and BF16 are supported")]
    TensorType {
        /// Name of the tensor.
        tensor: String,
        /// Element type of the tensor.
        dtype: Dtype,
    },
    /// A tensor without elements.
    #[error("tensor {tensor:?} has no elements: the file is damaged")]
    Empty {
        /// Name of the tensor.
        tensor: String,
    },
    /// The index and the files contradict each other.
    #[error(
        "model.safetensors.index.json says that tensor {tensor:?} is in {expected:?}, but it is {found}: fetch the model again"
    )]
    Index {
        /// Name of the tensor.
        tensor: String,
        /// The file in the index.
        expected: String,
        /// Location of the tensor.
        found: String,
    },
    /// The keys and tensors together.
    #[error(transparent)]
    Gguf(#[from] GgufError),
}
