//! Errors of model folders.

use std::path::PathBuf;

use crate::gguf::GgufError;
use crate::safetensors::{Dtype, SafetensorsError};

/// Errors of reading a model in Hugging Face's form.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages name the fields")]
pub enum HfError {
    /// A required file is missing.
    #[error("{} is missing: {remedy}", path.display())]
    Missing {
        path: PathBuf,
        /// Remedy for the user.
        remedy: &'static str,
    },
    /// A file could not be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },
    /// The path is not of a regular file.
    #[error("{} is not a regular file", path.display())]
    NotAFile { path: PathBuf },
    /// A file larger than any real one; it was not read.
    #[error(
        "{} has {bytes} bytes, over the limit of {limit}: it is damaged or not meant to be read", path.display()
    )]
    TooLarge {
        path: PathBuf,
        bytes: u64,
        limit: u64,
    },
    /// A link that leads out of the folder.
    #[error(
        "{} is a link to {}, which is outside the model's folder: put the file itself there", path.display(), target.display()
    )]
    Outside { path: PathBuf, target: PathBuf },
    /// A name in the index that is not the name of a file in the folder.
    #[error(
        "model.safetensors.index.json names the file {name:?}: only .safetensors files in the model's own folder can be named"
    )]
    ShardName { name: String },
    /// JSON that does not parse, or lacks what is needed.
    #[error("{file} is malformed: {message}")]
    Json { file: String, message: String },
    /// A value that no network has.
    #[error("{file}: {key:?} is {value}: {reason}")]
    Value {
        file: &'static str,
        key: String,
        value: String,
        reason: String,
    },
    /// A network of another family.
    #[error(
        "architecture {found:?} is not supported: use a model of LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, \
         Qwen3ForCausalLM, Gemma3ForCausalLM, MixtralForCausalLM, Qwen3MoeForCausalLM, Qwen2MoeForCausalLM, \
         OlmoeForCausalLM, GraniteMoeForCausalLM, GraniteMoeSharedForCausalLM, DeepseekV2ForCausalLM or \
         GptOssForCausalLM"
    )]
    Architecture { found: String },
    /// A feature that the engines do not have.
    #[error("the model needs {feature}, which is not supported: choose another model")]
    Unsupported { feature: String },
    /// A file of weights.
    #[error("{}: {source}", path.display())]
    Weights {
        path: PathBuf,
        #[source]
        source: Box<SafetensorsError>,
    },
    /// A tensor of a type that the engines cannot compute with.
    #[error("tensor {tensor:?} has type {dtype}: only F32, F16 and BF16 are supported")]
    TensorType { tensor: String, dtype: Dtype },
    /// A tensor without elements.
    #[error("tensor {tensor:?} has no elements: the file is damaged")]
    Empty { tensor: String },
    /// The experts of a layer in one tensor of a shape that they cannot have.
    #[error(
        "tensor {tensor:?} has shape {shape:?}: it must hold the matrices of 1 to 1024 experts; convert the model again"
    )]
    Experts { tensor: String, shape: Vec<u64> },
    /// MXFP4 codes or scales of another type or shape.
    #[error(
        "tensor {tensor:?} has type {dtype} and shape {shape:?}: MXFP4 weights are U8, codes [experts, rows, blocks, 16] and \
         scales [experts, rows, blocks]; fetch the model again"
    )]
    Mxfp4 {
        tensor: String,
        dtype: Dtype,
        shape: Vec<u64>,
    },
    /// MXFP4 codes without scales, or scales without codes.
    #[error("tensor {tensor:?} is there without {missing:?}: fetch the whole model again")]
    HalfOfMxfp4 { tensor: String, missing: String },
    /// More tensors than any model has.
    #[error(
        "the model has more than {limit} tensors: the folder is damaged; fetch the model again"
    )]
    TooManyTensors { limit: usize },
    /// The index and the files contradict each other.
    #[error(
        "model.safetensors.index.json says that tensor {tensor:?} is in {expected:?}, but it is {found}: fetch the model again"
    )]
    Index {
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
