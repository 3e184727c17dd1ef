//! What searches, downloads and the service for other workers share.

use std::fmt::Display;
use std::sync::{Arc, OnceLock};

use mesh_base::places::Room;
use mesh_service::metrics::prometheus_client::metrics::counter::Counter;
use mesh_store::{Pin, Store};
use mesh_worker_core::{Catalogue, Replica};
use tokio::runtime::Handle;
use tokio::sync::Semaphore;

use super::files::ReplicaFiles;
use crate::config::Config;
use crate::core::CoreHandle;
use crate::peers::Peers;

/// See the page of `models`.
pub(crate) struct Models {
    pub(super) config: Arc<Config>,
    pub(super) core: CoreHandle,
    /// Runtime of the downloads, whichever thread asks for them: a ring's own thread has other work.
    pub(super) runtime: Handle,
    /// `None` if nothing that this worker serves comes from it.
    pub(super) store: Option<Store>,
    /// Links to other workers, once there is an identity to show them.
    pub(super) peers: OnceLock<Peers>,
    /// Pieces that are read for others at once.
    pub(super) reading: Semaphore,
    /// Streams of other workers, by their ids, that get pieces or a manifest.
    pub(super) takers: Room<String>,
    pub(super) counters: Counters,
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) from_peers: Counter,
    pub(super) from_origin: Counter,
    pub(super) sent: Counter,
    pub(super) bad: Counter,
}

impl Models {
    pub(crate) fn pin(&self, files: &ReplicaFiles) -> Option<Pin> {
        let pinned = self.store.as_ref()?.pin(&files.map().fingerprint());
        let failed =
            |error: &_| tracing::warn!(%error, "the model may be evicted while it is loaded");
        pinned.inspect_err(failed).ok()
    }

    /// The files of the replica that `find` gives.
    pub(super) fn files_of(
        &self,
        find: impl FnOnce(&Catalogue) -> Option<&Replica>,
    ) -> Option<Arc<ReplicaFiles>> {
        let map = self
            .core
            .with(|core| Some(find(&core.catalogue)?.map().clone()))?;
        Some(ReplicaFiles::new(map, self.store.as_ref()?, &self.core))
    }
}

/// Does work that blocks. A panic is an error as well.
pub(super) async fn blocking<T, E>(
    work: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> Result<T, String>
where
    T: Send + 'static,
    E: Display + Send + 'static,
{
    let done = tokio::task::spawn_blocking(work).await;
    let done = done.map_err(|error| error.to_string())?;
    done.map_err(|error| error.to_string())
}
