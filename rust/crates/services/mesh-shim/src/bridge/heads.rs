//! Tracks which heads are alive, and chooses the one that gets the tasks.

use std::time::{Duration, Instant};

use dcf::Version;

use super::versions::{PROBED, Speaks, Spoken};

/// The heads in the operator's order, one of which is current.
///
/// The current head stays current while it is alive, even if one before it in the order comes back: moving
/// tasks costs more than an order is worth. If it is not alive, the next live one takes over. If none is, it
/// stays current as long as it is merely silent, for some heads answer no probes.
#[derive(Debug)]
pub(super) struct Heads {
    heads: Box<[HeadRecord]>,
    current: usize,
    started: Instant,
    timing: Timing,
    next_probe: Instant,
    /// Head and version that are probed next.
    probe_cursor: usize,
    probe_round: u32,
}

/// Intervals for probing heads and giving them up.
#[derive(Clone, Copy, Debug)]
pub(super) struct Timing {
    pub(super) probe_interval: Duration,
    pub(super) timeout: Duration,
}

#[derive(Clone, Debug, Default)]
struct HeadRecord {
    last_heard: Option<Instant>,
    /// The port at its address is closed.
    refused: bool,
    draining_until: Option<Instant>,
    /// It was found silent or refusing and has not been heard since.
    lost: bool,
    /// Counts each loss and each return.
    epoch: u32,
    spoken: Spoken,
}

/// State of a head, as the bridge knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeadState {
    /// A datagram of it came within `head_timeout`.
    Live,
    /// No datagram of it came within `head_timeout`, or ever.
    Silent,
    /// Its machine reported that the port is closed.
    Refused,
    /// It said that it is shutting down.
    Draining,
}

impl Heads {
    pub(super) fn new(count: usize, timing: Timing, now: Instant) -> Self {
        assert!(count > 0, "the configuration names at least one head");
        Self {
            heads: vec![HeadRecord::default(); count].into(),
            current: 0,
            started: now,
            timing,
            next_probe: now,
            probe_cursor: 0,
            probe_round: 0,
        }
    }

    pub(super) fn current(&self) -> usize {
        self.current
    }

    pub(super) fn state(&self, head: usize, now: Instant) -> HeadState {
        let head = &self.heads[head];
        if head.refused {
            HeadState::Refused
        } else if head.draining_until.is_some_and(|until| now < until) {
            HeadState::Draining
        } else if head
            .last_heard
            .is_some_and(|heard| now < heard + self.timing.timeout)
        {
            HeadState::Live
        } else {
            HeadState::Silent
        }
    }

    /// Number of times that `head` was lost or came back. A task that it was sent under another epoch has to
    /// be sent again: a head that was away may have forgotten it.
    pub(super) fn epoch(&self, head: usize) -> u32 {
        self.heads[head].epoch
    }

    /// A datagram of this version came from `head`. Returns whether it had been lost.
    pub(super) fn heard(&mut self, head: usize, version: Version, now: Instant) -> bool {
        let head = &mut self.heads[head];
        head.last_heard = Some(now);
        head.spoken.note(version, now);
        head.refused = false;
        let returned = std::mem::take(&mut head.lost);
        head.epoch = head.epoch.wrapping_add(returned.into());
        returned
    }

    /// Finds the heads that have been lost; true if there are new ones.
    pub(super) fn find_lost(&mut self, now: Instant) -> bool {
        let mut found = false;
        for index in 0..self.heads.len() {
            let state = self.state(index, now);
            let head = &mut self.heads[index];
            let gone = state == HeadState::Refused
                || (state == HeadState::Silent && head.last_heard.is_some());
            if gone && !head.lost {
                head.lost = true;
                head.epoch = head.epoch.wrapping_add(1);
                // Another program may come back at its address.
                head.spoken = Spoken::default();
                found = true;
            }
        }
        found
    }

    /// The machine of `head` refused a datagram.
    pub(super) fn refused(&mut self, head: usize) {
        self.heads[head].refused = true;
        self.heads[head].draining_until = None;
    }

    /// `head` takes no new tasks for now.
    pub(super) fn draining(&mut self, head: usize, now: Instant) {
        self.heads[head].draining_until = Some(now + DRAINING);
    }

