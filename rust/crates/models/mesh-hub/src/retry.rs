//! The policy for retries and the pauses between them, without a clock or randomness of its own.

use std::time::Duration;

use mesh_base::backoff::Backoff;

/// Limits on retries and pauses.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RetryPolicy {
    /// Number of consecutive failures after which to give up.
    pub attempts: u32,
    /// Pause after the first failure; doubles with each further one.
    pub base: Duration,
    /// Maximum pause between retries.
    pub longest: Duration,
    /// Maximum pause that a server may ask for; longer ones are an error.
    pub patience: Duration,
    /// Bytes of progress after which a failure counts as the first one again.
    pub progress: u64,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self {
            attempts: 6,
            base: Duration::from_millis(500),
            longest: Duration::from_secs(20),
            patience: Duration::from_secs(300),
            progress: 64 << 10,
        }
    }
}

/// Counts failures in a row.
#[derive(Debug, Clone)]
pub struct Retry {
    policy: RetryPolicy,
    backoff: Backoff,
    arrived: u64,
}

impl Retry {
    /// Nothing has failed yet.
    pub fn new(policy: RetryPolicy) -> Self {
        Self {
            policy,
            backoff: Backoff::new(policy.base, policy.longest),
            arrived: 0,
        }
    }

    /// So many bytes arrived.
    pub fn arrived(&mut self, bytes: u64) {
        self.arrived = self.arrived.saturating_add(bytes);
        if self.arrived >= self.policy.progress {
            self.backoff.reset();
            self.arrived = 0;
        }
    }

    /// An attempt failed, and the server asked for a pause. How long to wait before the next one, with
    /// `random` from 0 to 1 so that clients which were cut off together do not come back together; none if it
    /// is to be given up.
    pub fn failed(&mut self, retry_after: Option<Duration>, random: f64) -> Option<Duration> {
        let pause = self.backoff.failed(random);
        self.arrived = 0;
        if self.failures() >= self.policy.attempts
            || retry_after.is_some_and(|wanted| wanted > self.policy.patience)
        {
            return None;
        }
        Some(pause.max(retry_after.unwrap_or_default()))
    }

    /// Failures since the last progress.
    pub fn failures(&self) -> u32 {
        self.backoff.failures()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy() -> RetryPolicy {
        RetryPolicy {
            attempts: 5,
            base: Duration::from_millis(100),
            longest: Duration::from_millis(300),
            patience: Duration::from_secs(10),
            progress: 1000,
        }
    }

    #[test]
    fn pauses_double_up_to_the_longest_and_then_it_is_given_up() {
        let mut retry = Retry::new(policy());
        let pauses: Vec<_> = std::iter::from_fn(|| retry.failed(None, 1.0))
            .map(|pause| pause.as_millis())
            .collect();
        assert_eq!(pauses, [100, 200, 300, 300]);
        assert_eq!(retry.failures(), 5);
    }

    #[test]
    fn chance_takes_up_to_half_of_a_pause() {
        let pause = |random| Retry::new(policy()).failed(None, random).unwrap();
        assert_eq!(pause(0.0), Duration::from_millis(50));
        assert_eq!(pause(0.5), Duration::from_millis(75));
    }

    #[test]
    fn what_the_server_asks_for_is_waited_unless_it_is_too_long() {
        let mut retry = Retry::new(policy());
        assert_eq!(
            retry.failed(Some(Duration::from_secs(3)), 0.3),
            Some(Duration::from_secs(3))
        );
        // Less than one's own pause does not shorten it.
        assert_eq!(
            retry.failed(Some(Duration::ZERO), 1.0),
            Some(Duration::from_millis(200))
        );
        assert_eq!(retry.failed(Some(Duration::from_secs(11)), 0.3), None);
    }

    #[test]
    fn only_real_progress_forgives_failures() {
        let mut retry = Retry::new(policy());
        for _ in 0..3 {
            retry.failed(None, 0.0);
            retry.arrived(400);
        }
        assert_eq!(retry.failures(), 3);
        retry.arrived(600);
        assert_eq!(retry.failures(), 0);
        // A server that gives a byte at a time does not keep one forever.
        for _ in 0..4 {
            retry.arrived(1);
            assert!(retry.failed(None, 0.0).is_some());
        }
        retry.arrived(1);
        assert!(retry.failed(None, 0.0).is_none());
    }
}
