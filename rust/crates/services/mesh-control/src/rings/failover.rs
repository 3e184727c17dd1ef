//! Losses: replaces the members of a ring that are gone, and restores its standbys.

use std::collections::BTreeSet;
use std::ops::Range;
use std::time::Instant;

use arcanum_profiler::replacement_for;
use tracing::{info, warn};

use super::ring::{Replica, Ring, hex};
use super::{Action, RingWorker, Rings};

impl Rings {
    /// Deals with all losses of a ring that are known now, in one new epoch.
    pub(super) fn recover(&mut self, id: u64, now: Instant) {
        let Some(ring) = self.rings.get(&id).filter(|ring| !ring.lost.is_empty()) else {
            return;
        };
        if ring.retiring.is_some() || (ring.replaces.is_some() && !self.is_last_of(ring)) {
            // Another ring serves the model: this one is not worth the effort.
            let reason = format!("moved: {}", reasons(ring));
            self.dissolve(id, reason);
            return;
        }
        let planned = self.gives_up_by_plan(ring);
        let mut next = ring.clone();
        for stage in &mut next.stages {
            let is_lost = |part: &mut Replica| ring.lost.contains_key(&part.node);
            stage.standby.take_if(is_lost);
        }
        let broken: Vec<usize> = (0..next.stages.len())
            .filter(|stage| ring.lost.contains_key(&next.stages[*stage].member.node))
            .collect();
        let before = ring.nodes();
        let reason = reasons(ring);
        if broken.is_empty() {
            self.lose_standbys(next, &before, &reason, now);
            return;
        }

        let mut taken = Vec::new();
        for stage in broken {
            let Range { start, end } = next.stages[stage].layers;
            let Some(part) = self.successor(&mut next, stage, now) else {
                let mib = next.stage_bytes(&(start..end)) >> 20;
                let missing = format!(
                    "{reason}; no worker is left that can take its layers {start}..{end} ({mib} MiB)"
                );
                self.plan_anew(id, &missing, now);
                return;
            };
            let how = match part.is_ready() {
                true => "stood by",
                false => "loads them",
            };
            let name = self.name(&part.node);
            taken.push(format!("{name} takes layers {start}..{end} ({how})"));
            next.stages[stage].member = part;
        }
        let reason = format!("{reason}; {}", taken.join(", "));
        next.lost.clear();
        next.moves.clear();
        next.last_loss = Some(now);
        next.next_epoch(reason.clone(), now);
        if planned {
            next.log_move(&reason);
        } else {
            let (ring, epoch, model) = (hex(id), next.epoch, &next.model);
            warn!(ring, epoch, model, reason, "ring fails over");
            *self.counts.failovers.entry(model.clone()).or_default() += 1;
        }
        self.withdraw_old_driver(&mut next);
        self.rings.insert(id, next);
        self.broadcast(id, &before);
    }

    /// Finds the worker that takes over a stage: its standby, else any worker with room.
    fn successor(&self, next: &mut Ring, stage: usize, now: Instant) -> Option<Replica> {
        if let Some(standby) = next.stages[stage].standby.take() {
            let node = self.nodes.get(&standby.node);
            let draining = node.is_none_or(RingWorker::is_draining);
            let free_to = self.settings.double_stages || !next.has_member(&standby.node);
            if free_to && !draining {
                return Some(standby);
            }
        }
        let lost = next.lost.keys().cloned().collect();
        self.find_worker(next, stage, lost, replacement_for, now)
            .or_else(|| self.find_second_part(next, stage, now))
            .map(Replica::new)
    }

    /// Finds a member with room for one more stage, for when no other worker can take it: slower than before,
    /// but the ring goes on.
    fn find_second_part(&self, next: &Ring, stage: usize, now: Instant) -> Option<String> {
        if !self.settings.double_stages {
            return None;
        }
        let outlook = self.outlook(&next.model, Some(next), &[next.id], now)?;
        let wanted = next.stage_bytes(&next.stages[stage].layers);
        let own = |node: &str| -> u64 {
            let stages = next.stages.iter().enumerate();
            stages
                .filter(|&(index, other)| {
                    let stands_by = other.standby.as_ref().is_some_and(|part| part.node == node);
                    index != stage && (other.member.node == node || stands_by)
                })
                .map(|(_, other)| next.stage_bytes(&other.layers))
                .sum()
        };
        let rooms = outlook.candidates.iter().filter_map(|candidate| {
            let is_lost = next.lost.contains_key(&candidate.id);
            let room = candidate.memory.checked_sub(own(&candidate.id))?;
            (!is_lost && room >= wanted).then_some((room, candidate.id.clone()))
        });
        rooms.max().map(|(_, node)| node)
    }

    /// The worker that served the ring's model does so no more if another one drives it now.
    pub(super) fn withdraw_old_driver(&mut self, next: &mut Ring) {
        let moved = |(by, _): &(String, _)| *by != next.driver();
        if next.served_by.as_ref().is_some_and(moved) {
            self.withdraw(next.id);
            next.served_by = None;
        }
    }

