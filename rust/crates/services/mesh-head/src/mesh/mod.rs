//! What all front ends share: placement and rings behind their lock, the links of workers, and who waits for room.
//!
//! The lock is held for a decision, never across an await. Per token nothing is locked.

mod models;
mod nodes;
mod rings;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use dcf::{ErrorCode, Message, Version};
use mesh_base::clock;
use mesh_net::quic::Link;
use mesh_net::trust::{DUPLICATE_IDENTITY, DenyList};
use mesh_proto::{Hello, Load, ModelKind};
use mesh_service::health::Health;
use mesh_service::shutdown::Shutdown;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};

use crate::config::Config;
use crate::core::duplicates::{Duplicate, Duplicates, Machine};
use crate::core::fair::{Ingress, Origin};
use crate::core::held_back::{HeldBack, Words};
use crate::core::memory::{Memory, TooMuch};
use crate::core::placement::{Asked, Ended, Placed, Placement, Received, Refusal, Ticket};
use crate::core::registry::{
    Finding, Proof, Registry, ServedModel, Service, TokenClock, Worker, WorkerId,
};
use crate::core::replicas::Replicas;
use crate::core::rings::{Arrival, Prospect, Rings};
use crate::core::router::Ask;
use crate::core::spotcheck::{Sample, Standing as Checked};
use crate::core::tracker::{Conflict, Tracker};
use crate::drains;
use crate::ids;
use crate::legacy::{Exchange, LegacyWorker};
use crate::metrics::HeadMetrics;
use crate::pins::PinsFile;
use crate::worker_bus::{BusSender, Sessions};

pub use rings::Standing;

/// The mesh as one head sees it.
#[derive(Debug)]
pub struct Mesh {
    /// As configured at the start.
    pub config: Config,
    /// As configured now, for the keys that a reload applies.
    live: RwLock<Config>,
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
    /// Nodes that are no longer part of the mesh.
    pub deny_list: DenyList,
    /// When the head started.
    pub started: SystemTime,
    /// The same by a clock that nobody sets.
    pub running_since: Instant,
    state: Mutex<State>,
    /// What requests take of this head's memory.
    memory: Mutex<Memory>,
    /// Large requests are read one at a time: until it is known what they are, they take a multiple of their bytes.
    pub reading: Semaphore,
    /// Told whenever a ring's members or driver changed.
    ring_changes: watch::Sender<()>,
    /// Held while the list of drained workers is written.
    saving: tokio::sync::Mutex<()>,
    pins_file: PinsFile,
}

#[derive(Debug)]
struct State {
    placement: Placement,
    rings: Rings,
    tracker: Tracker,
    /// Names under which workers serve different models.
    mixed: BTreeSet<String>,
    duplicates: Duplicates,
    held_back: HeldBack,
    /// Time of the last check of the links.
    links_seen: Option<Instant>,
    /// When the gauges of rings were last set.
    gauged: Option<Instant>,
    /// Time of the last check for workers that had been heard.
    listened: Option<Instant>,
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
    /// Packets that have come from it, and when there was a new one.
    heard_packets: u64,
    heard: Instant,
    /// The worker's process; 0 is unknown.
    instance: u64,
    /// Host name of its machine.
    host: String,
}

/// A worker that is connected with the identity of one that connects.
#[derive(Debug)]
pub struct Rival {
    /// Its link.
    pub link: Link,
    /// It finishes what runs and will leave.
    pub draining: bool,
    name: String,
    host: String,
    orders: mpsc::Sender<Message>,
}

/// How to reach the worker of an [`Assignment`].
#[derive(Debug, Clone)]
pub enum Route {
    /// Over its link.
    Link(Link),
    /// Plain DCF over UDP.
    Legacy(LegacyWorker),
    /// The worker left in the same moment.
    Gone,
}

