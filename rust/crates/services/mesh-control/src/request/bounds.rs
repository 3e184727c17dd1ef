//! Limits on the size and duration of an answer.

use std::time::Duration;

/// Limits that the operator sets for answers.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Most silence of a worker that has the request: neither a token nor a sign of life.
    pub timeout: Duration,
    /// Most time that it waits for a worker with room, before its first token or after a failure.
    pub queue: Duration,
    /// Most time from arrival to the last token; `None` is without limit.
    pub total: Option<Duration>,
    /// Attempts after the first.
    pub reruns: u32,
    /// Least silence between tokens that counts as death.
    pub silence: Duration,
    /// The same before the first token, on top of ten times what the router expects.
    pub first_token: Duration,
}

/// The most of an answer that a worker may send. More ends the attempt as that worker's fault, so that memory
/// stays bounded whatever it sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// Tokens of the answer, on all attempts together.
    pub tokens: u32,
    /// Bytes of text besides those that the tokens may have.
    pub more_text: u64,
    /// Alternatives of each token; `None` where no probabilities were asked for.
    pub alternatives: Option<u32>,
    /// Tokens that the prompt can have at most.
    pub prompt_tokens: u32,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            tokens: MOST_TOKENS,
            more_text: 0,
            alternatives: None,
            prompt_tokens: u32::MAX,
        }
    }
}

impl Bounds {
    /// Bytes of text that this many tokens may have.
    pub(super) fn text(&self, tokens: u32) -> u64 {
        let of_tokens = u64::from(tokens).saturating_mul(TOKEN_BYTES as u64);
        let all = of_tokens.saturating_add(self.more_text);
        all.saturating_add(TOKEN_BYTES as u64)
            .min(MOST_TEXT.saturating_add(self.more_text))
    }

    /// Payload bytes of one message of an answer.
    pub fn message(&self) -> usize {
        MESSAGE_BYTES.saturating_add(usize::try_from(self.more_text).unwrap_or(usize::MAX))
    }
}

/// Bytes that one token may stand for. The longest ones of real vocabularies are runs of 256 blanks.
pub(super) const TOKEN_BYTES: usize = 512;

/// Tokens of any answer.
pub(super) const MOST_TOKENS: u32 = 1 << 20;

/// Bytes of any answer's text.
pub(super) const MOST_TEXT: u64 = 8 << 20;

/// Payload bytes of one message of an answer, besides the text of an echoed prompt.
pub(super) const MESSAGE_BYTES: usize = 256 << 10;
