//! `/ready` with the state of models, which the service's own answer lacks, and access to it and to
//! `/metrics`.

use std::sync::Arc;
use std::time::SystemTime;

use axum::Json;
use axum::extract::{Query, Request, State};
use axum::http::StatusCode;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use mesh_api::{Code, Readiness, paths};
use mesh_curtain::Need;
use serde::Deserialize;

use super::error::ApiError;
use super::keys::Keys;
use crate::config::Open;
use crate::mesh::Mesh;

#[derive(Deserialize)]
pub(super) struct Asked {
    model: Option<String>,
}

#[derive(Clone)]
pub(super) struct Told {
    pub(super) mesh: Arc<Mesh>,
    pub(super) keys: Keys,
}

impl Told {
    fn may_know(&self, what: Open, request: &Request) -> Result<(), ApiError> {
        if self.mesh.config.http.open.contains(&what) {
            return Ok(());
        }
        let text = "this needs an API key here, as `Authorization: Bearer <key>`; the operator can open it to all (http.open)";
        let admitted = self.keys.admit(request.headers(), SystemTime::now());
        let denied = |_| ApiError::new(Code::InvalidApiKey, text);
        admitted.map_err(denied)?.papers.require(Need::Overview)
    }
}

/// `GET /ready?model=NAME` answers for one model. Without a name the mesh is ready if any model answers, and
/// rings that do not serve are named all the same. A caller without the right to more gets the status alone.
pub(super) async fn of_model(
    State(told): State<Told>,
    query: Result<Query<Asked>, axum::extract::rejection::QueryRejection>,
    request: Request,
    next: Next,
) -> Response {
    if request.uri().path() == paths::METRICS
        && let Err(denied) = told.may_know(Open::Metrics, &request)
    {
        return denied.into_response();
    }
    if request.uri().path() != paths::READY {
        return next.run(request).await;
    }
    let mesh = &told.mesh;
    let model = query.ok().and_then(|Query(asked)| asked.model);
    let model = model.filter(|name| !name.is_empty());
    if let Err(denied) = told.may_know(Open::Ready, &request) {
        return match model {
            Some(_) => denied.into_response(),
            None => {
                let reason = mesh.ready(None).err().map(|_| None);
                readiness(reason, Vec::new())
            }
        };
    }
    match mesh.ready(model.as_deref()) {
        Ok(()) => {
            let idle = mesh.with_rings(|rings, _| rings.not_serving());
            let idle = idle.into_iter().filter(|_| model.is_none());
            readiness(None, idle.map(|(_, text)| text).collect())
        }
        Err(reason) => readiness(Some(Some(reason)), Vec::new()),
    }
}

/// The response of a mesh that is not ready for a reason, which the caller may know or not, or that is ready.
fn readiness(unready: Option<Option<String>>, not_serving: Vec<String>) -> Response {
    let (code, status) = match unready {
        None => (StatusCode::OK, "ready"),
        Some(_) => (StatusCode::SERVICE_UNAVAILABLE, "unready"),
    };
    let body = Readiness {
        status: status.to_owned(),
        reason: unready.flatten(),
        not_serving,
    };
    (code, Json(body)).into_response()
}
