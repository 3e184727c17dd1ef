//! The registry of workers.
//!
//! A mesh worker enters with its Hello and leaves when its link closes; a worker without an identity
//! (`registry/plain.rs`) enters with a heartbeat. Either is pruned after a timeout without a sign of life.

mod clock;
mod plain;
pub mod proofs;
mod served;
mod service;

/// Time for which a name stands for weights that no worker serves any more.
const NAME_MEMORY: Duration = Duration::from_secs(30);
#[cfg(test)]
mod tests;
mod worker;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use mesh_proto::{Hello, Load, ModelCard, ModelSpeed};

use super::reputation::Reputation;
use super::spotcheck::{CheckState, SpotChecks};

pub use clock::TokenClock;
pub use plain::KINDS;
use served::{RETRY, is_sound, plausible, ring_of_subject, short, speed};
pub use served::{ServedModel, Service, batch_gain};
pub use worker::{Carrier, Worker, WorkerId};

/// All workers, and the models that were served recently.
#[derive(Debug)]
pub struct Registry {
    /// Silence after which a worker is pruned.
    timeout: Duration,
    // Ordered, so that routing never depends on a hash seed.
    workers: BTreeMap<WorkerId, Worker>,
    /// Model names and when a worker last served them.
    known_models: BTreeMap<String, Instant>,
    /// The weights that a model's name stands for, and when a worker last served those.
    names: BTreeMap<String, (String, Instant)>,
    /// The models of requests that name none, by kind: once chosen they stay while they are served.
    defaults: BTreeMap<i32, String>,
    /// Quarantines and pauses of nodes.
    pub reputation: Reputation,
    checks: SpotChecks,
    /// Warnings about workers that differ, by the one that is held back.
    disputes: BTreeMap<String, String>,
    /// Rings that have answered: their next driver is believed to answer, too.
    proven_rings: BTreeMap<u64, Instant>,
    trial: Duration,
    check_interval: Duration,
    /// Time after which a name whose weights no worker has any more may stand for others.
    handover: Duration,
    next_id: u64,
}

impl Registry {
    /// An empty registry that prunes workers after `timeout` of silence.
    pub fn new(timeout: Duration) -> Self {
        Self {
            timeout,
            workers: BTreeMap::new(),
            known_models: BTreeMap::new(),
            names: BTreeMap::new(),
            defaults: BTreeMap::new(),
            reputation: Reputation::default(),
            checks: SpotChecks::default(),
            disputes: BTreeMap::new(),
            proven_rings: BTreeMap::new(),
            trial: Duration::from_secs(30),
            check_interval: Duration::from_secs(300),
            handover: NAME_MEMORY,
            next_id: 1,
        }
    }

    /// Sets the time for which requests wait for a worker that has yet to prove itself, and the interval
    /// between checks of one that serves.
    #[must_use]
    pub fn with_proofs(self, trial: Duration, check_interval: Duration) -> Self {
        Self {
            trial,
            check_interval,
            ..self
        }
    }

    /// Sets the time for which a name whose weights no worker has any more waits for one that has them.
    #[must_use]
    pub(crate) fn with_handover(self, handover: Duration) -> Self {
        Self {
            handover: handover.min(NAME_MEMORY),
            ..self
        }
    }

    /// Enters a mesh worker. A node that is already there has come back on a new link: the old entry's id is
    /// returned as well, for the caller to end its requests.
    pub fn join(
        &mut self,
        node_id: &str,
        address: SocketAddr,
        hello: Hello,
        now: Instant,
    ) -> (WorkerId, Option<WorkerId>) {
        let carrier = Carrier::Mesh {
            node_id: node_id.to_owned(),
        };
        let replaced = self.of_node(node_id).map(|worker| worker.id);
        if let Some(old) = replaced {
            self.leave(old, now);
        }
        let models = sound(hello.all_models()).map(|card| ServedModel::new(card, None, now));
        let models = models.collect();
        let name = match hello.node_name.as_str() {
            "" => short(node_id).to_owned(),
            name => name.to_owned(),
        };
        let id = self.insert(name, carrier, address, hello.version, models, now);
        if let Some(worker) = self.workers.get_mut(&id) {
            let kept = hello.reserved_for.into_iter().take(PURPOSES_PER_WORKER);
            worker.reserved_for = kept.filter(|purpose| purpose.len() <= 64).collect();
            worker.request_revision = hello.request_revision;
        }
        self.refresh(id, now);
        self.remember_models(id, now);
        (id, replaced)
    }

    /// A sign of life without news.
    pub fn seen(&mut self, id: WorkerId, now: Instant) {
        if let Some(worker) = self.workers.get_mut(&id) {
            worker.last_seen = now;
        }
    }

    /// This head itself did not run for `stall` and could hear nothing in that time.
    pub fn stalled(&mut self, stall: Duration, now: Instant) {
        for worker in self.workers.values_mut() {
            worker.last_seen = (worker.last_seen + stall).min(now);
        }
    }

