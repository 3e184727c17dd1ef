//! Embeddings: the encoder trait, the scheduler that forms batches, and the workload of both.
//!
//! An [`Encoder`] turns token sequences into vectors. The [`scheduler`] decides which sequences of which requests share a
//! batch; it does no I/O and reads no clock. An [`Engine`](crate::Engine) of an [`Embedding`] is the thread that owns both.
//! Callers pass token sequences and receive vectors; no tensor appears in the API.

pub mod scheduler;
mod workload;

pub use workload::Embedding;

use std::time::Instant;

use crate::StageError;

/// Dimensions and limits of a loaded encoder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EncoderInfo {
    /// Length of a vector.
    pub dimensions: usize,
    /// Most tokens of one sequence.
    pub max_tokens: usize,
    /// Tokens in the vocabulary.
    pub vocab: usize,
    /// Most tokens in one call, over all sequences; a single sequence may always be `max_tokens` long.
    pub max_rows: usize,
    /// Bytes of weights held in memory.
    pub weight_bytes: u64,
}

/// A loaded embedding model.
///
/// A vector depends, bit for bit, on its own sequence only: neither on other sequences of the call nor on the
/// number of threads. Calls are synchronous and use the encoder's own threads.
pub trait Encoder: Send {
    /// Dimensions and limits of this encoder.
    fn info(&self) -> &EncoderInfo;

    /// The vectors of `sequences`, which are of any lengths from 1 to `max_tokens`: row-major `[sequences, dimensions]`, pooled and
    /// normalised as the model says.
    ///
    /// # Errors
    /// If a sequence is empty or too long, a token does not exist, or the engine fails. It can be used on after that.
    fn encode(&mut self, sequences: &[&[u32]]) -> Result<Vec<f32>, StageError>;
}

/// Texts to embed, as tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EmbedRequest {
    /// Request id, used in logs only.
    pub id: String,
    /// One sequence per text, with the tokens that begin and end it.
    pub sequences: Vec<Vec<u32>>,
    /// Time after which the answer is useless; `None` means no limit.
    pub deadline: Option<Instant>,
}

/// Cuts `vector` to its first `dimensions` numbers and scales the rest to length 1, for embedding models
/// trained with nested dimensions. A vector of length 0 stays as it is.
pub fn shorten(vector: &mut Vec<f32>, dimensions: usize) {
    if dimensions >= vector.len() {
        return;
    }
    vector.truncate(dimensions);
    let square: f64 = vector.iter().map(|&x| f64::from(x).powi(2)).sum();
    let length = square.sqrt();
    if length > 0.0 {
        for x in vector {
            *x = (f64::from(*x) / length) as f32;
        }
    }
}
