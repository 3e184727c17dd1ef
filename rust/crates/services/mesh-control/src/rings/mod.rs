//! Rings: forms them for models that no single worker serves, and repairs them after a loss.
//!
//! [`Rings`] takes events (a worker offers, leaves, reports; an operator drains). [`Rings::poll`] compares
//! the present state with the desired one and returns [`Action`]s. Events only note facts: all that is known
//! when `poll` runs goes into one decision, so that two workers lost in the same moment cost one change of
//! epoch, and an event that comes twice or late changes nothing.
//!
//! The life of a ring:
//! - *formed* when the offers for its model have been quiet for a while and placement finds a plan: every
//!   member and standby is sent the same [`mesh_proto::Ring`], epoch 1;
//! - *serves* when its driver says that a token came back through every stage of this epoch;
//! - a member that another one does not reach is *doubted*: it is lost if the head does not hear it either,
//!   else the link between the two is made anew, in a new epoch with the same members;
//! - on a *loss* every lost stage goes to its standby, else to a worker with room, in one new epoch; where
//!   neither is to be had the ring is dissolved and planned anew over what is left;
//! - a ring that does as well as before gets its *standbys* back, in the same epoch: running steps are
//!   undisturbed;
//! - *drained* workers hand their stages over to standbys that are up to date; *rebalancing* builds a better
//!   ring beside the old one, or in its place.

mod action;
mod doubt;
pub mod drain;
mod failover;
mod node;
pub mod plan;
pub mod rebalance;
mod reports;
mod ring;
mod show;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use arcanum_profiler::Objective;
use mesh_proto::{ModelCard, Offer};

pub use action::{Action, Prospect, RingCounts};

use node::{MODELS_PER_NODE, RingWorker};
use ring::Ring;

/// Settings of how rings are formed and kept.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// True if rings are formed at all.
    pub enabled: bool,
    /// Optimisation target of plans.
    pub objective: Objective,
    /// Number of stages; `None` is as many as needed.
    pub stages: Option<u32>,
    /// True if stages get standbys.
    pub standbys: bool,
    /// Requests that a ring runs at once.
    pub slots: u32,
    /// Most tokens of prompt and answer together; 0 is the model's own limit, less where memory is short.
    pub context: u32,
    /// Hidden rows travel as f16.
    pub half_rows: bool,
    /// Fraction of its cost by which a fresh plan must beat a running ring to replace it.
    pub margin: f64,
    /// Time without new offers before a plan is made of them.
    pub gather: Duration,
    /// Length of a first suspicion; each repeat doubles it.
    pub suspect_pause: Duration,
    /// Make a ring even for a model that some worker serves whole.
    pub always: bool,
    /// Time for which requests on a replaced ring may go on.
    pub retire_limit: Duration,
    /// Allows a member to take over a second stage: one that it is the standby of, which beats loading
    /// weights, or one that no other worker has room for. Plans never ask for it.
    pub double_stages: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            enabled: true,
            objective: Objective::Latency,
            stages: None,
            standbys: true,
            slots: 8,
            context: 0,
            half_rows: false,
            margin: 0.15,
            gather: Duration::from_secs(2),
            suspect_pause: Duration::from_secs(10),
            always: false,
            retire_limit: Duration::from_secs(300),
            double_stages: true,
        }
    }
}

/// A worker as it enters.
#[derive(Debug, Clone)]
pub struct Arrival {
    /// Name a person knows it by.
    pub name: String,
    /// Models that it serves whole.
    pub whole: Vec<String>,
    /// The head's own address on the way to it, which other workers must use for a worker on the head's
    /// machine.
    pub head_ip: Option<IpAddr>,
}

/// See the module's page.
#[derive(Debug, Clone)]
pub struct Rings {
    settings: Settings,
    nodes: BTreeMap<String, RingWorker>,
    rings: BTreeMap<u64, Ring>,
    /// Reason for which a model's last ring was given up, until it has a ring again.
    losses: BTreeMap<String, String>,
    /// Reason for which a model has no ring, and the state of the mesh in which that was found.
    unplanned: BTreeMap<String, (u64, String)>,
    next_ring: u64,
    /// Counts changes that may make a plan possible or better.
    generation: u64,
    /// First and last change of offers since they were last quiet.
    stirred: Option<(Instant, Instant)>,
    last_rebalance: Option<Instant>,
    /// With the time of each report.
    recoveries: VecDeque<(mesh_api::Recovery, Instant)>,
    /// Workers that were told to forget a ring, so that they are told once.
    told_off: BTreeSet<(String, u64)>,
    counts: RingCounts,
    actions: Vec<Action>,
}

