//! The ONNX graph of a stage, built in memory.
//!
//! ```text
//! tokens i32 [rows] ─ Embed ─┐
//! hidden f32 [rows, hidden] ─┴─ Attention 0 ─ FeedForward 0 ─ … ─ FeedForward n ─┬─ hidden f32 [rows, hidden]
//!                        logits f32 [kept, vocab] ─ Head ────────────────────────┘
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

use crate::node::{DOMAIN, INPUT, OUTPUT, chain, domain};
use crate::onnx::{Dim, ElementType, ModelProto, NodeProto, ValueInfo};
use crate::operators::StageNode;
use crate::shared::StageContext;

/// Builds the graph of `layers` and makes a session of it.
pub(crate) fn session(
    environment: &Environment,
    shared: &Arc<StageContext>,
    layers: Range<u32>,
) -> ort::Result<Session> {
    let domain = domain::<StageNode>(shared)?;
    commit(environment, domain, &model(shared, layers).encode())
}

/// Makes ONNX Runtime know [`DOMAIN`], by a first session that computes nothing.
///
/// The first session with a domain adds it to a table of the process that has no lock, so no other session may
/// be made at that time: two first ones fail ("the domain is already exist"), and one that only reads the table
/// may read it half changed. Later sessions find the domain there and only read.
///
/// # Errors
/// If ONNX Runtime refuses the session.
pub(crate) fn register_domain(environment: &Environment) -> ort::Result<()> {
    let value = |name: &str| ValueInfo {
        name: name.to_owned(),
        element: ElementType::F32,
        dims: vec![Dim::Named("rows")],
    };
    let model = ModelProto {
        opsets: &[("", 21), (DOMAIN, 1)],
        nodes: vec![NodeProto {
            operator: "Identity",
            domain: "",
            name: "identity".into(),
            inputs: vec![INPUT.to_owned()],
            outputs: vec![OUTPUT.to_owned()],
            attributes: Vec::new(),
        }],
        initializers: Vec::new(),
        inputs: vec![value(INPUT)],
        outputs: vec![value(OUTPUT)],
    };
    commit(environment, OperatorDomain::new(DOMAIN)?, &model.encode()).map(|_| ())
}

/// A session of a graph of our operators.
// `ort`'s builder returns itself in its errors.
#[allow(clippy::result_large_err)]
pub(crate) fn commit(
    environment: &Environment,
    domain: OperatorDomain,
    model: &[u8],
) -> ort::Result<Session> {
    // Our own pool computes: ONNX Runtime only walks the chain. The shapes change with every step, so plans
    // of memory made from one step's shapes would not fit the next.
    let mut builder = SessionBuilder::new(environment)?
        .with_intra_threads(1)
        .and_then(|builder| builder.with_inter_threads(1))
        .and_then(|builder| builder.with_memory_pattern(false))
        .and_then(|builder| builder.with_optimization_level(GraphOptimizationLevel::Disable))
        .and_then(|builder| builder.with_operators(domain))
        .map_err(|error| ort::Error::new(error.to_string()))?;
    builder.commit_from_memory(model)
}

fn model(shared: &StageContext, layers: Range<u32>) -> ModelProto<'static> {
    let shape = &shared.shape;
    let first = layers.start == 0;
    let last = layers.end == shape.layers;
    let mut plan = Vec::new();
    if first {
        plan.push((StageNode::Embed, 0));
    }
    for layer in 0..layers.len() {
        plan.push((StageNode::Attention, layer));
        plan.push((StageNode::FeedForward, layer));
    }
    if last {
        plan.push((StageNode::Head, 0));
    }
    let hidden = |name: &str| ValueInfo {
        name: name.to_owned(),
        element: ElementType::F32,
        dims: vec![Dim::Named("rows"), Dim::Fixed(shape.hidden)],
    };
    ModelProto {
        opsets: &[("", 21), (DOMAIN, 1)],
        nodes: chain(&plan, layers.start as usize),
        initializers: Vec::new(),
        inputs: vec![match first {
            true => ValueInfo {
                name: INPUT.to_owned(),
                element: ElementType::I32,
                dims: vec![Dim::Named("rows")],
            },
            false => hidden(INPUT),
        }],
        outputs: vec![match last {
            true => ValueInfo {
                name: OUTPUT.to_owned(),
                element: ElementType::F32,
                dims: vec![Dim::Named("kept"), Dim::Fixed(shape.vocab)],
            },
            false => hidden(OUTPUT),
        }],
    }
}
