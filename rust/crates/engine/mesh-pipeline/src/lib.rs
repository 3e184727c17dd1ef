//! One model over several machines: the stages of a ring, their standbys, and recovery from the loss of any
//! of them.
//!
//! A *ring* runs one model in stages, each a contiguous range of layers on one worker. The worker of the
//! last stage is its *driver*. A step goes from the driver to stage 0 as tokens, from stage to stage as
//! hidden rows, and comes back to the driver, which computes the last stage, samples and plans the next
//! step. Several steps are under way at once.
//!
//! Nothing here does I/O or reads a clock. A [`StageReplica`] is one stage on one worker, as member or
//! as standby. A [`RingRunner`] is the driver: a [`mesh_engine::Runner`], so that scheduler, sampler and text
//! are those of a model on one machine.
//!
//! # Recovery
//! Three properties make it simple. Rows are independent bit for bit, so computing a row again gives the
//! same row. A replica knows the tokens behind its KV rows ([`TokenLog`]), so comparing the tokens finds
//! the rows that are still valid; no history of messages is needed. And the head alone changes the
//! members of a ring, each change being a new *epoch*.
//!
//! When an epoch begins, every member reports the rows it holds. The driver finds for each slot the rows that
//! all of them have; those behind are computed again, like a prompt. Where one member lacks many rows (a
//! stage that was just loaded), only its inputs are replayed: from the replay buffer of the stage before it,
//! or else from further up. Then the scheduler continues behind the valid rows; an answer's tokens are a
//! function of seed and index, so the client only sees a pause.
//!
//! In the background each member's KV rows are replicated to its standby. The stage before need not keep the
//! inputs of rows that the standby has.

#![forbid(unsafe_code)]

mod driver;
mod driver_events;
mod failure_detector;
mod replay;
mod replay_buffer;
mod replica;
mod replication;
#[cfg(test)]
mod simulation;
mod token_log;
mod wire;

pub use driver::RingRunner;
pub use driver_events::{DriverEvent, DriverGauges, DriverOut};
pub use replica::{Out, StageReplica};
pub use token_log::TokenLog;

use mesh_engine::{SlotId, StageError};

/// Errors of computing a step, or of a standby taking in replicated rows.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StepError {
    /// The slot does not exist.
    #[error("slot {slot} does not exist: this stage has {slots}")]
    NoSuchSlot {
        /// The slot named in the step.
        slot: SlotId,
        /// Number of slots of this stage.
        slots: u32,
    },
    /// The step begins behind the rows held.
    #[error("slot {slot} holds {held} rows, but the step begins at {position}")]
    Gap {
        /// The slot named in the step.
        slot: SlotId,
        /// KV rows that the slot holds.
        held: u32,
        /// Position of the step's first row.
        position: u32,
    },
    /// Lengths that do not fit each other.
    #[error("malformed step: {0}")]
    Malformed(String),
    /// The stage itself failed.
    #[error(transparent)]
    Stage(#[from] StageError),
}
