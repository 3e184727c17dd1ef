//! The registry of workers.
//!
//! A mesh worker enters with its Hello and leaves when its link closes; a v5.0.0 worker enters with a heartbeat. Either is
//! pruned after [`Registry::timeout`] without a sign of life.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use dcf::Version;
use mesh_proto::{Hello, Load, ModelCard, ModelKind, ModelSpeed};

/// Names a worker within this head's life; never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WorkerId(pub u64);

/// How a worker is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Carrier {
    /// Over its QUIC link; the node id is the SHA-256 of its public key.
    Mesh {
        /// Lower-case hex.
        node_id: String,
    },
    /// Plain DCF over UDP.
    Legacy {
        /// The version of its last heartbeat, in which it gets its tasks.
        version: Version,
    },
}

/// One model on one worker, with the speeds the head believes in.
#[derive(Debug, Clone)]
pub struct ServedModel {
    /// As the worker announced it.
    pub card: ModelCard,
    /// Decode speed of a single stream, tokens per second; 0 is unknown.
    pub decode_tps: f64,
    /// Prefill speed, tokens per second; 0 is unknown.
    pub prefill_tps: f64,
    /// The ring that it answers for as its driver; `None` where the worker holds the whole model.
    pub ring: Option<u64>,
    /// Whether the last attempt with this model, probes included, brought an answer.
    pub proven: bool,
    /// True if the last attempt failed, for reasons that are not the request's: then only a token proves the
    /// contrary.
    pub failing: bool,
    /// Time at which a token of this model last came back.
    pub last_success: Option<Instant>,
    /// Time at which a request for it last showed that the worker's engine makes progress.
    pub last_sign: Option<Instant>,
}

impl ServedModel {
    /// True if it is reliable: a token came back, or, before any did, its engine makes progress with its
    /// work.
    pub fn answers(&self, now: Instant) -> bool {
        let fresh = |at| now.saturating_duration_since(at) < SIGN_AGE;
        self.proven || (!self.failing && self.last_sign.is_some_and(fresh))
    }

    /// A token came back.
    pub fn succeeded(&mut self, now: Instant) {
        (self.proven, self.failing) = (true, false);
        self.last_success = Some(now);
    }

    /// An attempt failed.
    pub fn failed(&mut self) {
        (self.proven, self.failing) = (false, true);
    }

    fn new(card: ModelCard, ring: Option<u64>) -> Self {
        Self {
            decode_tps: speed(card.decode_tps),
            prefill_tps: speed(card.prefill_tps),
            card,
            ring,
            proven: false,
            failing: false,
            last_success: None,
            last_sign: None,
        }
    }
}

/// A worker as the head knows it.
#[derive(Debug, Clone)]
pub struct Worker {
    /// Its name within this head.
    pub id: WorkerId,
    /// Name a person knows it by.
    pub name: String,
    /// How it is reached.
    pub carrier: Carrier,
    /// Where it is: remote address of the link, or where a v5.0.0 worker takes tasks.
    pub address: SocketAddr,
    /// The lead of its clock over this head's, in seconds, by the timestamps of its messages; 0 while that is
    /// unknown.
    pub clock_offset: f64,
    /// Program version, empty for v5.0.0.
    pub version: String,
    /// What it serves; empty for v5.0.0, which serves plain tasks.
    pub models: Vec<ServedModel>,
    /// What it is kept for; empty is for anything.
    pub reserved_for: Vec<String>,
    /// The fields of a request that it acts upon: [`Hello::request_revision`].
    pub request_revision: u32,
    /// Its last load report.
    pub load: Load,
    /// Time at which a report last differed from the one before in a field that only a working engine
    /// changes.
    pub load_changed: Instant,
    /// Time since which its reports say that requests wait there, without a break.
    pub queues_since: Option<Instant>,
    /// It finishes what runs and takes nothing new: it says so, or an operator does.
    pub draining: bool,
    /// An operator does.
    pub drained: bool,
    /// It said busy: nothing new before this moment.
    pub busy_until: Option<Instant>,
    /// When it joined.
    pub joined: Instant,
    /// Last sign of life.
    pub last_seen: Instant,
    /// Time at which a token last came back from it.
    pub last_success: Option<Instant>,
    /// Whether the last attempt on it, probes included, brought an answer.
    pub proven: bool,
    /// Requests of this head that run on it.
    pub assigned: u32,
    /// Those of them whose first token has not come yet.
    pub unstarted: u32,
    /// One of those is suspected of the death of another worker and has this one for itself.
    pub alone: bool,
    /// Prompt tokens of those whose first token has not come yet.
    pub prefilling: u64,
    /// Answers it completed.
    pub completed: u64,
    /// Attempts that failed on it.
    pub failed: u64,
    /// Seconds a task takes on a v5.0.0 worker, smoothed; 0 is unknown.
    pub task_seconds: f64,
    /// Value of the router's counter at the last assignment: the tie break.
    pub last_turn: u64,
}

