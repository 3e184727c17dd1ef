//! Endpoints that show the mesh, and those for administrators.

use std::time::Instant;

use axum::extract::State;
use axum::http::StatusCode;
use axum::{Extension, Json};
use mesh_api::{
    Code, DeviceSplit, DuplicateIdentity, Fleet, Gossip, Machine, Mesh, PinDecision, PinList,
    RequestCounts, ServedModel, Sighting, Spread, TokenCounts,
};
use mesh_control::duplicates::{self, Duplicate};
use mesh_control::registry::{self, Registry, Service, Worker};
use mesh_control::rings::Rings;
use mesh_control::tracker::PinError;
use mesh_curtain::Need;
use mesh_gossip::{MemberState, Range};
use serde::de::DeserializeOwned;

use super::error::ApiError;
use super::intake::{self, Received};
use super::keys::Client;
use super::models::kind_name;
use super::state::Api;
use crate::mesh::GossipView;

/// `GET /v1/mesh`: the registry, the rings and the shared models.
pub(super) async fn show(
    State(api): State<Api>,
    Extension(client): Extension<Client>,
) -> Result<Json<Mesh>, ApiError> {
    client.papers.require(Need::Overview)?;
    let mesh = &api.mesh;
    let now = Instant::now();
    let (queued, running) = mesh.in_flight();
    let mut shown = mesh.with_rings(|rings, registry| Mesh {
        workers: registry
            .iter()
            .map(|worker| describe(worker, rings, registry, now))
            .collect(),
        rings: rings.view(now),
        recoveries: rings.recoveries(now).collect(),
        unformed: rings.unformed(),
        drained: rings.drained(),
        quarantined: registry.reputation.view(now),
        ..Mesh::default()
    });
    for worker in &mut shown.workers {
        let link = mesh.link(registry::WorkerId(worker.id));
        worker.round_trip_ms = link.map(|link| link.rtt().as_secs_f64() * 1e3);
    }
    let unready = mesh.health.unready_reason();
    Ok(Json(Mesh {
        mesh: mesh.config.mesh_name.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        ready: unready.is_none(),
        reason: unready,
        uptime_seconds: mesh.running_since.elapsed().as_secs_f64(),
        draining: mesh.shutdown.is_draining(),
        requests: RequestCounts {
            queued,
            queue_limit: mesh.config.queue_limit,
            running,
            reruns: mesh.metrics.reruns.get(),
        },
        tokens: TokenCounts {
            generated: mesh.metrics.tokens.get(),
            prompt: mesh.metrics.prompt_tokens.get(),
            cached: mesh.metrics.cached_tokens.get(),
        },
        models: mesh.tracked_models(),
        duplicates: mesh.duplicates().iter().map(duplicate).collect(),
        name_conflicts: mesh.alarms(),
        warnings: mesh.warnings(),
        gossip: mesh.gossip.view().map(|view| gossip(&view)),
        ..shown
    }))
}

fn gossip(view: &GossipView) -> Gossip {
    let count = |state| {
        view.members
            .iter()
            .filter(|member| member.state == state)
            .count()
    };
    let fleet = view.fleet;
    let spread = |range: Range| Spread {
        least: range.least,
        mean: range.mean,
        most: range.most,
    };
    let named = |sighting: &mesh_gossip::Sighting| Sighting {
        reporter: sighting.origin.to_string(),
        reporter_name: view
            .members
            .iter()
            .find(|member| member.node == sighting.origin)
            .map(|member| member.name.clone()),
        kind: sighting.kind.clone(),
        subject: sighting.subject.clone(),
        detail: sighting.detail.clone(),
        seen: sighting.seen,
    };
    Gossip {
        alive: count(MemberState::Alive),
        suspect: count(MemberState::Suspect),
        down: count(MemberState::Down),
        threats: view.threats,
        sightings: view.sightings.iter().map(named).collect(),
        records: view.records,
        refused: view.counts.all_refused(),
        fleet: Fleet {
            nodes: fleet.nodes,
            load_percent: fleet.load_percent.map(spread),
            temperature_celsius: fleet.temperature_celsius.map(spread),
            memory_available: fleet.memory_available,
            memory_total: fleet.memory_total,
            disk_available: fleet.disk_available,
            disk_total: fleet.disk_total,
            shortest_uptime_seconds: fleet.shortest_uptime_seconds,
            on_battery: fleet.on_battery,
            lowest_battery_percent: fleet.lowest_battery_percent,
        },
    }
}

fn duplicate(duplicate: &Duplicate) -> DuplicateIdentity {
    let machine = |machine: &duplicates::Machine| Machine {
        address: machine.address.to_string(),
        host: machine.host.clone(),
    };
    DuplicateIdentity {
        worker: duplicate.worker.clone(),
        kept: machine(&duplicate.kept),
        refused: machine(&duplicate.refused),
        times: duplicate.times,
    }
}

/// `GET /v1/mesh/pins`: the pins of model names in this mesh, and names that several models claim.
pub(super) async fn pins(State(api): State<Api>) -> Json<PinList> {
    Json(PinList {
        pins: api.mesh.pins(),
        name_conflicts: api.mesh.alarms(),
    })
}

