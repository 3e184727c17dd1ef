//! Limits on the number of tokens.

use mesh_base::tokens::{ByteCounts, ByteSpans};

use super::error::TokenizerError;

/// The most tokens that a text may become.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limit(pub(super) usize);

impl Limit {
    pub(super) fn check(self, ids: &[u32]) -> Result<(), TokenizerError> {
        match ids.len() > self.0 {
            true => Err(TokenizerError::TooLong { most: self.0 }),
            false => Ok(()),
        }
    }

    /// Rejects a text that is too long by its number of bytes, before tokenising it.
    pub(super) fn check_text(self, text: &str, spans: &ByteSpans) -> Result<(), TokenizerError> {
        if text.len() <= self.0 {
            return Ok(());
        }
        match spans.least_tokens(&ByteCounts::of(text)) > self.0 as u64 {
            true => Err(TokenizerError::TooLong { most: self.0 }),
            false => Ok(()),
        }
    }
}