    /// A mesh worker's packets come from this address now. Returns the one before if that is news.
    pub fn moved(&mut self, id: WorkerId, address: SocketAddr) -> Option<SocketAddr> {
        let worker = self.workers.get_mut(&id)?;
        (worker.address != address).then(|| std::mem::replace(&mut worker.address, address))
    }

    /// A load report. Speeds in it count until this head has measured them.
    pub fn report(&mut self, id: WorkerId, load: Load, now: Instant) {
        let Some(worker) = self.workers.get_mut(&id) else {
            return;
        };
        worker.last_seen = now;
        worker.draining = load.draining || worker.drained;
        for measured in &load.speeds {
            if let Some(model) = worker.model_mut(&measured.name) {
                let decode = speed(measured.decode_tps) / batch_gain(load.running.max(1));
                model.claims(decode, speed(measured.prefill_tps));
            }
        }
        if works(&worker.load) != works(&load) {
            worker.load_changed = now;
        }
        let queues = load.queued > 0;
        worker.queues_since = queues.then(|| worker.queues_since.unwrap_or(now));
        worker.load = load;
        self.remember_models(id, now);
    }

    /// The worker answers for a ring from now on. A model that it holds whole it goes on serving by itself.
    pub fn serve(&mut self, id: WorkerId, ring: u64, card: ModelCard, now: Instant) {
        let Some(worker) = self.workers.get_mut(&id) else {
            return;
        };
        if !is_sound(&card) {
            return;
        }
        let full = worker.models.len() >= MODELS_PER_WORKER;
        // Its last driver answered, and the ring says that a token came through every stage of this epoch.
        let proven = self.proven_rings.contains_key(&ring);
        let fresh = |card| {
            let mut model = ServedModel::new(card, Some(ring), now);
            model.proven = proven;
            model
        };
        match worker.model_mut(&card.name) {
            Some(model) if model.ring.is_none() => return,
            Some(model) if model.ring == Some(ring) => {
                model.claims(speed(card.decode_tps), speed(card.prefill_tps));
                model.card = plausible(card);
            }
            Some(model) => *model = fresh(card),
            None if full => return,
            None => worker.models.push(fresh(card)),
        }
        self.refresh(id, now);
        self.remember_models(id, now);
    }

    /// The worker serves these models whole, and no others. Models that it served before keep their
    /// measurements and checks. Where new ones come again within a second they are asked for proofs after it:
    /// each question costs other workers time, too.
    pub fn serves(&mut self, id: WorkerId, cards: Vec<ModelCard>, now: Instant) {
        self.remember_models(id, now);
        let Some(worker) = self.workers.get_mut(&id) else {
            return;
        };
        let before = std::mem::take(&mut worker.models);
        let (whole, mut of_rings): (Vec<ServedModel>, Vec<ServedModel>) =
            before.into_iter().partition(|model| model.ring.is_none());
        let retry_at = worker.new_models_at.map(|last| last + RETRY);
        let served = sound(cards).map(|card| {
            let same = |old: &&ServedModel| {
                old.card.name == card.name && old.card.fingerprint == card.fingerprint
            };
            match whole.iter().find(same) {
                // It may have been loaded again, with another part of it on a GPU.
                Some(old) => {
                    let mut same = old.clone();
                    let card = plausible(card);
                    (same.card.backend, same.card.split) = (card.backend, card.split);
                    same
                }
                None => {
                    worker.new_models_at = Some(now);
                    ServedModel {
                        retry_at,
                        ..ServedModel::new(card, None, now)
                    }
                }
            }
        });
        let mut models: Vec<ServedModel> = served.collect();
        of_rings.retain(|ring| !models.iter().any(|m| m.card.name == ring.card.name));
        models.extend(of_rings);
        models.truncate(MODELS_PER_WORKER);
        worker.proven = models.iter().all(|model| model.proven);
        worker.models = models;
        self.refresh(id, now);
        self.remember_models(id, now);
    }

    /// The worker no longer answers for this ring.
    pub fn withdraw(&mut self, id: WorkerId, ring: u64, now: Instant) {
        self.remember_models(id, now);
        if let Some(worker) = self.workers.get_mut(&id) {
            worker.models.retain(|model| model.ring != Some(ring));
        }
    }

    /// The worker with this node id.
    pub fn of_node(&self, node_id: &str) -> Option<&Worker> {
        self.iter().find(|worker| worker.node_id() == Some(node_id))
    }

    /// Node id of a worker; `None` if it has none, or left.
    pub fn node_of(&self, id: WorkerId) -> Option<&str> {
        self.get(id)?.node_id()
    }

    /// Removes a worker; its link is closed.
    pub fn leave(&mut self, id: WorkerId, now: Instant) -> Option<Worker> {
        self.remember_models(id, now);
        self.workers.remove(&id)
    }

