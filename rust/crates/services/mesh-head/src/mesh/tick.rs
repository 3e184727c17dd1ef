//! Periodic work: silent workers, readiness, gauges, warnings.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use dcf::ErrorCode;
use mesh_base::clock;
use mesh_control::duplicates::Duplicate;
use mesh_control::held_back::HeldMessages;
use mesh_control::registry::{KINDS, ServedModel, Service, Worker, WorkerId};
use mesh_control::spotcheck::CheckState;
use mesh_control::tracker::advice;

use super::connection::Connection;
use super::state::{CLOCK_TOLERANCE, Mesh, State};
use crate::ids;
use crate::metrics::set;

impl Mesh {
    /// Problems that an operator should know and mend, in words.
    pub(crate) fn warnings(&self) -> Vec<String> {
        let mut state = self.lock();
        let duplicates = state.duplicates.view(Instant::now());
        let mut warnings: Vec<String> = duplicates.iter().map(Duplicate::advice).collect();
        let conflicts = self.name_conflicts(&state);
        warnings.extend(conflicts.iter().map(advice));
        if clock::is_implausible(SystemTime::now()) {
            warnings.push(format!(
                "this head's clock says {}, which is wrong; set it, for example with `timedatectl set-ntp true`",
                clock::utc(SystemTime::now())
            ));
        }
        warnings.extend(state.placement.registry.disagreements(Instant::now()));
        for worker in state.placement.registry.iter() {
            if worker.clock_offset.abs() > CLOCK_TOLERANCE {
                warnings.push(format!(
                    "worker `{}`: its clock is {} by this head's, which says {}; set the one that is wrong, for example with `timedatectl set-ntp true`",
                    worker.name,
                    clock::offset(worker.clock_offset),
                    clock::utc(SystemTime::now())
                ));
            }
        }
        warnings
    }

    /// Does the work that is due: prunes silent workers, looks at waiting requests again, sets gauges and
    /// readiness.
    pub(crate) fn tick(&self) {
        self.hear_held_back();
        self.tell_changes_of_expelled();
        let now = Instant::now();
        let mut state = self.lock();
        state.listen(now);
        self.look_at_links(&mut state, now);
        let pruned = state.placement.prune(now);
        let silent = pruned.iter().map(|worker| worker.id);
        let silent = silent.filter_map(|id| state.take_connection(id));
        let silent: Vec<Arc<dyn Connection>> = silent.collect();
        for node in pruned.iter().filter_map(Worker::node_id) {
            state.rings.left(node, "it was silent for too long", now);
            state.tracker.left(node);
        }
        let registry = &mut state.placement.registry;
        for finding in registry.look_at_checks(ids::unique(), now) {
            self.follow_finding(&mut state, finding, now);
        }
        self.look_at_rings(&mut state, now);
        self.turn(&mut state, now);
        let readiness = self.readiness(&state, None);
        let registry = &state.placement.registry;
        self.metrics.workers(KINDS.map(|kind| {
            let same = registry.iter().filter(|worker| worker.kind() == kind);
            (kind, same.count())
        }));
        let conflicts = state.tracker.conflicts().len() + state.mixed.len();
        set(&self.metrics.name_conflicts, conflicts);
        drop(state);

        if let Some(counts) = self.audit.counts() {
            self.metrics.audited(counts);
        }
        for worker in pruned {
            let node = worker.node_id().unwrap_or_default();
            self.audit
                .left(node, &worker.name, "it was silent for too long");
            tracing::warn!(
                worker = worker.name,
                timeout_seconds = self.config.worker_timeout.as_secs_f64(),
                "worker pruned: it was silent for too long"
            );
        }
        for connection in silent {
            connection.close(ErrorCode::TIMEOUT, "no sign of life");
        }
        match readiness {
            Ok(()) => self.health.set_ready(),
            Err(reason) => self.health.set_unready(reason),
        }
    }

    /// Takes in the messages about models and rings of workers whose quarantine is over.
    fn hear_held_back(&self) {
        let now = Instant::now();
        let words = {
            let mut guard = self.lock();
            let state = &mut *guard;
            let registry = &state.placement.registry;
            state.held_back.take(|id| {
                let node = registry.get(id)?.node_id()?;
                Some(registry.is_out(node, now))
            })
        };
        for (id, HeldMessages { offer, models }) in words {
            if let Some(offer) = offer {
                self.offered(id, offer);
            }
            if let Some(models) = models {
                self.models_said(id, models);
            }
        }
    }

