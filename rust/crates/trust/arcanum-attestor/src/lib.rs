//! Enrolment at the head: who joins a mesh, who remains in it, and who is out.
//!
//! - [`Enrolment`] decides, without I/O and clock: join tokens ([`Tokens`]), members and nodes that wait for approval
//!   ([`Roster`]);
//! - [`EvidencePolicy`] judges what nodes state about themselves ([`Evidence`]), and [`EvidenceRecord`] keeps it with what
//!   changed;
//! - [`Attestor`] is the head's [`mesh_net::trust::Admission`]: it carries the decisions out, with the mesh root, the list
//!   of expelled nodes and the files of the head's state directory. Every change is on disk before it takes effect.
//!
//! A node is known by its id, the SHA-256 of its ML-DSA key. A node of an earlier version is known by the key of its
//! certificate until it renews that with a proof of its identity; its record, and its place on the list of expelled nodes,
//! follow it.

#![forbid(unsafe_code)]

mod attestor;
mod enrolment;
mod evidence;
mod narinfo;
mod news;
mod policy;
mod record;
mod roster;
mod text;
mod tokens;

pub use attestor::{Attestor, EnrolmentError};
pub use enrolment::{Approval, Candidate, Decision, Enrolment};
pub use evidence::{Change, Evidence, EvidenceError, Field, System, Tpm};
pub use narinfo::{NarinfoError, TrustedKey, TrustedKeyError, is_store_path};
pub use news::{EvidenceDecision, EvidenceNews};
pub use policy::{EvidencePolicy, OnChange, Reason, SystemRule, Version, VersionError};
pub use record::{Assessment, EvidenceRecord, Held, PastChange};
pub use roster::{KnownMember, Pending, Roster};
pub use tokens::{MOST_NODES, RETRY_WINDOW, Revocation, TokenRecord, TokenSpec, TokenUse, Tokens};