    /// Returns true if another head than `head` is live.
    pub(super) fn has_alternative(&self, head: usize, now: Instant) -> bool {
        let is_live = |head| self.state(head, now) == HeadState::Live;
        (0..self.heads.len()).any(|other| other != head && is_live(other))
    }

    /// Number of heads that are live.
    pub(super) fn live(&self, now: Instant) -> usize {
        let is_live = |&head: &usize| self.state(head, now) == HeadState::Live;
        (0..self.heads.len()).filter(is_live).count()
    }

    /// Chooses the current head; true if it changed.
    pub(super) fn choose(&mut self, now: Instant) -> bool {
        let in_order =
            || (0..self.heads.len()).map(|step| (self.current + step) % self.heads.len());
        let state = self.state(self.current, now);
        let starting = state == HeadState::Silent && now < self.started + self.timing.timeout;
        if state == HeadState::Live || starting {
            return false;
        }
        let live = in_order().find(|&head| self.state(head, now) == HeadState::Live);
        let silent = || match state {
            HeadState::Refused => {
                in_order().find(|&head| self.state(head, now) == HeadState::Silent)
            }
            _ => None,
        };
        let next = live.or_else(silent).unwrap_or(self.current);
        std::mem::replace(&mut self.current, next) != next
    }

    /// Returns true unless the current head refuses, so that a task has somewhere to go.
    pub(super) fn reachable(&self, now: Instant) -> bool {
        self.state(self.current, now) != HeadState::Refused
    }

    /// The versions that `head` speaks.
    pub(super) fn speaks(&self, head: usize, now: Instant) -> Speaks {
        self.heads[head].spoken.at(now, self.timing.probe_interval)
    }

    /// The next head to probe, and in which version, if it is time.
    pub(super) fn poll_probe(&mut self, now: Instant) -> Option<(usize, Version)> {
        if now < self.next_probe {
            return None;
        }
        while self.probe_cursor < PROBED.len() * self.heads.len() {
            let head = self.probe_cursor / PROBED.len();
            let version = PROBED[self.probe_cursor % PROBED.len()];
            self.probe_cursor += 1;
            if self.speaks(head, now).is_probed(version, self.probe_round) {
                return Some((head, version));
            }
        }
        self.probe_cursor = 0;
        self.probe_round = self.probe_round.wrapping_add(1);
        self.next_probe = now + self.timing.probe_interval;
        None
    }

    /// Time at which this state changes without an event.
    pub(super) fn next_wakeup(&self) -> Instant {
        self.next_probe
    }
}

