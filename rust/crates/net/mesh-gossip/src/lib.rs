//! Signed gossip between the nodes of a mesh: who is alive, and small state that all of them keep.
//!
//! [`Gossip`] is a state machine without sockets, tasks or a clock. Frames that arrived go into [`Gossip::receive`],
//! identity documents into [`Gossip::introduce`]; whoever drives it calls [`Gossip::poll`] at the time that
//! [`Gossip::next_timeout`] names and sends what comes out. docs/explanation/gossip.md explains the algorithm.
//!
//! - [`envelope`]: the signature, mesh, epoch and counter around every frame. It is checked before the content is read.
//! - [`directory`]: the peers whose identity documents the mesh root signed: their keys, replay windows and budgets.
//! - [`swim`]: membership and suspicion, by `foca`.
//! - [`store`]: signed records, spread as rumours and reconciled by digests.
//! - [`threats`], [`memory`], [`pulse`]: the topics.
//! - [`machine`]: the condition of this machine and the epoch of this start, from files.
//!
//! Membership comes from `foca` rather than `chitchat`. Foca takes timers and packets and returns packets and timers, and
//! asks the caller for the encoding, so envelopes, simulated time and bounds fit around it. Chitchat reads Tokio's clock in
//! its failure detector, owns its socket loop, and replicates key-value state that is not signed by its owner.

#![forbid(unsafe_code)]

mod clock;
mod counts;
mod directory;
mod envelope;
mod gossip;
mod machine;
mod memory;
mod pulse;
mod store;
mod swim;
mod threats;

pub use clock::Now;
pub use counts::{Counts, REFUSALS, Refusal};
pub use envelope::{HEADER_BYTES, LONGEST_FRAME, sender_of};
pub use gossip::{Config, Event, Gossip, Member, MemberState, Transmit};
pub use machine::next_epoch;
pub use memory::MemoryRecord;
pub use pulse::{FleetPulse, Pulse, Range};
pub use store::{LONGEST_NAME, LONGEST_VALUE, StoreError};
pub use threats::{Sighting, THREAT_LIFE};
