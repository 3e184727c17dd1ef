//! What operators are shown of rings.

use std::time::Instant;

use mesh_proto::{ModelCard, PartPhase, Recovery};
use serde::Serialize;

use super::ring::{Part, Ring};
use super::{Prospect, Rings};

/// A ring, for `/v1/mesh`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RingView {
    /// Model name.
    pub model: String,
    /// Its id, hex.
    pub ring: String,
    /// Its epoch.
    pub epoch: u32,
    /// `forming`, `serving`, `recovering` or `retiring`.
    pub state: &'static str,
    /// Why its members are as they are.
    pub reason: String,
    /// In order; the last one's worker is the driver.
    pub stages: Vec<StageView>,
    /// Requests at once.
    pub slots: u32,
    /// Most tokens of a request.
    pub context: u32,
    /// KV memory, tokens.
    pub kv_tokens: u64,
    /// Milliseconds per token of one stream, as planned.
    pub planned_token_ms: f64,
    /// Tokens per second of many streams, as planned.
    pub planned_tokens_per_second: f64,
    /// Workers that have no part, and why.
    pub left_out: Vec<LeftOutView>,
    /// Seconds since it was formed.
    pub age_seconds: f64,
}

/// A stage.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StageView {
    /// First layer, one past the last.
    pub layers: [u32; 2],
    /// Who runs it.
    pub member: PartView,
    /// Who stands by.
    pub standby: Option<PartView>,
    /// KV rows that the standby does not have yet.
    pub lag_rows: u64,
}

/// A part.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PartView {
    /// The worker's name.
    pub worker: String,
    /// Its node id.
    pub node_id: String,
    /// `ip:port` of its ring listener.
    pub address: String,
    /// `loading`, `ready` or `failed`.
    pub phase: &'static str,
    /// Milliseconds of its last steps, smoothed.
    pub step_ms: f64,
    /// Seconds that loading took.
    pub load_seconds: f64,
    /// Seconds that its steps of more than a few rows took since then.
    pub prefill_seconds: f64,
    /// Bytes of weights.
    pub weight_bytes: u64,
    /// Bytes of KV rows.
    pub kv_bytes: u64,
    /// Bytes of outputs that it keeps for the next stage's replay.
    pub kept_bytes: u64,
}

/// A path that a worker measured.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PathView {
    /// Name of the worker at its other end; the head if there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub worker: Option<String>,
    /// Round trip.
    pub round_trip_ms: f64,
    /// What its other end receives of it; unknown until it was idle once.
    pub bytes_per_second: Option<f64>,
}

/// A worker without a part.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LeftOutView {
    /// Its name.
    pub worker: String,
    /// Why.
    pub reason: String,
}

/// How a ring came through a change of its members.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RecoveryView {
    /// Model name.
    pub model: String,
    /// The ring, hex.
    pub ring: String,
    /// The new epoch.
    pub epoch: u32,
    /// What had happened.
    pub reason: String,
    /// Milliseconds from the last token before to the first one after.
    pub gap_ms: f64,
    /// Rows that were computed again.
    pub rows: u64,
    /// Requests that ran.
    pub requests: u32,
    #[serde(skip)]
    at: Option<Instant>,
}

/// A model without a ring, for `/v1/mesh`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Unformed {
    /// Model name.
    pub model: String,
    /// Why.
    pub reason: String,
}

impl RecoveryView {
    pub(super) fn new(ring: &Ring, recovery: &Recovery, now: Instant) -> Self {
        Self {
            model: ring.model.clone(),
            ring: hex(ring.id),
            epoch: ring.epoch,
            reason: ring.reason_of_epoch.clone(),
            gap_ms: recovery.gap_us as f64 / 1e3,
            rows: recovery.rows,
            requests: recovery.requests,
            at: Some(now),
        }
    }

    /// When it was reported.
    pub fn at(&self) -> Option<Instant> {
        self.at
    }
}

impl Rings {
    /// All rings.
    pub fn view(&self, now: Instant) -> Vec<RingView> {
        self.rings
            .values()
            .map(|ring| self.show(ring, now))
            .collect()
    }

