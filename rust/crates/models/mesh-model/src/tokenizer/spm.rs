//! SentencePiece's BPE, the `llama` tokenizer model of GGUF files.
//!
//! Spaces become "▁". Then, of all neighbours whose joined text is a token, the pair with the highest score
//! is joined, the leftmost of equals, as long as there are any. Characters without tokens are encoded as
//! bytes.
//!
//! This is not the `tokenizers` crate's BPE: that merges by pairs of tokens with one rank each, and the
//! tables have neither.

use std::cmp::Ordering;
use std::collections::{BinaryHeap, HashMap};

use super::error::{TokenizerError, malformed};
use super::limit::Limit;
use super::notation::{SPACE, byte_of, text_bytes};
use super::vocab::{TokenType, Vocab, wrong_elements};
use crate::checkpoint::Checkpoint;

#[derive(Debug)]
pub(super) struct Spm {
    ids: HashMap<Box<str>, u32>,
    scores: Vec<f32>,
    /// Bytes of the longest token: of nothing longer a hash needs to be made.
    longest: usize,
    /// The token of each byte.
    bytes: [Option<u32>; 256],
    unknown: Option<u32>,
    add_space_prefix: bool,
}

impl Spm {
    pub(super) fn from_keys(
        checkpoint: &dyn Checkpoint,
        vocab: &Vocab,
    ) -> Result<Self, TokenizerError> {
        let scores = read_scores(checkpoint, vocab.len())?;
        let mut ids = HashMap::with_capacity(vocab.len());
        let mut bytes = [None; 256];
        let mut unknown = None;
        let mut longest = 0;
        for (id, text) in (0..).zip(vocab.texts()) {
            ids.insert(text.into(), id);
            longest = longest.max(text.len());
            match vocab.token_type(id) {
                TokenType::Byte => {
                    if let Some(byte) = byte_of(text) {
                        bytes[byte as usize] = Some(id);
                    }
                }
                TokenType::Unknown => unknown = unknown.or(Some(id)),
                _ => {}
            }
        }
        Ok(Spm {
            ids,
            scores,
            longest,
            bytes,
            unknown,
            add_space_prefix: checkpoint
                .bool("tokenizer.ggml.add_space_prefix")?
                .unwrap_or(true),
        })
    }

    /// Appends the tokens of `text`, which `begins` a sequence or follows a special token.
    ///
    /// # Errors
    /// Over the limit, or with over 4 GiB of text.
    pub(super) fn encode(
        &self,
        text: &str,
        begins: bool,
        ids: &mut Vec<u32>,
        limit: Limit,
    ) -> Result<(), TokenizerError> {
        let mut spelled = String::with_capacity(text.len() + 8);
        if begins && self.add_space_prefix {
            spelled.push_str(SPACE);
        }
        for c in text.chars() {
            match c {
                ' ' => spelled.push_str(SPACE),
                c => spelled.push(c),
            }
        }
        if u32::try_from(spelled.len()).is_err() {
            return Err(TokenizerError::Encode {
                reason: format!("it has {} bytes, more than 4 GiB", spelled.len()),
            });
        }
        let mut merging = Merging::new(self, &spelled);
        merging.run();
        for symbol in merging.symbols() {
            self.push_symbol(symbol, ids);
            limit.check(ids)?;
        }
        Ok(())
    }

    /// True if bytes may be lost because the vocabulary has no tokens for them.
    pub(super) fn drops(&self) -> bool {
        let missing = |byte: u8| self.bytes[usize::from(byte)].is_none();
        self.unknown.is_none() && text_bytes().any(missing)
    }

    /// A symbol is a token or a single character without one.
    fn push_symbol(&self, symbol: &str, ids: &mut Vec<u32>) {
        if let Some(&id) = self.ids.get(symbol) {
            ids.push(id);
            return;
        }
        for byte in symbol.bytes() {
            ids.extend(self.bytes[byte as usize].or(self.unknown));
        }
    }
}