    /// True if anything was heard from a worker in the last moments.
    pub(crate) fn hears(&self, id: WorkerId) -> bool {
        let state = self.lock();
        let peer = state.peers.get(&id);
        peer.is_some_and(|peer| peer.heard.elapsed() < HEARD)
    }

    /// Every packet of a link was authenticated: it tells where the worker is.
    fn look_at_links(&self, state: &mut State, now: Instant) {
        let fresh = |at: Instant| now.saturating_duration_since(at) < LINK_LOOK;
        if state.links_seen.is_some_and(fresh) {
            return;
        }
        state.links_seen = Some(now);
        let mut moved = Vec::new();
        for (id, peer) in &state.peers {
            let address = peer.link.remote_addr();
            if let Some(before) = state.placement.registry.moved(*id, address) {
                tracing::info!(worker = peer.link.node_name(), %before, %address, "the worker has moved");
                if before.ip() != address.ip() {
                    moved.push((peer.link.node_id().to_owned(), address.ip()));
                }
            }
        }
        for (node, ip) in moved {
            state.rings.moved(&node, ip);
            state.tracker.moved(&node, ip);
        }
        let workers = state.placement.registry.iter();
        let workers = workers.filter(|worker| worker.has_identity());
        let offsets = workers.map(|worker| (worker.name.clone(), worker.clock_offset));
        self.metrics.clocks(offsets);
    }

    /// Readiness for `/ready`: of one model, or of any; the error is the reason.
    pub(super) fn readiness(&self, state: &State, asked: Option<&str>) -> Result<(), String> {
        if self.shutdown.is_draining() {
            return Err("shutting down".into());
        }
        let now = Instant::now();
        let registry = &state.placement.registry;
        let answers = |worker: &Worker| {
            let proven = |model: &ServedModel| {
                let in_service = match model.ring {
                    None => !worker.draining,
                    Some(ring) => {
                        let node = worker.node_id().unwrap_or_default();
                        state.rings.serves_since(ring, node).flatten().is_some()
                    }
                };
                let node = worker.node_id();
                let out = node.is_some_and(|node| registry.is_out(node, now));
                model.answers(now)
                    && !out
                    && registry.has_name(model, now) != Service::Out
                    && model.check_state != CheckState::Held
                    && in_service
                    && asked.is_none_or(|asked| asked == model.card.name)
            };
            // A worker without an identity cannot be asked for one token, so its heartbeat has to do.
            worker.models.iter().any(proven)
                || (!worker.has_identity() && !worker.draining && asked.is_none())
        };
        if registry.iter().any(answers) {
            return Ok(());
        }
        if let Some(model) = asked {
            return Err(self.why_not(state, model));
        }
        let mut reason = if registry.is_empty() {
            "no worker is connected".to_owned()
        } else {
            "no worker has answered yet".to_owned()
        };
        for (_, text) in state.rings.not_serving() {
            reason += &format!("; {text}");
        }
        for unformed in state.rings.unformed() {
            let (model, why) = (unformed.model, unformed.reason);
            reason += &format!("; there is no ring of {model}: {why}");
        }
        for text in state.tracker.under_way() {
            reason += &format!("; {text}");
        }
        Err(reason)
    }
}

impl State {
    /// Notes the workers that were heard since the last look: any packet on a worker's link is a sign of
    /// life. If the last look is too long ago, this head itself did not run, and no worker counts as silent
    /// for that.
    fn listen(&mut self, now: Instant) {
        let before = self.listened.replace(now).unwrap_or(now);
        let gap = now.saturating_duration_since(before);
        if gap > LISTENS {
            self.rings.stalled(gap, now);
            self.placement.registry.stalled(gap, now);
            for peer in self.peers.values_mut() {
                peer.heard = (peer.heard + gap).min(now);
            }
        }
        for (id, peer) in &mut self.peers {
            let packets = peer.link.packets_received();
            if packets != peer.heard_packets {
                peer.heard_packets = packets;
                peer.heard = now;
                self.rings.heard(peer.link.node_id(), now);
                self.placement.registry.seen(*id, now);
            }
        }
    }
}

/// Time for which a worker that was heard counts as alive. Links carry something at least every half second.
const HEARD: Duration = Duration::from_secs(1);

/// A longer pause between two looks at the workers heard means that this head had no processor.
const LISTENS: Duration = Duration::from_millis(300);

/// Interval at which links are asked for signs of life and addresses.
const LINK_LOOK: Duration = Duration::from_millis(500);
