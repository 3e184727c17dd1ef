//! Measured speeds of a stage.

use std::time::Duration;

/// Decode speed at each batch size, and prefill speed, as moving averages over the time spent computing.
#[derive(Debug, Clone, Default)]
pub(super) struct Speeds {
    /// Rates by the logarithm of the batch size: 1, 2 to 3, 4 to 7, ...
    decode: [Rate; BATCH_SIZES],
    prefill: Rate,
}

impl Speeds {
    /// Takes in a step of `decode` rows that continue answers and `prefill` rows of prompts that took `elapsed`.
    pub(super) fn record(&mut self, decode: u32, prefill: u32, elapsed: Duration) {
        let seconds = elapsed.as_secs_f64();
        match (decode, prefill) {
            (0, _) => self.prefill.record(prefill, seconds),
            (_, 0) => self.decode[class(decode)].record(decode, seconds),
            // In a mixed step, the prompt's share is the time beyond that of the answers alone.
            _ => {
                let rest = match self.decode(decode) {
                    Some(speed) => seconds - f64::from(decode) / speed,
                    None => seconds,
                };
                if rest > 0.0 {
                    self.prefill.record(prefill, rest);
                }
            }
        }
    }

    /// Decoded tokens per second over all streams while `batch` answers are in progress, measured at the
    /// nearest batch size.
    pub(super) fn decode(&self, batch: u32) -> Option<f64> {
        let wanted = class(batch.max(1));
        let measured = (0..BATCH_SIZES).filter(|&i| self.decode[i].per_second().is_some());
        let nearest = measured.min_by_key(|&i| i.abs_diff(wanted))?;
        self.decode[nearest].per_second()
    }

    pub(super) fn prefill(&self) -> Option<f64> {
        self.prefill.per_second()
    }
}

/// Index of the size class of `batch`, which is at least 1.
fn class(batch: u32) -> usize {
    (batch.ilog2() as usize).min(BATCH_SIZES - 1)
}

/// Tokens over seconds, both fading with the time measured.
#[derive(Debug, Clone, Default)]
struct Rate {
    tokens: f64,
    seconds: f64,
}

impl Rate {
    fn record(&mut self, tokens: u32, seconds: f64) {
        let keep = (-seconds / MEMORY_SECONDS).exp();
        self.tokens = self.tokens * keep + f64::from(tokens);
        self.seconds = self.seconds * keep + seconds;
    }

    fn per_second(&self) -> Option<f64> {
        (self.seconds > 0.0).then(|| self.tokens / self.seconds)
    }
}

/// Batch sizes that are told apart: up to 127, and more.
const BATCH_SIZES: usize = 8;

/// Computing time after which a measurement counts a third.
const MEMORY_SECONDS: f64 = 2.0;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_of_speed_shows_within_seconds() {
        let mut speeds = Speeds::default();
        assert_eq!(speeds.decode(1), None);
        for _ in 0..1000 {
            speeds.record(1, 0, Duration::from_millis(10));
        }
        assert!((speeds.decode(1).unwrap() - 100.0).abs() < 1.0);
        for _ in 0..200 {
            speeds.record(1, 0, Duration::from_millis(50));
        }
        assert!((speeds.decode(1).unwrap() - 20.0).abs() < 1.0);
    }

    #[test]
    fn batch_sizes_are_told_apart() {
        let mut speeds = Speeds::default();
        speeds.record(1, 0, Duration::from_millis(10));
        speeds.record(8, 0, Duration::from_millis(20));
        assert!((speeds.decode(0).unwrap() - 100.0).abs() < 1.0);
        assert!((speeds.decode(9).unwrap() - 400.0).abs() < 1.0);
        assert!((speeds.decode(1000).unwrap() - 400.0).abs() < 1.0);
    }

    #[test]
    fn a_mixed_step_counts_the_time_beyond_its_decode_rows_as_prefill() {
        let mut speeds = Speeds::default();
        for _ in 0..100 {
            speeds.record(4, 0, Duration::from_millis(20));
        }
        for _ in 0..100 {
            speeds.record(4, 40, Duration::from_millis(60));
        }
        assert!((speeds.decode(4).unwrap() - 200.0).abs() < 1.0);
        assert!((speeds.prefill().unwrap() - 1000.0).abs() < 10.0);
    }
}
