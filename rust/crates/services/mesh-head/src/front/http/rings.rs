//! Endpoints for rings: look at a plan, drain a worker, rebalance.

use std::time::Instant;

use arcanum_profiler::explain;
use axum::Json;
use axum::extract::{Query, State};
use mesh_api::{
    Code, DrainProgress, PlanResponse, RebalanceRequest, RebalanceResponse, RingComparison,
    RingLayout, RingPlan, WorkerRequest,
};
use mesh_control::registry::{Registry, Worker, WorkerId};
use mesh_control::rings::Rings;
use mesh_control::rings::drain::DrainRefusal;
use mesh_control::rings::plan::NoPlan;
use mesh_control::rings::rebalance::Comparison;
use serde::Deserialize;
use serde_json::json;

use super::admin::read;
use super::error::ApiError;
use super::intake::Received;
use super::state::Api;

#[derive(Deserialize)]
pub(super) struct PlanAsked {
    #[serde(default)]
    model: String,
}

/// `GET /v1/mesh/plan?model=NAME`: the ring that would be formed now, without forming it.
pub(super) async fn plan(
    State(api): State<Api>,
    asked: Result<Query<PlanAsked>, axum::extract::rejection::QueryRejection>,
) -> Result<Json<PlanResponse>, ApiError> {
    let model = asked.map(|Query(asked)| asked.model).unwrap_or_default();
    if model.is_empty() {
        let text = "name the model: /v1/mesh/plan?model=NAME";
        return Err(ApiError::new(Code::InvalidValue, text));
    }
    let plan = |rings: &Rings, _: &Registry| rings.plan(&model, Instant::now());
    let planned = api.mesh.with_rings(plan);
    let planned = planned.map_err(|error| {
        let code = match &error {
            NoPlan::NotOffered { .. } => Code::ModelNotFound,
            NoPlan::Place(_) => Code::NoPlan,
        };
        ApiError::new(code, error.to_string())
    })?;
    Ok(Json(PlanResponse {
        model,
        context: planned.context,
        text: explain(&planned.plan, &planned.names).to_string(),
        names: planned.names,
        plan: json!(planned.plan),
    }))
}

/// `POST /v1/mesh/drain`: the worker that `worker` names (by name or node id) gets nothing new, and hands
/// over its parts of rings.
pub(super) async fn drain(
    State(api): State<Api>,
    body: Received,
) -> Result<Json<DrainProgress>, ApiError> {
    let WorkerRequest { worker: name } = read(&api, body)?;
    let drained: Result<_, ApiError> = api.mesh.change_rings(|rings, registry, now| {
        let (id, node) = find(registry, &name)?;
        if let Some(node) = &node {
            rings.drain(node, now).map_err(refused)?;
        }
        if let Some(worker) = registry.get_mut(id) {
            (worker.drained, worker.draining) = (true, true);
        }
        Ok((Some(id), node))
    });
    let (id, node) = drained?;
    api.mesh
        .audit
        .drained(node.as_deref().unwrap_or_default(), &name, "drained");
    tracing::info!(worker = name, "worker drained by an operator");
    keep_drains(&api).await?;
    Ok(Json(progress(&api, id, node.as_deref())))
}

/// `POST /v1/mesh/undrain`: ends that.
pub(super) async fn undrain(
    State(api): State<Api>,
    body: Received,
) -> Result<Json<DrainProgress>, ApiError> {
    let WorkerRequest { worker: name } = read(&api, body)?;
    let undrained: Result<_, ApiError> = api.mesh.change_rings(|rings, registry, now| {
        let (id, node) = match find(registry, &name) {
            Ok((id, node)) => (Some(id), node),
            // It may have been switched off for good.
            Err(missing) => (None, Some(drained(rings, &name).ok_or(missing)?)),
        };
        if let Some(node) = &node {
            rings.undrain(node, now);
        }
        if let Some(worker) = id.and_then(|id| registry.get_mut(id)) {
            (worker.drained, worker.draining) = (false, worker.load.draining);
        }
        Ok((id, node))
    });
    let (id, node) = undrained?;
    api.mesh
        .audit
        .drained(node.as_deref().unwrap_or_default(), &name, "undrained");
    tracing::info!(worker = name, "worker undrained by an operator");
    keep_drains(&api).await?;
    Ok(Json(progress(&api, id, node.as_deref())))
}

