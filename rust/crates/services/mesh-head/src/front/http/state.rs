//! State that the handlers share.

use std::sync::Arc;

use mesh_net::trust::Authority;

use super::hold::Hold;
use super::keys::{ConcurrencyLimit, Keys};
use crate::mesh::Mesh;

/// State that the handlers share.
#[derive(Clone)]
pub(super) struct Api {
    pub(super) mesh: Arc<Mesh>,
    pub(super) keys: Arc<Keys>,
    pub(super) authority: Arc<Authority>,
    /// The head's own node id.
    pub(super) own_id: Arc<str>,
    pub(super) concurrency: Arc<ConcurrencyLimit>,
}

impl Api {
    pub(super) fn hold(&self) -> Hold {
        let http = &self.mesh.config.http;
        Hold {
            after: http.early_headers,
            every: http.keep_alive,
        }
    }
}

/// The id of a request in the logs of all services.
#[derive(Clone)]
pub(super) struct RequestId(pub(super) String);
