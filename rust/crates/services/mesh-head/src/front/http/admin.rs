//! Endpoints that show the mesh, and those for administrators.

use std::time::Instant;

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::StatusCode;
use mesh_control::registry::{ServedModel, Service, Worker};
use mesh_control::tracker::PinError;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::error::ApiError;
use super::models::kind_name;
use super::state::Api;

/// `GET /v1/mesh`: the registry as JSON.
pub(super) async fn show(State(api): State<Api>) -> Json<Value> {
    let mesh = &api.mesh;
    let now = Instant::now();
    let (queued, running) = mesh.in_flight();
    let round_trip = |worker: &Worker| {
        mesh.link(worker.id)
            .map(|link| link.rtt().as_secs_f64() * 1e3)
    };
    let (workers, rings, quarantined) = mesh.with_rings(|rings, registry| {
        let workers = registry.iter().map(|worker| {
            let node = worker.node_id().unwrap_or_default();
            let paths = json!(rings.paths(node));
            let (holdings, offers) = (rings.holdings(node), rings.has_offer(node));
            let out = registry.why_out(node, now);
            let models = worker.models.iter();
            let why_not = models.map(|model| registry.why_not(worker, model, now));
            let why_not: Vec<Option<String>> = why_not.collect();
            let bars = |model: &ServedModel| {
                model.proven && registry.service(worker, model, now) == Service::Out
            };
            let held = worker.models.iter().any(bars);
            (
                worker.clone(),
                holdings,
                offers,
                paths,
                (out, held, why_not),
            )
        });
        let workers: Vec<_> = workers.collect();
        let recoveries = rings.recoveries().map(|recovery| {
            let mut shown = json!(recovery);
            let ago = recovery.at().map(|at| now.saturating_duration_since(at));
            shown["seconds_ago"] = json!(ago.map(|ago| ago.as_secs_f64()));
            shown
        });
        let rings = json!({
            "rings": rings.view(now),
            "recoveries": recoveries.collect::<Vec<_>>(),
            "unformed": rings.unformed(),
            "drained": rings.drained(),
        });
        (workers, rings, registry.reputation.view(now))
    });
    let workers: Vec<Value> = workers
        .into_iter()
        .map(|(worker, holdings, offers, paths, (out, held, why_not))| {
            let mut shown = describe(&worker, round_trip(&worker), offers, now);
            // It may answer and get no requests all the same.
            let barred = why_not.iter().all(Option::is_some) && !why_not.is_empty();
            match (&out, shown["state"].as_str()) {
                (Some(_), _) => shown["state"] = json!("quarantined"),
                (None, Some("ready")) if barred => {
                    shown["state"] = json!(if held { "held" } else { "joining" });
                }
                _ => {}
            }
            let reason = out.or_else(|| why_not.iter().flatten().next().cloned());
            shown["not_used"] = json!(reason);
            for (model, why) in shown["models"]
                .as_array_mut()
                .into_iter()
                .flatten()
                .zip(why_not)
            {
                model["not_used"] = json!(why);
            }
            shown["holds"] = json!(holdings);
            shown["paths"] = paths;
            shown
        })
        .collect();
    let unready = mesh.health.unready_reason();
    Json(json!({
        "mesh": mesh.config.mesh_name,
        "version": env!("CARGO_PKG_VERSION"),
        "ready": unready.is_none(),
        "reason": unready,
        "uptime_seconds": mesh.running_since.elapsed().as_secs_f64(),
        "draining": mesh.shutdown.is_draining(),
        "requests": {
            "queued": queued,
            "queue_limit": mesh.config.queue_limit,
            "running": running,
            "reruns": mesh.metrics.reruns.get(),
        },
        "tokens": {
            "generated": mesh.metrics.tokens.get(),
            "prompt": mesh.metrics.prompt_tokens.get(),
            "cached": mesh.metrics.cached_tokens.get(),
        },
        "workers": workers,
        "models": mesh.tracked_models(),
        "rings": rings["rings"],
        "recoveries": rings["recoveries"],
        "unformed": rings["unformed"],
        "drained": rings["drained"],
        "quarantined": quarantined,
        "duplicates": mesh.duplicates(),
        "name_conflicts": mesh.alarms(),
        "warnings": mesh.warnings(),
    }))
}

