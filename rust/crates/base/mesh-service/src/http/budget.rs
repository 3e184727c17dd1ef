//! The memory of incomplete requests, and the choice of the one to give up. Nothing here reads or waits.
//!
//! A new request always gets room. When all is taken, the source that holds the most loses its oldest
//! request, so that slow requests make room for those that are finished soon.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;

/// Bytes held by incomplete requests. No operation scans all requests, since each arriving piece causes one.
#[derive(Debug)]
pub(super) struct Budget<V> {
    limit: u64,
    total: u64,
    /// Ids only grow.
    held: HashMap<u64, Request<V>>,
    /// Sources with requests that hold bytes.
    sources: HashMap<IpAddr, SourceRequests>,
    /// The same sources, ordered by their bytes.
    by_bytes: BTreeSet<(u64, IpAddr)>,
    /// Number of requests that hold bytes.
    holders: usize,
    next: u64,
}

#[derive(Debug)]
struct Request<V> {
    source: IpAddr,
    bytes: u64,
    value: V,
}

#[derive(Debug, Default)]
struct SourceRequests {
    bytes: u64,
    holders: BTreeSet<u64>,
}

impl<V> Budget<V> {
    pub(super) fn new(limit: u64) -> Self {
        Self {
            limit,
            total: 0,
            held: HashMap::new(),
            sources: HashMap::new(),
            by_bytes: BTreeSet::new(),
            holders: 0,
            next: 0,
        }
    }

    /// Adds a request without bytes; returns its id.
    pub(super) fn enter(&mut self, source: IpAddr, value: V) -> u64 {
        let id = self.next;
        self.next += 1;
        let held = Request {
            source,
            bytes: 0,
            value,
        };
        self.held.insert(id, held);
        id
    }

    /// Adds bytes to a request; returns the requests to give up for it. The last one with any bytes stays.
    pub(super) fn grow(&mut self, id: u64, bytes: u64) -> Vec<V> {
        if bytes == 0 {
            return Vec::new();
        }
        let Some(held) = self.held.get_mut(&id) else {
            return Vec::new();
        };
        held.bytes += bytes;
        self.total += bytes;
        let address = held.source;
        let source = self.sources.entry(address).or_default();
        self.by_bytes.remove(&(source.bytes, address));
        source.bytes += bytes;
        self.by_bytes.insert((source.bytes, address));
        self.holders += usize::from(source.holders.insert(id));
        let mut evicted = Vec::new();
        while self.total > self.limit && self.holders > 1 {
            let Some(id) = self.oldest_of_the_most() else {
                break;
            };
            evicted.extend(self.leave(id));
        }
        evicted
    }

    /// Removes a request that is complete or given up.
    pub(super) fn leave(&mut self, id: u64) -> Option<V> {
        let held = self.held.remove(&id)?;
        self.total -= held.bytes;
        if let Some(source) = self.sources.get_mut(&held.source)
            && source.holders.remove(&id)
        {
            self.holders -= 1;
            self.by_bytes.remove(&(source.bytes, held.source));
            source.bytes -= held.bytes;
            if source.holders.is_empty() {
                self.sources.remove(&held.source);
            } else {
                self.by_bytes.insert((source.bytes, held.source));
            }
        }
        Some(held.value)
    }

    fn oldest_of_the_most(&self) -> Option<u64> {
        let (_, most) = self.by_bytes.last()?;
        self.sources.get(most)?.holders.first().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(last: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, last])
    }

    #[test]
    fn what_stays_unfinished_makes_room_oldest_first_of_whoever_holds_the_most() {
        let mut budget = Budget::new(100);
        let honest = budget.enter(ip(1), "honest");
        assert!(budget.grow(honest, 30).is_empty());
        let flood: Vec<u64> = ["a", "b", "c"].map(|name| budget.enter(ip(2), name)).into();
        for id in &flood {
            assert!(budget.grow(*id, 20).is_empty());
        }
        assert_eq!(budget.grow(flood[2], 20), ["a"]);
        assert_eq!(budget.grow(honest, 20), ["b"]);
        assert!(budget.grow(flood[0], 1000).is_empty(), "it is gone");
        assert_eq!((budget.total, budget.leave(honest)), (90, Some("honest")));
        assert_eq!(budget.leave(honest), None);
    }

    #[test]
    fn the_last_one_stays_however_long_it_is() {
        let mut budget = Budget::new(10);
        let silent = budget.enter(ip(1), "silent");
        let long = budget.enter(ip(2), "long");
        assert!(budget.grow(long, 50).is_empty());
        assert_eq!(budget.grow(silent, 1), ["long"]);
        budget.leave(silent);
        assert_eq!((budget.total, budget.held.len()), (0, 0));
    }

    #[test]
    fn a_flood_of_short_requests_costs_little_for_each_piece() {
        let mut budget = Budget::new(16 << 20);
        let mut ids = Vec::new();
        let started = std::time::Instant::now();
        let mut evicted = 0;
        for n in 0..100_000_u64 {
            let address = IpAddr::from([10, 1, (n >> 4) as u8, (n >> 12) as u8]);
            let id = budget.enter(address, n);
            evicted += budget.grow(id, 240).len();
            ids.push(id);
        }
        // To go through all of them for each one beyond the budget took minutes.
        assert!(started.elapsed() < std::time::Duration::from_secs(10));
        assert_eq!(evicted, 100_000 - (16 << 20) / 240);
        assert_eq!(budget.holders, (16 << 20) / 240);
        for id in ids {
            budget.leave(id);
        }
        assert_eq!((budget.total, budget.holders), (0, 0));
        assert!(budget.sources.is_empty() && budget.by_bytes.is_empty());
    }
}
