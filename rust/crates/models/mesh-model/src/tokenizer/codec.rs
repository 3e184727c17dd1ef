//! The tokenizer: encoding within limits, decoding, special tokens.

use mesh_base::tokens::ByteSpans;

use super::bpe::Bpe;
use super::error::TokenizerError;
use super::hf::Hf;
use super::limit::Limit;
use super::prompt::Rendered;
use super::special::{Fragment, SpecialFinder};
use super::spm::Spm;
use super::vocab::{TokenType, Vocab};

/// Converts text to token ids, and ids to bytes.
#[derive(Debug)]
pub struct Tokenizer {
    pub(super) vocab: Vocab,
    pub(super) algorithm: Algorithm,
    pub(super) special: SpecialFinder,
    pub(super) spans: Option<ByteSpans>,
    pub(super) bos: Option<u32>,
    pub(super) eos: Option<u32>,
    pub(super) end_ids: Vec<u32>,
    pub(super) add_bos: bool,
    pub(super) add_eos: bool,
}

#[derive(Debug)]
pub(super) enum Algorithm {
    Bpe(Box<Bpe>),
    Spm(Box<Spm>),
    Hf(Box<Hf>),
}

/// Options of [`Tokenizer::encode`] for tokens that are not plain text.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EncodeOptions {
    /// Put the begin and end tokens around the text where the model wants them.
    pub add_special: bool,
    /// Read the names of control tokens in the text (`<|im_start|>`) as those tokens. Never set it for a
    /// user's text, which could then forge turns of the conversation.
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
    /// For a prompt that a client wrote as the model is to read it, control tokens and all: turns of a format
    /// of its own, the parts of a text to fill in.
    pub const RAW_PROMPT: Self = EncodeOptions {
        add_special: true,
        parse_special: true,
    };
}

impl Tokenizer {
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

    /// Names of tokens that make up the structure of a prompt, which a client's text must not become: control
    /// tokens, and those that the chat template `source` writes in the same way.
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

    /// The token that the file names as the end of a sequence; see [`Tokenizer::eos_ids`] for all that end an
    /// answer.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// All tokens that end an answer: end of sequence, of turn, of message. The file's own end token comes
    /// first.
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
