//! What all front ends share: placement and rings behind their lock, the links of workers, and who waits for room.
//!
//! The lock is held for a decision, never across an await. Per token nothing is locked.

mod models;
mod rings;

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use dcf::{ErrorCode, Message};
use mesh_net::quic::Link;
use mesh_proto::{Hello, Load, ModelKind};
use mesh_service::health::Health;
use mesh_service::shutdown::Shutdown;
use tokio::sync::{mpsc, oneshot, watch};

use crate::config::Config;
use crate::core::fair::Ingress;
use crate::core::placement::{Asked, Ended, Placed, Placement, Refusal, Ticket};
use crate::core::registry::{Registry, ServedModel, Worker, WorkerId};
use crate::core::rings::{Arrival, Prospect, Rings};
use crate::core::router::Ask;
use crate::core::tracker::Tracker;
use crate::drains;
use crate::legacy::Exchange;
use crate::metrics::HeadMetrics;
use crate::worker_bus::{BusSender, Sessions};

pub use rings::Standing;

/// The mesh as one head sees it.
#[derive(Debug)]
pub struct Mesh {
    /// As configured.
    pub config: Config,
    /// Counters and histograms.
    pub metrics: HeadMetrics,
    /// What `/ready` says.
    pub health: Health,
    /// Begins when the head is told to stop.
    pub shutdown: Shutdown,
    /// Tasks that v5.0.0 workers have.
    pub exchange: Exchange,
    /// Sends Tasks to v5.0.0 workers.
    pub bus: BusSender,
    /// Keys of sealed heartbeats.
    pub sessions: Sessions,
    /// When the head started.
    pub started: SystemTime,
    state: Mutex<State>,
    /// Told whenever a ring's members or driver changed.
    ring_changes: watch::Sender<()>,
    /// Held while the list of drained workers is written.
    saving: tokio::sync::Mutex<()>,
}

#[derive(Debug)]
struct State {
    placement: Placement,
    rings: Rings,
    tracker: Tracker,
    /// When the gauges of rings were last set.
    gauged: Option<Instant>,
    peers: BTreeMap<WorkerId, Peer>,
    waiting: HashMap<Ticket, oneshot::Sender<Result<Placed, Refusal>>>,
    next_ticket: u64,
}

/// A connected worker.
#[derive(Debug)]
struct Peer {
    link: Link,
    /// Goes out on its control stream.
    orders: mpsc::Sender<Message>,
}

/// Who serves a model.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Replicas {
    /// What it makes; `None` if nobody serves it now.
    pub kind: Option<ModelKind>,
    /// Workers with the same weights that may be asked for embeddings.
    pub workers: usize,
    /// SHA-256 of those weights.
    pub fingerprint: Option<String>,
    /// Length of its vectors.
    pub dimensions: u32,
}

/// How to reach the worker of an [`Assignment`].
#[derive(Debug, Clone)]
pub enum Route {
    /// Over its link.
    Link(Link),
    /// Over UDP, v5.0.0.
    Legacy(SocketAddr),
    /// The worker left in the same moment.
    Gone,
}

impl Mesh {
    /// A mesh without workers.
    pub fn new(
        config: Config,
        metrics: HeadMetrics,
        health: Health,
        shutdown: Shutdown,
        bus: BusSender,
    ) -> Arc<Self> {
        let placement = Placement::new(
            Registry::new(config.worker_timeout),
            config.placement_limits(),
        );
        let mut rings = Rings::new(config.ring_settings(), rings::first_ring());
        rings.stay_drained(drains::load(&config.state_dir), Instant::now());
        let state = State {
            placement,
            rings,
            tracker: Tracker::new(),
            gauged: None,
            peers: BTreeMap::new(),
            waiting: HashMap::new(),
            next_ticket: 0,
        };
        Arc::new(Self {
            config,
            metrics,
            health,
            shutdown,
            exchange: Exchange::default(),
            bus,
            sessions: Sessions::default(),
            started: SystemTime::now(),
            state: Mutex::new(state),
            ring_changes: watch::Sender::new(()),
            saving: tokio::sync::Mutex::default(),
        })
    }

