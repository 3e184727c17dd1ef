//! Exponential backoff: growing pauses between attempts.

use std::time::Duration;

/// Exponential backoff with jitter, so that many that lost the same peer do not all come back in the same
/// moment. Neither waits nor draws random numbers itself.
#[derive(Debug, Clone)]
pub struct Backoff {
    first: Duration,
    longest: Duration,
    failures: u32,
}

impl Backoff {
    /// Pauses of up to `first` after the first failure, twice as much after each further one, at most
    /// `longest`.
    pub const fn new(first: Duration, longest: Duration) -> Self {
        Self {
            first,
            longest,
            failures: 0,
        }
    }

    /// An attempt failed: the pause before the next one, from half of the limit to all of it as `random` goes
    /// from 0 to 1. Never less than half, so that a dead peer is not hammered by chance.
    pub fn failed(&mut self, random: f64) -> Duration {
        let limit = self.first.saturating_mul(1 << self.failures.min(16));
        self.failures = self.failures.saturating_add(1);
        limit
            .min(self.longest)
            .mul_f64(0.5 + random.clamp(0.0, 1.0) / 2.0)
    }

    /// Resets the pause after a successful attempt.
    pub fn reset(&mut self) {
        self.failures = 0;
    }

    /// Failures since the last success.
    pub fn failures(&self) -> u32 {
        self.failures
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: Duration = Duration::from_millis(100);
    const LONGEST: Duration = Duration::from_secs(5);

    #[test]
    fn pauses_double_up_to_a_limit_and_begin_anew_after_success() {
        let mut backoff = Backoff::new(FIRST, LONGEST);
        let pauses: Vec<u128> = (0..8).map(|_| backoff.failed(1.0).as_millis()).collect();
        assert_eq!(pauses, [100, 200, 400, 800, 1600, 3200, 5000, 5000]);
        assert_eq!(backoff.failures(), 8);
        backoff.reset();
        assert_eq!((backoff.failures(), backoff.failed(1.0)), (0, FIRST));
    }

    #[test]
    fn chance_takes_up_to_half_of_a_pause() {
        let pause = |random| Backoff::new(FIRST, LONGEST).failed(random).as_millis();
        assert_eq!([0.0, 0.5, 1.0].map(pause), [50, 75, 100]);
        assert_eq!([-1.0, 7.0].map(pause), [50, 100], "out of range");
    }

    #[test]
    fn any_number_of_failures_is_counted() {
        let mut backoff = Backoff::new(Duration::MAX, Duration::MAX);
        backoff.failures = u32::MAX;
        assert!(backoff.failed(0.0) > LONGEST);
        assert_eq!(backoff.failures(), u32::MAX);
    }
}
