//! Positions of the tensors in a file, and the ranges that a stage needs.
//!
//! A stage that computes a range of layers opens the file as if it were whole: its header, and the tensors
//! that the engine reads for that range. What belongs to which layer is told by the tensors' names, those of
//! GGUF files (<https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>, "Standardized tensor names") and
//! those of Hugging Face's `transformers`.

use std::io::{self, Read};
use std::ops::Range;
use std::path::{Path, PathBuf};

use mesh_model::file::{has_extension, open_regular};
use mesh_model::safetensors::{Safetensors, SafetensorsError};
use mesh_model::{Gguf, GgufError};

use crate::ranges::RangeSet;

/// Length, header and tensor positions of a model file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// Length of the file.
    pub bytes: u64,
    /// Bytes before the first tensor; for a file without tensors its length.
    pub header: u64,
    /// Tensors, ascending by offset, without overlap.
    pub tensors: Vec<TensorPlace>,
}

/// Name, offset and length of a tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorPlace {
    /// Name of the tensor in the file.
    pub name: String,
    /// Position in the file.
    pub offset: u64,
    /// Length in bytes.
    pub bytes: u64,
}

/// Purpose of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// Belongs to this layer.
    Layer(u32),
    /// Turns tokens into rows: the first stage needs it, and the last one if the output matrix is the same.
    Embedding,
    /// Turns rows into logits: the last stage needs it.
    Output,
    /// Every stage needs it.
    Shared,
}

/// Errors of finding a file's tensors.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages name the fields")]
pub enum LayoutError {
    /// The file could not be read.
    #[error("cannot read {}: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    /// A broken GGUF file.
    #[error("{}: {source}", path.display())]
    Gguf { path: PathBuf, source: GgufError },
    /// A broken safetensors file.
    #[error("{}: {source}", path.display())]
    Safetensors {
        path: PathBuf,
        source: SafetensorsError,
    },
}

impl Layout {
    /// The layout of the file at `path`: a GGUF file by its first bytes, a safetensors file by its name, any
    /// other has no tensors. Only the header is read, so that the file may be one of which no more is
    /// present.
    ///
    /// # Errors
    /// If the file cannot be read, or its header is malformed or contradicts the file's length.
    pub fn read(path: &Path) -> Result<Layout, LayoutError> {
        let failed = |source| LayoutError::Read {
            path: path.into(),
            source,
        };
        let file = open_regular(path).map_err(failed)?;
        let bytes = file.metadata().map_err(failed)?.len();
        let mut magic = Vec::new();
        file.take(4).read_to_end(&mut magic).map_err(failed)?;
        if magic == b"GGUF" {
            Self::of_gguf(path)
        } else if has_extension(path, "safetensors") {
            Self::of_safetensors(path)
        } else {
            Ok(Self::new(bytes, []))
        }
    }

    fn of_gguf(path: &Path) -> Result<Layout, LayoutError> {
        // The other parts of a split file have layouts of their own.
        let gguf = Gguf::open_part(path).map_err(|source| LayoutError::Gguf {
            path: path.into(),
            source,
        })?;
        let tensors = gguf.tensors().iter();
        let tensors = tensors.map(|tensor| (tensor.name, tensor.data.offset(), tensor.data.len()));
        Ok(Self::new(gguf.tensors().file_len(), tensors))
    }

    fn of_safetensors(path: &Path) -> Result<Layout, LayoutError> {
        let file = Safetensors::open(path).map_err(|source| LayoutError::Safetensors {
            path: path.into(),
            source,
        })?;
        let tensors = file.tensors();
        let tensors = tensors.map(|tensor| (tensor.name, tensor.offset, tensor.data.len()));
        Ok(Self::new(file.file_len(), tensors))
    }

