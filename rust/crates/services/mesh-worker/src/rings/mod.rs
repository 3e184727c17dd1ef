//! This worker's parts of rings: one model over several machines.
//!
//! [`Rings`] is the interface for the rest of the worker. For every ring that the head names it runs a
//! `deployment`, a task that loads parts (`part`: a thread each), opens and serves the `streams` to the other
//! members in every epoch and, where this worker has the last stage, starts the `driver`, an engine like that
//! of a whole model. `mesh-pipeline` decides about rows, replays and mirrors.

mod carrier;
mod deployment;
mod driver;
mod offer;
mod part;
mod paths;
mod peers;
mod progress;
mod streams;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::ops::Range;
use std::path::Path;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use dcf::{Message, MsgType};
use mesh_engine::EngineHandle;
use mesh_engine_ort::{OrtOptions, Reclaim, WeightFormat};
use mesh_model::Model;
use mesh_net::quic::{Link, LinkConfig, Listener, MsgStream, probe};
use mesh_net::trust::{NodeIdentity, Role};
use mesh_pipeline::StageReplica;
use mesh_proto::{
    LayerOffer, ModelCard, NodeProfile, Offer, PathProfile, Ring, RingHello, RingState,
};
use tokio::runtime::Handle;
use tokio::sync::{Notify, mpsc};

use self::carrier::Carrier;
use self::deployment::{Deployment, Event};
use self::part::message;
pub(crate) use self::peers::Peers;
use self::progress::Progress;
use crate::codec::ModelEngine;
use crate::config::Config;
use crate::error::WorkerError;
use crate::models::{self, Held, Models};
use crate::served::Failure;

/// Everything about rings on this worker.
pub(crate) struct Rings {
    config: Arc<Config>,
    models: Arc<Models>,
    shards: RwLock<Vec<Arc<Shard>>>,
    profile: Mutex<NodeProfile>,
    net: Mutex<Option<Net>>,
    deployments: Mutex<HashMap<u64, mpsc::UnboundedSender<Event>>>,
    /// Rings of which this worker runs every stage.
    alone: Mutex<HashSet<u64>>,
    changed: Notify,
    /// Time at which a part here last computed something.
    active: Mutex<Option<Instant>>,
    served: Mutex<Vec<Served>>,
    /// The paths in the last offer to the head.
    offered: Mutex<Vec<PathProfile>>,
    /// To the head, while there is a link to it.
    head: Mutex<Option<mpsc::UnboundedSender<Message>>>,
    /// The path to it.
    head_path: Mutex<PathProfile>,
}

/// A model of which this worker may hold parts.
pub(crate) struct Shard {
    model: Model,
    card: ModelCard,
    format: WeightFormat,
    offer: LayerOffer,
    /// The stored model, if only parts of it may be here.
    held: Option<Arc<Held>>,
}

/// A model that a ring with its driver here serves.
struct Served {
    ring: u64,
    model: Model,
    engine: EngineHandle,
    card: ModelCard,
}

/// State that exists once the worker has an identity.
#[derive(Clone)]
struct Net {
    node_id: String,
    address: SocketAddr,
    peers: Peers,
    carrier: Carrier,
}

impl Rings {
    /// Opens those of `config.ring.models` that are files at hand and measures this machine. Blocks for as long as
    /// that takes.
    pub(crate) fn open(config: &Arc<Config>, models: Arc<Models>) -> (Arc<Self>, Vec<Failure>) {
        let (shards, profile, failures) = offer::measure(config);
        let rings = Arc::new(Rings {
            config: config.clone(),
            models,
            shards: RwLock::new(shards.into_iter().map(Arc::new).collect()),
            profile: Mutex::new(profile),
            net: Mutex::new(None),
            deployments: Mutex::default(),
            alone: Mutex::default(),
            changed: Notify::new(),
            active: Mutex::default(),
            served: Mutex::default(),
            offered: Mutex::default(),
            head: Mutex::default(),
            head_path: Mutex::default(),
        });
        (rings, failures)
    }

    /// Offers a model of the configuration that is at hand by now. Blocks for as long as measuring takes.
    pub(crate) fn add_file(&self, name: &str) -> Result<(), WorkerError> {
        let (shard, profile) = offer::measure_file(name, &self.config)?;
        self.add_shard(shard, profile)
    }

    /// The offered models, with their names.
    pub(crate) fn shard_models(&self) -> Vec<(String, Model)> {
        let shards = self.shards();
        let models = shards
            .iter()
            .map(|shard| (shard.card.name.clone(), shard.model.clone()));
        models.collect()
    }

