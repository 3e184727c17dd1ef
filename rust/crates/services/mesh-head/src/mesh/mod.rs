//! State that all front ends share: placement and rings behind their lock, the links of workers, and the
//! requests that wait for room.
//!
//! The lock is held for a decision, never across an await. Per token nothing is locked.
//!
//! - [`state`]: the state and its lock;
//! - [`members`], [`models`], [`nodes`], [`rings`]: events of workers, and their effects on the cores;
//! - [`placing`], [`lease`]: a worker and memory for each request;
//! - [`former`]: nodes under other ids; [`roots`]: rotation of the mesh root;
//! - [`former`]: nodes under other ids; [`evidence`]: decisions on evidence of nodes;
//! - [`findings`]: faults of workers; [`tick`]: periodic work;
//! - [`connection`]: a connection to a worker, whatever carries it; [`sessions`]: keys of heartbeats;
//! - [`gossip`], [`gossip_node`]: the head's part in the gossip, and the frames of workers;
//! - [`drains`], [`pins`]: state that outlasts a restart.

pub(crate) mod connection;
mod drains;
mod evidence;
mod findings;
mod former;
mod gossip;
mod gossip_node;
mod lease;
mod members;
mod models;
mod nodes;
mod pins;
mod placing;
mod rings;
mod roots;
mod sessions;
mod state;
mod tick;

pub(crate) use gossip_node::GossipView;
pub(crate) use lease::Lease;
pub(crate) use placing::Assignment;
pub(crate) use rings::RingRole;
pub(crate) use state::{Mesh, message, timestamp_us};
