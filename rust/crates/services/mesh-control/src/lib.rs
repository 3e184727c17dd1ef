//! The head's decisions as plain state machines: no socket, no clock, no task.
//!
//! Events and the current time go in, decisions come out; `mesh-head` carries them out. So every failure case
//! is an ordinary unit test with simulated time.
//!
//! - [`registry`]: the workers, the models that they serve and their load.
//! - [`router`]: chooses the worker that answers a request soonest.
//! - [`placement`]: registry, router and the bounded queue together.
//! - [`fair`]: the order of that queue, by ingress and source.
//! - [`request`]: the life of one answer across worker deaths.
//! - [`embedding`]: a request for embeddings cut into parts for several workers.
//! - [`embedding_workers`]: the workers among which a request for embeddings is divided.
//! - [`image`]: what has come of an image, enough to go on elsewhere.
//! - [`image_files`]: finished images that clients fetch by a name.
//! - [`reputation`]: nodes that failed or gave wrong answers, and their pauses and quarantines.
//! - [`spotcheck`]: asks several workers the same question and compares their answers.
//! - [`speed`]: speeds as the head measures them.
//! - [`rings`]: forms rings for models that no single worker serves, and repairs them after a loss.
//! - [`tracker`]: the workers' pieces of models, and the worker that downloads one from outside the mesh.
//! - [`held_back`]: messages of nodes in quarantine, applied when the quarantine is over.
//! - [`dedup`]: runs a repeated DCF task only once.
//! - [`outbox`]: sends answers of many datagrams at the pace of their receivers.

#![forbid(unsafe_code)]

pub mod affinity;
pub mod dedup;
pub mod duplicates;
pub mod embedding;
pub mod embedding_workers;
pub mod fair;
pub mod held_back;
pub mod image;
pub mod image_files;
pub mod image_upload;
pub mod length;
#[cfg(test)]
mod logs;
pub mod memory;
pub mod outbox;
pub mod placement;
pub mod registry;
pub mod reputation;
pub mod request;
pub mod rings;
pub mod router;
pub mod share;
pub mod speed;
pub mod spotcheck;
pub mod suspects;
pub mod tracker;
