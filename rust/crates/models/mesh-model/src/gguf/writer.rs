//! Writing GGUF files, version 3.

use std::fs::File;
use std::io::{self, Seek, Write};

use mesh_quant::GgmlType;

use super::parse::DEFAULT_ALIGNMENT;
use super::value::{Array, Value, ValueType};
use crate::file::write_tensor;

/// A metadata value to write.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)]
pub enum OwnedValue {
    U16(u16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    U64(u64),
    String(String),
    Strings(Vec<String>),
    I32s(Vec<i32>),
    F32s(Vec<f32>),
    Bools(Vec<bool>),
}

/// Writes a GGUF file: first all keys, then the list of all tensors, then their data one after the other.
///
/// The data is streamed, so that a file may be larger than memory.
#[derive(Debug, Default)]
pub struct Writer {
    keys: Vec<(String, Vec<u8>)>,
    tensors: Vec<Planned>,
}

#[derive(Debug)]
struct Planned {
    name: String,
    ty: GgmlType,
    dims: Vec<u64>,
    bytes: u64,
}

impl Writer {
    /// A writer without keys and tensors.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a metadata key.
    pub fn key(&mut self, name: &str, value: OwnedValue) -> &mut Self {
        let mut bytes = Vec::new();
        put_value(&mut bytes, &value);
        self.keys.push((name.into(), bytes));
        self
    }

    /// Adds a metadata key with the value that another file has there.
    pub fn copy_key(&mut self, name: &str, value: Value<'_>) -> &mut Self {
        let mut bytes = Vec::new();
        put_borrowed(&mut bytes, value);
        self.keys.push((name.into(), bytes));
        self
    }

    /// Plans a tensor; its data is asked for by [`Writer::write`].
    ///
    /// # Panics
    /// If the first dimension is not a multiple of `ty`'s block length, or the size overflows.
    pub fn tensor(&mut self, name: &str, ty: GgmlType, dims: &[u64]) -> &mut Self {
        assert!(
            dims.first()
                .is_some_and(|row| row.is_multiple_of(ty.block_size() as u64)),
            "rows of tensor {name} ({dims:?}) are no whole number of {ty} blocks"
        );
        let elements = dims
            .iter()
            .try_fold(1u64, |product, &dim| product.checked_mul(dim));
        let bytes = elements
            .and_then(|elements| ty.bytes_for(elements))
            .unwrap_or_else(|| panic!("the size of tensor {name} ({dims:?}) overflows"));
        self.tensors.push(Planned {
            name: name.into(),
            ty,
            dims: dims.into(),
            bytes,
        });
        self
    }

    /// Writes the file. `data` is called for each tensor in turn, with its name, type and dimensions, and
    /// writes its bytes.
    ///
    /// # Errors
    /// If writing fails, or `data` writes more or fewer bytes than the tensor has.
    pub fn write<W: Write + Seek>(
        &self,
        out: &mut W,
        mut data: impl FnMut(&str, GgmlType, &[u64], &mut dyn Write) -> io::Result<()>,
    ) -> io::Result<()> {
        let head = self.head();
        out.write_all(&head)?;
        let mut at = head.len() as u64;
        for tensor in &self.tensors {
            at = pad(out, at)?;
            write_tensor(out, &tensor.name, tensor.bytes, |out| {
                data(&tensor.name, tensor.ty, &tensor.dims, out)
            })?;
            at += tensor.bytes;
        }
        out.flush()
    }

    /// Writes the header to `file`, which gets the length that it has with data: the tensors are holes, which
    /// read as zeros.
    ///
    /// # Errors
    /// If writing fails.
    pub fn write_header(&self, file: &mut File) -> io::Result<()> {
        let head = self.head();
        file.write_all(&head)?;
        let mut len = (head.len() as u64).next_multiple_of(DEFAULT_ALIGNMENT);
        for tensor in &self.tensors {
            len = len.next_multiple_of(DEFAULT_ALIGNMENT) + tensor.bytes;
        }
        file.set_len(len)
    }

    /// The whole file in memory, each tensor filled by `data`.
    ///
    /// # Errors
    /// As [`Writer::write`].
    pub fn to_bytes(
        &self,
        mut data: impl FnMut(&str, GgmlType, &[u64]) -> Vec<u8>,
    ) -> io::Result<Vec<u8>> {
        let mut out = io::Cursor::new(Vec::new());
        self.write(&mut out, |name, ty, dims, out| {
            out.write_all(&data(name, ty, dims))
        })?;
        Ok(out.into_inner())
    }

