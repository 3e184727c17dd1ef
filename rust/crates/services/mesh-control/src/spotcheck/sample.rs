//! Answers to one question, compared.

/// One position of an answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Position {
    /// Id of the chosen token.
    pub token: u32,
    /// Natural logarithm of its probability.
    pub logprob: f32,
    /// The likeliest tokens there; empty if the worker gives none.
    pub top: Vec<(u32, f32)>,
}

/// An answer to a question of the head.
#[derive(Debug, Clone, PartialEq)]
pub enum Sample {
    /// Tokens of a model that makes text.
    Text(Vec<Position>),
    /// Vector of a model that makes embeddings.
    Vector(Vec<f32>),
}

impl Sample {
    /// Returns true if two answers may come from the same weights on different machines.
    pub(crate) fn agrees(&self, other: &Sample) -> bool {
        match (self, other) {
            (Sample::Text(one), Sample::Text(two)) => texts_agree(one, two),
            (Sample::Vector(one), Sample::Vector(two)) => vectors_agree(one, two),
            _ => false,
        }
    }
}

fn texts_agree(one: &[Position], two: &[Position]) -> bool {
    for (index, (a, b)) in one.iter().zip(two).enumerate() {
        if a.token != b.token {
            return match (near_tie(a, b.token), near_tie(b, a.token)) {
                (Some(one), Some(two)) => one && two,
                (Some(only), None) | (None, Some(only)) => only,
                (None, None) => false,
            };
        }
        let apart = (a.logprob - b.logprob).abs();
        if apart.is_nan() || apart > LOGPROB_TOLERANCE {
            return false;
        }
        if index + 1 == one.len().min(two.len()) {
            // One of them ended: the end itself is a choice that is not told.
            return one.len() == two.len() || index + 1 >= LEAST_COMMON;
        }
    }
    false
}

/// Returns true if `other` is nearly as likely as the token chosen at this position; `None` if the position
/// does not say.
fn near_tie(position: &Position, other: u32) -> Option<bool> {
    if position.top.is_empty() {
        return None;
    }
    let of_other = position.top.iter().find(|(token, _)| *token == other);
    let top = position.top.iter().map(|(_, logprob)| *logprob);
    let best = top.fold(position.logprob, f32::max);
    Some(of_other.is_some_and(|(_, logprob)| best - logprob <= MARGIN))
}

fn vectors_agree(one: &[f32], two: &[f32]) -> bool {
    if one.len() != two.len() || one.is_empty() {
        return false;
    }
    let dot = |a: &[f32], b: &[f32]| -> f64 {
        let products = a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b));
        products.sum()
    };
    let lengths = (dot(one, one) * dot(two, two)).sqrt();
    // False for NaN and for vectors without a direction.
    dot(one, two) / lengths >= LEAST_COSINE
}

/// Alternatives that are asked for with each.
pub const ALTERNATIVES: u32 = 5;

/// Natural logarithm of how much likelier a token may be than another that takes its place on a machine with
/// other rounding. SmolLM2-135M on scalar kernels (floats) and on AVX2 (8-bit activations) chooses other
/// tokens within eight for every second question, and 0.35 was the most here; weights in 4 and in 8 bits are
/// further apart.
const MARGIN: f32 = 2.0;

/// Largest accepted difference of one token's log probability between two machines, in nats; 0.2 was the most
/// in the measurements for [`MARGIN`].
const LOGPROB_TOLERANCE: f32 = 3.0;

/// Equal tokens after which an earlier end on one side says nothing.
const LEAST_COMMON: usize = 3;

/// Cosine of the angle between two vectors of the same text.
const LEAST_COSINE: f64 = 0.95;