/// `POST /v1/mesh/pins`: pins a `name` to the model with this `fingerprint`; without one, releases the pin.
pub(super) async fn pin(
    State(api): State<Api>,
    body: Received,
) -> Result<Json<PinDecision>, ApiError> {
    let decision: PinDecision = read(&api, body)?;
    let fingerprint = decision.fingerprint.as_deref();
    let decided = api.mesh.decide_pin(&decision.name, fingerprint);
    decided.map_err(|error| ApiError {
        status: match error {
            PinError::Unknown(_) | PinError::TooMany => StatusCode::CONFLICT,
            _ => StatusCode::BAD_REQUEST,
        },
        ..ApiError::new(Code::InvalidValue, error.to_string())
    })?;
    Ok(Json(decision))
}

/// A body in JSON; an empty one is an empty object.
pub(super) fn read<T: DeserializeOwned>(api: &Api, body: Received) -> Result<T, ApiError> {
    let body = intake::received(api, body)?;
    let body: &[u8] = if body.trim_ascii().is_empty() {
        b"{}"
    } else {
        &body
    };
    serde_json::from_slice(body).map_err(|error| {
        let text = format!("the body is not what is expected here: {error}");
        ApiError::new(Code::InvalidValue, text)
    })
}

/// A worker, without the round trip of its link.
fn describe(worker: &Worker, rings: &Rings, registry: &Registry, now: Instant) -> mesh_api::Worker {
    let node = worker.node_id().unwrap_or_default();
    let model = |model: &registry::ServedModel| ServedModel {
        name: model.card.name.clone(),
        architecture: model.card.architecture.clone(),
        quantization: model.card.quantization.clone(),
        fingerprint: model.card.fingerprint.clone(),
        kind: kind_name(&model.card).into(),
        context: model.card.context,
        slots: model.card.slots,
        file_bytes: model.card.file_bytes,
        layers: [model.card.layer_start, model.card.layer_end],
        ring: model.ring.map(|ring| format!("{ring:016x}")),
        decode_tokens_per_second: model.decode_tps,
        prefill_tokens_per_second: model.prefill_tps,
        not_used: registry.why_not(worker, model, now),
        backend: Some(model.card.backend.clone()).filter(|backend| !backend.is_empty()),
        split: model.card.split.as_ref().map(|split| DeviceSplit {
            device_layers: split.device_layers,
            expert_layers: split.expert_layers,
            cpu_layers: split.cpu_layers,
            device_bytes: split.device_bytes,
            cpu_bytes: split.cpu_bytes,
        }),
    };
    let models: Vec<ServedModel> = worker.models.iter().map(model).collect();
    let out = registry.why_out(node, now);
    let not_used = || models.iter().find_map(|model| model.not_used.clone());
    let ago = |then: Instant| now.saturating_duration_since(then).as_secs_f64();
    mesh_api::Worker {
        id: worker.id.0,
        name: worker.name.clone(),
        kind: worker.kind().into(),
        state: match out {
            Some(_) => "quarantined",
            None => state(worker, &models, rings.has_offer(node), registry, now),
        }
        .into(),
        node_id: worker.node_id().map(str::to_owned),
        address: worker.address.to_string(),
        version: worker.version.clone(),
        reserved_for: worker.reserved_for.clone(),
        running: worker.load.running,
        queued: worker.load.queued,
        assigned: worker.assigned,
        kv_tokens_used: worker.load.kv_tokens_used,
        kv_tokens_total: worker.load.kv_tokens_total,
        resident_bytes: worker.load.resident_bytes,
        completed: worker.completed,
        failed: worker.failed,
        connected_seconds: ago(worker.joined),
        last_seen_seconds: ago(worker.last_seen),
        last_success_seconds: worker.last_success.map(ago),
        round_trip_ms: None,
        clock_offset_seconds: worker.clock_offset,
        not_used: out.or_else(not_used),
        holds: rings.holdings(node),
        paths: rings.paths(node),
        models,
    }
}

/// The state of a worker that is not in quarantine. `offers` is true if it offers to hold parts of models.
fn state(
    worker: &Worker,
    shown: &[ServedModel],
    offers: bool,
    registry: &Registry,
    now: Instant,
) -> &'static str {
    // Workers that hold only parts of models have nothing to prove by themselves.
    let only_parts = worker.models.is_empty() && offers;
    let counted_on = !worker.models.is_empty() && worker.models.iter().all(|m| m.answers(now));
    let answers = worker.proven || counted_on || !worker.has_identity() || only_parts;
    // It may answer and get no requests all the same.
    let barred = !shown.is_empty() && shown.iter().all(|model| model.not_used.is_some());
    let differs = |model: &registry::ServedModel| {
        model.proven && registry.service(worker, model, now) == Service::Out
    };
    match (worker.draining, answers) {
        (true, _) => "draining",
        (false, true) if barred && worker.models.iter().any(differs) => "held",
        (false, true) if barred => "joining",
        (false, true) => "ready",
        (false, false) => "joining",
    }
}
