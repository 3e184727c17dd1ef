//! Writing the elements of a folder's tensors.

use std::io::{self, Write};

use half::{bf16, f16};

use crate::safetensors::Dtype;

/// The error that a folder cannot have what the file has.
pub(super) fn unknown(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, what.into())
}

/// Writes numbers as elements of type `dtype`.
pub(super) fn put(values: &[f32], dtype: Dtype, out: &mut dyn Write) -> io::Result<()> {
    let mut bytes = Vec::with_capacity(values.len() * dtype.size() as usize);
    for &value in values {
        match dtype {
            Dtype::F32 => bytes.extend(value.to_le_bytes()),
            Dtype::F16 => bytes.extend(f16::from_f32(value).to_le_bytes()),
            Dtype::BF16 => bytes.extend(bf16::from_f32(value).to_le_bytes()),
            other => return Err(unknown(format!("weights of type {other}"))),
        }
    }
    out.write_all(&bytes)
}