/// Time for which a head that said it is draining is left alone; then it is gone or has restarted.
const DRAINING: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::super::versions::SELDOM;
    use super::*;

    const TIMING: Timing = Timing {
        probe_interval: Duration::from_millis(500),
        timeout: Duration::from_millis(1_500),
    };

    fn heads(count: usize) -> (Heads, impl Fn(u64) -> Instant) {
        let start = Instant::now();
        (Heads::new(count, TIMING, start), move |ms| {
            start + Duration::from_millis(ms)
        })
    }

    #[test]
    fn a_silent_head_loses_its_tasks_to_the_next_live_one() {
        let (mut heads, at) = heads(3);
        heads.heard(0, Version::V5_0, at(0));
        heads.heard(2, Version::V5_0, at(1_000));
        assert!(!heads.choose(at(1_499)));
        assert!(heads.choose(at(1_500)));
        assert_eq!(heads.current(), 2, "head 1 was never heard");
        heads.heard(2, Version::V5_0, at(2_000));
        assert!(!heads.heard(0, Version::V5_0, at(2_100)));
        assert!(!heads.choose(at(2_200)), "the current head stays");
    }

    #[test]
    fn a_head_that_is_only_slow_to_start_is_waited_for() {
        let (mut heads, at) = heads(2);
        heads.heard(1, Version::V5_0, at(10));
        assert!(!heads.choose(at(100)));
        assert!(!heads.find_lost(at(190)));
        assert!(
            !heads.heard(0, Version::V5_0, at(200)),
            "the first word is no return"
        );
        heads.heard(1, Version::V5_0, at(1_400));
        assert!(!heads.choose(at(1_600)));
    }

    #[test]
    fn a_refusal_moves_tasks_at_once() {
        let (mut heads, at) = heads(2);
        heads.heard(0, Version::V5_0, at(0));
        heads.heard(1, Version::V5_0, at(0));
        heads.refused(0);
        assert!(heads.choose(at(1)));
        assert_eq!(heads.current(), 1);
    }

    #[test]
    fn a_silent_head_is_used_when_nobody_answers_and_a_refusing_one_is_not() {
        let (mut heads, at) = heads(2);
        assert!(!heads.choose(at(10_000)));
        assert!(heads.reachable(at(10_000)));
        heads.refused(0);
        assert!(heads.choose(at(10_000)));
        assert!(heads.reachable(at(10_000)));
        heads.refused(1);
        heads.choose(at(10_000));
        assert!(!heads.reachable(at(10_000)));
        assert!(heads.find_lost(at(10_000)));
        assert!(heads.heard(1, Version::V5_0, at(10_100)));
        heads.choose(at(10_100));
        assert!(heads.reachable(at(10_100)));
    }

    #[test]
    fn every_loss_and_every_return_begins_an_epoch() {
        let (mut heads, at) = heads(2);
        assert!(
            !heads.find_lost(at(9_000)),
            "who was never heard cannot be lost"
        );
        heads.heard(0, Version::V5_0, at(9_000));
        assert_eq!(heads.epoch(0), 0);
        assert!(heads.find_lost(at(10_500)));
        assert!(!heads.find_lost(at(10_600)), "a loss is found once");
        assert_eq!(heads.epoch(0), 1);
        assert!(heads.heard(0, Version::V5_0, at(11_000)));
        assert!(!heads.heard(0, Version::V5_0, at(11_000)));
        assert_eq!(heads.epoch(0), 2);
        assert_eq!(heads.epoch(1), 0);
    }

    #[test]
    fn a_draining_head_is_left_for_another() {
        let (mut heads, at) = heads(2);
        heads.heard(0, Version::V5_0, at(0));
        heads.heard(1, Version::V5_0, at(0));
        heads.draining(0, at(1));
        assert!(heads.choose(at(1)));
        assert_eq!(heads.state(0, at(1)), HeadState::Draining);
        heads.heard(0, Version::V5_0, at(6_000));
        assert_eq!(heads.state(0, at(6_000)), HeadState::Live);
    }

    fn probes(heads: &mut Heads, now: Instant) -> Vec<(usize, Version)> {
        std::iter::from_fn(|| heads.poll_probe(now)).collect()
    }

    #[test]
    fn every_head_is_probed_once_an_interval() {
        let (mut heads, at) = heads(2);
        let both = |head| [(head, Version::V5_0), (head, Version::V5_1)];
        assert_eq!(probes(&mut heads, at(0)), [both(0), both(1)].concat());
        assert!(probes(&mut heads, at(499)).is_empty());
        assert_eq!(heads.next_wakeup(), at(500));
        heads.heard(0, Version::V5_0, at(400));
        heads.heard(1, Version::V5_1, at(400));
        let known = [(0, Version::V5_0), (1, Version::V5_1)];
        for round in 1..u64::from(SELDOM) {
            assert_eq!(probes(&mut heads, at(500 * round)), known, "round {round}");
        }
        let round = u64::from(SELDOM);
        assert_eq!(probes(&mut heads, at(500 * round)).len(), 4, "now and then");
    }

    #[test]
    fn a_head_is_spoken_to_in_a_version_that_it_speaks() {
        let (mut heads, at) = heads(2);
        let (old, new) = (Version::V5_0, Version::V5_1);
        assert_eq!(
            heads.speaks(0, at(0)).version_for(new),
            old,
            "it may be one that answers no probe"
        );
        heads.heard(0, new, at(0));
        assert_eq!(
            [old, new].map(|client| heads.speaks(0, at(1)).version_for(client)),
            [new, new]
        );
        let speaks = heads.speaks(0, at(1));
        assert!(!speaks.may_include(old) && speaks.may_include(new));
        heads.heard(0, old, at(100));
        assert_eq!(
            [old, new].map(|client| heads.speaks(0, at(101)).version_for(client)),
            [old, new]
        );
        assert!(heads.speaks(0, at(101)).may_include(old));
        assert_eq!(
            heads.speaks(0, at(60_050)).version_for(new),
            old,
            "what it spoke long ago"
        );
        // Another program may come back there.
        assert!(heads.find_lost(at(70_000)));
        heads.heard(0, new, at(70_001));
        assert_eq!(heads.speaks(0, at(70_002)).version_for(old), new);
    }
}