    /// Everything before the first tensor's data, but for the padding.
    fn head(&self) -> Vec<u8> {
        let mut head = Vec::new();
        head.extend_from_slice(b"GGUF");
        head.extend_from_slice(&3u32.to_le_bytes());
        head.extend_from_slice(&(self.tensors.len() as u64).to_le_bytes());
        head.extend_from_slice(&(self.keys.len() as u64).to_le_bytes());
        for (name, value) in &self.keys {
            put_string(&mut head, name.as_bytes());
            head.extend_from_slice(value);
        }
        let mut offset = 0;
        for tensor in &self.tensors {
            put_string(&mut head, tensor.name.as_bytes());
            head.extend_from_slice(&(tensor.dims.len() as u32).to_le_bytes());
            for dim in &tensor.dims {
                head.extend_from_slice(&dim.to_le_bytes());
            }
            head.extend_from_slice(&tensor.ty.id().to_le_bytes());
            head.extend_from_slice(&u64::to_le_bytes(offset));
            offset = (offset + tensor.bytes).next_multiple_of(DEFAULT_ALIGNMENT);
        }
        head
    }
}

/// Pads to the alignment and gives the new position.
fn pad(out: &mut impl Write, at: u64) -> io::Result<u64> {
    let aligned = at.next_multiple_of(DEFAULT_ALIGNMENT);
    out.write_all(&[0; DEFAULT_ALIGNMENT as usize][..(aligned - at) as usize])?;
    Ok(aligned)
}

fn put_string(out: &mut Vec<u8>, text: &[u8]) {
    out.extend_from_slice(&(text.len() as u64).to_le_bytes());
    out.extend_from_slice(text);
}

fn put_type(out: &mut Vec<u8>, ty: ValueType) {
    out.extend_from_slice(&ty.id().to_le_bytes());
}

fn put_array_head(out: &mut Vec<u8>, element: ValueType, len: usize) {
    put_type(out, ValueType::Array);
    put_type(out, element);
    out.extend_from_slice(&(len as u64).to_le_bytes());
}

fn put_value(out: &mut Vec<u8>, value: &OwnedValue) {
    let mut scalar = |ty, bytes: &[u8]| {
        put_type(out, ty);
        out.extend_from_slice(bytes);
    };
    match value {
        OwnedValue::U16(v) => scalar(ValueType::U16, &v.to_le_bytes()),
        OwnedValue::U32(v) => scalar(ValueType::U32, &v.to_le_bytes()),
        OwnedValue::I32(v) => scalar(ValueType::I32, &v.to_le_bytes()),
        OwnedValue::F32(v) => scalar(ValueType::F32, &v.to_le_bytes()),
        OwnedValue::U64(v) => scalar(ValueType::U64, &v.to_le_bytes()),
        OwnedValue::Bool(v) => scalar(ValueType::Bool, &[u8::from(*v)]),
        OwnedValue::String(v) => {
            put_type(out, ValueType::String);
            put_string(out, v.as_bytes());
        }
        OwnedValue::Strings(v) => {
            put_array_head(out, ValueType::String, v.len());
            v.iter().for_each(|text| put_string(out, text.as_bytes()));
        }
        OwnedValue::I32s(v) => {
            put_array_head(out, ValueType::I32, v.len());
            v.iter()
                .for_each(|v| out.extend_from_slice(&v.to_le_bytes()));
        }
        OwnedValue::F32s(v) => {
            put_array_head(out, ValueType::F32, v.len());
            v.iter()
                .for_each(|v| out.extend_from_slice(&v.to_le_bytes()));
        }
        OwnedValue::Bools(v) => {
            put_array_head(out, ValueType::Bool, v.len());
            out.extend(v.iter().map(|&v| u8::from(v)));
        }
    }
}

/// Writes a value from another file; integers and floats take their widest type where the width is not known.
fn put_borrowed(out: &mut Vec<u8>, value: Value<'_>) {
    match value {
        Value::Unsigned(v) => match u32::try_from(v) {
            Ok(v) => put_value(out, &OwnedValue::U32(v)),
            Err(_) => put_value(out, &OwnedValue::U64(v)),
        },
        Value::Signed(v) => {
            put_type(out, ValueType::I64);
            out.extend_from_slice(&v.to_le_bytes());
        }
        Value::Float(v) => put_value(out, &OwnedValue::F32(v as f32)),
        Value::Bool(v) => put_value(out, &OwnedValue::Bool(v)),
        Value::String(v) => {
            put_type(out, ValueType::String);
            put_string(out, v);
        }
        Value::Array(v) => put_array(out, v),
    }
}

fn put_array(out: &mut Vec<u8>, array: Array<'_>) {
    put_array_head(out, array.element(), array.len());
    out.extend_from_slice(array.raw());
}
