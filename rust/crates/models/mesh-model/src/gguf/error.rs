//! Errors of GGUF files.

use crate::file::FileError;

/// Errors of reading a GGUF file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages name the fields")]
pub enum GgufError {
    /// The file could not be opened or read, or changed meanwhile.
    #[error(transparent)]
    File(#[from] FileError),
    /// The magic number is missing.
    #[error("not a GGUF file: it begins with {found:02x?} instead of \"GGUF\"")]
    NotGguf {
        /// First bytes of the file.
        found: Vec<u8>,
    },
    /// A version that this crate does not read.
    #[error(
        "GGUF version {version} is not supported: convert the file to version 3, little-endian"
    )]
    Version { version: u32 },
    /// The file ends before its last field.
    #[error(
        "the file ends inside {what}: {needed} bytes are needed at byte {at}, but the file has {length}; \
         it was probably cut short, fetch it again"
    )]
    Truncated {
        /// Field that is cut off.
        what: String,
        /// Position of its first byte.
        at: u64,
        /// Length of the field in bytes.
        needed: u64,
        length: u64,
    },
    /// A count or length over this crate's limit.
    #[error(
        "{what} is {value}, over the limit of {limit}: the file is damaged or not meant to be read"
    )]
    Limit {
        /// The count or length.
        what: String,
        value: u64,
        limit: u64,
    },
    /// Text that is not UTF-8.
    #[error("{what} is not valid UTF-8: the file is damaged, fetch it again")]
    Utf8 {
        /// Field with the text.
        what: String,
    },
    /// A metadata key or tensor name that appears twice.
    #[error("{kind} {name:?} appears twice: the file is malformed, convert or fetch it again")]
    Duplicate {
        /// "metadata key" or "tensor".
        kind: &'static str,
        name: String,
    },
    /// A metadata value of an unknown or forbidden type.
    #[error(
        "metadata {key:?} has the unknown type {ty}: the file is damaged or newer than this program"
    )]
    ValueType {
        key: String,
        /// Number of the type in the file.
        ty: u32,
    },
    /// An array that contains arrays.
    #[error("metadata {key:?} is an array of arrays, which no model needs: the file is malformed")]
    NestedArray { key: String },
    /// A key that the caller needs is absent.
    #[error("metadata {key:?} is missing: the file is incomplete, convert the model again")]
    MissingKey { key: String },
    /// A key has a value of the wrong type.
    #[error("metadata {key:?} is {found}, but {wanted} is needed: convert the model again")]
    WrongType {
        key: String,
        /// The type that was needed.
        wanted: &'static str,
        found: String,
    },
    /// A tensor of a type that this crate cannot read.
    #[error(
        "tensor {tensor:?} has type {name} ({ty}), which is not supported: convert the model to F16, or \
         quantise it to another type (Q4_K, Q6_K, IQ4_XS, MXFP4 and all others of ggml for weights are)"
    )]
    TensorType {
        tensor: String,
        /// Number of the type in the file.
        ty: u32,
        /// The type's name, where known.
        name: &'static str,
    },
    /// A tensor whose dimensions make no sense.
    #[error("tensor {tensor:?} has dimensions {dims:?}: {reason}")]
    TensorShape {
        tensor: String,
        dims: Vec<u64>,
        reason: &'static str,
    },
    /// A tensor that does not begin at a multiple of the alignment.
    #[error(
        "tensor {tensor:?} begins at offset {offset}, which is not a multiple of the alignment {alignment}"
    )]
    Misaligned {
        tensor: String,
        /// Offset of the tensor in the data section.
        offset: u64,
        /// Alignment of the file in bytes.
        alignment: u64,
    },
    /// An alignment that is not a power of two, or out of range.
    #[error("general.alignment is {alignment}: it must be a power of two from 1 to 65536")]
    Alignment { alignment: u64 },
    /// Two tensors share bytes.
    #[error("tensors {first:?} and {second:?} overlap: the file is malformed")]
    Overlap { first: String, second: String },
    /// A tensor that the caller needs is absent.
    #[error("tensor {tensor:?} is missing: the file is incomplete or for another architecture")]
    MissingTensor { tensor: String },
    /// Input and output of a dequantisation do not fit each other.
    #[error(transparent)]
    Dequantize(#[from] mesh_quant::WrongLength),
    /// Far more bytes than the tensors take.
    #[error(
        "the file has {bytes} bytes, but its tensors end at byte {end}: it is damaged or not whole, fetch it again"
    )]
    Surplus {
        bytes: u64,
        /// The end of the last tensor.
        end: u64,
    },
}
