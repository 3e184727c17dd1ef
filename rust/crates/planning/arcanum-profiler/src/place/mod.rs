//! Placement: cuts a model's layers into stages and gives each to a node.
//!
//! # What a plan costs
//! A stage of `n` layers takes `n * decode_us * (1 + load)` for one row, the last one `logits_us * (1 + load)` more. A hop takes
//! half the round trip plus the row's bytes over the bandwidth; the one from the last stage back to the first carries a
//! token instead of a row. Where nobody measured the path between two nodes, its round trip is taken as half the sum of
//! theirs to the head (a mesh has a router in the middle) and its bandwidth as the smaller of theirs; where those are unknown,
//! too, as [`DEFAULT_RTT_US`] and [`DEFAULT_BANDWIDTH`].
//! - A token of one stream takes all stages and all hops, one after the other: [`Objective::Latency`] minimises that sum.
//! - With enough requests in flight all stages work at once, and the one that is busy longest per row limits them all:
//!   [`Objective::Throughput`] minimises it, then the sum. A link is busy while it carries bytes, not while they travel, so only
//!   bytes over bandwidth counts there.
//!
//! # How the best one is found
//! The cost of a layout is that of its order (hops) plus that of its split (compute), and the split depends on the order only through
//! who is first and who is last. So up to [`EXACT_NODES`] nodes the search is exact: the dynamic program of Held and Karp
//! (1962, "A dynamic programming approach to sequencing problems") gives the cheapest path through every set of nodes between
//! every pair of ends, and for each such triple the best split is greedy: one layer for everybody, the rest to the fastest as
//! far as its memory goes. For throughput the same program with `max` instead of `+` finds the least possible bottleneck; a second
//! run that only allows links and stages within it finds the least latency. Sets are visited smallest first and must be better, not
//! equal, to win: fewer stages win ties.
//!
//! Beyond that a local search (add, remove, exchange, move a node; each layout with its best split) starts from the smallest set of
//! the fastest nodes that holds the model and from that of the largest nodes, for throughput also from the 2, 4, 8, ... fastest,
//! and takes the best end.
//!
//! # Memory
//! Every stage holds its layers, KV rows for `kv_tokens` tokens, and what the ends of a model need besides. The tokens that are
//! wanted may shrink, down to one context, until the plan is at most a tenth slower than the best plan for one context: a
//! slow node is not worth its memory. Standbys share what is left.

mod cost;
mod error;
mod explain;
mod search;
mod standby;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use serde::{Deserialize, Serialize};

pub use error::PlanError;
pub use explain::{Explanation, explain};
pub use standby::{replacement_for, standby_for};

use cost::{Mesh, layer_bytes, stage_bytes};
use search::{Demand, Layout, Search};

/// A model as far as placement needs it.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelSpec {
    /// Layers.
    pub layers: u32,
    /// Width of a hidden row.
    pub hidden: u32,
    /// Bytes of one layer's weights.
    pub layer_bytes: u64,
    /// Bytes that the first stage holds besides.
    pub first_bytes: u64,
    /// Bytes that the last stage holds besides.
    pub last_bytes: u64,
    /// Bytes of KV cache per token and layer.
    pub kv_bytes: u64,
}

/// A node that may hold layers, with what was measured of it. Numbers that make no sense count as unknown.
#[derive(Debug, Clone, PartialEq)]
pub struct Candidate {
    /// Node id.
    pub id: String,
    /// Name a person knows it by.
    pub name: String,
    /// Bytes that it may use for this ring's weights and KV cache; what other rings use is not in it.
    pub memory: u64,
    /// Microseconds of one layer for one decode row; not positive is unknown.
    pub decode_us: f64,
    /// Microseconds of one layer per row of a prefill chunk. Decoding decides the placement: it is what most of an answer's
    /// time goes to, and nodes keep their order in both.
    pub prefill_us: f64,
    /// Microseconds of one row of logits.
    pub logits_us: f64,
    /// Other work on the node, in processes ready to run per core: its times are stretched by `1 + load`.
    pub load: f32,
    /// What its operator keeps it for; empty is for anything.
    pub reserved_for: Vec<String>,
    /// Paths to other nodes by their id; empty is the head.
    pub paths: BTreeMap<String, PathSpec>,
}

