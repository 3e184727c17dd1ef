//! The registry of workers.
//!
//! A mesh worker enters with its Hello and leaves when its link closes; a v5.0.0 worker enters with a heartbeat. Either is
//! pruned after [`Registry::timeout`] without a sign of life.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use dcf::Version;
use mesh_proto::{Hello, Load, ModelCard, ModelKind, ModelSpeed};

use super::reputation::Reputation;
use super::speed::Measured;
use super::spotcheck::{Peer, Question, Sample, Schedule, SpotChecks, Standing, Verdict, Weights};

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
    /// Decode speed of a single stream, tokens per second: as measured here, else as the worker claims; 0 is unknown.
    pub decode_tps: f64,
    /// Prefill speed, tokens per second, in the same way.
    pub prefill_tps: f64,
    /// Decode speed as measured here.
    pub decode: Measured,
    /// Prefill speed as measured here, in tokens as the head estimates them.
    pub prefill: Measured,
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
    /// Result of comparing its answers with those of others.
    pub standing: Standing,
    /// Answers that it was seen to stream at the same time.
    pub streams: u32,
    /// Seconds to a first token that its prompt does not explain, smoothed, and when one was last measured.
    delay: (f64, Option<Instant>),
    /// Time since which it is to prove itself: it is new, or failed.
    trial_since: Instant,
    /// Questions of the head that it did not answer, since it last answered one.
    unanswered: u32,
    /// Time before which it is not asked again.
    retry_at: Option<Instant>,
    /// Time since which it declines the head's questions for want of room.
    declines_since: Option<Instant>,
    /// Time of the last token of an answer of this model.
    pub tokens_seen: TokenClock,
}

