//! Rings within the mesh: carries out the decisions of [`mesh_control::rings`], and answers questions about
//! rings.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use dcf::{ErrorCode, Message, MsgType};
use mesh_control::registry::{Registry, WorkerId};
use mesh_control::rings::{Action, Prospect, Rings};
use mesh_proto::{Offer, PathProfile, RingState};
use tokio::sync::watch;
use tracing::{debug, warn};

use super::drains;
use super::former::as_recipient_knows;
use super::state::{Mesh, State, message};

/// State of a worker as the driver of a ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RingRole {
    /// It serves since then.
    Serves(Instant),
    /// Its ring recovers from a loss: silence is no sign of death.
    Recovers,
    /// The ring is gone, or another worker drives it.
    Gone,
}

impl Mesh {
    pub(crate) fn offered(&self, id: WorkerId, mut offer: Offer) {
        self.change(|state, now| {
            let Some(worker) = state.placement.registry.get(id) else {
                return;
            };
            let port = offer.ring_port;
            let (Some(node), Ok(ring_port @ 1..)) = (worker.node_id(), u16::try_from(port)) else {
                warn!(
                    worker = worker.name,
                    port, "ignoring offer: invalid ring port"
                );
                return;
            };
            if state.placement.registry.is_out(node, now) {
                return state.held_back.offered(id, offer);
            }
            if let (Some(peer), Some(profile)) = (state.peers.get(&id), offer.profile.as_mut()) {
                // A worker need not measure the path that its link knows, and is not believed about it.
                let rtt_us = u32::try_from(peer.link.rtt().as_micros()).unwrap_or(u32::MAX);
                let mut paths = profile.paths.iter_mut();
                match paths.find(|path| path.node_id.is_empty()) {
                    Some(path) => path.rtt_us = rtt_us,
                    None => profile.paths.push(PathProfile {
                        rtt_us,
                        ..PathProfile::default()
                    }),
                }
            }
            let address = SocketAddr::new(worker.address.ip(), ring_port);
            state.rings.offered(node, address, offer, now);
        });
    }

    pub(crate) fn ring_state(&self, id: WorkerId, report: RingState) {
        self.change(|state, now| {
            if let Some(node) = state.placement.registry.node_of(id) {
                state.rings.state(node, report, now);
            }
        });
    }

    /// An answer's attempt on the driver of a ring failed by silence or loss.
    pub(crate) fn suspect(&self, id: WorkerId, ring: u64, reason: &str) {
        self.change(|state, now| {
            if let Some(node) = state.placement.registry.node_of(id) {
                state.rings.suspected(node, ring, reason, now);
            }
        });
    }

    /// State of a worker as the driver of a ring.
    pub(crate) fn ring_role(&self, id: WorkerId, ring: u64) -> RingRole {
        let state = self.lock();
        let node = state.placement.registry.node_of(id);
        match node.and_then(|node| state.rings.serves_since(ring, node)) {
            Some(Some(since)) => RingRole::Serves(since),
            Some(None) => RingRole::Recovers,
            None => RingRole::Gone,
        }
    }

    /// Wakes whenever a ring's members or driver changed.
    pub(crate) fn ring_changes(&self) -> watch::Receiver<()> {
        self.ring_changes.subscribe()
    }

    /// Looks at registry and rings together.
    pub(crate) fn with_rings<T>(&self, look: impl FnOnce(&Rings, &Registry) -> T) -> T {
        let state = self.lock();
        look(&state.rings, &state.placement.registry)
    }

    /// Changes rings as an operator wishes, and carries out the resulting actions.
    pub(crate) fn change_rings<T>(
        &self,
        change: impl FnOnce(&mut Rings, &mut Registry, Instant) -> T,
    ) -> T {
        self.change(|state, now| change(&mut state.rings, &mut state.placement.registry, now))
    }

