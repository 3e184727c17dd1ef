//! Views of rings for operators.

use std::time::Instant;

use mesh_api::{LeftOut, Path, Recovery, RingStage, StageWorker, Unformed};
use mesh_proto::{ModelCard, PartPhase};

use super::ring::{Replica, Ring, hex};
use super::{Prospect, Rings};

impl Rings {
    /// Views of all rings.
    pub fn view(&self, now: Instant) -> Vec<mesh_api::Ring> {
        let rings = self.rings.values();
        rings.map(|ring| self.show(ring, now)).collect()
    }

    /// Models that could not be planned, and why.
    pub fn unformed(&self) -> Vec<Unformed> {
        let impossible = |(model, prospect): (String, Prospect)| match prospect {
            Prospect::Impossible(reason) => Some(Unformed { model, reason }),
            Prospect::Coming => None,
        };
        let prospects = self.prospects().into_iter();
        prospects.filter_map(impossible).collect()
    }

    /// The models of all rings, whether they serve at the moment or not.
    pub fn cards(&self) -> Vec<ModelCard> {
        let live = self.rings.values().filter(|ring| ring.retiring.is_none());
        live.map(|ring| ring.card(None)).collect()
    }

    /// The last changes of members that drivers reported, oldest first.
    pub fn recoveries(&self, now: Instant) -> impl Iterator<Item = Recovery> {
        let shown = move |(recovery, at): &(Recovery, Instant)| Recovery {
            seconds_ago: Some(now.saturating_duration_since(*at).as_secs_f64()),
            ..recovery.clone()
        };
        self.recoveries.iter().map(shown)
    }

    /// Models whose ring does not serve, each with the reason as a sentence.
    pub fn not_serving(&self) -> Vec<(String, String)> {
        let idle = self.rings.values().filter(|ring| {
            ring.serving_since.is_none() && ring.retiring.is_none() && ring.replaces.is_none()
        });
        idle.map(|ring| {
            let ready = ring.stages.iter().filter(|stage| stage.member.is_ready());
            let ready = ready.count();
            let text = format!(
                "the ring of {} is {} ({ready} of {} stages are loaded; {})",
                ring.model,
                state(ring),
                ring.stages.len(),
                ring.hindrance()
            );
            (ring.model.clone(), text)
        })
        .collect()
    }

    /// The paths that a worker says it measured.
    pub fn paths(&self, node: &str) -> Vec<Path> {
        let Some(node) = self.nodes.get(node).filter(|node| node.connected) else {
            return Vec::new();
        };
        let paths = node.profile.paths.iter().take(PATHS);
        let shown = paths.map(|path| Path {
            worker: (!path.node_id.is_empty()).then(|| self.name(&path.node_id).to_owned()),
            round_trip_ms: f64::from(path.rtt_us) / 1e3,
            bytes_per_second: Some(path.bandwidth).filter(|&rate| rate.is_finite() && rate > 0.0),
        });
        shown.collect()
    }

    fn show(&self, ring: &Ring, now: Instant) -> mesh_api::Ring {
        let stages = ring.stages.iter().map(|stage| RingStage {
            layers: [stage.layers.start, stage.layers.end],
            member: self.show_part(&stage.member),
            standby: stage.standby.as_ref().map(|part| self.show_part(part)),
            lag_rows: stage.member.state.lag_rows,
        });
        let left_out = ring.left_out.iter().map(|(worker, reason)| LeftOut {
            worker: worker.clone(),
            reason: reason.clone(),
        });
        mesh_api::Ring {
            model: ring.model.clone(),
            ring: hex(ring.id),
            epoch: ring.epoch,
            state: state(ring).into(),
            reason: ring.reason.clone(),
            stages: stages.collect(),
            slots: ring.slots,
            context: ring.context,
            kv_tokens: ring.kv_tokens,
            planned_token_ms: ring.token_us / 1e3,
            planned_tokens_per_second: ring.tokens_per_second,
            left_out: left_out.collect(),
            age_seconds: now.saturating_duration_since(ring.formed).as_secs_f64(),
        }
    }

    fn show_part(&self, part: &Replica) -> StageWorker {
        let address = self.nodes.get(&part.node).and_then(|node| node.address);
        StageWorker {
            worker: self.name(&part.node).to_owned(),
            node_id: part.node.clone(),
            address: address.map_or_else(String::new, |address| address.to_string()),
            phase: match part.state.phase() {
                PartPhase::Ready => "ready",
                PartPhase::Failed => "failed",
                PartPhase::Loading | PartPhase::Unspecified => "loading",
            }
            .into(),
            step_ms: f64::from(part.state.step_us) / 1e3,
            load_seconds: f64::from(part.state.load_seconds),
            prefill_seconds: part.state.prefill_us as f64 / 1e6,
            weight_bytes: part.state.weight_bytes,
            kv_bytes: part.state.kv_bytes,
            kept_bytes: part.state.kept_bytes,
        }
    }
}

/// A recovery that a driver reports, without its age.
pub(super) fn recovery(ring: &Ring, recovery: &mesh_proto::Recovery) -> Recovery {
    Recovery {
        model: ring.model.clone(),
        ring: hex(ring.id),
        epoch: ring.epoch,
        reason: ring.reason_of_epoch.clone(),
        gap_ms: recovery.gap_us as f64 / 1e3,
        rows: recovery.rows,
        requests: recovery.requests,
        seconds_ago: None,
    }
}

fn state(ring: &Ring) -> &'static str {
    match (ring.retiring.is_some(), ring.serving_since.is_some()) {
        (true, _) => "retiring",
        (false, true) => "serving",
        (false, false) if ring.epoch > 1 => "recovering",
        (false, false) => "forming",
    }
}

/// Paths of one worker that are shown, at most.
const PATHS: usize = 256;
