//! Doubts: the steps of a ring when one member does not reach another, before any counts as dead.
//!
//! A member that does not answer is lost only if a second witness, the head itself, has not heard it recently
//! either. If the head still hears it, the link between the two is at fault, or one of them is slow: the ring
//! begins a new epoch with the same members, which makes new links, and no member is blamed. Only if the same
//! two still do not reach each other after that is one of them replaced.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use tracing::{info, warn};

use super::ring::{Doubt, hex};
use super::{Action, Rings};

enum DoubtOutcome {
    /// No decision yet.
    Wait,
    /// It is lost: the head does not hear it either.
    Lost(String),
    /// It lives; the link is at fault.
    Relink,
}

impl Rings {
    /// The head heard anything from this worker at that moment.
    pub fn heard(&mut self, node: &str, at: Instant) {
        if let Some(entry) = self.nodes.get_mut(node).filter(|node| node.connected) {
            entry.heard = entry.heard.max(Some(at));
        }
    }

    /// This head itself did not run for `stall` and could hear nothing in that time.
    pub fn stalled(&mut self, stall: Duration, now: Instant) {
        for node in self.nodes.values_mut() {
            node.heard = node.heard.map(|at| (at + stall).min(now));
        }
    }

    /// True if the head itself hears a worker that others do not.
    pub(super) fn hears(&self, node: &str, now: Instant) -> bool {
        let heard = self.nodes.get(node).and_then(|node| node.heard);
        heard.is_some_and(|at| now.saturating_duration_since(at) < SILENCE)
    }

    /// Notes the other members that `by` does not reach now.
    pub(super) fn note_doubts(
        &mut self,
        ring: u64,
        by: &str,
        suspects: &BTreeSet<String>,
        severed: &[String],
        now: Instant,
    ) {
        let names: Vec<String> = suspects.iter().map(|id| self.name(id).to_owned()).collect();
        let by_name = self.name(by).to_owned();
        let Some(entry) = self.rings.get_mut(&ring) else {
            return;
        };
        entry
            .doubts
            .retain(|(who, about), _| who != by || suspects.contains(about));
        for (about, name) in suspects.iter().zip(names) {
            let link = severed.contains(about);
            let key = (by.to_owned(), about.clone());
            if let Some(doubt) = entry.doubts.get_mut(&key) {
                doubt.link |= link;
                continue;
            }
            let doubt = Doubt {
                since: now,
                asked: now,
                link,
            };
            entry.doubts.insert(key, doubt);
            let node = about.clone();
            self.actions.push(Action::Ask { node });
            info!(
                ring = hex(ring),
                worker = name,
                by = by_name,
                "a member does not reach another one, which this head hears"
            );
            self.counts.doubted += 1;
        }
    }

    /// Decides the doubts that can be decided by now.
    pub(super) fn settle_doubts(&mut self, id: u64, now: Instant) {
        let Some(ring) = self.rings.get(&id).filter(|ring| !ring.doubts.is_empty()) else {
            return;
        };
        let mut lost = Vec::new();
        let mut unreached = Vec::new();
        for ((by, about), doubt) in &ring.doubts {
            match self.verdict(by, about, doubt, now) {
                DoubtOutcome::Wait => {}
                DoubtOutcome::Lost(reason) => lost.push((about.clone(), reason)),
                // A standby is mirrored to again and again anyway.
                DoubtOutcome::Relink if !ring.has_member(about) => {}
                DoubtOutcome::Relink => unreached.push((by.clone(), about.clone())),
            }
        }
        if !lost.is_empty() {
            for (node, reason) in lost {
                self.suspect(&node, id, &reason, now);
            }
            return;
        }
        let tried = |pair: &(String, String)| {
            let at = ring.relinked.get(pair);
            at.is_some_and(|at| now.saturating_duration_since(*at) < RELINK_MEMORY)
        };
        if let Some(pair) = unreached.iter().find(|pair| tried(pair)).cloned() {
            self.give_up(id, &pair, now);
        } else if !unreached.is_empty() {
            self.relink(id, &unreached, now);
        } else if let Some(ring) = self.rings.get_mut(&id) {
            let fresh = |doubt: &Doubt| now.saturating_duration_since(doubt.asked) < ASK_INTERVAL;
            for ((_, about), doubt) in &mut ring.doubts {
                if !fresh(doubt) {
                    doubt.asked = now;
                    let node = about.clone();
                    self.actions.push(Action::Ask { node });
                }
            }
        }
    }

