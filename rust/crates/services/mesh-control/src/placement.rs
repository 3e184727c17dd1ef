//! Registry, router and the bounded, fair queue: gives every request a worker, at once or when one has room.

mod reasons;
mod refusal;
mod release;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::{Duration, Instant};

use mesh_proto::ModelKind;

use super::fair::{FairQueue, Full, Ingress, Source, Ticket};
use super::registry::{Registry, Worker, WorkerId};
use super::rings::Prospect;
use super::router::{Capacity, Choice, Estimate, Requirements, Router};
use super::share::Shares;
use super::suspects::Suspects;

pub use refusal::Refusal;

/// Limits of placement: the queue, and requests per worker.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Requests that wait for a worker.
    pub queue: usize,
    /// Time for which a waiting request outlasts the last worker for it.
    pub rejoin_grace: Duration,
    /// Number of requests that a worker is given at once.
    pub capacity: Capacity,
}

/// A request has a worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placed {
    /// The worker that gets the request.
    pub worker: WorkerId,
    /// Name of the worker.
    pub name: String,
    /// The model that answers; the worker's own choice if none was named.
    pub model: String,
    /// Its name in the head's opinion of it: [`Worker::key`].
    pub key: String,
    /// SHA-256 of its model file; empty for a worker without an identity.
    pub fingerprint: String,
    /// Most tokens that an answer can have; 0 is unknown.
    pub context: u32,
    /// The ring that it answers for.
    pub ring: Option<u64>,
    /// Expected time of the answer.
    pub estimate: Estimate,
}

/// The immediate answer to [`Placement::ask`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// A worker takes the request.
    Placed(Placed),
    /// [`Placement::pump`] will name the ticket.
    Waiting,
    /// No worker takes it.
    Refused(Refusal),
}

/// Outcome of an attempt on a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AttemptEnd {
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
    /// The known workers.
    pub registry: Registry,
    router: Router,
    limits: Limits,
    queue: FairQueue<Waiting>,
    /// Requests that lost their places in the queue and have yet to be told.
    displaced: Vec<(Ticket, Refusal)>,
    running: BTreeMap<Ticket, RunningRequest>,
    shares: Shares,
    suspects: Suspects,
    /// Models that rings are to serve and do not serve now.
    prospects: BTreeMap<String, Prospect>,
}

#[derive(Debug)]
struct Waiting {
    ticket: Ticket,
    ask: Requirements,
    /// Equal for requests that the same workers may take.
    class: u64,
    /// Start of the time without any worker for it.
    nobody_since: Option<Instant>,
}

#[derive(Debug)]
struct RunningRequest {
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
    /// Prompt tokens that were not prefilled on this worker when the request began, its own included; 0 if it
    /// had to wait for a slot or its prompt was in the worker's cache, so that the time to its first token
    /// says nothing about speed.
    backlog: u64,
    first_token: Option<Instant>,
    /// Requests on the worker when the first token came.
    batch: u32,
}

