//! A lower bound on the number of tokens of a text, from its bytes alone.
//!
//! If every byte of a text is covered by a token, and no token that covers the byte `b` is longer than `span[b]`, then the text has
//! at least as many tokens as the sum of `1 / span[b]` over its bytes: a token of `n` bytes adds at most `n * 1/n` to the sum.
//! So the spans of a tokenizer, 256 numbers, suffice to detect that a text is far too long.

/// Number of occurrences of each byte in a text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ByteCounts(Box<[u64; 256]>);

impl Default for ByteCounts {
    fn default() -> Self {
        Self(Box::new([0; 256]))
    }
}

impl ByteCounts {
    /// The counts of `text`.
    pub fn of(text: &str) -> Self {
        [text].into_iter().collect()
    }

    /// Adds those of `text`.
    pub fn add(&mut self, text: &str) {
        text.bytes().for_each(|byte| self.0[usize::from(byte)] += 1);
    }
}

impl<'t> FromIterator<&'t str> for ByteCounts {
    fn from_iter<I: IntoIterator<Item = &'t str>>(texts: I) -> Self {
        let mut counts = Self::default();
        texts.into_iter().for_each(|text| counts.add(text));
        counts
    }
}

/// For each byte, the length in bytes of the longest token that covers it. 0 is unknown: nothing is claimed of a text with that byte.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ByteSpans(Box<[u8; 256]>);

impl ByteSpans {
    /// Spans of bytes that no token was seen to cover: those that fall back to tokens of single bytes or characters.
    pub fn of_characters() -> Self {
        Self(Box::new([LEAST; 256]))
    }

    /// The spans that a peer sent; `None` unless there are 256. None is taken to be less than a character.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let mut spans = Box::new(<[u8; 256]>::try_from(bytes).ok()?);
        let known = spans.iter_mut().filter(|span| **span > 0);
        known.for_each(|span| *span = (*span).max(LEAST));
        Some(Self(spans))
    }

    /// The spans in wire form: one length for each byte value.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0[..]
    }

    /// Takes in a token of `len` bytes that covers `bytes`.
    pub fn cover(&mut self, bytes: &[u8], len: usize) {
        let len = u8::try_from(len).unwrap_or(0);
        for &byte in bytes {
            let span = &mut self.0[usize::from(byte)];
            *span = match (*span, len) {
                (0, _) | (_, 0) => 0,
                (span, len) => span.max(len),
            };
        }
    }

    /// Claims nothing of texts with bytes beyond ASCII.
    pub fn forget_beyond_ascii(&mut self) {
        self.0[128..].fill(0);
    }

    /// The least number of tokens of a text with these bytes; 0 if nothing is known.
    pub fn least_tokens(&self, counts: &ByteCounts) -> u64 {
        let mut sum: u128 = 0;
        for (&span, &count) in self.0.iter().zip(counts.0.iter()) {
            match (span, count) {
                (_, 0) => {}
                (0, _) => return 0,
                (span, count) => sum += (u128::from(count) << FRACTION) / u128::from(span),
            }
        }
        u64::try_from(sum >> FRACTION).unwrap_or(u64::MAX)
    }
}

/// Maximum length of a UTF-8 character in bytes; a character that is not a token may become one token.
const LEAST: u8 = 4;
/// Bits behind the point.
const FRACTION: u32 = 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_has_at_least_as_many_tokens_as_its_bytes_demand() {
        let mut spans = ByteSpans::of_characters();
        spans.cover(b"hello", 5);
        spans.cover(&[b' '; 16], 16);
        let least = |text: &str| spans.least_tokens(&ByteCounts::of(text));
        assert_eq!(least(&"hello".repeat(10)), 10);
        assert_eq!(least(&" ".repeat(160)), 10);
        // Bytes that stand in no longer token.
        assert_eq!(least(&"1".repeat(400)), 100);
        assert_eq!(least(""), 0);
    }

    #[test]
    fn nothing_is_claimed_where_something_is_unknown() {
        let mut spans = ByteSpans::of_characters();
        spans.cover(b"x", 300);
        spans.cover(b"x", 2);
        spans.forget_beyond_ascii();
        let least = |text: &str| spans.least_tokens(&ByteCounts::of(text));
        assert_eq!(least(&("1".repeat(400) + "x")), 0);
        assert_eq!(least(&("1".repeat(400) + "é")), 0);
        assert_eq!(least(&"1".repeat(400)), 100);
    }

    #[test]
    fn spans_of_a_peer_are_256_and_none_is_shorter_than_a_character() {
        assert_eq!(ByteSpans::from_bytes(&[1; 255]), None);
        let spans = ByteSpans::from_bytes(&[1; 256]).unwrap();
        assert_eq!(spans, ByteSpans::of_characters());
        assert_eq!(ByteSpans::from_bytes(spans.as_bytes()), Some(spans));
    }
}