    fn verdict(&self, by: &str, about: &str, doubt: &Doubt, now: Instant) -> DoubtOutcome {
        let waited = now.saturating_duration_since(doubt.since);
        let heard = self.nodes.get(about).and_then(|node| node.heard);
        // Datagrams that it sent before its end may be noted a moment later.
        let answered = heard.is_some_and(|at| at >= doubt.since + SETTLED);
        if !self.hears(about, now) || (doubt.link && !answered && waited >= ANSWER_LIMIT) {
            let name = self.name(by);
            return DoubtOutcome::Lost(format!("it answers neither {name} nor the head"));
        }
        // A slow worker gets time to be heard again by the other, too.
        if answered && (doubt.link || waited >= PATIENCE) {
            return DoubtOutcome::Relink;
        }
        DoubtOutcome::Wait
    }

    /// Begins a new epoch with the same members and new links.
    fn relink(&mut self, id: u64, unreached: &[(String, String)], now: Instant) {
        let Some(ring) = self.rings.get(&id).filter(|ring| ring.lost.is_empty()) else {
            return;
        };
        let mut next = ring.clone();
        let pair =
            |(by, about): &(String, String)| format!("{} and {}", self.name(by), self.name(about));
        let pairs: Vec<String> = unreached.iter().map(pair).collect();
        let pairs = pairs.join(", between ");
        let reason = format!("moved: the link between {pairs} is made anew");
        next.relinked
            .retain(|_, at| now.saturating_duration_since(*at) < RELINK_MEMORY);
        for pair in unreached {
            next.relinked.insert(pair.clone(), now);
        }
        next.next_epoch(reason.clone(), now);
        let (ring, epoch, model) = (hex(id), next.epoch, &next.model);
        warn!(ring, epoch, model, reason, "ring linked anew");
        self.counts.relinked += 1;
        self.rings.insert(id, next);
        self.broadcast(id, &BTreeSet::new());
    }

    /// These two do not reach each other over a new link either: one of them has to go, the one that reaches
    /// no other member rather than one that another reaches.
    fn give_up(&mut self, id: u64, (by, about): &(String, String), now: Instant) {
        let Some(ring) = self.rings.get(&id) else {
            return;
        };
        let mut others = ring.members();
        others.remove(by);
        let reaches = |other: &String| !ring.doubts.contains_key(&(by.clone(), other.clone()));
        let cut_off = others.len() >= 2 && !others.iter().any(reaches);
        let (node, reason) = if cut_off {
            (by, "it reaches no other member".to_owned())
        } else {
            let by = self.name(by);
            let reason = format!("it does not reach {by} over a new link either");
            (about, reason)
        };
        self.suspect(&node.clone(), id, &reason, now);
    }
}

/// Time without a message from a worker after which the head is a second witness for its death. Links carry
/// something at least every half second.
pub(super) const SILENCE: Duration = Duration::from_secs(1);
/// Interval at which a doubted worker is asked for a sign of life.
const ASK_INTERVAL: Duration = Duration::from_millis(200);
/// Packets that were on their way or not noted yet when a doubt came up are noted by then.
const SETTLED: Duration = Duration::from_millis(100);
/// Time that a worker whose link to another one is closed has to answer the head.
const ANSWER_LIMIT: Duration = Duration::from_millis(500);
/// Time for which a worker that the head hears may be silent for another member before their link is renewed.
const PATIENCE: Duration = Duration::from_secs(3);
/// Time for which a new link is remembered.
const RELINK_MEMORY: Duration = Duration::from_secs(60);
