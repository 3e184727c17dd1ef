//! Models in Hugging Face's form: a folder with `config.json`, `tokenizer.json` and safetensors.
//!
//! [`HfCheckpoint`] reads such a folder as a [`Checkpoint`]: `config` puts the values of `config.json` under
//! GGUF's keys, `names` translates the names of tensors, and their bytes stay where they are. The rows of
//! llama's query and key matrices stand in another order than in GGUF files, and Gemma's norms are stored as
//! the distance from 1. [`crate::tokenizer`] and [`crate::chat`] read tokenizer and chat template.
//!
//! Nothing in a folder is trusted. Every file has a limit that is checked before it is read;
//! `model.safetensors.index.json` can name files of the folder only; a link may lead into the store of blobs
//! that the folder belongs to, and nowhere else.

mod config;
mod error;
mod folder;
mod keys;
mod names;
mod naming;
mod special;

use std::path::Path;

pub use crate::checkpoint::SpecialTokens;
pub use error::HfError;
pub use folder::{Folder, INDEX, files_of_index, is_hugging_face};
#[cfg(any(test, feature = "synth"))]
pub(crate) use names::their_name;
#[cfg(any(test, feature = "synth"))]
pub(crate) use naming::ExpertNaming;

use crate::checkpoint::{Checkpoint, RopeStyle, TokenizerJson};
use crate::config::MAX_EXPERTS;
use crate::file::ModelFile;
use crate::gguf::{GgmlType, TensorEntry, Tensors, Value};
use crate::safetensors::{Dtype, Safetensors, TensorView};
use config::Configuration;
use keys::GgufKeys;
use names::FusedExperts;
use naming::TensorNaming;

/// Most tensors of a model, with every expert's matrices: several times those of the largest known models.
const MAX_MATRICES: usize = 1 << 18;

/// A model in a folder, opened and checked but for the shapes of its tensors.
#[derive(Debug)]
pub struct HfCheckpoint {
    keys: GgufKeys,
    tensors: Tensors,
    naming: TensorNaming,
    /// Absent where only `config.json` was read.
    tokenizer: Option<TokenizerJson>,
}

impl HfCheckpoint {
    /// Opens the model in the folder at `path`, or around the `.safetensors` file at `path`.
    ///
    /// # Errors
    /// If a file is missing or malformed, or describes a network that is not supported.
    pub fn open(path: &Path) -> Result<Self, HfError> {
        let folder = Folder::open(path)?;
        let configuration = config::read(&folder.config()?, &folder.name())?;
        let mut files = Vec::new();
        let mut entries = Vec::new();
        for path in folder.shards()? {
            let shard = Safetensors::open(&path).map_err(|source| HfError::Weights {
                path: path.clone(),
                source: Box::new(source),
            })?;
            for tensor in shard.tensors() {
                folder.check_place(tensor.name, &path)?;
                entries.extend(entries_of(&tensor, files.len(), &configuration.network)?);
                if entries.len() > MAX_MATRICES {
                    return Err(HfError::TooManyTensors {
                        limit: MAX_MATRICES,
                    });
                }
            }
            files.push(shard.into_file());
        }
        let mut checkpoint = Self::new(configuration, files, entries)?;
        let (special, template) = special::read(&folder)?;
        if let Some(template) = template {
            checkpoint
                .keys
                .general("tokenizer.chat_template", &template);
        }
        let json = folder.tokenizer()?;
        checkpoint.tokenizer = Some(TokenizerJson { json, special });
        Ok(checkpoint)
    }

    fn new(
        configuration: Configuration,
        mut files: Vec<ModelFile>,
        mut entries: Vec<TensorEntry>,
    ) -> Result<Self, HfError> {
        if let Some(factors) = configuration.freq_factors {
            let bytes: Vec<u8> = factors.iter().flat_map(|x| x.to_le_bytes()).collect();
            entries.push(TensorEntry {
                name: "rope_freqs.weight".into(),
                ty: GgmlType::F32,
                dims: vec![factors.len() as u64],
                file: files.len(),
                at: 0,
                len: bytes.len(),
            });
            files.push(ModelFile::from_bytes(bytes));
        }
        Ok(HfCheckpoint {
            keys: configuration.keys,
            tensors: Tensors::new(files, entries)?,
            naming: configuration.network,
            tokenizer: None,
        })
    }
}

