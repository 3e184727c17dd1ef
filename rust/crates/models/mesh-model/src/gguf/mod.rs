//! GGUF files: keys and tensor list are read when a file is opened, each tensor when it is asked for.

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

use crate::file::{Data, ModelFile};
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
    file: ModelFile,
    others: Vec<ModelFile>,
    /// The file's bytes before its tensors; empty where the whole file is in memory.
    head: Vec<u8>,
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
    /// Its bytes, unread: `dims[1] * dims[2] * …` rows, each of `dims[0]` elements in whole blocks.
    pub data: Data<'a>,
}

impl Gguf {
    /// Opens and checks the file at `path`.
    ///
    /// # Errors
    /// If it cannot be opened, is no GGUF file of version 2 or 3, or is malformed in any way.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, GgufError> {
        let file = ModelFile::open(path.as_ref())?;
        let (head, index) = read_head(&file)?;
        Ok(Gguf {
            file,
            others: Vec::new(),
            head,
            index,
        })
    }

    /// Reads a file that is already in memory.
    ///
    /// # Errors
    /// As [`Gguf::open`].
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self, GgufError> {
        let index = Index::parse(&bytes, bytes.len() as u64)?;
        Ok(Gguf {
            file: ModelFile::from_bytes(bytes),
            others: Vec::new(),
            head: Vec::new(),
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
        others: Vec<ModelFile>,
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
        self.file.path()
    }

    /// Length in bytes of the file, or of all files that hold tensors.
    pub fn file_len(&self) -> u64 {
        match &*self.others {
            [] => self.file.len(),
            others => others.iter().map(ModelFile::len).sum(),
        }
    }

    /// The bytes with the keys.
    fn head(&self) -> &[u8] {
        self.file.in_memory().unwrap_or(&self.head)
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
        Value::read(&mut Cursor::at(self.head(), entry.at), entry.ty).ok()
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
    /// Weights read across a change are garbage. So a loader calls this after it has read all tensors, and model files are
    /// replaced by renaming a new file over the old one, never by writing into it.
    ///
    /// # Errors
    /// If it changed or cannot be looked at.
    pub fn check_unchanged(&self) -> Result<(), GgufError> {
        let mut files = std::iter::once(&self.file).chain(&self.others);
        files.try_for_each(ModelFile::check_unchanged)?;
        Ok(())
    }

    fn tensor_at<'a>(&'a self, entry: &'a parse::TensorEntry) -> Tensor<'a> {
        let file = match entry.file.checked_sub(1) {
            Some(other) => &self.others[other],
            None => &self.file,
        };
        Tensor {
            name: &entry.name,
            ty: entry.ty,
            dims: &entry.dims,
            data: file.data(entry.at as u64, entry.len),
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
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn to_f32(&self) -> Result<Vec<f32>, GgufError> {
        let data = self.data.read()?;
        let mut out = vec![0.0; self.elements() as usize];
        dequantize(self.ty, &data, &mut out)?;
        Ok(out)
    }
}

/// Reads as much of a file as its keys and its tensor list take.
fn read_head(file: &ModelFile) -> Result<(Vec<u8>, Index), GgufError> {
    let mut head = Vec::new();
    let mut wanted = FIRST_READ;
    loop {
        let len = wanted.min(MAX_HEAD).min(file.len());
        file.lengthen(&mut head, len as usize)?;
        match Index::parse(&head, file.len()) {
            Ok(index) => {
                let end = index.data_start;
                if file.len() > end_of_tensors(&index).saturating_add(MAX_SURPLUS) {
                    return Err(GgufError::Surplus {
                        bytes: file.len(),
                        end: end_of_tensors(&index),
                    });
                }
                head.truncate(end as usize);
                head.shrink_to_fit();
                return Ok((head, index));
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

fn end_of_tensors(index: &Index) -> u64 {
    let ends = index.tensors.iter();
    let ends = ends.map(|tensor| (tensor.at + tensor.len) as u64);
    ends.max().unwrap_or(index.data_start)
}

/// Size of a first read that holds the keys of most files.
const FIRST_READ: u64 = 1 << 20;
/// The largest known vocabularies take some 20 MB. It bounds the memory that a file's own counts can claim.
const MAX_HEAD: u64 = 256 << 20;
/// Padding is a few bytes. More is a file that was lengthened, which would take forever to read if it is a hole.
const MAX_SURPLUS: u64 = 64 << 20;
