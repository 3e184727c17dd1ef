//! Draining: a worker hands its parts over, then holds nothing.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::{Duration, Instant};

use mesh_api::Holding;
use tracing::dispatcher::{Dispatch, with_default};
use tracing::subscriber::NoSubscriber;

use super::Rings;
use super::node::RingWorker;
use super::ring::{Replica, Ring, Stage, hex};

/// Reasons for which a worker is not drained.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DrainRefusal {
    /// There is no such worker.
    #[error("no worker has the node id {0:?}")]
    Unknown(String),
    /// No other worker can take its layers.
    #[error(
        "worker {name} holds layers {layers} of {model}, and no other worker has the {mib} MiB that they need: add a worker, \
         undrain one, or shorten ring.context; nothing was changed"
    )]
    NoRoom {
        /// Name of the worker.
        name: String,
        /// Name of the model.
        model: String,
        /// Layers that it holds, as a range.
        layers: String,
        /// Memory that they need.
        mib: u64,
    },
}

impl Rings {
    /// Drains a worker: its parts move away, and it gets none until [`Rings::undrain`].
    ///
    /// # Errors
    /// [`DrainRefusal`]; then nothing has changed.
    pub fn drain(&mut self, node: &str, now: Instant) -> Result<(), DrainRefusal> {
        if !self.is_connected(node) {
            return Err(DrainRefusal::Unknown(node.to_owned()));
        }
        let mut trial = self.clone();
        trial.set_asked(node, true);
        // A trial logs nothing: its changes do not happen. `Dispatch::none()` would not do: tracing disables a
        // log line for good if that is the default when the line is first reached.
        let silent = Dispatch::new(NoSubscriber::default());
        with_default(&silent, || trial.poll(now));
        // Running requests must either have been moved, or have somewhere to go to.
        for ring in self.rings.values().filter(|ring| ring.has_member(node)) {
            let later = trial.live_ring(&ring.model);
            let later = later.and_then(|id| trial.rings.get(&id));
            let stuck = match later {
                None => ring.stages.iter().find(|stage| stage.member.node == node),
                Some(later) => {
                    let mut stages = later.stages.iter();
                    stages.find(|stage| stage.member.node == node && stage.standby.is_none())
                }
            };
            if let Some(stage) = stuck.filter(|_| ring.retiring.is_none()) {
                return Err(DrainRefusal::NoRoom {
                    name: self.name(node).to_owned(),
                    model: ring.model.clone(),
                    layers: format!("{}..{}", stage.layers.start, stage.layers.end),
                    mib: ring.stage_bytes(&stage.layers) >> 20,
                });
            }
        }
        self.set_asked(node, true);
        Ok(())
    }

    /// Ends [`Rings::drain`]. False means that the worker was not drained.
    pub fn undrain(&mut self, node: &str, now: Instant) -> bool {
        let was = self.nodes.get(node).is_some_and(|node| node.asked_to_drain);
        if was {
            self.set_asked(node, false);
            let first = self.stirred.map_or(now, |(first, _)| first);
            self.stirred = Some((first, now));
        }
        was
    }

    /// Returns true if an operator drains this worker.
    pub fn is_asked_to_drain(&self, node: &str) -> bool {
        self.nodes.get(node).is_some_and(|node| node.asked_to_drain)
    }

    /// Names of the workers that an operator drains, by their node ids.
    pub fn drained(&self) -> BTreeMap<String, String> {
        let mut names = self.names();
        names.retain(|node, _| self.is_asked_to_drain(node));
        names
    }

    /// Restores the nodes that were drained before the head was started; they may come at any time.
    pub fn stay_drained(&mut self, nodes: BTreeMap<String, String>, now: Instant) {
        for (node, name) in nodes {
            let entry = self.nodes.entry(node).or_default();
            entry.asked_to_drain = true;
            entry.name = name;
            entry.gone_since = Some(now);
        }
    }

    /// Parts that a worker holds, each with the event that its move waits for.
    pub fn holdings(&self, node: &str) -> Vec<Holding> {
        let mut holdings = Vec::new();
        for ring in self.rings.values() {
            for stage in &ring.stages {
                let standby = stage.standby.as_ref().is_some_and(|part| part.node == node);
                let member = stage.member.node == node;
                for part in [member.then_some("member"), standby.then_some("standby")] {
                    holdings.extend(part.map(|part| Holding {
                        model: ring.model.clone(),
                        ring: hex(ring.id),
                        layers: [stage.layers.start, stage.layers.end],
                        part: part.into(),
                        waits_for: self.waits_for(ring, stage),
                    }));
                }
            }
        }
        holdings
    }

    fn waits_for(&self, ring: &Ring, stage: &Stage) -> String {
        if ring.retiring.is_some() {
            return "its last requests on this ring to end".into();
        }
        if ring.serving_since.is_none() {
            return "the ring to serve".into();
        }
        match &stage.standby {
            None => "a worker with room".into(),
            Some(part) if !part.is_ready() => {
                format!("{} to load the layers", self.name(&part.node))
            }
            Some(part) => {
                let (name, lag) = (self.name(&part.node), stage.member.state.lag_rows);
                format!("{name} to receive {lag} KV rows")
            }
        }
    }

