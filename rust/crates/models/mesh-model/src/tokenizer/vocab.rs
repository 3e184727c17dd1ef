//! The token table: text, bytes and kind of every token.

use std::collections::HashMap;

use mesh_base::tokens::ByteSpans;

use super::error::{TokenizerError, malformed};
use super::names::{END_NAMES, is_control};
use super::notation::{Notation, byte_of};
use crate::checkpoint::Checkpoint;
use crate::gguf::Array;

/// Type of a token, with the numbers of `tokenizer.ggml.token_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TokenType {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

impl TokenType {
    /// The type of a token with this text, corrected by its name; llama.cpp overrides types likewise.
    fn corrected(self, text: &str) -> Self {
        match self {
            TokenType::Normal | TokenType::UserDefined if is_control(text) => TokenType::Control,
            _ => self,
        }
    }
}

/// All tokens of a model.
#[derive(Debug)]
pub(super) struct Vocab {
    texts: Packed,
    bytes: Packed,
    types: Vec<TokenType>,
    /// Control and user-defined tokens by text.
    special: HashMap<Box<str>, u32>,
    /// Tokens that are control tokens by their names only.
    overridden: Vec<u32>,
}

/// Far more than any model has; keeps ids well within a `u32`.
const MAX_TOKENS: usize = 1 << 24;

impl Vocab {
    pub(super) fn from_keys(
        checkpoint: &dyn Checkpoint,
        notation: Notation,
    ) -> Result<Self, TokenizerError> {
        const KEY: &str = "tokenizer.ggml.tokens";
        let tokens = checkpoint.require_array(KEY)?;
        if tokens.is_empty() || tokens.len() > MAX_TOKENS {
            return Err(malformed(format!(
                "{KEY} has {} tokens, it must have from 1 to {MAX_TOKENS}",
                tokens.len()
            )));
        }
        let types = read_types(checkpoint, tokens.len())?;
        let strings = tokens.strings();
        let strings = strings.ok_or_else(|| wrong_elements(KEY, tokens, "strings"))?;
        let mut texts = Vec::with_capacity(tokens.len());
        for (id, text) in strings.enumerate() {
            let text = std::str::from_utf8(text)
                .map_err(|_| malformed(format!("token {id} is not valid UTF-8")))?;
            texts.push(text);
        }
        Self::new(notation, texts.into_iter().zip(types))
    }

    /// Creates the table from tokens by id, each with its text and type.
    pub(super) fn new<'a>(
        notation: Notation,
        tokens: impl ExactSizeIterator<Item = (&'a str, TokenType)>,
    ) -> Result<Self, TokenizerError> {
        let mut texts = Packed::with_capacity(tokens.len());
        let mut bytes = Packed::with_capacity(tokens.len());
        let mut types = Vec::with_capacity(tokens.len());
        let mut special = HashMap::new();
        let mut piece = Vec::new();
        let mut overridden = Vec::new();
        for (id, (text, told)) in tokens.enumerate() {
            piece.clear();
            let ty = told.corrected(text);
            if ty != told {
                overridden.push(id as u32);
            }
            match (notation, ty) {
                (_, TokenType::Control | TokenType::Unknown | TokenType::UserDefined) => {
                    piece.extend_from_slice(text.as_bytes());
                    special.insert(text.into(), id as u32);
                }
                (Notation::Spm, TokenType::Byte) => match byte_of(text) {
                    Some(byte) => piece.push(byte),
                    None => {
                        return Err(malformed(format!(
                            "byte token {id} is {text:?}, not like <0x0A>"
                        )));
                    }
                },
                _ => notation.push_bytes(text, &mut piece),
            }
            texts.push(text.as_bytes())?;
            bytes.push(&piece)?;
            types.push(ty);
        }
        Ok(Vocab {
            texts,
            bytes,
            types,
            special,
            overridden,
        })
    }

    pub(super) fn len(&self) -> usize {
        self.types.len()
    }

    /// The token's text as the file spells it.
    pub(super) fn text(&self, id: u32) -> &str {
        std::str::from_utf8(self.texts.get(id)).expect("checked when it was read")
    }

    pub(super) fn texts(&self) -> impl Iterator<Item = &str> {
        (0..self.len() as u32).map(|id| self.text(id))
    }

    pub(super) fn bytes(&self, id: u32) -> &[u8] {
        self.bytes.get(id)
    }

    pub(super) fn token_type(&self, id: u32) -> TokenType {
        self.types
            .get(id as usize)
            .copied()
            .unwrap_or(TokenType::Unused)
    }

    /// The token with this text. Fast for special tokens, a search through all for the others.
    pub(super) fn find(&self, text: &str) -> Option<u32> {
        if let Some(&id) = self.special.get(text) {
            return Some(id);
        }
        // Of equal texts the last counts, as in the encoders.
        (0..self.len() as u32)
            .rev()
            .find(|&id| self.text(id) == text)
    }

