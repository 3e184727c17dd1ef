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
//! Recovery rests on three properties. Rows are independent bit for bit, so computing a row again gives the
//! same row. A replica knows the tokens behind its KV rows ([`TokenLog`]), so comparing the tokens finds the
//! rows that are still valid; no history of messages is needed. And the head alone changes the members of a
//! ring, each change being a new *epoch*. The page on the architecture describes what follows from them.

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
pub use failure_detector::Suspicion;
pub use replica::{Out, StageReplica};
pub use token_log::TokenLog;

use mesh_engine::{SlotId, StageError};

/// Errors of computing a step, or of a standby taking in replicated rows.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages name the fields")]
pub enum StepError {
    /// The slot does not exist.
    #[error("slot {slot} does not exist: this stage has {slots}")]
    NoSuchSlot { slot: SlotId, slots: u32 },
    /// The step begins behind the rows held.
    #[error("slot {slot} holds {held} rows, but the step begins at {position}")]
    Gap {
        slot: SlotId,
        held: u32,
        position: u32,
    },
    /// Lengths that do not fit each other.
    #[error("malformed step: {0}")]
    Malformed(String),
    /// The stage itself failed.
    #[error(transparent)]
    Stage(#[from] StageError),
}