    /// True if anything is offered.
    pub(crate) fn has_shards(&self) -> bool {
        !self.shards().is_empty()
    }

    /// Offers one more model, `name`, whose header lies at `path`; its layers are fetched when they are
    /// needed. Blocks for as long as measuring takes.
    pub(crate) fn add(&self, name: &str, path: &Path, held: &Arc<Held>) -> Result<(), WorkerError> {
        let (shard, profile) = offer::measure_stored(name, path, held, &self.config)?;
        self.add_shard(shard, profile)
    }

    fn add_shard(&self, shard: Shard, profile: NodeProfile) -> Result<(), WorkerError> {
        let mut shards = self.shards.write().unwrap_or_else(PoisonError::into_inner);
        if shards
            .iter()
            .any(|other| other.card.name == shard.card.name)
        {
            let name = shard.card.name;
            return Err(WorkerError::SameName { name });
        }
        shards.push(Arc::new(shard));
        drop(shards);
        *lock(&self.profile) = profile;
        lock(&self.offered).clear();
        self.offer();
        Ok(())
    }

    /// Returns true if this worker offers anything, or will.
    pub(crate) fn is_offering(&self) -> bool {
        !self.config.ring.models.is_empty()
    }

    fn shards(&self) -> Vec<Arc<Shard>> {
        self.shards
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Listens for other workers, once there is an identity to show them. Gives the port the first time.
    pub(crate) fn listen(
        self: &Arc<Self>,
        identity: &NodeIdentity,
    ) -> Result<Option<u16>, WorkerError> {
        let mut net = lock(&self.net);
        if net.is_some() || !(self.is_offering() || self.models.is_sharing()) {
            return Ok(None);
        }
        let listen = self.config.ring.listen;
        let failed = |source| WorkerError::Listen {
            address: listen,
            carrier: "udp",
            key: "ring.listen",
            source,
        };
        let carrier = Carrier::start().map_err(failed)?;
        let entered = carrier.enter();
        let listener = Listener::bind(listen, identity.clone(), None, LinkConfig::default())
            .map_err(|error| failed(std::io::Error::other(error.to_string())))?;
        drop(entered);
        let address = listener.local_addr().map_err(failed)?;
        tracing::info!(%address, "listening for other workers");
        let peers = Peers::new(identity.clone());
        self.models
            .listen(peers, identity.node_id(), address.port());
        *net = Some(Net {
            node_id: identity.node_id(),
            address,
            peers: Peers::new(identity.clone()),
            carrier: carrier.clone(),
        });
        // Models do not go through that thread: they would hold steps up.
        carrier.spawn(accept(self.clone(), listener, Handle::current()));
        Ok(Some(address.port()))
    }

    /// Sends the offer to the head, which is `rtt` away, and from now on reports on rings through `outbox`.
    pub(crate) fn linked(&self, outbox: mpsc::UnboundedSender<Message>, rtt: Duration) {
        *lock(&self.head) = Some(outbox);
        lock(&self.head_path).rtt_us = peers::path("", rtt, 0.0).rtt_us;
        lock(&self.offered).clear();
        self.offer();
    }

    /// Sends the offer again if the paths to others have changed.
    fn offer(&self) {
        let shards = self.shards();
        // A model that is not known yet cannot be offered; an empty offer need not be sent.
        if shards.is_empty() {
            return;
        }
        let Some(net) = lock(&self.net).clone() else {
            return;
        };
        let mut paths = net.peers.paths();
        paths.push(lock(&self.head_path).clone());
        let mut offered = lock(&self.offered);
        if !offered.is_empty() && !paths::differ(&offered, &paths) {
            return;
        }
        offered.clone_from(&paths);
        drop(offered);
        let offer = Offer {
            ring_port: net.address.port().into(),
            profile: Some(NodeProfile {
                paths,
                ..lock(&self.profile).clone()
            }),
            models: shards.iter().map(|shard| shard.offer.clone()).collect(),
        };
        if let Some(head) = &*lock(&self.head) {
            let _ = head.send(message(MsgType::OFFER, &offer));
        }
    }

    /// The link to the head is gone: ends what it deployed.
    pub(crate) fn unlinked(&self) {
        *lock(&self.head) = None;
        // Their tasks end when their channels close.
        lock(&self.deployments).clear();
        self.changed.notify_waiters();
    }

    /// The head names the members of a ring.
    pub(crate) fn configure(self: &Arc<Self>, ring: Ring) {
        let Some(net) = lock(&self.net).clone() else {
            if ring.stages.is_empty() {
                return;
            }
            tracing::error!(
                model = ring.model,
                "a ring for a worker that offers nothing"
            );
            return;
        };
        let mut deployments = lock(&self.deployments);
        let known = deployments.get(&ring.ring);
        let deployment = match known.filter(|deployment| !deployment.is_closed()) {
            Some(deployment) => deployment.clone(),
            None if ring.stages.is_empty() => return,
            None => {
                let of_model = |shard: &&Arc<Shard>| {
                    shard.card.name == ring.model && shard.card.fingerprint == ring.fingerprint
                };
                let shards = self.shards();
                let Some(shard) = shards.iter().find(of_model) else {
                    tracing::error!(
                        model = ring.model,
                        "the head wants a model that is not here"
                    );
                    return;
                };
                let deployment =
                    Deployment::spawn(&net.carrier, self.clone(), shard.clone(), ring.ring);
                deployments.insert(ring.ring, deployment.clone());
                deployment
            }
        };
        drop(deployments);
        let _ = deployment.send(Event::Ring(ring));
        self.changed.notify_waiters();
    }

    /// A model served by a ring whose driver is here.
    pub(crate) fn find(&self, name: &str) -> Option<ModelEngine> {
        let served = lock(&self.served);
        let of_name = |served: &&Served| name.is_empty() || served.card.name == name;
        served.iter().find(of_name).map(|served| ModelEngine {
            model: served.model.clone(),
            engine: served.engine.clone(),
        })
    }

    /// The engines of all that are served, each with its model's name.
    pub(crate) fn engines(&self) -> Vec<(String, EngineHandle)> {
        let served = lock(&self.served);
        let engines = served.iter();
        engines
            .map(|served| (served.card.name.clone(), served.engine.clone()))
            .collect()
    }

    /// Resolves when this worker may leave: no ring with others has a part here any more, the link to the
    /// head is gone, or these rings have had no requests for a while; for an idle ring a leave is no worse
    /// than a handover.
    pub(crate) async fn emptied(&self) {
        let begun = Instant::now();
        loop {
            let changed = self.changed.notified();
            let active = lock(&self.active).map_or(begun, |at| at.max(begun));
            if self.shared() == 0 || active.elapsed() >= IDLE {
                return;
            }
            // Either way there is something to look at.
            let _ = tokio::time::timeout(IDLE / 4, changed).await;
        }
    }

    /// Returns true if no part here has computed anything for a while.
    fn is_idle(&self) -> bool {
        lock(&self.active).is_none_or(|at| at.elapsed() >= IDLE)
    }

    fn note_activity(&self) {
        *lock(&self.active) = Some(Instant::now());
    }

    /// Rings with others that have a part here.
    pub(crate) fn shared(&self) -> usize {
        let (deployments, alone) = (lock(&self.deployments), lock(&self.alone));
        let shared = deployments.keys().filter(|ring| !alone.contains(ring));
        shared.count()
    }

    /// Notes whether this worker runs every stage of a ring: then there is no other worker to hand it over
    /// to.
    fn set_alone(&self, ring: u64, alone: bool) {
        if alone {
            lock(&self.alone).insert(ring);
        } else {
            lock(&self.alone).remove(&ring);
        }
        self.changed.notify_waiters();
    }

    fn node_id(&self) -> String {
        lock(&self.net)
            .as_ref()
            .map_or_else(String::new, |net| net.node_id.clone())
    }

    fn peers(&self) -> Option<Peers> {
        lock(&self.net).as_ref().map(|net| net.peers.clone())
    }

    fn serve(&self, served: Served) {
        let mut all = lock(&self.served);
        all.retain(|other| other.ring != served.ring);
        all.push(served);
    }

    fn withdraw(&self, ring: u64) {
        lock(&self.served).retain(|served| served.ring != ring);
    }

    /// A deployment ends; `own` is the channel that it listens to.
    fn forget(&self, ring: u64, own: &mpsc::WeakUnboundedSender<Event>) {
        let mut deployments = lock(&self.deployments);
        // By now there may be another one for the same ring.
        let is_own = |other: &mpsc::UnboundedSender<Event>| {
            own.upgrade().is_some_and(|own| own.same_channel(other))
        };
        if deployments.get(&ring).is_some_and(is_own) {
            deployments.remove(&ring);
            lock(&self.alone).remove(&ring);
        }
        drop(deployments);
        self.changed.notify_waiters();
    }

    fn report(&self, state: &RingState) {
        self.tell_head(message(MsgType::RING_STATE, state));
    }

    /// Sends the head a message, if there is a link to it.
    pub(crate) fn tell_head(&self, message: Message) {
        if let Some(head) = &*lock(&self.head) {
            let _ = head.send(message);
        }
    }

    /// A stream of another member, for a ring that the head may be about to name.
    async fn deliver(&self, hello: RingHello, peer: String, stream: MsgStream) {
        let mut offered = Some((hello, peer, stream));
        let deliver = async {
            loop {
                let changed = self.changed.notified();
                let deployment = offered
                    .as_ref()
                    .and_then(|(hello, ..)| lock(&self.deployments).get(&hello.ring).cloned());
                if let Some(deployment) = deployment {
                    if let Some((hello, peer, stream)) = offered.take() {
                        // A deployment that has just ended drops the stream, which says so to the other side.
                        let _ = deployment.send(Event::Stream(hello, peer, stream));
                    }
                    return;
                }
                changed.await;
            }
        };
        // Dropping the stream refuses it.
        let _ = tokio::time::timeout(RING_PATIENCE, deliver).await;
    }
}

impl Shard {
    /// Gets the pieces that these layers need and that are not here.
    async fn fetch(
        &self,
        layers: Range<u32>,
        models: &Arc<Models>,
        progress: &Progress,
    ) -> Result<(), String> {
        let total = self.model.config().layers;
        let Some(held) = &self.held else {
            return Ok(());
        };
        let mut fetching = pin!(models.fetch_layers(held, layers, total));
        loop {
            tokio::select! {
                fetched = &mut fetching => return fetched,
                () = tokio::time::sleep(FETCH_LOOK) => progress.fetched(held.pieces_here()),
            }
        }
    }

