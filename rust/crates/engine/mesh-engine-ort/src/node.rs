//! Custom operators whose nodes share the state of their session.
//!
//! A graph of ours is a chain: each node takes one tensor and gives one, belongs to a layer, and finds
//! everything else (weights, the running step, the thread pool) in what the nodes share.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use ort::operator::{
    ComputeContext, Kernel, KernelContext, Operator, OperatorDomain, OperatorInput, OperatorOutput,
    ShapeInferenceContext,
};
use ort::value::{Shape, SymbolicDimensions, TensorElementType, ValueType};

use crate::onnx::{Attribute, NodeProto};

/// Domain of our operators.
pub(crate) const DOMAIN: &str = "hydramesh";
/// Name of a graph's input.
pub(crate) const INPUT: &str = "input";
/// Name of a graph's output.
pub(crate) const OUTPUT: &str = "output";

/// The kinds of nodes in a graph.
pub(crate) trait NodeKind: Copy + Send + Sync + 'static {
    /// State that the nodes share.
    type Shared: Send + Sync + 'static;

    /// All kinds.
    const ALL: &'static [Self];

    /// The operator's name in the graph.
    fn name(self) -> &'static str;

    /// Element type of the input: tokens (i32) or rows (f32).
    fn input(self) -> TensorElementType;

    /// The name for the number of output rows, and their width. Rows that have the same name have the same
    /// number, so the planner may let them share memory.
    fn output(self, layer: usize, shared: &Self::Shared) -> (&'static str, usize);

    /// Number of layers in the graph.
    fn layers(shared: &Self::Shared) -> usize;

    /// Computes a node. The output may be the input's memory: a node whose output differs in shape must have
    /// read its input before it asks for its output.
    ///
    /// # Errors
    /// If the graph does not fit the kernels.
    fn run(node: &Node<Self>, context: &ComputeContext) -> ort::Result<()>;
}

/// A node of a session's graph.
pub(crate) struct Node<K: NodeKind> {
    pub(crate) kind: K,
    /// Counted from the first in the graph.
    pub(crate) layer: usize,
    pub(crate) shared: Arc<K::Shared>,
}

/// One of the operators, bound to what its nodes share.
struct BoundOperator<K: NodeKind> {
    kind: K,
    shared: Arc<K::Shared>,
}

/// The operators of all kinds of nodes that share `shared`.
pub(crate) fn domain<K: NodeKind>(shared: &Arc<K::Shared>) -> ort::Result<OperatorDomain> {
    let mut domain = OperatorDomain::new(DOMAIN)?;
    for &kind in K::ALL {
        let shared = Arc::clone(shared);
        domain = domain.add(BoundOperator { kind, shared })?;
    }
    Ok(domain)
}

/// A chain from [`INPUT`] to [`OUTPUT`] of nodes with their layers, counted from the first in the graph,
/// which is the model's layer `first`.
pub(crate) fn chain<K: NodeKind>(plan: &[(K, usize)], first: usize) -> Vec<NodeProto> {
    let mut value = INPUT.to_owned();
    let nodes = plan.iter().enumerate().map(|(i, (kind, layer))| {
        let name = format!("{}.{}", kind.name(), first + layer);
        let output = if i + 1 == plan.len() {
            OUTPUT.to_owned()
        } else {
            format!("{name}.out")
        };
        NodeProto {
            operator: kind.name(),
            domain: DOMAIN,
            name,
            inputs: vec![std::mem::replace(&mut value, output.clone())],
            outputs: vec![output],
            attributes: vec![("layer", Attribute::Int(*layer as i64))],
        }
    });
    nodes.collect()
}

impl<K: NodeKind> Operator for BoundOperator<K> {
    type Kernel<'attr> = Node<K>;

    /// Layers work in place where ONNX Runtime can give them the same memory.
    const INPLACES: &[(u32, u32)] = &[(0, 0)];

    fn name(&self) -> &str {
        self.kind.name()
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        [OperatorInput::required(self.kind.input())]
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        [OperatorOutput::required(TensorElementType::Float32)]
    }

    fn create_kernel<'attr>(&self, context: &KernelContext<'attr>) -> ort::Result<Node<K>> {
        let layer = context
            .get::<i64>("layer")
            .and_then(|layer| usize::try_from(layer).ok())
            .filter(|&layer| layer < K::layers(&self.shared))
            .ok_or_else(|| ort::Error::new("attribute `layer` is missing or out of range"))?;
        Ok(Node {
            kind: self.kind,
            layer,
            shared: Arc::clone(&self.shared),
        })
    }

    fn infer_shape(&self, context: &mut ShapeInferenceContext) -> ort::Result<()> {
        let layer = context.attr::<i64>("layer")? as usize;
        let (rows, width) = self.kind.output(layer, &self.shared);
        context.set_output(
            0,
            &ValueType::Tensor {
                ty: TensorElementType::Float32,
                shape: Shape::new([-1, width as i64]),
                dimension_symbols: SymbolicDimensions::new([rows.to_owned(), String::new()]),
            },
        )
    }
}

impl<K: NodeKind> Kernel for Node<K> {
    fn compute(&mut self, context: &ComputeContext) -> ort::Result<()> {
        // Unwinding into ONNX Runtime would end the process.
        catch_unwind(AssertUnwindSafe(|| K::run(self, context)))
            .unwrap_or_else(|_| Err(ort::Error::new("a kernel panicked; see the log")))
    }
}