/// Part of an answer received so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ReceivedTokens {
    /// Tokens after those that came first.
    pub tokens: u32,
    /// Arrival of the last of them.
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

    /// Asks for a worker. A `rerun` has waited its turn already: it goes to the front of the queue, past its
    /// bound, and may wait for a worker to join. Any request waits for a ring that is being formed or
    /// recovers.
    pub fn ask(
        &mut self,
        ticket: Ticket,
        ask: Requirements,
        rerun: bool,
        now: Instant,
    ) -> Decision {
        if !rerun
            && !self.is_coming(&ask.model)
            && let Some((context, least)) = self.router.too_long(&self.registry, &ask, now)
        {
            return Decision::Refused(Refusal::TooLong { context, least });
        }
        let held = held(&self.running, ask.source, &ask.model);
        let requests = held + self.queue.waiting_of(ask.source) + 1;
        let has_share = rerun || has_share(&self.shares, &self.registry, &ask, held, now);
        let class = class_of(&ask);
        let choice = self.router.choose(&self.registry, &ask, now);
        let is_coming = self.is_coming(&ask.model);
        if choice == Choice::Nobody && !is_coming && !rerun {
            return Decision::Refused(self.nobody(&ask, now));
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
                return Decision::Placed(self.place(ticket, &ask, id, estimate, now));
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
            return Decision::Waiting;
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
            Err(full) => return Decision::Refused(self.full(source, full)),
        }
        Decision::Waiting
    }

    /// Gives free room to the waiting requests, in turns ([`super::fair`]), and refuses those that no worker
    /// has been able to serve for too long. To be called after every change and now and then.
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
        let expired = expired.into_iter();
        decided.extend(expired.map(|(ticket, ask)| (ticket, Err(self.nobody(&ask, now)))));
        // Suspects whose turn is over wait until no other request can go.
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
                worker.reserved_until = Some(until);
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

    /// Returns true if another worker than `than` answers requests like this one.
    pub fn another(&self, ask: &Requirements, than: WorkerId, now: Instant) -> bool {
        Router::another(&self.registry, ask, than, now)
    }

    /// A request that waits is given up.
    pub fn withdraw(&mut self, ticket: Ticket) {
        self.queue.retain(|waiting| waiting.ticket != ticket);
    }

    /// Removes a worker, and returns it if it was known.
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

    /// Returns true if a worker serves this model or did recently, or workers offer its layers.
    pub fn knows_model(&self, name: &str) -> bool {
        self.prospects.contains_key(name) || self.registry.knows_model(name)
    }

    /// Number of requests that run on this ring.
    pub fn running_on(&self, ring: u64) -> usize {
        let on = |running: &&RunningRequest| running.ring == Some(ring);
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
        ask: &Requirements,
        id: WorkerId,
        estimate: Estimate,
        now: Instant,
    ) -> Placed {
        let cached = self.router.is_cached(ask, id);
        self.router.assigned(&mut self.registry, id, ask);
        let prefilling = u64::from(ask.prompt_tokens);
        let worker = self.registry.get_mut(id);
        let worker = worker.expect("the router chooses from this registry");
        worker.assigned += 1;
        worker.unstarted += 1;
        worker.prefilling += prefilling;
        let served = worker.model(&ask.model);
        let has_slot = served.is_some_and(|model| worker.active() <= model.card.slots);
        let backlog = match has_slot && !cached {
            true => worker.prefilling,
            false => 0,
        };
        let card = served.map(|model| &model.card);
        let mut placed = Placed {
            worker: id,
            key: worker.key(),
            context: 0,
            name: worker.name.clone(),
            model: card.map_or(&ask.model, |card| &card.name).clone(),
            fingerprint: card.map_or_else(String::new, |card| card.fingerprint.clone()),
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
                kept.reserved_until = None;
            }
        }
        self.queue.started(ask.source);
        let running = RunningRequest {
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
        };
        self.running.insert(ticket, running);
        placed
    }

    fn is_coming(&self, model: &str) -> bool {
        self.prospects.get(model) == Some(&Prospect::Coming)
    }
}

/// Tells which waiting requests may go, given the shares of their sources.
struct Due<'a> {
    shares: &'a Shares,
    registry: &'a Registry,
    running: &'a BTreeMap<Ticket, RunningRequest>,
    /// Results so far, by source and class.
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
        let known = self.known.entry((ask.source, waiting.class));
        *known.or_insert_with(|| {
            let held = held(running, ask.source, &ask.model);
            has_share(shares, registry, ask, held, now)
        })
    }
}

/// Requests of `source` that run on `model`.
fn held(running: &BTreeMap<Ticket, RunningRequest>, source: Source, model: &str) -> usize {
    let same = |running: &&RunningRequest| running.source == source && running.model == model;
    running.values().filter(same).count()
}

/// Returns true if the source of a request may have one more slot of its model.
fn has_share(
    shares: &Shares,
    registry: &Registry,
    ask: &Requirements,
    held: usize,
    now: Instant,
) -> bool {
    // Embeddings have slots for parts, which end soon, and images take turns. What has failed elsewhere has waited its turn.
    if ask.kind != ModelKind::Chat || !ask.avoid.is_empty() {
        return true;
    }
    let slots = Router::slots(registry, ask, now);
    // Workers without an identity do not report how many they have.
    slots == 0 || held < shares.most(&ask.model, ask.source, slots, now)
}

/// Room for a class of requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Room {
    Perhaps,
    No,
    /// No worker serves it.
    Nobody,
}

/// Equal for requests that the same workers may take, which only a failure or the weights of an answer begun
/// tell apart.
fn class_of(ask: &Requirements) -> u64 {
    let mut hasher = DefaultHasher::new();
    (&ask.model, ask.kind, ask.plain, ask.revision).hash(&mut hasher);
    (&ask.fingerprint, &ask.avoid, ask.alone).hash(&mut hasher);
    hasher.finish()
}
