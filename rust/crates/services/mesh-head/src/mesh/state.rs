//! The state that all front ends share, and its lock.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};
use std::time::{Instant, SystemTime};

use dcf::{ErrorCode, Message};
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
use super::pins::PinsFile;
use super::sessions::Sessions;
use crate::config::Config;
use crate::ids;
use crate::metrics::HeadMetrics;

pub(crate) use mesh_base::clock::timestamp_us;

/// The mesh as one head sees it.
#[derive(Debug)]
pub struct Mesh {
    /// As configured at the start.
    pub(crate) config: Config,
    /// As configured now, for the keys that a reload applies.
    pub(super) live: RwLock<Config>,
    /// Counters and histograms.
    pub(crate) metrics: HeadMetrics,
    /// State behind `/ready`.
    pub(crate) health: Health,
    /// Begins when the head is told to stop.
    pub(crate) shutdown: Shutdown,
    /// Keys of sealed heartbeats.
    pub(crate) sessions: Sessions,
    /// Nodes that are no longer part of the mesh.
    pub(crate) deny_list: DenyList,
    /// Wall-clock time of the head's start.
    pub(crate) started: SystemTime,
    /// The same by the monotonic clock.
    pub(crate) running_since: Instant,
    pub(super) state: Mutex<State>,
    /// Account of the memory that requests take.
    pub(super) memory: Mutex<RequestMemory>,
    /// Turns for large requests, which are read one at a time: while they are parsed, they take a multiple of
    /// their bytes.
    pub(crate) reading: Semaphore,
    /// Told whenever a ring's members or driver changed.
    pub(super) ring_changes: watch::Sender<()>,
    /// Held while the list of drained workers is written.
    pub(super) saving: tokio::sync::Mutex<()>,
    pub(super) pins_file: PinsFile,
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

/// A connected worker.
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
    /// Host name of its machine.
    pub(super) host: String,
}

impl State {
    /// The connection to a worker.
    pub(super) fn connection(&self, id: WorkerId) -> Option<Arc<dyn Connection>> {
        match self.peers.get(&id) {
            Some(peer) => Some(Arc::new(peer.link.clone())),
            None => self.plain.get(&id).cloned(),
        }
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
    ) -> io::Result<Arc<Self>> {
        let placement = Placement::new(
            Registry::new(config.worker_timeout)
                .with_proofs(config.first_token_limit, config.quic.probe_interval),
            config.placement_limits(),
        );
        let mut rings = Rings::new(config.ring_settings(), first_ring());
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
            plain: BTreeMap::new(),
            waiting: HashMap::new(),
            next_ticket: 0,
        };
        Ok(Arc::new(Self {
            memory: Mutex::new(RequestMemory::new(config.memory_of_requests())),
            reading: Semaphore::new(1),
            live: RwLock::new(config.clone()),
            config,
            metrics,
            health,
            shutdown,
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
        let now = Instant::now();
        let mut state = self.lock();
        let refused = |worker: &&Worker| {
            !worker.has_identity() && !self.live().admits_without_identity(worker.address.ip())
        };
        let workers = state.placement.registry.iter();
        let gone: Vec<WorkerId> = workers.filter(refused).map(|worker| worker.id).collect();
        for id in gone {
            state.placement.leave(id, now);
            if let Some(connection) = state.take_connection(id) {
                connection.close(ErrorCode::UNAUTHORIZED, "not admitted any more");
            }
        }
        self.turn(&mut state, now);
    }

    /// Looks at the registry.
    pub fn with_registry<T>(&self, look: impl FnOnce(&Registry) -> T) -> T {
        look(&self.lock().placement.registry)
    }

    /// Changes a worker's entry.
    pub(crate) fn with_worker(&self, id: WorkerId, change: impl FnOnce(&mut Worker)) {
        if let Some(worker) = self.lock().placement.registry.get_mut(id) {
            change(worker);
        }
    }

    /// The link of a worker.
    pub(crate) fn link(&self, id: WorkerId) -> Option<Link> {
        self.lock().peers.get(&id).map(|peer| peer.link.clone())
    }

    /// Requests that wait and that run.
    pub fn in_flight(&self) -> (usize, usize) {
        let state = self.lock();
        (state.placement.queued(), state.placement.running())
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Ring ids of this head's life count up from here. Random, so that they are not those of an earlier life,
/// whatever the clock says, with room above.
fn first_ring() -> u64 {
    (ids::unique() >> 1).max(1)
}

/// Clocks that are further apart, in seconds, are reported.
pub(super) const CLOCK_TOLERANCE: f64 = 60.0;
