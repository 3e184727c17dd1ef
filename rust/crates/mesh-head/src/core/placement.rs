//! Registry, router and the bounded queue: gives every request a worker, at once or when one has room.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use super::registry::{Registry, Worker, WorkerId};
use super::rings::Prospect;
use super::router::{Ask, Capacity, Choice, Estimate, Router};

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
    /// SHA-256 of its model file; empty for a v5.0.0 worker.
    pub fingerprint: String,
    /// The ring that it answers for.
    pub ring: Option<u64>,
    /// When to expect the answer.
    pub estimate: Estimate,
}

/// A request gets no worker.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Too many wait already.
    #[error("all workers are busy and {limit} requests wait already; try again later")]
    QueueFull {
        /// The queue's bound.
        limit: usize,
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
    waiting: VecDeque<Waiting>,
    running: BTreeMap<Ticket, Running>,
    /// Models that rings are to serve and do not serve now.
    prospects: BTreeMap<String, Prospect>,
}

#[derive(Debug)]
struct Waiting {
    ticket: Ticket,
    ask: Ask,
    /// Since when nobody serves it.
    nobody_since: Option<Instant>,
}

#[derive(Debug)]
struct Running {
    worker: WorkerId,
    model: String,
    ring: Option<u64>,
    started: Instant,
    /// Prompt tokens that count as not yet prefilled.
    prefilling: u64,
}

impl Placement {
    /// An empty one.
    pub fn new(registry: Registry, limits: Limits) -> Self {
        let router = Router::new(limits.capacity);
        Self {
            registry,
            router,
            limits,
            waiting: VecDeque::new(),
            running: BTreeMap::new(),
            prospects: BTreeMap::new(),
        }
    }

    /// Asks for a worker. A `rerun` has waited its turn already: it goes to the front of the queue, past its bound, and
    /// may wait for a worker to join. Any request waits for a ring that is being formed or recovers.
    pub fn ask(&mut self, ticket: Ticket, ask: Ask, rerun: bool, now: Instant) -> Asked {
        let nobody_since = match self.router.choose(&self.registry, &ask, now) {
            Choice::Worker(id, estimate) => {
                return Asked::Placed(self.place(ticket, &ask, id, estimate, now));
            }
            Choice::Busy => None,
            Choice::Nobody if self.is_coming(&ask.model) => None,
            Choice::Nobody if rerun => Some(now),
            Choice::Nobody => return Asked::Refused(self.nobody(&ask)),
        };
        let waiting = Waiting {
            ticket,
            ask,
            nobody_since,
        };
        if rerun {
            self.waiting.push_front(waiting);
        } else if self.waiting.len() >= self.limits.queue {
            return Asked::Refused(Refusal::QueueFull {
                limit: self.limits.queue,
            });
        } else {
            self.waiting.push_back(waiting);
        }
        Asked::Waiting
    }

    /// Gives free room to those who wait, first come first served, and sends away whom nobody has been able to serve for
    /// too long. To be called after every change and now and then.
    pub fn pump(&mut self, now: Instant) -> Vec<(Ticket, Result<Placed, Refusal>)> {
        let mut decided = Vec::new();
        let mut still = VecDeque::with_capacity(self.waiting.len());
        while let Some(mut waiting) = self.waiting.pop_front() {
            match self.router.choose(&self.registry, &waiting.ask, now) {
                Choice::Worker(id, estimate) => {
                    let placed = self.place(waiting.ticket, &waiting.ask, id, estimate, now);
                    decided.push((waiting.ticket, Ok(placed)));
                    continue;
                }
                Choice::Busy => waiting.nobody_since = None,
                Choice::Nobody if self.is_coming(&waiting.ask.model) => {
                    waiting.nobody_since = None;
                }
                Choice::Nobody => {
                    let since = *waiting.nobody_since.get_or_insert(now);
                    if now.saturating_duration_since(since) >= self.limits.rejoin_grace {
                        decided.push((waiting.ticket, Err(self.nobody(&waiting.ask))));
                        continue;
                    }
                }
            }
            still.push_back(waiting);
        }
        self.waiting = still;
        decided
    }

    /// The first token of a request came: its prompt is prefilled.
    pub fn first_token(&mut self, ticket: Ticket) {
        let Some(running) = self.running.get_mut(&ticket) else {
            return;
        };
        let prefilled = std::mem::take(&mut running.prefilling);
        if let Some(worker) = self.registry.get_mut(running.worker) {
            worker.prefilling = worker.prefilling.saturating_sub(prefilled);
        }
    }