async fn keep_drains(api: &Api) -> Result<(), ApiError> {
    api.mesh.keep_drains().await.map_err(|error| {
        let text = format!(
            "done, but it will be forgotten when the head starts again: {error}; make room or give the head its \
             directory, and ask again"
        );
        ApiError::new(Code::DrainNotKept, text)
    })
}

/// `POST /v1/mesh/rebalance`: compares rings with fresh plans and replaces those that are clearly worse. The
/// body may hold `model` and `dry_run`.
pub(super) async fn rebalance(
    State(api): State<Api>,
    body: Received,
) -> Result<Json<RebalanceResponse>, ApiError> {
    let asked: RebalanceRequest = read(&api, body)?;
    let compared = api
        .mesh
        .change_rings(|rings, _, now| rings.rebalance(asked.model.as_deref(), asked.dry_run, now));
    let compared = compared.map_err(|reason| ApiError::new(Code::CannotRebalance, reason))?;
    Ok(Json(RebalanceResponse {
        dry_run: asked.dry_run,
        rings: compared.into_iter().map(show).collect(),
    }))
}

fn show(compared: Comparison) -> RingComparison {
    RingComparison {
        model: compared.model,
        old: RingLayout {
            layout: compared.old,
            token_ms: compared.old_token_us / 1e3,
            tokens_per_second: compared.old_tokens_per_second,
        },
        new: RingPlan {
            token_ms: compared.new.token_us / 1e3,
            tokens_per_second: compared.new.tokens_per_second,
            text: explain(&compared.new, &compared.names).to_string(),
            plan: json!(compared.new),
        },
        gain: compared.gain,
        verdict: compared.verdict,
    }
}

/// The one worker of that name or node id.
fn find(registry: &Registry, name: &str) -> Result<(WorkerId, Option<String>), ApiError> {
    let entry = |worker: &Worker| (worker.id, worker.node_id().map(str::to_owned));
    if let Some(worker) = registry.of_node(name) {
        return Ok(entry(worker));
    }
    let mut named = registry.iter().filter(|worker| worker.name == name);
    match (named.next(), named.next()) {
        (Some(worker), None) => Ok(entry(worker)),
        (Some(_), Some(_)) => {
            let text = format!(
                "several workers are called {name:?}: give a node id, GET /v1/mesh lists them"
            );
            Err(ApiError::new(Code::AmbiguousWorker, text))
        }
        (None, _) => {
            let text = format!("no worker is called {name:?}; GET /v1/mesh lists them");
            Err(ApiError::new(Code::WorkerNotFound, text))
        }
    }
}

/// The one drained worker of that name or node id, connected or not.
fn drained(rings: &Rings, name: &str) -> Option<String> {
    let drained = rings.drained();
    if drained.contains_key(name) {
        return Some(name.to_owned());
    }
    let mut named = drained.into_iter().filter(|(_, known)| known == name);
    match (named.next(), named.next()) {
        (Some((node, _)), None) => Some(node),
        _ => None,
    }
}

fn refused(refusal: DrainRefusal) -> ApiError {
    let code = match &refusal {
        DrainRefusal::Unknown(_) => Code::WorkerNotFound,
        DrainRefusal::NoRoom { .. } => Code::NoRoom,
    };
    ApiError::new(code, refusal.to_string())
}

/// The parts and requests that a worker still has.
fn progress(api: &Api, id: Option<WorkerId>, node: Option<&str>) -> DrainProgress {
    api.mesh.with_rings(|rings, registry| {
        let worker = id.and_then(|id| registry.get(id));
        DrainProgress {
            worker: worker.map(|worker| worker.name.clone()),
            node_id: node.map(str::to_owned),
            draining: worker.is_some_and(|worker| worker.draining),
            assigned: worker.map_or(0, |worker| worker.assigned),
            holds: rings.holdings(node.unwrap_or_default()),
        }
    })
}
