//! Prompts as the text encoders want them: chunks of 75 tokens, each token with a weight.
//!
//! `(word)` multiplies the weight of a word by 1.1, `[word]` divides it by 1.1, `(word:1.3)` multiplies it by 1.3; brackets nest,
//! and one that is not closed counts up to the end. `\(`, `\)`, `\[`, `\]` and `\\` are the plain characters. That is the
//! notation of AUTOMATIC1111's web interface.

mod weights;

use crate::tokenizer::{ClipTokenizer, TokenizerError};

pub use weights::{Segment, parse, weigh};

/// A tokenised prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct Prompt {
    /// At least one.
    pub chunks: Vec<Chunk>,
    /// Token that begins each chunk.
    pub start: u32,
    /// Token that ends each chunk.
    pub end: u32,
}

/// Up to [`CHUNK_TOKENS`] tokens of a prompt.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Chunk {
    /// Token ids.
    pub tokens: Vec<u32>,
    /// Weight of each token.
    pub weights: Vec<f32>,
}

/// Errors in a prompt.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages name the fields")]
pub enum PromptError {
    /// Too many bytes.
    #[error("it has {bytes} bytes, more than the limit of {MOST_BYTES}; shorten it")]
    TooLong { bytes: usize },
    /// Too many tokens.
    #[error("it has over {limit} tokens; shorten it")]
    TooManyTokens { limit: usize },
    /// Brackets in brackets in brackets.
    #[error(
        "its brackets are nested over {limit} deep; write the weight as in (word:1.3), or \\( for a plain bracket"
    )]
    TooDeep { limit: usize },
    /// A weight that is out of range, with all brackets around it.
    #[error("{text:?} has weight {weight}, but weights are 0 to {MOST_WEIGHT}")]
    Weight { text: String, weight: f32 },
    /// The tokenizer failed.
    #[error("it cannot be tokenised: {0}")]
    Tokenizer(String),
}

impl Prompt {
    /// The prompt `text`, with weights, cut into chunks.
    ///
    /// # Errors
    /// If it is too long or a weight is out of range.
    pub fn new(tokenizer: &ClipTokenizer, text: &str) -> Result<Self, PromptError> {
        let most = MOST_CHUNKS * CHUNK_TOKENS;
        let mut prompt = Prompt {
            chunks: vec![Chunk::default()],
            start: tokenizer.start(),
            end: tokenizer.end(),
        };
        let mut count = 0;
        for segment in parse(text)? {
            let tokens = tokenizer.encode(&segment.text, most - count);
            let tokens = tokens.map_err(|error| match error {
                TokenizerError::TooManyTokens { .. } => PromptError::TooManyTokens { limit: most },
                error => PromptError::Tokenizer(error.to_string()),
            })?;
            count += tokens.len();
            for token in tokens {
                prompt.push(token, segment.weight);
            }
        }
        Ok(prompt)
    }

    fn push(&mut self, token: u32, weight: f32) {
        let full = |chunk: &Chunk| chunk.tokens.len() >= CHUNK_TOKENS;
        if self.chunks.last().is_none_or(full) {
            self.chunks.push(Chunk::default());
        }
        if let Some(chunk) = self.chunks.last_mut() {
            chunk.tokens.push(token);
            chunk.weights.push(weight);
        }
    }

    /// Adds empty chunks until there are `chunks`, for a prompt and a negative prompt of different lengths.
    pub fn extend_to(&mut self, chunks: usize) {
        if self.chunks.len() < chunks.min(MOST_CHUNKS) {
            self.chunks
                .resize(chunks.min(MOST_CHUNKS), Chunk::default());
        }
    }

    /// True if the prompt has no tokens.
    pub fn is_empty(&self) -> bool {
        self.chunks.iter().all(|chunk| chunk.tokens.is_empty())
    }

    /// True if every weight is 1.
    pub fn is_plain(&self) -> bool {
        let mut weights = self.chunks.iter().flat_map(|chunk| &chunk.weights);
        weights.all(|&weight| weight == 1.0)
    }

    /// The 77 ids of each chunk: start, tokens, end, and `pad` up to the end. Most text encoders pad with [`Prompt::end`],
    /// the second one of XL and the one of Stable Diffusion 2 with token 0, `!`.
    pub fn ids(&self, pad: u32) -> Vec<[u32; CHUNK_TOKENS + 2]> {
        let ids = |chunk: &Chunk| {
            let mut ids = [pad; CHUNK_TOKENS + 2];
            ids[0] = self.start;
            for (id, &token) in ids[1..=CHUNK_TOKENS].iter_mut().zip(&chunk.tokens) {
                *id = token;
            }
            ids[chunk.tokens.len().min(CHUNK_TOKENS) + 1] = self.end;
            ids
        };
        self.chunks.iter().map(ids).collect()
    }

    /// The weights of the 77 tokens of each chunk: 1 for start, end and padding.
    pub fn weights(&self) -> Vec<[f32; CHUNK_TOKENS + 2]> {
        let weights = |chunk: &Chunk| {
            let mut weights = [1.0; CHUNK_TOKENS + 2];
            for (weight, &of) in weights[1..=CHUNK_TOKENS].iter_mut().zip(&chunk.weights) {
                *weight = of;
            }
            weights
        };
        self.chunks.iter().map(weights).collect()
    }
}

/// Tokens of a chunk without those that begin and end it.
pub const CHUNK_TOKENS: usize = 75;
/// Most chunks of a prompt.
pub const MOST_CHUNKS: usize = 8;
/// Most bytes of a prompt.
pub const MOST_BYTES: usize = 16 << 10;
/// Largest weight.
pub const MOST_WEIGHT: f32 = 10.0;
