//! Enrolment at the head: who joins a mesh, who remains in it, and who is out.
//!
//! - [`Enrolment`] decides, without I/O and clock: join tokens ([`Tokens`]), members and nodes that wait for approval
//!   ([`Roster`]);
//! - [`Attestor`] is the head's [`mesh_net::trust::Admission`]: it carries the decisions out, with the mesh root, the list
//!   of expelled nodes and the files of the head's state directory. Every change is on disk before it takes effect.
//!
//! A node is known by its id, the SHA-256 of its ML-DSA key. A node of an earlier version is known by the key of its
//! certificate until it renews that with a proof of its identity; its record, and its place on the list of expelled nodes,
//! follow it.

#![forbid(unsafe_code)]

mod attestor;
mod enrolment;
mod roster;
mod tokens;

pub use attestor::{Attestor, EnrolmentError};
pub use enrolment::{Approval, Candidate, Decision, Enrolment};
pub use roster::{KnownMember, Pending, Roster};
pub use tokens::{MOST_NODES, RETRY_WINDOW, Revocation, TokenRecord, TokenSpec, TokenUse, Tokens};