impl Checkpoint for HfCheckpoint {
    fn metadata(&self, key: &str) -> Option<Value<'_>> {
        self.keys.get(key)
    }

    fn tensors(&self) -> &Tensors {
        &self.tensors
    }

    fn into_tensors(self) -> Tensors {
        self.tensors
    }

    fn row_order(&self) -> RopeStyle {
        RopeStyle::Halves
    }

    fn norm_offset(&self) -> f32 {
        // Stored is the distance from 1.
        1.0
    }

    fn tokenizer_json(&self) -> Option<&TokenizerJson> {
        self.tokenizer.as_ref()
    }

    fn stored_name(&self, tensor: &str) -> String {
        names::their_name(tensor, self.naming.experts).unwrap_or_else(|| tensor.to_owned())
    }
}

/// Entries of a tensor of the shard at index `file`: none for a tensor that is not needed, one for most, and
/// one for each matrix of a tensor that holds those of all experts.
fn entries_of(
    tensor: &TensorView<'_>,
    file: usize,
    network: &TensorNaming,
) -> Result<Vec<TensorEntry>, HfError> {
    let fused = FusedExperts::of(tensor.name, network);
    let name = match &fused {
        Some(_) => None,
        None => names::gguf_name(tensor.name, network),
    };
    if fused.is_none() && name.is_none() {
        return Ok(Vec::new());
    }
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
    let name = name.unwrap_or_default();
    let dims = names::dims(&name, tensor.shape);
    let entry = TensorEntry {
        name: name.into(),
        ty,
        dims,
        file,
        at: tensor.offset as usize,
        len: tensor.data.len(),
    };
    match fused {
        None => Ok(vec![entry]),
        Some(fused) => split(tensor.name, &entry, &fused),
    }
}

/// The matrices of all experts in a tensor `[experts, matrices * outputs, inputs]`; those of a shared expert lack
/// the first dimension.
fn split(
    tensor: &str,
    whole: &TensorEntry,
    fused: &FusedExperts,
) -> Result<Vec<TensorEntry>, HfError> {
    let matrices = fused.matrices();
    let (inputs, rows, experts) = match (&whole.dims[..], fused.is_shared()) {
        (&[inputs, rows], true) => (inputs, rows, 1),
        (&[inputs, rows, experts], false) => (inputs, rows, experts),
        _ => {
            return Err(HfError::Experts {
                tensor: tensor.into(),
                shape: whole.dims.iter().rev().copied().collect(),
            });
        }
    };
    if experts > MAX_EXPERTS || !rows.is_multiple_of(matrices as u64) {
        return Err(HfError::Experts {
            tensor: tensor.into(),
            shape: vec![experts, rows, inputs],
        });
    }
    // Floats: every matrix has the same number of whole elements.
    let len = whole.len / experts as usize / matrices;
    let entry = |index: usize| TensorEntry {
        name: fused.name(index / matrices, index % matrices).into(),
        ty: whole.ty,
        dims: vec![inputs, rows / matrices as u64],
        file: whole.file,
        at: whole.at + index * len,
        len,
    };
    Ok((0..experts as usize * matrices).map(entry).collect())
}

/// The values of `config.json`, as a checkpoint without the model's tensors. For tests and fuzzing;
/// [`HfCheckpoint::open`] reads them itself.
///
/// # Errors
/// If it is malformed, or describes a network that is not supported.
pub fn keys_of_config(json: &[u8]) -> Result<HfCheckpoint, HfError> {
    HfCheckpoint::new(config::read(json, "model")?, Vec::new(), Vec::new())
}

#[cfg(test)]
mod tests;
