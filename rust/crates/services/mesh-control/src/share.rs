//! Limits the slots of a model that one source may hold while others use the model, too.
//!
//! The queue gives what becomes free to whoever has least, but answers are long: one source that holds all slots makes everybody
//! else wait for the end of one of its answers. So each source that used the model lately is left as many slots as it had
//! requests at once, up to an even share and up to half of all. Nor does free room make others fast: every answer that runs takes
//! from the processors. So a source has no more than all others together, or a third of all where they have less. A source alone
//! is not limited.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::fair::Source;

/// Recent use of models, by source.
#[derive(Debug, Default)]
pub(crate) struct Shares {
    of: BTreeMap<String, BTreeMap<Source, RecentUse>>,
}

#[derive(Debug, Clone, Copy)]
struct RecentUse {
    /// Most requests at once, not long ago.
    most: usize,
    last: Instant,
}

impl Shares {
    /// A request of `source` for `model` came, which has `requests` then, waiting or running.
    pub(crate) fn note(&mut self, model: &str, source: Source, requests: usize, now: Instant) {
        if !self.of.contains_key(model) {
            if self.of.len() >= MOST_MODELS {
                self.expire(now);
            }
            if self.of.len() >= MOST_MODELS {
                return;
            }
            self.of.insert(model.to_owned(), BTreeMap::new());
        }
        let Some(sources) = self.of.get_mut(model) else {
            return;
        };
        if sources.len() >= MOST_SOURCES && !sources.contains_key(&source) {
            return;
        }
        let last = sources.entry(source).or_insert(RecentUse {
            most: requests,
            last: now,
        });
        let most = match now.saturating_duration_since(last.last) < LATELY {
            true => last.most.max(requests),
            false => requests,
        };
        *last = RecentUse { most, last: now };
    }

    /// The most of the `slots` that serve `model` that `source` may hold.
    pub(crate) fn most(&self, model: &str, source: Source, slots: usize, now: Instant) -> usize {
        let Some(sources) = self.of.get(model) else {
            return usize::MAX;
        };
        let lately = |used: &&RecentUse| now.saturating_duration_since(used.last) < LATELY;
        let others = sources.iter().filter(|(other, _)| **other != source);
        let others = others.map(|(_, used)| used).filter(lately);
        let others: Vec<usize> = others.map(|used| used.most).collect();
        if others.is_empty() {
            // No limit, not even on the requests that a worker gets ahead of a free slot.
            return usize::MAX;
        }
        let even = (slots / (others.len() + 1)).max(1);
        let left: usize = others.iter().map(|most| (*most).min(even)).sum();
        let together: usize = others.iter().sum();
        let most = (slots - left.min(slots / 2)).min(together.max(slots.div_ceil(3).max(2)));
        most.max(1)
    }

    #[cfg(test)]
    pub(crate) fn models(&self) -> usize {
        self.of.len()
    }

    /// Forgets uses that are too old to count.
    pub(crate) fn expire(&mut self, now: Instant) {
        for sources in self.of.values_mut() {
            sources.retain(|_, used| now.saturating_duration_since(used.last) < LATELY);
        }
        self.of.retain(|_, sources| !sources.is_empty());
    }
}

/// Time after which a source that asked for nothing needs no slots.
const LATELY: Duration = Duration::from_secs(30);
/// Models for which sources are noted.
const MOST_MODELS: usize = 256;
/// Sources that are noted for a model.
const MOST_SOURCES: usize = 1024;

#[cfg(test)]
mod tests {
    use super::super::fair::{Ingress, Origin};
    use super::*;

    fn key(number: usize) -> Source {
        Source {
            ingress: Ingress::Http,
            origin: Origin::Key(number),
        }
    }

    #[test]
    fn a_source_alone_gets_all_and_leaves_others_what_they_use() {
        let now = Instant::now();
        let mut shares = Shares::default();
        shares.note("m", key(1), 1280, now);
        assert_eq!(shares.most("m", key(1), 12, now), usize::MAX);
        shares.note("m", key(2), 1, now);
        assert_eq!(shares.most("m", key(1), 12, now), 4, "a third");
        assert_eq!(shares.most("m", key(1), 3, now), 2);
        assert_eq!(shares.most("m", key(2), 12, now), 6);
        shares.note("m", key(2), 8, now);
        assert_eq!(shares.most("m", key(1), 12, now), 6);
        assert_eq!(shares.most("m", key(2), 12, now), 6);
        assert_eq!(shares.most("other", key(1), 12, now), usize::MAX);
        assert_eq!(shares.most("m", key(1), 1, now), 1);
        let later = now + LATELY;
        assert_eq!(shares.most("m", key(1), 12, later), usize::MAX);
        shares.expire(later);
        assert!(shares.of.is_empty());
    }

    #[test]
    fn a_bounded_number_of_models_is_noted() {
        let now = Instant::now();
        let mut shares = Shares::default();
        for number in 0..2 * MOST_MODELS {
            shares.note(&format!("m{number}"), key(1), 1, now);
        }
        assert_eq!(shares.of.len(), MOST_MODELS);
        shares.note("late", key(1), 1, now + LATELY);
        assert!(shares.of.len() == 1 && shares.of.contains_key("late"));
    }

    #[test]
    fn many_small_sources_leave_one_half_at_least() {
        let now = Instant::now();
        let mut shares = Shares::default();
        for number in 0..50 {
            shares.note("m", key(number), 1, now);
        }
        assert_eq!(shares.most("m", key(7), 12, now), 6);
    }
}
