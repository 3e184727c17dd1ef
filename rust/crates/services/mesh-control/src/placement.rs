//! Registry, router and the bounded, fair queue: gives every request a worker, at once or when one has room.

use std::collections::{BTreeMap, HashMap};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::{Duration, Instant};

use super::fair::{FairQueue, Full, Ingress, Source};
use super::registry::{Registry, ServedModel, Worker, WorkerId};
use super::rings::Prospect;
use super::router::{Ask, Capacity, Choice, Estimate, Purpose, Router};
use super::share::Shares;
use super::suspects::Suspects;

/// Names a request within placement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(pub u64);

/// Bounds of placement.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Requests that wait for a worker.
    pub queue: usize,
    /// How long a waiting request outlasts the last worker for it.
    pub rejoin_grace: Duration,
    /// How many requests a worker is given.
    pub capacity: Capacity,
}

/// A request has a worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placed {
    /// The worker.
    pub worker: WorkerId,
    /// Its name.
    pub name: String,
    /// The model that answers; the worker's own choice if none was named.
    pub model: String,
    /// Its name in the head's opinion of it: [`Worker::key`].
    pub key: String,
    /// SHA-256 of its model file; empty for a v5.0.0 worker.
    pub fingerprint: String,
    /// Most tokens that an answer can have; 0 is unknown.
    pub context: u32,
    /// The ring that it answers for.
    pub ring: Option<u64>,
    /// When to expect the answer.
    pub estimate: Estimate,
}

/// A request gets no worker.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Its source has its share of the queue, or more, and the queue is full.
    #[error(
        "all workers are busy and {yours} requests of {} wait already: that is its share of the {limit} places in the queue among \
         {sources} {}; wait for one of them to end, or add workers",
        whose.origin,
        if *sources == 1 { "source" } else { "sources" }
    )]
    QueueFull {
        /// The queue's bound.
        limit: usize,
        /// The source of the request.
        whose: Source,
        /// Requests of that source that wait.
        yours: usize,
        /// Sources that share the queue.
        sources: usize,
    },
    /// The model is known but nobody serves it now, or there is no worker at all.
    #[error(
        "no worker is connected{}; start one, or wait for it to join",
        serving(model)
    )]
    NoWorker {
        /// The model asked for.
        model: String,
    },
    /// Workers offer layers of the model, and together they cannot hold it.
    #[error("the model {model:?} cannot be served now: {reason}")]
    NoRing {
        /// The model asked for.
        model: String,
        /// What is missing.
        reason: String,
    },
    /// Workers serve the model, and would ignore what the request asks for.
    #[error(
        "the workers that serve {model:?} are of an older version and would ignore {}; update them, or leave that out",
        mesh_proto::REVISED_FIELDS
    )]
    TooOld {
        /// The model asked for.
        model: String,
    },
    /// No worker that serves the model has a context for so long a prompt.
    #[error(
        "This model's maximum context length is {context} tokens. However, your prompt has at least {least} tokens, which exceeds the available context size; shorten it"
    )]
    TooLong {
        /// The largest context among them.
        context: u32,
        /// Tokens that the prompt has at least.
        least: u64,
    },
    /// Workers claim to serve the model, and none of them has shown that it does.
    #[error(
        "no worker answers for {model:?} now: {why}; ask again in a moment, and see `hydramesh status`"
    )]
    NoneAnswers {
        /// The model asked for.
        model: String,
        /// Who claims to serve it, and what is the matter with each.
        why: String,
    },
    /// Nobody serves such a model.
    #[error("the model {model:?} does not exist; GET /v1/models lists those that do")]
    UnknownModel {
        /// The model asked for.
        model: String,
    },
}

/// The immediate answer to [`Placement::ask`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Asked {
    /// Go there.
    Placed(Placed),
    /// [`Placement::pump`] will name the ticket.
    Waiting,
    /// No.
    Refused(Refusal),
}

/// How an attempt on a worker ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// The answer came back complete.
    Complete,
    /// The worker failed or died.
    Failed,
    /// The worker had no room after all.
    Busy,
    /// Given up for reasons that are not the worker's.
    Cancelled,
}

/// See the module's page.
#[derive(Debug)]
pub struct Placement {
    /// The workers.
    pub registry: Registry,
    router: Router,
    limits: Limits,
    queue: FairQueue<Waiting>,
    /// Requests that lost their places in the queue, and are to be told.
    displaced: Vec<(Ticket, Refusal)>,
    running: BTreeMap<Ticket, Running>,
    shares: Shares,
    suspects: Suspects,
    /// Models that rings are to serve and do not serve now.
    prospects: BTreeMap<String, Prospect>,
}

#[derive(Debug)]
struct Waiting {
    ticket: Ticket,
    ask: Ask,
    /// Equal for requests that the same workers may take.
    class: u64,
    /// Since when nobody serves it.
    nobody_since: Option<Instant>,
}

#[derive(Debug)]
struct Running {
    worker: WorkerId,
    source: Source,
    /// Its first token came.
    streams: bool,
    /// It has its worker for itself until then.
    alone: bool,
    /// The model that it asked for.
    asked: String,
    /// The model that answers.
    model: String,
    ring: Option<u64>,
    started: Instant,
    /// Prompt tokens that count as not yet prefilled.
    prefilling: u64,
    /// Prompt tokens that were not prefilled on this worker when the request began, its own included; 0 if it had to wait for a slot
    /// or its prompt was in the worker's cache, so that the time to its first token says nothing about speed.
    backlog: u64,
    first_token: Option<Instant>,
    /// Requests on the worker when the first token came.
    batch: u32,
}

/// What was received of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Received {
    /// Tokens after those that came first.
    pub tokens: u32,
    /// When the last of them came.
    pub last: Option<Instant>,
}

impl Placement {
    /// An empty one.
    pub fn new(registry: Registry, limits: Limits) -> Self {
        let router = Router::new(limits.capacity);
        Self {
            // As long as requests wait for a worker to come back, the name waits for its weights.
            registry: registry.with_handover(limits.rejoin_grace),
            router,
            limits,
            queue: FairQueue::new(limits.queue),
            displaced: Vec::new(),
            running: BTreeMap::new(),
            shares: Shares::default(),
            suspects: Suspects::default(),
            prospects: BTreeMap::new(),
        }
    }

