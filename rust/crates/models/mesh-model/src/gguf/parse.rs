//! Reading the header, the metadata and the tensor list, each field checked against the bytes that are there.
//!
//! Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>. All numbers are little-endian.

use std::collections::HashMap;

use mesh_quant::{GgmlType, foreign_type_name};

use super::cursor::Cursor;
use super::error::GgufError;
use super::tensors::TensorEntry;
use super::value::{Value, ValueType};

/// Alignment of the data section where the file names none.
pub(super) const DEFAULT_ALIGNMENT: u64 = 32;

const MAGIC: [u8; 4] = *b"GGUF";
const MAX_ALIGNMENT: u64 = 1 << 16;
const MAX_DIMS: u32 = 4;

// The format allows more; the largest known models have about fifty keys and two thousand tensors. The limits
// keep the index of a hostile file to a few megabytes.
const MAX_KEYS: u64 = 1 << 14;
const MAX_KEY_LEN: u64 = 1 << 12;
pub(super) const MAX_TENSORS: u64 = 1 << 16;
const MAX_TENSOR_NAME: u64 = 64;

/// Index in a list, by name.
type Positions = HashMap<Box<str>, usize>;

/// Positions of a file's metadata values and data section.
#[derive(Debug)]
pub(super) struct GgufIndex {
    /// Keys in the order of the file.
    pub(super) keys: Vec<KeyEntry>,
    pub(super) key_by_name: Positions,
    /// Byte position behind the keys and the tensor list.
    pub(super) data_start: u64,
}

#[derive(Debug)]
pub(super) struct KeyEntry {
    pub(super) name: Box<str>,
    pub(super) ty: ValueType,
    /// Byte position of the value.
    pub(super) at: usize,
}

impl GgufIndex {
    /// Reads everything but the tensors' data: positions of keys and the list of tensors. `bytes` are the
    /// beginning of a file of `length` bytes. If there are too few, the error is [`GgufError::Truncated`]
    /// with their number as the length.
    pub(super) fn parse(bytes: &[u8], length: u64) -> Result<(Self, Vec<TensorEntry>), GgufError> {
        let mut cursor = Cursor::of_file(bytes, length);
        let (tensors, keys) = parse_header(&mut cursor)?;
        let (keys, key_by_name) = parse_keys(&mut cursor, keys)?;
        let alignment = find_alignment(bytes, &keys, &key_by_name)?;
        let mut tensors = parse_tensor_list(&mut cursor, tensors)?;
        cursor.naming("the tensor data");
        // A file of metadata alone may end without padding.
        let data_start = match tensors.is_empty() {
            true => cursor.position(),
            false => cursor.align(alignment)?,
        };
        place_tensors(&mut tensors, data_start, alignment, length)?;
        let index = GgufIndex {
            keys,
            key_by_name,
            data_start,
        };
        Ok((index, tensors))
    }

    /// The value of a metadata key. `bytes` are those that were parsed.
    pub(super) fn value<'a>(&self, bytes: &'a [u8], key: &str) -> Option<Value<'a>> {
        let entry = &self.keys[*self.key_by_name.get(key)?];
        Value::read(&mut Cursor::at(bytes, entry.at), entry.ty).ok()
    }
}

/// The numbers of tensors and of metadata keys.
fn parse_header(cursor: &mut Cursor<'_>) -> Result<(u64, u64), GgufError> {
    cursor.naming("the header");
    let magic = cursor.bytes::<4>()?;
    if magic != MAGIC {
        return Err(GgufError::NotGguf {
            found: magic.to_vec(),
        });
    }
    let version = cursor.u32()?;
    if !(2..=3).contains(&version) {
        return Err(GgufError::Version { version });
    }
    let (tensors, keys) = (cursor.u64()?, cursor.u64()?);
    check_limit("the number of tensors", tensors, MAX_TENSORS)?;
    check_limit("the number of metadata keys", keys, MAX_KEYS)?;
    Ok((tensors, keys))
}

fn parse_keys(
    cursor: &mut Cursor<'_>,
    count: u64,
) -> Result<(Vec<KeyEntry>, Positions), GgufError> {
    let mut keys = Vec::new();
    let mut by_name = HashMap::new();
    for i in 0..count {
        cursor.naming(&format!("metadata key {i}"));
        let name: Box<str> = cursor.name(MAX_KEY_LEN)?.into();
        cursor.naming(&name);
        let id = cursor.u32()?;
        let ty = ValueType::from_id(id).ok_or_else(|| cursor.unknown_type(id))?;
        let at = cursor.position() as usize;
        Value::read(cursor, ty)?;
        if by_name.insert(name.clone(), keys.len()).is_some() {
            let name = name.into();
            return Err(GgufError::Duplicate {
                kind: "metadata key",
                name,
            });
        }
        keys.push(KeyEntry { name, ty, at });
    }
    Ok((keys, by_name))
}

