//! Placement: cuts a model's layers into stages and gives each to a node.
//!
//! # What a plan costs
//! A stage of `n` layers takes `n * decode_us * (1 + load)` for one row, the last one
//! `logits_us * (1 + load)` more. A hop takes half the round trip plus the row's bytes over the bandwidth;
//! the one from the last stage back to the first carries a token instead of a row. Where the path between two
//! nodes was not measured, its round trip is taken as half the sum of theirs to the head (a mesh has a router
//! in the middle) and its bandwidth as the smaller of theirs; where those are unknown, too, as
//! [`DEFAULT_RTT_US`] and [`DEFAULT_BANDWIDTH`].
//! - A token of one stream takes all stages and all hops, one after the other: [`Objective::Latency`] minimises that sum.
//! - With enough requests in flight all stages work at once, and the one that is busy longest per row limits them all:
//!   [`Objective::Throughput`] minimises it, then the sum. A link is busy while it carries bytes, not while they travel, so only
//!   bytes over bandwidth counts there.
//!
//! # How the best one is found
//! The cost of a layout is that of its order (hops) plus that of its split (compute), and the split depends
//! on the order only through the first and the last node. So up to [`EXACT_NODES`] nodes the search is exact:
//! the dynamic program of Held and Karp (1962, "A dynamic programming approach to sequencing problems") gives
//! the cheapest path through every set of nodes between every pair of ends, and for each such triple the best
//! split is greedy: one layer for each node, the rest to the fastest as far as its memory goes. For
//! throughput the same program with `max` instead of `+` finds the least possible bottleneck; a second run
//! that only allows links and stages within it finds the least latency. Sets are visited smallest first and
//! must be better, not equal, to win: fewer stages win ties.
//!
//! Beyond that a local search (add, remove, exchange, move a node; each layout with its best split) starts from the smallest set of
//! the fastest nodes that holds the model and from that of the largest nodes, for throughput also from the 2, 4, 8, ... fastest,
//! and takes the best end.
//!
//! # Memory
//! Every stage holds its layers, KV rows for `kv_tokens` tokens, and at the ends of the model its embedding
//! or output matrix. The requested tokens may shrink, down to one context, until the plan is at most a tenth
//! slower than the best plan for one context: a slow node is not worth its memory. Standbys share the
//! remaining memory.

mod check;
mod cost;
mod error;
mod evaluate;
mod explain;
mod search;
mod standby;
#[cfg(test)]
mod tests;
mod types;

use std::collections::BTreeSet;

pub use cost::{DEFAULT_BANDWIDTH, DEFAULT_RTT_US};
pub use error::PlanError;
pub use evaluate::evaluate;
pub use explain::{Explanation, explain};
pub use search::EXACT_NODES;
pub use standby::{replacement_for, standby_for};
pub use types::{
    Assignment, Candidate, LeftOut, ModelSpec, Objective, PathSpec, Plan, PlannedStage, Policy,
    Reason,
};

pub(crate) use check::check_model;
pub(crate) use types::known;

use check::{check, unusable};
use cost::{Mesh, layer_bytes, stage_bytes};
use search::{Demand, Layout, Search};

/// The best plan for `model` on `candidates`. Does not depend on their order.
///
/// # Errors
/// [`PlanError`] names the problem and a remedy.
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
    // The remaining memory of the layout is added afterwards, so that a coarse search will do.
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

/// A plan may be so much slower than the best for one context if it holds more KV rows.
const KV_SLOWDOWN: f64 = 1.1;
/// KV rows of a ring.
const MOST_KV_TOKENS: u64 = 1 << 32;
