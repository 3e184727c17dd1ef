//! Finding special tokens in text before the rest is tokenized.

use std::collections::BTreeMap;

use super::vocab::{TokenType, Vocab};

/// The special tokens of a vocabulary, ready to be looked for.
#[derive(Debug)]
pub(super) struct SpecialTokens {
    /// Sorted by text.
    tokens: Vec<Special>,
    /// For each first byte, the range of `tokens` that begin with it.
    by_first: Vec<std::ops::Range<usize>>,
    /// For each first byte of many tokens, the lengths that those have: some vocabularies have thousands of reserved ones.
    lengths: Vec<Vec<usize>>,
}

/// So many tokens with one first byte are looked for one by one.
const FEW: usize = 64;

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

impl SpecialTokens {
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
                let mut lengths: Vec<usize> = match range.len() > FEW {
                    true => tokens[range.clone()].iter().map(|t| t.text.len()).collect(),
                    false => Vec::new(),
                };
                lengths.sort_unstable();
                lengths.dedup();
                lengths
            })
            .collect();
        SpecialTokens {
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

    /// Cuts `text` at special tokens: the longest token first wherever it stands, then the next longest in what is left. No token
    /// spans one of the `barriers`, which are byte positions in ascending order.
    pub(super) fn split<'t>(
        &self,
        text: &'t str,
        control: bool,
        barriers: &[usize],
    ) -> Vec<Fragment<'t>> {
        let mut found = self.occurrences(text, control);
        found.retain(|&(at, token)| {
            let end = at + self.tokens[token].text.len();
            let next = barriers.partition_point(|&barrier| barrier <= at);
            barriers.get(next).is_none_or(|&barrier| barrier >= end)
        });
        found.sort_unstable_by_key(|&(at, token)| {
            let special = &self.tokens[token];
            (usize::MAX - special.text.len(), special.id, at)
        });
        // The tokens that were taken, by where they begin.
        let mut taken: BTreeMap<usize, &Special> = BTreeMap::new();
        for (at, token) in found {
            let special = &self.tokens[token];
            let before = taken.range(..at + special.text.len()).next_back();
            if before.is_none_or(|(start, other)| start + other.text.len() <= at) {
                taken.insert(at, special);
            }
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
            fragments.extend(between(end..at, behind, special.strips.0));
            fragments.push(Fragment::Token(special.id));
            end = at + special.text.len();
            behind = special.strips.1;
        }
        fragments.extend(between(end..text.len(), behind, false));
        fragments
    }

    /// Every place where a special token stands, overlapping ones too.
    fn occurrences(&self, text: &str, control: bool) -> Vec<(usize, usize)> {
        let bytes = text.as_bytes();
        let mut found = Vec::new();
        for (at, &byte) in bytes.iter().enumerate() {
            let range = self.by_first[byte as usize].clone();
            for len in &self.lengths[byte as usize] {
                let name = bytes.get(at..at + len);
                let place = name.and_then(|name| {
                    let tokens = &self.tokens[range.clone()];
                    tokens
                        .binary_search_by(|token| token.text.as_bytes().cmp(name))
                        .ok()
                });
                if let Some(place) = place {
                    let i = range.start + place;
                    if control || self.tokens[i].user_defined {
                        found.push((at, i));
                    }
                }
            }
            if range.len() > FEW {
                continue;
            }
            for i in range {
                let token = &self.tokens[i];
                if (control || token.user_defined) && bytes[at..].starts_with(token.text.as_bytes())
                {
                    found.push((at, i));
                }
            }
        }
        found
    }
}