/// Whether a worker gets requests for a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Service {
    /// It answers.
    Serves,
    /// It is about to be asked for a proof: requests may wait for that.
    Soon,
    /// It gets none.
    Out,
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
        (self.unanswered, self.retry_at, self.declines_since) = (0, None, None);
    }

    /// Time at which a token of an answer of this model last came: also of one that began long ago.
    pub fn last_token(&self) -> Option<Instant> {
        self.last_success.max(self.tokens_seen.last())
    }

    /// It declines a question because it is full or drains. That is no silence, unless nothing came of it in all of `limit`. Says
    /// whether it is excused.
    pub fn declined(&mut self, limit: Duration, now: Instant) -> bool {
        let since = *self.declines_since.get_or_insert(now);
        let since = self.last_token().map_or(since, |token| since.max(token));
        let excused = now.saturating_duration_since(since) < limit;
        if excused {
            self.retry_at = Some(now + RETRY);
        }
        excused
    }

    /// An attempt failed: it is to prove anew that it answers.
    pub fn failed(&mut self, now: Instant) {
        if self.proven {
            self.trial_since = now;
        }
        (self.proven, self.failing) = (false, true);
    }

    /// It is as one that has just joined.
    fn begins_anew(&mut self, now: Instant) {
        (self.proven, self.failing) = (false, false);
        (self.unanswered, self.retry_at, self.declines_since) = (0, None, None);
        self.trial_since = now;
    }

    /// Whether it is to be asked for a proof, unless it is known to answer.
    pub fn may_be_asked(&self, now: Instant) -> bool {
        self.retry_at.is_none_or(|at| now >= at)
    }

    /// So many tokens came in that time, while `batch` requests ran there.
    pub fn decoded(&mut self, tokens: u32, took: Duration, batch: u32) {
        self.decode
            .add(f64::from(tokens), took.div_f64(batch_gain(batch)));
        if let Some(rate) = self.decode.rate() {
            self.decode_tps = rate;
        }
    }

    /// A prompt of so many tokens, estimated, took that time.
    pub fn prefilled(&mut self, tokens: u64, took: Duration) {
        self.prefill.add(tokens as f64, took);
        if let Some(rate) = self.prefill.rate() {
            self.prefill_tps = rate;
        }
    }

    /// A first token came after `took`, of which the prompt explains a part.
    pub fn waited(&mut self, prompt: u64, took: Duration, now: Instant) {
        let explained = match self.prefill_tps > 0.0 {
            true => prompt as f64 / self.prefill_tps,
            false => 0.0,
        };
        let more = (took.as_secs_f64() - explained).max(0.0);
        let before = self.delay.1.map_or(more, |_| self.delay(now));
        self.delay = (before + (more - before) * DELAY_WEIGHT, Some(now));
    }

    /// Seconds to a first token besides those that its prompt takes: a worker may be busy with what this head does not see. What is long
    /// ago counts for less.
    pub fn delay(&self, now: Instant) -> f64 {
        let (delay, at) = self.delay;
        let age = at.map_or(0.0, |at| now.saturating_duration_since(at).as_secs_f64());
        delay * (-age / DELAY_FADES).exp2()
    }

    /// The slots to count on: as many as it claims, and at most twice as many as it was seen to use, or a few at the beginning.
    pub fn slots(&self) -> u32 {
        let claimed = self.card.slots.max(1);
        match self.card.kind() {
            ModelKind::Chat => claimed.min(self.streams.saturating_mul(2).max(FIRST_SLOTS)),
            // An encoder's answers do not stream.
            ModelKind::Embed => claimed,
        }
    }

    /// Its name in spot checks.
    fn subject(&self, node: &str) -> String {
        match self.ring {
            Some(ring) => subject_of_ring(ring),
            None => node.to_owned(),
        }
    }

    fn weights(&self) -> Weights {
        (self.card.name.clone(), self.card.fingerprint.clone())
    }

    /// Speeds that its worker claims. They count until the first measurement.
    fn claims(&mut self, decode: f64, prefill: f64) {
        if decode > 0.0 && self.decode.rate().is_none() {
            self.decode_tps = decode;
        }
        if prefill > 0.0 && self.prefill.rate().is_none() {
            self.prefill_tps = prefill;
        }
    }

    fn new(card: ModelCard, ring: Option<u64>, now: Instant) -> Self {
        Self {
            decode_tps: speed(card.decode_tps),
            prefill_tps: speed(card.prefill_tps),
            card: plausible(card),
            ring,
            decode: Measured::default(),
            prefill: Measured::default(),
            proven: false,
            failing: false,
            last_success: None,
            last_sign: None,
            standing: Standing::New,
            streams: 0,
            delay: (0.0, None),
            trial_since: now,
            unanswered: 0,
            retry_at: None,
            declines_since: None,
            tokens_seen: TokenClock::new(now),
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
    /// One of those is suspected of the death of another worker and has this one for itself until then.
    pub alone: Option<Instant>,
    /// A suspect waits for it: no newcomers before this moment.
    pub kept: Option<Instant>,
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
    /// Time of the last token from it.
    pub tokens_seen: TokenClock,
}

/// Time of the last token from a worker. Shared with what follows its answers, so that no lock is taken per token.
#[derive(Debug, Clone)]
pub struct TokenClock {
    origin: Instant,
    /// Microseconds since `origin`, plus 1; 0 is never.
    at: Arc<AtomicU64>,
}

impl TokenClock {
    fn new(origin: Instant) -> Self {
        Self {
            origin,
            at: Arc::default(),
        }
    }

    /// A token came.
    pub fn note(&self, now: Instant) {
        let since = now.saturating_duration_since(self.origin).as_micros();
        let since = u64::try_from(since).unwrap_or(u64::MAX - 1);
        self.at.fetch_max(since + 1, Ordering::Relaxed);
    }

    /// When the last one came.
    pub fn last(&self) -> Option<Instant> {
        let since = self.at.load(Ordering::Relaxed).checked_sub(1)?;
        self.origin.checked_add(Duration::from_micros(since))
    }
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
        } else if model.last_token().is_none_or(|at| at < asked) {
            // A real answer meanwhile is a proof, too.
            model.failed(now);
            let wait = RETRY.saturating_mul(1 << model.unanswered.min(16));
            model.unanswered = model.unanswered.saturating_add(1);
            model.retry_at = Some(now + wait.min(LONGEST_RETRY));
        }
        self.proven = self.models.iter().all(|model| model.proven);
    }

    /// The name under which its faults are kept: its node id, or its address if it has none.
    pub fn key(&self) -> String {
        match &self.carrier {
            Carrier::Mesh { node_id } => node_id.clone(),
            Carrier::Legacy { .. } => self.address.to_string(),
        }
    }

    /// True if a token came from it so lately, for whichever request of this head.
    pub fn made_a_token(&self, within: Duration, now: Instant) -> bool {
        let last = self.tokens_seen.last();
        last.is_some_and(|at| now.saturating_duration_since(at) < within)
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
    /// those. Reports alone are not believed for longer than `proof`: tokens must come from it, whoever they are for.
    pub fn is_busy(&self, within: Duration, proof: Duration, now: Instant) -> bool {
        self.load.queued > 0
            && now.saturating_duration_since(self.load_changed) < within
            && self.made_a_token(proof, now)
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
    /// The weights that a model's name stands for, and when a worker last served those.
    names: BTreeMap<String, (String, Instant)>,
    /// The models of requests that name none, by kind: once chosen they stay while they are served.
    defaults: BTreeMap<i32, String>,
    /// What is thought of nodes.
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

/// A proof that a worker is to give.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proof {
    /// Model.
    pub model: String,
    /// The ring that it drives.
    pub ring: Option<u64>,
    /// What the model makes.
    pub kind: ModelKind,
    /// Length of its vectors.
    pub dimensions: u32,
    /// What is asked.
    pub question: Question,
}

/// A node was found out, or is suspected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Finding {
    /// It is in quarantine for so long.
    Quarantined {
        /// Node id; the driver's if it is a ring.
        node: String,
        /// Its name.
        name: String,
        /// The ring that is given up.
        ring: Option<u64>,
        /// How long.
        length: Duration,
        /// How it was found out.
        reason: String,
    },
    /// Two differ and nobody can say who is right.
    Disputed {
        /// Both of them, and which one is held back.
        text: String,
    },
    /// The one that was held back agrees now.
    Settled {
        /// Its name.
        name: String,
    },
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

    /// How long requests wait for a worker that is to prove itself, and how often one that serves is checked.
    #[must_use]
    pub fn with_proofs(self, trial: Duration, check_interval: Duration) -> Self {
        Self {
            trial,
            check_interval,
            ..self
        }
    }

    /// How long a name whose weights no worker has any more waits for one that has them.
    #[must_use]
    pub fn with_handover(self, handover: Duration) -> Self {
        Self {
            handover: handover.min(NAME_MEMORY),
            ..self
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
            .filter(is_sound)
            .take(MODELS_PER_WORKER)
            .map(|card| ServedModel::new(card, None, now))
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
        self.refresh(id, now);
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

    /// A load report. Speeds in it count until this head has measured them.
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
            model.claims(decode / batch_gain(load.running.max(1)), prefill);
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
        let known = worker
            .models
            .iter_mut()
            .find(|model| model.card.name == card.name);
        match known {
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
            .filter(is_sound)
            .take(MODELS_PER_WORKER)
            .map(|card| {
                let same = |old: &&ServedModel| {
                    old.card.name == card.name && old.card.fingerprint == card.fingerprint
                };
                whole
                    .iter()
                    .find(same)
                    .cloned()
                    .unwrap_or_else(|| ServedModel::new(card, None, now))
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
        self.settle(now);
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

    /// Every model served now, by name, each with the card of the worker that joined first among those that answer, or among all
    /// where none does.
    pub fn models(&self) -> BTreeMap<&str, &ModelCard> {
        let mut models = BTreeMap::new();
        let answers = |model: &&ServedModel| model.proven && model.standing == Standing::Cleared;
        for answering in [true, false] {
            for worker in self.iter() {
                let these = worker.models.iter();
                for model in these.filter(|model| !answering || answers(model)) {
                    models
                        .entry(model.card.name.as_str())
                        .or_insert(&model.card);
                }
            }
        }
        models
    }

    /// Whether this worker gets requests for this model of its own.
    pub fn service(&self, worker: &Worker, model: &ServedModel, now: Instant) -> Service {
        let another = || {
            self.iter().any(|other| {
                let named = other.model(&model.card.name);
                other.id != worker.id
                    && named.is_some_and(|m| {
                        is_available(other, m)
                            && self.has_name(m, now) == Service::Serves
                            && self.can_replace(other, m, now)
                    })
            })
        };
        self.service_beside(worker, model, now, another)
    }

    /// The same for a request that `another` worker takes, too, or none does.
    pub fn service_beside(
        &self,
        worker: &Worker,
        model: &ServedModel,
        now: Instant,
        another: impl FnOnce() -> bool,
    ) -> Service {
        let Some(node) = worker.node_id() else {
            return Service::Out;
        };
        if self.is_out(node, now) || model.standing == Standing::Held {
            return Service::Out;
        }
        let paused = self.paused(node, &model.card.name, now, another);
        paused.unwrap_or_else(|| self.unpaused(model, now))
    }

    /// Whether this worker answers for this model in place of one that is paused.
    pub fn can_replace(&self, worker: &Worker, model: &ServedModel, now: Instant) -> bool {
        let Some(node) = worker.node_id() else {
            return false;
        };
        let paused = self
            .reputation
            .paused_until(node, &model.card.name, now)
            .is_some();
        !paused
            && !self.is_out(node, now)
            && model.standing != Standing::Held
            && match self.unpaused(model, now) {
                Service::Serves => true,
                // A newcomer may never answer; one that did is asked again at once.
                Service::Soon => model.last_success.is_some(),
                Service::Out => false,
            }
    }

    /// What a pause makes of a worker. A long one counts while `another` answers: without one it would keep requests from the only
    /// worker that may answer them.
    fn paused(
        &self,
        key: &str,
        model: &str,
        now: Instant,
        another: impl FnOnce() -> bool,
    ) -> Option<Service> {
        let until = self.reputation.paused_until(key, model, now)?;
        if another() {
            return Some(match until - now <= SHORT_PAUSE {
                true => Service::Soon,
                false => Service::Out,
            });
        }
        let since = self.reputation.paused_since(key, model)?;
        (now.saturating_duration_since(since) < SHORT_PAUSE).then_some(Service::Soon)
    }

    fn unpaused(&self, model: &ServedModel, now: Instant) -> Service {
        let on_trial = now.saturating_duration_since(model.trial_since) < self.trial;
        match (model.proven, model.standing) {
            (true, Standing::Cleared) => Service::Serves,
            (true, _) => Service::Soon,
            (false, _) if model.unanswered == 0 && on_trial => Service::Soon,
            (false, _) => Service::Out,
        }
    }

    /// The same for a worker without an identity, which serves plain tasks.
    pub fn legacy_service(
        &self,
        worker: &Worker,
        now: Instant,
        another: impl FnOnce() -> bool,
    ) -> Service {
        let paused = self.paused(&worker.key(), "", now, another);
        paused.unwrap_or(Service::Serves)
    }

    /// Whether this node is in quarantine. It gets no requests, holds no part of a ring and gives nobody a model.
    pub fn is_out(&self, node_id: &str, now: Instant) -> bool {
        self.reputation.quarantined(node_id, now).is_some()
    }

    /// Why this node is out, in words.
    pub fn why_out(&self, node_id: &str, now: Instant) -> Option<String> {
        let found = self.reputation.quarantined(node_id, now)?;
        let left = (found.until - now).as_secs();
        Some(format!(
            "in quarantine for another {left} s: {}",
            found.reason
        ))
    }

    /// An operator ends a node's quarantine and forgives its faults: it begins anew. Says whether it was in quarantine.
    pub fn readmit(&mut self, node_id: &str, now: Instant) -> bool {
        let was_out = self.is_out(node_id, now);
        self.reputation.readmit(node_id);
        self.checks.forget(node_id);
        self.disputes.remove(node_id);
        let entry = self.workers.values_mut();
        for worker in entry.filter(|worker| worker.node_id() == Some(node_id)) {
            for model in &mut worker.models {
                model.begins_anew(now);
            }
            worker.proven = false;
        }
        self.refresh_all(now);
        was_out
    }

    /// Whether a model's name stands for the weights of this one, or soon does: they differ from those in use, which no worker has now.
    pub fn has_name(&self, model: &ServedModel, now: Instant) -> Service {
        let name = model.card.name.as_str();
        match self.weights_of(name) {
            None => Service::Serves,
            Some(used) if used == model.card.fingerprint => Service::Serves,
            Some(used) if self.holds(name, used, now) => Service::Out,
            Some(_) => Service::Soon,
        }
    }

    /// Whether a worker that may get requests has these weights under this name.
    pub fn holds(&self, name: &str, weights: &str, now: Instant) -> bool {
        self.iter().any(|worker| {
            let mut same = worker
                .models
                .iter()
                .filter(|m| m.card.name == name && m.card.fingerprint == weights);
            same.any(|model| is_available(worker, model))
                && worker.node_id().is_some_and(|node| !self.is_out(node, now))
        })
    }

    /// Why a worker gets no requests for one of its models now, in words.
    pub fn why_not(&self, worker: &Worker, model: &ServedModel, now: Instant) -> Option<String> {
        if self.service(worker, model, now) == Service::Serves {
            return match self.has_name(model, now) {
                Service::Serves => None,
                Service::Soon => Some(
                    "it serves other weights than those in use until a moment ago, and is asked soon"
                        .to_owned(),
                ),
                Service::Out => {
                    Some("it serves other weights than those in use under this name".to_owned())
                }
            };
        }
        let node = worker.node_id().unwrap_or_default();
        if let Some(out) = self.why_out(node, now) {
            return Some(out);
        }
        let paused = self.reputation.paused_until(node, &model.card.name, now);
        Some(match (model.standing, paused) {
            (Standing::Held, _) => "its answers differ from those of other workers".to_owned(),
            (_, Some(until)) => format!(
                "paused for {} s after it failed requests",
                (until - now).as_secs() + 1
            ),
            _ if model.proven => "its answers are being compared".to_owned(),
            _ if model.unanswered > 0 => "it does not answer".to_owned(),
            _ => "it has yet to answer".to_owned(),
        })
    }

    /// The fingerprint of the weights that this name stands for. Other weights under the name get no requests while they are served.
    pub fn weights_of(&self, name: &str) -> Option<&str> {
        self.names.get(name).map(|(weights, _)| weights.as_str())
    }

    /// The largest context of a model that answers, or of any worker where none does: no answer is longer.
    pub fn context_of(&self, name: &str) -> Option<u32> {
        let cards = |answering: bool| {
            let models = self.iter().flat_map(|worker| &worker.models);
            models
                .filter(move |model| {
                    !answering || (model.proven && model.standing == Standing::Cleared)
                })
                .filter(|model| model.card.name == name)
                .map(|model| model.card.context)
                .filter(|context| *context > 0)
                .max()
        };
        cards(true).or_else(|| cards(false))
    }

    /// The model of requests that name none: the first by name, and from then on the same one as long as it is served.
    pub fn default_model(&mut self, kind: ModelKind, now: Instant) -> Option<String> {
        let this = &*self;
        let served = |wanted: Service| {
            let mut names = BTreeSet::new();
            for worker in this.iter() {
                let of_kind = worker.models.iter().filter(|m| m.card.kind() == kind);
                let these = of_kind.filter(|m| this.service(worker, m, now) == wanted);
                names.extend(these.map(|model| model.card.name.as_str()));
            }
            names
        };
        let serving = served(Service::Serves);
        let chosen = self.defaults.get(&(kind as i32)).map(String::as_str);
        if let Some(name) = chosen.filter(|name| serving.contains(name)) {
            return Some(name.to_owned());
        }
        let Some(first) = serving.first() else {
            let soon = served(Service::Soon);
            let chosen = chosen.filter(|name| soon.contains(name));
            return chosen.or(soon.first().copied()).map(str::to_owned);
        };
        let first = (*first).to_owned();
        self.defaults.insert(kind as i32, first.clone());
        Some(first)
    }

    /// The proofs that this worker is to give now. `seed` makes questions that nobody knows in advance.
    /// Models that are `under_way` are being asked.
    pub fn proofs_due(
        &mut self,
        id: WorkerId,
        under_way: &BTreeSet<String>,
        seed: u64,
        now: Instant,
    ) -> Vec<Proof> {
        let Some(worker) = self.workers.get(&id) else {
            return Vec::new();
        };
        let Some(node) = worker.node_id() else {
            return Vec::new();
        };
        if self.is_out(node, now) {
            return Vec::new();
        }
        let idle = worker.active() == 0;
        let due = |model: &&ServedModel| {
            if under_way.contains(&model.card.name) {
                return false;
            }
            let old = |at| now.saturating_duration_since(at) >= self.check_interval;
            let stale = model.last_success.is_none_or(old);
            let subject = model.subject(node);
            let purpose = match model.card.kind() {
                ModelKind::Chat => "chat",
                ModelKind::Embed => "embeddings",
            };
            // One that it is not kept for is shown to answer, and no more.
            let checked =
                worker.is_for(purpose) && self.checks.is_due(&model.weights(), &subject, now);
            let wanted = model.may_be_asked(now)
                && match model.proven {
                    true => checked || (stale && idle),
                    false => true,
                };
            // For a ring the token goes through every stage. Its driver answers until the ring has moved away.
            (!worker.draining || model.ring.is_some()) && wanted
        };
        let due: Vec<(Weights, String, ServedModel)> = worker
            .models
            .iter()
            .filter(due)
            .map(|model| (model.weights(), model.subject(node), model.clone()))
            .collect();
        let proofs = due.into_iter().map(|(weights, subject, model)| Proof {
            ring: model.ring,
            kind: model.card.kind(),
            dimensions: model.card.dimensions,
            question: self.checks.question(&weights, &subject, seed, now),
            model: model.card.name,
        });
        proofs.collect()
    }

    /// A worker answered a question with this, or did not answer what was asked at `asked`.
    pub fn proved(
        &mut self,
        id: WorkerId,
        proof: &Proof,
        sample: Option<Sample>,
        asked: Instant,
        seed: u64,
        now: Instant,
    ) -> Vec<Finding> {
        let Some(worker) = self.workers.get_mut(&id) else {
            return Vec::new();
        };
        worker.probed(&proof.model, sample.is_some(), asked, now);
        let Some(node) = worker.node_id().map(str::to_owned) else {
            return Vec::new();
        };
        let meant = |model: &&ServedModel| model.card.name == proof.model;
        let Some(model) = worker.models.iter().find(meant) else {
            return Vec::new();
        };
        let (weights, subject) = (model.weights(), model.subject(&node));
        let Some(sample) = sample else {
            self.checks.gave_none(&weights, &subject);
            return Vec::new();
        };
        let peers = self.peers(&weights, now);
        let peers: Vec<Peer<'_>> = peers.iter().map(|subject| Peer { subject }).collect();
        let answer = (proof.question.round, sample);
        // Checks cost a hundredth of a slow worker's time at most.
        let took = now.saturating_duration_since(asked);
        let every = self.check_interval.max(took.saturating_mul(100));
        let schedule = Schedule { every, seed };
        let verdicts = self
            .checks
            .answered(&weights, &subject, answer, &peers, schedule, now);
        let findings = verdicts
            .into_iter()
            .filter_map(|verdict| self.found(&weights, verdict, now));
        let findings = findings.collect();
        self.refresh_all(now);
        findings
    }

    /// A worker declines a question because it is full or drains. Says whether that is excused, see [`ServedModel::declined`].
    pub fn declined(&mut self, id: WorkerId, model: &str, now: Instant) -> bool {
        let limit = self.trial;
        let worker = self.workers.get_mut(&id);
        let mut models = worker.into_iter().flat_map(|worker| &mut worker.models);
        let meant = models.find(|served| served.card.name == model);
        meant.is_none_or(|served| served.declined(limit, now))
    }

    /// A client's request shows that this worker answers for the ring that it drives.
    pub fn ring_answered(&mut self, ring: u64, now: Instant) {
        if self.proven_rings.len() >= RINGS && !self.proven_rings.contains_key(&ring) {
            self.proven_rings.pop_first();
        }
        self.proven_rings.insert(ring, now);
    }

    /// Workers that differ from one another with nobody to decide, and models whose name stands for other weights, in words.
    pub fn disagreements(&self, now: Instant) -> Vec<String> {
        let mut texts: Vec<String> = self.disputes.values().cloned().collect();
        for quarantined in self.reputation.view(now) {
            texts.push(format!(
                "worker `{}` is in quarantine for another {:.0} s: {}; find out what it runs, and expel it, or readmit it when it is mended",
                quarantined.name, quarantined.seconds_left, quarantined.reason
            ));
        }
        for worker in self.iter() {
            for model in &worker.models {
                let (name, weights) = (&model.card.name, &model.card.fingerprint);
                let used = self.weights_of(name);
                if let Some(used) = used.filter(|_| weights.is_empty()) {
                    texts.push(format!(
                        "worker `{}` does not say which weights it serves under the name {name:?}, and gets no requests for it while others \
                         serve those in use ({}); update it",
                        worker.name,
                        short(used)
                    ));
                } else if let Some(used) = used.filter(|used| used != weights) {
                    texts.push(format!(
                        "worker `{}` serves other weights under the name {name:?} ({}) than those in use ({}), and gets no requests for \
                         it; give its model another name, or stop the workers with the others",
                        worker.name,
                        short(weights),
                        short(used)
                    ));
                }
            }
        }
        texts
    }

    /// Those that answer with these weights now, the senior ones first.
    fn peers(&self, weights: &Weights, now: Instant) -> Vec<String> {
        let mut peers: Vec<(Option<Instant>, WorkerId, String)> = Vec::new();
        for worker in self.iter() {
            let Some(node) = worker.node_id() else {
                continue;
            };
            if self.is_out(node, now) {
                continue;
            }
            let same = worker.models.iter().filter(|model| {
                model.proven && model.card.name == weights.0 && model.card.fingerprint == weights.1
            });
            for model in same {
                let since = match model.ring {
                    Some(ring) => self.proven_rings.get(&ring).copied(),
                    None => self.reputation.serves_since(node),
                };
                peers.push((since, worker.id, model.subject(node)));
            }
        }
        // Those that never served come last.
        peers.sort_by_key(|(since, id, _)| (since.is_none(), *since, *id));
        peers.into_iter().map(|(_, _, subject)| subject).collect()
    }

    fn found(&mut self, weights: &Weights, verdict: Verdict, now: Instant) -> Option<Finding> {
        let named = |this: &Self, subject: &str| {
            let found = this.iter().find(|worker| {
                let node = worker.node_id().unwrap_or_default();
                worker.models.iter().any(|m| m.subject(node) == *subject)
            });
            let name = found.map(|worker| worker.name.clone());
            (
                found.and_then(Worker::node_id).map(str::to_owned),
                name.unwrap_or_else(|| short(subject).to_owned()),
            )
        };
        match verdict {
            Verdict::Outvoted { subject, by } => {
                let (node, name) = named(self, &subject);
                let others: Vec<String> = by.iter().map(|other| named(self, other).1).collect();
                let reason = format!(
                    "its answers for {:?} differ from those of {}",
                    weights.0,
                    others.join(", ")
                );
                let ring = ring_of_subject(&subject);
                let length = match ring {
                    // Any of its members may be the cause.
                    Some(_) => Duration::ZERO,
                    None => self.reputation.quarantine(&subject, &name, &reason, now),
                };
                self.checks.forget(&subject);
                self.disputes.remove(&subject);
                Some(Finding::Quarantined {
                    node: node.unwrap_or(subject),
                    name,
                    ring,
                    length,
                    reason,
                })
            }
            Verdict::Disputed { senior, junior } => {
                let (one, two) = (named(self, &senior).1, named(self, &junior).1);
                let text = format!(
                    "workers `{one}` and `{two}` give different answers for {:?} though both claim the same weights, and no third one can say \
                     which is right: `{one}`, which serves longer, goes on, and `{two}` gets no requests; add a worker with that model, or \
                     remove the wrong one",
                    weights.0
                );
                if self.disputes.len() < DISPUTES {
                    self.disputes.insert(junior, text.clone());
                }
                Some(Finding::Disputed { text })
            }
            Verdict::Settled { subject } => {
                self.disputes.remove(&subject);
                let (_, name) = named(self, &subject);
                Some(Finding::Settled { name })
            }
        }
    }

    /// The worker answers all questions that it is asked now, as honest ones do.
    #[cfg(test)]
    pub(crate) fn prove_all(&mut self, id: WorkerId, now: Instant) {
        let position = super::spotcheck::Position {
            token: 1,
            logprob: -0.1,
            top: vec![(1, -0.1), (2, -3.0)],
        };
        for proof in self.proofs_due(id, &BTreeSet::new(), 1, now) {
            let sample = match proof.kind {
                ModelKind::Chat => Sample::Text(vec![position.clone(); 4]),
                ModelKind::Embed => Sample::Vector(vec![1.0, 2.0]),
            };
            self.proved(id, &proof, Some(sample), now, 2, now);
        }
    }

    /// Takes over what is thought of the models of one worker.
    fn refresh(&mut self, id: WorkerId, now: Instant) {
        let (checks, reputation) = (&self.checks, &mut self.reputation);
        let Some(worker) = self.workers.get_mut(&id) else {
            return;
        };
        let Some(node) = worker.node_id().map(str::to_owned) else {
            return;
        };
        for model in &mut worker.models {
            let subject = model.subject(&node);
            let known = checks.standing(&model.weights(), &subject, now);
            model.standing = match model.ring {
                // Of a ring that answered before, under whichever driver.
                Some(_) if known == Standing::New && model.proven => Standing::Cleared,
                _ => known,
            };
            if model.proven && model.standing == Standing::Cleared {
                match model.ring {
                    None => reputation.proven(&node, now),
                    Some(ring) => {
                        self.proven_rings.entry(ring).or_insert(now);
                    }
                }
            }
        }
    }

    fn refresh_all(&mut self, now: Instant) {
        let ids: Vec<WorkerId> = self.workers.keys().copied().collect();
        for id in ids {
            self.refresh(id, now);
        }
    }

    /// What changes with time alone.
    fn settle(&mut self, now: Instant) {
        let waits: Vec<WorkerId> = self
            .workers
            .values()
            .filter(|worker| worker.models.iter().any(|m| m.standing == Standing::New))
            .map(|worker| worker.id)
            .collect();
        for id in waits {
            self.refresh(id, now);
        }
        self.settle_names(now);
        let connected = |subject: &String| {
            ring_of_subject(subject).is_some()
                || self.workers.values().any(|w| w.node_id() == Some(subject))
        };
        self.disputes.retain(|subject, _| connected(subject));
    }

    /// Settles which weights names stand for.
    fn settle_names(&mut self, now: Instant) {
        let mut serving = Vec::new();
        for worker in self.workers.values() {
            for model in &worker.models {
                let (name, weights) = (&model.card.name, &model.card.fingerprint);
                // Whoever gets no requests keeps no name from those who would, and weights that nobody names are nobody's.
                if !weights.is_empty()
                    && is_available(worker, model)
                    && self.service(worker, model, now) == Service::Serves
                {
                    serving.push((name.clone(), weights.clone()));
                }
            }
        }
        for (name, weights) in &serving {
            if let Some((used, seen)) = self.names.get_mut(name)
                && used == weights
            {
                *seen = now;
            }
        }
        let over = |(name, (used, seen)): (&String, &(String, Instant))| {
            let memory = match self.holds(name, used, now) {
                true => NAME_MEMORY,
                false => self.handover,
            };
            (now.saturating_duration_since(*seen) >= memory).then(|| name.clone())
        };
        let over: Vec<String> = self.names.iter().filter_map(over).collect();
        for name in over {
            self.names.remove(&name);
        }
        for (name, weights) in serving {
            if self.names.contains_key(&name) || self.names.len() < KNOWN_MODELS {
                self.names.entry(name).or_insert((weights, now));
            }
        }
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
            kept: None,
            prefilling: 0,
            completed: 0,
            failed: 0,
            task_seconds: 0.0,
            last_turn: 0,
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

/// Whether a card can be one of a model. Names go into logs, tables and maps.
fn is_sound(card: &ModelCard) -> bool {
    let fits = |text: &str, limit: usize| text.len() <= limit && !text.contains(char::is_control);
    !card.name.is_empty() && fits(&card.name, NAME_BYTES) && fits(&card.fingerprint, NAME_BYTES)
}

/// A card with numbers that a model can have.
fn plausible(mut card: ModelCard) -> ModelCard {
    card.slots = card.slots.clamp(1, MOST_SLOTS);
    card.context = card.context.min(MOST_CONTEXT);
    card.dimensions = card.dimensions.min(MOST_DIMENSIONS);
    for text in [&mut card.architecture, &mut card.quantization] {
        text.retain(|c| !c.is_control());
        text.truncate(text.floor_char_boundary(NAME_BYTES));
    }
    card
}

/// Whether a worker takes requests for what this model makes. The driver of a ring answers until the ring has moved away from it.
fn is_available(worker: &Worker, model: &ServedModel) -> bool {
    let purpose = match model.card.kind() {
        ModelKind::Chat => "chat",
        ModelKind::Embed => "embeddings",
    };
    (!worker.draining || model.ring.is_some()) && worker.is_for(purpose)
}

fn subject_of_ring(ring: u64) -> String {
    format!("ring {ring:016x}")
}

fn ring_of_subject(subject: &str) -> Option<u64> {
    u64::from_str_radix(subject.strip_prefix("ring ")?, 16).ok()
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
/// Slots that are believed in before they were seen in use.
const FIRST_SLOTS: u32 = 8;
/// Weight of the newest delay of a first token.
const DELAY_WEIGHT: f64 = 0.3;
/// Seconds after which a delay counts half.
const DELAY_FADES: f64 = 60.0;
/// Time to the second question after one that was not answered; doubled with every other one.
const RETRY: Duration = Duration::from_secs(1);
const LONGEST_RETRY: Duration = Duration::from_secs(30);
/// Requests wait for the end of a pause that is no longer.
const SHORT_PAUSE: Duration = Duration::from_secs(5);
/// Time for which a name stands for weights that nobody serves any more.
const NAME_MEMORY: Duration = Duration::from_secs(30);
const NAME_BYTES: usize = 256;
const MOST_SLOTS: u32 = 256;
const MOST_CONTEXT: u32 = 1 << 24;
const MOST_DIMENSIONS: u32 = 1 << 16;
const RINGS: usize = 1024;
const DISPUTES: usize = 64;
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

    fn serving(registry: &mut Registry, node: &str, now: Instant) -> WorkerId {
        let mut hello = hello(node);
        hello.models[0].fingerprint = "f".into();
        registry.join(node, address(1), hello, now).0
    }

    /// The answer of one that gives these tokens.
    fn tokens(first: u32) -> Sample {
        let positions = (first..first + 8).map(|token| super::super::spotcheck::Position {
            token,
            logprob: -0.1,
            top: vec![(token, -0.1), (9999, -4.0)],
        });
        Sample::Text(positions.collect())
    }

    /// Asks whoever is due for so many seconds. Liars give other tokens.
    fn run(
        registry: &mut Registry,
        ids: &[(WorkerId, bool)],
        now: &mut Instant,
        seconds: u64,
    ) -> Vec<Finding> {
        let mut findings = Vec::new();
        for _ in 0..seconds {
            *now += Duration::from_secs(1);
            for (id, honest) in ids {
                registry.seen(*id, *now);
                for proof in registry.proofs_due(*id, &BTreeSet::new(), 7, *now) {
                    let sample = tokens(if *honest { 1 } else { 500 });
                    findings.extend(registry.proved(*id, &proof, Some(sample), *now, 8, *now));
                }
            }
            registry.prune(*now);
        }
        findings
    }

    #[test]
    fn a_liar_never_serves_and_is_in_quarantine_within_30_s_and_comes_back_to_the_same() {
        let mut now = Instant::now();
        let mut registry = Registry::new(Duration::from_secs(10));
        let (a, b) = (
            serving(&mut registry, "a", now),
            serving(&mut registry, "b", now),
        );
        run(&mut registry, &[(a, true), (b, true)], &mut now, 60);
        let liar = serving(&mut registry, "liar", now);
        let service = |registry: &Registry, id, now| {
            let worker = registry.get(id).unwrap();
            registry.service(worker, &worker.models[0], now)
        };
        let mut findings = Vec::new();
        for _ in 0..30 {
            assert_ne!(service(&registry, liar, now), Service::Serves);
            let all = [(a, true), (b, true), (liar, false)];
            findings.extend(run(&mut registry, &all, &mut now, 1));
        }
        let [Finding::Quarantined { node, reason, .. }] = &findings[..] else {
            panic!("{findings:?}");
        };
        assert_eq!(node, "liar");
        assert!(reason.contains("differ from those of a, b"), "{reason}");
        assert_eq!(service(&registry, a, now), Service::Serves);
        assert!(registry.is_out("liar", now));
        assert!(registry.disagreements(now)[0].contains("in quarantine"));
        // Another connection is no other node.
        let again = serving(&mut registry, "liar", now);
        assert_eq!(service(&registry, again, now), Service::Out);
        assert!(
            registry
                .proofs_due(again, &BTreeSet::new(), 9, now)
                .is_empty()
        );
        // When the quarantine ends it has to agree first, as at the beginning.
        let all = [(a, true), (b, true), (again, false)];
        let findings = run(&mut registry, &all, &mut now, 120);
        assert_eq!(findings.len(), 1, "{findings:?}");
        assert!(registry.is_out("liar", now + Duration::from_secs(120)));
    }

    #[test]
    fn an_operator_ends_a_quarantine_and_the_node_proves_itself_anew() {
        let now = Instant::now();
        let mut registry = Registry::new(Duration::from_secs(10));
        let id = serving(&mut registry, "a", now);
        registry.prove_all(id, now);
        let service = |registry: &Registry| {
            let worker = registry.get(id).unwrap();
            registry.service(worker, &worker.models[0], now)
        };
        registry.reputation.quarantine("a", "a", "it lies", now);
        registry.reputation.quarantine("a", "a", "it lies", now);
        assert_eq!(service(&registry), Service::Out);
        assert!(registry.readmit("a", now));
        assert_eq!(service(&registry), Service::Soon);
        registry.prove_all(id, now);
        assert_eq!(service(&registry), Service::Serves);
        let next = registry.reputation.quarantine("a", "a", "it lies", now);
        assert_eq!(next, Duration::from_secs(60), "as the first time");
        assert!(!registry.readmit("b", now));
    }

    #[test]
    fn two_that_differ_are_both_named_and_the_junior_one_waits() {
        let mut now = Instant::now();
        let mut registry = Registry::new(Duration::from_secs(10));
        let senior = serving(&mut registry, "attic", now);
        run(&mut registry, &[(senior, true)], &mut now, 10);
        let junior = serving(&mut registry, "cellar", now);
        let both = [(senior, true), (junior, false)];
        let findings = run(&mut registry, &both, &mut now, 20);
        let [Finding::Disputed { text }] = &findings[..] else {
            panic!("{findings:?}");
        };
        assert!(text.contains("`attic`") && text.contains("`cellar`"));
        assert_eq!(registry.disagreements(now), std::slice::from_ref(text));
        let worker = registry.get(junior).unwrap();
        let model = &worker.models[0];
        assert_eq!(registry.service(worker, model, now), Service::Out);
        assert!(registry.why_not(worker, model, now).is_some());
    }

    #[test]
    fn the_next_driver_of_a_ring_that_answered_needs_no_new_proof() {
        let now = Instant::now();
        let mut registry = Registry::new(Duration::from_secs(10));
        let card = || ModelCard {
            name: "large".into(),
            ..Default::default()
        };
        let bare = |registry: &mut Registry, node: &str| {
            registry.join(node, address(1), Hello::default(), now).0
        };
        let (one, two) = (bare(&mut registry, "a"), bare(&mut registry, "b"));
        let service = |registry: &Registry, id| {
            let worker = registry.get(id).unwrap();
            registry.service(worker, worker.model("large").unwrap(), now)
        };
        registry.serve(one, 7, card(), now);
        assert_eq!(service(&registry, one), Service::Soon);
        registry.prove_all(one, now);
        assert_eq!(service(&registry, one), Service::Serves);
        registry.withdraw(one, 7, now);
        registry.serve(two, 7, card(), now);
        assert_eq!(service(&registry, two), Service::Serves);
        registry.serve(one, 8, card(), now);
        assert_eq!(service(&registry, one), Service::Soon, "another ring");
    }

    #[test]
    fn one_that_declines_questions_is_full_unless_nothing_comes_of_it() {
        let start = Instant::now();
        let mut registry = Registry::new(Duration::from_secs(10));
        let id = serving(&mut registry, "a", start);
        registry.prove_all(id, start);
        let at = |seconds| start + Duration::from_secs(seconds);
        assert!(registry.declined(id, "tiny", at(100)));
        assert!(
            registry
                .proofs_due(id, &BTreeSet::new(), 7, at(100))
                .is_empty(),
            "not at once again"
        );
        assert!(registry.declined(id, "tiny", at(129)));
        let model = &registry.get(id).unwrap().models[0];
        assert!(model.proven);
        // An answer that began long ago goes on.
        model.tokens_seen.note(at(129));
        assert!(registry.declined(id, "tiny", at(155)));
        assert!(
            !registry.declined(id, "tiny", at(160)),
            "it only says that it is full"
        );
    }

    #[test]
    fn a_token_of_a_long_answer_disproves_silence() {
        let start = Instant::now();
        let mut registry = Registry::new(Duration::from_secs(10));
        let id = serving(&mut registry, "a", start);
        registry.prove_all(id, start);
        let at = |seconds| start + Duration::from_secs(seconds);
        let worker = registry.get_mut(id).unwrap();
        worker.models[0].tokens_seen.note(at(110));
        worker.probed("tiny", false, at(100), at(130));
        assert!(worker.models[0].proven);
        worker.probed("tiny", false, at(120), at(150));
        assert!(!worker.models[0].proven);
    }

    #[test]
    fn claims_that_no_model_can_have_are_cut_or_left_out() {
        let now = Instant::now();
        let mut registry = Registry::new(Duration::from_secs(10));
        let card = |name: &str| ModelCard {
            name: name.into(),
            slots: u32::MAX,
            context: u32::MAX,
            dimensions: u32::MAX,
            architecture: "x\u{1b}".repeat(10_000),
            ..Default::default()
        };
        let names = [
            "good".to_owned(),
            String::new(),
            "a\nb".into(),
            "x".repeat(9999),
        ];
        let hello = Hello {
            models: names.iter().map(|name| card(name)).collect(),
            ..Default::default()
        };
        let (id, _) = registry.join("a", address(1), hello, now);
        let models = &registry.get(id).unwrap().models;
        assert_eq!(models.len(), 1);
        let card = &models[0].card;
        assert!(card.slots <= MOST_SLOTS && card.context <= MOST_CONTEXT);
        assert!(card.dimensions <= MOST_DIMENSIONS && card.architecture.len() <= NAME_BYTES);
        assert!(!card.architecture.contains(char::is_control));
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
