//! What the engine needs to know about tokens: their bytes and which of them end an answer.

/// The tokens of a model as the text pipeline sees them.
///
/// `mesh_model::Tokenizer` implements it; tests bring vocabularies of a few tokens.
pub trait Vocabulary: Send + Sync {
    /// Number of token ids; valid ids are `0..size()`.
    fn size(&self) -> usize;

    /// Bytes that `token` adds to an answer, which may be part of a character; none for control tokens.
    fn text(&self, token: u32) -> &[u8];

    /// Whether `token` ends an answer.
    fn is_end(&self, token: u32) -> bool;
}
