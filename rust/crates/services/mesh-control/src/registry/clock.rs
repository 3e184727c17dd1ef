//! Arrival time of the last token, shared between threads.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Time of the last token from a worker. Shared with the tasks that follow its answers, so that no lock is
/// taken per token.
#[derive(Debug, Clone)]
pub struct TokenClock {
    origin: Instant,
    /// Microseconds since `origin`, plus 1; 0 is never.
    at: Arc<AtomicU64>,
}

impl TokenClock {
    pub(super) fn new(origin: Instant) -> Self {
        Self {
            origin,
            at: Arc::default(),
        }
    }

    /// Notes that a token came at `now`.
    pub fn note(&self, now: Instant) {
        let since = now.saturating_duration_since(self.origin).as_micros();
        let since = u64::try_from(since).unwrap_or(u64::MAX - 1);
        self.at.fetch_max(since + 1, Ordering::Relaxed);
    }

    /// Arrival time of the last token; `None` before the first.
    pub fn last(&self) -> Option<Instant> {
        let since = self.at.load(Ordering::Relaxed).checked_sub(1)?;
        self.origin.checked_add(Duration::from_micros(since))
    }
}
