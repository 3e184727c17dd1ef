//! The head's decisions as plain state machines: no socket, no clock, no task.
//!
//! Events and the current time go in, decisions come out; `mesh-head` carries them out. So every failure case is an ordinary
//! unit test with simulated time.
//!
//! - [`registry`]: which workers there are, what they serve, how loaded they are.
//! - [`router`]: which of them answers a request soonest.
//! - [`placement`]: registry, router and the bounded queue together.
//! - [`fair`]: whose turn it is in that queue.
//! - [`request`]: the life of one answer across worker deaths.
//! - [`embedding`]: a request for embeddings cut into parts for several workers.
//! - [`replicas`]: the workers among which a request for embeddings is divided.
//! - [`reputation`]: which nodes failed or gave wrong answers, and for how long they get nothing.
//! - [`spotcheck`]: the same question to several workers, and what follows from their answers.
//! - [`speed`]: speeds as the head measures them.
//! - [`rings`]: models that no single worker serves: who holds which layers, and what happens when one is lost.
//! - [`tracker`]: which worker has which pieces of which model, and who goes outside the mesh for one.
//! - [`held_back`]: what nodes in quarantine say counts when that is over.
//! - [`dedup`]: a repeated DCF task does not run twice.
//! - [`outbox`]: answers that no datagram holds go out as their receivers can take them.

#![forbid(unsafe_code)]

pub mod affinity;
pub mod dedup;
pub mod duplicates;
pub mod embedding;
pub mod fair;
pub mod held_back;
pub mod length;
pub mod memory;
pub mod outbox;
pub mod placement;
pub mod registry;
pub mod replicas;
pub mod reputation;
pub mod request;
pub mod rings;
pub mod router;
pub mod share;
pub mod speed;
pub mod spotcheck;
pub mod suspects;
pub mod tracker;
