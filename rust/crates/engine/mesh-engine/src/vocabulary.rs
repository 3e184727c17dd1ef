//! The engine's view of tokens: their bytes, and which of them end an answer.

use mesh_model::Model;

/// The tokens of a model as the text pipeline sees them. A [`Model`] is one; tests bring vocabularies of a few tokens.
pub trait Vocabulary: Send + Sync {
    /// Number of token ids; valid ids are `0..size()`.
    fn size(&self) -> usize;

    /// Bytes that `token` adds to an answer, which may be part of a character; none for control tokens.
    fn text(&self, token: u32) -> &[u8];

    /// True if `token` ends an answer.
    fn is_end(&self, token: u32) -> bool;
}

impl Vocabulary for Model {
    fn size(&self) -> usize {
        self.tokenizer().vocab_size()
    }

    fn text(&self, token: u32) -> &[u8] {
        if self.tokenizer().is_special(token) || Model::is_end(self, token) {
            return &[];
        }
        self.tokenizer().token_bytes(token)
    }

    fn is_end(&self, token: u32) -> bool {
        Model::is_end(self, token)
    }
}
