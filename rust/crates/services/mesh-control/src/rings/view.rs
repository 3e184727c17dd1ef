//! Rings, as operators see them.

use std::time::Instant;

use mesh_proto::Recovery;
use serde::Serialize;

use super::ring::{Ring, hex};

/// A ring, for `/v1/mesh`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RingView {
    /// Name of the model.
    pub model: String,
    /// Id of the ring, hexadecimal.
    pub ring: String,
    /// Number of its epoch.
    pub epoch: u32,
    /// `forming`, `serving`, `recovering` or `retiring`.
    pub state: &'static str,
    /// Reason for the present choice of members.
    pub reason: String,
    /// Stages in order; the last one's worker is the driver.
    pub stages: Vec<StageView>,
    /// Requests that it runs at once.
    pub slots: u32,
    /// Most tokens of a request.
    pub context: u32,
    /// Size of its KV cache, in tokens.
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

/// A stage of a ring.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StageView {
    /// First layer, one past the last.
    pub layers: [u32; 2],
    /// The worker that computes it.
    pub member: ReplicaView,
    /// The standby, if there is one.
    pub standby: Option<ReplicaView>,
    /// KV rows that the standby does not have yet.
    pub lag_rows: u64,
}

/// A stage on one worker, as member or standby.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ReplicaView {
    /// Name of the worker.
    pub worker: String,
    /// Node id of the worker.
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
    /// Memory of its weights, in bytes.
    pub weight_bytes: u64,
    /// Bytes of KV rows.
    pub kv_bytes: u64,
    /// Bytes of outputs that it keeps for the next stage's replay.
    pub kept_bytes: u64,
}

/// A path that a worker measured.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PathView {
    /// Name of the worker at its other end; absent if that is the head.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub worker: Option<String>,
    /// Round trip, in milliseconds.
    pub round_trip_ms: f64,
    /// Bytes per second that its other end receives; unknown until the path was idle once.
    pub bytes_per_second: Option<f64>,
}

/// A worker without a part.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LeftOutView {
    /// Name of the worker.
    pub worker: String,
    /// Cause of the suspicion.
    pub reason: String,
}

/// Recovery of a ring from a change of its members.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RecoveryView {
    /// Name of the model.
    pub model: String,
    /// Id of the ring, hexadecimal.
    pub ring: String,
    /// Number of the new epoch.
    pub epoch: u32,
    /// Cause of the change.
    pub reason: String,
    /// Milliseconds from the last token before to the first one after.
    pub gap_ms: f64,
    /// Rows that were computed again.
    pub rows: u64,
    /// Number of requests that ran.
    pub requests: u32,
    #[serde(skip)]
    at: Option<Instant>,
}

/// A model without a ring, for `/v1/mesh`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Unformed {
    /// Name of the model.
    pub model: String,
    /// Cause, for people.
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

    /// Time of the report.
    pub fn at(&self) -> Option<Instant> {
        self.at
    }
}