impl Rings {
    /// No rings yet. Ids count up from `first_ring`, which must be far from those that this head gave out in
    /// earlier lives.
    pub fn new(settings: Settings, first_ring: u64) -> Self {
        Self {
            settings,
            nodes: BTreeMap::new(),
            rings: BTreeMap::new(),
            losses: BTreeMap::new(),
            unplanned: BTreeMap::new(),
            next_ring: first_ring,
            generation: 0,
            stirred: None,
            last_rebalance: None,
            recoveries: VecDeque::new(),
            told_off: BTreeSet::new(),
            counts: RingCounts::default(),
            actions: Vec::new(),
        }
    }

    /// A worker's link is up. Whatever it held under an earlier link is lost.
    pub fn joined(&mut self, node: &str, arrival: Arrival, now: Instant) {
        if self.is_connected(node) {
            self.left(node, "it has connected again", now);
        }
        let entry = self.nodes.entry(node.to_owned()).or_default();
        entry.connected = true;
        entry.heard = None;
        entry.gone_since = None;
        entry.name = arrival.name;
        entry.head_ip = arrival.head_ip;
        entry.whole = arrival.whole.into_iter().take(MODELS_PER_NODE).collect();
        entry.said_draining = false;
        self.generation += 1;
    }

    /// A worker offers parts of models. `address` is where other workers reach it.
    pub fn offered(&mut self, node: &str, address: SocketAddr, offer: Offer, now: Instant) {
        let Some(entry) = self.nodes.get_mut(node).filter(|node| node.connected) else {
            return;
        };
        if entry.take_offer(address, offer) {
            self.generation += 1;
            let first = self.stirred.map_or(now, |(first, _)| first);
            self.stirred = Some((first, now));
        }
    }

    /// A worker that has just joined says that its machine has these addresses.
    pub fn has_addresses(&mut self, node: &str, others: Vec<IpAddr>) {
        if let Some(entry) = self.nodes.get_mut(node) {
            entry.others = others;
        }
    }

    /// A worker is reached at this address from now on: the other members of its rings hear so.
    pub fn moved(&mut self, node: &str, ip: IpAddr) {
        let Some(entry) = self.nodes.get_mut(node).filter(|node| node.connected) else {
            return;
        };
        let Some(address) = entry.address.as_mut().filter(|address| address.ip() != ip) else {
            return;
        };
        address.set_ip(ip);
        let rings = self.rings.values().filter(|ring| ring.has_part(node));
        let ids: Vec<u64> = rings.map(|ring| ring.id).collect();
        for id in ids {
            self.broadcast(id, &BTreeSet::new());
        }
    }

    /// A worker serves these models whole by now.
    pub fn serves_whole(&mut self, node: &str, models: Vec<String>) {
        if let Some(entry) = self.nodes.get_mut(node) {
            entry.whole = models.into_iter().take(MODELS_PER_NODE).collect();
            self.generation += 1;
        }
    }

    /// A worker's link is closed, or it was pruned.
    pub fn left(&mut self, node: &str, why: &str, now: Instant) {
        let Some(entry) = self.nodes.get_mut(node).filter(|node| node.connected) else {
            return;
        };
        entry.disconnect(now);
        let name = entry.name.clone();
        let mut had_part = false;
        for ring in self.rings.values_mut().filter(|ring| ring.has_part(node)) {
            had_part = true;
            ring.lose(node, format!("worker {name} is lost: {why}"));
        }
        if had_part {
            // A worker that dies with every ring it is given must not be given one in every second.
            let pause = self.settings.suspect_pause;
            entry.suspicion.left_with_a_part(pause, why, now);
        }
        self.told_off.retain(|(told, _)| told != node);
        self.generation += 1;
    }

    /// An answer's attempt on the driver of this ring failed by silence or loss.
    pub fn suspected(&mut self, node: &str, ring: u64, reason: &str, now: Instant) {
        // A ring that does not serve is silent for a known reason.
        // One whose steps go on is slow, or busy with others.
        let hears = self.hears(node, now);
        let blamed = |ring: &Ring| {
            ring.driver() == node && ring.serving_since.is_some() && !(hears && ring.goes_on(now))
        };
        if self.rings.get(&ring).is_some_and(blamed) {
            self.suspect(node, ring, reason, now);
        }
    }

