//! Reasons why a model of images cannot be loaded.

use std::path::PathBuf;

use mesh_model::safetensors::{Dtype, SafetensorsError};

/// Reasons why a model of images cannot be loaded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages name the fields")]
pub enum ModelError {
    /// A file that must be there.
    #[error("{} is missing: {remedy}", path.display())]
    Missing { path: PathBuf, remedy: &'static str },
    /// A file of configuration that cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },
    /// A file of configuration that is not a JSON object.
    #[error("{} is not a JSON object: {message}; fetch the file again", path.display())]
    Json { path: PathBuf, message: String },
    /// A value in a file of configuration.
    #[error("{}: {key} is {value}, {reason}", path.display())]
    Value {
        path: PathBuf,
        key: String,
        value: String,
        reason: String,
    },
    /// A file of weights that is malformed or cannot be read.
    #[error("{}: {source}", path.display())]
    Safetensors {
        path: PathBuf,
        source: SafetensorsError,
    },
    /// A tensor that the configuration asks for.
    #[error(
        "{}: tensor {tensor} of shape {shape:?} is missing: the file is not of the model that its configuration \
         describes; fetch the whole model again", path.display()
    )]
    NoTensor {
        path: PathBuf,
        tensor: String,
        shape: Vec<u64>,
    },
    /// A tensor of another shape than the configuration asks for.
    #[error(
        "{}: tensor {tensor} has shape {found:?}, but {expected:?} was expected from the configuration; fetch the \
         whole model again", path.display()
    )]
    Shape {
        path: PathBuf,
        tensor: String,
        expected: Vec<u64>,
        found: Vec<u64>,
    },
    /// A tensor whose elements cannot be computed with.
    #[error(
        "{}: tensor {tensor} has elements of type {found}, but F32, F16 or BF16 was expected; quantised weights are \
         not supported", path.display()
    )]
    Type {
        path: PathBuf,
        tensor: String,
        found: Dtype,
    },
    /// Tensors that belong to no known layout.
    #[error("{} is not a Stable Diffusion 1, 2 or XL model: {reason}", path.display())]
    Unknown { path: PathBuf, reason: String },
}
