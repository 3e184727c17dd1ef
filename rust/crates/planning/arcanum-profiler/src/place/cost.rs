//! Cost of layouts: times and bytes.

use std::ops::Range;

use super::types::{Candidate, ModelSpec, Policy, known};

/// The nodes of a search, fastest first, with all times between them.
pub(super) struct Mesh<'a> {
    pub(super) model: &'a ModelSpec,
    pub(super) nodes: Vec<NodeCost>,
    /// From a node to another with a hidden row.
    pub(super) rows: Vec<Vec<Hop>>,
    /// The same with a token.
    pub(super) tokens: Vec<Vec<Hop>>,
}

/// A node in a mesh.
pub(super) struct NodeCost {
    pub(super) id: String,
    pub(super) memory: u64,
    /// One layer, one row, load included.
    pub(super) layer_us: f64,
    /// One row of logits, load included.
    pub(super) logits_us: f64,
}

/// A way between two nodes.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Hop {
    /// From sending to having it all.
    pub(super) us: f64,
    /// Part of that time during which the link is busy, microseconds.
    pub(super) busy_us: f64,
}

/// Estimated speed of a layout.
pub(super) struct Estimate {
    pub(super) token_us: f64,
    pub(super) slowest_us: f64,
}

impl<'a> Mesh<'a> {
    /// The candidates' speeds are [`known`].
    pub(super) fn new(model: &'a ModelSpec, candidates: &[&Candidate], policy: &Policy) -> Self {
        let mut sorted: Vec<(&Candidate, NodeCost)> = candidates
            .iter()
            .map(|&candidate| (candidate, NodeCost::new(candidate)))
            .collect();
        sorted.sort_by(|(_, a), (_, b)| {
            a.layer_us
                .total_cmp(&b.layer_us)
                .then_with(|| a.id.cmp(&b.id))
        });
        let width = if policy.half_rows { 2.0 } else { 4.0 };
        let row = f64::from(model.hidden) * width + HEADER_BYTES;
        let hops = |bytes| -> Vec<Vec<Hop>> {
            sorted
                .iter()
                .map(|(a, _)| sorted.iter().map(|(b, _)| hop(a, b, bytes)).collect())
                .collect()
        };
        let (rows, tokens) = (hops(row), hops(HEADER_BYTES));
        Mesh {
            model,
            nodes: sorted.into_iter().map(|(_, node)| node).collect(),
            rows,
            tokens,
        }
    }

    /// Most layers that fit `node` at its place in the ring.
    pub(super) fn capacity(&self, node: usize, kv_tokens: u64, first: bool, last: bool) -> u32 {
        let model = self.model;
        let ends =
            if first { model.first_bytes } else { 0 } + if last { model.last_bytes } else { 0 };
        let layer = layer_bytes(model, kv_tokens);
        let room = self.nodes[node].memory.saturating_sub(ends);
        (room / layer).min(model.layers.into()) as u32
    }

    /// Microseconds that `node` computes for one row.
    pub(super) fn compute(&self, node: usize, layers: u32, last: bool) -> f64 {
        let NodeCost {
            layer_us,
            logits_us,
            ..
        } = self.nodes[node];
        f64::from(layers) * layer_us + if last { logits_us } else { 0.0 }
    }

    /// The hop behind the stage at `at`: its time and how long its link is busy.
    pub(super) fn hop_after(&self, order: &[usize], at: usize) -> (f64, f64) {
        let hop = match order.get(at + 1) {
            _ if order.len() < 2 => Hop::default(),
            Some(&next) => self.rows[order[at]][next],
            None => self.tokens[order[at]][order[0]],
        };
        (hop.us, hop.busy_us)
    }

    pub(super) fn estimate(&self, order: &[usize], counts: &[u32]) -> Estimate {
        let mut estimate = Estimate {
            token_us: 0.0,
            slowest_us: 0.0,
        };
        for (at, (&node, &count)) in order.iter().zip(counts).enumerate() {
            let compute = self.compute(node, count, at + 1 == order.len());
            let (us, busy) = self.hop_after(order, at);
            estimate.token_us += compute + us;
            estimate.slowest_us = estimate.slowest_us.max(compute).max(busy);
        }
        estimate
    }

