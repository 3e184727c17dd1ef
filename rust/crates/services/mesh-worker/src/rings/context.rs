//! What the tasks of rings share: the models that rings serve from here, and the way to the head.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use dcf::{Message, MsgType};
use mesh_engine::EngineHandle;
use mesh_model::Model;
use mesh_proto::{ModelCard, RingState};
use tokio::sync::mpsc;

use super::part::message;
use crate::config::Config;
use crate::core::CoreHandle;
use crate::models::Models;

/// What the tasks of rings share.
pub(super) struct Context {
    pub(super) config: Arc<Config>,
    pub(super) models: Arc<Models>,
    served: Mutex<Vec<Served>>,
    /// To the head, while there is a link to it.
    head: Mutex<Option<mpsc::UnboundedSender<Message>>>,
}

/// A model that a ring with its driver here serves.
pub(super) struct Served {
    pub(super) deployment: u64,
    pub(super) model: Model,
    pub(super) engine: EngineHandle,
    pub(super) card: ModelCard,
}

impl Context {
    pub(super) fn new(config: Arc<Config>, models: Arc<Models>) -> Arc<Self> {
        Arc::new(Context {
            config,
            models,
            served: Mutex::default(),
            head: Mutex::default(),
        })
    }

    pub(super) fn core(&self) -> &CoreHandle {
        self.models.core()
    }

    /// The model called `name` and its engine, if a ring serves it from here; the first one if there is no
    /// name.
    pub(super) fn find(&self, name: &str) -> Option<(Model, EngineHandle)> {
        let served = lock(&self.served);
        let of_name = |served: &&Served| name.is_empty() || served.card.name == name;
        let found = served.iter().find(of_name)?;
        Some((found.model.clone(), found.engine.clone()))
    }

    /// The engines of all that are served, each with its model's name.
    pub(super) fn engines(&self) -> Vec<(String, EngineHandle)> {
        let served = lock(&self.served);
        let engines = served.iter();
        engines
            .map(|served| (served.card.name.clone(), served.engine.clone()))
            .collect()
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

/// Values behind these mutexes are replaced as a whole, so a panic elsewhere leaves them sound.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
