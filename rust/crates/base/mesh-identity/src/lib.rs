//! Identities of nodes: ML-DSA-65 keys (FIPS 204), and the statements that are signed with them.
//!
//! - [`IdentityKey`] is a node's secret, kept in a file for its owner only; its [`PublicKey`] gives the [`NodeId`], the
//!   SHA-256 of its 1,952 bytes;
//! - [`Transcript`] is the text of a proof of possession: it binds a key to one TLS session, one mesh and one request;
//! - [`Document`] is the mesh root's signed statement about a node: its key, name, role and validity;
//! - [`Intermediate`] is the root's statement about a key that signs documents instead of it.
//!
//! Each kind of statement has a context string of its own, so that a signature over one never verifies as another.
//! Signatures are hedged: fresh randomness goes into each, and a bad source of it does not reveal the key. Nothing here
//! reads a clock or a socket; only [`IdentityKey::load`] and its relatives touch files.

#![forbid(unsafe_code)]

mod document;
mod file;
mod intermediate;
mod key;
mod proof;

pub use document::{Document, DocumentError, LONGEST_DOCUMENT};
pub use file::KeyFileError;
pub use intermediate::Intermediate;
pub use key::{
    ALGORITHM, ALGORITHM_NAME, ExpandedKey, IdentityKey, KeyError, NodeId, NodeIdError,
    PUBLIC_KEY_BYTES, PublicKey, SIGNATURE_BYTES,
};
pub use proof::{ProofError, Purpose, Transcript};
