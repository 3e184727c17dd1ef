//! The tokens that each KV slot holds, the request that uses it, and the choice of a slot for a new request.

use crate::SlotId;
use crate::workload::RequestKey;

#[derive(Debug)]
pub(super) struct Slots {
    slots: Vec<Slot>,
    clock: u64,
}

#[derive(Debug, Default)]
struct Slot {
    /// Tokens whose KV rows the slot holds.
    cached: Vec<u32>,
    owner: Option<RequestKey>,
    /// The salt of the request that the rows are of; `None` where rows are held that no request here left.
    salt: Option<u64>,
    /// Number of the release that freed it last.
    released: u64,
}

/// Decides which cached rows a request may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Salt {
    pub(super) value: u64,
    /// It continues an answer that began elsewhere: rows of unknown owners, mirrored from a lost stage, may
    /// be its own.
    pub(super) goes_on: bool,
}

impl Salt {
    fn fits(self, rows: Option<u64>) -> bool {
        rows.map_or(self.goes_on, |salt| salt == self.value)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Placement {
    pub(super) slot: SlotId,
    /// KV rows that need not be computed.
    pub(super) reused: u32,
    /// The slot they are copied from, if not in place.
    pub(super) copy_from: Option<SlotId>,
}

impl Slots {
    pub(super) fn new(count: u32) -> Self {
        Slots {
            slots: (0..count).map(|_| Slot::default()).collect(),
            clock: 0,
        }
    }

    pub(super) fn count(&self) -> usize {
        self.slots.len()
    }

    pub(super) fn cached_len(&self, slot: SlotId) -> u32 {
        self.slots[slot as usize].cached.len() as u32
    }

    /// KV rows that no request uses.
    pub(super) fn idle_tokens(&self) -> u64 {
        let idle = self.slots.iter().filter(|slot| slot.owner.is_none());
        idle.map(|slot| slot.cached.len() as u64).sum()
    }

    /// The best slot for `tokens`; `None` if all are busy. At least the last token is left to compute.
    ///
    /// The longest common prefix wins. It is used in place if its slot is idle and little else is lost; otherwise it is
    /// copied, if that saves enough, to an empty slot or the one idle for the longest time.
    /// Rows of another salt are as good as none: how long a prefix of theirs is must not show.
    pub(super) fn place(&self, tokens: &[u32], salt: Salt) -> Option<Placement> {
        let victim = self.victim()?;
        let reusable = &tokens[..tokens.len().saturating_sub(1)];
        let common = |slot: SlotId| {
            let slot = &self.slots[slot as usize];
            match salt.fits(slot.salt) {
                true => common_prefix(&slot.cached, reusable),
                false => 0,
            }
        };
        let is_idle = |slot: SlotId| self.slots[slot as usize].owner.is_none();

        let source = (0..self.slots.len() as SlotId)
            .max_by_key(|&slot| (common(slot), is_idle(slot), std::cmp::Reverse(slot)))?;
        let (length, own) = (common(source), common(victim));
        let keeps_most = 2 * length >= self.cached_len(source);
        let (slot, reused, copy_from) =
            if length > 0 && is_idle(source) && (keeps_most || source == victim) {
                (source, length, None)
            } else if length >= own + WORTH_COPYING {
                (victim, length, Some(source))
            } else {
                (victim, own, None)
            };
        Some(Placement {
            slot,
            reused,
            copy_from,
        })
    }

    /// An idle slot for a request that computes every row; `None` if all are busy.
    pub(super) fn place_afresh(&self) -> Option<Placement> {
        let slot = self.victim()?;
        Some(Placement {
            slot,
            reused: 0,
            copy_from: None,
        })
    }

    /// Gives the slot of `placement` to `owner`; it then holds the reused rows only.
    pub(super) fn claim(
        &mut self,
        placement: Placement,
        tokens: &[u32],
        salt: Salt,
        owner: RequestKey,
    ) {
        let slot = &mut self.slots[placement.slot as usize];
        debug_assert!(slot.owner.is_none());
        slot.owner = Some(owner);
        slot.salt = Some(salt.value);
        slot.cached.clear();
        slot.cached
            .extend_from_slice(&tokens[..placement.reused as usize]);
    }

    /// Notes that the rows of `tokens` are computed next.
    pub(super) fn extend(&mut self, slot: SlotId, tokens: &[u32]) {
        self.slots[slot as usize].cached.extend_from_slice(tokens);
    }

    /// Applies the true content of the slot; returns the number of useful rows. A busy slot keeps the rows
    /// that match its request, at most `settled`, an idle one all of them.
    pub(super) fn resume(&mut self, slot: SlotId, held: &[u32], settled: u32) -> u32 {
        let slot = &mut self.slots[slot as usize];
        match slot.owner {
            Some(_) => {
                let same = common_prefix(&slot.cached, held).min(settled);
                slot.cached.truncate(same as usize);
            }
            None => {
                if slot.cached.len() < held.len() || slot.cached[..held.len()] != *held {
                    slot.salt = None;
                }
                slot.cached.clear();
                slot.cached.extend_from_slice(held);
            }
        }
        slot.cached.len() as u32
    }

    /// Makes the slot idle; its rows stay for later requests.
    pub(super) fn release(&mut self, slot: SlotId) {
        self.clock += 1;
        let slot = &mut self.slots[slot as usize];
        slot.owner = None;
        slot.released = self.clock;
    }

    pub(super) fn truncate(&mut self, slot: SlotId, len: u32) {
        self.slots[slot as usize].cached.truncate(len as usize);
    }

    pub(super) fn clear(&mut self, slot: SlotId) {
        self.slots[slot as usize].cached.clear();
    }

    /// The idle slot with rows whose release is longest ago.
    pub(super) fn least_recently_used(&self) -> Option<SlotId> {
        let with_rows = self.idle().filter(|&slot| self.cached_len(slot) > 0);
        with_rows.min_by_key(|&slot| self.slots[slot as usize].released)
    }

    /// The idle slot that is the least loss: an empty one, else the one idle for the longest time.
    fn victim(&self) -> Option<SlotId> {
        self.idle().min_by_key(|&slot| {
            let s = &self.slots[slot as usize];
            (!s.cached.is_empty(), s.released)
        })
    }

    fn idle(&self) -> impl Iterator<Item = SlotId> + '_ {
        (0..self.slots.len() as SlotId).filter(|&slot| self.slots[slot as usize].owner.is_none())
    }
}

fn common_prefix(a: &[u32], b: &[u32]) -> u32 {
    a.iter().zip(b).take_while(|(a, b)| a == b).count() as u32
}

/// Rows that a copy must save: copying a row costs far less than computing it, but a handful is not worth a pass over
/// every layer.
const WORTH_COPYING: u32 = 16;

#[cfg(test)]
mod tests {
    use super::*;

