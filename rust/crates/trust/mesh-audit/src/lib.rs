//! The audit trail: an append-only log of what a node accepted and decided, which nobody can change
//! unnoticed.
//!
//! - [`trail::Trail`] is the core without I/O and clock: records in; entries, tiles and signed checkpoints
//!   out. Entries are chained by HMAC-SHA256 under a key that moves forward every epoch ([`chain`]), and
//!   are the leaves of a Merkle tree ([`merkle`]).
//! - [`store::Store`] keeps it in a folder, in the format of C2SP tlog-tiles: synced in groups, recovered
//!   after a crash. [`home::Lock`] is the folder of a node's trails, one for each tier; [`writer::Audit`]
//!   writes them on a thread of its own, so that nobody waits for a disk.
//! - [`archive::Archive`] reads a trail, [`verify::verify`] checks every byte of it and tells where it was
//!   changed, [`proof::Proof`] proves one record to somebody who has only the trail's public key.
//!   [`witness`] cosigns checkpoints, and binds the trails of two heads after a partition. [`kept`] holds the
//!   roots of epochs that heads show to other nodes.
//!
//! A group of records is signed at once: one ML-DSA-44 signature over the root of the tree that has all of
//! them as leaves. So every record has a signature, by its inclusion, from the moment at which it is called
//! synced. At the end of an epoch the root gets an SLH-DSA signature, too, whose security rests on nothing
//! but a hash function.

#![forbid(unsafe_code)]

pub mod archive;
pub mod chain;
mod endorse;
mod folder;
pub mod home;
mod journal;
pub mod kept;
pub mod keys;
pub mod merkle;
pub mod note;
pub mod proof;
pub mod record;
pub mod recover;
pub mod store;
mod tier;
pub mod tiles;
pub mod trail;
pub mod verify;
pub mod witness;
pub mod writer;
