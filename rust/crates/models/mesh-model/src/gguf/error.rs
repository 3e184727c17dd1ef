//! Errors of GGUF files.

use std::path::{Path, PathBuf};

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
         quantise it to another type, such as Q4_K, Q6_K, IQ4_XS or MXFP4"
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
    /// Parts of a split file are missing or do not belong together.
    #[error(transparent)]
    Split(#[from] SplitError),
    /// One part of a split file is broken.
    #[error("{}: {source}", path.display())]
    Part {
        path: PathBuf,
        #[source]
        source: Box<GgufError>,
    },
}

/// Errors of the parts of a split file together.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages name the fields")]
pub enum SplitError {
    /// A name with numbers that no part has.
    #[error(
        "the name of {} says part {number} of {count}: parts are numbered from 1 to their count, which is at most {limit}; \
        give the file its published name, or one without these numbers if it is a whole model", path.display()
    )]
    Numbers {
        path: PathBuf,
        number: u32,
        count: u32,
        limit: u32,
    },
    /// Not all parts are there.
    #[error(
        "{} of {count} parts {} missing: put {} beside the other parts, or fetch the model again",
        numbers.len(),
        if numbers.len() == 1 { "is" } else { "are" },
        paths(.path, numbers)
    )]
    Missing {
        /// The first file that is missing.
        path: PathBuf,
        /// Numbers of all parts that are missing.
        numbers: Vec<u32>,
        count: u32,
    },
    /// A part whose name does not say so, so that the others cannot be found.
    #[error(
        "{} is part {number} of {count} of a split model, but its name does not end in -{number:05}-of-{count:05}.gguf: give all \
        parts their published names and put them into one folder", path.display()
    )]
    Name {
        path: PathBuf,
        number: u64,
        count: u64,
    },
    /// A copy of another part, or one under another part's name.
    #[error(
        "{} contains part {found}, but its name is that of part {wanted}: it is a copy of part {found} or was renamed; put part \
        {wanted} there, or fetch the model again", path.display()
    )]
    Duplicate {
        path: PathBuf,
        /// Number of the part by its keys.
        found: u64,
        /// Number of the part by its name.
        wanted: u32,
    },
    /// A file that is no part of this model.
    #[error("{} does not belong to the other parts: {reason}", path.display())]
    Foreign { path: PathBuf, reason: String },
    /// Two parts hold one tensor.
    #[error(
        "tensor {tensor:?} is both in {} and in {}: they are parts of different versions; fetch the model again",
        first.display(), second.display()
    )]
    Tensor {
        tensor: String,
        first: PathBuf,
        second: PathBuf,
    },
    /// The parts hold more or fewer tensors than the first one says.
    #[error(
        "the {count} parts hold {found} tensors, but split.tensors.count of {} is {wanted}: a part is from another version; fetch \
        the model again", path.display()
    )]
    Tensors {
        /// The first part.
        path: PathBuf,
        count: usize,
        found: u64,
        wanted: u64,
    },
}

/// The missing file, and the numbers of the others.
fn paths(path: &Path, numbers: &[u32]) -> String {
    let others: Vec<String> = numbers.iter().skip(1).take(8).map(u32::to_string).collect();
    let path = path.display();
    match (&others[..], numbers.len().saturating_sub(9)) {
        ([], _) => path.to_string(),
        ([other], _) => format!("{path} (and part {other})"),
        (others, 0) => format!("{path} (and parts {})", others.join(", ")),
        (others, more) => format!("{path} (and parts {} and {more} more)", others.join(", ")),
    }
}
