//! Gossip: the head takes part as a node, and carries workers' frames to each other. Frames are signed end to end; the head
//! checks that a worker sends under its own id, and bounds how much it sends.

use std::sync::Arc;
use std::time::{Duration, Instant};

use dcf::Message;
use mesh_gossip::{Event, sender_of};
use mesh_identity::NodeId;
use mesh_net::trust::NodeIdentity;
use mesh_proto::{GossipFrame, GossipIdentities};
use tracing::{debug, info, warn};

use super::gossip_node::{frame, identities};
use super::state::Mesh;

impl Mesh {
    /// Gossips until the end of the head.
    pub(crate) async fn gossip_on(self: Arc<Self>, identity: NodeIdentity) {
        let settings = &self.config.gossip;
        if !settings.enabled {
            return;
        }
        let state_dir = self.config.state_dir.clone();
        self.gossip.start(identity, settings.interval, state_dir);
        let mut metered = None;
        loop {
            self.gossip.follow_root(settings.interval);
            let step = self.gossip.with(|inner, now| {
                let refreshed = inner.refresh(|| self.audit.epochs(), now);
                let mut frames = Vec::new();
                while let Some(transmit) = inner.core.poll(now) {
                    frames.push(transmit);
                }
                let mut events = Vec::new();
                while let Some(event) = inner.core.poll_event() {
                    if let Event::Remembered(record) = &event {
                        inner.remember(record, now);
                    }
                    events.push(event);
                }
                let to: Vec<String> = inner.documents.keys().cloned().collect();
                (refreshed, to, frames, events, inner.core.next_timeout())
            });
            let Some((refreshed, to, frames, events, next)) = step else {
                return;
            };
            if let Some(document) = refreshed.document {
                self.pass(to.iter().map(String::as_str), &document);
            }
            if let Some(unsaved) = refreshed.unsaved {
                tokio::task::spawn_blocking(move || unsaved.write());
            }
            for transmit in frames {
                let to: Vec<String> = transmit.to.iter().map(NodeId::to_string).collect();
                self.pass(to.iter().map(String::as_str), &frame(transmit.frame));
            }
            events.iter().for_each(|event| self.tell(event));
            let due = |at: Instant| at.elapsed() >= METER_INTERVAL;
            if metered.is_none_or(due)
                && let Some(view) = self.gossip.view()
            {
                metered = Some(Instant::now());
                let carried = [view.relayed, view.not_relayed];
                self.metrics.gossiped(view.counts, carried, &view.members);
            }
            tokio::select! {
                () = tokio::time::sleep_until(next.into()) => {}
                () = self.gossip.changed.notified() => {}
            }
        }
    }

    /// A worker shows its identity document: it takes part from now on.
    pub(crate) fn gossip_identities(&self, node: &str, shown: GossipIdentities) {
        let [document] = &shown.documents[..] else {
            return;
        };
        let others = self.gossip.change(|inner, now| {
            let introduced = inner.core.introduce(document, now);
            if introduced.is_ok_and(|id| id.to_string() == node) {
                inner.documents.insert(node.to_owned(), document.clone());
                let others = inner.documents.iter().filter(|(other, _)| *other != node);
                let others: Vec<_> = others
                    .map(|(id, document)| (id.clone(), document.clone()))
                    .collect();
                Some((others, inner.document.clone()))
            } else {
                debug!(
                    node,
                    "the identity document on a link is not that of its worker"
                );
                None
            }
        });
        let Some((others, own)) = others.flatten() else {
            return;
        };
        let (ids, mut documents): (Vec<_>, Vec<_>) = others.into_iter().unzip();
        // After a rotation of the root the worker does not have it.
        documents.push(own);
        self.pass(
            ids.iter().map(String::as_str),
            &identities(vec![document.clone()]),
        );
        // A message on a worker's control stream is bounded.
        for some in documents.chunks(MOST_DOCUMENTS) {
            self.pass(std::iter::once(node), &identities(some.to_vec()));
        }
    }

