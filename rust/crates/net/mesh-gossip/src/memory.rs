//! `memory`: small records that every node keeps. Each belongs to the node that signed it; its greatest version counts.

use mesh_identity::NodeId;

use crate::store::Entry;

/// A record of the topic `memory`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryRecord {
    /// The node that signed it.
    pub origin: NodeId,
    /// Name, unique among the records of its origin.
    pub name: Vec<u8>,
    /// Version.
    pub version: u64,
    /// Value.
    pub value: Vec<u8>,
    /// End of its life, seconds since the Unix epoch.
    pub expires: u64,
}

impl From<&Entry> for MemoryRecord {
    fn from(entry: &Entry) -> Self {
        Self {
            origin: entry.origin,
            name: entry.name.clone(),
            version: entry.version,
            value: entry.value.clone(),
            expires: entry.expires,
        }
    }
}
