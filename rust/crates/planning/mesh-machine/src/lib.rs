//! What a machine is and can do.
//!
//! [`hardware::probe`] and [`Memory`] read sysfs and procfs below any root, so that tests use made-up trees;
//! what cannot be read is left out. [`measure`] finds out how fast the machine is, with real layers of a
//! model. [`boot`] decides what a live image does on it.
//!
//! Profiles as data, and what is made of them, are `arcanum-profiler`'s.

#![forbid(unsafe_code)]

pub mod boot;
pub mod files;
pub mod hardware;
pub mod measure;
mod memory;
mod nvml;
mod processor;

pub use measure::{MeasureError, ProfileOptions, Profiler, choose_format, measure_layers};
pub use memory::Memory;
