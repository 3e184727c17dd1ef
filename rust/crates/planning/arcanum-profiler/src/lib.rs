//! What a node can do, measured; and placement: which node holds which layers of a model.
//!
//! - [`Profile::take`] finds out what the machine is: processor, memory and its bandwidth, disk, GPUs, load. What takes time to
//!   measure is kept in a file and measured again when the processor, the threads, the kernels or the program change.
//! - [`measure_layers`] loads a few layers of a real model and times them; [`choose_format`] picks the weight format by that.
//! - [`place`](mod@place) is a pure function from such measurements to a plan: no clock, no I/O, the same plan from the same numbers
//!   wherever it runs.

#![forbid(unsafe_code)]

mod disk;
mod gpu;
mod layers;
mod machine;
mod memory;
mod offer;
pub mod place;
mod profile;

pub use gpu::Gpu;
pub use layers::{FormatChoice, LayerSpeed, MeasureError, choose_format, measure_layers};
pub use machine::LoadMeter;
pub use place::{
    Assignment, Candidate, Explanation, LeftOut, ModelSpec, Objective, PathSpec, Plan, PlanError,
    PlannedStage, Policy, Reason, evaluate, explain, place, replacement_for, standby_for,
};
pub use profile::{MeasuredPath, Profile, ProfileOptions};
