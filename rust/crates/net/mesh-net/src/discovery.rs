//! Discovery of nodes on the LAN by multicast DNS (RFC 6762, RFC 6763), service `_hydramesh._udp`.
//!
//! Discovery yields names, addresses and ports, from any sender. Trust stays with TLS: a node that was found
//! must show a certificate of the mesh like any other.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use data_encoding::HEXLOWER;
use mdns_sd::{DaemonEvent, ResolvedService, ServiceDaemon, ServiceEvent, ServiceInfo};
use tokio::sync::watch;

use crate::trust::Role;

/// A node's announcement to all machines on the LAN.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Announcement {
    /// Role of the node in the mesh.
    pub role: Role,
    /// Id of the node: SHA-256 of its public key, lower-case hex.
    pub node_id: String,
    /// Name of the node, for people.
    pub name: String,
    /// SHA-256 of the mesh's root.
    pub root: [u8; 32],
    /// That of the root before it, while it is accepted.
    pub former_root: Option<[u8; 32]>,
    /// UDP port of its QUIC listener.
    pub port: u16,
}

/// A node that answered; none of its claims are verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Role that the node claims.
    pub role: Role,
    /// Id that the node claims.
    pub node_id: String,
    /// Name that the node claims.
    pub name: String,
    /// Addresses of its QUIC listener, IPv4 first.
    pub addresses: Vec<SocketAddr>,
}

