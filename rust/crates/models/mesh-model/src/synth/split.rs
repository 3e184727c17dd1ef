//! Split GGUF files, as llama.cpp's `gguf-split` writes them.

use std::io;
use std::path::{Path, PathBuf};

use crate::gguf::writer::{OwnedValue, Writer};
use crate::gguf::{Gguf, Tensor};

/// How a file is cut into parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Split {
    /// Maximum number of tensors in a part.
    pub tensors: usize,
    /// The first part has no tensors, only the keys.
    pub keys_first: bool,
}

/// Writes the parts of `gguf` into `dir`, called after `stem`; returns their paths, in order.
///
/// # Errors
/// If a file cannot be read or written.
pub fn write_split(gguf: &Gguf, split: Split, dir: &Path, stem: &str) -> io::Result<Vec<PathBuf>> {
    let parts = split_bytes(gguf, split)?;
    let count = parts.len();
    let write = |(index, bytes): (usize, Vec<u8>)| {
        let path = dir.join(format!("{stem}-{:05}-of-{count:05}.gguf", index + 1));
        std::fs::write(&path, bytes)?;
        Ok(path)
    };
    parts.into_iter().enumerate().map(write).collect()
}

/// The same in memory.
///
/// # Errors
/// If the file cannot be read.
pub fn split_bytes(gguf: &Gguf, split: Split) -> io::Result<Vec<Vec<u8>>> {
    let tensors: Vec<Tensor<'_>> = gguf.tensors().iter().collect();
    let mut groups: Vec<&[Tensor<'_>]> = tensors.chunks(split.tensors.max(1)).collect();
    if split.keys_first {
        groups.insert(0, &[]);
    }
    let count = groups.len();
    let part = |(index, group): (usize, &&[Tensor<'_>])| {
        let mut writer = Writer::new();
        if index == 0 {
            for (key, value) in gguf.metadata_iter() {
                writer.copy_key(key, value);
            }
        }
        writer
            .key("split.no", OwnedValue::U16(index as u16))
            .key("split.count", OwnedValue::U16(count as u16))
            .key("split.tensors.count", OwnedValue::I32(tensors.len() as i32));
        for tensor in *group {
            writer.tensor(tensor.name, tensor.ty, tensor.dims);
        }
        let mut out = io::Cursor::new(Vec::new());
        let mut group = group.iter();
        writer.write(&mut out, |_, _, _, out| {
            let tensor = group.next().expect("one for each that was planned");
            out.write_all(&tensor.data.read().map_err(io::Error::other)?)
        })?;
        Ok(out.into_inner())
    };
    groups.iter().enumerate().map(part).collect()
}
