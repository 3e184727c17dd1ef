//! Hugging Face's `tokenizer.json`, as far as the supported families use it: BPE over bytes (Llama 3, Qwen,
//! SmolLM) and over SentencePiece's alphabet with byte fallback (Llama 2, Mistral, Gemma).
//!
//! The file is read within limits and its parts are built directly. What the `tokenizers` crate does with
//! them is done here, with two exceptions that make it safe for a file from anywhere: patterns are run by an
//! engine that gives up instead of running on, and every step may only lengthen the text so far. Merging is
//! the crate's. Special tokens are found as in GGUF files, so that a user's text cannot forge them.

mod build;
mod json;
mod steps;

use mesh_base::tokens::ByteSpans;
use tokenizers::models::bpe::BPE;

use super::error::TokenizerError;
use super::limit::Limit;
use super::merge::{LongWords, push_tokens};
use steps::{Changes, Normalizer, PreTokenizerStep};

/// A tokenizer from `tokenizer.json`: the steps from text to words, and from words to tokens.
#[derive(Debug)]
pub(super) struct Hf {
    normalizers: Vec<Normalizer>,
    pre: Vec<PreTokenizerStep>,
    model: BPE,
    long: LongWords,
    /// Spans of normalized text; `None` if tokenizing may lose bytes.
    spans: Option<ByteSpans>,
}

impl Hf {
    /// Appends the tokens of `text`, which `begins` the whole text or follows a special token in it.
    pub(super) fn encode(
        &self,
        text: &str,
        begins: bool,
        ids: &mut Vec<u32>,
        limit: Limit,
    ) -> Result<(), TokenizerError> {
        let normal = steps::normalize(&self.normalizers, text)?;
        if let Some(spans) = &self.spans {
            limit.check_text(&normal, spans)?;
        }
        // Where characters are lost, a word need not become a token.
        let words = match self.spans {
            Some(_) => limit,
            None => Limit(usize::MAX),
        };
        for word in steps::split(&self.pre, &normal, begins, words)? {
            if self.long.takes(&word) {
                self.long.encode(word.chars(), ids);
                limit.check(ids)?;
                continue;
            }
            push_tokens(&self.model, &word, ids)?;
            limit.check(ids)?;
        }
        Ok(())
    }

    /// Spans of the text before the normalizers.
    fn spans_before(&self) -> Option<ByteSpans> {
        let mut spans = self.spans.clone()?;
        for step in &self.normalizers {
            match step.changes() {
                Changes::Nothing => {}
                Changes::BeyondAscii => spans.forget_beyond_ascii(),
                Changes::Anything => return None,
            }
        }
        Some(spans)
    }
}

#[cfg(test)]
mod tests;
