//! The interface of rings for the rest of the worker.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use dcf::{Message, MsgType};
use mesh_model::Model;
use mesh_net::quic::{LinkConfig, Listener, Refused};
use mesh_net::trust::NodeIdentity;
use mesh_proto::{ModelCard, NodeProfile, Ring};
use mesh_worker_core::{Failure, Lease, Offers, Ordered};
use tokio::runtime::Handle;
use tokio::sync::mpsc;

use super::accept::accept;
use super::carrier;
use super::context::{Net, Rings};
use super::deployment::Deployment;
use super::offer;
use super::ring_model::RingModel;
use crate::codec::message;
use crate::config::Config;
use crate::error::WorkerError;
use crate::lock::lock;
use crate::models::{Models, ReplicaFiles};
use crate::peers::{self, Peers};

impl Rings {
    /// Opens those of `config.ring.models` that are files at hand and measures this machine. Blocks for as long as
    /// that takes.
    pub(crate) fn open(config: &Arc<Config>, models: Arc<Models>) -> (Arc<Self>, Vec<Failure>) {
        let (ring_models, profile, failures) = offer::measure(config);
        let offers = ring_models.iter().map(|held| held.offer.clone()).collect();
        let offers = Offers::new(offers, profile);
        models.core().with(|core| core.offers = offers);
        let rings = Rings::new(config.clone(), models, ring_models);
        (Arc::new(rings), failures)
    }

    /// Offers a model of the configuration that is at hand by now; returns the model with its name. Blocks for
    /// as long as measuring takes.
    pub(crate) fn add_file(&self, name: &str) -> Result<(String, Model), WorkerError> {
        let (ring_model, profile) = offer::measure_file(name, &self.config)?;
        self.add_ring_model(ring_model, profile)
    }

    pub(crate) fn models_held(&self) -> Vec<(String, Model)> {
        let ring_models = lock(&self.offered);
        let models = ring_models.iter();
        let models = models.map(|held| (held.card.name.clone(), Model::clone(&held.model)));
        models.collect()
    }

    pub(crate) fn has_ring_models(&self) -> bool {
        !self.core().with(|core| core.offers.is_empty())
    }

    /// Offers one more model, `name`, whose header lies at `path`; its layers are fetched when they are
    /// needed. Blocks for as long as measuring takes.
    pub(crate) fn add(
        &self,
        name: &str,
        path: &Path,
        files: &Arc<ReplicaFiles>,
    ) -> Result<(String, Model), WorkerError> {
        let (ring_model, profile) = offer::measure_stored(name, path, files, &self.config)?;
        self.add_ring_model(ring_model, profile)
    }

    fn add_ring_model(
        &self,
        ring_model: RingModel,
        profile: NodeProfile,
    ) -> Result<(String, Model), WorkerError> {
        let name = ring_model.card.name.clone();
        let model = Model::clone(&ring_model.model);
        let added = self.core().with(|core| {
            let added = core.offers.add(ring_model.offer.clone(), profile);
            if added {
                lock(&self.offered).push(Arc::new(ring_model));
            }
            added
        });
        if !added {
            return Err(WorkerError::SameName { name });
        }
        self.offer();
        Ok((name, model))
    }

    /// True if this worker offers anything, or will.
    pub(crate) fn is_offering(&self) -> bool {
        !self.config.ring.models.is_empty()
    }

    /// Listens for other workers, once there is an identity to show them. Gives the port the first time.
    pub(crate) fn listen(
        self: &Arc<Self>,
        identity: &NodeIdentity,
    ) -> Result<Option<u16>, WorkerError> {
        if self.net.get().is_some() || !(self.is_offering() || self.models.is_sharing()) {
            return Ok(None);
        }
        let listen = self.config.ring.listen;
        let failed = WorkerError::listen(listen, "udp", "ring.listen");
        let carrier = carrier::start().map_err(failed)?;
        let entered = carrier.enter();
        let listener = Listener::bind(listen, identity.clone(), None, LinkConfig::default())
            .map_err(|error| failed(std::io::Error::other(error.to_string())))?;
        drop(entered);
        let address = listener.local_addr().map_err(failed)?;
        tracing::info!(%address, "listening for other workers");
        let peers = Peers::new(identity.clone());
        self.models
            .listen(peers, &identity.node_id(), address.port());
        let _ = self.net.set(Net {
            address,
            peers: Peers::new(identity.clone()),
            carrier: carrier.clone(),
            refusals: listener.refusals().clone(),
        });
        // Models do not go through that thread: they would hold steps up.
        carrier.spawn(accept(self.clone(), listener, Handle::current()));
        Ok(Some(address.port()))
    }

    /// Peers that were turned away since the last call.
    pub(crate) fn refused(&self) -> Vec<Refused> {
        let net = self.net.get();
        net.map(|net| net.refusals.take()).unwrap_or_default()
    }

    /// There is a link to the head, which is `rtt` away and has heard that these models are served. It gets the
    /// offer, and from now on reports on rings through `outbox`.
    pub(crate) fn linked(
        &self,
        outbox: mpsc::UnboundedSender<Message>,
        rtt: Duration,
        cards: Vec<ModelCard>,
    ) -> Lease {
        self.set_head(Some(outbox));
        let lease = self.core().change(|core| {
            core.offers
                .head_path(peers::path("", rtt, 0.0).rtt_us, None);
            core.head_linked(cards)
        });
        self.offer();
        lease
    }

    /// Sends the offer again if the paths to others have changed.
    pub(super) fn offer(&self) {
        let Some(net) = self.net.get() else {
            return;
        };
        let (port, paths) = (net.address.port(), net.peers.paths());
        let offer = self.core().with(|core| core.offers.poll(port, paths));
        if let Some(offer) = offer {
            self.tell_head(message(MsgType::OFFER, &offer));
        }
    }

    pub(crate) fn unlinked(&self) {
        self.set_head(None);
    }

    /// The head names the members of a ring.
    pub(crate) fn configure(self: &Arc<Self>, lease: Lease, ring: Ring) {
        let (model, fingerprint) = (ring.model.clone(), ring.fingerprint.clone());
        let (now, core) = (Instant::now(), self.core());
        let ordered = core.change(|core| core.deploy(lease, ring, now));
        let of_model = |ring_model: &&Arc<RingModel>| {
            ring_model.card.name == model && ring_model.card.fingerprint == fingerprint
        };
        if let Ordered::Begins(number) = ordered
            && let Some(net) = self.net.get()
            && let Some(ring_model) = lock(&self.offered).iter().find(of_model)
        {
            Deployment::spawn(
                &net.carrier,
                net.peers.clone(),
                self.clone(),
                ring_model.clone(),
                number,
            );
        }
    }

    /// Resolves when this worker, which drains, may leave.
    pub(crate) async fn emptied(&self) {
        let begun = Instant::now();
        let mut changes = self.core().changes();
        loop {
            let now = Instant::now();
            let core = self.core();
            if core.with(|core| core.deployments.may_leave(begun, now)) {
                return;
            }
            changes.next_until(now + DRAIN_LOOK).await;
        }
    }

    /// True if no part here has computed anything for a while.
    pub(super) fn is_idle(&self) -> bool {
        self.core()
            .with(|core| core.deployments.is_idle(Instant::now()))
    }

    /// Rings with others that have a part here.
    pub(crate) fn shared(&self) -> usize {
        self.core().with(|core| core.deployments.shared())
    }
}

/// Interval at which a drain looks whether it may leave.
const DRAIN_LOOK: Duration = Duration::from_millis(750);
