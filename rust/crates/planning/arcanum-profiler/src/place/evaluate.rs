//! Estimates the speed of an existing layout.

use super::check::check;
use super::cost::Mesh;
use super::types::{Assignment, Candidate, ModelSpec, Policy, known};

/// Speed of a layout that exists: microseconds per token of one stream, and tokens per second with enough
/// requests in flight. `None` if its stages do not cover the model's layers in order, or a node is not among
/// the candidates or did not say how fast it is. Neither memory nor reservations are looked at: the ring
/// runs.
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