    /// Only standbys were lost: nothing that runs is disturbed.
    fn lose_standbys(
        &mut self,
        mut next: Ring,
        before: &BTreeSet<String>,
        reason: &str,
        now: Instant,
    ) {
        let id = next.id;
        if self.settings.standbys && next.retiring.is_none() {
            self.fill_standbys(&mut next, now);
        }
        next.standbys_for = Some(self.generation);
        next.lost.clear();
        reason.clone_into(&mut next.reason);
        next.log_standbys(reason);
        self.rings.insert(id, next);
        self.broadcast(id, before);
    }

    /// Gives stages without a standby one where a worker has room. True if there was one.
    pub(super) fn fill_standbys(&self, next: &mut Ring, now: Instant) -> bool {
        let mut found = false;
        for stage in 0..next.stages.len() {
            if next.stages[stage].standby.is_some() {
                continue;
            }
            if let Some(node) = self.find_standby(next, stage, now) {
                next.stages[stage].standby = Some(Replica::new(node));
                next.stages[stage].member.state.lag_rows = 0;
                found = true;
            }
        }
        found
    }

    /// Looks for standbys of a ring that serves and lacks some, once for every state of the mesh.
    pub(super) fn restore_standbys(&mut self, id: u64, now: Instant) {
        if !self.settings.standbys {
            return;
        }
        let Some(ring) = self.rings.get(&id) else {
            return;
        };
        let lacking = ring.stages.iter().any(|stage| stage.standby.is_none());
        // A ring that is about to be replaced made room for its successor.
        let outgoing = self.rings.values().any(|other| other.replaces == Some(id));
        if !lacking
            || outgoing
            || ring.serving_since.is_none()
            || ring.retiring.is_some()
            || !ring.lost.is_empty()
            || ring.standbys_for == Some(self.generation)
        {
            return;
        }
        let mut next = ring.clone();
        let found = self.fill_standbys(&mut next, now);
        next.standbys_for = Some(self.generation);
        if found {
            next.reason = "its stages get standbys".into();
            next.log_standbys(&next.layout(|node| self.name(node).to_owned()));
        }
        self.rings.insert(id, next);
        if found {
            self.broadcast(id, &BTreeSet::new());
        }
    }

    /// No other worker can take over: plans the whole model on the remaining workers, or gives it up.
    pub(super) fn plan_anew(&mut self, id: u64, missing: &str, now: Instant) {
        let Some(ring) = self.rings.get(&id) else {
            return;
        };
        let model = ring.model.clone();
        if !self.is_last_of(ring) {
            // Its successor is being formed already.
            self.dissolve(id, format!("moved: {missing}"));
            return;
        }
        match self.place(&model, &[id], now) {
            Ok(planned) => {
                self.dissolve(id, format!("moved: {missing}"));
                self.form(&model, planned, missing.to_owned(), None, now);
            }
            Err(error) => {
                self.dissolve(id, format!("{missing}; {error}"));
                self.losses.insert(model.clone(), missing.to_owned());
                self.cannot_plan(&model, &error.to_string());
            }
        }
    }

    /// Ends a ring: its workers forget it.
    pub(super) fn dissolve(&mut self, id: u64, reason: String) {
        self.withdraw(id);
        let Some(ring) = self.rings.remove(&id) else {
            return;
        };
        let planned = self.gives_up_by_plan(&ring);
        let message = mesh_proto::Ring {
            ring: id,
            epoch: ring.epoch.saturating_add(1),
            model: ring.model.clone(),
            fingerprint: ring.offered.fingerprint.clone(),
            reason: reason.clone(),
            ..Default::default()
        };
        for node in ring.nodes() {
            if self.is_connected(&node) {
                self.told_off.insert((node.clone(), id));
                self.actions.push(Action::Send {
                    node,
                    ring: message.clone(),
                });
            }
        }
        // Its memory is free again.
        self.generation += 1;
        if planned {
            info!(ring = hex(id), model = ring.model, reason, "ring dissolved");
        } else {
            warn!(ring = hex(id), model = ring.model, reason, "ring dissolved");
        }
    }

    /// True if all members that a ring loses leave it by plan: they are present and drained.
    fn gives_up_by_plan(&self, ring: &Ring) -> bool {
        ring.lost.keys().all(|node| {
            let node = self.nodes.get(node);
            node.is_some_and(|node| node.connected && node.is_draining())
        })
    }

    /// Returns true if no other ring serves or will serve this one's model.
    fn is_last_of(&self, ring: &Ring) -> bool {
        !self.rings.values().any(|other| {
            other.id != ring.id && other.model == ring.model && other.retiring.is_none()
        })
    }
}

fn reasons(ring: &Ring) -> String {
    let mut reasons: Vec<&str> = ring.lost.values().map(String::as_str).collect();
    reasons.dedup();
    reasons.join("; ")
}