/// A measured path.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PathSpec {
    /// Round trip, microseconds.
    pub rtt_us: f64,
    /// Bytes per second; not positive is unknown.
    pub bandwidth: f64,
}

/// What a plan is to be best at.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Objective {
    /// The time of one token of one stream.
    #[default]
    Latency,
    /// Tokens per second of many streams together.
    Throughput,
}

/// What is wanted of a plan.
#[derive(Debug, Clone, PartialEq)]
pub struct Policy {
    /// What it is to be best at.
    pub objective: Objective,
    /// Most tokens of one request.
    pub context: u32,
    /// Requests at once.
    pub slots: u32,
    /// KV memory wanted, in tokens; `None` is a context for every slot.
    pub kv_tokens: Option<u64>,
    /// Whether to choose standbys.
    pub standbys: bool,
    /// What the ring is for: a node that is reserved for other things only is left out.
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

/// Which node holds which layers, and what to expect of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// The stages in order.
    pub stages: Vec<PlannedStage>,
    /// Nodes that run no stage, and why; a standby may be among them.
    pub left_out: Vec<LeftOut>,
    /// Microseconds from one token of a stream to the next.
    pub token_us: f64,
    /// What the slowest stage or link allows with enough requests in flight.
    pub tokens_per_second: f64,
    /// KV memory of the ring, in tokens.
    pub kv_tokens: u64,
}

/// One stage of a plan.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PlannedStage {
    /// Id of the node that runs it.
    pub node: String,
    /// Its layers.
    pub layers: Range<u32>,
    /// Id of the node that holds the same layers and mirrored KV rows.
    pub standby: Option<String>,
    /// Bytes that it needs, as member or as standby.
    pub memory: u64,
    /// Microseconds that it computes for one row.
    pub decode_us: f64,
    /// Microseconds of the hop to the next stage, or from the last one back to the first; 0 where there is only one stage.
    pub hop_us: f64,
}

/// A node without a stage.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LeftOut {
    /// Its id.
    pub node: String,
    /// Why.
    pub reason: Reason,
}

/// Why a node runs no stage.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Reason {
    /// Its operator keeps it for something else.
    Reserved {
        /// What for.
        purposes: Vec<String>,
    },
    /// It did not say how fast it is with this model.
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
        /// Which of the two.
        objective: Objective,
        /// Microseconds with it.
        with_us: f64,
        /// Microseconds without.
        without_us: f64,
    },
    /// The others suffice, and with it nothing would get better.
    NotNeeded,
    /// No layout has a place for it: the number of stages is fixed, or every other node needs its layers.
    NoRoom,
}

/// What a node holds of a ring that exists: input of [`evaluate`], [`standby_for`] and [`replacement_for`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Assignment {
    /// Id of the node that runs the stage.
    pub node: String,
    /// Its layers.
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

/// Round trip between nodes of which nobody knows anything: two machines in one house, microseconds.
pub const DEFAULT_RTT_US: f64 = 1_000.0;
/// Bandwidth where none was measured: 100 Mbit/s, in bytes per second.
pub const DEFAULT_BANDWIDTH: f64 = 12.5e6;
/// Up to so many usable nodes the search is exact.
pub const EXACT_NODES: usize = 8;

