//! Errors of configurations.

use crate::gguf::GgufError;

/// Errors of a network's configuration.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages name the fields")]
pub enum ConfigError {
    /// A key or tensor is missing or of the wrong type.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// A network of another family.
    #[error(
        "architecture {found:?} is not supported: use a model of llama, qwen2, qwen3, gemma3, qwen3moe, qwen2moe, \
         olmoe, granitemoe, deepseek2 or gpt-oss"
    )]
    Architecture { found: String },
    /// A number that no network has.
    #[error("metadata {key:?} is {value}: {reason}")]
    Value {
        key: String,
        value: String,
        reason: String,
    },
    /// A tensor of a shape that contradicts the metadata.
    #[error(
        "tensor {tensor:?} has dimensions {found:?}, but the metadata asks for {wanted:?}: the file contradicts itself, \
         convert the model again"
    )]
    Shape {
        tensor: String,
        found: Vec<u64>,
        wanted: Vec<u64>,
    },
    /// A tensor that the engines would ignore, so that the result would differ from the model's.
    #[error(
        "tensor {tensor:?} has no place in a {architecture} network: this variant of it is not supported"
    )]
    UnexpectedTensor {
        tensor: String,
        /// Name of the family.
        architecture: &'static str,
    },
    /// A feature that the engines do not have.
    #[error("the model needs {feature}, which is not supported: choose another model")]
    Unsupported { feature: String },
}
