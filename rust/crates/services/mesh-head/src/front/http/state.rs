//! State that the handlers share.

use std::sync::{Arc, Mutex};

use arcanum_attestor::Attestor;
use mesh_control::image_files::ImageFiles;
use mesh_net::trust::NodeIdentity;

use super::error::ApiError;
use super::hold::Hold;
use super::keys::{Client, ConcurrencyLimit, Keys, Pass};
use crate::mesh::Mesh;

#[derive(Clone)]
pub(super) struct Api {
    pub(super) mesh: Arc<Mesh>,
    pub(super) keys: Arc<Keys>,
    pub(super) authority: Arc<Attestor>,
    pub(super) own_id: Arc<str>,
    pub(super) identity: NodeIdentity,
    pub(super) concurrency: Arc<ConcurrencyLimit>,
    pub(super) images: Arc<Mutex<ImageFiles>>,
}

impl Api {
    /// Admits a request for `answers` answers.
    pub(super) fn enter(&self, client: &Client, answers: usize) -> Result<Pass, ApiError> {
        let pass = self.concurrency.enter(client, answers);
        pass.ok_or_else(|| ApiError::too_many(self.mesh.config.http.concurrent_requests))
    }

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