/// The best plan for `model` on `candidates`. Does not depend on their order.
///
/// # Errors
/// [`PlanError`] names what is missing.
pub fn place(
    model: &ModelSpec,
    candidates: &[Candidate],
    policy: &Policy,
) -> Result<Plan, PlanError> {
    check(model, policy)?;
    if candidates.is_empty() {
        return Err(PlanError::Empty);
    }
    let context = u64::from(policy.context);
    let wanted = policy
        .kv_tokens
        .unwrap_or(context.saturating_mul(policy.slots.into()))
        .clamp(context, MOST_KV_TOKENS);
    let mut usable = Vec::new();
    let mut left_out = Vec::new();
    let needs = layer_bytes(model, context);
    let mut seen = BTreeSet::new();
    for candidate in candidates {
        // A node holds one stage at most, however often it is listed.
        if !seen.insert(&candidate.id) {
            continue;
        }
        match unusable(candidate, policy, needs) {
            Some(reason) => left_out.push(LeftOut {
                node: candidate.id.clone(),
                reason,
            }),
            None => usable.push(candidate),
        }
    }
    let mesh = Mesh::new(model, &usable, policy);
    let demand = Demand {
        objective: policy.objective,
        stages: policy.stages.map(|stages| stages as usize),
        kv_tokens: context,
        must: None,
    };
    let search = Search::new(&mesh);
    let Some(least) = search.best(&demand) else {
        return Err(PlanError::of(model, &mesh, left_out, policy));
    };
    let (layout, demand) = most_kv(&search, demand, least, wanted);

    for node in 0..mesh.nodes.len() {
        if layout.order.contains(&node) {
            continue;
        }
        let with = search.best_with(node, &layout, &demand);
        left_out.push(LeftOut {
            node: mesh.nodes[node].id.clone(),
            reason: compare(with.as_ref(), &layout, policy.objective),
        });
    }
    left_out.sort_by(|a, b| a.node.cmp(&b.node));

    let kv_tokens = mesh.kv_limit(&layout.order, &layout.counts).min(wanted);
    let mut stages = Vec::with_capacity(layout.order.len());
    let mut start = 0;
    for (at, (&node, &count)) in layout.order.iter().zip(&layout.counts).enumerate() {
        let layers = start..start + count;
        start += count;
        stages.push(PlannedStage {
            node: mesh.nodes[node].id.clone(),
            memory: stage_bytes(model, layers.clone(), kv_tokens),
            decode_us: mesh.compute(node, count, at + 1 == layout.order.len()),
            hop_us: mesh.hop_after(&layout.order, at).0,
            standby: None,
            layers,
        });
    }
    if policy.standbys {
        standby::choose(model, &mut stages, kv_tokens, &usable);
    }
    let estimate = mesh.estimate(&layout.order, &layout.counts);
    Ok(Plan {
        stages,
        left_out,
        token_us: estimate.token_us,
        tokens_per_second: 1e6 / estimate.slowest_us,
        kv_tokens,
    })
}

/// What a layout that exists gives: microseconds per token of one stream, and tokens per second with enough requests in
/// flight. `None` if its stages do not cover the model's layers in order, or a node is not among the candidates or did not say
/// how fast it is. Neither memory nor reservations are looked at: the ring runs.
pub fn evaluate(
    model: &ModelSpec,
    stages: &[Assignment],
    candidates: &[Candidate],
    policy: &Policy,
) -> Option<(f64, f64)> {
    check(model, policy).ok()?;
    let mut members = Vec::with_capacity(stages.len());
    let mut end = 0;
    for stage in stages {
        if stage.layers.start != end || stage.layers.end <= end {
            return None;
        }
        end = stage.layers.end;
        let candidate = candidates.iter().find(|c| c.id == stage.node)?;
        if !known(candidate.decode_us) {
            return None;
        }
        members.push(candidate);
    }
    if end != model.layers {
        return None;
    }
    let mesh = Mesh::new(model, &members, policy);
    // The mesh has its own order.
    let order: Vec<usize> = stages
        .iter()
        .map(|stage| mesh.nodes.iter().position(|node| node.id == stage.node))
        .collect::<Option<_>>()?;
    let counts: Vec<u32> = stages
        .iter()
        .map(|stage| stage.layers.len() as u32)
        .collect();
    let estimate = mesh.estimate(&order, &counts);
    Some((estimate.token_us, 1e6 / estimate.slowest_us))
}

