//! `threats`: sightings of attacks, which reach every node, each at most once, and expire.

use std::time::Duration;

use mesh_identity::NodeId;
use mesh_proto::GossipSighting;
use prost::Message as _;
use sha2::{Digest, Sha256};

use crate::store::Entry;

/// Time after which a sighting is forgotten.
pub const THREAT_LIFE: Duration = Duration::from_secs(24 * 3600);

/// A sighting, with the node that signed it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sighting {
    /// The node that reports it.
    pub origin: NodeId,
    /// Kind, for example `expelled`.
    pub kind: String,
    /// The node or address that it is about.
    pub subject: String,
    /// Text for people.
    pub detail: String,
    /// Time of the sighting, seconds since the Unix epoch.
    pub seen: u64,
}

impl Sighting {
    /// Name of the record of a sighting: one per kind and subject.
    pub(crate) fn name(kind: &str, subject: &str) -> [u8; 32] {
        let mut hash = Sha256::new();
        hash.update(Sha256::digest(kind));
        hash.update(subject);
        hash.finalize().into()
    }

    pub(crate) fn encode(kind: &str, subject: &str, detail: &str, seen: u64) -> Vec<u8> {
        let sighting = GossipSighting {
            kind: plain(kind, LONGEST_KIND),
            subject: plain(subject, LONGEST_SUBJECT),
            detail: plain(detail, LONGEST_DETAIL),
            seen,
        };
        sighting.encode_to_vec()
    }

    /// Reads a record's value; `None` if it holds no sighting, or was withdrawn.
    pub(crate) fn read(entry: &Entry) -> Option<Self> {
        let wire = GossipSighting::decode(&entry.value[..]).ok()?;
        let sighting = Self {
            origin: entry.origin,
            kind: plain(&wire.kind, LONGEST_KIND),
            subject: plain(&wire.subject, LONGEST_SUBJECT),
            detail: plain(&wire.detail, LONGEST_DETAIL),
            seen: wire.seen,
        };
        (!sighting.kind.is_empty()).then_some(sighting)
    }
}

/// Text of a peer, fit to show: no control characters, bounded length.
fn plain(text: &str, most: usize) -> String {
    text.chars()
        .filter(|c| !c.is_control())
        .take(most)
        .collect()
}

const LONGEST_KIND: usize = 32;
const LONGEST_SUBJECT: usize = 80;
const LONGEST_DETAIL: usize = 120;
