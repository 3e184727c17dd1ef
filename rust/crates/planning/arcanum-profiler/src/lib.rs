//! Profiles of machines as data, and placement: which node holds which layers of a model.
//!
//! - [`profile`] is a machine and its speeds, as `mesh-machine` measures them and a head hears of them;
//! - [`place`](mod@place) is a pure function from such measurements to a plan: no clock, no I/O, the same plan from the same numbers
//!   wherever it runs.

#![forbid(unsafe_code)]

pub mod generation;
pub mod gpu;
mod offer;
pub mod place;
pub mod profile;

pub use place::{
    Assignment, Candidate, Explanation, LeftOut, ModelSpec, Objective, PathSpec, Plan, PlanError,
    PlannedStage, Policy, Reason, evaluate, explain, place, replacement_for, standby_for,
};
pub use profile::{LayerSpeed, Profile};
