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
        let entry = self
            .set(key)
            .iter_mut()
            .flatten()
            .find(|entry| entry.key == *key)?;
        entry.used = now;
        Some(&mut entry.value)
    }

    /// The value of `key`; `new` if it is not here.
    pub(super) fn get_or_insert(&mut self, key: K, new: V, now: Instant) -> &mut V {
        let set = self.set(&key);
        let place = match set
            .iter()
            .position(|entry| entry.as_ref().is_some_and(|entry| entry.key == key))
        {
            Some(place) => place,
            None => {
                // None sorts before every time, so empty places go first.
                let (place, _) = set
                    .iter()
                    .enumerate()
                    .min_by_key(|(_, entry)| entry.as_ref().map(|entry| entry.used))
                    .expect("a set is not empty");
                set[place] = Some(Entry {
                    key,
                    value: new,
                    used: now,
                });
                place
            }
        };
        let entry = set[place].as_mut().expect("the place was found or filled");
        entry.used = now;
        &mut entry.value
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