impl Mesh {
    /// A mesh without workers.
    ///
    /// # Errors
    /// If what models' names mean cannot be read.
    pub fn new(
        config: Config,
        metrics: HeadMetrics,
        health: Health,
        shutdown: Shutdown,
        bus: BusSender,
        deny_list: DenyList,
    ) -> io::Result<Arc<Self>> {
        let placement = Placement::new(
            Registry::new(config.worker_timeout)
                .with_proofs(config.first_token_limit, config.quic.probe_interval),
            config.placement_limits(),
        );
        let mut rings = Rings::new(config.ring_settings(), rings::first_ring());
        rings.stay_drained(drains::load(&config.state_dir), Instant::now());
        let pins_file = PinsFile::new(&config.state_dir);
        let state = State {
            placement,
            rings,
            tracker: Tracker::new().with_pins(pins_file.load()?),
            mixed: BTreeSet::new(),
            duplicates: Duplicates::default(),
            held_back: HeldBack::default(),
            links_seen: None,
            gauged: None,
            listened: None,
            peers: BTreeMap::new(),
            waiting: HashMap::new(),
            next_ticket: 0,
        };
        Ok(Arc::new(Self {
            memory: Mutex::new(Memory::new(config.memory_of_requests())),
            reading: Semaphore::new(1),
            live: RwLock::new(config.clone()),
            config,
            metrics,
            health,
            shutdown,
            exchange: Exchange::default(),
            bus,
            sessions: Sessions::default(),
            deny_list,
            started: SystemTime::now(),
            running_since: Instant::now(),
            state: Mutex::new(state),
            ring_changes: watch::Sender::new(()),
            saving: tokio::sync::Mutex::default(),
            pins_file,
        }))
    }

    /// Takes memory for a request of `origin`.
    ///
    /// # Errors
    /// [`TooMuch`] if there is not as much left, or not for that client.
    pub fn lease(self: &Arc<Self>, origin: Origin, bytes: u64) -> Result<Lease, TooMuch> {
        let mut lease = Lease {
            mesh: self.clone(),
            origin,
            bytes: 0,
        };
        lease.add(bytes)?;
        Ok(lease)
    }

    /// Bytes of memory that requests have taken.
    pub fn leased(&self) -> u64 {
        self.memory().used()
    }

