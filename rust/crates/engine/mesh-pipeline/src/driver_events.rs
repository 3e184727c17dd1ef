//! The events that a driver takes and the actions that it gives.

use mesh_engine::RequestError;
use mesh_proto::{HeldSlot, Recovery, RingHeld, RingOutcome, RingPing, RingResend, RingStep};

use crate::failure_detector::Suspicion;
use crate::replica::Out;

/// Input of a driver.
#[derive(Debug)]
#[allow(missing_docs, reason = "the variants' comments name the fields")]
pub enum DriverEvent {
    /// A new epoch with other members, of so many stages with the driver's; hidden rows may travel as f16. Steps
    /// under way are void.
    Epoch {
        epoch: u32,
        stages: u32,
        half_rows: bool,
    },
    /// The rows that a member holds.
    Held { stage: u32, held: RingHeld },
    /// Hidden rows from the last stage but one.
    Rows(RingStep),
    /// A step failed at a member, or ended at a member before the last stage, as a replay does.
    Outcome { stage: u32, outcome: RingOutcome },
    /// A member answers a ping.
    Pong { stage: u32, ping: RingPing },
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
#[allow(missing_docs, reason = "the variants' comments name the fields")]
pub enum DriverOut {
    /// A step for stage 0.
    Step(RingStep),
    /// A ping for every member. The thread that carries it also gives it back as [`DriverEvent::Echo`].
    Ping(RingPing),
    /// A replay, for the member of `stage`.
    Resend { stage: u32, resend: RingResend },
    /// A message of the last stage's replica.
    Replica(Out),
    /// Measurements of the last stage, after a step.
    Gauges(DriverGauges),
    /// A member does not answer.
    Suspect(Suspicion),
    /// A member that was suspected has been heard again.
    Trust { stage: u32 },
    /// All members are there and the ring works.
    Running { epoch: u32 },
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
