//! Errors of embedding models and of texts to embed.

use std::path::PathBuf;

use crate::safetensors::SafetensorsError;

/// Errors of loading an embedding model and of tokenising texts for it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages name the fields")]
pub enum EncoderError {
    /// A required file is missing.
    #[error("{} is missing: an embedding model is a folder with config.json, tokenizer.json and model.safetensors", path.display())]
    MissingFile { path: PathBuf },
    /// A file could not be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },
    /// A file is larger than any of its kind.
    #[error("{} has {bytes} bytes, more than the limit of {limit}: it is damaged or something else", path.display())]
    TooLarge {
        path: PathBuf,
        bytes: u64,
        /// The most that is read.
        limit: u64,
    },
    /// A file is not the JSON it should be.
    #[error("{file} cannot be read: {message}")]
    Json { file: &'static str, message: String },
    /// A number of the configuration outside its limits.
    #[error("{file} says {key} = {value}; {need}")]
    Value {
        file: &'static str,
        key: &'static str,
        value: u64,
        /// Range that is accepted.
        need: &'static str,
    },
    /// A feature that is not implemented.
    #[error("the model has {what}, which is not supported: {remedy}")]
    Unsupported {
        what: String,
        /// Alternative for the user.
        remedy: &'static str,
    },
    /// The tokenizer is invalid.
    #[error("tokenizer.json: {message}")]
    Tokenizer {
        /// Error from the tokenizer library.
        message: String,
    },
    /// The weights are invalid.
    #[error("model.safetensors: {0}")]
    Weights(#[from] SafetensorsError),
    /// A text that is too long to tokenise.
    #[error("the text has {bytes} bytes, more than the limit of {limit}: cut it into parts")]
    TextTooLong {
        /// Length of the text in bytes.
        bytes: usize,
        limit: usize,
    },
    /// A token id that does not exist.
    #[error("token id {token} is outside the vocabulary of {vocab}")]
    NoSuchToken {
        /// Token id that was given.
        token: u32,
        /// Size of the vocabulary.
        vocab: usize,
    },
    /// A prompt that does not exist.
    #[error("the model has no prompt called {name:?}: {}", known_prompts(known))]
    NoSuchPrompt {
        name: String,
        /// Names of the model's prompts.
        known: Vec<String>,
    },
}

fn known_prompts(known: &[String]) -> String {
    match known {
        [] => "it has none; leave it out, or give it some with `embed.prompts`".into(),
        names => format!("there are {}", names.join(", ")),
    }
}
