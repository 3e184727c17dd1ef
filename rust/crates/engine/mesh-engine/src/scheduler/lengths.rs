//! Expected lengths of answers.

use crate::request::Finish;

/// A running estimate of how many tokens an answer takes, from the answers that ended lately.
///
/// The estimate is the mean plus the mean deviation, both smoothed, so that most answers stay below it. An answer that was
/// cut off says only that it would have been longer: it counts where that is news.
#[derive(Debug, Clone)]
pub(super) struct AnswerLengths {
    mean: f64,
    deviation: f64,
}

impl AnswerLengths {
    /// An estimate of `first` tokens until answers say better.
    pub(super) fn new(first: u32) -> Self {
        AnswerLengths {
            mean: f64::from(first) * 0.75,
            deviation: f64::from(first) * 0.25,
        }
    }

    /// An answer of `tokens` ended; `None` is one that was cancelled or failed.
    pub(super) fn record(&mut self, tokens: u32, finish: Option<Finish>) {
        let cut_off = finish != Some(Finish::Stop);
        if cut_off && u64::from(tokens) <= self.expected() {
            return;
        }
        let off = f64::from(tokens) - self.mean;
        self.mean += off * WEIGHT;
        self.deviation += (off.abs() - self.deviation) * WEIGHT;
    }

    /// Tokens that an answer is expected to take.
    pub(super) fn expected(&self) -> u64 {
        (self.mean + self.deviation).ceil().max(1.0) as u64
    }
}

/// Weight of the newest answer.
const WEIGHT: f64 = 1.0 / 16.0;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_estimate_follows_the_answers_and_stays_above_most_of_them() {
        let mut lengths = AnswerLengths::new(256);
        assert_eq!(lengths.expected(), 256);
        for _ in 0..200 {
            lengths.record(20, Some(Finish::Stop));
        }
        assert!((20..25).contains(&lengths.expected()));
        for i in 0..400 {
            lengths.record(if i % 2 == 0 { 500 } else { 700 }, Some(Finish::Stop));
        }
        assert!((680..730).contains(&lengths.expected()));
    }

    #[test]
    fn an_answer_that_was_cut_off_early_says_nothing() {
        let mut lengths = AnswerLengths::new(256);
        for _ in 0..100 {
            // Probes ask for one token.
            lengths.record(1, Some(Finish::Length));
            lengths.record(30, None);
        }
        assert_eq!(lengths.expected(), 256);
        for _ in 0..100 {
            lengths.record(4000, Some(Finish::Length));
        }
        assert!(lengths.expected() > 1000);
    }
}
