//! What [`super::Rings`] decides: things to do, and things to say.

use mesh_proto::ModelCard;

/// What the shell is to do.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Send this worker its ring.
    Send {
        /// Node id.
        node: String,
        /// The message.
        ring: mesh_proto::Ring,
    },
    /// This worker answers for the ring's model from now on.
    Serve {
        /// Node id of the driver.
        node: String,
        /// The ring.
        ring: u64,
        /// What it serves.
        card: ModelCard,
    },
    /// This worker no longer answers for the model.
    Withdraw {
        /// Node id.
        node: String,
        /// The ring.
        ring: u64,
        /// Model name.
        model: String,
    },
    /// Ask this worker for a sign of life on its link.
    Ask {
        /// Node id.
        node: String,
    },
    /// Something for the log and the metrics.
    Note(Note),
}

/// What happened, for the log and the metrics.
#[derive(Debug, Clone, PartialEq)]
pub enum Note {
    /// A ring was planned.
    Formed {
        /// The ring.
        ring: u64,
        /// Model name.
        model: String,
        /// Who holds which layers.
        layout: String,
        /// Why it was made.
        reason: String,
    },
    /// A ring's driver serves.
    Serving {
        /// The ring.
        ring: u64,
        /// Its epoch.
        epoch: u32,
        /// Model name.
        model: String,
        /// Name of the driver.
        driver: String,
    },
    /// A ring's members changed because some were lost.
    Failover {
        /// The ring.
        ring: u64,
        /// Its new epoch.
        epoch: u32,
        /// Model name.
        model: String,
        /// Who was lost and who took over.
        reason: String,
    },
    /// A ring's standbys changed.
    Standbys {
        /// The ring.
        ring: u64,
        /// Model name.
        model: String,
        /// Why.
        reason: String,
    },
    /// A stage moved away from a drained worker.
    Moved {
        /// The ring.
        ring: u64,
        /// Its new epoch.
        epoch: u32,
        /// Model name.
        model: String,
        /// From whom to whom.
        reason: String,
    },
    /// A member does not reach another one, which the head still hears.
    Doubted {
        /// The ring.
        ring: u64,
        /// Name of the one that is not reached.
        name: String,
        /// Name of the other.
        by: String,
    },
    /// A ring's members stay, and make new links.
    Relinked {
        /// The ring.
        ring: u64,
        /// Its new epoch.
        epoch: u32,
        /// Model name.
        model: String,
        /// Between whom.
        reason: String,
    },
    /// A ring is no more.
    Dissolved {
        /// The ring.
        ring: u64,
        /// Model name.
        model: String,
        /// Why.
        reason: String,
        /// It ends by plan: another one takes its place, or nothing runs on it any more.
        planned: bool,
    },
    /// No plan was found.
    Unplanned {
        /// Model name.
        model: String,
        /// What is missing.
        reason: String,
    },
    /// A worker is not trusted with a stage for a while.
    Suspected {
        /// Its name.
        name: String,
        /// Why.
        reason: String,
    },
    /// A driver came through a change of epoch.
    Recovered {
        /// The ring.
        ring: u64,
        /// Model name.
        model: String,
        /// What it reports.
        recovery: mesh_proto::Recovery,
    },
}

/// Whether a model that nobody serves now is about to be served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Prospect {
    /// A ring of it is being formed or recovers.
    Coming,
    /// There is no plan for it, for this reason.
    Impossible(String),
}
