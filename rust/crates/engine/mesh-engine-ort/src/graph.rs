//! The ONNX graph of a stage, built in memory.
//!
//! ```text
//! tokens i32 [rows] ─ Embed ─┐
//! hidden f32 [rows, hidden] ─┴─ Attention 0 ─ FeedForward 0 ─ … ─ Attention n ─ FeedForward n ─┬─ hidden f32 [rows, hidden]
//!                                                                                  └─ Head ─ logits f32 [kept, vocab]
//! ```
//!
//! Hidden rows flow as tensors. The operators share the other state of a step (its segments, the KV cache,
//! scratch memory) with the stage. On a last stage the last Attention passes on only the rows that become
//! logits.

use std::ops::Range;
use std::sync::Arc;

use ort::environment::Environment;
use ort::operator::OperatorDomain;
use ort::session::Session;
use ort::session::builder::{GraphOptimizationLevel, SessionBuilder};

use crate::onnx::{Attribute, Dim, Element, Model, Node, Value};
use crate::operators::{Kind, StageOperator};
use crate::shared::Shared;

/// Name of the graph's input.
pub(crate) const INPUT: &str = "input";
/// Name of the graph's output.
pub(crate) const OUTPUT: &str = "output";

/// Builds the graph of `layers` and makes a session of it.
pub(crate) fn session(
    environment: &Environment,
    shared: &Arc<Shared>,
    layers: Range<u32>,
) -> ort::Result<Session> {
    let mut domain = OperatorDomain::new(DOMAIN)?;
    for kind in Kind::ALL {
        domain = domain.add(StageOperator::new(kind, Arc::clone(shared)))?;
    }
    commit(environment, domain, &model(shared, layers).encode())
}

/// A session of a graph of our operators.
// `ort`'s builder returns itself in its errors.
#[allow(clippy::result_large_err)]
pub(crate) fn commit(
    environment: &Environment,
    domain: OperatorDomain,
    model: &[u8],
) -> ort::Result<Session> {
    // Our own pool computes: ONNX Runtime only walks the chain. The shapes change with every step, so plans of memory made
    // from one step's shapes would not fit the next.
    let mut builder = SessionBuilder::new(environment)?
        .with_intra_threads(1)
        .and_then(|builder| builder.with_inter_threads(1))
        .and_then(|builder| builder.with_memory_pattern(false))
        .and_then(|builder| builder.with_optimization_level(GraphOptimizationLevel::Disable))
        .and_then(|builder| builder.with_operators(domain))
        .map_err(|error| ort::Error::new(error.to_string()))?;
    builder.commit_from_memory(model)
}

fn model(shared: &Shared, layers: Range<u32>) -> Model<'static> {
    let shape = &shared.shape;
    let first = layers.start == 0;
    let last = layers.end == shape.layers;
    let mut plan = Vec::new();
    if first {
        plan.push((Kind::Embed, 0));
    }
    for layer in 0..layers.len() {
        plan.push((Kind::Attention, layer));
        plan.push((Kind::FeedForward, layer));
    }
    if last {
        plan.push((Kind::Head, 0));
    }
    let count = plan.len();
    let mut value = INPUT.to_owned();
    let nodes = plan.into_iter().enumerate().map(|(i, (kind, layer))| {
        let name = format!("{}.{}", kind.name(), layers.start as usize + layer);
        let output = if i + 1 == count {
            OUTPUT.to_owned()
        } else {
            format!("{name}.out")
        };
        Node {
            operator: kind.name(),
            domain: DOMAIN,
            name,
            inputs: vec![std::mem::replace(&mut value, output.clone())],
            outputs: vec![output],
            attributes: vec![("layer", Attribute::Int(layer as i64))],
        }
    });
    let hidden = |name: &str| Value {
        name: name.to_owned(),
        element: Element::F32,
        dims: vec![Dim::Named("rows"), Dim::Fixed(shape.hidden)],
    };
    Model {
        opsets: &[("", 21), (DOMAIN, 1)],
        nodes: nodes.collect(),
        initializers: Vec::new(),
        inputs: vec![match first {
            true => Value {
                name: INPUT.to_owned(),
                element: Element::I32,
                dims: vec![Dim::Named("rows")],
            },
            false => hidden(INPUT),
        }],
        outputs: vec![match last {
            true => Value {
                name: OUTPUT.to_owned(),
                element: Element::F32,
                dims: vec![Dim::Named("kept"), Dim::Fixed(shape.vocab)],
            },
            false => hidden(OUTPUT),
        }],
    }
}

/// Domain of our operators.
pub(crate) const DOMAIN: &str = "hydramesh";
