//! Finds a worker for each request, and holds the queue of requests that wait for one.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use mesh_control::embedding_workers::EmbeddingWorkers;
use mesh_control::fair::{Ingress, Ticket};
use mesh_control::placement::{AttemptEnd, Decision, Placed, ReceivedTokens, Refusal};
use mesh_control::registry::{TokenClock, WorkerId};
use mesh_control::rings::Prospect;
use mesh_control::router::Requirements;
use mesh_proto::{ImageCard, ModelKind};
use tokio::sync::oneshot;

use super::connection::Connection;
use super::rings::RingRole;
use super::state::{Mesh, State};
use crate::locks::lock;
use crate::metrics::set;

impl Mesh {
    /// Finds a worker, and waits for one if all are busy. A `rerun` waits even if no worker serves the model.
    ///
    /// # Errors
    /// [`Refusal`] says why the request gets no worker.
    pub(crate) async fn place(
        self: &Arc<Self>,
        ask: Requirements,
        rerun: bool,
    ) -> Result<Assignment, Refusal> {
        let ingress = ask.source.ingress;
        let placed = self.place_or_wait(ask, rerun).await;
        if let Err(Refusal::QueueFull { .. }) = placed {
            self.metrics.queue_refused(ingress);
        }
        placed
    }

    async fn place_or_wait(
        self: &Arc<Self>,
        ask: Requirements,
        rerun: bool,
    ) -> Result<Assignment, Refusal> {
        let (ticket, receiver) = {
            let mut state = self.lock();
            let ticket = Ticket(state.next_ticket);
            state.next_ticket += 1;
            match state.placement.ask(ticket, ask, rerun, Instant::now()) {
                Decision::Placed(placed) => return Ok(self.assignment(&state, ticket, placed)),
                Decision::Refused(refusal) => return Err(refusal),
                Decision::Waiting => {
                    let (sender, receiver) = oneshot::channel();
                    state.waiting.insert(ticket, sender);
                    if state.placement.has_displaced() {
                        self.pump(&mut state, Instant::now());
                    }
                    (ticket, receiver)
                }
            }
        };
        let mut place = PlaceInQueue {
            mesh: self,
            ticket,
            left: false,
        };
        let decided = receiver.await;
        place.left = true;
        match decided {
            Ok(Ok(placed)) => Ok(self.assignment(&self.lock(), ticket, placed)),
            Ok(Err(refusal)) => Err(refusal),
            Err(_) => Err(Refusal::NoWorker {
                model: String::new(),
            }),
        }
    }

    /// The model of a request that names none.
    pub(crate) fn default_model(&self) -> Option<String> {
        let first = || {
            let placement = &mut self.lock().placement;
            let registry = &mut placement.registry;
            let served = registry.default_model(ModelKind::Chat, Instant::now());
            // A mesh whose only model is a ring that recovers has a model all the same.
            let coming = || {
                let coming = |(_, prospect): &(&String, &Prospect)| **prospect == Prospect::Coming;
                let mut models = placement.prospects().iter().filter(coming);
                models.next().map(|(name, _)| name.clone())
            };
            served.or_else(coming)
        };
        self.config.default_model.clone().or_else(first)
    }

    /// The embedding model of a request that names none.
    pub(crate) fn first_encoder(&self) -> Option<String> {
        let registry = &mut self.lock().placement.registry;
        registry.default_model(ModelKind::Embed, Instant::now())
    }

    /// The model of a request for an image that names none.
    pub(crate) fn first_imager(&self) -> Option<String> {
        let registry = &mut self.lock().placement.registry;
        registry.default_model(ModelKind::Image, Instant::now())
    }

    /// Sizes and defaults of a model that makes images.
    pub(crate) fn image_card(&self, name: &str) -> Option<ImageCard> {
        self.with_registry(|registry| mesh_control::image::card_of(registry, name))
    }

    pub(crate) fn replicas(&self, name: &str) -> EmbeddingWorkers {
        self.with_registry(|registry| EmbeddingWorkers::of(registry, name, Instant::now()))
    }

    /// Returns true if a worker serves this model now or did recently, or workers offer its layers.
    pub(crate) fn knows_model(&self, name: &str) -> bool {
        self.lock().placement.knows_model(name)
    }

    pub(super) fn assignment(
        self: &Arc<Self>,
        state: &State,
        ticket: Ticket,
        placed: Placed,
    ) -> Assignment {
        let worker = state.placement.registry.get(placed.worker);
        let model = worker.and_then(|worker| worker.model(&placed.model));
        self.gauge(state);
        Assignment {
            mesh: self.clone(),
            ticket,
            tokens_seen: worker.map(|worker| worker.tokens_seen.clone()),
            process: state.peers.get(&placed.worker).map_or(0, |p| p.instance),
            plain: worker.is_some_and(|worker| !worker.has_identity()),
            of_model: model.map(|model| model.tokens_seen.clone()),
            connection: state.connection(placed.worker),
            placed,
            ended: AttemptEnd::Cancelled,
            received: Mutex::default(),
        }
    }

    /// Returns true if another worker than this one answers such requests.
    pub(crate) fn another(&self, ask: &Requirements, than: WorkerId) -> bool {
        self.lock().placement.another(ask, than, Instant::now())
    }

