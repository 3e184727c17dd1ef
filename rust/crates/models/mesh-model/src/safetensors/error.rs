//! Errors of safetensors files.

use super::dtype::Dtype;
use crate::file::FileError;

/// Errors of reading a safetensors file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages name the fields")]
pub enum SafetensorsError {
    /// The file could not be opened or read, or changed meanwhile.
    #[error(transparent)]
    File(#[from] FileError),
    /// The file is shorter than the length of a header.
    #[error("not a safetensors file: it has {length} bytes, and the header's length alone takes 8")]
    NoHeader { length: u64 },
    /// The header's length is over the limit, or beyond the end of the file.
    #[error(
        "not a safetensors file, or a damaged one: its header is said to have {header} bytes, and at most {limit} can be"
    )]
    HeaderLength {
        /// Header length in the file.
        header: u64,
        /// Maximum: the file's length or the limit of this crate.
        limit: u64,
    },
    /// The header is not JSON of the right form.
    #[error("the safetensors header is malformed: {message}")]
    Header { message: String },
    /// More tensors than any model has.
    #[error(
        "the safetensors header lists over {limit} tensors: the file is damaged or not meant to be read"
    )]
    TooManyTensors { limit: usize },
    /// A shape whose product overflows or that has too many dimensions.
    #[error("tensor {tensor:?} has shape {shape:?}: {reason}")]
    Shape {
        tensor: String,
        shape: Vec<u64>,
        reason: &'static str,
    },
    /// A range of bytes that does not fit the shape.
    #[error(
        "tensor {tensor:?} of type {dtype} and shape {shape:?} takes {wanted} bytes, but its data_offsets {begin}..{end} \
         hold {found}: the file contradicts itself"
    )]
    Size {
        tensor: String,
        dtype: Dtype,
        shape: Vec<u64>,
        /// Bytes that type and shape take.
        wanted: u64,
        /// First byte in the data section.
        begin: u64,
        /// One past the last byte in the data section.
        end: u64,
        /// Number of bytes in the range.
        found: u64,
    },
    /// A range that ends before it begins.
    #[error("tensor {tensor:?} has data_offsets {begin}..{end}, which end before they begin")]
    Backwards {
        tensor: String,
        /// First byte in the data section.
        begin: u64,
        /// One past the last byte in the data section.
        end: u64,
    },
    /// A range beyond the end of the file.
    #[error(
        "tensor {tensor:?} has data_offsets {begin}..{end}, but the file has only {data} bytes of data; it was probably cut \
         short, fetch it again"
    )]
    OutsideFile {
        tensor: String,
        /// First byte in the data section.
        begin: u64,
        /// One past the last byte in the data section.
        end: u64,
        /// Length of the data section.
        data: u64,
    },
    /// A range that does not begin at a multiple of the element's size.
    #[error(
        "tensor {tensor:?} begins at offset {begin}, which is no multiple of the {size} bytes of a {dtype}: write the file \
         anew with the safetensors library"
    )]
    Misaligned {
        tensor: String,
        dtype: Dtype,
        /// First byte in the data section.
        begin: u64,
        /// Bytes of an element.
        size: u64,
    },
    /// Two tensors share bytes.
    #[error("tensors {first:?} and {second:?} overlap: the file is malformed")]
    Overlap { first: String, second: String },
    /// Bytes that belong to no tensor.
    #[error(
        "{bytes} bytes of data at offset {at} belong to no tensor, which the format forbids: the file is damaged"
    )]
    Hole {
        /// Position of the first byte in the data section.
        at: u64,
        bytes: u64,
    },
    /// A tensor that does not hold floats where floats are needed.
    #[error("tensor {tensor:?} has type {dtype}: F32, F16 or BF16 is needed")]
    NotFloats { tensor: String, dtype: Dtype },
}