impl Worker {
    /// Requests that hold or wait for a slot, by whichever count is larger: its report is up to 250 ms old, and other
    /// heads may use it too.
    pub fn active(&self) -> u32 {
        self.assigned
            .max(self.load.running.saturating_add(self.load.queued))
    }

    /// The model of that name, if it serves it; its first one that makes text for a request that names none.
    pub fn model(&self, name: &str) -> Option<&ServedModel> {
        let is_meant = |model: &&ServedModel| {
            if name.is_empty() {
                model.card.kind() == ModelKind::Chat
            } else {
                model.card.name == name
            }
        };
        self.models.iter().find(is_meant)
    }

    /// Whether it may be used for this purpose.
    pub fn is_for(&self, purpose: &str) -> bool {
        self.reserved_for.is_empty() || self.reserved_for.iter().any(|kept| kept == purpose)
    }

    /// A token was asked of one of its models at `asked`, and came or did not come.
    pub fn probed(&mut self, name: &str, came: bool, asked: Instant, now: Instant) {
        let Some(model) = self.models.iter_mut().find(|model| model.card.name == name) else {
            return;
        };
        if came {
            model.succeeded(now);
            self.last_success = Some(now);
        } else if model.last_success.is_none_or(|at| at < asked) {
            // A real answer meanwhile is a proof, too.
            model.failed();
        }
        self.proven = self.models.iter().all(|model| model.proven);
    }

    /// True if more requests for this model than `ahead` wait there, and not just for the next step.
    pub fn queues(&self, model: &str, ahead: u32, now: Instant) -> bool {
        let meant = self.model(model);
        // Requests at an encoder wait for their turn, not for memory.
        if meant.is_some_and(|model| model.card.kind() == ModelKind::Embed) {
            return false;
        }
        let own = meant.and_then(|model| {
            let mut speeds = self.load.speeds.iter();
            speeds.find(|speed| speed.name == model.card.name)?.queued
        });
        let long = |since| now.saturating_duration_since(since) >= QUEUES_LONG;
        own.unwrap_or(self.load.queued) > ahead && self.queues_since.is_some_and(long)
    }

    /// True if its reports say that it works and that requests wait there: one without a token may be among
    /// those.
    pub fn is_busy(&self, within: Duration, now: Instant) -> bool {
        self.load.queued > 0 && now.saturating_duration_since(self.load_changed) < within
    }

    /// A request for this model showed that the engine gets on.
    pub fn gave_sign(&mut self, name: &str, now: Instant) {
        if let Some(model) = self.models.iter_mut().find(|m| m.card.name == name) {
            model.last_sign = Some(now);
        }
    }

    /// Its node id, unless it is a v5.0.0 worker.
    pub fn node_id(&self) -> Option<&str> {
        match &self.carrier {
            Carrier::Mesh { node_id } => Some(node_id),
            Carrier::Legacy { .. } => None,
        }
    }

    /// True if it is a worker without an identity: one of DCF v5.0.0 or v5.1.
    pub fn is_legacy(&self) -> bool {
        self.legacy_version().is_some()
    }

    /// The version of DCF that it speaks, if it is a worker without an identity.
    pub fn legacy_version(&self) -> Option<Version> {
        match self.carrier {
            Carrier::Mesh { .. } => None,
            Carrier::Legacy { version } => Some(version),
        }
    }
}

/// All workers, and the models that were served lately.
#[derive(Debug)]
pub struct Registry {
    /// Silence after which a worker is pruned.
    timeout: Duration,
    // Ordered, so that routing never depends on a hash seed.
    workers: BTreeMap<WorkerId, Worker>,
    /// Model names and when a worker last served them.
    known_models: BTreeMap<String, Instant>,
    next_id: u64,
}

impl Registry {
    /// An empty registry that prunes workers after `timeout` of silence.
    pub fn new(timeout: Duration) -> Self {
        Self {
            timeout,
            workers: BTreeMap::new(),
            known_models: BTreeMap::new(),
            next_id: 1,
        }
    }

    /// Silence after which a worker is pruned.
    pub fn timeout(&self) -> Duration {
        self.timeout
    }