    /// The control or user-defined token with this text.
    pub(super) fn find_special(&self, text: &str) -> Option<u32> {
        self.special.get(text).copied()
    }

    /// Tokens that the file gives the type of ordinary text, and that are control tokens by their names.
    pub(super) fn overridden(&self) -> impl Iterator<Item = (&str, u32)> {
        self.overridden.iter().map(|&id| (self.text(id), id))
    }

    /// Control, unknown and user-defined tokens with their texts.
    pub(super) fn special(&self) -> impl Iterator<Item = (&str, u32)> {
        self.special.iter().map(|(text, &id)| (&**text, id))
    }

    /// All tokens that end an answer: those that the files list, then those with a name for it.
    pub(super) fn ends(&self, listed: impl Iterator<Item = u32>) -> Vec<u32> {
        // In this format it ends a message, of which an answer has several.
        let several = ["<|return|>", "<|call|>"]
            .iter()
            .all(|name| self.find_special(name).is_some());
        let named = END_NAMES
            .iter()
            .filter(|name| !(several && **name == "<|end|>"))
            .filter_map(|name| self.find_special(name))
            .filter(|&id| self.token_type(id) == TokenType::Control);
        let mut ends: Vec<u32> = Vec::new();
        for id in listed.chain(named) {
            if !ends.contains(&id) {
                ends.push(id);
            }
        }
        let unlisted = self.overridden().filter(|(_, id)| ends.contains(id));
        for (name, _) in unlisted {
            tracing::warn!(
                token = name,
                "the file gives this token the type of ordinary text; by its name it ends answers, and does so here"
            );
        }
        ends
    }

    /// The longest token over each byte of a text that becomes tokens of this vocabulary, all of it.
    pub(super) fn spans(&self, notation: Notation) -> ByteSpans {
        let mut spans = ByteSpans::of_characters();
        for id in 0..self.len() as u32 {
            let (written, bytes) = (self.text(id).as_bytes(), self.bytes(id));
            let len = written.len().max(bytes.len());
            match (notation, self.token_type(id)) {
                // Spelled in an alphabet of its own, whose characters are longer.
                (Notation::Bpe, TokenType::Normal | TokenType::Unused) => {
                    spans.cover(bytes, bytes.len());
                }
                (Notation::Bpe, _) => {
                    let mut plain = Vec::new();
                    notation.push_bytes(self.text(id), &mut plain);
                    spans.cover(&plain, len);
                    spans.cover(written, len);
                }
                // A "▁" covers a space, or itself.
                (Notation::Spm, _) => {
                    let mut plain = Vec::new();
                    notation.push_bytes(self.text(id), &mut plain);
                    spans.cover(&plain, len);
                    spans.cover(bytes, len);
                    spans.cover(written, len);
                }
            }
        }
        spans
    }
}

fn read_types(
    checkpoint: &dyn Checkpoint,
    tokens: usize,
) -> Result<Vec<TokenType>, TokenizerError> {
    const KEY: &str = "tokenizer.ggml.token_type";
    let Some(array) = checkpoint.array(KEY)? else {
        return Ok(vec![TokenType::Normal; tokens]);
    };
    if array.len() != tokens {
        return Err(malformed(format!(
            "{KEY} has {} entries for {tokens} tokens",
            array.len()
        )));
    }
    let numbers = array.integers();
    let numbers = numbers.ok_or_else(|| wrong_elements(KEY, array, "integers"))?;
    let types = numbers
        .map(|number| match number {
            2 => TokenType::Unknown,
            3 => TokenType::Control,
            4 => TokenType::UserDefined,
            5 => TokenType::Unused,
            6 => TokenType::Byte,
            _ => TokenType::Normal,
        })
        .collect();
    Ok(types)
}

/// Error for an array whose elements are of another type than `wanted`.
pub(super) fn wrong_elements(key: &str, array: Array<'_>, wanted: &str) -> TokenizerError {
    let found = array.element();
    malformed(format!("{key} is an array of {found:?}, not of {wanted}"))
}

/// Many short byte strings in one allocation.
#[derive(Debug)]
struct Packed {
    bytes: Vec<u8>,
    /// End of each string in `bytes`.
    ends: Vec<u32>,
}

impl Packed {
    fn with_capacity(strings: usize) -> Self {
        Packed {
            bytes: Vec::with_capacity(strings * 8),
            ends: Vec::with_capacity(strings),
        }
    }

    fn push(&mut self, bytes: &[u8]) -> Result<(), TokenizerError> {
        self.bytes.extend_from_slice(bytes);
        let end = u32::try_from(self.bytes.len())
            .map_err(|_| malformed("the tokens' texts take over 4 GiB".into()))?;
        self.ends.push(end);
        Ok(())
    }

    /// Empty for an index outside.
    fn get(&self, i: u32) -> &[u8] {
        let Some(&end) = self.ends.get(i as usize) else {
            return &[];
        };
        let start = match i {
            0 => 0,
            _ => self.ends[i as usize - 1],
        };
        &self.bytes[start as usize..end as usize]
    }
}
