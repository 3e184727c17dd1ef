//! The peers of a node: everyone whose identity document the mesh root has signed and this node was shown.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Instant;

use mesh_identity::{Document, ExpandedKey, NodeId, PublicKey};
use sha2::{Digest, Sha256};

use crate::clock::{Budget, Now};
use crate::counts::Refusal;
use crate::envelope::Window;
use crate::pulse::Pulse;

/// A node that the mesh root has signed a document about.
#[derive(Debug)]
pub(crate) struct Peer {
    pub(crate) key: PublicKey,
    pub(crate) name: String,
    pub(crate) role: String,
    /// Digest of the document, so that the same one is not verified again.
    document: [u8; 32],
    not_before: u64,
    not_after: u64,
    pub(crate) window: Window,
    frames: Budget,
    pub(crate) record_budget: Budget,
    /// The last pulse in a frame of this node, and when it came.
    pub(crate) pulse: Option<(Pulse, Instant)>,
    pub(crate) heard: Option<Instant>,
}

impl Peer {
    pub(crate) fn is_valid_at(&self, unix: u64) -> bool {
        (self.not_before..self.not_after).contains(&unix)
    }

    /// Takes the cost of one signature from this sender's budget.
    pub(crate) fn may_cost(&mut self, now: Instant) -> bool {
        self.frames.take(FRAME_RATE, FRAME_BURST, now)
    }

    pub(crate) fn may_cost_record(&mut self, now: Instant) -> bool {
        self.record_budget.take(RECORD_RATE, RECORD_BURST, now)
    }
}

/// All known peers, by id.
#[derive(Debug)]
pub(crate) struct Directory {
    mesh: [u8; 32],
    root: PublicKey,
    most: usize,
    peers: BTreeMap<NodeId, Peer>,
    /// Keys of peers that signed something, prepared for the next time.
    expanded: HashMap<NodeId, Arc<ExpandedKey>>,
    /// Verifications of the root's signatures.
    documents: Budget,
}

impl Directory {
    pub(crate) fn new(mesh: [u8; 32], root: PublicKey, most: usize, now: Instant) -> Self {
        Self {
            mesh,
            root,
            most,
            peers: BTreeMap::new(),
            expanded: HashMap::new(),
            documents: Budget::full(DOCUMENT_BURST, now),
        }
    }

    /// Takes in an identity document. True means that the peer was unknown before.
    pub(crate) fn introduce(
        &mut self,
        document: &[u8],
        own: NodeId,
        now: Now,
    ) -> Result<(NodeId, bool), Refusal> {
        let digest: [u8; 32] = Sha256::digest(document).into();
        if let Some((id, _)) = self.peers.iter().find(|(_, peer)| peer.document == digest) {
            return Ok((*id, false));
        }
        if !self
            .documents
            .take(DOCUMENT_RATE, DOCUMENT_BURST, now.instant)
        {
            return Err(Refusal::Rate);
        }
        let read = Document::verify(document, &self.root).map_err(|_| Refusal::Document)?;
        if read.root != self.mesh {
            return Err(Refusal::Mesh);
        }
        if !read.is_valid_at(now.unix) {
            return Err(Refusal::Expired);
        }
        let id = read.node_id();
        if id == own {
            return Err(Refusal::Own);
        }
        if let Some(peer) = self.peers.get_mut(&id) {
            // The document of the later end counts: an old one may arrive late.
            if read.not_after > peer.not_after {
                peer.document = digest;
                (peer.name, peer.role) = (read.name, read.role);
                (peer.not_before, peer.not_after) = (read.not_before, read.not_after);
            }
            return Ok((id, false));
        }
        if self.peers.len() >= self.most {
            // A node that left the mesh makes room.
            let gone = self
                .peers
                .iter()
                .find(|(_, peer)| !peer.is_valid_at(now.unix));
            let gone = *gone.ok_or(Refusal::Full)?.0;
            self.remove(gone);
        }
        let peer = Peer {
            key: read.key,
            name: read.name,
            role: read.role,
            document: digest,
            not_before: read.not_before,
            not_after: read.not_after,
            window: Window::default(),
            frames: Budget::full(FRAME_BURST, now.instant),
            record_budget: Budget::full(RECORD_BURST, now.instant),
            pulse: None,
            heard: None,
        };
        self.peers.insert(id, peer);
        Ok((id, true))
    }

    pub(crate) fn get(&self, id: NodeId) -> Option<&Peer> {
        self.peers.get(&id)
    }

    pub(crate) fn get_mut(&mut self, id: NodeId) -> Option<&mut Peer> {
        self.peers.get_mut(&id)
    }

    /// The key of a peer, prepared for verifications.
    pub(crate) fn key(&mut self, id: NodeId) -> Option<Arc<ExpandedKey>> {
        let peer = self.peers.get(&id)?;
        if self.expanded.len() >= MOST_EXPANDED && !self.expanded.contains_key(&id) {
            // Those that are still in use come back one by one.
            self.expanded.clear();
        }
        let expand = || Arc::new(peer.key.expand());
        Some(self.expanded.entry(id).or_insert_with(expand).clone())
    }

    pub(crate) fn remove(&mut self, id: NodeId) -> bool {
        self.expanded.remove(&id);
        self.peers.remove(&id).is_some()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (NodeId, &Peer)> {
        self.peers.iter().map(|(id, peer)| (*id, peer))
    }

    pub(crate) fn len(&self) -> usize {
        self.peers.len()
    }
}

/// Prepared keys, of about 40 kB each.
const MOST_EXPANDED: usize = 128;
/// Frames of one sender that are verified, per second and at once. A node sends at most ten a second.
const FRAME_RATE: f32 = 20.0;
const FRAME_BURST: f32 = 60.0;
/// Records in frames of one sender that are verified.
const RECORD_RATE: f32 = 20.0;
const RECORD_BURST: f32 = 100.0;
/// Documents of all that are verified. A burst admits a whole mesh.
const DOCUMENT_RATE: f32 = 20.0;
const DOCUMENT_BURST: f32 = 1100.0;
