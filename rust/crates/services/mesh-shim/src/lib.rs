//! The shim: a bidirectional UDP bridge from clients to a live head.
//!
//! - [`bridge`] decides: a state machine without sockets and without a clock;
//! - [`batch`] moves datagrams in batches, with one system call for many;
//! - [`shim`] starts the loop between the two (`event_loop`) on a thread of its own;
//! - [`metrics`] shows its counters to Prometheus;
//! - [`config`] holds the operator's settings, [`stats`] the counters;
//! - `service` makes a program of it.
#![forbid(unsafe_code)]

pub mod batch;
pub mod bridge;
mod candidates;
pub mod config;
mod control;
mod event_loop;
pub mod metrics;
mod resolve;
mod service;
pub mod shim;
pub mod stats;

pub use config::Config;
pub use shim::{Shim, ShimHandle};
pub use stats::Stats;

/// The service's `main`, compiled with the service: a generic call from the binary would compile all of it twice.
pub fn main() -> std::process::ExitCode {
    mesh_service::run::<Shim>()
}
