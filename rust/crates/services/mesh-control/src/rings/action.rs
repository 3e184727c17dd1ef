//! Output of [`super::Rings`]: actions for the shell and notes for the log.

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
    /// Something for the log and the metrics.
    Note(Note),
}

/// An event for the log and the metrics.
#[derive(Debug, Clone, PartialEq)]
pub enum Note {
    /// A ring was planned.
    Formed {
        /// Id of the ring.
        ring: u64,
        /// Name of the model.
        model: String,
        /// Stages with their workers, in one line.
        layout: String,
        /// Cause of its formation.
        reason: String,
    },
    /// A ring's driver serves.
    Serving {
        /// Id of the ring.
        ring: u64,
        /// Number of its epoch.
        epoch: u32,
        /// Name of the model.
        model: String,
        /// Name of the driver.
        driver: String,
    },
    /// A ring's members changed because some were lost.
    Failover {
        /// Id of the ring.
        ring: u64,
        /// Number of its new epoch.
        epoch: u32,
        /// Name of the model.
        model: String,
        /// The lost members and their successors.
        reason: String,
    },
    /// A ring's standbys changed.
    Standbys {
        /// Id of the ring.
        ring: u64,
        /// Name of the model.
        model: String,
        /// Cause of the change.
        reason: String,
    },
    /// A stage moved away from a drained worker.
    Moved {
        /// Id of the ring.
        ring: u64,
        /// Number of its new epoch.
        epoch: u32,
        /// Name of the model.
        model: String,
        /// The worker that hands over, and its successor.
        reason: String,
    },
    /// A member does not reach another one, which the head still hears.
    Doubted {
        /// Id of the ring.
        ring: u64,
        /// Name of the one that is not reached.
        name: String,
        /// Name of the other.
        by: String,
    },
    /// A ring's members stay, and make new links.
    Relinked {
        /// Id of the ring.
        ring: u64,
        /// Number of its new epoch.
        epoch: u32,
        /// Name of the model.
        model: String,
        /// The two members.
        reason: String,
    },
    /// A ring is no more.
    Dissolved {
        /// Id of the ring.
        ring: u64,
        /// Name of the model.
        model: String,
        /// Cause of its end.
        reason: String,
        /// It ends by plan: another one takes its place, or nothing runs on it any more.
        planned: bool,
    },
    /// No plan was found.
    Unplanned {
        /// Name of the model.
        model: String,
        /// The missing memory or workers, for people.
        reason: String,
    },
    /// A worker is not trusted with a stage for a while.
    Suspected {
        /// Name of the worker.
        name: String,
        /// Cause of the suspicion.
        reason: String,
    },
    /// A driver came through a change of epoch.
    Recovered {
        /// Id of the ring.
        ring: u64,
        /// Name of the model.
        model: String,
        /// The driver's report.
        recovery: mesh_proto::Recovery,
    },
}

/// Prospect of a model that no worker serves now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Prospect {
    /// A ring of it is being formed or recovers.
    Coming,
    /// There is no plan for it, for this reason.
    Impossible(String),
}