    /// A worker is in quarantine: it loses its parts and gets none before that ends.
    pub fn quarantine(&mut self, node: &str, reason: &str, length: Duration, now: Instant) {
        let name = self.name(node).to_owned();
        for ring in self.rings.values_mut().filter(|ring| ring.has_part(node)) {
            ring.lose(node, format!("worker {name} is in quarantine: {reason}"));
        }
        if let Some(entry) = self.nodes.get_mut(node) {
            entry.suspicion.until = Some(now + length);
            reason.clone_into(&mut entry.suspicion.reason);
        }
        self.generation += 1;
    }

    /// An operator forgives a node: its suspicions end.
    pub fn readmit(&mut self, node: &str, now: Instant) {
        if let Some(entry) = self.nodes.get_mut(node)
            && let Some(until) = &mut entry.suspicion.until
        {
            *until = now.min(*until);
        }
    }

    /// The answers of a ring are wrong. The member to blame is not known, so the ring is given up, and all of
    /// its members are left alone for a while, longer each time; another ring is made of the other workers if
    /// they are enough.
    pub fn distrust(&mut self, ring: u64, reason: &str, now: Instant) {
        let Some(found) = self.rings.get(&ring) else {
            return;
        };
        for node in found.members() {
            if let Some(entry) = self.nodes.get_mut(&node) {
                let pause = self.settings.suspect_pause;
                entry.suspicion.raise(pause, reason, now);
            }
        }
        self.dissolve(ring, format!("its answers are wrong: {reason}"));
        self.generation += 1;
    }

    /// Requests that run on a ring that was replaced.
    pub fn running(&mut self, ring: u64, requests: usize) {
        if let Some(ring) = self.rings.get_mut(&ring) {
            ring.running = Some(requests);
        }
    }

    /// A worker says by itself that it finishes and takes nothing new, or no longer.
    pub fn says_draining(&mut self, node: &str, draining: bool) {
        if let Some(entry) = self.nodes.get_mut(node)
            && entry.said_draining != draining
        {
            entry.said_draining = draining;
            self.generation += 1;
        }
    }

    /// Compares the present state with the desired one; to be called after events and when
    /// [`Rings::next_timer`] is due.
    pub fn poll(&mut self, now: Instant) -> Vec<Action> {
        self.settle_suspicions(now);
        self.check_deadlines(now);
        let ids: Vec<u64> = self.rings.keys().copied().collect();
        for id in &ids {
            self.settle_doubts(*id, now);
            self.recover(*id, now);
        }
        if self.settings.enabled {
            for id in &ids {
                self.move_off_drained(*id, now);
            }
            if self.is_quiet(now) {
                self.stirred = None;
                self.form_missing(now);
                // Before standbys take the memory of newcomers.
                self.rebalance_all(now);
                let ids: Vec<u64> = self.rings.keys().copied().collect();
                for id in ids {
                    self.restore_standbys(id, now);
                }
            }
        }
        self.retire(now);
        std::mem::take(&mut self.actions)
    }

    /// Counts since the last call.
    pub fn take_counts(&mut self) -> RingCounts {
        std::mem::take(&mut self.counts)
    }

    /// Time at which [`Rings::poll`] has work without an event.
    pub fn next_timer(&self) -> Option<Instant> {
        let quiet = self.stirred.map(|stirred| self.quiet_at(stirred));
        let suspects = self.nodes.values().filter_map(RingWorker::next_timer);
        let rings = self.rings.values().filter_map(Ring::next_timer);
        quiet.into_iter().chain(suspects).chain(rings).min()
    }

    /// Models that no worker serves through a ring now, though workers offer their layers.
    pub fn prospects(&self) -> BTreeMap<String, Prospect> {
        let mut prospects = BTreeMap::new();
        if !self.settings.enabled {
            return prospects;
        }
        for model in self.offered_models() {
            if self.wants_ring(&model) {
                // Changes since then may make a plan possible; that shows in a moment.
                let found = self
                    .unplanned
                    .get(&model)
                    .filter(|_| self.stirred.is_none());
                let prospect = found.map_or(Prospect::Coming, |(_, reason)| {
                    Prospect::Impossible(reason.clone())
                });
                prospects.insert(model, prospect);
            }
        }
        for ring in self.rings.values().filter(|ring| ring.retiring.is_none()) {
            prospects.insert(ring.model.clone(), Prospect::Coming);
        }
        for ring in self.rings.values().filter(|ring| ring.served_by.is_some()) {
            prospects.remove(&ring.model);
        }
        prospects
    }

