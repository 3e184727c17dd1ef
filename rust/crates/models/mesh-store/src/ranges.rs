//! Sets of byte ranges of a file.

use std::ops::Range;

/// A set of byte positions, kept as ascending ranges that neither overlap nor touch.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RangeSet {
    ranges: Vec<Range<u64>>,
}

impl RangeSet {
    /// The set of all bytes, `0..bytes`.
    pub fn whole(bytes: u64) -> Self {
        let mut set = RangeSet::default();
        set.insert(0..bytes);
        set
    }

    /// Adds `range`; an empty one adds nothing.
    pub fn insert(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        // Those that touch the new one become one with it.
        let first = self.ranges.partition_point(|held| held.end < range.start);
        let end = self.ranges.partition_point(|held| held.start <= range.end);
        let merged = match self.ranges.get(first..end) {
            Some([one]) => one.start.min(range.start)..one.end.max(range.end),
            Some([one, .., other]) => one.start.min(range.start)..other.end.max(range.end),
            _ => range,
        };
        self.ranges.splice(first..end, [merged]);
    }

    /// Removes `range` from the set.
    pub fn remove(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let first = self.ranges.partition_point(|held| held.end <= range.start);
        let end = self.ranges.partition_point(|held| held.start < range.end);
        if first >= end {
            return;
        }
        let before = self.ranges[first].start..range.start;
        let behind = range.end..self.ranges[end - 1].end;
        let rest = [before, behind].into_iter().filter(|rest| !rest.is_empty());
        self.ranges.splice(first..end, rest);
    }

    /// True if all of `range` is in the set.
    pub fn contains(&self, range: &Range<u64>) -> bool {
        if range.is_empty() {
            return true;
        }
        let at = self.ranges.partition_point(|held| held.end <= range.start);
        let held = self.ranges.get(at);
        held.is_some_and(|held| held.start <= range.start && range.end <= held.end)
    }

    /// The parts of `range` that are not in the set, ascending.
    pub fn missing(&self, range: Range<u64>) -> Vec<Range<u64>> {
        let mut missing = Vec::new();
        let mut at = range.start;
        let first = self.ranges.partition_point(|held| held.end <= range.start);
        for held in &self.ranges[first..] {
            if held.start >= range.end {
                break;
            }
            if held.start > at {
                missing.push(at..held.start);
            }
            at = at.max(held.end);
        }
        if at < range.end {
            missing.push(at..range.end);
        }
        missing
    }

    /// Number of bytes in the set.
    pub fn bytes(&self) -> u64 {
        let lengths = self.ranges.iter().map(|range| range.end - range.start);
        lengths.sum()
    }

    /// True if the set is empty.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// The ranges, ascending; between two of them is at least one byte.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Range<u64>> + '_ {
        self.ranges.iter().cloned()
    }
}

impl FromIterator<Range<u64>> for RangeSet {
    fn from_iter<I: IntoIterator<Item = Range<u64>>>(ranges: I) -> Self {
        let mut set = RangeSet::default();
        for range in ranges {
            set.insert(range);
        }
        set
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Positions that the naive set of the property test has.
    const SPAN: u64 = 64;

    fn range() -> impl Strategy<Value = Range<u64>> {
        (0..SPAN, 0..SPAN).prop_map(|(a, b)| a.min(b)..a.max(b))
    }

    proptest! {
        #[test]
        fn a_range_set_is_a_set_of_positions(steps in prop::collection::vec((any::<bool>(), range()), 0..40), asked in range()) {
            let mut set = RangeSet::default();
            let mut naive = [false; SPAN as usize];
            for (insert, range) in steps {
                match insert {
                    true => set.insert(range.clone()),
                    false => set.remove(range.clone()),
                }
                for at in range {
                    naive[at as usize] = insert;
                }
            }
            let mut positions = [false; SPAN as usize];
            let mut last = None;
            for range in set.iter() {
                prop_assert!(!range.is_empty());
                prop_assert!(last.is_none_or(|end| end < range.start), "{set:?}");
                last = Some(range.end);
                for at in range {
                    positions[at as usize] = true;
                }
            }
            prop_assert_eq!(positions, naive);
            prop_assert_eq!(set.bytes(), naive.iter().filter(|held| **held).count() as u64);
            let all = asked.clone().all(|at| naive[at as usize]);
            prop_assert_eq!(set.contains(&asked), all);
            let mut rest = asked.clone().filter(|&at| !naive[at as usize]).collect::<Vec<_>>();
            rest.reverse();
            for gap in set.missing(asked) {
                for at in gap {
                    prop_assert_eq!(rest.pop(), Some(at));
                }
            }
            prop_assert!(rest.is_empty());
        }
    }
}