    /// Loads a range of layers in the weight format of that name, in the one of choice if there is no name.
    /// Blocks.
    fn load(
        &self,
        layers: Range<u32>,
        format: &str,
        slots: u32,
        context: u32,
        config: &Config,
    ) -> Result<StageReplica, String> {
        let _reclaim = Reclaim;
        let format = match format {
            "" => self.format,
            name => WeightFormat::from_name(name)
                .ok_or_else(|| format!("weight format {name:?} is not known here"))?,
        };
        let options = OrtOptions {
            slots,
            context,
            ..offer::options(config, format)
        };
        // A file that was written to since it was opened is opened again.
        let model = match &self.held {
            Some(held) => offer::open_stored(held)?,
            None => offer::open_again(&self.model, &self.card.fingerprint, config)?,
        };
        let opened = mesh_engine_ort::open(&model, layers, options, config.backend)
            .map_err(|error| error.to_string())?;
        Ok(StageReplica::new(opened.stage, KEPT_BYTES))
    }
}

async fn accept(rings: Arc<Rings>, listener: Listener, main: Handle) {
    while let Some(link) = listener.accept().await {
        if link.role() != Role::Worker {
            tracing::warn!(peer = link.node_name(), "only workers have business here");
            continue;
        }
        tokio::spawn(accept_streams(rings.clone(), link, main.clone()));
    }
}

async fn accept_streams(rings: Arc<Rings>, link: Link, main: Handle) {
    while let Ok(mut stream) = link.accept().await {
        let (rings, link, main) = (rings.clone(), link.clone(), main.clone());
        tokio::spawn(async move {
            let hello = match streams::first(&mut stream).await {
                Ok(first) if models::is_ours(first.kind) => {
                    let node = link.node_id().to_owned();
                    main.spawn(models::serve(rings.models.clone(), node, first, stream));
                    return;
                }
                Ok(first) if first.kind == MsgType::PROBE => {
                    if let Err(error) = probe::answer(&first, stream).await {
                        tracing::debug!(peer = link.node_name(), %error, "probe not answered");
                    }
                    return;
                }
                Ok(first) => streams::hello(first),
                Err(broken) => Err(broken),
            };
            match hello {
                Ok(hello) => {
                    rings
                        .deliver(hello, link.node_id().to_owned(), stream)
                        .await
                }
                Err(broken) => {
                    tracing::debug!(
                        peer = link.node_name(),
                        reason = broken.text,
                        "stream refused"
                    );
                    streams::refuse(stream);
                }
            }
        });
    }
}

/// Values behind these mutexes are replaced as a whole, so a panic elsewhere leaves them sound.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Time without requests after which rings count as idle.
const IDLE: Duration = Duration::from_secs(3);

/// Interval at which the fetched size of a part is noted.
const FETCH_LOOK: Duration = Duration::from_secs(1);

/// Time for which a stream waits for the head to name its ring.
const RING_PATIENCE: Duration = Duration::from_secs(10);

/// Outputs that a part keeps for replays, at most.
const KEPT_BYTES: usize = 256 << 20;
