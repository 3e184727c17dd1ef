//! Other ids of nodes: those that a node had before it got or rotated its identity, and those by which workers of earlier
//! versions know the others, the keys of their certificates.

use std::collections::{BTreeMap, HashMap};
use std::time::Instant;

use dcf::{Message, MsgType};
use mesh_control::registry::WorkerId;
use mesh_net::trust::Member;
use mesh_proto::{NodeAddr, Ring, Sources};
use prost::Message as _;

use super::state::{Mesh, State, message};

impl Mesh {
    /// What is known of a node under ids that it had before is known of it from now on: its quarantine, its faults, its
    /// drain.
    pub(super) fn adopt_former(&self, state: &mut State, member: &Member, now: Instant) {
        let node = &member.node_id;
        let rotated = self.deny_list.list().into_iter();
        let rotated = rotated.filter(|(_, entry)| entry.replaced_by.as_ref() == Some(node));
        let former = rotated.map(|(id, _)| id).chain([member.key_id.clone()]);
        for id in former.filter(|id| id != node) {
            let registry = &mut state.placement.registry;
            registry.reputation.renamed(&id, node);
            if state.rings.undrain(&id, now) {
                let drained = BTreeMap::from([(node.clone(), member.name.clone())]);
                state.rings.stay_drained(drained, now);
            }
        }
    }

    /// Gives the nodes that a worker of an earlier version names their ids.
    pub(crate) fn name_nodes<'a>(&self, id: WorkerId, named: impl Iterator<Item = &'a mut String>) {
        let state = self.lock();
        let peer = state.peers.get(&id);
        if peer.is_none_or(|peer| peer.link.peer().has_identity()) {
            return;
        }
        let members = state.peers.values().map(|peer| peer.link.peer());
        let ids: HashMap<&str, &str> = members
            .filter(|member| member.has_identity())
            .map(|member| (&*member.key_id, &*member.node_id))
            .collect();
        for name in named {
            if let Some(node_id) = ids.get(&**name) {
                *name = (*node_id).to_owned();
            }
        }
    }
}

/// An order as its recipient can follow it: a worker of an earlier version knows the others by the keys of their
/// certificates.
pub(super) fn as_recipient_knows(state: &State, id: WorkerId, order: Message) -> Message {
    let peer = state.peers.get(&id);
    if peer.is_none_or(|peer| peer.link.peer().has_identity()) {
        return order;
    }
    let members = state.peers.values().map(|peer| peer.link.peer());
    let keys: HashMap<&str, &str> = members
        .filter(|member| member.has_identity())
        .map(|member| (&*member.node_id, &*member.key_id))
        .collect();
    if keys.is_empty() {
        return order;
    }
    let rename = |seat: &mut NodeAddr| {
        if let Some(key) = keys.get(&*seat.node_id) {
            seat.node_id = (*key).to_owned();
        }
    };
    // They are this head's own messages.
    match order.kind {
        MsgType::RING => match Ring::decode(order.payload.clone()) {
            Ok(mut ring) => {
                let seats = ring.stages.iter_mut();
                let seats =
                    seats.flat_map(|stage| stage.member.iter_mut().chain(&mut stage.standby));
                seats.for_each(rename);
                message(order.kind, order.sequence, &ring)
            }
            Err(_) => order,
        },
        MsgType::SOURCES => match Sources::decode(order.payload.clone()) {
            Ok(mut sources) => {
                let holders = sources
                    .models
                    .iter_mut()
                    .flat_map(|model| &mut model.holders);
                holders.for_each(rename);
                message(order.kind, order.sequence, &sources)
            }
            Err(_) => order,
        },
        _ => order,
    }
}