    fn memory(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
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
            let mut state = self.lock();
            let placement = &mut state.placement;
            let served = placement
                .registry
                .default_model(ModelKind::Chat, Instant::now());
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
    pub fn first_encoder(&self) -> Option<String> {
        let mut state = self.lock();
        let registry = &mut state.placement.registry;
        registry.default_model(ModelKind::Embed, Instant::now())
    }

    /// Who serves this model.
    pub fn replicas(&self, name: &str) -> Replicas {
        self.with_registry(|registry| Replicas::of(registry, name, Instant::now()))
    }

    /// Whether a worker serves this model now or did lately, or workers offer its layers.
    pub fn knows_model(&self, name: &str) -> bool {
        self.lock().placement.knows_model(name)
    }

    /// Enters a worker that said Hello on this link.
    pub fn join(&self, link: &Link, hello: Hello, orders: mpsc::Sender<Message>) -> WorkerId {
        let now = Instant::now();
        // Not what it calls itself.
        let hello = Hello {
            node_name: link.node_name().to_owned(),
            version: plain(&hello.version),
            ..hello
        };
        let (instance, host) = (hello.instance, plain(&hello.host));
        let others = other_addresses(&hello.addresses, link.remote_addr().ip());
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
        state.tracker.has_addresses(link.node_id(), others.clone());
        let arrival = Arrival {
            name,
            whole,
            head_ip: link.local_ip(),
        };
        state.rings.joined(link.node_id(), arrival, now);
        state.rings.has_addresses(link.node_id(), others);
        if let Some(old) = replaced.and_then(|old| state.peers.remove(&old)) {
            old.link
                .close(ErrorCode::CANCELLED, "this node has connected again");
        }
        state.peers.insert(
            id,
            Peer {
                link: link.clone(),
                orders,
                heard_packets: 0,
                heard: now,
                instance,
                host,
            },
        );
        let list = self.expelled_message();
        self.order(&mut state, id, link.node_id(), list, now);
        self.note_mixed(&mut state);
        self.turn(&mut state, now);
        id
    }

    /// The process that is connected as this node, if its link is open.
    pub fn process_of(&self, node: &str) -> Option<u64> {
        let state = self.lock();
        let worker = state.placement.registry.of_node(node)?;
        let peer = state.peers.get(&worker.id)?;
        peer.link.close_reason().is_none().then_some(peer.instance)
    }

    /// The worker that is connected as this node, unless it is the same process: that has lost its earlier link.
    pub fn rival(&self, node: &str, instance: u64) -> Option<Rival> {
        let state = self.lock();
        let worker = state.placement.registry.of_node(node)?;
        let peer = state.peers.get(&worker.id)?;
        let same = instance != 0 && peer.instance == instance;
        (!same && peer.link.close_reason().is_none()).then(|| Rival {
            link: peer.link.clone(),
            // A drain by an operator lasts; one of its own ends soon.
            draining: worker.load.draining,
            name: worker.name.clone(),
            host: peer.host.clone(),
            orders: peer.orders.clone(),
        })
    }

    /// A second machine with the identity of `rival` was refused: both hear so. Returns what the newcomer is told.
    pub fn refused_duplicate(&self, rival: &Rival, newcomer: SocketAddr, host: &str) -> String {
        let now = Instant::now();
        let machine = |address, host: &str| Machine {
            address,
            host: host.chars().take(64).filter(|c| !c.is_control()).collect(),
        };
        let kept = machine(rival.link.remote_addr(), &rival.host);
        let refused = machine(newcomer, host);
        let node = rival.link.node_id();
        let mut state = self.lock();
        let news = state
            .duplicates
            .refused(node, &rival.name, kept, refused, now);
        let text = state.duplicates.advice(node).unwrap_or_default();
        drop(state);
        self.metrics.duplicate(&rival.name);
        if news {
            tracing::error!(node, "{text}");
            let message = Message::error(0, timestamp_us(), DUPLICATE_IDENTITY, &text);
            // One that takes no orders is dropped elsewhere.
            let _ = rival.orders.try_send(message);
        }
        text
    }

    /// Identities that several machines have.
    pub fn duplicates(&self) -> Vec<Duplicate> {
        self.lock().duplicates.view(Instant::now())
    }

    /// Problems that an operator should know and mend, in words.
    pub fn warnings(&self) -> Vec<String> {
        let mut state = self.lock();
        let duplicates = state.duplicates.view(Instant::now());
        let mut warnings: Vec<String> = duplicates.iter().map(Duplicate::advice).collect();
        let conflicts = self.name_conflicts(&state);
        warnings.extend(conflicts.iter().map(Conflict::advice));
        if clock::is_implausible(SystemTime::now()) {
            warnings.push(format!(
                "this head's clock says {}, which is wrong; set it, for example with `timedatectl set-ntp true`",
                clock::utc(SystemTime::now())
            ));
        }
        warnings.extend(state.placement.registry.disagreements(Instant::now()));
        for worker in state.placement.registry.iter() {
            if worker.clock_offset.abs() > CLOCK_TOLERANCE {
                warnings.push(format!(
                    "worker `{}`: its clock is {} by this head's, which says {}; set the one that is wrong, for example with `timedatectl set-ntp true`",
                    worker.name,
                    clock::offset(worker.clock_offset),
                    clock::utc(SystemTime::now())
                ));
            }
        }
        warnings
    }

    /// A worker's message with this timestamp came just now.
    pub fn clock_heard(&self, id: WorkerId, timestamp_us: u64) {
        // v5.0.0 peers may send 0.
        if timestamp_us == 0 {
            return;
        }
        let offset = (timestamp_us as f64 - self::timestamp_us() as f64) / 1e6;
        self.with_worker(id, |worker| {
            let was_off = worker.clock_offset.abs() > CLOCK_TOLERANCE;
            worker.clock_offset = offset;
            if offset.abs() > CLOCK_TOLERANCE && !was_off {
                tracing::warn!(
                    worker = worker.name,
                    clock = clock::utc(SystemTime::now()),
                    "the worker's clock is {} by this head's; set the one that is wrong, for example with `timedatectl set-ntp true`",
                    clock::offset(offset)
                );
            }
        });
    }

    /// A worker's link is closed.
    pub fn leave(&self, id: WorkerId) {
        let now = Instant::now();
        let mut state = self.lock();
        state.peers.remove(&id);
        let left = state.placement.leave(id, now);
        self.note_mixed(&mut state);
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

    /// True if plain DCF clients at this address are served.
    pub fn trusts(&self, source: IpAddr) -> bool {
        self.live().trusts(source)
    }

    /// True if a worker without an identity may register from this address.
    pub fn admits_legacy_worker(&self, source: IpAddr) -> bool {
        self.live().admits_legacy_worker(source)
    }

    /// The configuration whose reloadable keys are in effect.
    pub fn live(&self) -> RwLockReadGuard<'_, Config> {
        self.live.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts the reloadable keys of another configuration into effect.
    pub fn reconfigure(&self, fresh: Config) {
        *self.live.write().unwrap_or_else(PoisonError::into_inner) = fresh;
        let now = Instant::now();
        let mut state = self.lock();
        let workers = state.placement.registry.iter();
        let gone: Vec<(WorkerId, SocketAddr)> = workers
            .filter(|worker| worker.is_legacy() && !self.admits_legacy_worker(worker.address.ip()))
            .map(|worker| (worker.id, worker.address))
            .collect();
        for (id, address) in gone {
            state.placement.leave(id, now);
            self.exchange.abandon(address);
        }
        self.turn(&mut state, now);
    }

    /// A worker without an identity is alive. True means that it is new.
    pub fn legacy_heartbeat(&self, worker: LegacyWorker) -> bool {
        let now = Instant::now();
        let mut state = self.lock();
        let new = state
            .placement
            .registry
            .legacy_heartbeat(worker.address, worker.version, now)
            .is_some_and(|(_, new)| new);
        if new {
            self.pump(&mut state, now);
        }
        new
    }

    /// What is due by now: silent workers are pruned, waiting requests looked at again, gauges and readiness set.
    pub fn keep_house(&self) {
        self.hear_held_back();
        let now = Instant::now();
        let mut state = self.lock();
        state.listen(now);
        self.look_at_links(&mut state, now);
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
        let speak = |version| {
            let same = registry
                .iter()
                .filter(|worker| worker.legacy_version() == version);
            same.count()
        };
        let old = [Version::V5_0, Version::V5_1].map(|version| (version, speak(Some(version))));
        self.metrics.workers(speak(None), old);
        let conflicts = state.tracker.conflicts().len() + state.mixed.len();
        self.metrics
            .name_conflicts
            .set(i64::try_from(conflicts).unwrap_or(i64::MAX));
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

    /// Takes in what workers said of models and rings in a quarantine that is over.
    fn hear_held_back(&self) {
        let now = Instant::now();
        let words = {
            let mut guard = self.lock();
            let state = &mut *guard;
            let registry = &state.placement.registry;
            state.held_back.take(|id| {
                let node = registry.get(id)?.node_id()?;
                Some(registry.is_out(node, now))
            })
        };
        for (id, Words { offer, models }) in words {
            if let Some(offer) = offer {
                self.offered(id, offer);
            }
            if let Some(models) = models {
                self.models_said(id, models);
            }
        }
    }

    /// True if anything was heard from a worker in the last moments.
    pub fn hears(&self, id: WorkerId) -> bool {
        let state = self.lock();
        let peer = state.peers.get(&id);
        peer.is_some_and(|peer| peer.heard.elapsed() < HEARD)
    }

    /// Every packet of a link was authenticated: it tells where the worker is.
    fn look_at_links(&self, state: &mut State, now: Instant) {
        let fresh = |at: Instant| now.saturating_duration_since(at) < LINK_LOOK;
        if state.links_seen.is_some_and(fresh) {
            return;
        }
        state.links_seen = Some(now);
        let mut moved = Vec::new();
        for (id, peer) in &state.peers {
            let address = peer.link.remote_addr();
            if let Some(before) = state.placement.registry.moved(*id, address) {
                tracing::info!(worker = peer.link.node_name(), %before, %address, "the worker has moved");
                if before.ip() != address.ip() {
                    moved.push((peer.link.node_id().to_owned(), address.ip()));
                }
            }
        }
        for (node, ip) in moved {
            state.rings.moved(&node, ip);
            state.tracker.moved(&node, ip);
        }
        let offsets = state
            .placement
            .registry
            .iter()
            .filter(|worker| !worker.is_legacy());
        self.metrics
            .clocks(offsets.map(|worker| (worker.name.clone(), worker.clock_offset)));
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
                let out = worker
                    .node_id()
                    .is_some_and(|node| registry.is_out(node, now));
                model.answers(now)
                    && !out
                    && registry.has_name(model, now) != Service::Out
                    && model.standing != Checked::Held
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
            (None, Some(worker)) => match worker.legacy_version() {
                Some(version) => Route::Legacy(LegacyWorker {
                    address: worker.address,
                    version,
                }),
                None => Route::Gone,
            },
            (None, None) => Route::Gone,
        };
        self.gauge(state);
        Assignment {
            mesh: self.clone(),
            ticket,
            tokens_seen: worker.map(|worker| worker.tokens_seen.clone()),
            process: state.peers.get(&placed.worker).map_or(0, |p| p.instance),
            of_model: worker
                .and_then(|worker| worker.model(&placed.model))
                .map(|model| model.tokens_seen.clone()),
            placed,
            route,
            ended: Ended::Cancelled,
            received: Mutex::default(),
        }
    }

    /// The proofs that a worker is to give now, besides those of the models that are being asked.
    pub fn proofs_due(&self, id: WorkerId, under_way: &BTreeSet<String>) -> Vec<Proof> {
        let mut state = self.lock();
        let registry = &mut state.placement.registry;
        registry.proofs_due(id, under_way, ids::unique(), Instant::now())
    }

    /// A worker answered the head's question with this, or gave no answer to what was asked at `asked`.
    pub fn proved(&self, id: WorkerId, proof: &Proof, sample: Option<Sample>, asked: Instant) {
        let now = Instant::now();
        let mut guard = self.lock();
        let state = &mut *guard;
        let seed = ids::unique();
        let registry = &mut state.placement.registry;
        let findings = registry.proved(id, proof, sample, asked, seed, now);
        for finding in findings {
            self.follow_finding(state, finding, now);
        }
        self.turn(state, now);
    }

    /// A worker declines the head's question. Says whether that is excused.
    pub fn declined(&self, id: WorkerId, model: &str) -> bool {
        let mut state = self.lock();
        let registry = &mut state.placement.registry;
        registry.declined(id, model, Instant::now())
    }

    fn follow_finding(&self, state: &mut State, finding: Finding, now: Instant) {
        match finding {
            Finding::Disputed { text } => {
                tracing::warn!(model_answers = "differ", "{text}");
            }
            Finding::Settled { name } => {
                tracing::info!(
                    worker = name,
                    "the worker's answers agree with those of others again"
                );
            }
            Finding::Quarantined {
                node,
                name,
                ring: Some(ring),
                reason,
                ..
            } => {
                tracing::warn!(driver = name, node, ring, reason, "ring given up");
                self.metrics.quarantined(&name);
                state.rings.distrust(ring, &reason, now);
            }
            Finding::Quarantined {
                node,
                name,
                ring: None,
                length,
                reason,
            } => {
                tracing::warn!(
                    worker = name,
                    node,
                    seconds = length.as_secs(),
                    reason,
                    "worker in quarantine: it gets no requests and holds no part of a ring"
                );
                self.metrics.quarantined(&name);
                state.rings.quarantine(&node, &reason, length, now);
                let worker = state.placement.registry.of_node(&node);
                // What it answers now had better come from another one.
                if let Some(peer) = worker.and_then(|worker| state.peers.get(&worker.id)) {
                    peer.link
                        .close(ErrorCode::CANCELLED, &format!("in quarantine: {reason}"));
                }
            }
        }
    }

    /// An attempt that began at `began` failed, and that was this worker's own fault.
    pub fn at_fault(&self, key: &str, name: &str, model: &str, began: Instant) {
        let now = Instant::now();
        let pause = self.lock().placement.at_fault(key, model, began, now);
        let Some(pause) = pause else { return };
        self.metrics.at_fault(name);
        if !pause.is_zero() {
            tracing::warn!(
                worker = name,
                model,
                pause_seconds = pause.as_secs(),
                "the worker failed again and gets no requests for a while"
            );
        }
    }

    /// A worker rejected a request that this one answers.
    pub fn contradicted(&self, worker: WorkerId, by: &Placed, text: &str) {
        let now = Instant::now();
        let mut state = self.lock();
        let registry = &mut state.placement.registry;
        let Some(wrong) = registry.get_mut(worker) else {
            return;
        };
        wrong.failed += 1;
        let (key, name) = (wrong.key(), wrong.name.clone());
        let pause = state.placement.at_fault(&key, &by.model, now, now);
        drop(state);
        tracing::warn!(
            worker = name,
            by = by.name,
            said = text,
            pause_seconds = pause.map(|pause| pause.as_secs()),
            "the worker rejected a request that another one answers"
        );
        self.metrics.at_fault(&name);
    }

    /// Whether another worker than this one answers such requests.
    pub fn another(&self, ask: &Ask, than: WorkerId) -> bool {
        self.lock().placement.another(ask, than, Instant::now())
    }

    /// The context that a worker claims for a model; 0 if it is not known.
    pub fn context_on(&self, worker: WorkerId, model: &str) -> u32 {
        self.with_registry(|registry| {
            let served = registry.get(worker).and_then(|worker| worker.model(model));
            served.map_or(0, |model| model.card.context)
        })
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

impl State {
    /// Notes who has been heard since the last look: any packet on a worker's link is a sign of life. If the last look is too
    /// long ago, this head itself did not run, and nobody is silent for that.
    fn listen(&mut self, now: Instant) {
        let gap = self
            .listened
            .map_or(Duration::ZERO, |at| now.saturating_duration_since(at));
        self.listened = Some(now);
        if gap > LISTENS {
            self.rings.stalled(gap, now);
            self.placement.registry.stalled(gap, now);
            for peer in self.peers.values_mut() {
                peer.heard = (peer.heard + gap).min(now);
            }
        }
        for (id, peer) in &mut self.peers {
            let packets = peer.link.packets_received();
            if packets != peer.heard_packets {
                peer.heard_packets = packets;
                peer.heard = now;
                self.rings.heard(peer.link.node_id(), now);
                self.placement.registry.seen(*id, now);
            }
        }
    }
}

/// Time for which a worker that was heard counts as alive. Links carry something at least every half second.
const HEARD: Duration = Duration::from_secs(1);
/// A longer pause between two looks at who was heard means that this head had no processor.
const LISTENS: Duration = Duration::from_millis(300);

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

/// Memory of one request; dropping it gives it back.
#[derive(Debug)]
pub struct Lease {
    mesh: Arc<Mesh>,
    origin: Origin,
    bytes: u64,
}

impl Lease {
    /// Takes more.
    ///
    /// # Errors
    /// As [`Mesh::lease`].
    pub fn add(&mut self, bytes: u64) -> Result<(), TooMuch> {
        self.bytes += self.mesh.memory().take(self.origin, self.bytes, bytes)?;
        Ok(())
    }

    /// Exchanges what it has for `bytes`.
    ///
    /// # Errors
    /// As [`Mesh::lease`].
    pub fn set(&mut self, bytes: u64) -> Result<(), TooMuch> {
        let mut memory = self.mesh.memory();
        memory.give(self.origin, std::mem::take(&mut self.bytes));
        self.bytes = memory.take(self.origin, 0, bytes)?;
        Ok(())
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.mesh.memory().give(self.origin, self.bytes);
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
    /// The worker's process; 0 is unknown.
    pub process: u64,
    ended: Ended,
    received: Mutex<Received>,
    tokens_seen: Option<TokenClock>,
    /// The same for the model alone.
    of_model: Option<TokenClock>,
}

impl Assignment {
    /// The first token came.
    pub fn first_token(&self) {
        let now = Instant::now();
        let mut state = self.mesh.lock();
        state.placement.first_token(self.ticket, now);
        if state.placement.has_suspects() {
            self.mesh.pump(&mut state, now);
        }
    }

    /// Tokens came.
    pub fn received(&self, tokens: usize, first: bool, now: Instant) {
        for seen in [&self.tokens_seen, &self.of_model].into_iter().flatten() {
            seen.note(now);
        }
        let mut received = self.received.lock().unwrap_or_else(PoisonError::into_inner);
        received.last = Some(now);
        if !first {
            let more = u32::try_from(tokens).unwrap_or(u32::MAX);
            received.tokens = received.tokens.saturating_add(more);
        }
    }

    /// All of a request without tokens was computed.
    pub fn prefilled(&self) {
        if let Some(seen) = &self.tokens_seen {
            seen.note(Instant::now());
        }
        self.first_token();
    }

    /// When a token last came from this worker, whichever request it was for.
    pub fn last_token_of_worker(&self) -> Option<Instant> {
        self.tokens_seen.as_ref()?.last()
    }

    /// The worker says that its engine gets on.
    pub fn gave_sign(&self) {
        let model = &self.placed.model;
        self.mesh.with_worker(self.placed.worker, |worker| {
            worker.gave_sign(model, Instant::now());
        });
    }

    /// True if the worker's reports explain that a request gets no token from it: it works, and requests wait
    /// there.
    pub fn is_busy(&self) -> bool {
        let within = self.mesh.config.first_token_limit;
        self.mesh.with_registry(|registry| {
            let worker = registry.get(self.placed.worker);
            let proof = self.mesh.config.request_timeout;
            worker.is_some_and(|worker| worker.is_busy(within, proof, Instant::now()))
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
        let received = *self.received.lock().unwrap_or_else(PoisonError::into_inner);
        state
            .placement
            .release_after(self.ticket, self.ended, received, now);
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

/// What a worker says of itself, as far as it is shown.
fn plain(said: &str) -> String {
    let shown = said.chars().filter(|c| !c.is_control());
    shown.take(64).collect()
}

/// Addresses that a worker says it has, but for the one that it is seen at and those that lead to nobody or to everybody. One
/// on the head's own machine is reached where the head is.
fn other_addresses(said: &[String], seen: IpAddr) -> Vec<IpAddr> {
    if seen.is_loopback() {
        return Vec::new();
    }
    let usable = |ip: &IpAddr| {
        let link_local = matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local());
        !ip.is_unspecified() && !ip.is_multicast() && !ip.is_loopback() && !link_local
    };
    let parsed = said.iter().filter_map(|text| text.parse::<IpAddr>().ok());
    let parsed = parsed.map(|ip| ip.to_canonical()).filter(usable);
    parsed
        .filter(|ip| *ip != seen)
        .take(MOST_ADDRESSES)
        .collect()
}

/// Other addresses of one worker that are passed on.
const MOST_ADDRESSES: usize = 7;

/// Interval at which links are asked for signs of life and addresses.
const LINK_LOOK: Duration = Duration::from_millis(500);

/// Clocks that are further apart, in seconds, are reported.
const CLOCK_TOLERANCE: f64 = 60.0;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_addresses_that_lead_to_a_worker_are_passed_on() {
        let said: Vec<String> = [
            "10.0.0.5",
            "10.0.0.7",
            "fe80::1",
            "fd00::7",
            "127.0.0.1",
            "224.0.0.1",
            "::ffff:10.0.0.8",
            "no",
            "0.0.0.0",
        ]
        .map(str::to_owned)
        .to_vec();
        let seen = IpAddr::from([10, 0, 0, 5]);
        let others: Vec<String> = other_addresses(&said, seen)
            .iter()
            .map(|ip| ip.to_string())
            .collect();
        assert_eq!(others, ["10.0.0.7", "fd00::7", "10.0.0.8"]);
        assert!(other_addresses(&said, IpAddr::from([127, 0, 0, 1])).is_empty());
        let many: Vec<String> = (1..99).map(|last| format!("10.0.1.{last}")).collect();
        assert_eq!(other_addresses(&many, seen).len(), MOST_ADDRESSES);
    }
}
