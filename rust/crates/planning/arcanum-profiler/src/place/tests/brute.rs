//! Every order of every subset with every split, and their times worked out anew from the candidates.

use super::super::*;

fn one_way(a: &Candidate, b: &Candidate, bytes: f64) -> (f64, f64) {
    let direct = a.paths.get(&b.id).or(b.paths.get(&a.id));
    let heads = a.paths.get("").zip(b.paths.get(""));
    let (rtt, bandwidth) = match (direct, heads) {
        (Some(path), _) => (path.rtt_us, path.bandwidth),
        (None, Some((a, b))) => ((a.rtt_us + b.rtt_us) / 2.0, a.bandwidth.min(b.bandwidth)),
        (None, None) => (DEFAULT_RTT_US, DEFAULT_BANDWIDTH),
    };
    (rtt / 2.0 + bytes / bandwidth * 1e6, bytes / bandwidth * 1e6)
}

/// Token and slowest stage or link; `None` where memory is exceeded.
fn cost(
    model: &ModelSpec,
    order: &[&Candidate],
    counts: &[u32],
    kv_tokens: u64,
    half: bool,
) -> Option<(f64, f64)> {
    let row = 64.0 + f64::from(model.hidden) * if half { 2.0 } else { 4.0 };
    let (mut token, mut slowest) = (0.0f64, 0.0f64);
    let end = order.len() - 1;
    for (i, (node, &count)) in order.iter().zip(counts).enumerate() {
        let mut bytes = u64::from(count) * (model.layer_bytes + kv_tokens * model.kv_bytes);
        let mut us = f64::from(count) * node.decode_us;
        if i == 0 {
            bytes += model.first_bytes;
        }
        if i == end {
            bytes += model.last_bytes;
            us += node.logits_us;
        }
        if bytes > node.memory {
            return None;
        }
        us *= 1.0 + f64::from(node.load);
        let (hop, busy) = match i {
            _ if end == 0 => (0.0, 0.0),
            _ if i == end => one_way(node, order[0], 64.0),
            _ => one_way(node, order[i + 1], row),
        };
        token += us + hop;
        slowest = slowest.max(us).max(busy);
    }
    Some((token, slowest))
}

fn splits(layers: u32, parts: usize) -> Vec<Vec<u32>> {
    if parts == 1 {
        return vec![vec![layers]];
    }
    let mut all = Vec::new();
    for first in 1..layers {
        for mut rest in splits(layers - first, parts - 1) {
            if rest.iter().all(|&part| part > 0) {
                rest.insert(0, first);
                all.push(rest);
            }
        }
    }
    all
}

fn orders(count: usize) -> Vec<Vec<usize>> {
    let mut all: Vec<Vec<usize>> = (0..count).map(|i| vec![i]).collect();
    let mut from = 0;
    while from < all.len() {
        for i in 0..count {
            if !all[from].contains(&i) {
                let mut longer = all[from].clone();
                longer.push(i);
                all.push(longer);
            }
        }
        from += 1;
    }
    all
}

/// Token, slowest, stages, and which nodes.
pub(in crate::place) type Layout = (f64, f64, usize, Vec<String>);

/// Enumerates all layouts.
pub(in crate::place) fn layouts(
    model: &ModelSpec,
    candidates: &[Candidate],
    policy: &Policy,
    kv_tokens: u64,
) -> Vec<Layout> {
    let usable: Vec<&Candidate> = candidates
        .iter()
        .filter(|c| c.reserved_for.is_empty() || c.reserved_for.contains(&policy.purpose))
        .collect();
    let mut all = Vec::new();
    for order in orders(usable.len()) {
        let nodes: Vec<&Candidate> = order.iter().map(|&i| usable[i]).collect();
        if order.len() > model.layers as usize
            || policy
                .stages
                .is_some_and(|stages| stages as usize != order.len())
        {
            continue;
        }
        for counts in splits(model.layers, order.len()) {
            if let Some((token, slowest)) =
                cost(model, &nodes, &counts, kv_tokens, policy.half_rows)
            {
                let ids = nodes.iter().map(|node| node.id.clone()).collect();
                all.push((token, slowest, order.len(), ids));
            }
        }
    }
    all
}

/// Most stages of a plan that can have a standby at once.
pub(in crate::place) fn coverage(plan: &Plan, candidates: &[Candidate], policy: &Policy) -> usize {
    let rooms: Vec<(&str, u64)> = candidates
        .iter()
        .filter(|c| c.reserved_for.is_empty() || c.reserved_for.contains(&policy.purpose))
        .map(|c| {
            let own = plan.stages.iter().find(|stage| stage.node == c.id);
            (
                c.id.as_str(),
                c.memory - own.map_or(0, |stage| stage.memory),
            )
        })
        .collect();
    fn most(stages: &[PlannedStage], rooms: &[(&str, u64)]) -> usize {
        let Some((stage, rest)) = stages.split_first() else {
            return 0;
        };
        let mut best = most(rest, rooms);
        for i in 0..rooms.len() {
            if rooms[i].0 != stage.node && rooms[i].1 >= stage.memory {
                let mut rooms = rooms.to_vec();
                rooms[i].1 -= stage.memory;
                best = best.max(1 + most(rest, &rooms));
            }
        }
        best
    }
    most(&plan.stages, &rooms)
}