    /// Writes down which workers are drained, for the next start.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub(crate) async fn keep_drains(self: &Arc<Self>) -> io::Result<()> {
        let mesh = self.clone();
        // A task of its own, so that it does not end with the request that asked for it.
        let saving = tokio::spawn(async move {
            // The later list must not be overtaken by the earlier one.
            let _alone = mesh.saving.lock().await;
            let drained = mesh.lock().rings.drained();
            let state_dir = mesh.config.state_dir.clone();
            tokio::task::spawn_blocking(move || drains::save(&state_dir, drained)).await
        });
        let saved = saving.await.map_err(io::Error::other)?;
        saved.map_err(io::Error::other)?
    }

    /// Checks that requests for a model, or for any, can be answered.
    ///
    /// # Errors
    /// The reason, for people, if they cannot.
    pub(crate) fn ready(&self, model: Option<&str>) -> Result<(), String> {
        self.readiness(&self.lock(), model)
    }

    /// Lets the rings decide, carries it out, and gives free room to waiting requests.
    pub(super) fn turn(&self, state: &mut State, now: Instant) {
        let mut changed = false;
        // A worker that is dropped because it takes no orders is a loss to decide about, too.
        for _ in 0..TURNS {
            let actions = state.rings.poll(now);
            if actions.is_empty() {
                break;
            }
            for action in actions {
                changed |= !matches!(action, Action::Ask { .. });
                self.carry_out(state, action, now);
            }
        }
        let counts = state.rings.take_counts();
        for (model, times) in &counts.failovers {
            self.audit.failover(model, *times);
        }
        self.metrics.ring_events(&counts);
        self.turn_models(state, now);
        state.placement.set_prospects(state.rings.prospects());
        if changed {
            self.ring_changes.send_replace(());
        }
        self.pump(state, now);
    }

    /// Reports to the rings the requests on those that retire, and sets their gauges now and then.
    pub(super) fn look_at_rings(&self, state: &mut State, now: Instant) {
        for ring in state.rings.retiring() {
            let running = state.placement.running_on(ring);
            state.rings.running(ring, running);
        }
        let fresh = |at: Instant| now.saturating_duration_since(at) < GAUGES;
        if !state.gauged.is_some_and(fresh) {
            state.gauged = Some(now);
            self.metrics.rings(&state.rings.view(now));
        }
    }

    /// Reason for which requests of a model cannot be answered.
    pub(super) fn why_not(&self, state: &State, model: &str) -> String {
        let mut of_rings = state.rings.not_serving().into_iter();
        if let Some((_, text)) = of_rings.find(|(name, _)| name == model) {
            return text;
        }
        match state.rings.prospects().get(model) {
            Some(Prospect::Impossible(reason)) => format!("there is no ring of {model}: {reason}"),
            Some(Prospect::Coming) => format!("a ring of {model} is about to be formed"),
            None if state.placement.registry.models().contains_key(model) => {
                let (registry, now) = (&state.placement.registry, Instant::now());
                let reasons = registry.iter().filter_map(|worker| {
                    let why = registry.why_not(worker, worker.model(model)?, now)?;
                    Some(format!("worker `{}`: {why}", worker.name))
                });
                match reasons.take(REASONS).collect::<Vec<_>>() {
                    none if none.is_empty() => format!("no worker has answered for {model} yet"),
                    reasons => format!("no worker answers for {model}: {}", reasons.join("; ")),
                }
            }
            None => format!("no worker serves {model}"),
        }
    }

    fn carry_out(&self, state: &mut State, action: Action, now: Instant) {
        let (Action::Send { node, .. }
        | Action::Serve { node, .. }
        | Action::Withdraw { node, .. }
        | Action::Ask { node }) = &action;
        let registry = &mut state.placement.registry;
        let Some(id) = registry.of_node(node).map(|worker| worker.id) else {
            return;
        };
        match action {
            Action::Send { node, ring } => {
                debug!(
                    worker = node,
                    ring = ring.ring,
                    epoch = ring.epoch,
                    stages = ring.stages.len(),
                    "ring sent"
                );
                self.order(state, id, message(MsgType::RING, 0, &ring), now);
            }
            Action::Serve { ring, card, .. } => registry.serve(id, ring, card, now),
            Action::Withdraw { ring, .. } => registry.withdraw(id, ring, now),
            Action::Ask { .. } => {
                if let Some(peer) = state.peers.get(&id) {
                    peer.link.ask();
                }
            }
        }
    }

    /// Sends a worker an order that must not be lost: a worker that does not take its orders is dropped.
    pub(super) fn order(&self, state: &mut State, id: WorkerId, order: Message, now: Instant) {
        let order = as_recipient_knows(state, id, order);
        let peer = state.peers.get(&id);
        if peer.is_none_or(|peer| peer.orders.try_send(order).is_ok()) {
            return;
        }
        if let Some(peer) = state.remove(id, "it does not take its orders", now) {
            let node = peer.link.node_id();
            warn!(worker = node, "worker dropped: it does not take its orders");
            let text = "you do not take your orders";
            peer.link.close(ErrorCode::TIMEOUT, text);
        }
    }
}

/// Far more than follow from one another; what is left is done at the next turn.
const TURNS: usize = 64;
/// Most reasons to give for a model that is not served.
const REASONS: usize = 3;
/// Interval at which the gauges of rings are set.
const GAUGES: Duration = Duration::from_secs(1);
