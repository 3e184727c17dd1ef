//! Output of [`super::Rings`]: actions for the shell, and counts.

use std::collections::BTreeMap;
use std::time::Duration;

use mesh_proto::ModelCard;

/// An action for the shell to carry out.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Send this worker its ring.
    Send {
        /// Node id of the worker.
        node: String,
        /// Members and stages, as to send to the worker.
        ring: mesh_proto::Ring,
    },
    /// This worker answers for the ring's model from now on.
    Serve {
        /// Node id of the driver.
        node: String,
        /// Id of the ring.
        ring: u64,
        /// The model as the ring serves it.
        card: ModelCard,
    },
    /// This worker no longer answers for the model.
    Withdraw {
        /// Node id of the worker.
        node: String,
        /// Id of the ring.
        ring: u64,
        /// Name of the model.
        model: String,
    },
    /// Ask this worker for a sign of life on its link.
    Ask {
        /// Node id of the worker.
        node: String,
    },
}

/// Counts since the last [`super::Rings::take_counts`], for the metrics.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RingCounts {
    /// Changes of members because some were lost, by model.
    pub failovers: BTreeMap<String, u64>,
    /// Members that another one did not reach and the head heard.
    pub doubted: u64,
    /// Rings whose members made new links.
    pub relinked: u64,
    /// Members that counted as lost because of what others reported.
    pub lost: u64,
    /// Pauses of running requests that a change of members caused, each with the model.
    pub gaps: Vec<(String, Duration)>,
}

/// Prospect of a model that no worker serves now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Prospect {
    /// A ring of it is being formed or recovers.
    Coming,
    /// There is no plan for it, for this reason.
    Impossible(String),
}
