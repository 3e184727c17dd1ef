//! Text to tokens and back, from the tables under the `tokenizer.ggml` keys or from a `tokenizer.json`.
//!
//! Two families: byte-level BPE (`gpt2`: SmolLM2, Llama 3, Qwen) through the `tokenizers` crate, and
//! SentencePiece's merging by score (`llama`: Llama 2, TinyLlama, Mistral), which that crate has no model
//! for. Both give the token ids that llama.cpp gives; its golden files are the test.

mod bpe;
mod codec;
mod error;
mod hf;
mod limit;
mod merge;
mod names;
mod notation;
mod pre;
mod prompt;
mod read;
mod special;
mod spm;
#[cfg(test)]
pub(crate) mod testing;
mod vocab;

pub use codec::{EncodeOptions, Tokenizer};
pub use error::TokenizerError;
#[cfg(any(test, feature = "synth"))]
pub(crate) use notation::byte_char;
pub use prompt::Rendered;

#[cfg(test)]
mod tests;