/// `GET /v1/mesh/pins`: the pins of model names in this mesh, and names that several models claim.
pub(super) async fn pins(State(api): State<Api>) -> Json<Value> {
    let pins = api.mesh.pins();
    Json(json!({ "pins": pins, "name_conflicts": api.mesh.alarms() }))
}

/// `POST /v1/mesh/pins`: pins a `name` to the model with this `fingerprint`; without one, releases the pin.
pub(super) async fn pin(State(api): State<Api>, body: Bytes) -> Result<Json<Value>, ApiError> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Ask {
        name: String,
        #[serde(default)]
        fingerprint: Option<String>,
    }
    let ask: Ask = read(&body)?;
    let decided = api.mesh.decide_pin(&ask.name, ask.fingerprint.as_deref());
    decided.map_err(|error| {
        let status = match error {
            PinError::Unknown(_) | PinError::TooMany => StatusCode::CONFLICT,
            _ => StatusCode::BAD_REQUEST,
        };
        ApiError::new(status, "invalid_value", error.to_string())
    })?;
    Ok(Json(
        json!({ "name": ask.name, "fingerprint": ask.fingerprint }),
    ))
}

/// A body in JSON; an empty one is an empty object.
pub(super) fn read<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Result<T, ApiError> {
    let body = if body.trim_ascii().is_empty() {
        b"{}"
    } else {
        body
    };
    serde_json::from_slice(body).map_err(|error| {
        ApiError::new(
            StatusCode::BAD_REQUEST,
            "invalid_value",
            format!("the body is not what is expected here: {error}"),
        )
    })
}

fn describe(worker: &Worker, round_trip_ms: Option<f64>, offers: bool, now: Instant) -> Value {
    #[derive(Serialize)]
    struct Model<'a> {
        name: &'a str,
        architecture: &'a str,
        quantization: &'a str,
        fingerprint: &'a str,
        kind: &'static str,
        context: u32,
        slots: u32,
        file_bytes: u64,
        layers: [u32; 2],
        ring: Option<String>,
        decode_tokens_per_second: f64,
        prefill_tokens_per_second: f64,
    }
    let models: Vec<Model<'_>> = worker
        .models
        .iter()
        .map(|model| Model {
            name: &model.card.name,
            architecture: &model.card.architecture,
            quantization: &model.card.quantization,
            fingerprint: &model.card.fingerprint,
            kind: kind_name(&model.card),
            context: model.card.context,
            slots: model.card.slots,
            file_bytes: model.card.file_bytes,
            layers: [model.card.layer_start, model.card.layer_end],
            ring: model.ring.map(|ring| format!("{ring:016x}")),
            decode_tokens_per_second: model.decode_tps,
            prefill_tokens_per_second: model.prefill_tps,
        })
        .collect();
    // Workers that hold only parts of models have nothing to prove by themselves.
    let only_parts = worker.models.is_empty() && offers;
    let counted_on = !worker.models.is_empty() && worker.models.iter().all(|m| m.answers(now));
    let answers = worker.proven || counted_on || !worker.has_identity() || only_parts;
    let state = match (worker.draining, answers) {
        (true, _) => "draining",
        (false, true) => "ready",
        (false, false) => "joining",
    };
    let ago = |then: Instant| now.saturating_duration_since(then).as_secs_f64();
    json!({
        "id": worker.id.0,
        "name": worker.name,
        "kind": worker.kind(),
        "state": state,
        "node_id": worker.node_id(),
        "address": worker.address,
        "version": worker.version,
        "models": models,
        "reserved_for": worker.reserved_for,
        "running": worker.load.running,
        "queued": worker.load.queued,
        "assigned": worker.assigned,
        "kv_tokens_used": worker.load.kv_tokens_used,
        "kv_tokens_total": worker.load.kv_tokens_total,
        "resident_bytes": worker.load.resident_bytes,
        "completed": worker.completed,
        "failed": worker.failed,
        "connected_seconds": ago(worker.joined),
        "last_seen_seconds": ago(worker.last_seen),
        "last_success_seconds": worker.last_success.map(ago),
        "round_trip_ms": round_trip_ms,
        "clock_offset_seconds": worker.clock_offset,
    })
}
