//! The rotation of the mesh root: workers learn of it over their links.

use std::sync::PoisonError;

use dcf::{Message, MsgType};
use mesh_control::registry::WorkerId;
use mesh_proto::SignedSuccession;

use super::state::{Mesh, message};

impl Mesh {
    /// Tells all workers, and those that connect from here on, that the root has a successor. `None` when
    /// that is over.
    pub(crate) fn tell_succession(&self, succession: Option<&SignedSuccession>) {
        let told = succession.map(|signed| message(MsgType::ROOT_SUCCESSION, 0, signed));
        self.change(|state, now| {
            // Set under the lock: a worker that connects meanwhile is told once at least.
            let mut kept = self
                .succession
                .write()
                .unwrap_or_else(PoisonError::into_inner);
            kept.clone_from(&told);
            drop(kept);
            let Some(message) = told else { return };
            let ids: Vec<WorkerId> = state.peers.keys().copied().collect();
            for id in ids {
                self.order(state, id, message.clone(), now);
            }
        });
    }

    /// The message about the root for a worker that connects.
    pub(super) fn succession_message(&self) -> Option<Message> {
        let kept = self.succession.read();
        kept.unwrap_or_else(PoisonError::into_inner).clone()
    }
}
