//! Merging of long words, with the result of the `tokenizers` crate's BPE in a fraction of its memory.
//!
//! The crate takes some 150 bytes for each byte of a word, and its result owns a copy of every token's text.
//! Words of text are short; a word of a megabyte (`aaaa...`, or a whole prompt where the pre-tokenizer cuts
//! nothing) is merged here instead, in 12 bytes for each character and 12 for each pair that may be merged.
//! The order of merges is the crate's: the lowest rank, the leftmost of equals.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

use tokenizers::Model;
use tokenizers::models::bpe::{BPE, Vocab as BpeVocab};

use super::error::TokenizerError;
use super::notation::text_bytes;

/// Treatment of unknown characters, as far as it matters for the initial symbols of a word.
#[derive(Debug, Default)]
pub(super) struct Unknown {
    pub(super) token: Option<u32>,
    pub(super) fuse: bool,
    pub(super) byte_fallback: bool,
}

/// The tables for merging.
#[derive(Debug)]
pub(super) struct LongWords {
    characters: HashMap<char, u32>,
    /// Ids of the byte tokens such as `<0x0A>`.
    bytes: Box<[Option<u32>; 256]>,
    unknown: Unknown,
    /// Rank and result of each pair.
    merges: HashMap<(u32, u32), (u32, u32)>,
    /// Words of more bytes are merged here.
    from: usize,
}

/// Words up to this length are the crate's, which remembers the short ones.
const LONG: usize = 1024;

impl LongWords {
    /// For the vocabulary and merges that the crate's model is built of.
    pub(super) fn new(ids: &BpeVocab, merges: &[(String, String)], unknown: Unknown) -> Self {
        let mut characters = HashMap::new();
        let mut longest = 0;
        for (text, &id) in ids {
            longest = longest.max(text.len());
            let mut chars = text.chars();
            if let (Some(c), None) = (chars.next(), chars.next()) {
                characters.insert(c, id);
            }
        }
        let mut merged = String::new();
        let mut table = HashMap::with_capacity(merges.len());
        for (rank, (left, right)) in (0..).zip(merges) {
            merged.clear();
            merged.push_str(left);
            merged.push_str(right);
            if let (Some(&left), Some(&right), Some(&whole)) =
                (ids.get(left), ids.get(right), ids.get(&merged))
            {
                table.insert((left, right), (rank, whole));
            }
        }
        let byte = |byte: usize| ids.get(&format!("<0x{byte:02X}>")).copied();
        Self {
            characters,
            bytes: Box::new(std::array::from_fn(byte)),
            unknown,
            merges: table,
            // A word that is a token as a whole may be taken for it; the crate sees to that.
            from: longest.max(LONG),
        }
    }

    /// True if this merger handles `word`.
    pub(super) fn takes(&self, word: &str) -> bool {
        // Places are kept in 32 bits.
        word.len() > self.from && u32::try_from(word.len()).is_ok()
    }

    /// True if characters without tokens may be lost, or several of them become one unknown token.
    pub(super) fn drops(&self) -> bool {
        let has = |byte: u8| self.bytes[usize::from(byte)].is_some();
        let all_bytes = self.unknown.byte_fallback && text_bytes().all(has);
        !all_bytes && (self.unknown.token.is_none() || self.unknown.fuse)
    }

    /// True if `c` is a token.
    pub(super) fn knows(&self, c: char) -> bool {
        self.characters.contains_key(&c)
    }

    /// Appends the tokens of `word`.
    pub(super) fn encode(&self, word: impl Iterator<Item = char>, ids: &mut Vec<u32>) {
        let mut symbols = Symbols(Vec::new());
        self.begin(word, &mut symbols);
        symbols.merge(&self.merges);
        let left = symbols.0.iter().map(|symbol| symbol.id);
        ids.extend(left.filter(|&id| id != GONE));
    }

    /// The symbols that the crate begins with.
    fn begin(&self, word: impl Iterator<Item = char>, symbols: &mut Symbols) {
        let mut pending = None;
        let mut utf8 = [0; 4];
        for c in word {
            if let Some(&id) = self.characters.get(&c) {
                pending.take().into_iter().for_each(|id| symbols.push(id));
                symbols.push(id);
                continue;
            }
            let bytes = c.encode_utf8(&mut utf8).bytes();
            let of = |byte: u8| self.bytes[usize::from(byte)];
            if self.unknown.byte_fallback && bytes.clone().all(|byte| of(byte).is_some()) {
                bytes.filter_map(of).for_each(|id| symbols.push(id));
            } else if let Some(unknown) = self.unknown.token {
                if !self.unknown.fuse {
                    pending.take().into_iter().for_each(|id| symbols.push(id));
                }
                pending = Some(unknown);
            }
        }
        pending.into_iter().for_each(|id| symbols.push(id));
    }
}