    /// Moves a ring's parts off drained workers, and to better ones, as far as that goes now.
    pub(super) fn move_off_drained(&mut self, id: u64, now: Instant) {
        let drains = |node: &str| self.nodes.get(node).is_some_and(RingWorker::is_draining);
        let Some(ring) = self.rings.get(&id) else {
            return;
        };
        let mut drained = ring.nodes();
        drained.retain(|node| drains(node));
        let nothing_to_do = drained.is_empty() && ring.moves.is_empty();
        if nothing_to_do || ring.retiring.is_some() || !ring.lost.is_empty() {
            return;
        }
        if ring.serving_since.is_none() {
            if ring.served_by.is_none()
                && ring.epoch == 1
                && drained.iter().any(|node| ring.has_member(node))
            {
                // Nothing has run on it yet, so its loss does no harm.
                let names: Vec<&str> = drained.iter().map(|node| self.name(node)).collect();
                let reason = format!("{} is drained", names.join(", "));
                if let Some(ring) = self.rings.get_mut(&id) {
                    for node in &drained {
                        ring.lose(node, reason.clone());
                    }
                }
                self.recover(id, now);
            }
            return;
        }

        let before = ring.nodes();
        let mut next = ring.clone();
        let mut changed = false;
        for stage in &mut next.stages {
            let drains = |part: &mut Replica| drained.contains(&part.node);
            changed |= stage.standby.take_if(drains).is_some();
        }
        let mut moved = Vec::new();
        let mut stuck = None;
        for index in 0..next.stages.len() {
            let wanted = drained.contains(&next.stages[index].member.node)
                || (changed && self.settings.standbys);
            if wanted
                && next.stages[index].standby.is_none()
                && (changed || next.standbys_for != Some(self.generation))
                && let Some(node) = self.find_standby(&next, index, now)
            {
                next.stages[index].standby = Some(Replica::new(node));
                next.stages[index].member.state.lag_rows = 0;
                changed = true;
            }
            let members = next.members();
            let stage = &mut next.stages[index];
            let better = ring.moves.get(&index);
            let moves = better.is_some() && better == stage.standby.as_ref().map(|part| &part.node);
            if better.is_some() && !moves {
                // It was lost, or drained, meanwhile.
                next.moves.remove(&index);
            }
            if !moves && !drained.contains(&stage.member.node) {
                continue;
            }
            let double =
                |part: &Replica| !self.settings.double_stages && members.contains(&part.node);
            match stage.standby.take() {
                None => stuck = Some(stage.member.node.clone()),
                Some(part)
                    if up_to_date(&part, stage.member.state.lag_rows, now) && !double(&part) =>
                {
                    let Range { start, end } = stage.layers;
                    let (from, to) = (self.name(&stage.member.node), self.name(&part.node));
                    moved.push(format!("{from} hands layers {start}..{end} over to {to}"));
                    stage.member = part;
                    next.moves.remove(&index);
                }
                Some(part) => stage.standby = Some(part),
            }
        }
        if !drained.is_empty() {
            next.standbys_for = Some(self.generation);
        }

        // Asked before it was known to be impossible (a worker that is about to end does not ask): at least
        // not at the last moment.
        let by_itself = |node: &String| self.nodes.get(node).is_some_and(|node| node.said_draining);
        if let Some(node) = stuck.filter(by_itself)
            && ring.standbys_for != Some(self.generation)
            && self.place(&next.model, &[id], now).is_ok()
        {
            let missing = format!("worker {} is about to end", self.name(&node));
            self.plan_anew(id, &missing, now);
            return;
        }
        if moved.is_empty() {
            if changed {
                next.reason = "a drained worker is to be replaced".into();
                next.log_standbys(&next.layout(|node| self.name(node).to_owned()));
            }
            self.rings.insert(id, next);
            if changed {
                self.broadcast(id, &before);
            }
            return;
        }
        let reason = format!("moved: {}", moved.join(", "));
        next.next_epoch(reason.clone(), now);
        next.log_move(&reason);
        self.withdraw_old_driver(&mut next);
        // Standbys are looked for again when it serves.
        next.standbys_for = None;
        self.rings.insert(id, next);
        self.broadcast(id, &before);
    }

    fn set_asked(&mut self, node: &str, asked: bool) {
        if let Some(entry) = self.nodes.get_mut(node)
            && entry.asked_to_drain != asked
        {
            entry.asked_to_drain = asked;
            self.generation += 1;
        }
    }
}

/// Returns true if a standby can take over without a noticeable pause. The member's lag is reported up to a
/// quarter of a second after the standby is ready.
fn up_to_date(standby: &Replica, lag_rows: u64, now: Instant) -> bool {
    let settled = |since: Instant| now.saturating_duration_since(since) >= LAG_KNOWN;
    standby.is_ready() && standby.ready_since.is_some_and(settled) && lag_rows <= SMALL_LAG
}

const LAG_KNOWN: Duration = Duration::from_millis(500);
/// Rows that are replayed in less time than a step takes.
const SMALL_LAG: u64 = 16;
