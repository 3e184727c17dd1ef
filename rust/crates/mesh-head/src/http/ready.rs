//! `/ready`: what the service's own answer does not know about models.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Query, Request, State};
use axum::http::StatusCode;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::json;

use crate::mesh::Mesh;

#[derive(Deserialize)]
pub(super) struct Asked {
    model: Option<String>,
}

/// `GET /ready?model=NAME` answers for one model. Without a name the mesh is ready if any model answers, and rings that do not
/// serve are named all the same.
pub(super) async fn of_model(
    State(mesh): State<Arc<Mesh>>,
    query: Result<Query<Asked>, axum::extract::rejection::QueryRejection>,
    request: Request,
    next: Next,
) -> Response {
    if request.uri().path() != "/ready" {
        return next.run(request).await;
    }
    let model = query.ok().and_then(|Query(asked)| asked.model);
    let model = model.filter(|name| !name.is_empty());
    match mesh.ready(model.as_deref()) {
        Ok(()) => {
            let idle = mesh.with_rings(|rings, _| rings.not_serving());
            let mut body = json!({ "status": "ready" });
            if model.is_none() && !idle.is_empty() {
                let texts: Vec<String> = idle.into_iter().map(|(_, text)| text).collect();
                body["not_serving"] = json!(texts);
            }
            Json(body).into_response()
        }
        Err(reason) => (
            StatusCode::SERVICE_UNAVAILABLE,
            Json(json!({ "status": "unready", "reason": reason })),
        )
            .into_response(),
    }
}
