//! Workers that join, report and leave.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Instant, SystemTime};

use dcf::{ErrorCode, Message, Version};
use mesh_base::clock;
use mesh_control::duplicates::{Duplicate, Machine};
use mesh_control::registry::WorkerId;
use mesh_control::rings::Arrival;
use mesh_net::quic::Link;
use mesh_net::trust::DUPLICATE_IDENTITY;
use mesh_proto::{Hello, Load};
use tokio::sync::mpsc;

use super::connection::Connection;
use super::state::{CLOCK_TOLERANCE, ConnectedWorker, Mesh, timestamp_us};

/// A worker that is connected with the identity of one that connects.
#[derive(Debug)]
pub(crate) struct Rival {
    pub link: Link,
    /// It finishes its running requests and will leave.
    pub draining: bool,
    name: String,
    host: String,
    orders: mpsc::Sender<Message>,
}

impl Mesh {
    /// Enters a worker that said Hello on this link.
    pub(crate) fn join(
        &self,
        link: &Link,
        hello: Hello,
        orders: mpsc::Sender<Message>,
    ) -> WorkerId {
        let now = Instant::now();
        // Not the name that it gives itself.
        let hello = Hello {
            node_name: link.node_name().to_owned(),
            version: plain(&hello.version),
            ..hello
        };
        let (instance, host) = (hello.instance, plain(&hello.host));
        let others = other_addresses(&hello.addresses, link.remote_addr().ip());
        let mut state = self.lock();
        let all = hello.all_models();
        let whole = all.iter().map(|card| card.name.clone()).collect();
        self.adopt_former(&mut state, link.peer(), now);
        let registry = &mut state.placement.registry;
        let (id, replaced) = registry.join(link.node_id(), link.remote_addr(), hello, now);
        let drained = state.rings.is_asked_to_drain(link.node_id());
        let mut name = String::new();
        if let Some(worker) = state.placement.registry.get_mut(id) {
            (worker.drained, worker.draining) = (drained, drained);
            name.clone_from(&worker.name);
        }
        state.tracker.joined(link.node_id(), &name, link.local_ip());
        state.tracker.has_addresses(link.node_id(), others.clone());
        let arrival = Arrival {
            name,
            whole,
            head_ip: link.local_ip(),
        };
        state.rings.joined(link.node_id(), arrival, now);
        state.rings.has_addresses(link.node_id(), others);
        if let Some(old) = replaced.and_then(|old| state.peers.remove(&old)) {
            let text = "this node has connected again";
            old.link.close(ErrorCode::CANCELLED, text);
        }
        let peer = ConnectedWorker {
            link: link.clone(),
            orders,
            heard_packets: 0,
            heard: now,
            instance,
            host,
        };
        state.peers.insert(id, peer);
        let list = self.expelled_message();
        self.order(&mut state, id, list, now);
        if let Some(succession) = self.succession_message() {
            self.order(&mut state, id, succession, now);
        }
        if let Some(invitation) = self.gossip.invitation() {
            self.order(&mut state, id, invitation, now);
        }
        self.note_mixed(&mut state);
        self.turn(&mut state, now);
        id
    }

    /// The process that is connected as this node, if its link is open.
    pub(crate) fn process_of(&self, node: &str) -> Option<u64> {
        let state = self.lock();
        let worker = state.placement.registry.of_node(node)?;
        let peer = state.peers.get(&worker.id)?;
        peer.link.close_reason().is_none().then_some(peer.instance)
    }

    /// The worker that is connected as this node, unless it is the same process: that has lost its earlier
    /// link.
    pub(crate) fn rival(&self, node: &str, instance: u64) -> Option<Rival> {
        let state = self.lock();
        let worker = state.placement.registry.of_node(node)?;
        let peer = state.peers.get(&worker.id)?;
        let same = instance != 0 && peer.instance == instance;
        (!same && peer.link.close_reason().is_none()).then(|| Rival {
            link: peer.link.clone(),
            // A drain by an operator lasts; one of its own ends soon.
            draining: worker.load.draining,
            name: worker.name.clone(),
            host: peer.host.clone(),
            orders: peer.orders.clone(),
        })
    }

    /// A second machine with the identity of `rival` was refused: both are told. Returns the message for the
    /// newcomer.
    pub(crate) fn refused_duplicate(
        &self,
        rival: &Rival,
        newcomer: SocketAddr,
        host: &str,
    ) -> String {
        let now = Instant::now();
        let machine = |address, host: &str| Machine {
            address,
            host: host.chars().take(64).filter(|c| !c.is_control()).collect(),
        };
        let kept = machine(rival.link.remote_addr(), &rival.host);
        let refused = machine(newcomer, host);
        let node = rival.link.node_id();
        let mut state = self.lock();
        let duplicates = &mut state.duplicates;
        let news = duplicates.refused(node, &rival.name, kept, refused, now);
        let text = state.duplicates.advice(node).unwrap_or_default();
        drop(state);
        self.metrics.duplicate(&rival.name);
        if news {
            tracing::error!(node, "{text}");
            let message = Message::error(0, timestamp_us(), DUPLICATE_IDENTITY, &text);
            // One that takes no orders is dropped elsewhere.
            let _ = rival.orders.try_send(message);
        }
        text
    }

