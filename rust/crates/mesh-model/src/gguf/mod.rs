//! GGUF files, read in place through a memory map.

mod dequant;
mod error;
mod parse;
mod types;
mod value;
pub mod writer;

use std::path::Path;

pub use dequant::dequantize;
pub use error::GgufError;
pub use types::GgmlType;
pub use value::{Array, Value, ValueType};
pub use writer::Writer;

use crate::map::FileMap;
use parse::{Cursor, Index};

/// An open GGUF file: its metadata and its tensors.
///
/// A model in Hugging Face's form is one too, see [`crate::hf`]: its keys are made from the folder's JSON files, its tensors lie
/// in other files, under the names that they have in GGUF files.
///
/// Cheap to open: the header, the keys and the tensor list are read, the tensors' data stays in the file until touched.
/// See [`Gguf::check_unchanged`] for what happens if somebody writes to the file meanwhile.
#[derive(Debug)]
pub struct Gguf {
    /// The file with the keys, and those that hold tensors of a model in Hugging Face's form.
    map: FileMap,
    others: Vec<FileMap>,
    index: Index,
}

/// A tensor in another file.
#[derive(Debug)]
pub(crate) struct Elsewhere {
    pub(crate) name: String,
    pub(crate) ty: GgmlType,
    /// The contiguous one first.
    pub(crate) dims: Vec<u64>,
    /// Which of the other files.
    pub(crate) file: usize,
    /// Where its bytes lie in that file, which was checked to have them.
    pub(crate) at: usize,
    pub(crate) len: usize,
}

/// A tensor and its bytes.
#[derive(Debug, Clone, Copy)]
pub struct Tensor<'a> {
    /// Its name in the file.
    pub name: &'a str,
    /// Type of its elements.
    pub ty: GgmlType,
    /// Its dimensions in GGUF order: `dims[0]` is the contiguous one. A weight matrix is `[inputs, outputs]`.
    pub dims: &'a [u64],
    /// Its bytes: `dims[1] * dims[2] * …` rows, each of `dims[0]` elements in whole blocks.
    pub data: &'a [u8],
}

