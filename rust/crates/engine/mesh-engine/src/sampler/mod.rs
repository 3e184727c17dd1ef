//! Chooses the next token from a row of logits.
//!
//! A choice is a pure function of the logits, the tokens before it and `(seed, index)`, so that a request run again
//! elsewhere draws the same tokens. The order of the steps is documented at [`SamplingParams`]. Top-k, top-p and min-p
//! each keep a prefix of the tokens ordered by likelihood, so together they keep the shortest of the three prefixes, and
//! only that prefix is ever sorted.
//!
//! Penalties: repetition looks at prompt and answer, presence and frequency at the answer alone, as vLLM and the OpenAI
//! API do.

mod math;
mod random;
mod select;

use std::collections::HashMap;

use self::select::Candidate;
use crate::TokenSet;
use crate::request::{Logprob, RequestError, SamplingParams, TokenLogprobs, TokenScore};

/// The sampling state of one answer.
#[derive(Debug, Clone)]
pub struct Sampler {
    params: SamplingParams,
    /// Occurrences in the answer of each token that penalties apply to; 0 for tokens of the prompt alone.
    history: HashMap<u32, u32>,
    /// Tokens that are not chosen before [`SamplingParams::min_tokens`].
    ends: Vec<u32>,
}

/// A token chosen by the sampler.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    /// Token id in the model's vocabulary.
    pub token: u32,
    /// Log probabilities, if requested.
    pub logprobs: Option<TokenLogprobs>,
}

/// Buffers that samplers share, so that a choice allocates nothing once they have grown.
#[derive(Debug, Default)]
pub struct Scratch {
    row: Vec<f32>,
    sanitized: Vec<f32>,
    candidates: Vec<Candidate>,
    block_sums: Vec<f64>,
}

impl Sampler {
    /// A sampler for the answer to `prompt` that so far consists of `generated`.
    pub fn new(params: SamplingParams, prompt: &[u32], generated: &[u32]) -> Self {
        let mut history = HashMap::new();
        if params.repetition_penalty != 1.0 {
            history.extend(prompt.iter().map(|&token| (token, 0)));
        }
        let mut sampler = Sampler {
            params,
            history,
            ends: Vec::new(),
        };
        for &token in generated {
            sampler.accept(token);
        }
        sampler
    }

    /// Never chooses `ends` before the least length of the answer is reached.
    #[must_use]
    pub fn not_ending_with(mut self, ends: Vec<u32>) -> Self {
        self.ends = ends;
        self
    }

    /// Chooses token `index` of the answer; `None` if no logit is a number above minus infinity.
    ///
    /// NaN counts as minus infinity, plus infinity as the largest number.
    pub fn choose(&self, logits: &[f32], index: u32, scratch: &mut Scratch) -> Option<Choice> {
        self.choose_among(logits, index, None, scratch)
    }

    /// As [`choose`](Self::choose), among the tokens of a set. Log probabilities are those without the set.
    pub fn choose_among(
        &self,
        logits: &[f32],
        index: u32,
        allowed: Option<&TokenSet>,
        scratch: &mut Scratch,
    ) -> Option<Choice> {
        let Scratch {
            row,
            sanitized,
            candidates,
            block_sums,
        } = scratch;
        let mut raw = logits;
        let mut raw_max = math::max(raw);
        if raw_max == f32::INFINITY {
            sanitized.clear();
            sanitized.extend(
                raw.iter()
                    .map(|&x| if x == f32::INFINITY { f32::MAX } else { x }),
            );
            raw = sanitized;
            raw_max = f32::MAX;
        }

        let too_short = index < self.params.min_tokens;
        let forbidden = if too_short { &self.ends[..] } else { &[] };
        let adjusts = !self.params.logit_bias.is_empty() || !self.history.is_empty();
        let adjusted = if adjusts || !forbidden.is_empty() || allowed.is_some() {
            row.clear();
            row.extend_from_slice(raw);
            if adjusts {
                self.adjust(row);
            }
            if let Some(allowed) = allowed {
                allowed.mask(row);
            }
            for &token in forbidden {
                if let Some(logit) = row.get_mut(token as usize) {
                    *logit = f32::NEG_INFINITY;
                }
            }
            row
        } else {
            raw
        };
        let token = if self.params.temperature < GREEDY_BELOW {
            math::argmax(adjusted)?
        } else {
            self.draw(adjusted, index, candidates, block_sums)?
        };
        let logprobs = self
            .params
            .logprobs
            .map(|n| logprobs(raw, raw_max, token, n as usize, candidates));
        Some(Choice { token, logprobs })
    }

