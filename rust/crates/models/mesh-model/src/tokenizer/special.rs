//! Finding special tokens in text before the rest is tokenized.

use std::collections::BTreeMap;

use super::vocab::{TokenType, Vocab};

/// The special tokens of a vocabulary, ready to be looked for.
#[derive(Debug)]
pub(super) struct SpecialFinder {
    /// Sorted by text.
    tokens: Vec<Special>,
    /// For each first byte, the range of `tokens` that begin with it.
    by_first: Vec<std::ops::Range<usize>>,
    /// For each first byte, the lengths of the tokens with it: some vocabularies have thousands of reserved
    /// ones.
    lengths: Vec<Vec<usize>>,
}

#[derive(Debug)]
struct Special {
    text: Box<str>,
    id: u32,
    /// Found in any text; the others only where control tokens are asked for.
    user_defined: bool,
    /// Takes the white space before it, and behind it, with it.
    strips: (bool, bool),
}

/// A part of a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fragment<'t> {
    Text(&'t str),
    Token(u32),
}

impl SpecialFinder {
    pub(super) fn new(vocab: &Vocab) -> Self {
        let mut tokens: Vec<Special> = vocab
            .special()
            .filter(|(text, _)| !text.is_empty())
            .map(|(text, id)| Special {
                text: text.into(),
                id,
                user_defined: vocab.token_type(id) == TokenType::UserDefined,
                strips: (false, false),
            })
            .collect();
        tokens.sort_unstable_by(|a, b| a.text.cmp(&b.text));
        let by_first: Vec<std::ops::Range<usize>> = (0..=255u8)
            .map(|byte| {
                let start = tokens.partition_point(|token| token.text.as_bytes()[0] < byte);
                let end = tokens.partition_point(|token| token.text.as_bytes()[0] <= byte);
                start..end
            })
            .collect();
        let lengths = by_first
            .iter()
            .map(|range| {
                let mut lengths: Vec<usize> =
                    tokens[range.clone()].iter().map(|t| t.text.len()).collect();
                lengths.sort_unstable();
                lengths.dedup();
                lengths
            })
            .collect();
        SpecialFinder {
            tokens,
            by_first,
            lengths,
        }
    }

    /// The same with tokens that take the white space before them, and behind them, with them: by their ids.
    pub(super) fn stripping(mut self, strips: &BTreeMap<u32, (bool, bool)>) -> Self {
        for token in &mut self.tokens {
            token.strips = strips.get(&token.id).copied().unwrap_or_default();
        }
        self
    }

    /// True if `text` begins with the name of the token `id`.
    pub(super) fn begins(&self, text: &str, id: u32) -> bool {
        let mut tokens = self.tokens.iter().filter(|token| token.id == id);
        tokens.any(|token| text.starts_with(&*token.text))
    }

    /// The token with the longest name that `text` begins with.
    pub(super) fn at(&self, text: &str) -> Option<u32> {
        let first = *text.as_bytes().first()?;
        let tokens = self.tokens[self.by_first[first as usize].clone()].iter();
        let found = tokens.filter(|token| text.starts_with(&*token.text));
        found
            .max_by_key(|token| token.text.len())
            .map(|token| token.id)
    }

    /// Cuts `text` at special tokens: the longest token first wherever it stands, then the next longest in
    /// what is left. No token spans one of the `barriers`, which are byte positions in ascending order.
    /// `None` if there are more than `most`, or if the text is longer than 4 GiB.
    pub(super) fn split<'t>(
        &self,
        text: &'t str,
        control: bool,
        barriers: &[usize],
        most: usize,
    ) -> Option<Vec<Fragment<'t>>> {
        u32::try_from(text.len()).ok()?;
        let mut places = self.places(text, control);
        // The tokens that were taken, by where they begin.
        let mut taken: BTreeMap<u32, &Special> = BTreeMap::new();
        let free = |taken: &BTreeMap<u32, &Special>, at: u32, len: usize| {
            let before = taken.range(..at + len as u32).next_back();
            before.is_none_or(|(start, other)| start + other.text.len() as u32 <= at)
        };
        let mut same: Vec<(u32, u32)> = Vec::new();
        // One length at a time, so that memory is bounded by the text and not by the tokens that overlap in
        // it.
        while let Some(len) = places.iter().map(|place| place.len).max() {
            let len = len as usize;
            same.clear();
            for place in places.iter_mut().filter(|place| place.len as usize == len) {
                let at = place.at as usize;
                let next = barriers.partition_point(|&barrier| barrier <= at);
                let spans = barriers
                    .get(next)
                    .is_some_and(|&barrier| barrier < at + len);
                if let (Some(token), false) =
                    (self.find(&text.as_bytes()[at..], len, control), spans)
                {
                    same.push((token as u32, place.at));
                }
                place.len = self.longest(&text.as_bytes()[at..], control, len) as u32;
            }
            same.sort_unstable_by_key(|&(token, at)| (self.tokens[token as usize].id, at));
            for &(token, at) in &same {
                if free(&taken, at, len) {
                    taken.insert(at, &self.tokens[token as usize]);
                    if taken.len() > most {
                        return None;
                    }
                }
            }
            places.retain(|place| place.len > 0 && free(&taken, place.at, 1));
        }
        let mut fragments = Vec::with_capacity(2 * taken.len() + 1);
        let mut end = 0;
        let mut behind = false;
        let between = |range: std::ops::Range<usize>, start: bool, end: bool| {
            let text = &text[range];
            let text = if start { text.trim_start() } else { text };
            let text = if end { text.trim_end() } else { text };
            (!text.is_empty()).then_some(Fragment::Text(text))
        };
        for (at, special) in taken {
            let at = at as usize;
            fragments.extend(between(end..at, behind, special.strips.0));
            fragments.push(Fragment::Token(special.id));
            end = at + special.text.len();
            behind = special.strips.1;
        }
        fragments.extend(between(end..text.len(), behind, false));
        Some(fragments)
    }

    /// Positions of all special tokens, with the length of the longest one at each.
    fn places(&self, text: &str, control: bool) -> Vec<Occurrence> {
        let bytes = text.as_bytes();
        let mut places = Vec::new();
        for (at, &byte) in bytes.iter().enumerate() {
            if self.by_first[byte as usize].is_empty() {
                continue;
            }
            let len = self.longest(&bytes[at..], control, usize::MAX) as u32;
            if len > 0 {
                places.push(Occurrence { at: at as u32, len });
            }
        }
        places
    }

    /// Length of the longest special token below `below` bytes at the start of `text`; 0 without one.
    fn longest(&self, text: &[u8], control: bool, below: usize) -> usize {
        let Some(&first) = text.first() else { return 0 };
        let lengths = self.lengths[first as usize].iter().rev();
        let shorter = lengths.copied().filter(|&len| len < below);
        let mut fitting = shorter.filter(|&len| self.find(text, len, control).is_some());
        fitting.next().unwrap_or(0)
    }

    /// The special token of `len` bytes that `text` begins with.
    fn find(&self, text: &[u8], len: usize, control: bool) -> Option<usize> {
        let name = text.get(..len)?;
        let range = self.by_first[*name.first()? as usize].clone();
        let tokens = &self.tokens[range.clone()];
        let found = tokens.binary_search_by(|token| token.text.as_bytes().cmp(name));
        let found = range.start + found.ok()?;
        (control || self.tokens[found].user_defined).then_some(found)
    }
}

/// A position of a special token in a text.
#[derive(Clone, Copy)]
struct Occurrence {
    at: u32,
    /// Bytes of the longest one there that was not looked at yet.
    len: u32,
}
