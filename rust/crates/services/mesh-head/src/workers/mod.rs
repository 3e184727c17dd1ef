//! Connections to workers. A worker of the mesh connects over QUIC; an old one, which has no identity, speaks
//! plain DCF over UDP. To the rest of the head both are a [`crate::mesh::connection::Connection`].
//!
//! - [`links`]: Hello and Welcome, and everything that comes on a control stream;
//! - [`evidence`]: what workers report about themselves;
//! - [`proofs`]: the head's own questions to workers;
//! - [`requests`]: requests on streams of their own, as far as questions and clients' requests share them;
//! - [`bus`]: the worker bus, for heartbeats;
//! - [`legacy`]: workers of DCF v5.0.0 and v5.1, and all that is special about talking to them.

pub(crate) mod bus;
mod evidence;
mod legacy;
pub(crate) mod links;
mod proofs;
pub(crate) mod requests;
mod verdict;

pub(crate) use legacy::MOST_TASK_BYTES;
