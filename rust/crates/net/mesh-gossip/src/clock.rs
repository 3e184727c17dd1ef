use std::time::Instant;

/// The time, as the caller sees it.
#[derive(Clone, Copy, Debug)]
pub struct Now {
    /// Monotonic clock, for intervals.
    pub instant: Instant,
    /// The mesh's time, seconds since the Unix epoch, for validity and expiry.
    pub unix: u64,
}

/// A bucket of tokens: a budget that refills.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Budget {
    tokens: f32,
    filled: Instant,
}

impl Budget {
    pub(crate) fn full(most: f32, now: Instant) -> Self {
        Self {
            tokens: most,
            filled: now,
        }
    }

    /// Takes one token, if one is left. `rate` is per second.
    pub(crate) fn take(&mut self, rate: f32, most: f32, now: Instant) -> bool {
        let passed = now.saturating_duration_since(self.filled).as_secs_f32();
        self.filled = now.max(self.filled);
        self.tokens = (self.tokens + passed * rate).min(most);
        let left = self.tokens >= 1.0;
        if left {
            self.tokens -= 1.0;
        }
        left
    }
}
