//! Byte-level BPE, the `gpt2` tokenizer model of GGUF files.
//!
//! Text is cut into words by the pre-tokenizer; each word's bytes are written as printable characters and
//! merged by rank by the `tokenizers` crate. Its objects are built directly: through its JSON format it takes
//! many times as long.

use tokenizers::models::bpe::{BPE, Vocab as BpeVocab};

use super::error::{TokenizerError, malformed};
use super::limit::Limit;
use super::merge::{LongWords, Unknown, push_tokens};
use super::notation::{byte_char, text_bytes};
use super::pre::PreTokenizer;
use super::vocab::{Vocab, wrong_elements};
use crate::checkpoint::Checkpoint;

#[derive(Debug)]
pub(super) struct Bpe {
    pre: PreTokenizer,
    model: BPE,
    long: LongWords,
}

impl Bpe {
    pub(super) fn from_keys(
        checkpoint: &dyn Checkpoint,
        vocab: &Vocab,
    ) -> Result<Self, TokenizerError> {
        let name = checkpoint.string("tokenizer.ggml.pre")?.unwrap_or_else(|| {
            tracing::warn!("the model file names no pre-tokenizer (tokenizer.ggml.pre): the default may give worse tokens");
            "default"
        });
        let pre = PreTokenizer::from_name(name)
            .ok_or_else(|| TokenizerError::PreTokenizer { found: name.into() })?;
        let mut ids = BpeVocab::with_capacity_and_hasher(vocab.len(), Default::default());
        for (id, text) in vocab.texts().enumerate() {
            ids.insert(text.to_owned(), id as u32);
        }
        let merges = read_merges(checkpoint, &ids)?;
        let long = LongWords::new(&ids, &merges, Unknown::default());
        let model = BPE::builder()
            .vocab_and_merges(ids, merges)
            .ignore_merges(pre.whole_words_first())
            .build()
            .map_err(|error| malformed(error.to_string()))?;
        Ok(Bpe { pre, model, long })
    }

    /// True if plain text begins with the begin token unless the file says otherwise.
    pub(super) fn adds_bos(&self) -> bool {
        self.pre.adds_bos()
    }

    /// The bytes that are lost, because the vocabulary has nothing for them.
    pub(super) fn lost(&self) -> impl Iterator<Item = u8> + '_ {
        text_bytes().filter(|&byte| !self.long.knows(byte_char(byte)))
    }

    pub(super) fn encode(
        &self,
        text: &str,
        ids: &mut Vec<u32>,
        limit: Limit,
    ) -> Result<(), TokenizerError> {
        let mut word = String::new();
        self.pre.each_word(text, &mut |piece| {
            let spelled = piece.bytes().map(byte_char);
            if self.long.takes(piece) {
                self.long.encode(spelled, ids);
                return limit.check(ids);
            }
            word.clear();
            word.extend(spelled);
            push_tokens(&self.model, &word, ids)?;
            limit.check(ids)
        })
    }
}

/// The pairs to merge, by rank. Pairs that name or make no token cannot be used and are left out.
fn read_merges(
    checkpoint: &dyn Checkpoint,
    ids: &BpeVocab,
) -> Result<Vec<(String, String)>, TokenizerError> {
    const KEY: &str = "tokenizer.ggml.merges";
    let array = checkpoint.require_array(KEY)?;
    let strings = array.strings();
    let strings = strings.ok_or_else(|| wrong_elements(KEY, array, "strings"))?;
    let mut merges = Vec::with_capacity(array.len());
    let mut merged = String::new();
    for (rank, pair) in strings.enumerate() {
        let pair = std::str::from_utf8(pair)
            .map_err(|_| malformed(format!("merge {rank} is not valid UTF-8")))?;
        // The first character is never the separator: a token may itself begin with a space.
        let second = pair.chars().next().map_or(0, char::len_utf8);
        let (left, right) = match pair[second..].find(' ') {
            Some(at) => (&pair[..second + at], &pair[second + at + 1..]),
            None => {
                return Err(malformed(format!(
                    "merge {rank} is {pair:?}, not two tokens with a space between"
                )));
            }
        };
        merged.clear();
        merged.push_str(left);
        merged.push_str(right);
        if ids.contains_key(left) && ids.contains_key(right) && ids.contains_key(&merged) {
            merges.push((left.to_owned(), right.to_owned()));
        }
    }
    Ok(merges)
}