impl Gguf {
    /// Opens and checks the file at `path`.
    ///
    /// # Errors
    /// If it cannot be opened, is no GGUF file of version 2 or 3, or is malformed in any way.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, GgufError> {
        let map = FileMap::open(path.as_ref())?;
        let index = Index::parse(map.bytes())?;
        Ok(Gguf {
            map,
            others: Vec::new(),
            index,
        })
    }

    /// Reads a file that is already in memory.
    ///
    /// # Errors
    /// As [`Gguf::open`].
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self, GgufError> {
        let index = Index::parse(&bytes)?;
        Ok(Gguf {
            map: FileMap::from_bytes(bytes),
            others: Vec::new(),
            index,
        })
    }

    /// A model whose keys are in `head`, a GGUF file in memory, and whose tensors lie in `others` besides. All of them were
    /// checked to lie within their file, which has as many bytes for each as its type and dimensions ask for.
    ///
    /// # Errors
    /// As [`Gguf::open`], and if two tensors have one name.
    pub(crate) fn with_tensors(
        head: Vec<u8>,
        others: Vec<FileMap>,
        tensors: Vec<Elsewhere>,
    ) -> Result<Self, GgufError> {
        let mut gguf = Gguf {
            others,
            ..Self::from_bytes(head)?
        };
        let index = &mut gguf.index;
        for tensor in tensors {
            let position = index.tensors.len();
            let name: Box<str> = tensor.name.into();
            if index
                .tensor_by_name
                .insert(name.clone(), position)
                .is_some()
            {
                return Err(GgufError::Duplicate {
                    kind: "tensor",
                    name: name.into(),
                });
            }
            index.tensors.push(parse::TensorEntry {
                name,
                ty: tensor.ty,
                dims: tensor.dims,
                file: 1 + tensor.file,
                at: tensor.at,
                len: tensor.len,
            });
        }
        Ok(gguf)
    }

    /// Whether the tensors lie in other files, in the order of rows that Hugging Face's models have: the elements of a head that
    /// turn together are half a head apart, where llama's GGUF files have them side by side.
    pub fn is_hugging_face(&self) -> bool {
        !self.others.is_empty()
    }

    /// Where the file lies; `None` for one read from memory.
    pub fn path(&self) -> Option<&Path> {
        self.map.path()
    }

    /// Length in bytes of the file, or of all files that hold tensors.
    pub fn file_len(&self) -> u64 {
        match &*self.others {
            [] => self.map.len(),
            others => others.iter().map(FileMap::len).sum(),
        }
    }

    /// The whole file.
    pub fn bytes(&self) -> &[u8] {
        self.map.bytes()
    }

    /// Version of the format, 2 or 3.
    pub fn version(&self) -> u32 {
        self.index.version
    }

    /// Alignment of the tensors' data in bytes.
    pub fn alignment(&self) -> u64 {
        self.index.alignment
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
        Value::read(&mut Cursor::at(self.map.bytes(), entry.at), entry.ty).ok()
    }

    /// A non-negative integer of whatever width; `None` if the key is absent.
    ///
    /// # Errors
    /// If the value is of another type.
    pub fn unsigned(&self, key: &str) -> Result<Option<u64>, GgufError> {
        self.typed(key, "a non-negative integer", |value| value.as_unsigned())
    }

    /// A float of either width, or an integer; `None` if the key is absent.
    ///
    /// # Errors
    /// If the value is of another type.
    pub fn float(&self, key: &str) -> Result<Option<f64>, GgufError> {
        self.typed(key, "a number", |value| match value {
            Value::Float(v) => Some(v),
            Value::Unsigned(v) => Some(v as f64),
            Value::Signed(v) => Some(v as f64),
            _ => None,
        })
    }

    /// A truth value; `None` if the key is absent.
    ///
    /// # Errors
    /// If the value is of another type.
    pub fn bool(&self, key: &str) -> Result<Option<bool>, GgufError> {
        self.typed(key, "a bool", |value| match value {
            Value::Bool(v) => Some(v),
            _ => None,
        })
    }

    /// Text; `None` if the key is absent.
    ///
    /// # Errors
    /// If the value is of another type or not UTF-8.
    pub fn string(&self, key: &str) -> Result<Option<&str>, GgufError> {
        let bytes = self.typed(key, "a string", |value| match value {
            Value::String(v) => Some(v),
            _ => None,
        })?;
        bytes
            .map(std::str::from_utf8)
            .transpose()
            .map_err(|_| GgufError::Utf8 {
                what: format!("metadata {key:?}"),
            })
    }

    /// An array; `None` if the key is absent.
    ///
    /// # Errors
    /// If the value is of another type.
    pub fn array(&self, key: &str) -> Result<Option<Array<'_>>, GgufError> {
        self.typed(key, "an array", |value| match value {
            Value::Array(v) => Some(v),
            _ => None,
        })
    }

    /// All tensors, in the order of the file.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = Tensor<'_>> {
        self.index.tensors.iter().map(|entry| self.tensor_at(entry))
    }

    /// The tensor with this name.
    pub fn tensor(&self, name: &str) -> Option<Tensor<'_>> {
        let i = *self.index.tensor_by_name.get(name)?;
        Some(self.tensor_at(&self.index.tensors[i]))
    }

    /// As [`Gguf::tensor`], for one that must be there.
    ///
    /// # Errors
    /// If it is not.
    pub fn require_tensor(&self, name: &str) -> Result<Tensor<'_>, GgufError> {
        self.tensor(name).ok_or_else(|| GgufError::MissingTensor {
            tensor: name.into(),
        })
    }

    /// Fails if the file is no longer the one that was opened: another length or another time of change.
    ///
    /// A memory map shows what is in the file *now*. Nothing here breaks memory safety when the contents change, every
    /// read is checked again; but weights read across a change are garbage, and a file cut short takes the process down
    /// with SIGBUS. So a loader calls this after it has read all tensors, and model files are replaced by renaming a new
    /// file over the old one, never by writing into it.
    ///
    /// # Errors
    /// If it changed or cannot be looked at.
    pub fn check_unchanged(&self) -> Result<(), GgufError> {
        self.maps().try_for_each(FileMap::check_unchanged)?;
        Ok(())
    }

    /// Tells the system that the mapped pages are no longer needed in memory; they come back when touched.
    /// Once weights have been copied out this keeps them from counting twice in the process's resident memory.
    pub fn release_pages(&self) {
        self.maps().for_each(FileMap::release_pages);
    }

    fn maps(&self) -> impl Iterator<Item = &FileMap> {
        std::iter::once(&self.map).chain(&self.others)
    }

    fn tensor_at<'a>(&'a self, entry: &'a parse::TensorEntry) -> Tensor<'a> {
        let map = match entry.file.checked_sub(1) {
            Some(other) => &self.others[other],
            None => &self.map,
        };
        Tensor {
            name: &entry.name,
            ty: entry.ty,
            dims: &entry.dims,
            data: &map.bytes()[entry.at..entry.at + entry.len],
        }
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        wanted: &'static str,
        convert: impl FnOnce(Value<'a>) -> Option<T>,
    ) -> Result<Option<T>, GgufError> {
        let Some(value) = self.metadata(key) else {
            return Ok(None);
        };
        match convert(value) {
            Some(converted) => Ok(Some(converted)),
            None => Err(GgufError::WrongType {
                key: key.into(),
                wanted,
                found: value.describe(),
            }),
        }
    }
}

impl Tensor<'_> {
    /// Number of elements.
    pub fn elements(&self) -> u64 {
        // Checked not to overflow when the file was read.
        self.dims.iter().product()
    }

    /// Number of rows: all dimensions but the contiguous one.
    pub fn rows(&self) -> u64 {
        self.dims[1..].iter().product()
    }

    /// All elements as f32.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.elements() as usize];
        dequantize(self.ty, self.data, &mut out)
            .expect("the data was checked to hold the elements");
        out
    }
}
