//! The core behind its one lock, and the signal that something changed.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use mesh_net::quic::MsgStream;
use mesh_worker_core::{Catalogue, Core};
use tokio::sync::watch;

use crate::lock::lock;

#[derive(Clone)]
pub(crate) struct CoreHandle {
    core: Arc<Mutex<Core<MsgStream>>>,
    changes: watch::Sender<()>,
}

impl CoreHandle {
    pub(crate) fn new(catalogue: Catalogue) -> Self {
        CoreHandle {
            core: Arc::new(Mutex::new(Core::new(catalogue))),
            changes: watch::Sender::new(()),
        }
    }

    /// Reads, or takes in an event that only its own task waits for. The core neither blocks nor panics
    /// half-way through a change.
    pub(crate) fn with<T>(&self, look: impl FnOnce(&mut Core<MsgStream>) -> T) -> T {
        look(&mut lock(&self.core))
    }

    /// Takes in an event and wakes all that wait for changes.
    pub(crate) fn change<T>(&self, event: impl FnOnce(&mut Core<MsgStream>) -> T) -> T {
        let result = self.with(event);
        self.changes.send_replace(());
        result
    }

    /// Wakes at changes from now on.
    pub(crate) fn changes(&self) -> Changes {
        Changes(self.changes.subscribe())
    }
}

/// Changes of the core since the last wait.
pub(crate) struct Changes(watch::Receiver<()>);

impl Changes {
    pub(crate) async fn next(&mut self) {
        if self.0.changed().await.is_err() {
            // There is no core any more, and with it no change.
            std::future::pending().await
        }
    }

    /// The same, at `until` at the latest.
    pub(crate) async fn next_until(&mut self, until: Instant) {
        let _ = tokio::time::timeout_at(until.into(), self.next()).await;
    }
}
