//! Byte-level BPE, the `gpt2` tokenizer model of GGUF files.
//!
//! Text is cut into words by the pre-tokenizer; each word's bytes are written as printable characters and merged by rank by
//! the `tokenizers` crate. Its objects are built directly: through its JSON format it takes many times as long.

use std::sync::LazyLock;

use tokenizers::Model;
use tokenizers::models::bpe::{BPE, Vocab as BpeVocab};

use super::merge::{LongWords, Unknown};
use super::pre::PreTokenizer;
use super::vocab::{Vocab, malformed, wrong_elements};
use super::{Limit, TokenizerError};
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
            let spelled = piece.bytes().map(|byte| ALPHABET.chars[byte as usize]);
            if self.long.takes(piece) {
                self.long.encode(spelled, ids);
                return limit.check(ids);
            }
            word.clear();
            word.extend(spelled);
            let tokens = self
                .model
                .tokenize(&word)
                .map_err(|error| TokenizerError::Encode {
                    reason: error.to_string(),
                })?;
            ids.extend(tokens.iter().map(|token| token.id));
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

/// Appends the bytes of a token's text; characters outside the alphabet are kept.
pub(super) fn push_bytes(text: &str, out: &mut Vec<u8>) {
    for c in text.chars() {
        match ALPHABET.byte(c) {
            Some(byte) => out.push(byte),
            None => out.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
}

/// The bytes that occur in UTF-8. Some vocabularies lack the others.
pub(super) fn text_bytes() -> impl Iterator<Item = u8> {
    (0..=0xf4).filter(|byte| !matches!(byte, 0xc0 | 0xc1))
}

/// The character that a byte is written as.
pub(crate) fn byte_char(byte: u8) -> char {
    ALPHABET.chars[byte as usize]
}

/// GPT-2's alphabet: each byte as one printable character. Printable Latin-1 stands for itself, the other 68 bytes follow
/// from U+0100 on in order.
struct Alphabet {
    chars: [char; 256],
    /// Bytes of the characters up to U+0143, the last one used.
    bytes: [Option<u8>; 0x144],
}

static ALPHABET: LazyLock<Alphabet> = LazyLock::new(|| {
    let mut alphabet = Alphabet {
        chars: ['\0'; 256],
        bytes: [None; 0x144],
    };
    let mut next = 0x100;
    for byte in 0..=255u8 {
        let code = match byte {
            b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => u32::from(byte),
            _ => {
                next += 1;
                next - 1
            }
        };
        alphabet.chars[byte as usize] = char::from_u32(code).expect("below the surrogates");
        alphabet.bytes[code as usize] = Some(byte);
    }
    alphabet
});

impl Alphabet {
    fn byte(&self, c: char) -> Option<u8> {
        self.bytes.get(c as usize).copied().flatten()
    }
}
