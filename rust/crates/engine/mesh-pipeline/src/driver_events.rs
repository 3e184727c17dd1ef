//! The events that a driver takes and the actions that it gives.

use std::time::Duration;

use mesh_engine::RequestError;
use mesh_proto::{
    HeldSlot, Recovery, RingHeld, RingMirror, RingMirrored, RingOutcome, RingPing, RingResend,
    RingStep,
};

/// Input of a driver.
#[derive(Debug)]
pub enum DriverEvent {
    /// A new epoch with other members. Steps under way are void.
    Epoch {
        /// Number of the new epoch.
        epoch: u32,
        /// Stages, the driver's included.
        stages: u32,
        /// Hidden rows travel as f16.
        half_rows: bool,
    },
    /// The rows that a member holds.
    Held {
        /// Index of the member's stage.
        stage: u32,
        /// The rows it holds.
        held: RingHeld,
    },
    /// Hidden rows from the last stage but one.
    Rows(RingStep),
    /// A step failed at a member, or ended at a member before the last stage, as a replay does.
    Outcome {
        /// Index of the member's stage.
        stage: u32,
        /// The outcome of the step.
        outcome: RingOutcome,
    },
    /// A member answers a ping.
    Pong {
        /// Index of the member's stage.
        stage: u32,
        /// The member's answer.
        ping: RingPing,
    },
    /// This worker's own network thread has handled the ping with this number.
    Echo(u64),
    /// A standby for the last stage is ready; the rows it holds.
    Standby(Vec<HeldSlot>),
    /// The standby for the last stage is gone.
    NoStandby,
    /// The standby has taken in this many messages.
    Acknowledged(u64),
    /// The ring ended, or another worker drives it now.
    End(RequestError),
}

/// Output of a driver, for its owner to carry out.
#[derive(Debug, Clone, PartialEq)]
pub enum DriverOut {
    /// A step for stage 0.
    Step(RingStep),
    /// A ping for every member. The thread that carries it also gives it back as [`DriverEvent::Echo`].
    Ping(RingPing),
    /// A replay, for the member of `stage`.
    Resend {
        /// The stage that kept the rows.
        stage: u32,
        /// Rows to send again.
        resend: RingResend,
    },
    /// Acknowledged rows, for the last stage but one.
    Previous(RingMirrored),
    /// Replicated rows, for the standby of the last stage.
    Standby(RingMirror),
    /// Measurements of the last stage, after a step.
    Gauges(DriverGauges),
    /// A member does not answer.
    Suspect {
        /// Index of the suspected member's stage.
        stage: u32,
        /// Time since the member was last heard.
        silence: Duration,
        /// The member answers, but data passed on to it, or by it, does not arrive.
        link: bool,
    },
    /// A member that was suspected has been heard again.
    Trust {
        /// Index of the member's stage.
        stage: u32,
    },
    /// All members are there and the ring works.
    Running {
        /// Number of the epoch.
        epoch: u32,
    },
    /// The first step after a change of epoch is through.
    Recovered(Recovery),
}

/// Measurements of the last stage of a ring.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct DriverGauges {
    /// Rows that its standby lacks.
    pub lag: u64,
    /// Microseconds that its share of a step takes, sampling included, smoothed.
    pub step_us: f32,
    /// The same for steps of a few rows alone; 0 before the first.
    pub short_us: f32,
    /// Microseconds of all steps of more rows.
    pub prefill_us: u64,
    /// Bytes of KV rows that it holds.
    pub kv_bytes: u64,
}
