//! The state that all front ends share, and its lock.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};
use std::time::{Instant, SystemTime};

use dcf::{ErrorCode, Message, MsgType};
use mesh_control::duplicates::Duplicates;
use mesh_control::fair::Ticket;
use mesh_control::held_back::HeldBack;
use mesh_control::memory::RequestMemory;
use mesh_control::placement::{Placed, Placement, Refusal};
use mesh_control::registry::{Registry, Worker, WorkerId};
use mesh_control::rings::Rings;
use mesh_control::tracker::Tracker;
use mesh_net::quic::Link;
use mesh_net::trust::DenyList;
use mesh_service::health::Health;
use mesh_service::shutdown::Shutdown;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};

use super::connection::Connection;
use super::drains;
use super::gossip_node::HeadGossip;
use super::pins::PinsFile;
use super::sessions::Sessions;
use crate::audit::Recorder;
use crate::config::Config;
use crate::ids;
use crate::locks::lock;
use crate::metrics::HeadMetrics;

pub(crate) use mesh_base::clock::timestamp_us;

/// The mesh as one head sees it.
#[derive(Debug)]
pub struct Mesh {
    /// As configured at the start.
    pub(crate) config: Config,
    /// As configured now, for the keys that a reload applies.
    pub(super) live: RwLock<Config>,
    pub(crate) metrics: HeadMetrics,
    pub(crate) health: Health,
    pub(crate) audit: Recorder,
    /// Begins when the head is told to stop.
    pub(crate) shutdown: Shutdown,
    /// True once all answers have ended and this head closes its links.
    pub(crate) closing: AtomicBool,
    pub(crate) sessions: Sessions,
    pub(crate) deny_list: DenyList,
    /// What workers hear of the rotation of the mesh root.
    pub(super) succession: RwLock<Option<Message>>,
    /// Version of the list that the workers were told.
    pub(super) told_expelled: AtomicU64,
    /// Wall-clock time of the head's start.
    pub(crate) started: SystemTime,
    /// The same by the monotonic clock.
    pub(crate) running_since: Instant,
    pub(super) state: Mutex<State>,
    pub(super) memory: Mutex<RequestMemory>,
    /// Turns for large requests, which are read one at a time: while they are parsed, they take a multiple of
    /// their bytes.
    pub(crate) reading: Semaphore,
    /// Turns for images that clients send, which are decoded one at a time for the same reason.
    pub(crate) decoding: Semaphore,
    /// Told whenever a ring's members or driver changed.
    pub(super) ring_changes: watch::Sender<()>,
    /// Held while the list of drained workers is written.
    pub(super) saving: tokio::sync::Mutex<()>,
    pub(super) pins_file: PinsFile,
    pub(crate) gossip: HeadGossip,
}

#[derive(Debug)]
pub(super) struct State {
    pub(super) placement: Placement,
    pub(super) rings: Rings,
    pub(super) tracker: Tracker,
    /// Names under which workers serve different models.
    pub(super) mixed: BTreeSet<String>,
    pub(super) duplicates: Duplicates,
    pub(super) held_back: HeldBack,
    /// Time of the last check of the links.
    pub(super) links_seen: Option<Instant>,
    /// Time at which the gauges of rings were last set.
    pub(super) gauged: Option<Instant>,
    /// Time of the last check for workers that had been heard.
    pub(super) listened: Option<Instant>,
    pub(super) peers: BTreeMap<WorkerId, ConnectedWorker>,
    /// Connections to workers without an identity.
    pub(super) plain: BTreeMap<WorkerId, Arc<dyn Connection>>,
    pub(super) waiting: HashMap<Ticket, oneshot::Sender<Result<Placed, Refusal>>>,
    pub(super) next_ticket: u64,
}

#[derive(Debug)]
pub(super) struct ConnectedWorker {
    pub(super) link: Link,
    /// Goes out on its control stream.
    pub(super) orders: mpsc::Sender<Message>,
    /// Packets that have come from it, and when there was a new one.
    pub(super) heard_packets: u64,
    pub(super) heard: Instant,
    /// The worker's process; 0 is unknown.
    pub(super) instance: u64,
    pub(super) host: String,
}

impl State {
    pub(super) fn connection(&self, id: WorkerId) -> Option<Arc<dyn Connection>> {
        match self.peers.get(&id) {
            Some(peer) => Some(Arc::new(peer.link.clone())),
            None => self.plain.get(&id).cloned(),
        }
    }

    /// Removes a worker of the mesh as if its link had ended, and returns what is left of that.
    pub(super) fn remove(
        &mut self,
        id: WorkerId,
        why: &str,
        now: Instant,
    ) -> Option<ConnectedWorker> {
        let left = self.placement.leave(id, now);
        if let Some(node) = left.as_ref().and_then(Worker::node_id) {
            self.rings.left(node, why, now);
            self.tracker.left(node);
        }
        self.peers.remove(&id)
    }

