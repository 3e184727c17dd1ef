//! A bounded number of places, shared fairly among the sources that hold them.
//!
//! A newcomer always gets a place. When a source has its share, its own oldest place is given up; when all
//! are taken, the oldest of the source that has the most. So short uses get a place even if others hold
//! theirs for long.

#[cfg(feature = "tokio")]
mod room;

use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;

#[cfg(feature = "tokio")]
pub use room::{GivenUp, Room};

/// Places for values `V`, held by sources `K`.
#[derive(Debug)]
pub struct Places<K, V> {
    total: usize,
    per_source: usize,
    /// By age: ids only grow.
    held: BTreeMap<u64, (K, V)>,
    counts: HashMap<K, usize>,
    next: u64,
}

impl<K: Clone + Eq + Hash, V> Places<K, V> {
    /// Creates `total` places, of which each source may have `per_source`. Both are at least one.
    pub fn new(total: usize, per_source: usize) -> Self {
        Self {
            total: total.max(1),
            per_source: per_source.max(1),
            held: BTreeMap::new(),
            counts: HashMap::new(),
            next: 0,
        }
    }

    /// Takes a place. Returns its id, and the value whose place was given up for it, if any.
    pub fn enter(&mut self, source: K, value: V) -> (u64, Option<V>) {
        let of_source = self.counts.get(&source).copied().unwrap_or(0);
        let loser = if of_source >= self.per_source {
            self.oldest_of(&source)
        } else if self.held.len() >= self.total {
            self.oldest_of_the_most()
        } else {
            None
        };
        let evicted = loser.and_then(|id| self.leave(id));
        let id = self.next;
        self.next += 1;
        *self.counts.entry(source.clone()).or_default() += 1;
        self.held.insert(id, (source, value));
        (id, evicted)
    }

    /// Gives a place back; `None` if it was given up before.
    pub fn leave(&mut self, id: u64) -> Option<V> {
        let (source, value) = self.held.remove(&id)?;
        if let Some(count) = self.counts.get_mut(&source) {
            *count -= 1;
            if *count == 0 {
                self.counts.remove(&source);
            }
        }
        Some(value)
    }

    /// Number of places that are held.
    pub fn len(&self) -> usize {
        self.held.len()
    }

    /// True if no place is held.
    pub fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    fn oldest_of(&self, source: &K) -> Option<u64> {
        let mut held = self.held.iter();
        held.find(|(_, (holder, _))| holder == source)
            .map(|(&id, _)| id)
    }

    /// The oldest place of the source with the most places; among equals, the oldest of all.
    fn oldest_of_the_most(&self) -> Option<u64> {
        let most = self.counts.values().copied().max()?;
        let mut held = self.held.iter();
        held.find(|(_, (source, _))| self.counts.get(source) == Some(&most))
            .map(|(&id, _)| id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_house_gives_up_the_oldest_place_of_whoever_has_the_most() {
        let mut places = Places::new(4, 4);
        let (honest, _) = places.enter("honest", 0);
        let flood: Vec<u64> = (1..4).map(|n| places.enter("flood", n).0).collect();
        assert_eq!(places.enter("other", 9).1, Some(1));
        assert_eq!(places.len(), 4);
        assert_eq!(places.leave(flood[0]), None, "it was given up");
        assert_eq!(places.leave(honest), Some(0));
        assert_eq!(places.enter("flood", 4).1, None);
        assert_eq!(places.enter("flood", 5).1, Some(2));
    }

    #[test]
    fn a_source_with_its_share_gives_up_its_own() {
        let mut places = Places::new(100, 2);
        places.enter("other", 0);
        places.enter("flood", 1);
        places.enter("flood", 2);
        for n in 3..1000 {
            assert_eq!(places.enter("flood", n).1, Some(n - 2));
        }
        assert_eq!(places.len(), 3);
    }

    #[test]
    fn many_sources_with_one_place_each_lose_the_oldest() {
        let mut places = Places::new(3, 3);
        let lost: Vec<Option<u32>> = (0..6)
            .map(|source| places.enter(source, source).1)
            .collect();
        assert_eq!(lost, [None, None, None, Some(0), Some(1), Some(2)]);
    }

    #[test]
    fn whoever_left_holds_nothing() {
        let mut places = Places::new(2, 1);
        for n in 0..100 {
            let (id, evicted) = places.enter("one", n);
            assert_eq!((evicted, places.leave(id)), (None, Some(n)));
        }
        assert!(places.is_empty() && places.counts.is_empty());
    }
}
