//! The tensors of a model: their types and shapes, and where their bytes lie.

use std::collections::HashMap;

use mesh_quant::GgmlType;

use super::dequant::dequantize;
use super::error::GgufError;
use crate::data::Data;
use crate::file::ModelFile;
use crate::gather::Gather;

/// A tensor and its bytes.
#[derive(Debug, Clone, Copy)]
pub struct Tensor<'a> {
    /// Name of the tensor in GGUF files.
    pub name: &'a str,
    /// Type of its elements.
    pub ty: GgmlType,
    /// Dimensions in GGUF order: `dims[0]` is the contiguous one. A weight matrix is `[inputs, outputs]`.
    pub dims: &'a [u64],
    /// Bytes, not read yet: `dims[1] * dims[2] * …` rows, each of `dims[0]` elements in whole blocks.
    pub data: Data<'a>,
}

/// All tensors of a model, in one file or in several.
///
/// A tensor's bytes stay in the file until they are asked for; see [`Tensors::check_unchanged`].
#[derive(Debug)]
pub struct Tensors {
    files: Vec<ModelFile>,
    /// Tensors in the order of the files.
    entries: Vec<TensorEntry>,
    by_name: HashMap<Box<str>, usize>,
}

/// Name, type, shape and position of a tensor.
#[derive(Debug)]
pub(crate) struct TensorEntry {
    pub(crate) name: Box<str>,
    pub(crate) ty: GgmlType,
    /// The contiguous one first.
    pub(crate) dims: Vec<u64>,
    /// Position in the list of files.
    pub(crate) file: usize,
    /// Position in the file.
    pub(crate) at: usize,
    pub(crate) len: usize,
    /// Where the bytes lie if they are not one range of the file.
    pub(crate) gather: Option<Gather>,
}

impl Tensors {
    /// Tensors in `files`. Each must have been checked to lie within its file, with as many bytes as its type
    /// and dimensions ask for.
    ///
    /// # Errors
    /// If two tensors have one name.
    pub(crate) fn new(files: Vec<ModelFile>, entries: Vec<TensorEntry>) -> Result<Self, GgufError> {
        let mut by_name = HashMap::with_capacity(entries.len());
        for (position, entry) in entries.iter().enumerate() {
            if by_name.insert(entry.name.clone(), position).is_some() {
                return Err(GgufError::Duplicate {
                    kind: "tensor",
                    name: entry.name.to_string(),
                });
            }
        }
        Ok(Tensors {
            files,
            entries,
            by_name,
        })
    }

    /// All tensors, in the order of the files.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Tensor<'_>> {
        self.entries.iter().map(|entry| self.view(entry))
    }

    /// The tensor with this name.
    pub fn get(&self, name: &str) -> Option<Tensor<'_>> {
        Some(self.view(&self.entries[*self.by_name.get(name)?]))
    }

    /// Length in bytes of all files on disk that hold tensors.
    pub fn file_len(&self) -> u64 {
        let on_disk = self.files.iter().filter(|file| file.in_memory().is_none());
        on_disk.map(ModelFile::len).sum()
    }

    /// Fails if a file is no longer the one that was opened: another length or another time of change.
    ///
    /// Weights read across a change are garbage. So a loader calls this after it has read all tensors, and
    /// model files are replaced by renaming a new file over the old one, never by writing into it.
    ///
    /// # Errors
    /// If one changed or cannot be looked at.
    pub fn check_unchanged(&self) -> Result<(), GgufError> {
        Ok(self.files.iter().try_for_each(ModelFile::check_unchanged)?)
    }

    /// The whole first file, if it is in memory.
    pub(super) fn in_memory(&self) -> Option<&[u8]> {
        self.files.first()?.in_memory()
    }

    fn view<'a>(&'a self, entry: &'a TensorEntry) -> Tensor<'a> {
        Tensor {
            name: &entry.name,
            ty: entry.ty,
            dims: &entry.dims,
            data: match &entry.gather {
                None => self.files[entry.file].data(entry.at as u64, entry.len),
                Some(gather) => Data::gathered(gather, &self.files, entry.len),
            },
        }
    }
}

impl Tensor<'_> {
    /// Number of elements: the product of all dimensions.
    pub fn elements(&self) -> u64 {
        // Checked not to overflow when the file was read.
        self.dims.iter().product()
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