/// Appends the tokens that the crate's `model` makes of `word`.
pub(super) fn push_tokens(
    model: &BPE,
    word: &str,
    ids: &mut Vec<u32>,
) -> Result<(), TokenizerError> {
    let tokens = model.tokenize(word);
    let tokens = tokens.map_err(|error| TokenizerError::Encode {
        reason: error.to_string(),
    })?;
    ids.extend(tokens.iter().map(|token| token.id));
    Ok(())
}

/// A symbol that was merged into the one on its left.
const GONE: u32 = u32::MAX;
/// No neighbour.
const NONE: u32 = u32::MAX;

#[derive(Clone, Copy)]
struct Symbol {
    id: u32,
    prev: u32,
    next: u32,
}

struct Symbols(Vec<Symbol>);

/// Rank, place of the left symbol, result.
type Merge = Reverse<(u32, u32, u32)>;

impl Symbols {
    fn push(&mut self, id: u32) {
        let at = self.0.len() as u32;
        if let Some(last) = self.0.last_mut() {
            last.next = at;
        }
        self.0.push(Symbol {
            id,
            prev: at.checked_sub(1).unwrap_or(NONE),
            next: NONE,
        });
    }

    fn merge(&mut self, merges: &HashMap<(u32, u32), (u32, u32)>) {
        let pairs = self.0.windows(2).zip(0..);
        let mut queue: BinaryHeap<Merge> = pairs
            .filter_map(|(pair, at)| {
                let (rank, whole) = merges.get(&(pair[0].id, pair[1].id))?;
                Some(Reverse((*rank, at, *whole)))
            })
            .collect();
        while let Some(Reverse((_, at, whole))) = queue.pop() {
            let left = self.0[at as usize];
            if left.id == GONE || left.next == NONE {
                continue;
            }
            let right = self.0[left.next as usize];
            // An entry may be of neighbours that have been merged since.
            if merges
                .get(&(left.id, right.id))
                .is_none_or(|(_, id)| *id != whole)
            {
                continue;
            }
            self.0[left.next as usize].id = GONE;
            let symbol = &mut self.0[at as usize];
            (symbol.id, symbol.next) = (whole, right.next);
            if right.next != NONE {
                self.0[right.next as usize].prev = at;
                let after = self.0[right.next as usize].id;
                if let Some((rank, id)) = merges.get(&(whole, after)) {
                    queue.push(Reverse((*rank, at, *id)));
                }
            }
            if left.prev != NONE {
                let before = self.0[left.prev as usize].id;
                if let Some((rank, id)) = merges.get(&(before, whole)) {
                    queue.push(Reverse((*rank, left.prev, *id)));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokenizers::Model;
    use tokenizers::models::bpe::BPE;

    use super::*;

    fn tables() -> (BpeVocab, Vec<(String, String)>) {
        let merges = [
            ("a", "b"),
            ("b", "a"),
            ("a", "a"),
            ("aa", "aa"),
            ("ab", "a"),
            ("aba", "b"),
            ("b", "b"),
            ("aa", "b"),
            ("bb", "aab"),
            ("a", "b"),
        ];
        let merges: Vec<(String, String)> = merges.map(|(l, r)| (l.into(), r.into())).into();
        let single = ["<unk>", "a", "b", "c", "<0xC3>", "<0xA9>"].map(str::to_owned);
        let joined = merges.iter().map(|(l, r)| format!("{l}{r}"));
        let mut ids = BpeVocab::default();
        for text in single.into_iter().chain(joined) {
            let next = ids.len() as u32;
            ids.entry(text).or_insert(next);
        }
        (ids, merges)
    }

    proptest! {
        #[test]
        fn a_long_word_is_merged_as_the_crate_merges_it(
            word in "[abcé☃]{1,400}",
            fuse in any::<bool>(),
            byte_fallback in any::<bool>(),
            unknown in any::<bool>(),
        ) {
            let (ids, merges) = tables();
            let mut builder = BPE::builder().fuse_unk(fuse).byte_fallback(byte_fallback);
            if unknown {
                builder = builder.unk_token("<unk>".into());
            }
            let crates = builder.vocab_and_merges(ids.clone(), merges.clone()).build().unwrap();
            let unknown = Unknown { token: unknown.then_some(ids["<unk>"]), fuse, byte_fallback };
            let mut ours = Vec::new();
            LongWords::new(&ids, &merges, unknown).encode(word.chars(), &mut ours);
            let theirs: Vec<u32> = crates.tokenize(&word).unwrap().iter().map(|token| token.id).collect();
            prop_assert_eq!(ours, theirs);
        }
    }
}
