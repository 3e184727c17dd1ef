//! Expulsion of nodes: their links end, their requests go elsewhere, and all workers hear of it.

use dcf::{Message, MsgType};
use mesh_control::registry::WorkerId;
use mesh_net::trust::EXPELLED;
use mesh_proto::{Expelled, ExpelledNode};
use tracing::warn;

use super::state::{Mesh, message};

impl Mesh {
    /// Removes a node at once, as if its link had ended, and closes that: its requests run again elsewhere,
    /// its parts of rings go to standbys. Whether it may come back is for the deny list to say.
    pub(crate) fn expel(&self, node: &str, reason: &str) {
        self.change(|state, now| {
            let worker = state.placement.registry.of_node(node);
            let id = worker.map(|worker| worker.id);
            if let Some(peer) = id.and_then(|id| state.remove(id, reason, now)) {
                peer.link.close(EXPELLED, reason);
            }
        });
    }

    /// Ends a node's quarantine and forgives its faults. Returns true if it was in quarantine.
    pub(crate) fn readmit(&self, node: &str) -> bool {
        self.change(|state, now| {
            state.rings.readmit(node, now);
            state.placement.registry.readmit(node, now)
        })
    }

    /// Tells all workers which nodes are expelled now.
    pub(crate) fn tell_expelled(&self) {
        self.change(|state, now| {
            // Read under the lock: of two changes, all workers get the later list last.
            let message = self.expelled_message();
            let ids: Vec<WorkerId> = state.peers.keys().copied().collect();
            for id in ids {
                self.order(state, id, message.clone(), now);
            }
        });
    }

    /// The whole list, also an empty one: a worker may know an older one.
    pub(super) fn expelled_message(&self) -> Message {
        let nodes = self.deny_list.list().into_iter();
        let nodes = nodes.map(|(node_id, expulsion)| ExpelledNode {
            node_id,
            name: expulsion.name,
            since: expulsion.since,
        });
        let nodes = nodes.collect();
        message(MsgType::EXPELLED, 0, &Expelled { nodes })
    }

    /// The audit line of an expulsion or a readmission.
    pub(crate) fn note_admission(&self, event: &'static str, node: &str, name: &str, reason: &str) {
        let decision = event.strip_prefix("node ").unwrap_or(event);
        self.audit.revoked(node, name, decision, reason);
        warn!(event, node, name, reason, "{event} by an operator");
    }
}
