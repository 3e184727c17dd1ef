//! What a node can do, measured; and placement: which node holds which layers of a model.
//!
//! [`place`](mod@place) is a pure function from measurements to a plan: no clock, no I/O, the same plan from the same numbers
//! wherever it runs.

#![forbid(unsafe_code)]

mod offer;
pub mod place;

pub use place::{
    Assignment, Candidate, Explanation, LeftOut, ModelSpec, Objective, PathSpec, Plan, PlanError,
    PlannedStage, Policy, Reason, evaluate, explain, place, replacement_for, standby_for,
};