    /// Asks for a worker. A `rerun` has waited its turn already: it goes to the front of the queue, past its bound, and
    /// may wait for a worker to join. Any request waits for a ring that is being formed or recovers.
    pub fn ask(&mut self, ticket: Ticket, ask: Ask, rerun: bool, now: Instant) -> Asked {
        if !rerun
            && !self.is_coming(&ask.model)
            && let Some((context, least)) = self.router.too_long(&self.registry, &ask, now)
        {
            return Asked::Refused(Refusal::TooLong { context, least });
        }
        let held = held(&self.running, ask.source, &ask.model);
        let requests = held + self.queue.waiting_of(ask.source) + 1;
        let has_share = rerun || has_share(&self.shares, &self.registry, &ask, held, now);
        let class = class_of(&ask);
        let choice = self.router.choose(&self.registry, &ask, now);
        let is_coming = self.is_coming(&ask.model);
        if choice == Choice::Nobody && !is_coming && !rerun {
            return Asked::Refused(self.nobody(&ask, now));
        }
        // A worker without an identity takes any name, and needs no shares.
        if self.knows_model(&ask.model) {
            self.shares.note(&ask.model, ask.source, requests, now);
        }
        self.suspects.expire(now);
        // Those come first that wait for the same and are due.
        let mut due = Due::new(self);
        let suspect = ask.alone && self.suspects.yield_for(&ask.model);
        let first = |waiting: &Waiting| match suspect {
            true => !waiting.ask.alone && waiting.ask.model == ask.model && due.is(waiting, now),
            false => !rerun && waiting.class == class && due.is(waiting, now),
        };
        let nobody_since = match choice {
            // `pump` gives that room away.
            Choice::Worker(..) if !has_share || self.queue.any(first) => None,
            Choice::Worker(id, estimate) => {
                return Asked::Placed(self.place(ticket, &ask, id, estimate, now));
            }
            Choice::Busy => None,
            Choice::Nobody if is_coming => None,
            Choice::Nobody => Some(now),
        };
        let source = ask.source;
        let waiting = Waiting {
            ticket,
            ask,
            class,
            nobody_since,
        };
        if rerun {
            self.queue.push_again(source, waiting);
            self.keep_workers(now);
            return Asked::Waiting;
        }
        match self.queue.push(source, waiting) {
            Ok(None) => {}
            Ok(Some((victim, lost))) => {
                let full = Full {
                    yours: self.queue.waiting_of(victim),
                    sources: self.queue.sources(),
                };
                let refusal = self.full(victim, full);
                self.displaced.push((lost.ticket, refusal));
            }
            Err(full) => return Asked::Refused(self.full(source, full)),
        }
        Asked::Waiting
    }

    /// Gives free room to those who wait, in turns ([`super::fair`]), and sends away whom nobody has been able to serve for
    /// too long. To be called after every change and now and then.
    pub fn pump(&mut self, now: Instant) -> Vec<(Ticket, Result<Placed, Refusal>)> {
        let displaced = std::mem::take(&mut self.displaced).into_iter();
        let mut decided: Vec<_> = displaced.map(|(t, refusal)| (t, Err(refusal))).collect();
        self.shares.expire(now);
        self.suspects.expire(now);
        if self.queue.is_empty() {
            return decided;
        }
        let mut room: HashMap<u64, Room> = HashMap::new();
        let mut expired = Vec::new();
        {
            let (router, registry) = (&self.router, &self.registry);
            let (prospects, grace) = (&self.prospects, self.limits.rejoin_grace);
            self.queue.retain(|waiting| {
                let of_class = room.entry(waiting.class).or_insert_with(|| {
                    match router.choose(registry, &waiting.ask, now) {
                        Choice::Worker(..) => Room::Perhaps,
                        Choice::Busy => Room::No,
                        Choice::Nobody => match prospects.get(&waiting.ask.model) {
                            Some(Prospect::Coming) => Room::No,
                            _ => Room::Nobody,
                        },
                    }
                });
                if *of_class != Room::Nobody {
                    waiting.nobody_since = None;
                    return true;
                }
                let since = *waiting.nobody_since.get_or_insert(now);
                let keep = now.saturating_duration_since(since) < grace;
                if !keep {
                    expired.push((waiting.ticket, waiting.ask.clone()));
                }
                keep
            });
        }
        for (ticket, ask) in expired {
            decided.push((ticket, Err(self.nobody(&ask, now))));
        }
        // Suspects whose turn is over wait until nobody else can go.
        let mut yielding = true;
        loop {
            let mut found = None;
            let suspects = &self.suspects;
            let (router, registry) = (&self.router, &self.registry);
            let mut due = Due {
                shares: &self.shares,
                registry,
                running: &self.running,
                known: HashMap::new(),
            };
            let taken = self.queue.take_next(|waiting| {
                let ask = &waiting.ask;
                if yielding && ask.alone && suspects.yield_for(&ask.model) {
                    return false;
                }
                if room.get(&waiting.class) != Some(&Room::Perhaps) || !due.is(waiting, now) {
                    return false;
                }
                match router.choose(registry, &waiting.ask, now) {
                    Choice::Worker(id, estimate) => {
                        found = Some((id, estimate));
                        true
                    }
                    Choice::Busy | Choice::Nobody => {
                        room.insert(waiting.class, Room::No);
                        false
                    }
                }
            });
            let (Some((_, waiting)), Some((id, estimate))) = (taken, found) else {
                if std::mem::take(&mut yielding) && self.suspects.are_there() {
                    continue;
                }
                self.keep_workers(now);
                return decided;
            };
            let placed = self.place(waiting.ticket, &waiting.ask, id, estimate, now);
            if waiting.ask.alone {
                // The worker that it kept is everybody's again.
                let full = room.values_mut().filter(|room| **room == Room::No);
                full.for_each(|room| *room = Room::Perhaps);
            }
            decided.push((waiting.ticket, Ok(placed)));
        }
    }

    /// Keeps newcomers away from a worker for each model that a suspect waits for.
    fn keep_workers(&mut self, now: Instant) {
        let (suspects, registry) = (&self.suspects, &self.registry);
        let mut wanted: BTreeMap<String, WorkerId> = BTreeMap::new();
        self.queue.any(|waiting| {
            let model = &waiting.ask.model;
            if waiting.ask.alone
                && suspects.may_keep(model)
                && !wanted.contains_key(model)
                && let Some(worker) = Router::emptiest(registry, &waiting.ask, now)
            {
                wanted.insert(model.clone(), worker);
            }
            false
        });
        for (model, worker) in wanted {
            let until = self.suspects.keeps(&model, worker, now);
            if let Some(worker) = self.registry.get_mut(worker) {
                worker.kept = Some(until);
            }
        }
    }

    /// True if requests are suspected of the deaths of workers, so that any first token may let others go.
    pub fn has_suspects(&self) -> bool {
        self.suspects.are_there()
    }

    /// True if requests lost their places, so that [`Placement::pump`] has something to tell.
    pub fn has_displaced(&self) -> bool {
        !self.displaced.is_empty()
    }

    /// The first token of a request came: its prompt is prefilled, and its worker has proven that it answers.
    pub fn first_token(&mut self, ticket: Ticket, now: Instant) {
        let Some(running) = self.running.get_mut(&ticket) else {
            return;
        };
        let started = !std::mem::replace(&mut running.streams, true);
        if std::mem::take(&mut running.alone) {
            self.suspects.began(&running.asked, ticket, now);
            if let Some(worker) = self.registry.get_mut(running.worker) {
                worker.alone = None;
            }
        }
        running.first_token.get_or_insert(now);
        let prefilled = std::mem::take(&mut running.prefilling);
        let (on, model) = (running.worker, running.model.clone());
        let same = |other: &&Running| other.streams && other.worker == on && other.model == model;
        let streams = self.running.values().filter(same).count();
        let Some(running) = self.running.get_mut(&ticket) else {
            return;
        };
        let Some(worker) = self.registry.get_mut(on) else {
            return;
        };
        running.batch = worker.assigned;
        worker.unstarted = worker.unstarted.saturating_sub(u32::from(started));
        worker.prefilling = worker.prefilling.saturating_sub(prefilled);
        worker.last_success = Some(now);
        if let Some(model) = model_of(worker, &running.model) {
            model.succeeded(now);
            model.streams = model
                .streams
                .max(u32::try_from(streams).unwrap_or(u32::MAX));
            let took = now.saturating_duration_since(running.started);
            if running.backlog >= LEAST_PREFILL {
                model.prefilled(running.backlog, took);
            } else if running.backlog > 0 {
                model.waited(running.backlog, took, now);
            }
        }
        worker.proven = worker.models.iter().all(|model| model.proven);
    }