    /// Counts `token` as part of the answer.
    pub fn accept(&mut self, token: u32) {
        let p = &self.params;
        if p.repetition_penalty != 1.0 || p.presence_penalty != 0.0 || p.frequency_penalty != 0.0 {
            *self.history.entry(token).or_default() += 1;
        }
    }

    fn adjust(&self, row: &mut [f32]) {
        let p = &self.params;
        for &(token, bias) in &p.logit_bias {
            if let Some(logit) = row.get_mut(token as usize) {
                *logit += bias;
            }
        }
        for (&token, &in_answer) in &self.history {
            let Some(logit) = row.get_mut(token as usize) else {
                continue;
            };
            if *logit > 0.0 {
                *logit /= p.repetition_penalty;
            } else {
                *logit *= p.repetition_penalty;
            }
            if in_answer > 0 {
                *logit -= p.presence_penalty + p.frequency_penalty * in_answer as f32;
            }
        }
    }

    /// One draw from the distribution that temperature, top-k, top-p and min-p leave.
    fn draw(
        &self,
        row: &[f32],
        index: u32,
        candidates: &mut Vec<Candidate>,
        block_sums: &mut Vec<f64>,
    ) -> Option<u32> {
        let p = &self.params;
        let max = math::max(row);
        if max == f32::NEG_INFINITY {
            return None;
        }
        let max = max.min(f32::MAX);
        let scale = 1.0 / p.temperature;
        let uniform = random::uniform(p.seed, index);
        let top_k = match p.top_k {
            0 => row.len(),
            k => (k as usize).min(row.len()),
        };
        let all = top_k == row.len();
        if all && p.top_p >= 1.0 && p.min_p <= 0.0 {
            return math::draw_from_all(row, max, scale, uniform, block_sums);
        }
        let floor = if p.min_p > 0.0 {
            max + p.temperature * p.min_p.ln()
        } else {
            f32::NEG_INFINITY
        };

        if p.top_p >= 1.0 {
            if all {
                select::at_least(row, floor, candidates);
            } else {
                select::top(row, top_k, floor, candidates);
            }
        } else if !all {
            // Top-p is a share of the tokens that top-k leaves, before min-p.
            select::top(row, top_k, f32::NEG_INFINITY, candidates);
            let weights = candidates.iter().map(|c| weight(c, max, scale));
            let total = weights.sum::<f64>();
            let kept = nucleus(candidates, max, scale, total * f64::from(p.top_p));
            candidates.truncate(kept.unwrap_or(candidates.len()));
            candidates.retain(|c| c.logit >= floor);
        } else {
            let wanted = math::sum_exp(row, max, scale) * f64::from(p.top_p);
            let mut k = FIRST_NUCLEUS;
            loop {
                select::top(row, k, floor, candidates);
                if let Some(kept) = nucleus(candidates, max, scale, wanted) {
                    candidates.truncate(kept);
                    break;
                }
                if candidates.len() < k {
                    break;
                }
                k = k.saturating_mul(8);
            }
        }
        draw_from(candidates, max, scale, uniform)
    }
}

/// Scores `token` from the logits of the row before it.
pub fn score(logits: &[f32], token: u32) -> Option<TokenScore> {
    let max = math::max(logits);
    let argmax = math::argmax(logits)?;
    let log_total = max + math::sum_exp(logits, max, 1.0).ln() as f32;
    Some(TokenScore {
        logprob: logits.get(token as usize)? - log_total,
        argmax,
        max_logprob: max - log_total,
    })
}