    /// KV rows that a layout has memory for.
    pub(super) fn kv_limit(&self, order: &[usize], counts: &[u32]) -> u64 {
        let model = self.model;
        let mut start = 0;
        let mut limit = u64::MAX;
        for (&node, &count) in order.iter().zip(counts) {
            let layers = start..start + count;
            start += count;
            let left = self.nodes[node]
                .memory
                .saturating_sub(stage_bytes(model, layers, 0));
            let row = model.kv_bytes.saturating_mul(count.into());
            limit = limit.min(left.checked_div(row).unwrap_or(u64::MAX));
        }
        limit
    }
}

impl NodeCost {
    fn new(candidate: &Candidate) -> Self {
        let load = match candidate.load {
            load if load.is_finite() && load > 0.0 => f64::from(load).min(MOST_LOAD),
            _ => 0.0,
        };
        let logits_us = if known(candidate.logits_us) {
            candidate.logits_us
        } else {
            0.0
        };
        NodeCost {
            id: candidate.id.clone(),
            memory: candidate.memory,
            layer_us: candidate.decode_us * (1.0 + load),
            logits_us: logits_us * (1.0 + load),
        }
    }
}

/// Bytes that a stage holds.
pub(super) fn stage_bytes(model: &ModelSpec, layers: Range<u32>, kv_tokens: u64) -> u64 {
    let first = if layers.start == 0 {
        model.first_bytes
    } else {
        0
    };
    let last = if layers.end == model.layers {
        model.last_bytes
    } else {
        0
    };
    layer_bytes(model, kv_tokens)
        .saturating_mul(layers.len() as u64)
        .saturating_add(first)
        .saturating_add(last)
}

/// Bytes of one layer with its KV rows.
pub(super) fn layer_bytes(model: &ModelSpec, kv_tokens: u64) -> u64 {
    let kv = model.kv_bytes.saturating_mul(kv_tokens);
    model.layer_bytes.saturating_add(kv).max(1)
}

fn hop(from: &Candidate, to: &Candidate, bytes: f64) -> Hop {
    if from.id == to.id {
        return Hop::default();
    }
    let path = from.paths.get(&to.id).or_else(|| to.paths.get(&from.id));
    let to_head = || Some((from.paths.get("")?, to.paths.get("")?));
    let rtt = path.and_then(|path| sane_rtt(path.rtt_us)).or_else(|| {
        let (from, to) = to_head()?;
        Some((sane_rtt(from.rtt_us)? + sane_rtt(to.rtt_us)?) / 2.0)
    });
    let bandwidth = path
        .and_then(|path| sane_bandwidth(path.bandwidth))
        .or_else(|| {
            let (from, to) = to_head()?;
            Some(sane_bandwidth(from.bandwidth)?.min(sane_bandwidth(to.bandwidth)?))
        })
        .unwrap_or(DEFAULT_BANDWIDTH);
    let busy_us = bytes / bandwidth * 1e6;
    Hop {
        us: rtt.unwrap_or(DEFAULT_RTT_US) / 2.0 + busy_us,
        busy_us,
    }
}

fn sane_rtt(us: f64) -> Option<f64> {
    (0.0..=60e6).contains(&us).then_some(us)
}

fn sane_bandwidth(bandwidth: f64) -> Option<f64> {
    (1.0..=1e15).contains(&bandwidth).then_some(bandwidth)
}

/// Bytes of a step beside its rows: message header, segment, token.
const HEADER_BYTES: f64 = 64.0;
/// A node with more processes per core than this is as good as none.
const MOST_LOAD: f64 = 1000.0;

/// Round trip between nodes without any measurement: two machines in one house, microseconds.
pub const DEFAULT_RTT_US: f64 = 1_000.0;
/// Bandwidth where none was measured: 100 Mbit/s, in bytes per second.
pub const DEFAULT_BANDWIDTH: f64 = 12.5e6;