    /// Finds a worker, waiting for one where all are busy. A `rerun` waits even if there is none.
    ///
    /// # Errors
    /// [`Refusal`] says why there is none.
    pub async fn place(self: &Arc<Self>, ask: Ask, rerun: bool) -> Result<Assignment, Refusal> {
        let ingress = ask.source.ingress;
        let placed = self.place_or_wait(ask, rerun).await;
        if let Err(Refusal::QueueFull { .. }) = placed {
            self.metrics.queue_refused(ingress);
        }
        placed
    }

    async fn place_or_wait(self: &Arc<Self>, ask: Ask, rerun: bool) -> Result<Assignment, Refusal> {
        let (ticket, receiver) = {
            let mut state = self.lock();
            let ticket = Ticket(state.next_ticket);
            state.next_ticket += 1;
            match state.placement.ask(ticket, ask, rerun, Instant::now()) {
                Asked::Placed(placed) => return Ok(self.assignment(&state, ticket, placed)),
                Asked::Refused(refusal) => return Err(refusal),
                Asked::Waiting => {
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
    pub fn default_model(&self) -> Option<String> {
        let first = || {
            let state = self.lock();
            let placement = &state.placement;
            let models = placement.registry.models();
            let mut chat = models
                .iter()
                .filter(|(_, card)| card.kind() == ModelKind::Chat);
            let served = chat.next().map(|(name, _)| *name);
            // A mesh whose only model is a ring that recovers has a model all the same.
            let coming = || {
                let coming = |(_, prospect): &(&String, &Prospect)| **prospect == Prospect::Coming;
                let mut models = placement.prospects().iter().filter(coming);
                models.next().map(|(name, _)| name.as_str())
            };
            served.or_else(coming).map(str::to_owned)
        };
        self.config.default_model.clone().or_else(first)
    }

    /// The embedding model of a request that names none.
    pub fn first_encoder(&self) -> Option<String> {
        let state = self.lock();
        let models = state.placement.registry.models();
        let mut encoders = models
            .iter()
            .filter(|(_, card)| card.kind() == ModelKind::Embed);
        encoders.next().map(|(name, _)| (*name).to_owned())
    }

    /// Who serves this model: how many, and which of several weights of that name most of them have.
    pub fn replicas(&self, name: &str) -> Replicas {
        let state = self.lock();
        let mut found = Replicas::default();
        let mut by_weights = BTreeMap::<&str, usize>::new();
        let workers = || state.placement.registry.iter();
        for worker in workers() {
            let served = worker.models.iter().find(|model| model.card.name == name);
            let Some(card) = served.map(|model| &model.card) else {
                continue;
            };
            found.kind.get_or_insert(card.kind());
            if !worker.draining && worker.is_for("embeddings") {
                *by_weights.entry(&card.fingerprint).or_default() += 1;
            }
        }
        let most = by_weights.into_iter().max_by_key(|(_, workers)| *workers);
        if let Some((fingerprint, workers)) = most {
            found.workers = workers;
            found.fingerprint = Some(fingerprint.to_owned());
        }
        let same = |model: &&ServedModel| {
            model.card.name == name
                && found
                    .fingerprint
                    .as_ref()
                    .is_none_or(|f| *f == model.card.fingerprint)
        };
        let card = workers().flat_map(|worker| &worker.models).find(same);
        found.dimensions = card.map_or(0, |model| model.card.dimensions);
        found
    }

    /// Whether a worker serves this model now or did lately, or workers offer its layers.
    pub fn knows_model(&self, name: &str) -> bool {
        self.lock().placement.knows_model(name)
    }

    /// Enters a worker that said Hello on this link.
    pub fn join(&self, link: &Link, hello: Hello, orders: mpsc::Sender<Message>) -> WorkerId {
        let now = Instant::now();
        let mut state = self.lock();
        let whole = hello.models.iter().map(|card| card.name.clone()).collect();
        let (id, replaced) =
            state
                .placement
                .registry
                .join(link.node_id(), link.remote_addr(), hello, now);
        let drained = state.rings.is_asked_to_drain(link.node_id());
        let mut name = String::new();
        if let Some(worker) = state.placement.registry.get_mut(id) {
            (worker.drained, worker.draining) = (drained, drained);
            name.clone_from(&worker.name);
        }
        state.tracker.joined(link.node_id(), &name, link.local_ip());
        let arrival = Arrival {
            name,
            whole,
            head_ip: link.local_ip(),
        };
        state.rings.joined(link.node_id(), arrival, now);
        if let Some(old) = replaced.and_then(|old| state.peers.remove(&old)) {
            old.link
                .close(ErrorCode::CANCELLED, "this node has connected again");
        }
        state.peers.insert(
            id,
            Peer {
                link: link.clone(),
                orders,
            },
        );
        self.turn(&mut state, now);
        id
    }

    /// A worker's link is closed.
    pub fn leave(&self, id: WorkerId) {
        let now = Instant::now();
        let mut state = self.lock();
        state.peers.remove(&id);
        let left = state.placement.leave(id, now);
        if let Some(node) = left.as_ref().and_then(Worker::node_id) {
            state.rings.left(node, "its link is closed", now);
            state.tracker.left(node);
        }
        self.turn(&mut state, now);
    }

    /// A worker reports its load.
    pub fn report(&self, id: WorkerId, load: Load) {
        let now = Instant::now();
        let mut guard = self.lock();
        let state = &mut *guard;
        let draining = load.draining;
        state.placement.registry.report(id, load, now);
        if let Some(node) = state.placement.registry.get(id).and_then(Worker::node_id) {
            state.rings.says_draining(node, draining);
        }
        self.turn(state, now);
    }

    /// A v5.0.0 worker is alive. True means that it is new.
    pub fn legacy_heartbeat(&self, address: SocketAddr) -> bool {
        let now = Instant::now();
        let mut state = self.lock();
        let new = state
            .placement
            .registry
            .legacy_heartbeat(address, now)
            .is_some_and(|(_, new)| new);
        if new {
            self.pump(&mut state, now);
        }
        new
    }

    /// What is due by now: silent workers are pruned, waiting requests looked at again, gauges and readiness set.
    pub fn keep_house(&self) {
        let now = Instant::now();
        let mut state = self.lock();
        let pruned = state.placement.prune(now);
        let peers: Vec<Peer> = pruned
            .iter()
            .filter_map(|worker| state.peers.remove(&worker.id))
            .collect();
        for node in pruned.iter().filter_map(Worker::node_id) {
            state.rings.left(node, "it was silent for too long", now);
            state.tracker.left(node);
        }
        self.look_at_rings(&mut state, now);
        self.turn(&mut state, now);
        let readiness = self.readiness(&state, None);
        let registry = &state.placement.registry;
        let legacy = registry.iter().filter(|worker| worker.is_legacy()).count();
        self.metrics.workers(registry.len() - legacy, legacy);
        drop(state);

        for worker in pruned {
            tracing::warn!(
                worker = worker.name,
                timeout_seconds = self.config.worker_timeout.as_secs_f64(),
                "worker pruned: it was silent for too long"
            );
            if worker.is_legacy() {
                self.exchange.abandon(worker.address);
            }
        }
        for peer in peers {
            peer.link.close(ErrorCode::TIMEOUT, "no sign of life");
        }
        match readiness {
            Ok(()) => self.health.set_ready(),
            Err(reason) => self.health.set_unready(reason),
        }
    }

    /// Looks at the registry.
    pub fn with_registry<T>(&self, look: impl FnOnce(&Registry) -> T) -> T {
        look(&self.lock().placement.registry)
    }

    /// Changes a worker's entry.
    pub fn with_worker(&self, id: WorkerId, change: impl FnOnce(&mut Worker)) {
        if let Some(worker) = self.lock().placement.registry.get_mut(id) {
            change(worker);
        }
    }

    /// The link of a worker.
    pub fn link(&self, id: WorkerId) -> Option<Link> {
        self.lock().peers.get(&id).map(|peer| peer.link.clone())
    }

    /// Requests that wait and that run.
    pub fn in_flight(&self) -> (usize, usize) {
        let state = self.lock();
        (state.placement.queued(), state.placement.running())
    }

    /// Whether `/ready` should say yes: for one model, or for any.
    fn readiness(&self, state: &State, asked: Option<&str>) -> Result<(), String> {
        if self.shutdown.is_draining() {
            return Err("shutting down".into());
        }
        let now = Instant::now();
        let registry = &state.placement.registry;
        let answers = |worker: &Worker| {
            let proven = |model: &ServedModel| {
                let in_service = match model.ring {
                    None => !worker.draining,
                    Some(ring) => {
                        let node = worker.node_id().unwrap_or_default();
                        state.rings.serves_since(ring, node).flatten().is_some()
                    }
                };
                model.answers(now)
                    && in_service
                    && asked.is_none_or(|asked| asked == model.card.name)
            };
            // A v5.0.0 worker cannot be asked for one token, so its heartbeat has to do.
            worker.models.iter().any(proven)
                || (worker.is_legacy() && !worker.draining && asked.is_none())
        };
        if registry.iter().any(answers) {
            return Ok(());
        }
        if let Some(model) = asked {
            return Err(self.why_not(state, model));
        }
        let mut reason = if registry.is_empty() {
            "no worker is connected".to_owned()
        } else {
            "no worker has answered yet".to_owned()
        };
        for (_, text) in state.rings.not_serving() {
            reason += &format!("; {text}");
        }
        for unformed in state.rings.unformed() {
            reason += &format!(
                "; there is no ring of {}: {}",
                unformed.model, unformed.reason
            );
        }
        for text in state.tracker.under_way() {
            reason += &format!("; {text}");
        }
        Err(reason)
    }

    fn assignment(self: &Arc<Self>, state: &State, ticket: Ticket, placed: Placed) -> Assignment {
        let worker = state.placement.registry.get(placed.worker);
        let route = match (state.peers.get(&placed.worker), worker) {
            (Some(peer), _) => Route::Link(peer.link.clone()),
            (None, Some(worker)) if worker.is_legacy() => Route::Legacy(worker.address),
            (None, _) => Route::Gone,
        };
        self.gauge(state);
        Assignment {
            mesh: self.clone(),
            ticket,
            placed,
            route,
            ended: Ended::Cancelled,
        }
    }

    fn pump(&self, state: &mut State, now: Instant) {
        for (ticket, decided) in state.placement.pump(now) {
            let undelivered = match state.waiting.remove(&ticket) {
                Some(sender) => sender.send(decided).is_err(),
                None => true,
            };
            if undelivered {
                state.placement.release(ticket, Ended::Cancelled, now);
            }
        }
        self.gauge(state);
    }

    fn gauge(&self, state: &State) {
        self.metrics
            .queued
            .set(i64::try_from(state.placement.queued()).unwrap_or(i64::MAX));
        self.metrics
            .running
            .set(i64::try_from(state.placement.running()).unwrap_or(i64::MAX));
        for ingress in Ingress::ALL {
            let (waiting, running) = state.placement.of_ingress(ingress);
            self.metrics.ingress(ingress, waiting, running);
        }
        self.metrics
            .queue_sources
            .set(i64::try_from(state.placement.sources()).unwrap_or(i64::MAX));
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
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
        state.placement.release(self.ticket, Ended::Cancelled, now);
        self.mesh.pump(&mut state, now);
    }
}

/// A request's right to a worker; dropping it gives the worker free.
#[derive(Debug)]
pub struct Assignment {
    mesh: Arc<Mesh>,
    ticket: Ticket,
    /// The worker.
    pub placed: Placed,
    /// How to reach it.
    pub route: Route,
    ended: Ended,
}

impl Assignment {
    /// The first token came.
    pub fn first_token(&self) {
        let now = Instant::now();
        self.mesh.lock().placement.first_token(self.ticket, now);
    }

    /// The worker says that its engine gets on.
    pub fn gave_sign(&self) {
        let model = &self.placed.model;
        self.mesh.with_worker(self.placed.worker, |worker| {
            worker.gave_sign(model, Instant::now());
        });
    }

    /// Whether the worker's reports explain that a request gets no token from it: it works, and requests wait there.
    pub fn is_busy(&self) -> bool {
        let within = self.mesh.config.first_token_limit;
        self.mesh.with_registry(|registry| {
            let worker = registry.get(self.placed.worker);
            worker.is_some_and(|worker| worker.is_busy(within, Instant::now()))
        })
    }

    /// Says how the attempt ended, and gives the worker free.
    pub fn end(mut self, ended: Ended) {
        self.ended = ended;
    }
}

impl Drop for Assignment {
    fn drop(&mut self) {
        let now = Instant::now();
        let mut state = self.mesh.lock();
        state.placement.release(self.ticket, self.ended, now);
        self.mesh.pump(&mut state, now);
    }
}

/// Microseconds since the Unix epoch, for DCF headers.
pub fn timestamp_us() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}