fn find_alignment(bytes: &[u8], keys: &[KeyEntry], by_name: &Positions) -> Result<u64, GgufError> {
    const KEY: &str = "general.alignment";
    let Some(&i) = by_name.get(KEY) else {
        return Ok(DEFAULT_ALIGNMENT);
    };
    let value = Value::read(&mut Cursor::at(bytes, keys[i].at), keys[i].ty)?;
    let alignment = value.as_unsigned().ok_or_else(|| GgufError::WrongType {
        key: KEY.into(),
        wanted: "an unsigned integer",
        found: value.describe(),
    })?;
    if !alignment.is_power_of_two() || alignment > MAX_ALIGNMENT {
        return Err(GgufError::Alignment { alignment });
    }
    Ok(alignment)
}

/// Tensors whose positions are relative to the data section.
fn parse_tensor_list(cursor: &mut Cursor<'_>, count: u64) -> Result<Vec<TensorEntry>, GgufError> {
    let mut tensors = Vec::new();
    for i in 0..count {
        cursor.naming(&format!("the description of tensor {i}"));
        let name: Box<str> = cursor.name(MAX_TENSOR_NAME)?.into();
        cursor.naming(&format!("the description of tensor {name:?}"));
        let n_dims = cursor.u32()?;
        check_limit(
            &format!("the number of dimensions of tensor {name:?}"),
            n_dims.into(),
            MAX_DIMS.into(),
        )?;
        let mut dims = Vec::with_capacity(n_dims as usize);
        for _ in 0..n_dims {
            dims.push(cursor.u64()?);
        }
        let id = cursor.u32()?;
        let offset = cursor.u64()?;
        let Some(ty) = GgmlType::from_id(id) else {
            return Err(GgufError::TensorType {
                tensor: name.into(),
                ty: id,
                name: foreign_type_name(id),
            });
        };
        match tensor_bytes(ty, &dims) {
            // Whether such a position can be is checked when the section's own is known.
            Ok(len) => tensors.push(TensorEntry {
                name,
                ty,
                dims,
                file: 0,
                at: offset as usize,
                len: len as usize,
                gather: None,
            }),
            Err(reason) => {
                return Err(GgufError::TensorShape {
                    tensor: name.into(),
                    dims,
                    reason,
                });
            }
        }
    }
    Ok(tensors)
}

/// Bytes a tensor takes.
fn tensor_bytes(ty: GgmlType, dims: &[u64]) -> Result<u64, &'static str> {
    let Some(&row) = dims.first() else {
        return Err("a tensor needs at least one dimension");
    };
    if dims.contains(&0) {
        return Err("a dimension is 0");
    }
    if !row.is_multiple_of(ty.block_size() as u64) {
        return Err("the first dimension is no whole number of quantisation blocks");
    }
    dims.iter()
        .try_fold(1u64, |product, &dim| product.checked_mul(dim))
        .and_then(|elements| ty.bytes_for(elements))
        .ok_or("the number of elements overflows")
}

/// Makes the tensors' positions those in the file, and checks that it has their bytes.
fn place_tensors(
    tensors: &mut [TensorEntry],
    data_start: u64,
    alignment: u64,
    file_len: u64,
) -> Result<(), GgufError> {
    for tensor in &mut *tensors {
        let (offset, len) = (tensor.at as u64, tensor.len as u64);
        if !offset.is_multiple_of(alignment) {
            return Err(GgufError::Misaligned {
                tensor: tensor.name.to_string(),
                offset,
                alignment,
            });
        }
        let at = data_start.saturating_add(offset);
        if at.saturating_add(len) > file_len {
            return Err(GgufError::Truncated {
                what: format!("the data of tensor {:?}", tensor.name),
                at,
                needed: len,
                length: file_len,
            });
        }
        tensor.at = at as usize;
    }
    check_overlap(tensors)
}

fn check_overlap(tensors: &[TensorEntry]) -> Result<(), GgufError> {
    let mut order: Vec<&TensorEntry> = tensors.iter().collect();
    order.sort_unstable_by_key(|tensor| tensor.at);
    for pair in order.windows(2) {
        if pair[0].at + pair[0].len > pair[1].at {
            return Err(GgufError::Overlap {
                first: pair[0].name.to_string(),
                second: pair[1].name.to_string(),
            });
        }
    }
    Ok(())
}

fn check_limit(what: &str, value: u64, limit: u64) -> Result<(), GgufError> {
    if value > limit {
        return Err(GgufError::Limit {
            what: what.into(),
            value,
            limit,
        });
    }
    Ok(())
}
