//! Expulsion of nodes: their links end, their requests go elsewhere, and all workers hear of it.

use std::time::Instant;

use dcf::{Message, MsgType};
use mesh_control::registry::WorkerId;
use mesh_net::trust::EXPELLED;
use mesh_proto::{Expelled, ExpelledNode};
use prost::Message as _;
use tracing::warn;

use super::state::{Mesh, timestamp_us};

impl Mesh {
    /// Removes a node at once, as if its link had ended, and closes that: its requests run again elsewhere,
    /// its parts of rings go to standbys. Whether it may come back is for the deny list to say.
    pub(crate) fn expel(&self, node: &str, reason: &str) {
        let now = Instant::now();
        let mut guard = self.lock();
        let state = &mut *guard;
        let worker = state.placement.registry.of_node(node);
        let Some(id) = worker.map(|worker| worker.id) else {
            return;
        };
        if let Some(peer) = state.peers.remove(&id) {
            peer.link.close(EXPELLED, reason);
        }
        state.placement.leave(id, now);
        state.rings.left(node, reason, now);
        state.tracker.left(node);
        self.turn(state, now);
    }

    /// Ends a node's quarantine and forgives its faults. Returns true if it was in quarantine.
    pub(crate) fn readmit(&self, node: &str) -> bool {
        let now = Instant::now();
        let mut guard = self.lock();
        let state = &mut *guard;
        let was_out = state.placement.registry.readmit(node, now);
        state.rings.readmit(node, now);
        self.turn(state, now);
        was_out
    }

    /// Tells all workers which nodes are expelled now.
    pub(crate) fn tell_expelled(&self) {
        let now = Instant::now();
        let mut guard = self.lock();
        // Read under the lock: of two changes, all workers get the later list last.
        let message = self.expelled_message();
        let state = &mut *guard;
        let peers = state.peers.iter();
        let peers: Vec<(WorkerId, String)> = peers
            .map(|(id, peer)| (*id, peer.link.node_id().to_owned()))
            .collect();
        for (id, node) in peers {
            self.order(state, id, &node, message.clone(), now);
        }
        self.turn(state, now);
    }

    /// The whole list, also an empty one: a worker may know an older one.
    pub(super) fn expelled_message(&self) -> Message {
        let nodes = self.deny_list.list().into_iter();
        let nodes = nodes.map(|(node_id, expulsion)| ExpelledNode {
            node_id,
            name: expulsion.name,
            since: expulsion.since,
        });
        let body = Expelled {
            nodes: nodes.collect(),
        };
        Message::new(MsgType::EXPELLED, 0, timestamp_us(), body.encode_to_vec())
    }

    /// The audit line of an expulsion or a readmission.
    pub(crate) fn note_admission(&self, event: &'static str, node: &str, name: &str, reason: &str) {
        warn!(event, node, name, reason, "{event} by an operator");
    }
}