    /// A worker's frame, for the head or for other workers.
    pub(crate) fn gossip_frame(&self, node: &str, sent: GossipFrame) {
        let receivers = self.gossip.change(|inner, now| {
            // Only under its own name: what others cannot refuse early, the head does.
            let sender = sender_of(&sent.frame).filter(|sender| sender.to_string() == node)?;
            let own = inner.core.own_id();
            let is_mine = sent.to.iter().any(|to| to == own.as_bytes());
            // The head hears of every node, at little cost: it also reads one frame in a while that it carries.
            let silence = inner.core.silence_of(sender, now);
            if is_mine || silence.is_none_or(|silence| silence >= LISTEN_INTERVAL) {
                let _ = inner.core.receive(&sent.frame, now);
            }
            let others = sent.to.iter().filter(|to| *to != own.as_bytes());
            let others = others.filter_map(|to| <[u8; 32]>::try_from(&to[..]).ok());
            let mut ids: Vec<String> = others.map(|id| NodeId::from(id).to_string()).collect();
            ids.retain(|id| inner.documents.contains_key(id));
            let allowed = inner.relays.allow(node, ids.len(), now.instant);
            ids.truncate(allowed);
            Some(ids)
        });
        let receivers = receivers.flatten().unwrap_or_default();
        self.pass(receivers.iter().map(String::as_str), &frame(sent.frame));
    }

    /// A worker's link has ended.
    pub(crate) fn gossip_left(&self, node: &str) {
        self.gossip.change(|inner, _| inner.documents.remove(node));
    }

    /// An operator has expelled a node: all nodes hear of it, and it is no peer any more.
    pub(crate) fn gossip_expelled(&self, node: &str, reason: &str) {
        self.gossip.change(|inner, now| {
            inner.documents.remove(node);
            if let Ok(id) = node.parse() {
                inner.core.dismiss(id, now);
            }
            if let Err(error) = inner.core.sight(("expelled", node, reason), now) {
                debug!(%error, "the expulsion is not told by gossip");
            }
        });
    }

    /// An operator has readmitted a node.
    pub(crate) fn gossip_readmitted(&self, node: &str) {
        self.gossip.change(|inner, now| {
            if let Err(error) = inner.core.withdraw("expelled", node, now) {
                debug!(%error, "the readmission is not told by gossip");
            }
        });
    }

    /// Reports news of the gossip.
    fn tell(&self, event: &Event) {
        match event {
            Event::Sighted(sighting) => {
                warn!(
                    kind = sighting.kind,
                    subject = sighting.subject,
                    detail = sighting.detail,
                    reporter = %sighting.origin,
                    "a node reports a threat"
                );
                self.audit.sighting(sighting);
            }
            Event::Up(node) => debug!(%node, "a node gossips"),
            Event::Down(node) => info!(%node, "a node does not gossip any more"),
            Event::Remembered(record) => debug!(origin = %record.origin, "a record of a node"),
        }
    }

    /// Sends a message to workers. One whose queue is half full gets none: gossip may be lost, orders may not.
    fn pass<'a>(&self, nodes: impl Iterator<Item = &'a str>, message: &Message) {
        let state = self.lock();
        for node in nodes {
            let worker = state.placement.registry.of_node(node);
            let peer = worker.and_then(|worker| state.peers.get(&worker.id));
            if let Some(peer) =
                peer.filter(|peer| 2 * peer.orders.capacity() > peer.orders.max_capacity())
            {
                let _ = peer.orders.try_send(message.clone());
            }
        }
    }
}

/// Documents in one message.
const MOST_DOCUMENTS: usize = 64;
/// Interval at which the head reads a frame of each node that it carries.
const LISTEN_INTERVAL: Duration = Duration::from_secs(2);
/// Interval at which the metrics are set.
const METER_INTERVAL: Duration = Duration::from_secs(1);
