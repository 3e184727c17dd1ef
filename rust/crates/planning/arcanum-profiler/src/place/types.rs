//! Input and output of placement.

use std::collections::BTreeMap;
use std::ops::Range;

use serde::{Deserialize, Serialize};

/// Dimensions of a model that placement needs.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelSpec {
    /// Number of transformer layers.
    pub layers: u32,
    /// Width of a hidden row.
    pub hidden: u32,
    /// Bytes of one layer's weights, with all experts of a mixture.
    pub layer_bytes: u64,
    /// Bytes that the first stage holds besides.
    pub first_bytes: u64,
    /// Bytes that the last stage holds besides.
    pub last_bytes: u64,
    /// Bytes of KV cache per token and layer.
    pub kv_bytes: u64,
}

/// A node that may hold layers, with its measurements. Impossible numbers count as unknown.
#[derive(Debug, Clone, PartialEq)]
pub struct Candidate {
    /// Id of the node in the mesh.
    pub id: String,
    /// Name a person knows it by.
    pub name: String,
    /// Bytes that it may use for this ring's weights and KV cache; without the memory of other rings.
    pub memory: u64,
    /// Microseconds of one layer for one decode row, which reads only the experts that it uses; not positive
    /// is unknown.
    pub decode_us: f64,
    /// Microseconds of one layer per row of a prefill chunk. Decoding decides the placement: it takes most of
    /// an answer's time, and the nodes' order is the same in both.
    pub prefill_us: f64,
    /// Microseconds of one row of logits.
    pub logits_us: f64,
    /// Other work on the node, in processes ready to run per core: its times are stretched by `1 + load`.
    pub load: f32,
    /// Purposes that its operator reserves it for; empty means any.
    pub reserved_for: Vec<String>,
    /// Paths to other nodes by their id; empty is the head.
    pub paths: BTreeMap<String, PathSpec>,
}

/// A measured network path between two nodes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PathSpec {
    /// Round-trip time, microseconds.
    pub rtt_us: f64,
    /// Bytes per second; not positive is unknown.
    pub bandwidth: f64,
}

/// Objective of a plan.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Objective {
    /// The time of one token of one stream.
    #[default]
    Latency,
    /// Tokens per second of many streams together.
    Throughput,
}

/// Requirements for a plan.
#[derive(Debug, Clone, PartialEq)]
pub struct Policy {
    /// The quantity to optimise.
    pub objective: Objective,
    /// Most tokens of one request.
    pub context: u32,
    /// Number of concurrent requests.
    pub slots: u32,
    /// KV memory wanted, in tokens; `None` is a context for every slot.
    pub kv_tokens: Option<u64>,
    /// Choose standbys.
    pub standbys: bool,
    /// Purpose of the ring: a node that is reserved for other purposes only is left out.
    pub purpose: String,
    /// Exactly so many stages.
    pub stages: Option<u32>,
    /// Hidden rows travel as f16 rather than f32.
    pub half_rows: bool,
}

impl Default for Policy {
    fn default() -> Self {
        Policy {
            objective: Objective::Latency,
            context: 4096,
            slots: 8,
            kv_tokens: None,
            standbys: true,
            purpose: String::new(),
            stages: None,
            half_rows: false,
        }
    }
}

/// Assignment of layers to nodes, with the expected speed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// The stages in order.
    pub stages: Vec<PlannedStage>,
    /// Nodes that run no stage, and why; a standby may be among them.
    pub left_out: Vec<LeftOut>,
    /// Microseconds from one token of a stream to the next.
    pub token_us: f64,
    /// Tokens per second with enough requests in flight, limited by the slowest stage or link.
    pub tokens_per_second: f64,
    /// KV memory of the ring, in tokens.
    pub kv_tokens: u64,
}

/// One stage of a plan.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PlannedStage {
    /// Id of the node that runs it.
    pub node: String,
    /// Range of layers.
    pub layers: Range<u32>,
    /// Id of the node that holds the same layers and mirrored KV rows.
    pub standby: Option<String>,
    /// Bytes that it needs, as member or as standby.
    pub memory: u64,
    /// Microseconds that it computes for one row.
    pub decode_us: f64,
    /// Microseconds of the hop to the next stage, or from the last one back to the first; 0 where there is
    /// only one stage.
    pub hop_us: f64,
}

/// A node without a stage.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LeftOut {
    /// Id of the node.
    pub node: String,
    /// Reason why it runs no stage.
    pub reason: Reason,
}

/// Reason why a node runs no stage.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Reason {
    /// Its operator reserves it for other purposes.
    Reserved {
        /// The purposes it is reserved for.
        purposes: Vec<String>,
    },
    /// It did not report its speed with this model.
    UnknownSpeed,
    /// Not even one layer fits.
    TooLittleMemory {
        /// Bytes that it may use.
        has: u64,
        /// Bytes of one layer with the KV rows of one context.
        needs: u64,
    },
    /// With it, a token (latency) or the slowest stage (throughput) would take longer.
    Slower {
        /// The quantity that would be slower.
        objective: Objective,
        /// Microseconds with the node.
        with_us: f64,
        /// Microseconds without the node.
        without_us: f64,
    },
    /// The others suffice, and with it nothing would get better.
    NotNeeded,
    /// No layout has a place for it: the number of stages is fixed, or every other node needs its layers.
    NoRoom,
}

/// Stage of an existing ring with its nodes: input of [`evaluate`](fn@super::evaluate),
/// [`standby_for`](super::standby_for) and [`replacement_for`](super::replacement_for).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Assignment {
    /// Id of the node that runs the stage.
    pub node: String,
    /// Range of layers.
    pub layers: Range<u32>,
    /// Id of its standby.
    pub standby: Option<String>,
}

impl From<&PlannedStage> for Assignment {
    fn from(stage: &PlannedStage) -> Self {
        Assignment {
            node: stage.node.clone(),
            layers: stage.layers.clone(),
            standby: stage.standby.clone(),
        }
    }
}

/// A time that was measured: between a nanosecond and a minute.
pub(crate) fn known(us: f64) -> bool {
    (1e-3..=60e6).contains(&us)
}
