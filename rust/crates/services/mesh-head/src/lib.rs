//! The head: the router of the mesh.
//!
//! The decisions are in [`mesh_control`]; this crate carries them out. Modules use only modules above them in
//! this list:
//!
//! - `refusals`: refused keys and tokens, counted for the audit trail;
//! - `audit`: the words of the audit trail;
//! - `mesh`: the state that all share, behind one lock;
//! - `workers`: connections to workers over QUIC, to old ones over UDP, and the UDP port for heartbeats;
//! - `flight`: one task per request, which carries an answer from its worker to its client, and from one
//!   worker to the next when that one dies;
//! - [`api`]: bodies of requests and answers, without I/O;
//! - `front`: the OpenAI API over HTTP, and DCF over UDP.
//!
//! [`Head::start`] starts all of it in-process; [`mesh_service::run`] makes a program of it.

#![forbid(unsafe_code)]

pub mod api;
mod audit;
pub mod config;
mod flight;
mod front;
mod head;
mod ids;
mod locks;
mod mesh;
mod metrics;
mod refusals;
mod roots;
mod sanctum;
mod service;
mod tally;
mod workers;

pub use config::Config;
pub use head::{Head, HeadHandle, Live, StartError};

/// The service's `main`, compiled with the service: a generic call from the binary would compile all of it twice.
pub fn main() -> std::process::ExitCode {
    mesh_service::run::<Head>()
}
