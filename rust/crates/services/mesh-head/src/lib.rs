//! The head: the router of the mesh.
//!
//! Clients ask it over HTTP (the OpenAI API, [`http`]) or DCF/UDP ([`clients`], with [`chunk_sender`] for large answers);
//! workers connect to it over QUIC ([`links`]) and, if they are of DCF v5.0.0, over UDP ([`worker_bus`]). In between stand
//! the sans-IO cores ([`core`]) that decide who answers what, the state they share ([`mesh`]), and one task per request
//! ([`drive`], [`embed`]) that carries an answer from its worker to its client, and from one worker to the next when that
//! one dies.
//!
//! [`Head::start`] starts all of it in-process; [`mesh_service::run`] makes a program of it.

#![forbid(unsafe_code)]

pub mod chunk_sender;
pub mod clients;
pub mod config;
pub mod core;
mod drains;
pub mod drive;
pub mod embed;
pub mod fields;
mod head;
pub mod http;
pub mod ids;
pub mod json;
pub mod legacy;
pub mod links;
pub mod mesh;
pub mod metrics;
mod pins;
mod service;
pub mod task;
pub mod worker_bus;

pub use config::Config;
pub use head::{Head, HeadHandle, Live, StartError};
