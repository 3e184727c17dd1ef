//! The bytes of requests that are not complete, and whose are given up when there are too many. Nothing here reads or waits.
//!
//! Whoever sends a request gets room for it. When all is taken, the source that holds the most loses its oldest request, so what stays
//! unfinished makes room for what is finished soon.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

/// Bytes that are held, and by whom.
#[derive(Debug)]
pub(super) struct Budget<V> {
    limit: u64,
    total: u64,
    /// By age: ids only grow.
    held: BTreeMap<u64, Held<V>>,
    next: u64,
}

#[derive(Debug)]
struct Held<V> {
    source: IpAddr,
    bytes: u64,
    value: V,
}

impl<V> Budget<V> {
    pub(super) fn new(limit: u64) -> Self {
        Self {
            limit,
            total: 0,
            held: BTreeMap::new(),
            next: 0,
        }
    }

    /// A request begins.
    pub(super) fn enter(&mut self, source: IpAddr, value: V) -> u64 {
        let id = self.next;
        self.next += 1;
        let held = Held {
            source,
            bytes: 0,
            value,
        };
        self.held.insert(id, held);
        id
    }

    /// It got longer: those that have to go for it. The last one that holds anything stays.
    pub(super) fn grow(&mut self, id: u64, bytes: u64) -> Vec<V> {
        let Some(held) = self.held.get_mut(&id) else {
            return Vec::new();
        };
        held.bytes += bytes;
        self.total += bytes;
        let mut evicted = Vec::new();
        while self.total > self.limit {
            let mut holders = self.held.values().filter(|held| held.bytes > 0);
            if holders.nth(1).is_none() {
                break;
            }
            let Some(id) = self.oldest_of_the_most() else {
                break;
            };
            evicted.extend(self.leave(id));
        }
        evicted
    }

    /// It is complete, or given up.
    pub(super) fn leave(&mut self, id: u64) -> Option<V> {
        let held = self.held.remove(&id)?;
        self.total -= held.bytes;
        Some(held.value)
    }

    fn oldest_of_the_most(&self) -> Option<u64> {
        let mut sums: HashMap<IpAddr, u64> = HashMap::new();
        for held in self.held.values() {
            *sums.entry(held.source).or_default() += held.bytes;
        }
        let most = sums.values().copied().max()?;
        let mut oldest = self.held.iter();
        oldest
            .find(|(_, held)| held.bytes > 0 && sums.get(&held.source) == Some(&most))
            .map(|(&id, _)| id)
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
}
