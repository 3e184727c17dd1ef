//! Constraints: which tokens may come next in an answer.
//!
//! The engine knows no grammar. It asks the [`Constraint`] of an answer before each choice, and tells it the
//! token that was chosen. The state is a function of the tokens so far, so an answer goes on elsewhere as if
//! nothing had happened.

use std::fmt;
use std::sync::Arc;

/// A grammar that answers follow. It is compiled once, and each answer has a state of its own.
pub trait Grammar: Send + Sync {
    /// The state before the first token of an answer.
    fn begin(&self) -> Box<dyn Constraint>;
}

/// The state of one answer.
pub trait Constraint: Send + fmt::Debug {
    /// Begins to find the tokens that may come next. The caller goes on with other work meanwhile.
    fn prepare(&mut self) {}

    /// The tokens that may come next.
    ///
    /// # Errors
    /// [`ConstraintError`] where finding them would take too long.
    fn allowed(&mut self) -> Result<Allowed<'_>, ConstraintError>;

    /// Takes in the next token of the answer.
    ///
    /// # Errors
    /// [`ConstraintError`] if it may not come next.
    fn accept(&mut self, token: u32) -> Result<(), ConstraintError>;
}

/// The tokens that may come next in an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Allowed<'a> {
    /// These. A token that ends answers is among them where the answer may end.
    Tokens(&'a TokenSet),
    /// None: the answer is complete.
    End,
}

/// The reason for which an answer cannot go on under its grammar.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ConstraintError(pub String);

/// A set of token ids.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TokenSet {
    /// Token `32 * i + b` is bit `b` of word `i`.
    words: Vec<u32>,
}

impl TokenSet {
    /// The set whose bits are in `words`: token `32 * i + b` is bit `b` of word `i`.
    pub fn from_words(words: Vec<u32>) -> Self {
        TokenSet { words }
    }

    /// True if `token` is in it.
    pub fn contains(&self, token: u32) -> bool {
        let word = self.words.get(token as usize / 32);
        word.is_some_and(|word| word & (1 << (token % 32)) != 0)
    }

    /// Sets the logits of all tokens outside of the set to minus infinity.
    pub(crate) fn mask(&self, row: &mut [f32]) {
        let mut words = self.words.iter();
        for logits in row.chunks_mut(32) {
            match words.next().copied().unwrap_or(0) {
                u32::MAX => {}
                0 => logits.fill(f32::NEG_INFINITY),
                word => {
                    for (bit, logit) in logits.iter_mut().enumerate() {
                        if word & (1 << bit) == 0 {
                            *logit = f32::NEG_INFINITY;
                        }
                    }
                }
            }
        }
    }
}

impl FromIterator<u32> for TokenSet {
    fn from_iter<I: IntoIterator<Item = u32>>(tokens: I) -> Self {
        let mut words = Vec::new();
        for token in tokens {
            let word = token as usize / 32;
            if word >= words.len() {
                words.resize(word + 1, 0);
            }
            words[word] |= 1 << (token % 32);
        }
        TokenSet { words }
    }
}

/// A [`Grammar`] as part of a request. Two are equal if they are one.
#[derive(Clone)]
pub struct SharedGrammar(pub Arc<dyn Grammar>);

impl PartialEq for SharedGrammar {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl fmt::Debug for SharedGrammar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SharedGrammar")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logits_outside_of_the_set_are_minus_infinity() {
        let set: TokenSet = [0, 3, 32, 63, 64].into_iter().collect();
        for len in [1, 31, 32, 33, 65, 100] {
            let mut row = vec![1.0; len];
            set.mask(&mut row);
            for (token, &logit) in (0..).zip(&row) {
                let expected = if set.contains(token) {
                    1.0
                } else {
                    f32::NEG_INFINITY
                };
                assert_eq!(logit, expected, "token {token} of {len}");
            }
        }
        assert!(!set.contains(u32::MAX));
    }
}