    /// A request no longer runs on its worker.
    pub fn release(&mut self, ticket: Ticket, ended: Ended, now: Instant) {
        self.release_after(ticket, ended, Received::default(), now);
    }

    /// The same, with what was received of its answer: that is how fast the worker is.
    pub fn release_after(
        &mut self,
        ticket: Ticket,
        ended: Ended,
        received: Received,
        now: Instant,
    ) {
        let Some(running) = self.running.remove(&ticket) else {
            return;
        };
        self.queue.ended(running.source);
        if running.alone {
            self.suspects.began(&running.asked, ticket, now);
            if let Some(worker) = self.registry.get_mut(running.worker) {
                worker.alone = None;
            }
        }
        let same = |other: &&Running| {
            other.streams && other.worker == running.worker && other.model == running.model
        };
        let streams = self.running.values().any(|other| same(&other));
        let Some(worker) = self.registry.get_mut(running.worker) else {
            return;
        };
        let batch = (running.batch.max(1) + worker.assigned.max(1)).div_ceil(2);
        if let Some(model) = model_of(worker, &running.model) {
            if let (Some(first), Some(last)) = (running.first_token, received.last)
                && received.tokens >= LEAST_DECODE
            {
                let took = last.saturating_duration_since(first);
                model.decoded(received.tokens, took, batch.min(model.card.slots.max(1)));
            }
            match ended {
                Ended::Complete => model.succeeded(now),
                // While it answers others, it answers.
                Ended::Failed if !streams => model.failed(now),
                Ended::Failed | Ended::Busy | Ended::Cancelled => {}
            }
        }
        worker.assigned = worker.assigned.saturating_sub(1);
        worker.unstarted = worker.unstarted.saturating_sub(u32::from(!running.streams));
        worker.prefilling = worker.prefilling.saturating_sub(running.prefilling);
        match ended {
            Ended::Complete => {
                worker.completed += 1;
                worker.last_success = Some(now);
                // A v5.0.0 worker has no models of its own.
                worker.proven = worker.models.iter().all(|model| model.proven);
                let took = now.saturating_duration_since(running.started).as_secs_f64();
                let before = if worker.task_seconds > 0.0 {
                    worker.task_seconds
                } else {
                    took
                };
                worker.task_seconds = before + (took - before) * SMOOTHING;
            }
            Ended::Failed => {
                worker.failed += 1;
                worker.proven &= streams;
            }
            Ended::Busy => worker.busy_until = Some(now + BUSY_PAUSE),
            Ended::Cancelled => {}
        }
        if ended == Ended::Complete {
            let key = worker.key();
            self.registry.reputation.answered(&key, &running.model);
        }
    }

    /// An attempt that began at `began` failed, and that was the worker's own fault: it was silent, or sent what it must not send, or
    /// another worker did what it could not. Returns for how long it is left alone.
    pub fn at_fault(
        &mut self,
        key: &str,
        model: &str,
        began: Instant,
        now: Instant,
    ) -> Option<Duration> {
        let reputation = &mut self.registry.reputation;
        reputation.at_fault(key, model, began, now)
    }

    /// Whether another worker than `than` answers requests like this one.
    pub fn another(&self, ask: &Ask, than: WorkerId, now: Instant) -> bool {
        Router::another(&self.registry, ask, than, now)
    }

    /// A request that waits is given up.
    pub fn withdraw(&mut self, ticket: Ticket) {
        self.queue.retain(|waiting| waiting.ticket != ticket);
    }

    /// Removes a worker.
    pub fn leave(&mut self, id: WorkerId, now: Instant) -> Option<Worker> {
        self.router.left(id);
        self.registry.leave(id, now)
    }

    /// Removes silent workers and returns them.
    pub fn prune(&mut self, now: Instant) -> Vec<Worker> {
        let pruned = self.registry.prune(now);
        pruned.iter().for_each(|worker| self.router.left(worker.id));
        pruned
    }

    /// Models that rings are to serve and do not serve now.
    pub fn set_prospects(&mut self, prospects: BTreeMap<String, Prospect>) {
        self.prospects = prospects;
    }

    /// The models of [`Placement::set_prospects`].
    pub fn prospects(&self) -> &BTreeMap<String, Prospect> {
        &self.prospects
    }

    /// Whether a worker serves this model now or did lately, or workers offer its layers.
    pub fn knows_model(&self, name: &str) -> bool {
        self.prospects.contains_key(name) || self.registry.knows_model(name)
    }

    /// Number of requests that run on this ring.
    pub fn running_on(&self, ring: u64) -> usize {
        let on = |running: &&Running| running.ring == Some(ring);
        self.running.values().filter(on).count()
    }

    /// Number of requests that wait for a worker.
    pub fn queued(&self) -> usize {
        self.queue.len()
    }

    /// Requests that came through `ingress`: those that wait, and those that run.
    pub fn of_ingress(&self, ingress: Ingress) -> (usize, usize) {
        self.queue.of_ingress(ingress)
    }

    /// Sources that share the queue.
    pub fn sources(&self) -> usize {
        self.queue.sources()
    }

