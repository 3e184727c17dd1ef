//! Tensors that hold the matrices of all experts of a layer, as one tensor for each matrix.

use std::collections::BTreeMap;

use super::error::HfError;
use super::names::{FusedExperts, FusedForm};
use crate::config::MAX_EXPERTS;
use crate::gather::{Gather, Place};
use crate::gguf::{GgmlType, TensorEntry};
use crate::safetensors::{Dtype, TensorView};

/// Halves of MXFP4 weights whose other half has not come yet, by the name of their first matrix.
#[derive(Default)]
pub(super) struct FusedTensors {
    halves: BTreeMap<String, Half>,
}

/// The codes or the scales of MXFP4 weights.
struct Half {
    /// Name of the tensor in the folder.
    tensor: String,
    form: FusedForm,
    /// Experts, rows of each, blocks of a row.
    dims: [u64; 3],
    place: Place,
}

impl FusedTensors {
    /// Adds the entries of a tensor of the shard at index `file`.
    pub(super) fn add(
        &mut self,
        experts: FusedExperts,
        tensor: &TensorView<'_>,
        file: usize,
        entries: &mut Vec<TensorEntry>,
    ) -> Result<(), HfError> {
        let at = tensor.offset as usize;
        let place = Place { file, at };
        match experts.form {
            FusedForm::Rows => entries.extend(rows(tensor, place, &experts)?),
            FusedForm::Columns => entries.extend(columns(tensor, place, &experts)?),
            FusedForm::Biases => entries.extend(biases(tensor, place, &experts)?),
            FusedForm::Codes | FusedForm::Scales => {
                let half = Half::of(tensor, place, &experts)?;
                let key = experts.name(0, 0);
                match self.halves.remove(&key) {
                    None => {
                        self.halves.insert(key, half);
                    }
                    Some(other) => entries.extend(mxfp4(half, other, &experts)?),
                }
            }
        }
        Ok(())
    }

    /// Fails if a half is missing.
    pub(super) fn check_whole(&self) -> Result<(), HfError> {
        match self.halves.values().next() {
            None => Ok(()),
            Some(half) => Err(half.alone()),
        }
    }
}

/// The type of a tensor with elements, which must be floats.
pub(super) fn float_type(tensor: &TensorView<'_>) -> Result<GgmlType, HfError> {
    if tensor.shape.is_empty() || tensor.shape.contains(&0) {
        return Err(HfError::Empty {
            tensor: tensor.name.into(),
        });
    }
    match tensor.dtype {
        Dtype::F32 => Ok(GgmlType::F32),
        Dtype::F16 => Ok(GgmlType::F16),
        Dtype::BF16 => Ok(GgmlType::BF16),
        dtype => Err(HfError::TensorType {
            tensor: tensor.name.into(),
            dtype,
        }),
    }
}

/// The matrices of all experts in a tensor `[experts, matrices * outputs, inputs]`, or of the shared one in a
/// tensor without the first dimension: each is one range of it.
fn rows(
    tensor: &TensorView<'_>,
    place: Place,
    fused: &FusedExperts,
) -> Result<Vec<TensorEntry>, HfError> {
    let ty = float_type(tensor)?;
    let [experts, rows, inputs] = shape_of(tensor, fused, |&[_, rows, _]| rows)?;
    let matrices = fused.matrices();
    // Every matrix has the same number of whole elements.
    let len = tensor.data.len() / experts as usize / matrices;
    let entry = |index: usize| TensorEntry {
        name: fused.name(index / matrices, index % matrices).into(),
        ty,
        dims: vec![inputs, rows / matrices as u64],
        file: place.file,
        at: place.at + index * len,
        len,
        gather: None,
    };
    Ok((0..experts as usize * matrices).map(entry).collect())
}

/// Those in a tensor `[experts, inputs, outputs * matrices]`.
fn columns(
    tensor: &TensorView<'_>,
    place: Place,
    fused: &FusedExperts,
) -> Result<Vec<TensorEntry>, HfError> {
    let ty = float_type(tensor)?;
    let [experts, inputs, columns] = shape_of(tensor, fused, |&[_, _, columns]| columns)?;
    let (matrices, size) = (fused.matrices(), ty.type_size());
    let whole = tensor.data.len() / experts as usize;
    let entry = |index: usize| {
        let (expert, matrix) = (index / matrices, index % matrices);
        let at = place.at + expert * whole + matrix * size;
        TensorEntry {
            name: fused.name(expert, matrix).into(),
            ty,
            dims: vec![inputs, columns / matrices as u64],
            file: place.file,
            at,
            len: whole / matrices,
            gather: Some(Gather::Elements {
                first: Place { at, ..place },
                size,
                columns: inputs as usize,
                strides: [matrices, columns as usize],
            }),
        }
    };
    Ok((0..experts as usize * matrices).map(entry).collect())
}

