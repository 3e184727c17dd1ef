//! Text to tokens and back, from the tables under the `tokenizer.ggml` keys or from a `tokenizer.json`.
//!
//! Two families: byte-level BPE (`gpt2`: SmolLM2, Llama 3, Qwen) through the `tokenizers` crate, and SentencePiece's merging
//! by score (`llama`: Llama 2, TinyLlama, Mistral), which that crate has no model for. Both give the token ids that
//! llama.cpp gives; its golden files are the test.

mod bpe;
mod hf;
mod keys;
mod merge;
mod names;
mod pre;
mod special;
mod spm;
mod vocab;

use crate::chat::Rendered;
use crate::checkpoint::{Checkpoint, TokenizerJson};
use crate::gguf::GgufError;

use mesh_base::tokens::{ByteCounts, ByteSpans};

use bpe::Bpe;
pub(crate) use bpe::byte_char;
use hf::Hf;
use special::{Fragment, SpecialTokens};
use spm::Spm;
use vocab::{TokenType, Vocab};

/// Converts text to token ids, and ids to bytes.
#[derive(Debug)]
pub struct Tokenizer {
    vocab: Vocab,
    algorithm: Algorithm,
    special: SpecialTokens,
    spans: Option<ByteSpans>,
    bos: Option<u32>,
    eos: Option<u32>,
    end_ids: Vec<u32>,
    add_bos: bool,
    add_eos: bool,
}

#[derive(Debug)]
enum Algorithm {
    Bpe(Box<Bpe>),
    Spm(Box<Spm>),
    Hf(Box<Hf>),
}

/// Options of [`Tokenizer::encode`] for tokens that are not plain text.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EncodeOptions {
    /// Put the begin and end tokens around the text where the model wants them.
    pub add_special: bool,
    /// Read the names of control tokens in the text (`<|im_start|>`) as those tokens. Never for text of a user alone: who
    /// writes such a name there would forge turns of the conversation.
    pub parse_special: bool,
}

impl EncodeOptions {
    /// For a prompt that a chat template wrote: it names its control tokens, the begin token among them.
    pub const RENDERED_CHAT: Self = EncodeOptions {
        add_special: false,
        parse_special: true,
    };
    /// For plain text that begins a sequence: data, in which nothing is a control token.
    pub const PLAIN: Self = EncodeOptions {
        add_special: true,
        parse_special: false,
    };
    /// For a prompt that a client wrote as the model is to read it, control tokens and all: turns of a format of its own, the
    /// parts of a text to fill in.
    pub const RAW_PROMPT: Self = EncodeOptions {
        add_special: true,
        parse_special: true,
    };
}

/// Errors of loading a tokenizer and of encoding text.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TokenizerError {
    /// A key is missing or of the wrong type.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// A tokenizer of another family.
    #[error(
        "tokenizer model {found:?} is not supported: use a model with a \"gpt2\" (BPE) or \"llama\" (SPM) tokenizer"
    )]
    Model {
        /// Tokenizer model in the file.
        found: String,
    },
    /// A pre-tokenizer that is not known; a guess could give wrong tokens silently.
    #[error(
        "pre-tokenizer {found:?} (tokenizer.ggml.pre) is not supported: it is newer than this program"
    )]
    PreTokenizer {
        /// Pre-tokenizer in the file.
        found: String,
    },
    /// A `tokenizer.json` that does not parse.
    #[error("tokenizer.json is malformed: {message}")]
    Json {
        /// Error from the parser, with its position.
        message: String,
    },
    /// A part of a `tokenizer.json` that is not known; without it, tokens could be wrong silently.
    #[error(
        "the tokenizer uses {what}, which is not supported: choose another model, or a GGUF file of it"
    )]
    Unsupported {
        /// Description of the part.
        what: String,
    },
    /// Tables that contradict each other.
    #[error("the tokenizer's tables are malformed: {reason}")]
    Tables {
        /// Description of the contradiction.
        reason: String,
    },
    /// The text has more tokens than the caller allows.
    #[error("the text has more than {most} tokens; shorten it")]
    TooLong {
        /// The most that were asked for.
        most: usize,
    },
    /// A pre-tokenizer gave up on a text.
    #[error("the text cannot be tokenized: {reason}")]
    Encode {
        /// Cause, such as an error from the regex library.
        reason: String,
    },
}

impl Tokenizer {
    /// The tokenizer of a model whose embedding has `rows` rows.
    ///
    /// # Errors
    /// If tables are missing, malformed, or of a kind that is not supported.
    pub fn read(checkpoint: &dyn Checkpoint, rows: usize) -> Result<Self, TokenizerError> {
        match checkpoint.tokenizer_json() {
            Some(TokenizerJson { json, special }) => Self::from_hugging_face(json, special, rows),
            None => Self::from_keys(checkpoint),
        }
    }