    /// Number of requests that run on a worker.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    fn place(
        &mut self,
        ticket: Ticket,
        ask: &Ask,
        id: WorkerId,
        estimate: Estimate,
        now: Instant,
    ) -> Placed {
        let cached = self.router.is_cached(ask, id);
        self.router.assigned(&mut self.registry, id, ask);
        let prefilling = u64::from(ask.prompt_tokens);
        let worker = self
            .registry
            .get_mut(id)
            .expect("the router chooses from this registry");
        worker.assigned += 1;
        worker.unstarted += 1;
        worker.prefilling += prefilling;
        let served = worker.model(&ask.model);
        let has_slot = served.is_some_and(|model| worker.active() <= model.card.slots);
        let backlog = match has_slot && !cached {
            true => worker.prefilling,
            false => 0,
        };
        let mut placed = Placed {
            worker: id,
            key: worker.key(),
            context: 0,
            name: worker.name.clone(),
            model: served.map_or_else(|| ask.model.clone(), |model| model.card.name.clone()),
            fingerprint: served
                .map(|model| model.card.fingerprint.clone())
                .unwrap_or_default(),
            ring: served.and_then(|model| model.ring),
            estimate,
        };
        placed.context = self.registry.context_of(&placed.model).unwrap_or(0);
        if ask.alone {
            let (until, kept) = self.suspects.placed(&ask.model, ticket, now);
            if let Some(worker) = self.registry.get_mut(id) {
                worker.alone = Some(until);
            }
            if let Some(kept) = kept.and_then(|kept| self.registry.get_mut(kept)) {
                kept.kept = None;
            }
        }
        self.queue.started(ask.source);
        self.running.insert(
            ticket,
            Running {
                worker: id,
                source: ask.source,
                streams: false,
                alone: ask.alone,
                asked: ask.model.clone(),
                model: placed.model.clone(),
                ring: placed.ring,
                started: now,
                prefilling,
                backlog,
                first_token: None,
                batch: 0,
            },
        );
        placed
    }

    fn full(&self, source: Source, full: Full) -> Refusal {
        Refusal::QueueFull {
            limit: self.limits.queue,
            whose: source,
            yours: full.yours,
            sources: full.sources,
        }
    }

    fn is_coming(&self, model: &str) -> bool {
        self.prospects.get(model) == Some(&Prospect::Coming)
    }

    /// What is the matter with the workers that claim to serve a model; `None` if there is none.
    fn why_none_answers(&self, ask: &Ask, now: Instant) -> Option<String> {
        let mut reasons = Vec::new();
        for worker in self.registry.iter().filter(|worker| !worker.draining) {
            let Some(model) = worker.model(&ask.model) else {
                continue;
            };
            if model.card.kind() != ask.purpose.kind() {
                continue;
            }
            if let Some(why) = self.registry.why_not(worker, model, now) {
                reasons.push(format!("worker `{}`: {why}", worker.name));
            }
        }
        let more = reasons.len().saturating_sub(REASONS);
        reasons.truncate(REASONS);
        if more > 0 {
            reasons.push(format!("and {more} more"));
        }
        (!reasons.is_empty()).then(|| reasons.join("; "))
    }

    fn nobody(&self, ask: &Ask, now: Instant) -> Refusal {
        let model = ask.model.clone();
        let too_old = |worker: &Worker| {
            let meant = match worker.is_legacy() {
                true => ask.legacy,
                false => worker.model(&model).is_some(),
            };
            meant && worker.request_revision < ask.revision
        };
        if self.registry.iter().any(too_old) {
            return Refusal::TooOld { model };
        }
        if let Some(why) = self.why_none_answers(ask, now) {
            return Refusal::NoneAnswers { model, why };
        }
        if let Some(Prospect::Impossible(reason)) = self.prospects.get(&model) {
            let reason = reason.clone();
            return Refusal::NoRing { model, reason };
        }
        let no_mesh_worker = self.registry.iter().all(Worker::is_legacy);
        if no_mesh_worker || model.is_empty() || self.registry.knows_model(&model) {
            Refusal::NoWorker { model }
        } else {
            Refusal::UnknownModel { model }
        }
    }
}

/// Which waiting requests are due, as far as the shares of their sources go.
struct Due<'a> {
    shares: &'a Shares,
    registry: &'a Registry,
    running: &'a BTreeMap<Ticket, Running>,
    /// What was found out, by source and class.
    known: HashMap<(Source, u64), bool>,
}

impl<'a> Due<'a> {
    fn new(of: &'a Placement) -> Self {
        Self {
            shares: &of.shares,
            registry: &of.registry,
            running: &of.running,
            known: HashMap::new(),
        }
    }

    fn is(&mut self, waiting: &Waiting, now: Instant) -> bool {
        let ask = &waiting.ask;
        let (shares, registry, running) = (self.shares, self.registry, self.running);
        *self
            .known
            .entry((ask.source, waiting.class))
            .or_insert_with(|| {
                let held = held(running, ask.source, &ask.model);
                has_share(shares, registry, ask, held, now)
            })
    }
}

/// Requests of `source` that run on `model`.
fn held(running: &BTreeMap<Ticket, Running>, source: Source, model: &str) -> usize {
    let same = |running: &&Running| running.source == source && running.model == model;
    running.values().filter(same).count()
}

/// Whether the source of a request may have one more slot of its model.
fn has_share(shares: &Shares, registry: &Registry, ask: &Ask, held: usize, now: Instant) -> bool {
    // Embeddings have slots for parts, which end soon. What has failed elsewhere has waited its turn.
    if ask.purpose != Purpose::Chat || !ask.avoid.is_empty() {
        return true;
    }
    let slots = Router::slots(registry, ask, now);
    // Of workers without an identity nobody knows how many they have.
    slots == 0 || held < shares.most(&ask.model, ask.source, slots, now)
}

/// Room for a class of requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Room {
    Perhaps,
    No,
    /// Nobody serves it at all.
    Nobody,
}

/// Equal for requests that the same workers may take, which only a failure or the weights of an answer begun tell apart.
fn class_of(ask: &Ask) -> u64 {
    let mut hasher = DefaultHasher::new();
    (&ask.model, ask.purpose, ask.legacy, ask.revision).hash(&mut hasher);
    (&ask.fingerprint, &ask.avoid, ask.alone).hash(&mut hasher);
    hasher.finish()
}

fn model_of<'a>(worker: &'a mut Worker, name: &str) -> Option<&'a mut ServedModel> {
    worker.models.iter_mut().find(|m| m.card.name == name)
}

fn serving(model: &str) -> String {
    if model.is_empty() {
        String::new()
    } else {
        format!(" that serves {model:?}")
    }
}

