//! Pauses in streams, summed up.

use std::fmt;
use std::time::Duration;

/// Pauses of one kind.
#[derive(Debug, Clone, Default)]
pub struct Gaps(Vec<Duration>);

impl Gaps {
    /// Adds a pause.
    pub fn add(&mut self, gap: Duration) {
        self.0.push(gap);
    }

    /// Number of pauses.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// True if there are no pauses.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The pause that `percent` of all do not exceed (nearest rank); 0 if there are no pauses.
    pub fn percentile(&self, percent: u32) -> Duration {
        let mut sorted = self.0.clone();
        sorted.sort_unstable();
        let rank = (sorted.len() * percent as usize).div_ceil(100);
        sorted
            .get(rank.saturating_sub(1))
            .copied()
            .unwrap_or_default()
    }
}

impl fmt::Display for Gaps {
    /// `p50 300 ms, p95 420 ms, max 500 ms (n = 20)`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return f.write_str("none (n = 0)");
        }
        let [p50, p95, max] = [50, 95, 100].map(|percent| self.percentile(percent).as_millis());
        write!(
            f,
            "p50 {p50} ms, p95 {p95} ms, max {max} ms (n = {})",
            self.len()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_came() {
        let mut gaps = Gaps::default();
        for ms in (1..=20).rev() {
            gaps.add(Duration::from_millis(ms));
        }
        assert_eq!(gaps.to_string(), "p50 10 ms, p95 19 ms, max 20 ms (n = 20)");
        assert_eq!(Gaps::default().to_string(), "none (n = 0)");
    }
}