    const MINE: Salt = Salt {
        value: 1,
        goes_on: false,
    };
    const THEIRS: Salt = Salt {
        value: 2,
        goes_on: false,
    };

    fn slots(contents: &[(&[u32], bool)]) -> Slots {
        let mut slots = Slots::new(contents.len() as u32);
        for (i, (tokens, busy)) in contents.iter().enumerate() {
            slots.extend(i as SlotId, tokens);
            slots.slots[i].salt = Some(MINE.value);
            if *busy {
                slots.slots[i].owner = Some(i as RequestKey);
            } else {
                slots.release(i as SlotId);
            }
        }
        slots
    }

    fn range(tokens: std::ops::Range<u32>) -> Vec<u32> {
        tokens.collect()
    }

    #[test]
    fn the_next_turn_takes_the_slot_of_its_conversation() {
        let slots = slots(&[(&[], false), (&range(0..50), false), (&[], false)]);
        let place = slots.place(&range(0..80), MINE).unwrap();
        assert_eq!((place.slot, place.reused, place.copy_from), (1, 50, None));
    }

    #[test]
    fn the_last_token_is_always_left_to_compute() {
        let slots = slots(&[(&range(0..50), false)]);
        assert_eq!(slots.place(&range(0..50), MINE).unwrap().reused, 49);
        assert_eq!(slots.place(&range(0..10), MINE).unwrap().reused, 9);
        assert_eq!(slots.place(&[0], MINE).unwrap().reused, 0);
    }

    #[test]
    fn a_shared_beginning_is_copied_rather_than_costing_a_long_conversation() {
        let mut request = range(0..30);
        request.extend(500..520);
        let long = range(0..200);
        let place = slots(&[(&long, false), (&[], false)])
            .place(&request, MINE)
            .unwrap();
        assert_eq!(
            (place.slot, place.reused, place.copy_from),
            (1, 30, Some(0))
        );
        // With no other slot to go to, the conversation has to give way.
        let place = slots(&[(&long, false)]).place(&request, MINE).unwrap();
        assert_eq!((place.slot, place.reused, place.copy_from), (0, 30, None));
    }

    #[test]
    fn a_busy_slot_lends_its_rows_if_enough_of_them_match() {
        let slots = slots(&[(&range(0..40), true), (&[], false)]);
        let place = slots.place(&range(0..60), MINE).unwrap();
        assert_eq!(
            (place.slot, place.reused, place.copy_from),
            (1, 40, Some(0))
        );
        let mut little = range(0..10);
        little.extend(900..950);
        let place = slots.place(&little, MINE).unwrap();
        assert_eq!((place.slot, place.reused, place.copy_from), (1, 0, None));
    }

    #[test]
    fn a_stranger_takes_an_empty_slot_then_the_one_idle_longest() {
        let stranger = [900, 901];
        let old_new_empty = [(&[1u32, 2][..], false), (&[3, 4], false), (&[], false)];
        assert_eq!(
            slots(&old_new_empty).place(&stranger, MINE).unwrap().slot,
            2
        );
        assert_eq!(
            slots(&old_new_empty[..2])
                .place(&stranger, MINE)
                .unwrap()
                .slot,
            0
        );
        assert_eq!(slots(&[(&[1], true)]).place(&stranger, MINE), None);
    }

    #[test]
    fn rows_of_another_salt_are_as_good_as_none() {
        let prompt = range(0..80);
        let mut slots = slots(&[(&range(0..50), false), (&[], false)]);
        assert_eq!(slots.place(&prompt, MINE).unwrap().reused, 50);
        let place = slots.place(&prompt, THEIRS).unwrap();
        assert_eq!((place.slot, place.reused, place.copy_from), (1, 0, None));
        slots.claim(place, &prompt, THEIRS, 7);
        slots.extend(1, &prompt);
        assert_eq!(slots.place(&prompt, THEIRS).unwrap().copy_from, Some(1));
        assert_eq!(slots.place(&prompt, MINE).unwrap().reused, 50);
    }

    #[test]
    fn rows_of_unknown_owners_are_for_answers_that_go_on() {
        let prompt = range(0..80);
        let mut slots = slots(&[(&[], false)]);
        assert_eq!(slots.resume(0, &prompt[..60], u32::MAX), 60);
        assert_eq!(slots.place(&prompt, MINE).unwrap().reused, 0);
        let goes_on = Salt {
            goes_on: true,
            ..MINE
        };
        assert_eq!(slots.place(&prompt, goes_on).unwrap().reused, 60);
    }
}
