//! A limit on a rate that lets bursts through.

use std::time::Instant;

/// A token bucket. Rate and burst are the caller's, who often has many buckets of one kind.
#[derive(Clone, Copy, Debug)]
pub struct TokenBucket {
    tokens: f64,
    filled: Instant,
}

impl TokenBucket {
    /// A bucket with `burst` tokens.
    pub fn full(burst: f64, now: Instant) -> Self {
        Self {
            tokens: burst,
            filled: now,
        }
    }

    /// Takes a token; false if the bucket is empty. `per_second` tokens come in each second, up to `burst`.
    pub fn take(&mut self, per_second: f64, burst: f64, now: Instant) -> bool {
        self.tokens = self.after(per_second, now).min(burst);
        self.filled = now;
        let has_one = self.tokens >= 1.0;
        if has_one {
            self.tokens -= 1.0;
        }
        has_one
    }

    /// True if it is as full as a new one.
    pub fn is_full(&self, per_second: f64, burst: f64, now: Instant) -> bool {
        self.after(per_second, now) >= burst
    }

    fn after(&self, per_second: f64, now: Instant) -> f64 {
        self.tokens + now.saturating_duration_since(self.filled).as_secs_f64() * per_second
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_burst_passes_and_then_the_rate() {
        let start = Instant::now();
        let mut bucket = TokenBucket::full(5.0, start);
        let mut taken = |after| {
            let now = start + Duration::from_millis(after);
            (0..100).filter(|_| bucket.take(10.0, 5.0, now)).count()
        };
        assert_eq!([taken(0), taken(200), taken(60_000)], [5, 2, 5]);
    }

    #[test]
    fn a_bucket_that_nothing_is_taken_from_fills_up() {
        let start = Instant::now();
        let mut bucket = TokenBucket::full(2.0, start);
        assert!(bucket.is_full(1.0, 2.0, start));
        assert!(bucket.take(1.0, 2.0, start));
        assert!(!bucket.is_full(1.0, 2.0, start + Duration::from_millis(999)));
        assert!(bucket.is_full(1.0, 2.0, start + Duration::from_secs(1)));
    }
}
