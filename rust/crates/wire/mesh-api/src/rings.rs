//! Rings: pipelines of stages over workers.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

/// A ring.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct Ring {
    /// Name of the model.
    pub model: String,
    /// Id of the ring, hexadecimal.
    pub ring: String,
    /// Number of its epoch; each change of its members begins one.
    pub epoch: u32,
    /// `forming`, `serving`, `recovering` or `retiring`.
    #[cfg_attr(feature = "schema", schemars(extend("enum" = ["forming", "serving", "recovering", "retiring"])))]
    pub state: Cow<'static, str>,
    /// Reason for the present choice of members.
    pub reason: String,
    /// Stages in order; the last one's worker is the driver.
    pub stages: Vec<RingStage>,
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
    pub left_out: Vec<LeftOut>,
    /// Seconds since it was formed.
    pub age_seconds: f64,
}

/// A stage of a ring.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct RingStage {
    /// First layer, one past the last.
    pub layers: [u32; 2],
    /// The worker that computes it.
    pub member: StageWorker,
    /// The standby, if there is one.
    pub standby: Option<StageWorker>,
    /// KV rows that the standby does not have yet.
    pub lag_rows: u64,
}

/// A stage on one worker, as member or standby.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct StageWorker {
    /// Name of the worker.
    pub worker: String,
    /// Node id of the worker.
    pub node_id: String,
    /// `ip:port` of its ring listener.
    pub address: String,
    /// `loading`, `ready` or `failed`.
    #[cfg_attr(feature = "schema", schemars(extend("enum" = ["loading", "ready", "failed"])))]
    pub phase: Cow<'static, str>,
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

/// A worker without a part.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct LeftOut {
    /// Name of the worker.
    pub worker: String,
    /// Reason for it.
    pub reason: String,
}

/// Recovery of a ring from a change of its members.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct Recovery {
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
    /// Seconds since the report.
    pub seconds_ago: Option<f64>,
}

/// A model without a ring.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct Unformed {
    /// Name of the model.
    pub model: String,
    /// Cause, for people.
    pub reason: String,
}

/// Something that a drained worker still holds.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct Holding {
    /// Name of the model.
    pub model: String,
    /// Id of the ring, hexadecimal.
    pub ring: String,
    /// First layer, one past the last.
    pub layers: [u32; 2],
    /// `member` or `standby`.
    #[cfg_attr(feature = "schema", schemars(extend("enum" = ["member", "standby"])))]
    pub part: Cow<'static, str>,
    /// Event that the move waits for.
    pub waits_for: String,
}
