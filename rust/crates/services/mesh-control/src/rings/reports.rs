//! Reports of members about their rings, and detection of lost members.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use mesh_proto::{PartPhase, RingState};
use tracing::{info, warn};

use super::ring::hex;
use super::show::recovery as shown;
use super::{Action, Rings};

impl Rings {
    /// A worker reports its parts in a ring. Reports of other epochs than the present one change nothing.
    pub fn state(&mut self, node: &str, state: RingState, now: Instant) {
        let Some(ring) = self.rings.get_mut(&state.ring) else {
            self.tell_off(node, &state);
            return;
        };
        if state.epoch != ring.epoch || !ring.has_part(node) || ring.lost.contains_key(node) {
            return;
        }
        let model = ring.model.clone();
        let mut failed = None;
        for report in &state.parts {
            if report.phase == i32::from(PartPhase::Failed) {
                failed.get_or_insert_with(|| {
                    report.error.chars().take(ERROR_CHARS).collect::<String>()
                });
            }
            ring.report(node, report, now);
        }
        if let Some(error) = failed {
            self.unfit(node, &model, state.ring, &error, now);
            return;
        }
        self.complaints(node, &state, now);
        self.driver_reports(node, state, now);
    }

    /// Takes in the members that a worker reports as out of reach.
    pub(super) fn complaints(&mut self, node: &str, state: &RingState, now: Instant) {
        let Some(ring) = self.rings.get(&state.ring) else {
            return;
        };
        let mut others = ring.nodes();
        others.remove(node);
        let named: BTreeSet<String> = state.suspects.iter().take(SUSPECTS).cloned().collect();
        let suspects: BTreeSet<String> = &named & &others;
        let mut heard = suspects.clone();
        heard.retain(|suspect| self.hears(suspect, now));
        if suspects.len() >= 2 && suspects.len() == others.len() && heard.is_empty() {
            // A member that reaches no other is cut off itself: their links to the head are up, or they would
            // be lost already.
            self.suspect(node, state.ring, "it reaches no other member", now);
            return;
        }
        let by = self.name(node).to_owned();
        let reason = format!("it answers neither {by} nor the head");
        for suspect in suspects.difference(&heard) {
            self.suspect(suspect, state.ring, &reason, now);
        }
        self.note_doubts(state.ring, node, &heard, &state.severed, now);
    }

    /// Takes in the driver's report on the ring as a whole.
    pub(super) fn driver_reports(&mut self, node: &str, state: RingState, now: Instant) {
        let Some(ring) = self.rings.get_mut(&state.ring) else {
            return;
        };
        if ring.driver() != node || ring.lost.contains_key(node) {
            return;
        }
        if let Some(recovery) = state.recovery
            && ring.recovered < ring.epoch
        {
            ring.recovered = ring.epoch;
            if self.recoveries.len() >= RECOVERIES {
                self.recoveries.pop_front();
            }
            self.recoveries.push_back((shown(ring, &recovery), now));
            info!(
                ring = hex(state.ring),
                model = ring.model,
                gap_ms = recovery.gap_us / 1000,
                rows = recovery.rows,
                requests = recovery.requests,
                "ring recovered"
            );
            // Without a request there was no gap that anybody noticed.
            if recovery.requests > 0 {
                let gap = Duration::from_micros(recovery.gap_us);
                self.counts.gaps.push((ring.model.clone(), gap));
            }
        }
        if !state.serving {
            ring.serving_since = None;
            self.withdraw(state.ring);
            return;
        }
        let begins = ring.serving_since.is_none();
        ring.serving_since.get_or_insert(now);
        ring.served = true;
        if ring.retiring.is_some() {
            return;
        }
        if begins {
            ring.compared = None;
            info!(
                ring = hex(state.ring),
                epoch = ring.epoch,
                model = ring.model,
                driver = self.nodes.get(node).map_or(node, |node| &node.name),
                "ring serves"
            );
        }
        let card = ring.card(state.card);
        let replaced = ring.replaces.take();
        if let Some(replaced) = replaced {
            self.withdraw(replaced);
            if let Some(old) = self.rings.get_mut(&replaced) {
                old.retiring = Some(now);
                old.running = None;
            }
        }
        self.serve(state.ring, node, card);
    }

    /// A worker holds a ring that this head does not know (of an earlier life of the head, or dissolved): it
    /// may forget it.
    pub(super) fn tell_off(&mut self, node: &str, state: &RingState) {
        if !self.is_connected(node) {
            return;
        }
        if self.told_off.len() >= TOLD_OFF {
            // Being told twice does no harm.
            self.told_off.clear();
        }
        if self.told_off.insert((node.to_owned(), state.ring)) {
            let ring = mesh_proto::Ring {
                ring: state.ring,
                // Higher than whatever it was told before.
                epoch: u32::MAX,
                reason: "moved: this head does not know the ring any more".into(),
                ..Default::default()
            };
            let node = node.to_owned();
            self.actions.push(Action::Send { node, ring });
        }
    }

    /// A worker could not do its part.
    pub(super) fn unfit(&mut self, node: &str, model: &str, ring: u64, error: &str, now: Instant) {
        let pause = self.settings.suspect_pause;
        if let Some(entry) = self.nodes.get_mut(node) {
            let unfit = entry.unfit.entry(model.to_owned()).or_default();
            unfit.raise(pause, error, now);
        }
        let reason = format!("worker {} failed: {error}", self.name(node));
        if let Some(ring) = self.rings.get_mut(&ring) {
            ring.lose(node, reason);
        }
    }

    pub(super) fn suspect(&mut self, node: &str, ring: u64, reason: &str, now: Instant) {
        let name = self.name(node).to_owned();
        let Some(entry) = self.rings.get_mut(&ring) else {
            return;
        };
        if entry.lost.contains_key(node) {
            return;
        }
        entry.lose(node, format!("worker {name} is lost: {reason}"));
        if let Some(entry) = self.nodes.get_mut(node) {
            let pause = self.settings.suspect_pause;
            entry.suspicion.raise(pause, reason, now);
        }
        warn!(worker = name, reason, "worker suspected");
        self.counts.lost += 1;
    }

    pub(super) fn settle_suspicions(&mut self, now: Instant) {
        let mut over = false;
        for node in self.nodes.values_mut() {
            over |= node.settle(now);
        }
        if over {
            self.generation += 1;
        }
        self.nodes.retain(|_, node| !node.is_forgotten(now));
    }
}

const SUSPECTS: usize = 64;

const RECOVERIES: usize = 16;

const TOLD_OFF: usize = 4096;

const ERROR_CHARS: usize = 512;