    /// A request no longer runs on its worker.
    pub fn release(&mut self, ticket: Ticket, ended: Ended, now: Instant) {
        let Some(running) = self.running.remove(&ticket) else {
            return;
        };
        let Some(worker) = self.registry.get_mut(running.worker) else {
            return;
        };
        if let Some(model) = worker
            .models
            .iter_mut()
            .find(|model| model.card.name == running.model)
        {
            match ended {
                Ended::Complete => {
                    model.proven = true;
                    model.last_success = Some(now);
                }
                Ended::Failed => model.proven = false,
                Ended::Busy | Ended::Cancelled => {}
            }
        }
        worker.assigned = worker.assigned.saturating_sub(1);
        worker.prefilling = worker.prefilling.saturating_sub(running.prefilling);
        match ended {
            Ended::Complete => {
                worker.completed += 1;
                worker.last_success = Some(now);
                worker.proven = true;
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
                worker.proven = false;
            }
            Ended::Busy => worker.busy_until = Some(now + BUSY_PAUSE),
            Ended::Cancelled => {}
        }
    }

    /// A request that waits is given up.
    pub fn withdraw(&mut self, ticket: Ticket) {
        self.waiting.retain(|waiting| waiting.ticket != ticket);
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
        self.waiting.len()
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
        self.router.assigned(&mut self.registry, id, ask);
        let prefilling = u64::from(ask.prompt_tokens);
        let worker = self
            .registry
            .get_mut(id)
            .expect("the router chooses from this registry");
        worker.assigned += 1;
        worker.prefilling += prefilling;
        let served = worker.model(&ask.model);
        let placed = Placed {
            worker: id,
            name: worker.name.clone(),
            model: served.map_or_else(|| ask.model.clone(), |model| model.card.name.clone()),
            fingerprint: served
                .map(|model| model.card.fingerprint.clone())
                .unwrap_or_default(),
            ring: served.and_then(|model| model.ring),
            estimate,
        };
        self.running.insert(
            ticket,
            Running {
                worker: id,
                model: placed.model.clone(),
                ring: placed.ring,
                started: now,
                prefilling,
            },
        );
        placed
    }

    fn is_coming(&self, model: &str) -> bool {
        self.prospects.get(model) == Some(&Prospect::Coming)
    }

    fn nobody(&self, ask: &Ask) -> Refusal {
        let model = ask.model.clone();
        let too_old = |worker: &Worker| {
            !worker.is_legacy()
                && worker.request_revision < ask.revision
                && worker.model(&model).is_some()
        };
        if self.registry.iter().any(too_old) {
            return Refusal::TooOld { model };
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

fn serving(model: &str) -> String {
    if model.is_empty() {
        String::new()
    } else {
        format!(" that serves {model:?}")
    }
}

/// Weight of the newest task in a v5.0.0 worker's smoothed duration.
const SMOOTHING: f64 = 0.25;
/// How long a worker that said busy is left alone.
const BUSY_PAUSE: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use mesh_proto::{Hello, ModelCard};

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
        placement.registry.join("aa", address, hello("old", 0), now);
        let asked = placement.ask(Ticket(1), ask(1), false, now);
        let Asked::Refused(refusal @ Refusal::TooOld { .. }) = asked else {
            panic!("{asked:?}");
        };
        assert!(refusal.to_string().contains("min_tokens"), "{refusal}");
        placement.registry.join("bb", address, hello("new", 1), now);
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
        placement
            .registry
            .join(node, ([127, 0, 0, 1], 1).into(), hello, now)
            .0
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
        assert_eq!(
            placement.ask(Ticket(4), ask(), false, now),
            Asked::Refused(Refusal::QueueFull { limit: 2 })
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
        join(&mut placement, "w", 1, now);
        placement.ask(Ticket(1), ask(), false, now);
        placement.ask(Ticket(2), ask(), false, now);
        assert_eq!(placement.ask(Ticket(3), ask(), true, now), Asked::Waiting);
        placement.release(Ticket(1), Ended::Failed, now);
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
        assert_eq!(
            placement.ask(Ticket(3), ask(), false, start),
            Asked::Refused(Refusal::QueueFull { limit: 2 })
        );
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
                placement.first_token(Ticket(index as u64));
            }
            placement.release(Ticket(index as u64), ended, later);
            placement.release(Ticket(index as u64), ended, later);
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
}
