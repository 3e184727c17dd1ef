//! Models in Hugging Face's form: a folder with `config.json`, `tokenizer.json` and safetensors.
//!
//! The rest of the system speaks GGUF's language: its keys, and its names of tensors. A folder is therefore opened as the GGUF
//! file that a converter would make of it: `config` writes `config.json` as keys, `names` gives the tensors their names,
//! and their bytes stay where they are. Two things differ and are said by [`Gguf::is_hugging_face`]: the rows of llama's query
//! and key matrices stand in another order, which the rotary embedding makes good, and Gemma's norms are stored as the
//! distance from 1. Tokenizer and chat template are read by [`crate::tokenizer`] and [`crate::chat`].
//!
//! Nothing in a folder is trusted. Every file has a limit that is checked before it is read; `model.safetensors.index.json` can
//! name files of the folder only; a link may lead into the store of blobs that the folder belongs to, and nowhere else.

mod config;
mod error;
mod folder;
pub(crate) mod names;
mod special;

pub use error::HfError;
pub use folder::{Folder, files_of_index, is_hugging_face};
pub(crate) use names::in_their_words;
pub use special::SpecialTokens;

use crate::gguf::{GgmlType, Gguf};
use crate::safetensors::{Dtype, Safetensors};

/// `config.json` as the GGUF keys that say the same, in a file without the model's tensors. For tests and fuzzing; opening a
/// [`crate::Model`] does it for itself.
///
/// # Errors
/// If it is malformed, or describes a network that is not supported.
pub fn keys_of_config(json: &[u8]) -> Result<Gguf, HfError> {
    let (head, _) = config::head(json, "model")?;
    Ok(Gguf::from_bytes(head)?)
}

/// What a folder says about its network, and its tensors.
pub(crate) fn open(folder: &Folder) -> Result<Gguf, HfError> {
    let (head, config) = config::head(&folder.config()?, &folder.name())?;
    let mut files = Vec::new();
    let mut tensors = Vec::new();
    for path in folder.shards()? {
        let file = Safetensors::open(&path).map_err(|source| HfError::Weights {
            path: path.clone(),
            source: Box::new(source),
        })?;
        for tensor in file.tensors() {
            folder.check_place(tensor.name, &path)?;
            let Some(name) = names::gguf_name(tensor.name, &config) else {
                continue;
            };
            let ty = match tensor.dtype {
                Dtype::F32 => GgmlType::F32,
                Dtype::F16 => GgmlType::F16,
                Dtype::BF16 => GgmlType::BF16,
                dtype => {
                    return Err(HfError::TensorType {
                        tensor: tensor.name.into(),
                        dtype,
                    });
                }
            };
            if tensor.shape.is_empty() || tensor.shape.contains(&0) {
                return Err(HfError::Empty {
                    tensor: tensor.name.into(),
                });
            }
            tensors.push(crate::gguf::Elsewhere {
                name,
                ty,
                dims: tensor.shape.iter().rev().copied().collect(),
                file: files.len(),
                at: tensor.offset as usize,
                len: tensor.data.len(),
            });
        }
        files.push(file.into_file());
    }
    Ok(Gguf::with_tensors(head, files, tensors)?)
}

#[cfg(test)]
mod tests;