    /// Enters a mesh worker. A node that is already there has come back on a new link: the old entry's id is returned
    /// as well, for the caller to end what runs on it.
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
        let replaced = self
            .workers
            .values()
            .find(|worker| worker.carrier == carrier)
            .map(|worker| worker.id);
        if let Some(old) = replaced {
            self.leave(old, now);
        }
        let models = hello
            .models
            .into_iter()
            .take(MODELS_PER_WORKER)
            .map(|card| ServedModel::new(card, None))
            .collect();
        let name = if hello.node_name.is_empty() {
            short(node_id).to_owned()
        } else {
            hello.node_name
        };
        let id = self.insert(name, carrier, address, hello.version, models, now);
        if let Some(worker) = self.workers.get_mut(&id) {
            let kept = hello.reserved_for.into_iter().take(PURPOSES_PER_WORKER);
            worker.reserved_for = kept.filter(|purpose| purpose.len() <= 64).collect();
            worker.request_revision = hello.request_revision;
        }
        self.remember_models(id, now);
        (id, replaced)
    }

    /// A heartbeat of a worker without an identity that takes tasks at `address`. True means that it is new.
    pub fn legacy_heartbeat(
        &mut self,
        address: SocketAddr,
        version: Version,
        now: Instant,
    ) -> Option<(WorkerId, bool)> {
        let mut legacy = self
            .workers
            .values_mut()
            .filter(|worker| worker.is_legacy());
        if let Some(worker) = legacy.find(|worker| worker.address == address) {
            worker.last_seen = now;
            worker.carrier = Carrier::Legacy { version };
            return Some((worker.id, false));
        }
        // Heartbeats carry no proof of who sent them, so their number must not decide how much memory they take.
        if self
            .workers
            .values()
            .filter(|worker| worker.is_legacy())
            .count()
            >= LEGACY_WORKERS
        {
            return None;
        }
        let id = self.insert(
            address.to_string(),
            Carrier::Legacy { version },
            address,
            String::new(),
            Vec::new(),
            now,
        );
        Some((id, true))
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

    /// A load report. Speeds in it replace what is believed so far.
    pub fn report(&mut self, id: WorkerId, load: Load, now: Instant) {
        let Some(worker) = self.workers.get_mut(&id) else {
            return;
        };
        worker.last_seen = now;
        worker.draining = load.draining || worker.drained;
        for measured in &load.speeds {
            let Some(model) = worker
                .models
                .iter_mut()
                .find(|model| model.card.name == measured.name)
            else {
                continue;
            };
            let (decode, prefill) = (speed(measured.decode_tps), speed(measured.prefill_tps));
            if decode > 0.0 {
                model.decode_tps = decode / batch_gain(load.running.max(1));
            }
            if prefill > 0.0 {
                model.prefill_tps = prefill;
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
        let full = worker.models.len() >= MODELS_PER_WORKER;
        let known = worker
            .models
            .iter_mut()
            .find(|model| model.card.name == card.name);
        match known {
            Some(model) if model.ring.is_none() => return,
            Some(model) if model.ring == Some(ring) => {
                if card.decode_tps > 0.0 {
                    model.decode_tps = speed(card.decode_tps);
                }
                if card.prefill_tps > 0.0 {
                    model.prefill_tps = speed(card.prefill_tps);
                }
                model.card = card;
            }
            Some(model) => *model = ServedModel::new(card, Some(ring)),
            None if full => return,
            None => worker.models.push(ServedModel::new(card, Some(ring))),
        }
        self.remember_models(id, now);
    }

    /// The worker serves these models whole, and no others. Those that it served before keep what is known of them.
    pub fn serves(&mut self, id: WorkerId, cards: Vec<ModelCard>, now: Instant) {
        self.remember_models(id, now);
        let Some(worker) = self.workers.get_mut(&id) else {
            return;
        };
        let before = std::mem::take(&mut worker.models);
        let (whole, of_rings): (Vec<ServedModel>, Vec<ServedModel>) =
            before.into_iter().partition(|model| model.ring.is_none());
        let mut models: Vec<ServedModel> = cards
            .into_iter()
            .take(MODELS_PER_WORKER)
            .map(|card| {
                let same = |old: &&ServedModel| {
                    old.card.name == card.name && old.card.fingerprint == card.fingerprint
                };
                whole
                    .iter()
                    .find(same)
                    .cloned()
                    .unwrap_or_else(|| ServedModel::new(card, None))
            })
            .collect();
        let others = of_rings
            .into_iter()
            .filter(|ring| !models.iter().any(|m| m.card.name == ring.card.name));
        let others: Vec<ServedModel> = others.collect();
        models.extend(others);
        models.truncate(MODELS_PER_WORKER);
        worker.proven = models.iter().all(|model| model.proven);
        worker.models = models;
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

    /// Removes a worker; its link is closed.
    pub fn leave(&mut self, id: WorkerId, now: Instant) -> Option<Worker> {
        self.remember_models(id, now);
        self.workers.remove(&id)
    }

    /// Removes and returns the workers that were silent for too long.
    pub fn prune(&mut self, now: Instant) -> Vec<Worker> {
        let silent: Vec<WorkerId> = self
            .workers
            .values()
            .filter(|worker| now.saturating_duration_since(worker.last_seen) >= self.timeout)
            .map(|worker| worker.id)
            .collect();
        self.known_models
            .retain(|_, seen| now.saturating_duration_since(*seen) < MODEL_MEMORY);
        silent
            .into_iter()
            .filter_map(|id| self.leave(id, now))
            .collect()
    }

    /// One worker.
    pub fn get(&self, id: WorkerId) -> Option<&Worker> {
        self.workers.get(&id)
    }

    /// One worker, to change.
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

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.workers.is_empty()
    }

    /// Whether a worker serves this model now or did within the last minutes.
    pub fn knows_model(&self, name: &str) -> bool {
        self.known_models.contains_key(name)
            || self.iter().any(|worker| worker.model(name).is_some())
    }

    /// Every model served now, by name, each with the card of the worker that joined first.
    pub fn models(&self) -> BTreeMap<&str, &ModelCard> {
        let mut models = BTreeMap::new();
        for worker in self.iter() {
            for model in &worker.models {
                models
                    .entry(model.card.name.as_str())
                    .or_insert(&model.card);
            }
        }
        models
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
            alone: false,
            prefilling: 0,
            completed: 0,
            failed: 0,
            task_seconds: 0.0,
            last_turn: 0,
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

/// How much faster `batch` streams decode together than one does. Decoding is bound by reading the weights, which a batch
/// shares; the square root lies between no gain and a perfect one, and both measured points (2 and 8 streams) near it.
pub fn batch_gain(batch: u32) -> f64 {
    f64::from(batch.max(1)).sqrt()
}

/// The first characters of a node id, enough to tell nodes apart.
fn short(node_id: &str) -> &str {
    node_id.get(..12).unwrap_or(node_id)
}

/// A reported speed, or 0 (unknown) where the report makes no sense.
fn speed(reported: f32) -> f64 {
    if reported.is_finite() && reported > 0.0 {
        f64::from(reported)
    } else {
        0.0
    }
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

/// Time for which a sign of life counts.
const SIGN_AGE: Duration = Duration::from_secs(10);
/// Requests that wait at a worker for so long do not just wait for its next step.
const QUEUES_LONG: Duration = Duration::from_millis(500);
const MODELS_PER_WORKER: usize = 64;
const PURPOSES_PER_WORKER: usize = 16;
const KNOWN_MODELS: usize = 1024;
const LEGACY_WORKERS: usize = 1024;
/// How long a model without a worker is answered with "no worker" and not with "no such model".
const MODEL_MEMORY: Duration = Duration::from_secs(600);

#[cfg(test)]
mod tests {
    use mesh_proto::ModelSpeed;

    use super::*;

    fn address(port: u16) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], port))
    }

    fn hello(name: &str) -> Hello {
        let card = ModelCard {
            name: "tiny".into(),
            slots: 4,
            decode_tps: 100.0,
            ..Default::default()
        };
        Hello {
            node_name: name.into(),
            models: vec![card],
            ..Default::default()
        }
    }

    #[test]
    fn a_silent_worker_is_pruned_at_the_timeout_and_not_before() {
        let start = Instant::now();
        let mut registry = Registry::new(Duration::from_secs(10));
        let (mesh, _) = registry.join("aa", address(1), hello("one"), start);
        let (legacy, new) = registry
            .legacy_heartbeat(address(2), Version::V5_0, start)
            .unwrap();
        assert!(new);
        registry.report(mesh, Load::default(), start + Duration::from_secs(5));
        assert!(
            registry
                .prune(start + Duration::from_millis(9_999))
                .is_empty()
        );
        let pruned: Vec<_> = registry
            .prune(start + Duration::from_secs(10))
            .iter()
            .map(|worker| worker.id)
            .collect();
        assert_eq!(pruned, [legacy]);
        assert_eq!(registry.prune(start + Duration::from_secs(15)).len(), 1);
        assert!(registry.is_empty());
    }

    #[test]
    fn a_heartbeat_keeps_a_legacy_worker_alive() {
        let start = Instant::now();
        let mut registry = Registry::new(Duration::from_secs(10));
        for beat in 0..20 {
            let now = start + Duration::from_secs(2 * beat);
            let (_, new) = registry
                .legacy_heartbeat(address(2), Version::V5_0, now)
                .unwrap();
            assert_eq!(new, beat == 0);
            assert!(registry.prune(now).is_empty());
        }
    }

    #[test]
    fn a_node_that_comes_back_replaces_its_old_entry() {
        let start = Instant::now();
        let mut registry = Registry::new(Duration::from_secs(10));
        let (old, none) = registry.join("aa", address(1), hello("one"), start);
        assert_eq!(none, None);
        let (new, replaced) = registry.join("aa", address(9), hello("one"), start);
        assert_eq!(replaced, Some(old));
        assert_ne!(new, old);
        assert_eq!(registry.len(), 1);
    }

    #[test]
    fn a_worker_that_moves_keeps_its_entry() {
        let start = Instant::now();
        let mut registry = Registry::new(Duration::from_secs(10));
        let (id, _) = registry.join("aa", address(1), hello("one"), start);
        assert_eq!(registry.moved(id, address(1)), None);
        assert_eq!(registry.moved(id, address(2)), Some(address(1)));
        assert_eq!(registry.get(id).unwrap().address, address(2));
        // Packets on its link are signs of life, with or without heartbeats.
        registry.seen(id, start + Duration::from_secs(9));
        assert!(registry.prune(start + Duration::from_secs(18)).is_empty());
    }

    #[test]
    fn a_model_is_remembered_for_a_while_after_its_worker_left() {
        let start = Instant::now();
        let mut registry = Registry::new(Duration::from_secs(10));
        let (id, _) = registry.join("aa", address(1), hello("one"), start);
        registry.leave(id, start);
        assert!(registry.knows_model("tiny"));
        assert!(!registry.knows_model("large"));
        registry.prune(start + MODEL_MEMORY);
        assert!(!registry.knows_model("tiny"));
    }

    #[test]
    fn a_batched_speed_is_brought_back_to_one_stream() {
        let start = Instant::now();
        let mut registry = Registry::new(Duration::from_secs(10));
        let (id, _) = registry.join("aa", address(1), hello("one"), start);
        let speeds = vec![ModelSpeed {
            name: "tiny".into(),
            decode_tps: 300.0,
            prefill_tps: f32::NAN,
            queued: None,
        }];
        registry.report(
            id,
            Load {
                running: 4,
                speeds,
                ..Default::default()
            },
            start,
        );
        let model = registry.get(id).unwrap().model("tiny").unwrap();
        assert_eq!(model.decode_tps, 150.0);
        assert_eq!(model.prefill_tps, 0.0);
    }

    #[test]
    fn a_driver_serves_its_ring_until_it_is_withdrawn_and_a_whole_model_stays() {
        let start = Instant::now();
        let mut registry = Registry::new(Duration::from_secs(10));
        let (id, _) = registry.join("aa", address(1), hello("one"), start);
        let card = |name: &str, decode_tps| ModelCard {
            name: name.into(),
            decode_tps,
            ..Default::default()
        };
        registry.serve(id, 7, card("large", 10.0), start);
        registry.serve(id, 7, card("tiny", 10.0), start);
        let worker = registry.get(id).unwrap();
        assert_eq!(worker.model("large").unwrap().ring, Some(7));
        assert_eq!(
            worker.model("tiny").unwrap().ring,
            None,
            "it holds that one whole"
        );
        registry.serve(id, 7, card("large", 12.0), start);
        let worker = registry.of_node("aa").unwrap();
        assert_eq!(
            (
                worker.models.len(),
                worker.model("large").unwrap().decode_tps
            ),
            (2, 12.0)
        );
        registry.withdraw(id, 8, start);
        assert_eq!(registry.get(id).unwrap().models.len(), 2, "another ring");
        registry.withdraw(id, 7, start);
        assert!(registry.get(id).unwrap().model("large").is_none());
        assert!(registry.knows_model("large"), "it was served a moment ago");
    }

    #[test]
    fn forged_heartbeats_do_not_grow_the_registry_without_bound() {
        let start = Instant::now();
        let mut registry = Registry::new(Duration::from_secs(10));
        let accepted = (1..=5000)
            .filter(|port| {
                let at = address(*port);
                registry
                    .legacy_heartbeat(at, Version::V5_1, start)
                    .is_some()
            })
            .count();
        assert_eq!(accepted, LEGACY_WORKERS);
    }
}