    /// Identities that several machines have.
    pub(crate) fn duplicates(&self) -> Vec<Duplicate> {
        self.lock().duplicates.view(Instant::now())
    }

    /// A worker's message with this timestamp came just now.
    pub(crate) fn clock_heard(&self, id: WorkerId, timestamp_us: u64) {
        // It does not say.
        if timestamp_us == 0 {
            return;
        }
        let offset = (timestamp_us as f64 - super::state::timestamp_us() as f64) / 1e6;
        self.with_worker(id, |worker| {
            let was_off = worker.clock_offset.abs() > CLOCK_TOLERANCE;
            worker.clock_offset = offset;
            if offset.abs() > CLOCK_TOLERANCE && !was_off {
                tracing::warn!(
                    worker = worker.name,
                    clock = clock::utc(SystemTime::now()),
                    "the worker's clock is {} by this head's; set the one that is wrong, for example with `timedatectl set-ntp true`",
                    clock::offset(offset)
                );
            }
        });
    }

    /// A worker's link is closed. Where this head itself closes all of them, no worker is lost.
    pub(crate) fn leave(&self, id: WorkerId) {
        if self.closing.load(Ordering::Relaxed) {
            return;
        }
        self.change(|state, now| {
            state.remove(id, "its link is closed", now);
            self.note_mixed(state);
        });
    }

    pub(crate) fn report(&self, id: WorkerId, load: Load) {
        self.change(|state, now| {
            let draining = load.draining;
            state.placement.registry.report(id, load, now);
            if let Some(node) = state.placement.registry.node_of(id) {
                state.rings.says_draining(node, draining);
            }
        });
    }

    /// A worker without an identity is alive, and takes plain tasks on this connection. True means that it is
    /// new.
    pub(crate) fn plain_heartbeat(
        &self,
        address: SocketAddr,
        version: Version,
        connection: Arc<dyn Connection>,
    ) -> bool {
        let now = Instant::now();
        let mut state = self.lock();
        let registry = &mut state.placement.registry;
        let Some((id, new)) = registry.plain_heartbeat(address, version, now) else {
            return false;
        };
        state.plain.insert(id, connection);
        if new {
            self.pump(&mut state, now);
        }
        new
    }
}

/// A worker's text about itself, made fit to show: at most 64 characters, no control characters.
fn plain(said: &str) -> String {
    let shown = said.chars().filter(|c| !c.is_control());
    shown.take(64).collect()
}

/// Addresses that a worker reports, without the one that it is seen at and without unspecified, loopback,
/// multicast and link-local ones. Empty for a worker on the head's own machine, which is reached at the
/// head's address.
fn other_addresses(said: &[String], seen: IpAddr) -> Vec<IpAddr> {
    if seen.is_loopback() {
        return Vec::new();
    }
    let usable = |ip: &IpAddr| {
        let link_local = matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local());
        !ip.is_unspecified() && !ip.is_multicast() && !ip.is_loopback() && !link_local
    };
    let parsed = said.iter().filter_map(|text| text.parse::<IpAddr>().ok());
    let parsed = parsed.map(|ip| ip.to_canonical());
    let others = parsed.filter(|ip| usable(ip) && *ip != seen);
    others.take(MOST_ADDRESSES).collect()
}

/// Other addresses of one worker that are passed on.
const MOST_ADDRESSES: usize = 7;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_addresses_that_lead_to_a_worker_are_passed_on() {
        let said: Vec<String> = [
            "10.0.0.5",
            "10.0.0.7",
            "fe80::1",
            "fd00::7",
            "127.0.0.1",
            "224.0.0.1",
            "::ffff:10.0.0.8",
            "no",
            "0.0.0.0",
        ]
        .map(str::to_owned)
        .to_vec();
        let seen = IpAddr::from([10, 0, 0, 5]);
        let others: Vec<String> = other_addresses(&said, seen)
            .iter()
            .map(|ip| ip.to_string())
            .collect();
        assert_eq!(others, ["10.0.0.7", "fd00::7", "10.0.0.8"]);
        assert!(other_addresses(&said, IpAddr::from([127, 0, 0, 1])).is_empty());
        let many: Vec<String> = (1..99).map(|last| format!("10.0.1.{last}")).collect();
        assert_eq!(other_addresses(&many, seen).len(), MOST_ADDRESSES);
    }
}