    /// Takes out the connection to a worker that is no longer in the registry.
    pub(super) fn take_connection(&mut self, id: WorkerId) -> Option<Arc<dyn Connection>> {
        match self.peers.remove(&id) {
            Some(peer) => Some(Arc::new(peer.link)),
            None => self.plain.remove(&id),
        }
    }
}

impl Mesh {
    /// A mesh without workers.
    ///
    /// # Errors
    /// If the pins of model names cannot be read.
    pub(crate) fn new(
        config: Config,
        metrics: HeadMetrics,
        health: Health,
        shutdown: Shutdown,
        deny_list: DenyList,
        audit: Recorder,
    ) -> io::Result<Arc<Self>> {
        let registry = Registry::new(config.worker_timeout)
            .with_proofs(config.first_token_limit, config.quic.probe_interval);
        // Random, so that ring ids are not those of an earlier life, whatever the clock says, with room above.
        let first_ring = (ids::unique() >> 1).max(1);
        let mut rings = Rings::new(config.ring_settings(), first_ring);
        rings.stay_drained(drains::load(&config.state_dir), Instant::now());
        let pins_file = PinsFile::new(&config.state_dir);
        let state = State {
            placement: Placement::new(registry, config.placement_limits()),
            rings,
            tracker: Tracker::new().with_pins(pins_file.load()?),
            mixed: BTreeSet::new(),
            duplicates: Duplicates::default(),
            held_back: HeldBack::default(),
            links_seen: None,
            gauged: None,
            listened: None,
            peers: BTreeMap::new(),
            plain: BTreeMap::new(),
            waiting: HashMap::new(),
            next_ticket: 0,
        };
        Ok(Arc::new(Self {
            memory: Mutex::new(RequestMemory::new(config.memory_of_requests())),
            reading: Semaphore::new(1),
            decoding: Semaphore::new(1),
            live: RwLock::new(config.clone()),
            config,
            metrics,
            health,
            audit,
            shutdown,
            closing: AtomicBool::new(false),
            sessions: Sessions::default(),
            told_expelled: AtomicU64::new(deny_list.version()),
            deny_list,
            succession: RwLock::default(),
            started: SystemTime::now(),
            running_since: Instant::now(),
            state: Mutex::new(state),
            ring_changes: watch::Sender::new(()),
            saving: tokio::sync::Mutex::default(),
            pins_file,
            gossip: HeadGossip::default(),
        }))
    }

    /// True if plain DCF clients at this address are served.
    pub(crate) fn trusts(&self, source: IpAddr) -> bool {
        self.live().trusts(source)
    }

    /// The configuration whose reloadable keys are in effect.
    pub fn live(&self) -> RwLockReadGuard<'_, Config> {
        self.live.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts the reloadable keys of another configuration into effect.
    pub(crate) fn reconfigure(&self, fresh: Config) {
        *self.live.write().unwrap_or_else(PoisonError::into_inner) = fresh;
        let refused = |worker: &&Worker| {
            !worker.has_identity() && !self.live().admits_without_identity(worker.address.ip())
        };
        self.change(|state, now| {
            let workers = state.placement.registry.iter();
            let gone: Vec<WorkerId> = workers.filter(refused).map(|worker| worker.id).collect();
            for id in gone {
                state.placement.leave(id, now);
                if let Some(connection) = state.take_connection(id) {
                    connection.close(ErrorCode::UNAUTHORIZED, "not admitted any more");
                }
            }
        });
    }

    /// Looks at the registry.
    pub fn with_registry<T>(&self, look: impl FnOnce(&Registry) -> T) -> T {
        look(&self.lock().placement.registry)
    }

    pub(crate) fn with_worker(&self, id: WorkerId, change: impl FnOnce(&mut Worker)) {
        if let Some(worker) = self.lock().placement.registry.get_mut(id) {
            change(worker);
        }
    }

    pub(crate) fn link(&self, id: WorkerId) -> Option<Link> {
        self.lock().peers.get(&id).map(|peer| peer.link.clone())
    }

    /// Requests that wait and that run.
    pub fn in_flight(&self) -> (usize, usize) {
        let state = self.lock();
        (state.placement.queued(), state.placement.running())
    }

    /// Changes the state, and lets the cores decide on it.
    pub(super) fn change<T>(&self, change: impl FnOnce(&mut State, Instant) -> T) -> T {
        let now = Instant::now();
        let mut state = self.lock();
        let changed = change(&mut state, now);
        self.turn(&mut state, now);
        changed
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

/// A message with this body, made now.
pub(crate) fn message(kind: MsgType, sequence: u32, body: &impl prost::Message) -> Message {
    Message::new(kind, sequence, timestamp_us(), body.encode_to_vec())
}

/// Clocks that are further apart, in seconds, are reported.
pub(super) const CLOCK_TOLERANCE: f64 = 60.0;
