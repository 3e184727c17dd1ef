//! GGUF files: keys and tensor list are read when a file is opened, each tensor when it is asked for.
//!
//! A model may lie in several files, the parts that llama.cpp's `gguf-split` makes: see [`split`].

mod assemble;
mod cursor;
mod dequant;
mod error;
mod experts;
mod head;
mod parse;
pub mod split;
mod tensors;
mod value;
pub mod writer;

use std::path::Path;

pub use dequant::dequantize;
pub use error::{GgufError, SplitError};
pub use experts::{expert_name, is_of_experts, stack_name};
pub use mesh_quant::GgmlType;
pub(crate) use tensors::TensorEntry;
pub use tensors::{Tensor, Tensors};
pub use value::{Array, Value, ValueType};
pub use writer::Writer;

use crate::file::ModelFile;
use head::Head;
use parse::GgufIndex;

/// An open GGUF file, or all parts of one: its metadata and its tensors.
///
/// Cheap to open: the header, the keys and the tensor list are read, the tensors' data stays in the file
/// until touched. See [`Tensors::check_unchanged`] for the effect of writes to the file meanwhile.
#[derive(Debug)]
pub struct Gguf {
    /// The first file's bytes before its tensors; empty where the whole file is in memory.
    head: Vec<u8>,
    index: GgufIndex,
    tensors: Tensors,
}

impl Gguf {
    /// Opens and checks the model at `path`: a file, or all parts of a split file if it is one of them.
    ///
    /// # Errors
    /// If a file cannot be opened, is not a GGUF file of version 2 or 3, or is malformed in any way; if parts
    /// are missing or do not belong together.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, GgufError> {
        let path = path.as_ref();
        let Some(parts) = split::checked_parts(path)? else {
            let gguf = Self::open_part(path)?;
            assemble::check_alone(path, |key| gguf.metadata(key))?;
            return Ok(gguf);
        };
        let parts = parts.into_iter().map(|path| {
            let file = ModelFile::open(&path)?;
            Ok((path, file))
        });
        Self::assembled(assemble::assemble(parts)?)
    }

    /// Opens and checks the file at `path` by itself, which may be one part of several.
    ///
    /// # Errors
    /// If it cannot be opened, is not a GGUF file of version 2 or 3, or is malformed in any way.
    pub fn open_part(path: impl AsRef<Path>) -> Result<Self, GgufError> {
        let file = ModelFile::open(path.as_ref())?;
        let head = Head::read(&file)?;
        Self::new(file, head.bytes, head.index, head.entries)
    }

    /// Reads a file that is already in memory, by itself.
    ///
    /// # Errors
    /// As [`Gguf::open_part`].
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self, GgufError> {
        let (index, entries) = GgufIndex::parse(&bytes, bytes.len() as u64)?;
        Self::new(ModelFile::from_bytes(bytes), Vec::new(), index, entries)
    }

    /// Reads the parts of a split file that are already in memory, in order.
    ///
    /// # Errors
    /// As [`Gguf::open`].
    pub fn from_parts(parts: Vec<Vec<u8>>) -> Result<Self, GgufError> {
        let parts = parts.into_iter().enumerate().map(|(index, bytes)| {
            let name = format!("part {}", index + 1);
            Ok((name.into(), ModelFile::from_bytes(bytes)))
        });
        Self::assembled(assemble::assemble(parts)?)
    }

    fn new(
        file: ModelFile,
        head: Vec<u8>,
        index: GgufIndex,
        entries: Vec<TensorEntry>,
    ) -> Result<Self, GgufError> {
        Ok(Gguf {
            head,
            index,
            tensors: Tensors::new(vec![file], entries)?,
        })
    }

    /// The keys are those of the first part.
    fn assembled(assembled: assemble::Assembled) -> Result<Self, GgufError> {
        Ok(Gguf {
            head: assembled.head,
            index: assembled.index,
            tensors: Tensors::new(assembled.files, assembled.entries)?,
        })
    }

    /// The bytes with the keys.
    fn head(&self) -> &[u8] {
        self.tensors.in_memory().unwrap_or(&self.head)
    }

    /// All metadata keys with their values, in the order of the file.
    pub fn metadata_iter(&self) -> impl Iterator<Item = (&str, Value<'_>)> {
        self.index
            .keys
            .iter()
            .filter_map(|key| Some((&*key.name, self.metadata(&key.name)?)))
    }

    /// The value of a metadata key.
    pub fn metadata(&self, key: &str) -> Option<Value<'_>> {
        self.index.value(self.head(), key)
    }

    /// All tensors, of all parts.
    pub fn tensors(&self) -> &Tensors {
        &self.tensors
    }

    /// The tensors alone, for a model whose keys were read.
    pub(crate) fn into_tensors(self) -> Tensors {
        self.tensors
    }
}
