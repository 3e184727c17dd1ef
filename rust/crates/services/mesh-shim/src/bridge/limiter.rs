//! A token bucket per source.

use std::{
    net::IpAddr,
    time::{Duration, Instant},
};

use mesh_base::{addresses::source, token_bucket::TokenBucket};

use super::table::FixedTable;
use crate::config::RateLimit;

/// Limits how many datagrams each source may send. A source is an IPv4 address, or the /64 of an IPv6
/// address, since a single host usually commands the whole of that.
#[derive(Debug)]
pub(super) struct RateLimiter {
    buckets: FixedTable<IpAddr, Bucket>,
    per_second: f64,
    burst: f64,
}

#[derive(Clone, Copy, Debug)]
struct Bucket {
    tokens: TokenBucket,
    told: Option<Instant>,
}

/// Decision on a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RateDecision {
    /// It is within the limit.
    Pass,
    /// Over it. `tell` is set about once a second, for the source to be told why it hears nothing.
    Limited { tell: bool },
}

impl RateLimiter {
    pub(super) fn new(limit: &RateLimit) -> Self {
        let unlimited = limit.per_second == 0;
        Self {
            buckets: FixedTable::new(if unlimited { 1 } else { limit.sources }),
            per_second: limit.per_second.into(),
            burst: limit.burst.max(1).into(),
        }
    }

    pub(super) fn check(&mut self, address: IpAddr, now: Instant) -> RateDecision {
        if self.per_second == 0.0 {
            return RateDecision::Pass;
        }
        let full = Bucket {
            tokens: TokenBucket::full(self.burst, now),
            told: None,
        };
        let bucket = self.buckets.get_or_insert(source(address), full, now);
        if bucket.tokens.take(self.per_second, self.burst, now) {
            return RateDecision::Pass;
        }
        let is_old = |told| now.saturating_duration_since(told) >= TELL_INTERVAL;
        let tell = bucket.told.is_none_or(is_old);
        if tell {
            bucket.told = Some(now);
        }
        RateDecision::Limited { tell }
    }
}

const TELL_INTERVAL: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;

    fn limiter(per_second: u32, burst: u32) -> RateLimiter {
        RateLimiter::new(&RateLimit {
            per_second,
            burst,
            sources: 64,
        })
    }

    fn passed(limiter: &mut RateLimiter, source: &str, count: usize, now: Instant) -> usize {
        let source: IpAddr = source.parse().unwrap();
        (0..count)
            .filter(|_| limiter.check(source, now) == RateDecision::Pass)
            .count()
    }

    #[test]
    fn a_source_gets_its_burst_and_then_its_rate() {
        let mut limiter = limiter(100, 20);
        let start = Instant::now();
        assert_eq!(passed(&mut limiter, "10.0.0.1", 50, start), 20);
        assert_eq!(
            passed(
                &mut limiter,
                "10.0.0.1",
                50,
                start + Duration::from_millis(100)
            ),
            10
        );
        assert_eq!(
            passed(
                &mut limiter,
                "10.0.0.1",
                50,
                start + Duration::from_secs(60)
            ),
            20
        );
    }

    #[test]
    fn sources_do_not_share_a_bucket_but_a_slash_64_does() {
        let mut limiter = limiter(1, 5);
        let now = Instant::now();
        assert_eq!(passed(&mut limiter, "10.0.0.1", 9, now), 5);
        assert_eq!(passed(&mut limiter, "10.0.0.2", 9, now), 5);
        assert_eq!(passed(&mut limiter, "2001:db8::1", 3, now), 3);
        assert_eq!(passed(&mut limiter, "2001:db8::2", 9, now), 2);
    }

    #[test]
    fn a_limited_source_is_told_once_a_second() {
        let mut limiter = limiter(1, 1);
        let source = "10.0.0.1".parse().unwrap();
        let now = Instant::now();
        assert_eq!(limiter.check(source, now), RateDecision::Pass);
        assert_eq!(
            limiter.check(source, now),
            RateDecision::Limited { tell: true }
        );
        assert_eq!(
            limiter.check(source, now),
            RateDecision::Limited { tell: false }
        );
    }

    #[test]
    fn a_rate_of_zero_is_no_limit() {
        assert_eq!(
            passed(&mut limiter(0, 0), "10.0.0.1", 10_000, Instant::now()),
            10_000
        );
    }
}