    /// Time since which this ring serves in its present epoch under this driver. `None`: another worker
    /// drives it now, or there is no such ring any more. `Some(None)`: it recovers.
    #[allow(clippy::option_option)]
    pub fn serves_since(&self, ring: u64, driver: &str) -> Option<Option<Instant>> {
        let ring = self.rings.get(&ring)?;
        (ring.driver() == driver && !ring.lost.contains_key(driver)).then_some(ring.serving_since)
    }

    /// Rings that were replaced and still answer.
    pub fn retiring(&self) -> Vec<u64> {
        let retiring = self.rings.values().filter(|ring| ring.retiring.is_some());
        retiring.map(|ring| ring.id).collect()
    }

    /// Returns true if a worker offered parts of models.
    pub fn has_offer(&self, node: &str) -> bool {
        let node = self.nodes.get(node);
        node.is_some_and(|node| node.connected && !node.offers.is_empty())
    }

    fn is_connected(&self, node: &str) -> bool {
        self.nodes.get(node).is_some_and(|node| node.connected)
    }

    fn serve(&mut self, id: u64, node: &str, card: ModelCard) {
        let Some(ring) = self.rings.get_mut(&id) else {
            return;
        };
        let serving = Some((node.to_owned(), card.clone()));
        if ring.served_by == serving {
            return;
        }
        if ring.served_by.as_ref().is_some_and(|(by, _)| by != node) {
            self.withdraw(id);
        }
        if let Some(ring) = self.rings.get_mut(&id) {
            ring.served_by = serving;
        }
        self.actions.push(Action::Serve {
            node: node.to_owned(),
            ring: id,
            card,
        });
    }

    fn withdraw(&mut self, id: u64) {
        let Some(ring) = self.rings.get_mut(&id) else {
            return;
        };
        if let Some((node, _)) = ring.served_by.take() {
            self.actions.push(Action::Withdraw {
                node,
                ring: id,
                model: ring.model.clone(),
            });
        }
    }

    /// Handles rings that do not get ready in time: the parts that they wait for count as lost.
    fn check_deadlines(&mut self, now: Instant) {
        let rings = self.rings.values();
        let late: Vec<_> = rings
            .map(|ring| (ring.id, ring.model.clone(), ring.late(now)))
            .collect();
        for (id, model, late) in late {
            for (node, why) in late {
                self.unfit(&node, &model, id, why, now);
            }
        }
    }

    fn quiet_at(&self, (first, last): (Instant, Instant)) -> Instant {
        let gather = self.settings.gather;
        // A worker that changes its offer all the time must not keep the others waiting.
        (last + gather).min(first + gather * GATHER_LIMIT)
    }

    fn is_quiet(&self, now: Instant) -> bool {
        self.stirred
            .is_none_or(|stirred| now >= self.quiet_at(stirred))
    }

    fn name<'a>(&'a self, node: &'a str) -> &'a str {
        self.nodes
            .get(node)
            .map_or(node.get(..12).unwrap_or(node), |known| &known.name)
    }

    /// The ring of a model that is not on its way out; the one that serves rather than the one that will
    /// replace it.
    fn live_ring(&self, model: &str) -> Option<u64> {
        let live = |ring: &&Ring| ring.model == model && ring.retiring.is_none();
        let rings = self.rings.values().filter(live);
        let ring = rings.min_by_key(|ring| (ring.replaces.is_some(), ring.id));
        ring.map(|ring| ring.id)
    }

    fn offered_models(&self) -> BTreeSet<String> {
        let connected = self.nodes.values().filter(|node| node.connected);
        connected
            .flat_map(|node| node.offers.keys().cloned())
            .collect()
    }

    /// Returns true if a ring of this model should exist and does not.
    fn wants_ring(&self, model: &str) -> bool {
        let whole =
            |node: &RingWorker| node.connected && !node.is_draining() && node.whole.contains(model);
        self.live_ring(model).is_none() && (self.settings.always || !self.nodes.values().any(whole))
    }
}
const GATHER_LIMIT: u32 = 10;