/// Checks every parameter's range; `vocab` is the number of token ids.
pub fn validate(params: &SamplingParams, vocab: usize) -> Result<(), RequestError> {
    let invalid =
        |name, value: String, range| RequestError::InvalidParameter { name, value, range };
    let p = params;
    let above_zero = 0f32.next_up();
    let repetition = p.repetition_penalty;
    for (name, value, least, most, range) in [
        ("temperature", p.temperature, 0.0, 100.0, "0 to 100"),
        ("top_p", p.top_p, 0.0, 1.0, "0 to 1"),
        ("min_p", p.min_p, 0.0, 1.0, "0 to 1"),
        (
            "repetition_penalty",
            repetition,
            above_zero,
            100.0,
            "above 0, at most 100",
        ),
        (
            "presence_penalty",
            p.presence_penalty,
            -100.0,
            100.0,
            "-100 to 100",
        ),
        (
            "frequency_penalty",
            p.frequency_penalty,
            -100.0,
            100.0,
            "-100 to 100",
        ),
    ] {
        if !(least..=most).contains(&value) {
            return Err(invalid(name, value.to_string(), range));
        }
    }
    let biased = p.logit_bias.iter().map(|&(token, _)| token);
    let mut named = biased.chain(p.stop_token_ids.iter().copied());
    if let Some(token) = named.find(|&token| token as usize >= vocab) {
        return Err(RequestError::NoSuchToken { token, vocab });
    }
    if let Some((_, bias)) = p.logit_bias.iter().find(|(_, bias)| !bias.is_finite()) {
        return Err(invalid("logit_bias", bias.to_string(), "a finite number"));
    }
    if p.stop_token_ids.len() > MAX_STOP_TOKENS {
        let count = p.stop_token_ids.len().to_string();
        return Err(invalid("stop_token_ids", count, "at most 64 tokens"));
    }
    match p.logprobs {
        Some(n) if n > MAX_LOGPROBS => Err(invalid("top_logprobs", n.to_string(), "0 to 20")),
        _ => Ok(()),
    }
}

/// The likelihood of `token` and of the `n` likeliest tokens under the model.
fn logprobs(
    raw: &[f32],
    max: f32,
    token: u32,
    n: usize,
    candidates: &mut Vec<Candidate>,
) -> TokenLogprobs {
    let log_total = max + math::sum_exp(raw, max, 1.0).ln() as f32;
    candidates.clear();
    if n > 0 {
        select::top(raw, n, f32::NEG_INFINITY, candidates);
    }
    let logprob = |token, logit| Logprob {
        token,
        logprob: logit - log_total,
    };
    let top = candidates.iter().map(|c| logprob(c.token, c.logit));
    TokenLogprobs {
        chosen: logprob(token, raw[token as usize]),
        top: top.collect(),
    }
}

/// Number of candidates, likeliest first, that together reach `wanted`; `None` if all of them do not.
fn nucleus(candidates: &[Candidate], max: f32, scale: f32, wanted: f64) -> Option<usize> {
    let mut sum = 0.0;
    let last = candidates.iter().position(|c| {
        sum += weight(c, max, scale);
        sum >= wanted
    });
    Some(last? + 1)
}

fn draw_from(candidates: &[Candidate], max: f32, scale: f32, uniform: f64) -> Option<u32> {
    let total: f64 = candidates.iter().map(|c| weight(c, max, scale)).sum();
    let mut rest = uniform * total;
    for c in candidates {
        rest -= weight(c, max, scale);
        if rest < 0.0 {
            return Some(c.token);
        }
    }
    // Rounding can leave a sliver at the end.
    candidates.last().map(|c| c.token)
}

fn weight(candidate: &Candidate, max: f32, scale: f32) -> f64 {
    f64::from(math::exp((candidate.logit - max) * scale))
}

/// Most alternatives reported per token, as in the OpenAI API.
pub const MAX_LOGPROBS: u32 = 20;

/// Most token ids of a request that end its answer.
pub const MAX_STOP_TOKENS: usize = 64;

/// A temperature so low that its inverse would leave the range of numbers in use.
const GREEDY_BELOW: f32 = 1e-5;

/// Candidates first looked at for top-p; nearly always enough.
const FIRST_NUCLEUS: usize = 128;

#[cfg(test)]
mod tests;
