//! The hardware of a machine, its speed, and its role in a live image.
//!
//! [`hardware::probe`] and [`Memory`] read sysfs and procfs below any root, so that tests use made-up trees;
//! unreadable values are left out. [`measure`] measures the machine's speed with real layers of a model.
//! [`boot`] decides the role of a machine that runs the live image. [`evidence::collect`] gathers what a node states
//! about itself when it joins.
//!
//! The profile types and placement are in `arcanum-profiler`.

#![forbid(unsafe_code)]

pub mod boot;
pub mod evidence;
pub mod files;
pub mod hardware;
pub mod measure;
mod memory;
mod nvml;
mod processor;
mod vram;

pub use measure::{
    Estimate, MeasureError, ProfileOptions, Profiler, choose_format, estimate, measure_layers,
    read_bandwidth,
};
pub use memory::Memory;
pub use vram::free_vram;