/// Reasons that a refusal names.
const REASONS: usize = 3;
/// Tokens of a prompt, estimated, whose time says something about prefill speed and not about round trips only.
const LEAST_PREFILL: u64 = 64;
/// Tokens whose time says something about decode speed.
const LEAST_DECODE: u32 = 4;
/// Weight of the newest task in a v5.0.0 worker's smoothed duration.
const SMOOTHING: f64 = 0.25;
/// How long a worker that said busy is left alone.
const BUSY_PAUSE: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use mesh_proto::{Hello, ModelCard};

    use super::super::fair::Origin;
    use super::super::length::Length;
    use super::*;

    const GRACE: Duration = Duration::from_secs(5);

    #[test]
    fn workers_that_would_ignore_fields_are_not_asked_and_named() {
        let mut placement = placement(4);
        let now = Instant::now();
        let hello = |name: &str, request_revision| {
            let card = ModelCard {
                name: "tiny".into(),
                slots: 4,
                ..Default::default()
            };
            Hello {
                node_name: name.into(),
                models: vec![card],
                request_revision,
                ..Default::default()
            }
        };
        let ask = |revision| Ask {
            model: "tiny".into(),
            revision,
            ..Ask::default()
        };
        let address = ([127, 0, 0, 1], 1).into();
        let (old, _) = placement.registry.join("aa", address, hello("old", 0), now);
        placement.registry.prove_all(old, now);
        let asked = placement.ask(Ticket(1), ask(1), false, now);
        let Asked::Refused(refusal @ Refusal::TooOld { .. }) = asked else {
            panic!("{asked:?}");
        };
        assert!(refusal.to_string().contains("min_tokens"), "{refusal}");
        let (new, _) = placement.registry.join("bb", address, hello("new", 1), now);
        placement.registry.prove_all(new, now);
        for ticket in 2..5 {
            match placement.ask(Ticket(ticket), ask(1), false, now) {
                Asked::Placed(placed) => assert_eq!(placed.name, "new"),
                other => panic!("{other:?}"),
            }
        }
    }

    fn placement(queue: usize) -> Placement {
        let capacity = Capacity {
            ahead: 0,
            legacy: 4,
        };
        Placement::new(
            Registry::new(Duration::from_secs(10)),
            Limits {
                queue,
                rejoin_grace: GRACE,
                capacity,
            },
        )
    }

    fn join(placement: &mut Placement, node: &str, slots: u32, now: Instant) -> WorkerId {
        let card = ModelCard {
            name: "m".into(),
            slots,
            ..Default::default()
        };
        let hello = Hello {
            node_name: node.into(),
            models: vec![card],
            ..Default::default()
        };
        let address = ([127, 0, 0, 1], 1).into();
        let (id, _) = placement.registry.join(node, address, hello, now);
        placement.registry.prove_all(id, now);
        id
    }

    fn ask() -> Ask {
        Ask {
            model: "m".into(),
            prompt_tokens: 10,
            answer_tokens: 10,
            ..Default::default()
        }
    }

    #[test]
    fn one_source_with_many_answers_leaves_slots_to_another_that_asks_now_and_then() {
        let now = Instant::now();
        let mut placement = placement(2048);
        join(&mut placement, "a", 8, now);
        let of = |number| Ask {
            source: Source {
                ingress: Ingress::Http,
                origin: Origin::Key(number),
            },
            ..ask()
        };
        let placed = |asked| matches!(asked, Asked::Placed(_));
        assert!(placed(placement.ask(Ticket(0), of(2), false, now)));
        placement.release(Ticket(0), Ended::Complete, now);
        // 80 connections, 16 answers each.
        let greedy = (1..1281).filter(|&t| placed(placement.ask(Ticket(t), of(1), false, now)));
        assert_eq!(greedy.count(), 7);
        assert!(placement.pump(now).is_empty());
        assert!(
            placed(placement.ask(Ticket(9000), of(2), false, now)),
            "at once"
        );
        placement.release(Ticket(9000), Ended::Complete, now);
        assert!(
            placement.pump(now).is_empty(),
            "it stays free for the next one"
        );
        // Nobody else has asked for long: all of it.
        let later = now + Duration::from_secs(60);
        assert_eq!(placement.pump(later).len(), 1);
    }

    #[test]
    fn only_slots_that_can_be_counted_on_are_shared() {
        let now = Instant::now();
        let mut placement = placement(2048);
        // One worker claims more than it was ever seen to use, another one is drained.
        join(&mut placement, "a", 256, now);
        let drained = join(&mut placement, "b", 256, now);
        let worker = placement.registry.get_mut(drained).unwrap();
        (worker.drained, worker.draining) = (true, true);
        let placed = |asked| matches!(asked, Asked::Placed(_));
        assert!(placed(placement.ask(
            Ticket(0),
            from(Ingress::Http, 2),
            false,
            now
        )));
        placement.release(Ticket(0), Ended::Complete, now);
        let greedy = (1..100).filter(|&ticket| {
            placed(placement.ask(Ticket(ticket), from(Ingress::Http, 1), false, now))
        });
        assert_eq!(greedy.count(), 7);
    }

    #[test]
    fn a_source_alone_fills_its_worker_ahead_of_a_free_slot() {
        let now = Instant::now();
        let mut placement = placement(16);
        placement.router = Router::new(Capacity {
            ahead: 1,
            legacy: 4,
        });
        join(&mut placement, "a", 4, now);
        let placed = |asked| matches!(asked, Asked::Placed(_));
        let all = (1..9).filter(|&ticket| placed(placement.ask(Ticket(ticket), ask(), false, now)));
        assert_eq!(all.count(), 5);
    }

    #[test]
    fn names_of_models_that_nobody_serves_are_not_kept() {
        let now = Instant::now();
        let mut placement = placement(4);
        join(&mut placement, "a", 8, now);
        for number in 0..100 {
            let ask = Ask {
                model: format!("no such model {number}"),
                ..ask()
            };
            let asked = placement.ask(Ticket(number), ask, false, now);
            assert!(matches!(
                asked,
                Asked::Refused(Refusal::UnknownModel { .. })
            ));
        }
        assert_eq!(placement.shares.models(), 0);
        placement.ask(Ticket(100), ask(), false, now);
        assert_eq!(placement.shares.models(), 1);
        placement.pump(now + Duration::from_secs(60));
        assert_eq!(placement.shares.models(), 0, "though nobody waits");
    }

    #[test]
    fn a_suspect_is_alone_with_a_worker_until_its_first_token() {
        let now = Instant::now();
        let mut placement = placement(8);
        let only = join(&mut placement, "a", 4, now);
        let suspect = || Ask {
            alone: true,
            ..ask()
        };
        // Another request waits for its first token there.
        assert!(matches!(
            placement.ask(Ticket(1), ask(), false, now),
            Asked::Placed(_)
        ));
        assert_eq!(
            placement.ask(Ticket(2), suspect(), true, now),
            Asked::Waiting
        );
        assert_eq!(
            placement.ask(Ticket(3), suspect(), true, now),
            Asked::Waiting
        );
        // Newcomers do not keep it waiting.
        assert_eq!(placement.ask(Ticket(4), ask(), false, now), Asked::Waiting);
        assert!(placement.pump(now).is_empty());
        let placed = |placement: &mut Placement| -> Vec<u64> {
            let decided = placement.pump(now).into_iter();
            decided
                .map(|(ticket, placed)| placed.map(|_| ticket.0).unwrap())
                .collect()
        };
        placement.first_token(Ticket(1), now);
        assert_eq!(placed(&mut placement), [3], "one of them, alone");
        assert!(placed(&mut placement).is_empty());
        placement.first_token(Ticket(3), now);
        assert_eq!(placed(&mut placement), [4], "now it is the others' turn");
        placement.first_token(Ticket(4), now);
        assert_eq!(placed(&mut placement), [2]);
        // The worker of one that gave up is everybody's again.
        placement.release(Ticket(2), Ended::Cancelled, now);
        assert!(matches!(
            placement.ask(Ticket(5), ask(), false, now),
            Asked::Placed(_)
        ));
        let worker = placement.registry.get(only).unwrap();
        assert_eq!(
            (worker.unstarted, worker.alone, worker.assigned),
            (1, None, 4)
        );
    }

    #[test]
    fn suspects_keep_others_from_one_worker_only_and_not_for_long() {
        let now = Instant::now();
        let mut placement = placement(64);
        let suspect = || Ask {
            alone: true,
            ..ask()
        };
        let is_placed = |asked| matches!(asked, Asked::Placed(_));
        let first = join(&mut placement, "a", 32, now);
        // A long prompt is computed there.
        assert!(is_placed(placement.ask(Ticket(1), ask(), false, now)));
        for ticket in 2..11 {
            let asked = placement.ask(Ticket(ticket), suspect(), true, now);
            assert_eq!(asked, Asked::Waiting);
        }
        assert_eq!(placement.ask(Ticket(20), ask(), false, now), Asked::Waiting);
        assert!(placement.pump(now).is_empty());
        // Another worker, where a prompt is computed, too, is for everybody else.
        let second = join(&mut placement, "b", 32, now);
        let decided = placement.pump(now);
        assert_eq!(decided.len(), 2, "a suspect is alone with it: {decided:?}");
        assert!(decided.iter().any(|(ticket, _)| *ticket == Ticket(20)));
        let of = |wanted: u64| {
            let found = decided.iter().find(|(ticket, _)| ticket.0 == wanted);
            found.map(|(_, placed)| placed.as_ref().unwrap().worker)
        };
        assert_eq!((of(10), of(20)), (Some(second), Some(first)));
    }

    #[test]
    fn nine_suspects_on_one_worker_do_not_stop_its_model() {
        let start = Instant::now();
        let mut placement = placement(64);
        let suspect = || Ask {
            alone: true,
            ..ask()
        };
        join(&mut placement, "a", 8, start);
        placement.ask(Ticket(1), ask(), false, start);
        for ticket in 2..11 {
            placement.ask(Ticket(ticket), suspect(), true, start);
        }
        // Each prompt takes 20 s, and somebody else asks every second.
        let mut begun: BTreeMap<Ticket, Instant> = BTreeMap::from([(Ticket(1), start)]);
        let (mut longest, mut waits) = (Duration::ZERO, BTreeMap::new());
        for second in 0..600 {
            let now = start + Duration::from_secs(second);
            let done: Vec<Ticket> = begun
                .iter()
                .filter(|(_, at)| now.saturating_duration_since(**at).as_secs() >= 20)
                .map(|(ticket, _)| *ticket)
                .collect();
            for ticket in done {
                begun.remove(&ticket);
                placement.first_token(ticket, now);
                placement.release(ticket, Ended::Complete, now);
            }
            if second % 5 == 0 && second < 300 {
                let ticket = Ticket(1000 + second);
                match placement.ask(ticket, ask(), false, now) {
                    Asked::Placed(_) => drop(begun.insert(ticket, now)),
                    _ => drop(waits.insert(ticket, now)),
                }
            }
            for (ticket, placed) in placement.pump(now) {
                placed.unwrap();
                begun.insert(ticket, now);
                if let Some(since) = waits.remove(&ticket) {
                    longest = longest.max(now - since);
                }
            }
        }
        assert!(longest <= Duration::from_secs(20), "{longest:?}");
        assert_eq!(placement.queued(), 0, "all had their turn");
        assert!(!placement.has_suspects());
    }

    #[test]
    fn a_prompt_that_is_too_long_for_all_is_refused_before_anybody_gets_it() {
        let now = Instant::now();
        let mut placement = placement(8);
        let card = ModelCard {
            name: "m".into(),
            slots: 4,
            context: 8192,
            byte_spans: vec![16; 256],
            keeps_text: true,
            ..Default::default()
        };
        let hello = |card: &ModelCard| Hello {
            models: vec![card.clone()],
            ..Default::default()
        };
        let address = ([127, 0, 0, 1], 1).into();
        placement.registry.join("a", address, hello(&card), now);
        let long = Ask {
            length: Length::of(&mesh_proto::Prompt::Text("1".repeat(8 << 20))),
            ..ask()
        };
        let refused = Refusal::TooLong {
            context: 8192,
            least: (8 << 20) / 16,
        };
        assert_eq!(
            placement.ask(Ticket(1), long.clone(), false, now),
            Asked::Refused(refused)
        );
        // A worker that cannot tell how long it is may serve it.
        let unknown = ModelCard {
            byte_spans: Vec::new(),
            ..card
        };
        let (b, _) = placement.registry.join("b", address, hello(&unknown), now);
        placement.registry.prove_all(b, now);
        assert!(matches!(
            placement.ask(Ticket(2), long, false, now),
            Asked::Placed(_)
        ));
    }

    #[test]
    fn without_a_worker_a_request_is_refused_and_an_unknown_model_is_named() {
        let now = Instant::now();
        let mut placement = placement(4);
        assert!(matches!(
            placement.ask(Ticket(1), ask(), false, now),
            Asked::Refused(Refusal::NoWorker { .. })
        ));
        join(&mut placement, "w", 1, now);
        let unknown = Ask {
            model: "gpt-9".into(),
            ..ask()
        };
        let refused = placement.ask(Ticket(2), unknown, false, now);
        assert_eq!(
            refused,
            Asked::Refused(Refusal::UnknownModel {
                model: "gpt-9".into()
            })
        );
    }

    #[test]
    fn the_queue_is_first_come_first_served_and_bounded() {
        let now = Instant::now();
        let mut placement = placement(2);
        join(&mut placement, "w", 1, now);
        assert!(matches!(
            placement.ask(Ticket(1), ask(), false, now),
            Asked::Placed(_)
        ));
        assert_eq!(placement.ask(Ticket(2), ask(), false, now), Asked::Waiting);
        assert_eq!(placement.ask(Ticket(3), ask(), false, now), Asked::Waiting);
        let Asked::Refused(refusal) = placement.ask(Ticket(4), ask(), false, now) else {
            panic!("it waits");
        };
        assert_eq!(
            refusal.to_string(),
            "all workers are busy and 2 requests of this source wait already: that is its share of the 2 places in the queue among \
             1 source; wait for one of them to end, or add workers"
        );
        assert!(placement.pump(now).is_empty());
        placement.release(Ticket(1), Ended::Complete, now);
        let decided = placement.pump(now);
        assert_eq!(decided.len(), 1);
        assert_eq!(decided[0].0, Ticket(2));
    }

    #[test]
    fn a_rerun_goes_before_those_who_wait() {
        let now = Instant::now();
        let mut placement = placement(1);
        let worker = join(&mut placement, "w", 1, now);
        placement.ask(Ticket(1), ask(), false, now);
        placement.ask(Ticket(2), ask(), false, now);
        assert_eq!(placement.ask(Ticket(3), ask(), true, now), Asked::Waiting);
        placement.release(Ticket(1), Ended::Failed, now);
        assert!(
            placement.pump(now).is_empty(),
            "it has to prove itself first"
        );
        placement.registry.prove_all(worker, now);
        assert_eq!(placement.pump(now)[0].0, Ticket(3));
    }

    #[test]
    fn a_rerun_outlasts_the_grace_when_a_worker_rejoins_and_fails_when_none_does() {
        let start = Instant::now();
        let mut placement = placement(1);
        placement
            .registry
            .report(WorkerId(1), Default::default(), start);
        assert_eq!(placement.ask(Ticket(1), ask(), true, start), Asked::Waiting);
        assert!(placement.pump(start + GRACE / 2).is_empty());
        let decided = placement.pump(start + GRACE);
        assert!(matches!(
            decided[..],
            [(Ticket(1), Err(Refusal::NoWorker { .. }))]
        ));

        assert_eq!(placement.ask(Ticket(2), ask(), true, start), Asked::Waiting);
        join(&mut placement, "w", 1, start);
        assert!(matches!(
            placement.pump(start + GRACE)[..],
            [(Ticket(2), Ok(_))]
        ));
    }

    #[test]
    fn waiting_requests_whose_workers_all_left_get_the_grace_too() {
        let start = Instant::now();
        let mut placement = placement(4);
        let worker = join(&mut placement, "w", 1, start);
        placement.ask(Ticket(1), ask(), false, start);
        placement.ask(Ticket(2), ask(), false, start);
        placement.leave(worker, start);
        placement.release(Ticket(1), Ended::Failed, start);
        assert!(placement.pump(start).is_empty());
        assert_eq!(placement.pump(start + GRACE).len(), 1);
        assert_eq!(placement.queued(), 0);
    }

    #[test]
    fn requests_wait_for_a_ring_that_is_being_formed_and_hear_why_there_is_none() {
        let start = Instant::now();
        let mut placement = placement(2);
        let prospect = |prospect| BTreeMap::from([("m".to_owned(), prospect)]);
        placement.set_prospects(prospect(Prospect::Coming));
        assert_eq!(
            placement.ask(Ticket(1), ask(), false, start),
            Asked::Waiting
        );
        assert_eq!(placement.ask(Ticket(2), ask(), true, start), Asked::Waiting);
        assert!(matches!(
            placement.ask(Ticket(3), ask(), false, start),
            Asked::Refused(Refusal::QueueFull { limit: 2, .. })
        ));
        assert!(
            placement.pump(start + 10 * GRACE).is_empty(),
            "only their own deadlines end the wait"
        );
        placement.set_prospects(prospect(Prospect::Impossible("a node is missing".into())));
        let late = start + 10 * GRACE;
        assert!(
            placement.pump(late).is_empty(),
            "from now on the grace counts"
        );
        let decided = placement.pump(late + GRACE);
        assert_eq!(decided.len(), 2);
        let refused = |refusal: &Refusal| refusal.to_string().contains("a node is missing");
        assert!(
            decided
                .iter()
                .all(|(_, decided)| decided.as_ref().is_err_and(refused))
        );
        assert!(matches!(
            placement.ask(Ticket(4), ask(), false, late),
            Asked::Refused(Refusal::NoRing { .. })
        ));
    }

    #[test]
    fn the_driver_of_a_ring_is_asked_until_the_ring_has_moved() {
        let now = Instant::now();
        let mut placement = placement(4);
        let worker = join(&mut placement, "w", 1, now);
        placement.registry.get_mut(worker).unwrap().models.clear();
        let card = ModelCard {
            name: "m".into(),
            slots: 4,
            ..Default::default()
        };
        placement.registry.serve(worker, 7, card, now);
        placement.registry.prove_all(worker, now);
        placement.registry.get_mut(worker).unwrap().draining = true;
        let Asked::Placed(placed) = placement.ask(Ticket(1), ask(), false, now) else {
            panic!("refused");
        };
        assert_eq!(
            (
                placed.ring,
                placement.running_on(7),
                placement.running_on(8)
            ),
            (Some(7), 1, 0)
        );
        placement.registry.withdraw(worker, 7, now);
        assert!(matches!(
            placement.ask(Ticket(2), ask(), false, now),
            Asked::Refused(_)
        ));
        placement.release(Ticket(1), Ended::Complete, now);
        assert_eq!(placement.running_on(7), 0);
    }

    #[test]
    fn counts_return_to_zero_whatever_the_end() {
        let now = Instant::now();
        let mut placement = placement(4);
        let worker = join(&mut placement, "w", 8, now);
        for (index, ended) in [
            Ended::Complete,
            Ended::Failed,
            Ended::Busy,
            Ended::Cancelled,
        ]
        .into_iter()
        .enumerate()
        {
            let later = now + Duration::from_secs(index as u64);
            assert!(matches!(
                placement.ask(Ticket(index as u64), ask(), false, later),
                Asked::Placed(_)
            ));
            if index % 2 == 0 {
                placement.first_token(Ticket(index as u64), later);
            }
            placement.release(Ticket(index as u64), ended, later);
            placement.release(Ticket(index as u64), ended, later);
            placement.registry.prove_all(worker, later);
        }
        let worker = placement.registry.get(worker).unwrap();
        assert_eq!((worker.assigned, worker.prefilling), (0, 0));
        assert_eq!((worker.completed, worker.failed), (1, 1));
        assert_eq!(placement.running(), 0);
    }

    #[test]
    fn a_worker_that_said_busy_is_left_alone_for_a_moment() {
        let now = Instant::now();
        let mut placement = placement(4);
        join(&mut placement, "w", 8, now);
        placement.ask(Ticket(1), ask(), false, now);
        placement.release(Ticket(1), Ended::Busy, now);
        assert_eq!(placement.ask(Ticket(2), ask(), false, now), Asked::Waiting);
        assert_eq!(placement.pump(now + BUSY_PAUSE).len(), 1);
    }

    fn unproven(placement: &mut Placement, node: &str, now: Instant) -> WorkerId {
        let card = ModelCard {
            name: "m".into(),
            slots: 4,
            decode_tps: 1e6,
            ..Default::default()
        };
        let hello = Hello {
            node_name: node.into(),
            models: vec![card],
            ..Default::default()
        };
        let address = ([127, 0, 0, 1], 1).into();
        placement.registry.join(node, address, hello, now).0
    }

    #[test]
    fn requests_wait_for_a_newcomers_first_answer_and_not_for_one_that_gives_none() {
        let start = Instant::now();
        let mut placement = placement(4);
        let mute = unproven(&mut placement, "mute", start);
        assert_eq!(
            placement.ask(Ticket(1), ask(), false, start),
            Asked::Waiting
        );
        assert!(placement.pump(start).is_empty());
        let [proof] = &placement
            .registry
            .proofs_due(mute, &Default::default(), 1, start)[..]
        else {
            panic!("it is not asked");
        };
        let late = start + Duration::from_secs(30);
        placement.registry.proved(mute, proof, None, start, 2, late);
        let asked = placement.ask(Ticket(2), ask(), false, late);
        let Asked::Refused(refusal @ Refusal::NoneAnswers { .. }) = asked else {
            panic!("{asked:?}");
        };
        assert!(
            refusal.to_string().contains("`mute`: it does not answer"),
            "{refusal}"
        );
        // Whoever answers gets everything, whatever the other claims.
        let good = join(&mut placement, "good", 8, late);
        let decided = placement.pump(late);
        assert!(matches!(&decided[..], [(Ticket(1), Ok(placed))] if placed.worker == good));
        for ticket in 3..8 {
            match placement.ask(Ticket(ticket), ask(), false, late) {
                Asked::Placed(placed) => assert_eq!(placed.worker, good),
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn one_that_does_not_answer_is_asked_less_and_less_often() {
        let start = Instant::now();
        let mut placement = placement(4);
        let mute = unproven(&mut placement, "mute", start);
        let mut asked = Vec::new();
        for second in 0..300 {
            let now = start + Duration::from_secs(second);
            let due = placement
                .registry
                .proofs_due(mute, &Default::default(), second, now);
            for proof in due {
                asked.push(second);
                placement
                    .registry
                    .proved(mute, &proof, None, now, second, now);
            }
        }
        assert_eq!(asked[..6], [0, 1, 3, 7, 15, 31]);
        assert!(asked.len() <= 15, "{asked:?}");
    }

    #[test]
    fn slots_are_believed_as_they_are_seen_in_use() {
        let now = Instant::now();
        let mut placement = placement(400);
        let id = join(&mut placement, "w", u32::MAX, now);
        let placed = |placement: &Placement| placement.registry.get(id).unwrap().assigned;
        for ticket in 0..300 {
            placement.ask(Ticket(ticket), ask(), false, now);
        }
        assert_eq!(placed(&placement), 8, "as many as anybody might have");
        for expected in [16, 32, 64, 128, 256, 256] {
            for ticket in 0..u64::from(placed(&placement)) {
                placement.first_token(Ticket(ticket), now);
            }
            placement.pump(now);
            assert_eq!(placed(&placement), expected);
        }
    }

    #[test]
    fn speed_is_what_came_in_what_time() {
        let start = Instant::now();
        let mut placement = placement(4);
        let id = join(&mut placement, "w", 4, start);
        let long = Ask {
            prompt_tokens: 400,
            ..ask()
        };
        placement.ask(Ticket(1), long, false, start);
        let first = start + Duration::from_secs(2);
        placement.first_token(Ticket(1), first);
        let received = Received {
            tokens: 50,
            last: Some(first + Duration::from_secs(5)),
        };
        let end = first + Duration::from_secs(60);
        placement.release_after(Ticket(1), Ended::Complete, received, end);
        let model = &placement.registry.get(id).unwrap().models[0];
        assert!((model.decode_tps - 10.0).abs() < 0.01, "{model:?}");
        assert!((model.prefill_tps - 200.0).abs() < 0.01, "{model:?}");
        // From then on the worker's own word is nothing.
        let speeds = vec![mesh_proto::ModelSpeed {
            name: "m".into(),
            decode_tps: 1e6,
            prefill_tps: 1e6,
            queued: None,
        }];
        let load = mesh_proto::Load {
            speeds,
            ..Default::default()
        };
        placement.registry.report(id, load, end);
        let model = &placement.registry.get(id).unwrap().models[0];
        assert!(model.decode_tps < 11.0 && model.prefill_tps < 201.0);
    }

    fn from(ingress: Ingress, last: u8) -> Ask {
        let origin = Origin::of([10, 0, 0, last].into());
        Ask {
            source: Source { ingress, origin },
            ..ask()
        }
    }

    #[test]
    fn a_flood_of_datagrams_delays_a_chat_by_what_runs_already_and_no_more() {
        let now = Instant::now();
        let mut placement = placement(1024);
        join(&mut placement, "w", 8, now);
        for number in 0..1024 {
            placement.ask(Ticket(number), from(Ingress::Dcf, 1), false, now);
        }
        assert_eq!(placement.of_ingress(Ingress::Dcf), (1016, 8));
        let chat = Ticket(5000);
        assert_eq!(
            placement.ask(chat, from(Ingress::Http, 2), false, now),
            Asked::Waiting
        );
        placement.release(Ticket(0), Ended::Complete, now);
        let decided = placement.pump(now);
        assert!(
            matches!(&decided[..], [(ticket, Ok(_))] if *ticket == chat),
            "{decided:?}"
        );
        assert_eq!(placement.of_ingress(Ingress::Http), (0, 1));
    }

    #[test]
    fn a_newcomer_finds_room_in_a_full_queue_and_the_one_displaced_hears_so() {
        let now = Instant::now();
        let mut placement = placement(3);
        join(&mut placement, "w", 1, now);
        for number in 0..4 {
            placement.ask(Ticket(number), from(Ingress::Dcf, 1), false, now);
        }
        assert!(matches!(
            placement.ask(Ticket(4), from(Ingress::Dcf, 1), false, now),
            Asked::Refused(Refusal::QueueFull { yours: 3, .. })
        ));
        assert_eq!(
            placement.ask(Ticket(5), from(Ingress::Http, 2), false, now),
            Asked::Waiting
        );
        assert!(placement.has_displaced());
        let decided = placement.pump(now);
        let [(Ticket(3), Err(refusal))] = &decided[..] else {
            panic!("{decided:?}");
        };
        assert!(refusal.to_string().contains("10.0.0.1"), "{refusal}");
        assert_eq!(placement.queued(), 3);
    }

    #[test]
    fn a_model_without_room_does_not_hold_up_another() {
        let now = Instant::now();
        let mut placement = placement(10);
        join(&mut placement, "w", 1, now);
        let other = join(&mut placement, "x", 1, now);
        let worker = placement.registry.get_mut(other).unwrap();
        worker.models[0].card.name = "n".into();
        let n = || Ask {
            model: "n".into(),
            ..ask()
        };
        placement.ask(Ticket(1), ask(), false, now);
        placement.ask(Ticket(2), n(), false, now);
        placement.ask(Ticket(3), ask(), false, now);
        placement.ask(Ticket(4), n(), false, now);
        placement.release(Ticket(2), Ended::Complete, now);
        assert_eq!(placement.pump(now)[0].0, Ticket(4));
        placement.release(Ticket(1), Ended::Complete, now);
        assert_eq!(placement.pump(now)[0].0, Ticket(3));
    }

    #[test]
    fn the_first_token_is_a_proof_and_one_failure_beside_a_stream_is_no_disproof() {
        let now = Instant::now();
        let mut placement = placement(4);
        let id = join(&mut placement, "w", 8, now);
        let answers =
            |placement: &Placement, now| placement.registry.get(id).unwrap().models[0].answers(now);
        placement.ask(Ticket(1), ask(), false, now);
        placement.ask(Ticket(2), ask(), false, now);
        placement.registry.get_mut(id).unwrap().models[0].failed(now);
        assert!(!answers(&placement, now));
        placement.first_token(Ticket(1), now);
        assert!(answers(&placement, now));
        placement.release(Ticket(2), Ended::Failed, now);
        assert!(answers(&placement, now), "the other one streams");
        placement.release(Ticket(1), Ended::Failed, now);
        assert!(!answers(&placement, now));
        // Signs of life prove nothing after a failure, but they do before one.
        let worker = placement.registry.get_mut(id).unwrap();
        worker.gave_sign("m", now);
        assert!(!answers(&placement, now));
        let card = ModelCard {
            name: "m".into(),
            ..Default::default()
        };
        let hello = Hello {
            models: vec![card],
            ..Default::default()
        };
        let address = ([127, 0, 0, 1], 1).into();
        let (fresh, _) = placement.registry.join("x", address, hello, now);
        let worker = placement.registry.get_mut(fresh).unwrap();
        worker.gave_sign("m", now);
        let model = &worker.models[0];
        assert!(model.answers(now) && !model.answers(now + Duration::from_secs(60)));
    }

    #[test]
    fn a_worker_where_requests_wait_for_memory_gets_no_more_of_them() {
        let start = Instant::now();
        let mut placement = placement(4);
        let id = join(&mut placement, "w", 8, start);
        let load = |queued| mesh_proto::Load {
            running: 2,
            queued,
            ..Default::default()
        };
        placement.registry.report(id, load(3), start);
        let later = start + Duration::from_secs(1);
        placement.registry.report(id, load(3), later);
        assert_eq!(
            placement.ask(Ticket(1), ask(), false, later),
            Asked::Waiting
        );
        let busy = |placement: &Placement, now| {
            let worker = placement.registry.get(id).unwrap();
            worker.is_busy(GRACE, GRACE * 2, now)
        };
        assert!(!busy(&placement, later), "no token bears its words out");
        placement.registry.get(id).unwrap().tokens_seen.note(later);
        assert!(busy(&placement, later));
        assert!(!busy(&placement, later + GRACE));
        placement.registry.report(id, load(0), later);
        assert_eq!(placement.pump(later).len(), 1);
    }
}