/// Error of multicast DNS on this machine.
#[derive(Debug, thiserror::Error)]
#[error("multicast DNS: {0}; set `mdns = false` to do without")]
pub struct DiscoveryError(#[from] mdns_sd::Error);

/// Takes part in multicast DNS until it is dropped.
pub struct Discovery {
    daemon: ServiceDaemon,
    found: watch::Receiver<Vec<Found>>,
    /// This node's id and role, once it is announced.
    own: Arc<OnceLock<(String, Role)>>,
}

impl Discovery {
    /// Searches for nodes of the mesh with this root (its SHA-256). Must be called on a Tokio runtime.
    ///
    /// # Errors
    /// If this machine does not let it.
    pub fn start(root: &[u8; 32]) -> Result<Self, DiscoveryError> {
        Self::of_roots(std::slice::from_ref(root))
    }

    /// As [`start`](Self::start), for a mesh whose root has been rotated: its nodes may announce any of
    /// these.
    ///
    /// # Errors
    /// If this machine does not let it.
    pub fn of_roots(roots: &[[u8; 32]]) -> Result<Self, DiscoveryError> {
        let daemon = ServiceDaemon::new()?;
        let news = daemon.monitor()?;
        let events = daemon.browse(SERVICE)?;
        tokio::spawn(async move {
            // Ends with the daemon.
            while let Ok(event) = news.recv_async().await {
                match event {
                    DaemonEvent::Error(error) => tracing::warn!(%error, "multicast DNS"),
                    DaemonEvent::IpAdd(address) => {
                        tracing::info!(%address, "multicast DNS uses this address");
                    }
                    DaemonEvent::IpDel(address) => {
                        tracing::info!(%address, "multicast DNS no longer uses this address");
                    }
                    DaemonEvent::Announce(service, to) => {
                        tracing::debug!(service, to, "announced by multicast DNS");
                    }
                    _ => {}
                }
            }
        });
        let (sender, found) = watch::channel(Vec::new());
        let meshes: Vec<String> = roots.iter().map(|root| HEXLOWER.encode(root)).collect();
        let own = Arc::new(OnceLock::new());
        tokio::spawn(warn_while_alone(found.clone(), own.clone()));
        match interfaces() {
            Ok(interfaces) if interfaces.is_empty() => tracing::warn!(
                "multicast DNS finds nobody: no interface of this machine is up and multicasts"
            ),
            Ok(interfaces) => tracing::info!(
                service = SERVICE,
                mesh = meshes.first().map_or("", |mesh| &mesh[..16]),
                interfaces = interfaces.join(", "),
                "looking for nodes of this mesh on the LAN by multicast DNS"
            ),
            Err(error) => tracing::warn!(
                %error,
                "multicast DNS finds nobody: the interfaces of this machine cannot be listed; a service needs AF_NETLINK in RestrictAddressFamilies"
            ),
        }
        tokio::spawn(async move {
            let mut known: BTreeMap<String, Found> = BTreeMap::new();
            // Ends with the daemon.
            while let Ok(event) = events.recv_async().await {
                match event {
                    ServiceEvent::ServiceResolved(service) => {
                        let Some(node) = read(&service, &meshes) else {
                            continue;
                        };
                        if known.len() < MOST_FOUND || known.contains_key(&service.fullname) {
                            known.insert(service.fullname.clone(), node);
                        }
                    }
                    ServiceEvent::ServiceRemoved(_, name) => {
                        known.remove(&name);
                    }
                    _ => continue,
                }
                let all: Vec<Found> = known.values().cloned().collect();
                sender.send_if_modified(|before| std::mem::replace(before, all) != *before);
            }
        });
        Ok(Discovery { daemon, found, own })
    }

    /// Announces this node on the LAN, or announces it anew.
    ///
    /// # Errors
    /// If that is not possible on this machine.
    pub fn announce(&self, announcement: &Announcement) -> Result<(), DiscoveryError> {
        let id: String = announcement.node_id.chars().take(LABEL_DIGITS).collect();
        let role = announcement.role.as_str();
        let mesh = HEXLOWER.encode(&announcement.root);
        let former = announcement.former_root.map(|root| HEXLOWER.encode(&root));
        let mut properties = vec![
            ("role", role),
            ("node", &announcement.node_id),
            ("name", &announcement.name),
            ("mesh", &mesh),
        ];
        properties.extend(former.as_ref().map(|former| ("former", former.as_str())));
        let service = ServiceInfo::new(
            SERVICE,
            &format!("{role}-{id}"),
            &format!("hydramesh-{role}-{id}.local."),
            "",
            announcement.port,
            &properties[..],
        )?
        .enable_addr_auto();
        self.daemon.register(service)?;
        // The node stays the same one.
        let own = (announcement.node_id.clone(), announcement.role);
        let _ = self.own.set(own);
        tracing::info!(
            service = SERVICE,
            role,
            port = announcement.port,
            "announcing this node on the LAN by multicast DNS"
        );
        Ok(())
    }

    /// The nodes of the mesh that are present; the receiver is notified of changes.
    pub fn found(&self) -> watch::Receiver<Vec<Found>> {
        self.found.clone()
    }
}

impl Drop for Discovery {
    fn drop(&mut self) {
        // Announces the shutdown. Fails only if the daemon has ended by itself.
        let _ = self.daemon.shutdown();
    }
}

/// The interfaces that are up and multicast, each with its addresses.
fn interfaces() -> nix::Result<Vec<String>> {
    use nix::net::if_::InterfaceFlags;
    let wanted = InterfaceFlags::IFF_UP | InterfaceFlags::IFF_MULTICAST;
    let mut found: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for interface in nix::ifaddrs::getifaddrs()? {
        let Some(storage) = interface.address else {
            continue;
        };
        let v4 = storage.as_sockaddr_in().map(|v4| v4.ip().to_string());
        let v6 = storage.as_sockaddr_in6().map(|v6| v6.ip().to_string());
        let Some(address) = v4.or(v6) else { continue };
        if interface.flags.contains(wanted)
            && !interface.flags.contains(InterfaceFlags::IFF_LOOPBACK)
        {
            let of_name = found.entry(interface.interface_name);
            of_name.or_default().push(address);
        }
    }
    let described = found.iter();
    let described = described.map(|(name, found)| format!("{name} ({})", found.join(", ")));
    Ok(described.collect())
}

/// Logs likely causes while no other node is found: first soon, then rarely.
async fn warn_while_alone(
    mut found: watch::Receiver<Vec<Found>>,
    own: Arc<OnceLock<(String, Role)>>,
) {
    let mut pause = FIRST_WARNING;
    let is_other = |node: &&Found| own.get().is_none_or(|(own, _)| *own != node.node_id);
    let others = |found: &Vec<Found>| found.iter().filter(is_other).count();
    loop {
        let somebody = found.wait_for(|found| others(found) > 0);
        match tokio::time::timeout(pause, somebody).await {
            Ok(Ok(_)) => {}
            // It has ended.
            Ok(Err(_)) => return,
            Err(_) => {
                tracing::warn!(
                    "no node of this mesh found on the LAN by multicast DNS within {} s; {LIKELY_CAUSES}",
                    pause.as_secs()
                );
                // The workers of a head may all know its address.
                if own.get().is_some_and(|(_, role)| *role == Role::Head) {
                    return;
                }
                pause = (pause * 10).min(LATER_WARNINGS);
                continue;
            }
        }
        pause = LATER_WARNINGS;
        if found.wait_for(|found| others(found) == 0).await.is_err() {
            return;
        }
    }
}

/// Converts a DNS-SD service to a node; `None` if it is of another mesh or invalid.
fn read(service: &ResolvedService, meshes: &[String]) -> Option<Found> {
    let property = |key: &str| {
        let value = service.txt_properties.get_property_val_str(key)?;
        (value.len() <= MOST_PROPERTY && !value.chars().any(char::is_control))
            .then(|| value.to_owned())
    };
    let is_ours = |key| property(key).is_some_and(|mesh| meshes.contains(&mesh));
    if !(is_ours("mesh") || is_ours("former")) || service.port == 0 {
        return None;
    }
    let node_id = property("node")?;
    let is_id = node_id.len() == 64 && node_id.bytes().all(|b| b.is_ascii_hexdigit());
    let role = Role::parse(&property("role")?)?;
    let mut addresses: Vec<SocketAddr> = service
        .addresses
        .iter()
        .map(|ip| SocketAddr::new(ip.to_ip_addr(), service.port))
        // One of a link means nothing without the link.
        .filter(|address| match address.ip() {
            std::net::IpAddr::V6(ip) => !ip.is_unicast_link_local(),
            std::net::IpAddr::V4(_) => true,
        })
        .collect();
    // Over loopback only where there is nothing else.
    addresses.sort_by_key(|address| (address.ip().is_loopback(), address.is_ipv6(), *address));
    addresses.truncate(MOST_ADDRESSES);
    (is_id && !addresses.is_empty()).then(|| Found {
        role,
        node_id,
        name: property("name").unwrap_or_default(),
        addresses,
    })
}

/// Reasons why multicast DNS finds nothing, in the order of likelihood.
pub const LIKELY_CAUSES: &str = "likely causes: the other node does not run with `mdns = true`, a firewall here or there drops \
     5353/udp, the service may not use AF_NETLINK (systemd's RestrictAddressFamilies), no interface multicasts, or the other \
     node is in another network segment";

/// Answers come within a second or two.
const FIRST_WARNING: Duration = Duration::from_secs(10);
const LATER_WARNINGS: Duration = Duration::from_secs(3600);

const SERVICE: &str = "_hydramesh._udp.local.";
/// Digits of the node's id in its DNS label, which may have 63 bytes.
const LABEL_DIGITS: usize = 24;
/// Maximum number of nodes to remember; more would be an attack.
const MOST_FOUND: usize = 1024;
const MOST_ADDRESSES: usize = 8;
const MOST_PROPERTY: usize = 128;

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn announcement(role: Role, digit: char, root: [u8; 32]) -> Announcement {
        Announcement {
            role,
            node_id: digit.to_string().repeat(64),
            name: format!("node {digit}"),
            root,
            former_root: None,
            port: 7780,
        }
    }

    #[tokio::test]
    async fn nodes_of_one_mesh_find_each_other_and_no_others() {
        let (ours, theirs) = ([7; 32], [8; 32]);
        let head = Discovery::start(&ours).expect("multicast DNS");
        head.announce(&announcement(Role::Head, 'a', ours))
            .expect("announced");
        let stranger = Discovery::start(&theirs).expect("multicast DNS");
        stranger
            .announce(&announcement(Role::Worker, 'b', theirs))
            .expect("announced");
        // It knows the root before, too, and announces the next one.
        let worker = Discovery::of_roots(&[[6; 32], ours]).expect("multicast DNS");
        let rotated = Announcement {
            former_root: Some(ours),
            ..announcement(Role::Worker, 'c', [9; 32])
        };
        worker.announce(&rotated).expect("announced");
        let mut found = worker.found();
        let both = found.wait_for(|found| found.len() >= 2);
        let both = tokio::time::timeout(Duration::from_secs(10), both).await;
        let Ok(Ok(both)) = both else {
            // A machine without an interface that multicasts: nothing can be said about it.
            println!("no multicast here, nothing was tested");
            return;
        };
        let names: Vec<&str> = both.iter().map(|node| node.name.as_str()).collect();
        assert_eq!(names, ["node a", "node c"]);
        assert_eq!(both[0].role, Role::Head);
        assert!(
            both[0]
                .addresses
                .iter()
                .all(|address| address.port() == 7780)
        );
    }
}
