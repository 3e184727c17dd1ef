//! The ONNX graph of a stage, built in memory.
//!
//! ```text
//! tokens i32 [rows] ─ Embed ─┐
//! hidden f32 [rows, hidden] ─┴─ Attention 0 ─ FeedForward 0 ─ … ─ Attention n ─ FeedForward n ─┬─ hidden f32 [rows, hidden]
//!                                                                                  └─ Head ─ logits f32 [kept, vocab]
//! ```
//!
//! Hidden rows flow as tensors. What a step needs besides (its segments, the KV cache, scratch memory) the operators share
//! with the stage. On a last stage the last Attention passes on only the rows that become logits.

use std::ops::Range;
use std::sync::Arc;

use ort::editor::{Graph, Model, Node, Opset};
use ort::environment::Environment;
use ort::operator::{Attribute, OperatorDomain};
use ort::session::Session;
use ort::session::builder::{GraphOptimizationLevel, SessionBuilder};
use ort::value::{Outlet, Shape, SymbolicDimensions, TensorElementType, ValueType};

use crate::operators::{StageOperator, operators};
use crate::shared::Shared;

/// Domain of our operators.
const DOMAIN: &str = "hydramesh";
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
    let shape = &shared.shape;
    let first = layers.start == 0;
    let last = layers.end == shape.layers;
    let mut graph = Graph::new()?;
    graph.set_inputs([if first {
        outlet(INPUT, TensorElementType::Int32, "rows", None)
    } else {
        outlet(INPUT, TensorElementType::Float32, "rows", Some(shape.hidden))
    }])?;
    graph.set_outputs([if last {
        outlet(OUTPUT, TensorElementType::Float32, "kept", Some(shape.vocab))
    } else {
        outlet(OUTPUT, TensorElementType::Float32, "rows", Some(shape.hidden))
    }])?;

    let mut plan: Vec<(&str, usize)> = Vec::new();
    if first {
        plan.push(("Embed", 0));
    }
    for layer in 0..layers.len() {
        plan.push(("Attention", layer));
        plan.push(("FeedForward", layer));
    }
    if last {
        plan.push(("Head", 0));
    }
    let count = plan.len();
    let mut value = INPUT.to_owned();
    for (i, (operator, layer)) in plan.into_iter().enumerate() {
        let name = format!("{operator}.{}", layers.start as usize + layer);
        let output = if i + 1 == count { OUTPUT.to_owned() } else { format!("{name}.out") };
        graph.add_node(Node::new(
            operator,
            DOMAIN,
            &name,
            [&value],
            [&output],
            [Attribute::new("layer", layer as i64)?],
        )?)?;
        value = output;
    }

    let mut model = Model::new([Opset::new(DOMAIN, 1)?])?;
    model.set_graph(graph)?;
    let mut domain = OperatorDomain::new(DOMAIN)?;
    for kind in operators() {
        domain = domain.add(StageOperator::new(kind, Arc::clone(shared)))?;
    }
    // Our own pool computes: ONNX Runtime only walks the chain. The shapes change with every step, so plans of memory made
    // from one step's shapes would not fit the next.
    let options = SessionBuilder::new(environment)?
        .with_intra_threads(1)
        .and_then(|options| options.with_inter_threads(1))
        .and_then(|options| options.with_memory_pattern(false))
        .and_then(|options| options.with_optimization_level(GraphOptimizationLevel::Disable))
        .and_then(|options| options.with_operators(domain))
        .map_err(|error| ort::Error::new(error.to_string()))?;
    model.into_session(&options)
}

/// A graph input or output with one symbolic dimension and perhaps a fixed one.
fn outlet(name: &str, ty: TensorElementType, symbol: &str, width: Option<usize>) -> Outlet {
    let mut dims = vec![-1];
    let mut symbols = vec![symbol.to_owned()];
    if let Some(width) = width {
        dims.push(width as i64);
        symbols.push(String::new());
    }
    Outlet::new(
        name,
        ValueType::Tensor {
            ty,
            shape: Shape::new(dims),
            dimension_symbols: SymbolicDimensions::new(symbols),
        },
    )
}