    /// Models that could not be planned, and why.
    pub fn unformed(&self) -> Vec<Unformed> {
        let impossible = |(model, prospect): (String, Prospect)| match prospect {
            Prospect::Impossible(reason) => Some(Unformed { model, reason }),
            Prospect::Coming => None,
        };
        self.prospects()
            .into_iter()
            .filter_map(impossible)
            .collect()
    }

    /// The models of all rings, whether they serve at the moment or not.
    pub fn cards(&self) -> Vec<ModelCard> {
        let live = self.rings.values().filter(|ring| ring.retiring.is_none());
        live.map(|ring| ring.card(None)).collect()
    }

    /// The last changes of members that drivers reported, oldest first.
    pub fn recoveries(&self) -> impl Iterator<Item = &RecoveryView> {
        self.recoveries.iter()
    }

    /// Why the model's ring does not serve, in a sentence; `None` if it does, or there is none.
    pub fn not_serving(&self) -> Vec<(String, String)> {
        let idle = self.rings.values().filter(|ring| {
            ring.serving_since.is_none() && ring.retiring.is_none() && ring.replaces.is_none()
        });
        idle.map(|ring| {
            let ready = ring
                .stages
                .iter()
                .filter(|stage| stage.member.is_ready())
                .count();
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
    pub fn paths(&self, node: &str) -> Vec<PathView> {
        let Some(node) = self.nodes.get(node).filter(|node| node.connected) else {
            return Vec::new();
        };
        let paths = node.profile.paths.iter().take(PATHS);
        let shown = paths.map(|path| PathView {
            worker: (!path.node_id.is_empty()).then(|| self.name(&path.node_id).to_owned()),
            round_trip_ms: f64::from(path.rtt_us) / 1e3,
            bytes_per_second: Some(path.bandwidth).filter(|&rate| rate.is_finite() && rate > 0.0),
        });
        shown.collect()
    }

    fn show(&self, ring: &Ring, now: Instant) -> RingView {
        let stages = ring.stages.iter().map(|stage| StageView {
            layers: [stage.layers.start, stage.layers.end],
            member: self.show_part(&stage.member),
            standby: stage.standby.as_ref().map(|part| self.show_part(part)),
            lag_rows: stage.member.lag_rows,
        });
        RingView {
            model: ring.model.clone(),
            ring: hex(ring.id),
            epoch: ring.epoch,
            state: state(ring),
            reason: ring.reason.clone(),
            stages: stages.collect(),
            slots: ring.slots,
            context: ring.context,
            kv_tokens: ring.kv_tokens,
            planned_token_ms: ring.token_us / 1e3,
            planned_tokens_per_second: ring.tokens_per_second,
            left_out: ring
                .left_out
                .iter()
                .map(|(worker, reason)| LeftOutView {
                    worker: worker.clone(),
                    reason: reason.clone(),
                })
                .collect(),
            age_seconds: now.saturating_duration_since(ring.formed).as_secs_f64(),
        }
    }

    fn show_part(&self, part: &Part) -> PartView {
        let address = self.nodes.get(&part.node).and_then(|node| node.address);
        PartView {
            worker: self.name(&part.node).to_owned(),
            node_id: part.node.clone(),
            address: address
                .map(|address| address.to_string())
                .unwrap_or_default(),
            phase: match part.phase {
                PartPhase::Ready => "ready",
                PartPhase::Failed => "failed",
                PartPhase::Loading | PartPhase::Unspecified => "loading",
            },
            step_ms: f64::from(part.step_us) / 1e3,
            load_seconds: f64::from(part.load_seconds),
            prefill_seconds: part.prefill_us as f64 / 1e6,
            weight_bytes: part.weight_bytes,
            kv_bytes: part.kv_bytes,
            kept_bytes: part.kept_bytes,
        }
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

fn hex(ring: u64) -> String {
    format!("{ring:016x}")
}

/// Paths of one worker that are shown, at most.
const PATHS: usize = 256;