/// One text on its way to tokens: a list of symbols that are joined.
struct Merging<'a> {
    spm: &'a Spm,
    text: &'a str,
    symbols: Vec<Symbol>,
    queue: BinaryHeap<SymbolPair>,
}

/// A stretch of the text. One that was joined to its left neighbour is empty.
/// There is one for every character, so places are kept in 32 bits.
#[derive(Clone, Copy)]
struct Symbol {
    start: u32,
    len: u32,
    /// Neighbours; [`NONE`] at the ends.
    prev: u32,
    next: u32,
}

const NONE: u32 = u32::MAX;

/// Two neighbours whose joined text is a token.
struct SymbolPair {
    score: f32,
    left: u32,
    right: u32,
    /// Length of both together when the pair was found. If it differs now, one of them was merged otherwise.
    len: u32,
}

impl<'a> Merging<'a> {
    fn new(spm: &'a Spm, text: &'a str) -> Self {
        let mut symbols: Vec<Symbol> = text
            .char_indices()
            .zip(0u32..)
            .map(|((start, c), i)| Symbol {
                start: start as u32,
                len: c.len_utf8() as u32,
                prev: i.checked_sub(1).unwrap_or(NONE),
                next: i + 1,
            })
            .collect();
        if let Some(last) = symbols.last_mut() {
            last.next = NONE;
        }
        Merging {
            spm,
            text,
            symbols,
            queue: BinaryHeap::new(),
        }
    }

    fn run(&mut self) {
        for right in 1..self.symbols.len() as u32 {
            self.consider(right - 1, right);
        }
        while let Some(SymbolPair {
            left, right, len, ..
        }) = self.queue.pop()
        {
            let (l, r) = (self.symbols[left as usize], self.symbols[right as usize]);
            if l.len == 0 || r.len == 0 || l.len + r.len != len {
                continue;
            }
            self.symbols[left as usize].len = len;
            self.symbols[left as usize].next = r.next;
            self.symbols[right as usize].len = 0;
            if r.next != NONE {
                self.symbols[r.next as usize].prev = left;
            }
            self.consider(l.prev, left);
            self.consider(left, r.next);
        }
    }

    /// Queues two neighbours if together they are a token.
    fn consider(&mut self, left: u32, right: u32) {
        if left == NONE || right == NONE {
            return;
        }
        let start = self.symbols[left as usize].start as usize;
        let len = self.symbols[left as usize].len + self.symbols[right as usize].len;
        if len as usize > self.spm.longest {
            return;
        }
        if let Some(&id) = self.spm.ids.get(&self.text[start..start + len as usize]) {
            let score = self.spm.scores[id as usize];
            self.queue.push(SymbolPair {
                score,
                left,
                right,
                len,
            });
        }
    }

    fn symbols(&self) -> impl Iterator<Item = &'a str> {
        self.symbols
            .iter()
            .filter(|symbol| symbol.len > 0)
            .map(|symbol| &self.text[symbol.start as usize..(symbol.start + symbol.len) as usize])
    }
}

impl Ord for SymbolPair {
    fn cmp(&self, other: &Self) -> Ordering {
        // The heap gives its greatest: the highest score, the leftmost of equals.
        self.score
            .total_cmp(&other.score)
            .then(other.left.cmp(&self.left))
    }
}

impl PartialOrd for SymbolPair {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for SymbolPair {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for SymbolPair {}

fn read_scores(checkpoint: &dyn Checkpoint, tokens: usize) -> Result<Vec<f32>, TokenizerError> {
    const KEY: &str = "tokenizer.ggml.scores";
    let array = checkpoint.require_array(KEY)?;
    let scores: Vec<f32> = array
        .floats()
        .ok_or_else(|| wrong_elements(KEY, array, "floats"))?
        .collect();
    if scores.len() != tokens {
        return Err(malformed(format!(
            "{KEY} has {} entries for {tokens} tokens",
            scores.len()
        )));
    }
    Ok(scores)
}
