//! Safetensors files: the header is read when a file is opened, each tensor when it is asked for.
//!
//! Format: <https://github.com/huggingface/safetensors#format>. A file is a length of 8 bytes, a header of
//! JSON with that length, and the tensors' bytes. Nothing in it is trusted: header, counts, names, shapes and
//! ranges are checked before anything is used, and a tensor's bytes are read by value, so that no alignment
//! is needed.
//!
//! A file holds tensors and nothing else. The folder around it says what they are: [`crate::hf`].

mod dtype;
mod error;
mod header;
mod write;

use std::collections::HashMap;
use std::path::Path;

pub use dtype::Dtype;
pub use error::SafetensorsError;
pub use write::{Planned, write};

use crate::data::Data;
use crate::file::ModelFile;
use header::HeaderEntry;

/// An open safetensors file.
///
/// Cheap to open: the header is read, the tensors' data stays in the file until touched.
/// [`crate::Tensors::check_unchanged`] describes the effect of writes to the file meanwhile; it holds here
/// too.
#[derive(Debug)]
pub struct Safetensors {
    file: ModelFile,
    entries: Vec<HeaderEntry>,
    by_name: HashMap<Box<str>, usize>,
    metadata: Vec<(String, String)>,
    /// Position of the data section in the file.
    data_start: usize,
}

/// A tensor and its bytes.
#[derive(Debug, Clone, Copy)]
pub struct TensorView<'a> {
    /// Name of the tensor in the file.
    pub name: &'a str,
    /// Type of its elements.
    pub dtype: Dtype,
    /// Dimensions in the order of the file: the last one is contiguous. A weight matrix is `[outputs,
    /// inputs]`.
    pub shape: &'a [u64],
    /// Elements, not read yet: little-endian, without padding.
    pub data: Data<'a>,
    /// Position of its first byte in the file.
    pub offset: u64,
}

impl Safetensors {
    /// Opens and checks the file at `path`.
    ///
    /// # Errors
    /// If it cannot be opened, or is malformed in any way.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, SafetensorsError> {
        Self::read(ModelFile::open(path.as_ref())?)
    }

    /// Reads a file that is already in memory.
    ///
    /// # Errors
    /// As [`Safetensors::open`].
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self, SafetensorsError> {
        Self::read(ModelFile::from_bytes(bytes))
    }

    fn read(file: ModelFile) -> Result<Self, SafetensorsError> {
        let header::Header {
            entries,
            metadata,
            data_start,
        } = header::parse(&header::read(&file)?, file.len())?;
        let by_name = entries
            .iter()
            .enumerate()
            .map(|(i, entry)| (entry.name.clone(), i))
            .collect();
        Ok(Safetensors {
            file,
            entries,
            by_name,
            metadata,
            data_start,
        })
    }

    /// Path of the file; `None` for one read from memory.
    pub fn path(&self) -> Option<&Path> {
        self.file.path()
    }

    /// Length of the file in bytes.
    pub fn file_len(&self) -> u64 {
        self.file.len()
    }

    /// All tensors, in the order of their data.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = TensorView<'_>> {
        self.entries.iter().map(|entry| self.view(entry))
    }

    /// The tensor with this name.
    pub fn tensor(&self, name: &str) -> Option<TensorView<'_>> {
        Some(self.view(&self.entries[*self.by_name.get(name)?]))
    }

    /// The file's `__metadata__`: pairs of text, such as `("format", "pt")`.
    pub fn metadata(&self) -> impl Iterator<Item = (&str, &str)> {
        self.metadata.iter().map(|(key, value)| (&**key, &**value))
    }

    /// Fails if the file is no longer the one that was opened: another length or another time of change.
    ///
    /// # Errors
    /// If it changed or cannot be looked at.
    pub fn check_unchanged(&self) -> Result<(), SafetensorsError> {
        Ok(self.file.check_unchanged()?)
    }

    /// The file behind it, for a model that takes its tensors from several files.
    pub(crate) fn into_file(self) -> ModelFile {
        self.file
    }

    fn view<'a>(&'a self, entry: &'a HeaderEntry) -> TensorView<'a> {
        // Checked when the file was read.
        let at = self.data_start + entry.at;
        TensorView {
            name: &entry.name,
            dtype: entry.dtype,
            shape: &entry.shape,
            data: self.file.data(at as u64, entry.len),
            offset: at as u64,
        }
    }
}

impl TensorView<'_> {
    /// Number of elements: the product of the shape.
    pub fn elements(&self) -> u64 {
        // Checked not to overflow when the file was read.
        self.shape.iter().product()
    }

    /// All elements as f32.
    ///
    /// # Errors
    /// If its type is not one of F64, F32, F16 and BF16, or the file cannot be read.
    pub fn to_f32(&self) -> Result<Vec<f32>, SafetensorsError> {
        let data = &*self.data.read()?;
        // No more than the file's own bytes.
        let mut out = Vec::with_capacity(self.elements() as usize);
        match self.dtype {
            Dtype::F64 => out.extend(each::<8>(data).map(|b| f64::from_le_bytes(*b) as f32)),
            Dtype::F32 => out.extend(each::<4>(data).map(|b| f32::from_le_bytes(*b))),
            Dtype::F16 => {
                out.extend(each::<2>(data).map(|b| half::f16::from_le_bytes(*b).to_f32()));
            }
            Dtype::BF16 => {
                out.extend(each::<2>(data).map(|b| half::bf16::from_le_bytes(*b).to_f32()));
            }
            dtype => {
                return Err(SafetensorsError::NotFloats {
                    tensor: self.name.into(),
                    dtype,
                });
            }
        }
        Ok(out)
    }
}

fn each<const N: usize>(data: &[u8]) -> impl Iterator<Item = &[u8; N]> {
    data.as_chunks::<N>().0.iter()
}

#[cfg(test)]
mod tests;
