//! Errors of tokenizers.

use crate::gguf::GgufError;

/// Errors of loading a tokenizer and of encoding text.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages name the fields")]
pub enum TokenizerError {
    /// A key is missing or of the wrong type.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// A tokenizer of another family.
    #[error(
        "tokenizer model {found:?} is not supported: use a model with a \"gpt2\" (BPE) or \"llama\" (SPM) tokenizer"
    )]
    Model { found: String },
    /// A pre-tokenizer that is not known; a guess could give wrong tokens silently.
    #[error(
        "pre-tokenizer {found:?} (tokenizer.ggml.pre) is not supported: it is newer than this program"
    )]
    PreTokenizer { found: String },
    /// A `tokenizer.json` that does not parse.
    #[error("tokenizer.json is malformed: {message}")]
    Json { message: String },
    /// A part of a `tokenizer.json` that is not known; without it, tokens could be wrong silently.
    #[error(
        "the tokenizer uses {what}, which is not supported: choose another model, or a GGUF file of it"
    )]
    Unsupported { what: String },
    /// Tables that contradict each other.
    #[error("the tokenizer's tables are malformed: {reason}")]
    Tables { reason: String },
    /// The text has more tokens than the caller allows.
    #[error("the text has more than {most} tokens; shorten it")]
    TooLong {
        /// The most that were asked for.
        most: usize,
    },
    /// A pre-tokenizer gave up on a text.
    #[error("the text cannot be tokenized: {reason}")]
    Encode {
        /// Cause, such as an error from the regex library.
        reason: String,
    },
}

/// The error for tables that contradict each other.
pub(super) fn malformed(reason: String) -> TokenizerError {
    TokenizerError::Tables { reason }
}

/// The error for a part of a `tokenizer.json` that is not known.
pub(super) fn unsupported(what: String) -> TokenizerError {
    TokenizerError::Unsupported { what }
}