/// The stacks of biases in a tensor `[experts, outputs * matrices]`.
fn biases(
    tensor: &TensorView<'_>,
    place: Place,
    fused: &FusedExperts,
) -> Result<Vec<TensorEntry>, HfError> {
    let ty = float_type(tensor)?;
    let [experts, columns] = shape_of(tensor, fused, |&[_, columns]| columns)?;
    let (matrices, size) = (fused.matrices(), ty.type_size());
    let outputs = columns / matrices as u64;
    let entry = |matrix: usize| {
        let at = place.at + matrix * size;
        TensorEntry {
            name: fused.bias_name(matrix).into(),
            ty,
            dims: vec![outputs, experts],
            file: place.file,
            at,
            len: tensor.data.len() / matrices,
            gather: Some(Gather::Elements {
                first: Place { at, ..place },
                size,
                columns: outputs as usize,
                strides: [columns as usize, matrices],
            }),
        }
    };
    Ok((0..matrices).map(entry).collect())
}

/// The tensor's shape, whose first dimension is a number of experts (1 where the tensor lacks it), and of
/// which `split` gives the dimension that the matrices share.
fn shape_of<const N: usize>(
    tensor: &TensorView<'_>,
    fused: &FusedExperts,
    split: impl Fn(&[u64; N]) -> u64,
) -> Result<[u64; N], HfError> {
    let experts: &[u64] = match fused.is_shared() {
        true => &[1],
        false => &[],
    };
    let shape = <[u64; N]>::try_from([experts, tensor.shape].concat()).ok();
    let whole = |shape: &[u64; N]| split(shape).is_multiple_of(fused.matrices() as u64);
    shape
        .filter(|shape| shape[0] <= MAX_EXPERTS && whole(shape))
        .ok_or_else(|| HfError::Experts {
            tensor: tensor.name.into(),
            shape: tensor.shape.into(),
        })
}

impl Half {
    fn of(tensor: &TensorView<'_>, place: Place, fused: &FusedExperts) -> Result<Self, HfError> {
        let dims = match (fused.form, tensor.shape) {
            (FusedForm::Codes, &[experts, rows, blocks, 16]) => Some([experts, rows, blocks]),
            (FusedForm::Scales, &[experts, rows, blocks]) => Some([experts, rows, blocks]),
            _ => None,
        };
        let fits = |&[experts, rows, blocks]: &[u64; 3]| {
            let rows_fit = rows > 0 && rows.is_multiple_of(fused.matrices() as u64);
            (1..=MAX_EXPERTS).contains(&experts) && rows_fit && blocks > 0
        };
        let dims = dims.filter(|dims| tensor.dtype == Dtype::U8 && fits(dims));
        Ok(Half {
            tensor: tensor.name.into(),
            form: fused.form,
            dims: dims.ok_or_else(|| HfError::Mxfp4 {
                tensor: tensor.name.into(),
                dtype: tensor.dtype,
                shape: tensor.shape.into(),
            })?,
            place,
        })
    }

    /// The error that the other half is missing.
    fn alone(&self) -> HfError {
        let (ending, other) = match self.form {
            FusedForm::Scales => ("_scales", "_blocks"),
            _ => ("_blocks", "_scales"),
        };
        let name = self.tensor.strip_suffix(ending);
        HfError::HalfOfMxfp4 {
            tensor: self.tensor.clone(),
            missing: format!("{}{other}", name.unwrap_or(&self.tensor)),
        }
    }
}

/// The matrices of both halves.
fn mxfp4(one: Half, other: Half, fused: &FusedExperts) -> Result<Vec<TensorEntry>, HfError> {
    let (codes, scales) = match (one.form, other.form) {
        (FusedForm::Codes, FusedForm::Scales) => (one, other),
        (FusedForm::Scales, FusedForm::Codes) => (other, one),
        // Files that hold a tensor twice.
        _ => return Err(one.alone()),
    };
    let [experts, rows, blocks] = codes.dims;
    if scales.dims != codes.dims {
        return Err(HfError::Mxfp4 {
            tensor: scales.tensor,
            dtype: Dtype::U8,
            shape: scales.dims.into(),
        });
    }
    let (matrices, ty) = (fused.matrices(), GgmlType::MXFP4);
    let (rows, blocks) = (rows as usize, blocks as usize);
    let entry = |index: usize| {
        let (expert, matrix) = (index / matrices, index % matrices);
        // The block before it, of all experts.
        let block = (expert * rows + matrix) * blocks;
        let codes = Place {
            at: codes.place.at + 16 * block,
            ..codes.place
        };
        TensorEntry {
            name: fused.name(expert, matrix).into(),
            ty,
            dims: vec![32 * blocks as u64, (rows / matrices) as u64],
            file: codes.file,
            at: codes.at,
            len: rows / matrices * blocks * ty.type_size(),
            gather: Some(Gather::Mxfp4 {
                codes,
                scales: Place {
                    at: scales.place.at + block,
                    ..scales.place
                },
                blocks,
                stride: matrices,
            }),
        }
    };
    Ok((0..experts as usize * matrices).map(entry).collect())
}
