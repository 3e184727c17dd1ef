//! What searches, downloads and the service for other workers share.

use std::sync::{Arc, OnceLock};

use dcf::{Message, MsgType};
use mesh_base::places::Room;
use mesh_net::quic::timestamp_us;
use mesh_service::metrics::prometheus_client::metrics::counter::Counter;
use mesh_store::{Pin, Store};
use tokio::runtime::Handle;
use tokio::sync::Semaphore;

use super::files::ReplicaFiles;
use crate::config::Config;
use crate::core::CoreHandle;
use crate::peers::Peers;

/// What searches, downloads and the service for other workers share.
pub(super) struct Context {
    pub(super) config: Arc<Config>,
    pub(super) core: CoreHandle,
    /// Runtime of the downloads, whichever thread asks for them: a ring's own thread has other work.
    pub(super) runtime: Handle,
    /// None if nothing that this worker serves comes from it.
    pub(super) store: Option<Store>,
    /// Links to other workers, once there is an identity to show them.
    pub(super) peers: OnceLock<Peers>,
    /// Pieces that are read for others at once.
    pub(super) reading: Semaphore,
    /// Streams of other workers, by their ids, that get pieces or a manifest.
    pub(super) takers: Room<String>,
    pub(super) counters: Counters,
}

/// Bytes and faults, counted.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) from_peers: Counter,
    pub(super) from_origin: Counter,
    pub(super) sent: Counter,
    pub(super) bad: Counter,
}

impl Context {
    /// Keeps a model from being evicted.
    pub(super) fn pin(&self, files: &ReplicaFiles) -> Option<Pin> {
        let pinned = self.store.as_ref()?.pin(&files.map().fingerprint());
        pinned
            .inspect_err(
                |error| tracing::warn!(%error, "the model may be evicted while it is loaded"),
            )
            .ok()
    }
}

/// A message with this body.
pub(super) fn message(kind: MsgType, body: &impl prost::Message) -> Message {
    Message::new(kind, 0, timestamp_us(), body.encode_to_vec())
}
