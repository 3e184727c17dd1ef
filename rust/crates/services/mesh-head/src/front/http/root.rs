//! The mesh root: shown, rotated.

use std::time::{Duration, SystemTime};

use axum::Json;
use axum::extract::State;
use data_encoding::HEXLOWER;
use mesh_api::{Code, FormerRoot, Root, RotateRootRequest};
use mesh_net::trust::{MeshRoot, TrustError};

use super::admin::read;
use super::error::ApiError;
use super::intake::Received;
use super::state::Api;
use super::tokens::blocking;
use crate::roots;

/// `GET /v1/mesh/root`: the mesh root, and the former one while it is accepted.
pub(super) async fn show(State(api): State<Api>) -> Json<Root> {
    Json(shown(&api.authority.root()))
}

/// `POST /v1/mesh/root/rotate`: another root takes the place of the present one. The body may hold
/// `overlap_seconds`, for which both are accepted.
pub(super) async fn rotate(State(api): State<Api>, body: Received) -> Result<Json<Root>, ApiError> {
    let request: RotateRootRequest = read(&api, body)?;
    let configured = api.mesh.config.trust.root_overlap;
    let overlap = request
        .overlap_seconds
        .map_or(configured, Duration::from_secs);
    if !(SHORTEST_OVERLAP..=LONGEST_OVERLAP).contains(&overlap) {
        let text = format!(
            "'overlap_seconds' must be from {} to {}",
            SHORTEST_OVERLAP.as_secs(),
            LONGEST_OVERLAP.as_secs()
        );
        return Err(ApiError::new(Code::InvalidValue, text));
    }
    let now = SystemTime::now();
    let (authority, mesh, own) = (
        api.authority.clone(),
        api.mesh.clone(),
        api.identity.clone(),
    );
    // It does not end with the request that asked for it.
    let rotated = blocking(move || {
        let rotated = authority.rotate_root(now + overlap, now)?;
        let digest = HEXLOWER.encode(&rotated.sha256());
        mesh.audit.root(&digest, "rotated");
        // Later attempts follow where this one fails.
        if let Err(error) = roots::follow(&mesh, &authority, &own, now) {
            tracing::error!(%error, "the head has no certificate of the new root yet");
        }
        Ok(rotated)
    });
    let rotated = rotated.await?.map_err(|error: TrustError| match error {
        TrustError::NotRotated(text) => ApiError::new(Code::RotationUnderWay, text),
        error => ApiError::new(Code::NotKept, format!("the root is not rotated: {error}")),
    })?;
    Ok(Json(shown(&rotated)))
}

fn shown(root: &MeshRoot) -> Root {
    let former = root.former(SystemTime::now());
    Root {
        mesh: root.mesh().to_owned(),
        root: HEXLOWER.encode(&root.sha256()),
        former: former.map(|(digest, until)| FormerRoot {
            root: HEXLOWER.encode(&digest),
            accepted_until: until,
        }),
        intermediate_until: root.intermediate_until(),
    }
}

/// Nodes that are connected learn of it within seconds, and renew.
const SHORTEST_OVERLAP: Duration = Duration::from_secs(60);
const LONGEST_OVERLAP: Duration = Duration::from_secs(400 * 24 * 3600);