/// Takes as much of the wanted KV memory as costs at most [`KV_SLOWDOWN`].
fn most_kv(search: &Search<'_>, demand: Demand, least: Layout, wanted: u64) -> (Layout, Demand) {
    let limit = least.value * KV_SLOWDOWN;
    let at = |kv_tokens| {
        let demand = Demand {
            kv_tokens,
            ..demand
        };
        let layout = search.best(&demand)?;
        (layout.value <= limit).then_some((layout, demand))
    };
    if let Some(all) = at(wanted) {
        return all;
    }
    let mut best = (least, demand);
    let (mut low, mut high) = (demand.kv_tokens, wanted);
    // The rest of what the layout can hold is added afterwards, so that a coarse search will do.
    while high - low > 1 && high - low > low / 64 {
        let middle = low + (high - low) / 2;
        match at(middle) {
            Some(found) => {
                best = found;
                low = middle;
            }
            None => high = middle,
        }
    }
    best
}

fn compare(with: Option<&Layout>, without: &Layout, objective: Objective) -> Reason {
    match with {
        None => Reason::NoRoom,
        Some(with) if with.value > without.value * (1.0 + search::TIE) => Reason::Slower {
            objective,
            with_us: with.value,
            without_us: without.value,
        },
        Some(_) => Reason::NotNeeded,
    }
}

/// Why a node cannot hold a stage whatever the layout.
fn unusable(candidate: &Candidate, policy: &Policy, needs: u64) -> Option<Reason> {
    let reserved = &candidate.reserved_for;
    if !reserved.is_empty() && !reserved.contains(&policy.purpose) {
        return Some(Reason::Reserved {
            purposes: reserved.clone(),
        });
    }
    if !known(candidate.decode_us) {
        return Some(Reason::UnknownSpeed);
    }
    (candidate.memory < needs).then_some(Reason::TooLittleMemory {
        has: candidate.memory,
        needs,
    })
}

/// A time that was measured: between a nanosecond and a minute.
pub(crate) fn known(us: f64) -> bool {
    (1e-3..=60e6).contains(&us)
}

fn check(model: &ModelSpec, policy: &Policy) -> Result<(), PlanError> {
    check_model(model)?;
    for (field, value) in [("context", policy.context), ("slots", policy.slots)] {
        if value == 0 {
            return Err(PlanError::Policy { field });
        }
    }
    Ok(())
}

/// Whether a model's numbers make sense.
pub(crate) fn check_model(model: &ModelSpec) -> Result<(), PlanError> {
    let limits = [
        ("layers", u64::from(model.layers), 1, MOST_LAYERS),
        ("hidden", u64::from(model.hidden), 1, 1 << 20),
        ("layer_bytes", model.layer_bytes, 1, MOST_BYTES),
        ("first_bytes", model.first_bytes, 0, MOST_BYTES),
        ("last_bytes", model.last_bytes, 0, MOST_BYTES),
        ("kv_bytes", model.kv_bytes, 0, 1 << 30),
    ];
    for (field, value, least, most) in limits {
        if !(least..=most).contains(&value) {
            return Err(PlanError::Model {
                field,
                value,
                least,
                most,
            });
        }
    }
    Ok(())
}

/// A plan may be so much slower than the best for one context if it holds more KV rows.
const KV_SLOWDOWN: f64 = 1.1;
/// Layers that a model may have here; the largest known ones have below 200.
const MOST_LAYERS: u64 = 1024;
/// Bytes of a part of a model: 1 PiB.
const MOST_BYTES: u64 = 1 << 50;
/// KV rows of a ring.
const MOST_KV_TOKENS: u64 = 1 << 32;
