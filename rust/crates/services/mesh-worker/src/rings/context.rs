//! What the tasks of rings share: the models that are offered and served here, and the ways to others.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, OnceLock};

use dcf::{Message, MsgType};
use mesh_engine::EngineHandle;
use mesh_net::quic::Refusals;
use mesh_proto::{ModelCard, RingState};
use tokio::runtime::Handle;
use tokio::sync::mpsc;

use super::ring_model::RingModel;
use crate::codec::{ModelEngine, message};
use crate::config::Config;
use crate::core::CoreHandle;
use crate::lock::lock;
use crate::models::Models;
use crate::peers::Peers;

/// See the page of `rings`.
pub(crate) struct Rings {
    pub(super) config: Arc<Config>,
    pub(super) models: Arc<Models>,
    /// The models that are offered.
    pub(super) offered: Mutex<Vec<Arc<RingModel>>>,
    /// Known once the worker has an identity.
    pub(super) net: OnceLock<Net>,
    served: Mutex<Vec<Served>>,
    /// To the head, while there is a link to it.
    head: Mutex<Option<mpsc::UnboundedSender<Message>>>,
}

/// What there is once the worker has an identity.
pub(super) struct Net {
    pub(super) address: SocketAddr,
    pub(super) peers: Peers,
    /// The thread that carries messages between workers.
    pub(super) carrier: Handle,
    /// Peers that are turned away.
    pub(super) refusals: Refusals,
}

/// A model that a ring with its driver here serves.
pub(super) struct Served {
    pub(super) deployment: u64,
    pub(super) model: ModelEngine,
    pub(super) card: ModelCard,
}

impl Rings {
    pub(super) fn new(config: Arc<Config>, models: Arc<Models>, offered: Vec<RingModel>) -> Self {
        Rings {
            config,
            models,
            offered: Mutex::new(offered.into_iter().map(Arc::new).collect()),
            net: OnceLock::new(),
            served: Mutex::default(),
            head: Mutex::default(),
        }
    }

    pub(super) fn core(&self) -> &CoreHandle {
        self.models.core()
    }

    /// The model called `name` and its engine, if a ring serves it from here; the first one if there is no
    /// name.
    pub(crate) fn find(&self, name: &str) -> Option<ModelEngine> {
        let served = lock(&self.served);
        let of_name = |served: &&Served| name.is_empty() || served.card.name == name;
        served.iter().find(of_name).map(|found| found.model.clone())
    }

    /// The engines of all that are served, each with its model's name.
    pub(crate) fn engines(&self) -> Vec<(String, EngineHandle)> {
        let served = lock(&self.served);
        let engines = served.iter();
        let engines = engines.map(|s| (s.card.name.clone(), s.model.engine.clone()));
        engines.collect()
    }

    pub(super) fn serve(&self, served: Served) {
        let mut all = lock(&self.served);
        all.retain(|other| other.deployment != served.deployment);
        all.push(served);
    }

    pub(super) fn withdraw(&self, deployment: u64) {
        lock(&self.served).retain(|served| served.deployment != deployment);
    }

    pub(super) fn report(&self, state: &RingState) {
        self.tell_head(message(MsgType::RING_STATE, state));
    }

    /// Sends the head a message, if there is a link to it.
    pub(super) fn tell_head(&self, message: Message) {
        if let Some(head) = &*lock(&self.head) {
            let _ = head.send(message);
        }
    }

    /// From now on messages for the head go there, or nowhere.
    pub(super) fn set_head(&self, outbox: Option<mpsc::UnboundedSender<Message>>) {
        *lock(&self.head) = outbox;
    }
}
