//! Speeds as the head measures them: from its own counts and the times at which messages arrive.

use std::time::Duration;

/// Amounts and the time that they took, with the newest weighing most.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Measured {
    amount: f64,
    seconds: f64,
}

impl Measured {
    /// Adds `amount` units that came within `took`.
    pub fn add(&mut self, amount: f64, took: Duration) {
        if amount <= 0.0 {
            return;
        }
        let keep = 1.0 - (amount / WINDOW).min(1.0);
        self.amount = self.amount * keep + amount;
        self.seconds = self.seconds * keep + took.as_secs_f64().max(amount / FASTEST);
    }

    /// Per second; `None` before the first measurement.
    pub(crate) fn rate(&self) -> Option<f64> {
        (self.amount > 0.0).then(|| self.amount / self.seconds)
    }

    /// The speed to count on. A worker's own `claim` counts before the first measurement only, and not beyond
    /// `best`, the best that was measured on any worker. After few measurements the speed is taken for up to
    /// half as high again, and not beyond `best` either, so that a worker with a bad start is tried again.
    pub(crate) fn believed(&self, claim: f64, best: Option<f64>) -> f64 {
        match self.rate() {
            None => claim.min(best.unwrap_or(FASTEST)),
            Some(rate) => {
                let doubt = 1.0 - (self.amount / ENOUGH).min(1.0);
                let hopeful = rate * (1.0 + doubt / 2.0);
                rate.max(hopeful.min(best.unwrap_or(rate)))
            }
        }
    }
}

/// Tokens after which a measurement is forgotten.
const WINDOW: f64 = 1024.0;
/// Tokens that make a measurement sure.
const ENOUGH: f64 = 128.0;
/// Tokens per second that nothing exceeds.
const FASTEST: f64 = 100_000.0;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_claim_counts_until_the_first_measurement_and_within_what_others_do() {
        let mut measured = Measured::default();
        assert_eq!(measured.believed(40.0, None), 40.0);
        assert_eq!(measured.believed(1e9, None), FASTEST);
        assert_eq!(measured.believed(1e9, Some(50.0)), 50.0);
        measured.add(1024.0, Duration::from_secs(100));
        assert!((measured.believed(1e9, Some(1e3)) - 10.24).abs() < 1e-9);
    }

    #[test]
    fn few_tokens_leave_hope_and_many_do_not() {
        let mut measured = Measured::default();
        measured.add(8.0, Duration::from_secs(1));
        let hopeful = measured.believed(0.0, Some(100.0));
        assert!(hopeful > 11.0 && hopeful < 12.0, "{hopeful}");
        assert_eq!(measured.believed(0.0, Some(9.0)), 9.0);
        for _ in 0..100 {
            measured.add(100.0, Duration::from_secs(1));
        }
        let sure = measured.believed(0.0, Some(1000.0));
        assert!(sure > 95.0 && sure < 105.0, "{sure}");
    }

    #[test]
    fn no_time_at_all_is_no_infinite_speed() {
        let mut measured = Measured::default();
        measured.add(1e6, Duration::ZERO);
        assert_eq!(measured.rate(), Some(FASTEST));
    }
}