    /// The layout of a file of `bytes` bytes with these tensors: name, position and length.
    fn new<'a>(bytes: u64, tensors: impl IntoIterator<Item = (&'a str, u64, usize)>) -> Layout {
        let tensors = tensors.into_iter().map(|(name, offset, len)| TensorPlace {
            name: name.to_owned(),
            offset,
            bytes: len as u64,
        });
        let mut tensors: Vec<TensorPlace> = tensors.collect();
        tensors.sort_by_key(|tensor| tensor.offset);
        let header = tensors.first().map_or(bytes, |tensor| tensor.offset);
        Layout {
            bytes,
            header,
            tensors,
        }
    }

    /// The bytes that `selection` needs of this file.
    pub fn ranges_for(&self, selection: &Selection) -> RangeSet {
        let tensors = self.tensors.iter();
        let wanted = tensors.filter(|tensor| selection.wants(role(&tensor.name)));
        let wanted = wanted.map(|tensor| tensor.offset..tensor.offset + tensor.bytes);
        std::iter::once(0..self.header).chain(wanted).collect()
    }
}

/// Selects the tensors that a stage needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Selection {
    layers: Range<u32>,
    first: bool,
    last: bool,
    tied: bool,
}

impl Selection {
    /// Selects the tensors for the stage of `layers`, of a model of `total` layers. `names` are the names of
    /// all its tensors, over all files.
    pub fn new<'a>(
        layers: Range<u32>,
        total: u32,
        names: impl IntoIterator<Item = &'a str>,
    ) -> Self {
        let tied = !names.into_iter().any(is_output_matrix);
        Selection {
            first: layers.start == 0,
            last: layers.end >= total,
            tied,
            layers,
        }
    }

    /// True if the stage needs tensors of this role.
    pub fn wants(&self, role: Role) -> bool {
        match role {
            Role::Layer(layer) => self.layers.contains(&layer),
            Role::Embedding => self.first || self.last && self.tied,
            Role::Output => self.last,
            Role::Shared => true,
        }
    }
}

/// The role of the tensor called `name`.
pub fn role(name: &str) -> Role {
    if let Some(layer) = layer(name) {
        return Role::Layer(layer);
    }
    let hf = hf_name(name);
    // Unknown tensors go to every stage: superfluous ones do no harm.
    if name.starts_with("token_embd.") || hf.starts_with("embed_tokens.") {
        Role::Embedding
    } else if is_output_matrix(name)
        || name.starts_with("output_norm.")
        || hf.starts_with("norm.") && hf != name
    {
        Role::Output
    } else {
        Role::Shared
    }
}

/// The layer that the tensor called `name` belongs to: `blk.3.attn_q.weight` in GGUF files,
/// `model.layers.3.mlp.up_proj.weight` or, in encoders, `encoder.layer.3.output.dense.weight` in others.
pub fn layer(name: &str) -> Option<u32> {
    let hf = hf_name(name);
    let encoder = without_prefix(name, ["bert.", "roberta."]);
    let rest = name
        .strip_prefix("blk.")
        .or_else(|| hf.strip_prefix("layers.").filter(|_| hf != name))
        .or_else(|| encoder.strip_prefix("encoder.layer."))?;
    let (number, _) = rest.split_once('.')?;
    // As parse() takes "+3" and "03", too.
    let plain = number == "0" || !number.starts_with(['0', '+']);
    number.parse().ok().filter(|_| plain)
}

/// A tensor's name within the language model, for names as `transformers` gives them; others as they are.
fn hf_name(name: &str) -> &str {
    without_prefix(
        name,
        ["model.language_model.", "language_model.model.", "model."],
    )
}

fn without_prefix<'a, const N: usize>(name: &'a str, prefixes: [&str; N]) -> &'a str {
    let mut prefixes = prefixes.into_iter();
    let rest = prefixes.find_map(|prefix| name.strip_prefix(prefix));
    rest.unwrap_or(name)
}

/// The matrix of the logits, where it is not the embedding.
fn is_output_matrix(name: &str) -> bool {
    name == "output.weight" || name.ends_with("lm_head.weight")
}

#[cfg(test)]
mod tests;
