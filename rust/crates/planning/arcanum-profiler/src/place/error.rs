//! Errors of planning.

use super::cost::{Mesh, stage_bytes};
use super::types::{LeftOut, ModelSpec, Policy, Reason};

/// The reason why there is no plan, with a remedy.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// No node offers the model.
    #[error(
        "no node offers layers of this model: name it in `ring.models` of a worker's configuration"
    )]
    Empty,
    /// A number of the model's description is out of range.
    #[error("the model's {field} is {value}, but must be {least} to {most}")]
    Model {
        /// Name of the number.
        field: &'static str,
        /// The rejected value.
        value: u64,
        /// Least it may be.
        least: u64,
        /// Most it may be.
        most: u64,
    },
    /// Offers that should be of one model are not.
    #[error("one offer says that the model's {field} are {a}, another {b}: their files differ")]
    Differs {
        /// Name of the number.
        field: &'static str,
        /// Its value in one offer.
        a: u32,
        /// Its value in another offer.
        b: u32,
    },
    /// A number of the policy is 0.
    #[error("{field} must be at least 1")]
    Policy {
        /// Name of the number.
        field: &'static str,
    },
    /// Every node is left out.
    #[error("none of the {} nodes can be used: {}", .left_out.len(), reasons(.left_out))]
    Nobody {
        /// The nodes, each with its reason.
        left_out: Vec<LeftOut>,
    },
    /// All usable nodes together have too little memory.
    #[error(
        "the model needs {} for its weights and the KV cache of one context of {context} tokens; the {nodes} nodes that \
         can be used offer {}: add a node, shorten the context or take a smaller weight format",
        size(*.needs), size(*.offers)
    )]
    Memory {
        /// Bytes that the model needs.
        needs: u64,
        /// Bytes that the usable nodes offer.
        offers: u64,
        /// Tokens of a context.
        context: u32,
        /// Nodes that could be used.
        nodes: usize,
    },
    /// There is memory enough, but not in pieces that hold whole layers.
    #[error(
        "the {nodes} nodes that can be used offer {}, and the model needs {}, but no split into whole layers of {} fits them: \
         give a node more memory, or shorten the context of {context} tokens",
        size(*.offers), size(*.needs), size(*.layer)
    )]
    Pieces {
        /// Bytes that the model needs.
        needs: u64,
        /// Bytes that the usable nodes offer.
        offers: u64,
        /// Bytes of a layer with the KV rows of one context.
        layer: u64,
        /// Tokens of a context.
        context: u32,
        /// Nodes that could be used.
        nodes: usize,
    },
    /// So many stages cannot be made.
    #[error(
        "{asked} stages were asked for, but {nodes} nodes that can be used and {layers} layers do not make so many that hold the \
         model"
    )]
    Stages {
        /// Number of stages in the policy.
        asked: u32,
        /// Nodes that could be used.
        nodes: usize,
        /// Layers of the model.
        layers: u32,
    },
}

impl PlanError {
    /// The error for a search on `mesh` without a result.
    pub(super) fn of(
        model: &ModelSpec,
        mesh: &Mesh<'_>,
        mut left_out: Vec<LeftOut>,
        policy: &Policy,
    ) -> Self {
        let context = policy.context;
        let nodes = mesh.nodes.len();
        let needs = stage_bytes(model, 0..model.layers, context.into());
        let offers = mesh
            .nodes
            .iter()
            .fold(0u64, |sum, node| sum.saturating_add(node.memory));
        if nodes == 0 {
            left_out.sort_by(|a, b| a.node.cmp(&b.node));
            return PlanError::Nobody { left_out };
        }
        if offers < needs {
            return PlanError::Memory {
                needs,
                offers,
                context,
                nodes,
            };
        }
        match policy.stages {
            Some(asked) => PlanError::Stages {
                asked,
                nodes,
                layers: model.layers,
            },
            None => PlanError::Pieces {
                needs,
                offers,
                layer: super::cost::layer_bytes(model, context.into()),
                context,
                nodes,
            },
        }
    }
}

/// The reasons as text, counted.
fn reasons(left_out: &[LeftOut]) -> String {
    let count =
        |which: fn(&Reason) -> bool| left_out.iter().filter(|one| which(&one.reason)).count();
    let counts = [
        (
            count(|reason| matches!(reason, Reason::Reserved { .. })),
            "reserved for something else",
        ),
        (
            count(|reason| matches!(reason, Reason::UnknownSpeed)),
            "of unknown speed",
        ),
        (
            count(|reason| matches!(reason, Reason::TooLittleMemory { .. })),
            "without memory for one layer and one context",
        ),
    ];
    let words: Vec<String> = counts
        .iter()
        .filter(|(count, _)| *count > 0)
        .map(|(count, what)| format!("{count} {what}"))
        .collect();
    words.join(", ")
}

/// A size for people, such as `4.1 GiB`.
pub(super) fn size(bytes: u64) -> String {
    let mib = bytes as f64 / (1 << 20) as f64;
    if mib < 1.0 {
        format!("{:.1} KiB", mib * 1024.0)
    } else if mib < 1000.0 {
        format!("{mib:.1} MiB")
    } else {
        format!("{:.1} GiB", mib / 1024.0)
    }
}
