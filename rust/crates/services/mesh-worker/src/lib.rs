//! The worker: hosts engines, answers tasks.
//!
//! Everything that it holds, wants, offers, deploys and serves is decided in [`mesh_worker_core`], behind one
//! lock (`core`). `models`, `loading`, `rings` and `head` carry the decisions out.
//!
//! [`Worker::start`] loads the models (`host`), joins the mesh (`join`) and keeps the link to the head up (`head`).
//! Each request of the head is a stream of its own (`answer`), on which the worker shows that it lives
//! (`life`). All kinds of work are served in the same way; a kind has its codec (`codec`) and loads its models
//! (`generate`, `embed`, `image`). The number of requests that are prepared for engines at once is bounded
//! (`preparations`). Plain DCF tasks, as v5.0.0 heads send them, come over UDP (`legacy`).

#![forbid(unsafe_code)]

mod answer;
mod codec;
pub mod config;
mod core;
mod embed;
#[cfg(test)]
mod engine_death;
mod error;
mod evidence;
mod generate;
mod gossip;
mod head;
mod heartbeats;
mod host;
mod image;
mod join;
mod lan;
mod legacy;
mod life;
mod loading;
mod lock;
mod metrics;
mod models;
mod peers;
mod precedence;
mod preparations;
mod rings;
mod served;
mod service;
pub mod templates;
mod token;
mod vram;
mod worker;

pub use config::Config;
pub use error::WorkerError;
pub use worker::{Live, Worker, WorkerHandle};

/// The service's `main`, compiled with the service: a generic call from the binary would compile all of it twice.
pub fn main() -> std::process::ExitCode {
    // Before there are threads.
    #[cfg(feature = "images")]
    mesh_engine_tch::share_memory();
    mesh_service::run::<Worker>()
}
