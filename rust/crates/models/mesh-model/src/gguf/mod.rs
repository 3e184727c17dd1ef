//! GGUF files: keys and tensor list are read when a file is opened, each tensor when it is asked for.

mod cursor;
mod dequant;
mod error;
mod experts;
mod parse;
mod tensors;
mod types;
mod value;
pub mod writer;

use std::path::Path;

pub use dequant::dequantize;
pub use error::GgufError;
pub use experts::{expert_name, is_of_experts, stack_name};
pub(crate) use tensors::TensorEntry;
pub use tensors::{Tensor, Tensors};
pub use types::GgmlType;
pub use value::{Array, Value, ValueType};
pub use writer::Writer;

use crate::file::ModelFile;
use cursor::Cursor;
use parse::GgufIndex;

/// An open GGUF file: its metadata and its tensors.
///
/// Cheap to open: the header, the keys and the tensor list are read, the tensors' data stays in the file
/// until touched. See [`Tensors::check_unchanged`] for the effect of writes to the file meanwhile.
#[derive(Debug)]
pub struct Gguf {
    /// The file's bytes before its tensors; empty where the whole file is in memory.
    head: Vec<u8>,
    index: GgufIndex,
    tensors: Tensors,
}

impl Gguf {
    /// Opens and checks the file at `path`.
    ///
    /// # Errors
    /// If it cannot be opened, is not a GGUF file of version 2 or 3, or is malformed in any way.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, GgufError> {
        let file = ModelFile::open(path.as_ref())?;
        let (head, index, entries) = read_head(&file)?;
        Self::new(file, head, index, entries)
    }

    /// Reads a file that is already in memory.
    ///
    /// # Errors
    /// As [`Gguf::open`].
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self, GgufError> {
        let (index, entries) = GgufIndex::parse(&bytes, bytes.len() as u64)?;
        Self::new(ModelFile::from_bytes(bytes), Vec::new(), index, entries)
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
        let entry = &self.index.keys[*self.index.key_by_name.get(key)?];
        Value::read(&mut Cursor::at(self.head(), entry.at), entry.ty).ok()
    }

    /// All tensors of the file.
    pub fn tensors(&self) -> &Tensors {
        &self.tensors
    }

    /// The tensors alone, for a model whose keys were read.
    pub(crate) fn into_tensors(self) -> Tensors {
        self.tensors
    }
}

/// Reads as much of a file as its keys and its tensor list take.
fn read_head(file: &ModelFile) -> Result<(Vec<u8>, GgufIndex, Vec<TensorEntry>), GgufError> {
    let mut head = Vec::new();
    let mut wanted = FIRST_READ;
    loop {
        let len = wanted.min(MAX_HEAD).min(file.len());
        file.lengthen(&mut head, len as usize)?;
        match GgufIndex::parse(&head, file.len()) {
            Ok((index, entries)) => {
                let ends = entries.iter().map(|tensor| (tensor.at + tensor.len) as u64);
                let end = ends.max().unwrap_or(index.data_start);
                if file.len() > end.saturating_add(MAX_SURPLUS) {
                    return Err(GgufError::Surplus {
                        bytes: file.len(),
                        end,
                    });
                }
                head.truncate(index.data_start as usize);
                head.shrink_to_fit();
                return Ok((head, index, entries));
            }
            Err(GgufError::Truncated {
                what,
                at,
                needed,
                length,
            }) if length < file.len() => {
                let end = at.saturating_add(needed);
                if len == MAX_HEAD {
                    return Err(GgufError::Limit {
                        what: format!("the end of {what} in bytes"),
                        value: end,
                        limit: MAX_HEAD,
                    });
                }
                wanted = end.max(2 * len);
            }
            Err(error) => return Err(error),
        }
    }
}

/// Size of a first read that holds the keys of most files.
const FIRST_READ: u64 = 1 << 20;
/// The largest known vocabularies take some 20 MB. It bounds the memory that a file's own counts can claim.
const MAX_HEAD: u64 = 256 << 20;
/// Padding is a few bytes. More is a file that was lengthened, which would take forever to read if it is a
/// hole.
const MAX_SURPLUS: u64 = 64 << 20;
