//! What can be wrong with a safetensors file.

use super::Dtype;
use crate::file::FileError;

/// Why a safetensors file could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SafetensorsError {
    /// The file could not be opened or read, or changed meanwhile.
    #[error(transparent)]
    File(#[from] FileError),
    /// The file is shorter than the length of a header.
    #[error("not a safetensors file: it has {length} bytes, and the header's length alone takes 8")]
    NoHeader {
        /// Length of the file.
        length: u64,
    },
    /// The header is said to be longer than any real one, or than the file.
    #[error(
        "not a safetensors file, or a damaged one: its header is said to have {header} bytes, and at most {limit} can be"
    )]
    HeaderLength {
        /// What the file says.
        header: u64,
        /// What the file has room for, or the most that is accepted.
        limit: u64,
    },
    /// The header is no JSON of the right form.
    #[error("the safetensors header is malformed: {message}")]
    Header {
        /// Where and why.
        message: String,
    },
    /// More tensors than any model has.
    #[error(
        "the safetensors header lists over {limit} tensors: the file is damaged or not meant to be read"
    )]
    TooManyTensors {
        /// The most that is accepted.
        limit: usize,
    },
    /// A shape whose product overflows or that has too many dimensions.
    #[error("tensor {tensor:?} has shape {shape:?}: {reason}")]
    Shape {
        /// The tensor.
        tensor: String,
        /// What the file says.
        shape: Vec<u64>,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A range of bytes that does not fit the shape.
    #[error(
        "tensor {tensor:?} of type {dtype} and shape {shape:?} takes {wanted} bytes, but its data_offsets {begin}..{end} \
         hold {found}: the file contradicts itself"
    )]
    Size {
        /// The tensor.
        tensor: String,
        /// Its type.
        dtype: Dtype,
        /// Its shape.
        shape: Vec<u64>,
        /// Bytes that type and shape take.
        wanted: u64,
        /// First byte in the data section.
        begin: u64,
        /// One past the last.
        end: u64,
        /// Bytes between.
        found: u64,
    },
    /// A range that ends before it begins.
    #[error("tensor {tensor:?} has data_offsets {begin}..{end}, which end before they begin")]
    Backwards {
        /// The tensor.
        tensor: String,
        /// First byte in the data section.
        begin: u64,
        /// One past the last.
        end: u64,
    },
    /// A range beyond the end of the file.
    #[error(
        "tensor {tensor:?} has data_offsets {begin}..{end}, but the file has only {data} bytes of data; it was probably cut \
         short, fetch it again"
    )]
    OutsideFile {
        /// The tensor.
        tensor: String,
        /// First byte in the data section.
        begin: u64,
        /// One past the last.
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
        /// The tensor.
        tensor: String,
        /// Its type.
        dtype: Dtype,
        /// First byte in the data section.
        begin: u64,
        /// Bytes of an element.
        size: u64,
    },
    /// Two tensors share bytes.
    #[error("tensors {first:?} and {second:?} overlap: the file is malformed")]
    Overlap {
        /// The one that begins first.
        first: String,
        /// The other.
        second: String,
    },
    /// Bytes that no tensor has.
    #[error(
        "{bytes} bytes of data at offset {at} belong to no tensor, which the format forbids: the file is damaged"
    )]
    Hole {
        /// Where they begin in the data section.
        at: u64,
        /// How many.
        bytes: u64,
    },
    /// Numbers that are no floats where floats are needed.
    #[error("tensor {tensor:?} has type {dtype}: F32, F16 or BF16 is needed")]
    NotFloats {
        /// The tensor.
        tensor: String,
        /// Its type.
        dtype: Dtype,
    },
}
