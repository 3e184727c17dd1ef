//! A table of fixed size that forgets the entries that were used longest ago.

use std::{
    hash::{BuildHasher, Hash, RandomState},
    time::Instant,
};

/// Values by key in sets of [`WAYS`] entries: allocated once, never more. A new key takes the place of the
/// entry of its set that was used longest ago. The hash is keyed, so an attacker cannot aim at a set.
#[derive(Debug)]
pub(super) struct FixedTable<K, V> {
    entries: Box<[Option<Entry<K, V>>]>,
    sets: usize,
    hasher: RandomState,
}

#[derive(Clone, Copy, Debug)]
struct Entry<K, V> {
    key: K,
    value: V,
    used: Instant,
}

impl<K: Copy + Eq + Hash, V: Copy> FixedTable<K, V> {
    /// Room for at least `capacity` entries.
    pub(super) fn new(capacity: usize) -> Self {
        let sets = capacity.div_ceil(WAYS).next_power_of_two();
        Self {
            entries: vec![None; sets * WAYS].into(),
            sets,
            hasher: RandomState::new(),
        }
    }

    /// The value of `key`, if it is still here.
    pub(super) fn get(&mut self, key: &K, now: Instant) -> Option<&mut V> {
        let mut entries = self.set(key).iter_mut().flatten();
        let entry = entries.find(|entry| entry.key == *key)?;
        entry.used = now;
        Some(&mut entry.value)
    }

    /// The value of `key`; `new` if it is not here.
    pub(super) fn get_or_insert(&mut self, key: K, new: V, now: Instant) -> &mut V {
        let is_it = |entry: &Entry<K, V>| entry.key == key;
        // The key's own place, else an empty one, as None sorts before every time, else that used longest ago.
        let places = self.set(&key).iter_mut();
        let place = places.min_by_key(|entry| {
            (
                !entry.as_ref().is_some_and(is_it),
                entry.map(|entry| entry.used),
            )
        });
        let place = place.expect("a set is not empty");
        let value = place.filter(is_it).map_or(new, |known| known.value);
        let used = now;
        &mut place.insert(Entry { key, value, used }).value
    }

    fn set(&mut self, key: &K) -> &mut [Option<Entry<K, V>>] {
        let set = self.hasher.hash_one(key) as usize & (self.sets - 1);
        &mut self.entries[set * WAYS..][..WAYS]
    }
}

const WAYS: usize = 4;

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_value_stays_until_its_set_is_full_of_newer_ones() {
        let mut table = FixedTable::new(1);
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        for key in 0..WAYS as u64 {
            *table.get_or_insert(key, 0, at(key)) += key;
        }
        // The oldest is used again, so the second oldest has to go.
        assert_eq!(table.get(&0, at(10)), Some(&mut 0));
        table.get_or_insert(99, 7, at(11));
        assert_eq!(table.get(&1, at(12)), None);
        assert_eq!(table.get(&0, at(12)), Some(&mut 0));
        assert_eq!(table.get(&99, at(12)), Some(&mut 7));
    }

    #[test]
    fn a_million_keys_need_no_more_room_than_one() {
        let mut table = FixedTable::new(64);
        let now = Instant::now();
        for key in 0..1_000_000u64 {
            table.get_or_insert(key, (), now);
        }
        assert_eq!(table.entries.len(), 64);
    }
}
