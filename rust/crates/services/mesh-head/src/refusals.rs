//! Refused keys and tokens, counted before they go to the audit trail, so that a flood of garbage does not
//! fill it.
//!
//! The first refusal of a kind is recorded at once; those that follow in the same minute become one record at
//! its end.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// A key or token that was refused. No part of its text is in here.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Refused {
    /// `http`, `quic` or `dcf`.
    pub door: &'static str,
    /// The kind of the reason.
    pub reason: &'static str,
    /// Id of the token, if its signatures hold, or of the API key, if it is known; else empty.
    pub id: String,
}

/// Refusals of the present minute. No clock.
#[derive(Debug, Default)]
pub(crate) struct Refusals {
    since: Option<Instant>,
    counted: HashMap<Refused, Counted>,
}

#[derive(Debug)]
struct Counted {
    /// Since the last record.
    times: u64,
    last: IpAddr,
}

/// A record to write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RefusedRecord {
    pub id: String,
    pub note: String,
}

impl Refusals {
    /// Notes a refusal; returns what is to be recorded now.
    pub(crate) fn note(
        &mut self,
        mut refused: Refused,
        from: IpAddr,
        now: Instant,
    ) -> Vec<RefusedRecord> {
        let mut records = self.flush_if_due(now);
        self.since.get_or_insert(now);
        // Whoever has a holder key can make any number of ids.
        if self.counted.len() >= MOST_KINDS && !self.counted.contains_key(&refused) {
            refused.id.clear();
        }
        match self.counted.get_mut(&refused) {
            Some(counted) => {
                counted.times += 1;
                counted.last = from;
            }
            None => {
                records.push(record(&refused, 1, from));
                let counted = Counted {
                    times: 0,
                    last: from,
                };
                self.counted.insert(refused, counted);
            }
        }
        records
    }

    /// What is to be recorded of a minute that is over.
    pub(crate) fn flush_if_due(&mut self, now: Instant) -> Vec<RefusedRecord> {
        let over = |since| now.saturating_duration_since(since) >= PERIOD;
        match self.since.is_some_and(over) {
            true => self.flush(),
            false => Vec::new(),
        }
    }

    /// All that was counted.
    pub(crate) fn flush(&mut self) -> Vec<RefusedRecord> {
        self.since = None;
        let counted = self.counted.drain();
        let counted = counted.filter(|(_, counted)| counted.times > 0);
        counted
            .map(|(refused, counted)| record(&refused, counted.times, counted.last))
            .collect()
    }
}

fn record(refused: &Refused, times: u64, from: IpAddr) -> RefusedRecord {
    let Refused { door, reason, id } = refused;
    let note = match times {
        1 => format!("{door}: {reason}, from {from}"),
        _ => format!("{door}: {reason}, {times} times, last from {from}"),
    };
    let id = id.clone();
    RefusedRecord { id, note }
}

const PERIOD: Duration = Duration::from_secs(60);
/// Kinds of refusals of one minute that are told apart by their ids.
const MOST_KINDS: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    const FROM: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

    fn refused(id: impl ToString) -> Refused {
        Refused {
            door: "http",
            reason: "expired",
            id: id.to_string(),
        }
    }

    #[test]
    fn the_first_refusal_is_recorded_at_once_and_the_others_of_its_minute_together() {
        let start = Instant::now();
        let mut refusals = Refusals::default();
        let first = refusals.note(refused("a1"), FROM, start);
        assert_eq!(first.len(), 1);
        assert_eq!(first[0].note, "http: expired, from 127.0.0.1");
        for _ in 0..1_000 {
            assert_eq!(refusals.note(refused("a1"), FROM, start), []);
        }
        assert_eq!(refusals.flush_if_due(start + PERIOD / 2), []);
        let rest = refusals.flush_if_due(start + PERIOD);
        assert_eq!(rest.len(), 1);
        assert_eq!(
            (rest[0].id.as_str(), rest[0].note.as_str()),
            ("a1", "http: expired, 1000 times, last from 127.0.0.1")
        );
        assert_eq!(refusals.flush(), []);
    }

    #[test]
    fn many_ids_make_a_bounded_number_of_records() {
        let now = Instant::now();
        let mut refusals = Refusals::default();
        let at_once: usize = (0..10_000)
            .map(|id| refusals.note(refused(id), FROM, now).len())
            .sum();
        assert_eq!(at_once, MOST_KINDS + 1);
        assert_eq!(refusals.counted.len(), MOST_KINDS + 1);
        assert_eq!(refusals.flush().len(), 1);
    }
}
