//! Errors of rendering.

use crate::gguf::GgufError;

/// Maximum number of the template engine's instructions for one rendering. A message takes a few dozen.
pub(super) const FUEL: u64 = 2_000_000;

/// Errors of rendering a conversation.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages name the fields")]
pub enum ChatError {
    /// The file's metadata is unusable.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// The template is longer than any real one.
    #[error(
        "the chat template has {bytes} bytes, over the limit of {limit}: the model file is damaged"
    )]
    TooLong {
        /// Length of the template in bytes.
        bytes: usize,
        /// The most that is accepted.
        limit: usize,
    },
    /// The template does not parse.
    #[error(
        "the model's chat template is invalid, so it cannot chat (/v1/completions works): {message}"
    )]
    Invalid { message: String },
    /// The template itself refused the conversation.
    #[error("the model's chat template refuses this conversation: {message}")]
    Refused { message: String },
    /// The last message cannot be continued.
    #[error("the last message cannot be continued: {reason}")]
    NotContinued { reason: &'static str },
    /// The template ran for too long.
    #[error(
        "the model's chat template did not end within {FUEL} steps: it is malformed or the conversation is too long"
    )]
    OutOfFuel,
    /// The template wrote too much.
    #[error("the conversation is longer than {limit} bytes as a prompt")]
    OutputTooLong {
        /// The most that is accepted.
        limit: usize,
    },
    /// Anything else that went wrong while it ran.
    #[error("the model's chat template failed: {message}")]
    Failed { message: String },
}