    /// The context that a worker claims for a model; 0 if it is not known.
    pub(crate) fn context_on(&self, worker: WorkerId, model: &str) -> u32 {
        self.with_registry(|registry| {
            let served = registry.get(worker).and_then(|worker| worker.model(model));
            served.map_or(0, |model| model.card.context)
        })
    }

    /// True if a worker's reports say that it works and that requests wait there.
    pub(crate) fn is_busy(&self, worker: WorkerId) -> bool {
        let (within, proof) = (self.config.first_token_limit, self.config.request_timeout);
        self.with_registry(|registry| {
            let worker = registry.get(worker);
            worker.is_some_and(|worker| worker.is_busy(within, proof, Instant::now()))
        })
    }

    pub(super) fn pump(&self, state: &mut State, now: Instant) {
        for (ticket, decided) in state.placement.pump(now) {
            let undelivered = match state.waiting.remove(&ticket) {
                Some(sender) => sender.send(decided).is_err(),
                None => true,
            };
            if undelivered {
                state.placement.release(ticket, AttemptEnd::Cancelled, now);
            }
        }
        self.gauge(state);
    }

    pub(super) fn gauge(&self, state: &State) {
        let metrics = &self.metrics;
        set(&metrics.queued, state.placement.queued());
        set(&metrics.running, state.placement.running());
        for ingress in Ingress::ALL {
            let (waiting, running) = state.placement.of_ingress(ingress);
            metrics.ingress(ingress, waiting, running);
        }
        set(&metrics.queue_sources, state.placement.sources());
    }
}

/// A request's place in the queue; leaving early gives it up.
struct PlaceInQueue<'a> {
    mesh: &'a Mesh,
    ticket: Ticket,
    left: bool,
}

impl Drop for PlaceInQueue<'_> {
    fn drop(&mut self) {
        if self.left {
            return;
        }
        let now = Instant::now();
        let mut state = self.mesh.lock();
        state.waiting.remove(&self.ticket);
        state.placement.withdraw(self.ticket);
        // It may have been given a worker in this very moment.
        let cancelled = AttemptEnd::Cancelled;
        state.placement.release(self.ticket, cancelled, now);
        self.mesh.pump(&mut state, now);
    }
}

/// A request's right to a worker; dropping it gives the worker free.
#[derive(Debug)]
pub(crate) struct Assignment {
    mesh: Arc<Mesh>,
    ticket: Ticket,
    /// The worker and the expected time of the answer.
    pub placed: Placed,
    /// Connection to the worker; `None` if it left in the same moment.
    pub connection: Option<Arc<dyn Connection>>,
    /// The worker's process; 0 is unknown.
    pub process: u64,
    /// The worker has no identity: its answer proves nothing about other workers.
    pub plain: bool,
    ended: AttemptEnd,
    received: Mutex<ReceivedTokens>,
    tokens_seen: Option<TokenClock>,
    /// The same for the model alone.
    of_model: Option<TokenClock>,
}

impl Assignment {
    pub(crate) fn first_token(&self) {
        let now = Instant::now();
        let mut state = self.mesh.lock();
        state.placement.first_token(self.ticket, now);
        if state.placement.has_suspects() {
            self.mesh.pump(&mut state, now);
        }
    }

    pub(crate) fn received(&self, tokens: usize, first: bool, now: Instant) {
        for seen in [&self.tokens_seen, &self.of_model].into_iter().flatten() {
            seen.note(now);
        }
        let mut received = lock(&self.received);
        received.last = Some(now);
        if !first {
            let more = u32::try_from(tokens).unwrap_or(u32::MAX);
            received.tokens = received.tokens.saturating_add(more);
        }
    }

    /// All of a request without tokens was computed.
    pub(crate) fn prefilled(&self) {
        if let Some(seen) = &self.tokens_seen {
            seen.note(Instant::now());
        }
        self.first_token();
    }

    /// The model that the worker's faults count for; empty for a worker without an identity, which does not
    /// report its models.
    pub(crate) fn faulted_model(&self) -> &str {
        if self.plain { "" } else { &self.placed.model }
    }

    /// Arrival of the last token from this worker, for any request.
    pub(crate) fn last_token_of_worker(&self) -> Option<Instant> {
        self.tokens_seen.as_ref()?.last()
    }

    /// The worker's role in the ring that it answers for, if that is one.
    pub(crate) fn ring_role(&self) -> Option<RingRole> {
        let ring = self.placed.ring?;
        Some(self.mesh.ring_role(self.placed.worker, ring))
    }

    /// Notes that the worker's engine makes progress.
    pub(crate) fn gave_sign(&self) {
        let model = &self.placed.model;
        self.mesh.with_worker(self.placed.worker, |worker| {
            worker.gave_sign(model, Instant::now());
        });
    }

    /// True if the worker's reports explain that a request gets no token from it: it works, and requests wait
    /// there.
    pub(crate) fn is_busy(&self) -> bool {
        self.mesh.is_busy(self.placed.worker)
    }

    /// Reports the end of the attempt, and frees the worker.
    pub(crate) fn end(mut self, ended: AttemptEnd) {
        self.ended = ended;
    }
}

impl Drop for Assignment {
    fn drop(&mut self) {
        let now = Instant::now();
        let mut state = self.mesh.lock();
        let received = *lock(&self.received);
        let placement = &mut state.placement;
        placement.release_after(self.ticket, self.ended, received, now);
        self.mesh.pump(&mut state, now);
    }
}
