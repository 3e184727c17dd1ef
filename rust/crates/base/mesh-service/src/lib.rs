//! Functions that all services share: layered configuration, telemetry, systemd, signals, metrics, health.
//!
//! A binary's `main` is [`run`], which puts these modules together:
//!
//! 1. [`config::Loader`] merges defaults, file, environment and flags into one checked value;
//! 2. [`telemetry::init`] sends `tracing` to the journal, a terminal or JSON lines;
//! 3. [`metrics::Metrics`] and [`health::Health`] are served by [`health::serve`];
//! 4. [`shutdown::Shutdown`] turns SIGTERM into a drain with a limit, and SIGHUP into a [`reload`];
//! 5. [`notify`] tells systemd what the service is doing, and its watchdog whether the loops still turn.

#![forbid(unsafe_code)]

pub mod addresses;
pub mod ask;
pub mod config;
pub mod cookie;
pub mod failure;
pub mod files;
pub mod health;
pub mod http;
pub mod metrics;
pub mod network;
pub mod notify;
pub mod reload;
pub mod service;
pub mod shutdown;
pub mod telemetry;

pub use service::{Service, run};
