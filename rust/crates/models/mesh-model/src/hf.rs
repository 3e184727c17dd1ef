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
mod experts;
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
use crate::file::ModelFile;
use crate::gguf::{GgmlType, TensorEntry, Tensors, Value};
use crate::safetensors::{Safetensors, TensorView};
use config::Configuration;
use experts::{FusedTensors, float_type};
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
        let (mut files, mut entries) = (Vec::new(), Vec::new());
        let mut fused = FusedTensors::default();
        for path in folder.shards()? {
            let shard = Safetensors::open(&path).map_err(|source| HfError::Weights {
                path: path.clone(),
                source: Box::new(source),
            })?;
            for tensor in shard.tensors() {
                folder.check_place(tensor.name, &path)?;
                let network = &configuration.network;
                match FusedExperts::of(tensor.name, network) {
                    Some(experts) => fused.add(experts, &tensor, files.len(), &mut entries)?,
                    None => entries.extend(entry_of(&tensor, files.len(), network)?),
                }
                if entries.len() > MAX_MATRICES {
                    return Err(HfError::TooManyTensors {
                        limit: MAX_MATRICES,
                    });
                }
            }
            files.push(shard.into_file());
        }
        fused.check_whole()?;
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
                gather: None,
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

/// The entry of a tensor of the shard at index `file`; none for a tensor that is not needed.
fn entry_of(
    tensor: &TensorView<'_>,
    file: usize,
    network: &TensorNaming,
) -> Result<Option<TensorEntry>, HfError> {
    let Some(name) = names::gguf_name(tensor.name, network) else {
        return Ok(None);
    };
    let dims = names::dims(&name, tensor.shape);
    Ok(Some(TensorEntry {
        name: name.into(),
        ty: float_type(tensor)?,
        dims,
        file,
        at: tensor.offset as usize,
        len: tensor.data.len(),
        gather: None,
    }))
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