    /// Removes and returns the workers that were silent for too long.
    pub fn prune(&mut self, now: Instant) -> Vec<Worker> {
        let age = |since: Instant| now.saturating_duration_since(since);
        let silent = self.iter().filter(|w| age(w.last_seen) >= self.timeout);
        let silent: Vec<WorkerId> = silent.map(|worker| worker.id).collect();
        self.known_models
            .retain(|_, seen| age(*seen) < MODEL_MEMORY);
        self.settle(now);
        let silent = silent.into_iter();
        silent.filter_map(|id| self.leave(id, now)).collect()
    }

    /// The worker of this id, if it is here.
    pub fn get(&self, id: WorkerId) -> Option<&Worker> {
        self.workers.get(&id)
    }

    /// The worker of this id, to change.
    pub fn get_mut(&mut self, id: WorkerId) -> Option<&mut Worker> {
        self.workers.get_mut(&id)
    }

    /// All workers in the order in which they joined.
    pub fn iter(&self) -> impl Iterator<Item = &Worker> {
        self.workers.values()
    }

    /// Number of workers.
    pub fn len(&self) -> usize {
        self.workers.len()
    }

    /// Returns true if there are no workers.
    pub fn is_empty(&self) -> bool {
        self.workers.is_empty()
    }

    /// Returns true if a worker serves this model or did within the last ten minutes.
    pub fn knows_model(&self, name: &str) -> bool {
        self.known_models.contains_key(name)
            || self.iter().any(|worker| worker.model(name).is_some())
    }

    /// Every model served now, by name, each with the card of the worker that joined first among those that
    /// answer, or among all where none does.
    pub fn models(&self) -> BTreeMap<&str, &ModelCard> {
        let mut models = BTreeMap::new();
        let all = || self.iter().flat_map(|worker| &worker.models);
        for model in all().filter(|model| model.is_cleared()).chain(all()) {
            let name = model.card.name.as_str();
            models.entry(name).or_insert(&model.card);
        }
        models
    }

    /// Applies changes that are due to time alone.
    fn settle(&mut self, now: Instant) {
        let is_new = |model: &ServedModel| model.check_state == CheckState::New;
        let waiting = self.iter().filter(|w| w.models.iter().any(is_new));
        let waiting: Vec<WorkerId> = waiting.map(|worker| worker.id).collect();
        for id in waiting {
            self.refresh(id, now);
        }
        self.settle_names(now);
        let workers = &self.workers;
        self.disputes.retain(|subject, _| {
            ring_of_subject(subject).is_some()
                || workers.values().any(|w| w.node_id() == Some(subject))
        });
    }

    fn insert(
        &mut self,
        name: String,
        carrier: Carrier,
        address: SocketAddr,
        version: String,
        models: Vec<ServedModel>,
        now: Instant,
    ) -> WorkerId {
        let id = WorkerId(self.next_id);
        self.next_id += 1;
        let worker = Worker {
            id,
            name,
            carrier,
            address,
            clock_offset: 0.0,
            version,
            models,
            reserved_for: Vec::new(),
            request_revision: 0,
            load: Load::default(),
            load_changed: now,
            queues_since: None,
            draining: false,
            drained: false,
            busy_until: None,
            joined: now,
            last_seen: now,
            last_success: None,
            proven: false,
            assigned: 0,
            unstarted: 0,
            alone: None,
            reserved_until: None,
            prefilling: 0,
            completed: 0,
            failed: 0,
            task_seconds: 0.0,
            last_turn: 0,
            new_models_at: None,
            tokens_seen: TokenClock::new(now),
        };
        self.workers.insert(id, worker);
        id
    }

    fn remember_models(&mut self, id: WorkerId, now: Instant) {
        let Some(worker) = self.workers.get(&id) else {
            return;
        };
        for model in &worker.models {
            if let Some(seen) = self.known_models.get_mut(&model.card.name) {
                *seen = now;
            } else if self.known_models.len() < KNOWN_MODELS {
                self.known_models.insert(model.card.name.clone(), now);
            }
        }
    }
}

/// The cards that are within bounds, one of each name, as many as a worker may serve.
fn sound(cards: Vec<ModelCard>) -> impl Iterator<Item = ModelCard> {
    let mut names = BTreeSet::new();
    let sound = cards.into_iter().filter(is_sound);
    let sound = sound.filter(move |card| names.insert(card.name.clone()));
    sound.take(MODELS_PER_WORKER)
}

/// Fields of a report that only a working engine changes.
fn works(load: &Load) -> (u32, u32, u64, u64, &[ModelSpeed]) {
    (
        load.running,
        load.queued,
        load.kv_tokens_used,
        load.prefill_backlog,
        &load.speeds,
    )
}
const MODELS_PER_WORKER: usize = 64;
const PURPOSES_PER_WORKER: usize = 16;
const KNOWN_MODELS: usize = 1024;
/// Time for which a model without a worker is answered with "no worker" instead of "no such model".
const MODEL_MEMORY: Duration = Duration::from_secs(600);
