//! Expulsion of nodes: their links end, their requests go elsewhere, and all workers hear of it.

use std::sync::atomic::Ordering;

use dcf::{ErrorCode, Message, MsgType};
use mesh_control::registry::WorkerId;
use mesh_net::trust::{EXPELLED, Expulsion, MOST_EXPELLED};
use mesh_proto::{Expelled, ExpelledNode};
use tracing::warn;

use super::state::{Mesh, message};

impl Mesh {
    /// Removes a node at once, as if its link had ended, and closes that: its requests run again elsewhere,
    /// its parts of rings go to standbys. Whether it may come back is for the deny list to say.
    pub(crate) fn expel(&self, node: &str, reason: &str) {
        self.disconnect(node, EXPELLED, reason);
    }

    /// The same with another code for the node.
    pub(crate) fn disconnect(&self, node: &str, code: ErrorCode, reason: &str) {
        self.change(|state, now| {
            let worker = state.placement.registry.of_node(node);
            let id = worker.map(|worker| worker.id);
            if let Some(peer) = id.and_then(|id| state.remove(id, reason, now)) {
                peer.link.close(code, reason);
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

    /// Tells all workers which nodes are expelled, if that has changed since they were told: a node that rotates its identity
    /// changes it, too.
    pub(crate) fn tell_changes_of_expelled(&self) {
        let version = self.deny_list.version();
        if self.told_expelled.swap(version, Ordering::Relaxed) != version {
            self.tell_expelled();
        }
    }

    fn tell_expelled(&self) {
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
        let list = self.deny_list.list();
        let entry = |node_id: &str, expulsion: &Expulsion| ExpelledNode {
            node_id: node_id.to_owned(),
            name: expulsion.name.clone(),
            since: expulsion.since,
        };
        let mut nodes: Vec<_> = list.iter().map(|(id, node)| entry(id, node)).collect();
        // Workers of earlier versions know a node by the key of its certificate.
        let keys = list
            .values()
            .filter_map(|node| Some((node.key_id.as_ref()?, node)));
        nodes.extend(keys.map(|(key_id, node)| entry(key_id, node)));
        nodes.truncate(MOST_EXPELLED);
        message(MsgType::EXPELLED, 0, &Expelled { nodes })
    }

    /// The audit line of an expulsion or a readmission.
    pub(crate) fn note_admission(&self, event: &'static str, node: &str, name: &str, reason: &str) {
        let decision = event.strip_prefix("node ").unwrap_or(event);
        self.audit.revoked(node, name, decision, reason);
        warn!(event, node, name, reason, "{event} by an operator");
    }
}
