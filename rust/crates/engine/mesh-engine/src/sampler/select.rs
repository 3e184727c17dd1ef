//! The likeliest tokens of a row, without sorting the row.

use std::cmp::Ordering;

/// A token and its logit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Candidate {
    pub(super) logit: f32,
    pub(super) token: u32,
}

impl Candidate {
    /// Likeliest first, the lower id first among equals.
    fn order(&self, other: &Self) -> Ordering {
        let by_logit = other.logit.partial_cmp(&self.logit);
        by_logit
            .unwrap_or(Ordering::Equal)
            .then(self.token.cmp(&other.token))
    }
}

/// Puts the `k` likeliest tokens whose logit is at least `floor` into `out`, likeliest first. NaN and minus infinity
/// are never among them.
///
/// One pass: tokens above a rising threshold are collected, and whenever twice as many as wanted are there, the lesser
/// half is dropped and the threshold raised.
pub(super) fn top(row: &[f32], k: usize, floor: f32, out: &mut Vec<Candidate>) {
    out.clear();
    if k == 0 {
        return;
    }
    let limit = k.saturating_mul(2).max(64);
    let mut above = floor.next_down();
    for (b, block) in row.chunks(BLOCK).enumerate() {
        if !any_above(block, above) {
            continue;
        }
        collect_above(b, block, above, out);
        if out.len() >= limit {
            keep_best(out, k);
            above = out[k - 1].logit;
        }
    }
    if out.len() > k {
        keep_best(out, k);
    }
    out.sort_unstable_by(Candidate::order);
}

/// Puts all tokens whose logit is at least `floor` into `out`, in order of ids.
pub(super) fn at_least(row: &[f32], floor: f32, out: &mut Vec<Candidate>) {
    out.clear();
    let above = floor.next_down();
    for (b, block) in row.chunks(BLOCK).enumerate() {
        if any_above(block, above) {
            collect_above(b, block, above, out);
        }
    }
}

/// Leaves the best `k` at the front, the least of them at index `k - 1`.
fn keep_best(out: &mut Vec<Candidate>, k: usize) {
    out.select_nth_unstable_by(k - 1, Candidate::order);
    out.truncate(k);
}

/// Appends the tokens of block `b` whose logit is above `threshold`.
#[inline]
fn collect_above(b: usize, block: &[f32], threshold: f32, out: &mut Vec<Candidate>) {
    for (i, &logit) in block.iter().enumerate() {
        if logit > threshold {
            let token = (b * BLOCK + i) as u32;
            out.push(Candidate { logit, token });
        }
    }
}

fn any_above(block: &[f32], threshold: f32) -> bool {
    block
        .iter()
        .fold(false, |found, &x| found | (x > threshold))
}

const BLOCK: usize = 64;