    /// Converts `text` to token ids.
    ///
    /// # Errors
    /// If the pre-tokenizer gives up on the text, which takes a text made for it.
    pub fn encode(&self, text: &str, options: EncodeOptions) -> Result<Vec<u32>, TokenizerError> {
        self.encode_between(text, &[], options, usize::MAX)
    }

    /// Like [`Tokenizer::encode`], for at most `most` tokens. Time and memory are bounded by that number, not
    /// by the text.
    ///
    /// # Errors
    /// [`TokenizerError::TooLong`] if there are more; else as [`Tokenizer::encode`].
    pub fn encode_within(
        &self,
        text: &str,
        options: EncodeOptions,
        most: usize,
    ) -> Result<Vec<u32>, TokenizerError> {
        self.encode_between(text, &[], options, most)
    }

    /// Converts a rendered prompt to token ids: the template's names of special tokens are read, those in the
    /// text of clients are not.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_prompt(&self, prompt: &Rendered) -> Result<Vec<u32>, TokenizerError> {
        self.encode_prompt_within(prompt, usize::MAX)
    }

    /// Like [`Tokenizer::encode_prompt`], for at most `most` tokens; see [`Tokenizer::encode_within`].
    ///
    /// # Errors
    /// As [`Tokenizer::encode_within`].
    pub fn encode_prompt_within(
        &self,
        prompt: &Rendered,
        most: usize,
    ) -> Result<Vec<u32>, TokenizerError> {
        let options = EncodeOptions::RENDERED_CHAT;
        self.encode_between(&prompt.text, &prompt.barriers, options, most)
    }

    /// Maximum length of a token over each byte of a text; `None` if encoding may lose bytes.
    pub fn spans(&self) -> Option<&ByteSpans> {
        self.spans.as_ref()
    }

    fn encode_between(
        &self,
        text: &str,
        barriers: &[usize],
        options: EncodeOptions,
        most: usize,
    ) -> Result<Vec<u32>, TokenizerError> {
        let limit = Limit(most);
        if let Some(spans) = &self.spans {
            limit.check_text(text, spans)?;
        }
        let mut ids = Vec::with_capacity((text.len() / 4).min(most) + 2);
        let begin = self.bos.filter(|_| options.add_special && self.add_bos);
        // A client that writes the token out wants it once.
        let written =
            options.parse_special && begin.is_some_and(|id| self.special.begins(text, id));
        if !written {
            ids.extend(begin);
        }
        // SentencePiece puts a space before text that begins a sequence or follows a special token.
        let mut after_special = true;
        let mut begins = true;
        let fragments = self
            .special
            .split(text, options.parse_special, barriers, most);
        for fragment in fragments.ok_or(TokenizerError::TooLong { most })? {
            match fragment {
                Fragment::Token(id) => ids.push(id),
                Fragment::Text(text) => match &self.algorithm {
                    Algorithm::Bpe(bpe) => bpe.encode(text, &mut ids, limit)?,
                    Algorithm::Spm(spm) => spm.encode(text, after_special, &mut ids, limit)?,
                    Algorithm::Hf(hf) => hf.encode(text, begins, &mut ids, limit)?,
                },
            }
            limit.check(&ids)?;
            begins = false;
            after_special = matches!(fragment, Fragment::Token(_));
        }
        if options.add_special && self.add_eos {
            ids.extend(self.eos);
            limit.check(&ids)?;
        }
        Ok(ids)
    }

    /// Bytes of a token; for a control token its name. Empty for an id outside the vocabulary.
    ///
    /// One token may hold part of a character only: put them together with [`crate::TextStream`].
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.vocab.bytes(id)
    }

    /// True for control tokens, which are not part of an answer's text.
    pub fn is_special(&self, id: u32) -> bool {
        matches!(
            self.vocab.token_type(id),
            TokenType::Control | TokenType::Unknown
        )
    }

    /// The special token whose name `text` begins with, the longest one.
    pub fn special_at(&self, text: &str) -> Option<u32> {
        self.special.at(text)
    }

    /// Names of tokens that make up the structure of a prompt, which a client's text must not become: control tokens, and
    /// those that the chat template `source` writes in the same way.
    pub(crate) fn structural(&self, source: &str) -> impl Iterator<Item = &str> {
        self.vocab
            .special()
            .filter(move |&(text, id)| match self.vocab.token_type(id) {
                TokenType::UserDefined => {
                    let dressed = text.starts_with("<|") || text.starts_with("<\u{ff5c}");
                    dressed && source.contains(text) || self.end_ids.contains(&id)
                }
                _ => true,
            })
            .map(|(text, _)| text)
    }

    /// The token that begins a sequence.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The token that the file names as the end of a sequence; see [`Tokenizer::eos_ids`] for all that end an answer.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// All tokens that end an answer: end of sequence, of turn, of message. The file's own end token comes first.
    pub fn eos_ids(&self) -> &[u32] {
        &self.end_ids
    }

    /// True if plain text begins with the begin token.
    pub fn adds_bos(&self) -> bool {
        self.add_bos && self.bos.is_some()
    }

    /// Number of tokens; ids are `0..vocab_size`. The embedding may have more rows.
    pub fn vocab_size(&self) -> usize {
        self.vocab.len()
    }

    /// The token with this name, as the file spells it: for control tokens their text.
    pub fn token_id(&self, name: &str) -> Option<u32> {
        self.vocab.find(name)
    }

    /// The text of `ids` without control tokens.
    pub fn decode(&self, ids: &[u32]) -> String {
        let bytes: Vec<u8> = ids
            .iter()
            .filter(|&&id| !self.is_special(id))
            .flat_map(|&id| self.token_bytes(id))
            .copied()
            .collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

/// The most tokens that a text may become.
#[derive(Debug, Clone, Copy)]
struct Limit(usize);

impl Limit {
    fn check(self, ids: &[u32]) -> Result<(), TokenizerError> {
        match ids.len() > self.0 {
            true => Err(TokenizerError::TooLong { most: self.0 }),
            false => Ok(()),
        }
    }

    /// Rejects a text that is too long by its number of bytes, before tokenising it.
    fn check_text(self, text: &str, spans: &ByteSpans) -> Result<(), TokenizerError> {
        if text.len() <= self.0 {
            return Ok(());
        }
        match spans.least_tokens(&ByteCounts::of(text)) > self.0 as u64 {
            true => Err(TokenizerError::TooLong { most: self.0 }),
            false => Ok(()),
        }
    }
}

/// The longest token over each byte of a text that becomes tokens of `vocab`, all of it.
fn spans(vocab: &Vocab, family: Family) -> ByteSpans {
    let mut spans = ByteSpans::of_characters();
    for id in 0..vocab.len() as u32 {
        let (written, bytes) = (vocab.text(id).as_bytes(), vocab.bytes(id));
        let len = written.len().max(bytes.len());
        match (family, vocab.token_type(id)) {
            // Spelled in an alphabet of its own, whose characters are longer.
            (Family::Bpe, TokenType::Normal | TokenType::Unused) => {
                spans.cover(bytes, bytes.len());
            }
            (Family::Bpe, _) => {
                let mut plain = Vec::new();
                bpe::push_bytes(vocab.text(id), &mut plain);
                spans.cover(&plain, len);
                spans.cover(written, len);
            }
            // A "▁" covers a space, or itself.
            (Family::Spm, _) => {
                let mut plain = Vec::new();
                spm::push_bytes(vocab.text(id), &mut plain);
                spans.cover(&plain, len);
                spans.cover(bytes, len);
                spans.cover(written, len);
            }
        }
    }
    spans
}

/// Notation of token texts in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Family {
    /// Byte-level BPE: every byte is written as one printable character.
    Bpe,
    /// SentencePiece: "▁" is a space, `<0xNN>` a byte.
    Spm,
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;
    use crate::gguf::Gguf;
    use crate::gguf::writer::{OwnedValue, Writer};

    /// A vocabulary of bytes with these tokens besides, each with its type.
    pub(crate) fn bytes_with(more: &[(&str, i32)]) -> Tokenizer {
        let mut tokens = vec![("<unk>".to_owned(), 2)];
        tokens.extend((0..=255).map(|byte| (format!("<0x{byte:02X}>"), 6)));
        tokens.extend(more.iter().map(|(name, ty)| ((*name).to_owned(), *ty)));
        let mut writer = Writer::new();
        writer
            .key("tokenizer.ggml.model", OwnedValue::String("llama".into()))
            .key(
                "tokenizer.ggml.scores",
                OwnedValue::F32s(vec![0.0; tokens.len()]),
            )
            .key(
                "tokenizer.ggml.token_type",
                OwnedValue::I32s(tokens.iter().map(|token| token.1).collect()),
            )
            .key(
                "tokenizer.ggml.tokens",
                OwnedValue::Strings(tokens.into_iter().map(|token| token.0).collect()),
            );
        let bytes = writer.to_bytes(|_, _, _| Vec::new()).unwrap();
        Tokenizer::from_keys(&Gguf::from_bytes(bytes).unwrap()).unwrap()
    }
}

#[cfg(test)]
mod tests;
