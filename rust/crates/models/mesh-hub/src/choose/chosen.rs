//! The files of a repository that a model needs.

use crate::listing::RepoFile;

/// Storage format of a model's weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// One GGUF file with everything in it, or all parts of a split one.
    Gguf,
    /// `config.json`, `tokenizer.json` and safetensors files, or a model for images in diffusers' form.
    Safetensors,
}

/// The files that a model needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chosen {
    /// Storage format of the weights.
    pub format: Format,
    /// The name the model gets: that of the GGUF file without its ending and the numbers of a part, or the
    /// repository's without the organisation.
    pub name: String,
    /// Files with the weights.
    pub weights: Vec<RepoFile>,
    /// All other files; they are small.
    pub others: Vec<RepoFile>,
}

impl Chosen {
    /// All files, weights first.
    pub fn files(&self) -> impl Iterator<Item = &RepoFile> {
        self.weights.iter().chain(&self.others)
    }
}
