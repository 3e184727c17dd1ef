//! Links to other workers: made when they are needed, shared by the streams of all rings.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use mesh_net::quic::{Connector, Link, LinkConfig};
use mesh_net::trust::{NodeIdentity, Role};
use mesh_proto::{PathProfile, Seat};

/// Dials other workers.
#[derive(Clone)]
pub(crate) struct Peers {
    identity: NodeIdentity,
    links: Arc<Mutex<HashMap<String, Entry>>>,
}

/// Locked while a link is being made.
type Entry = Arc<tokio::sync::Mutex<Option<Link>>>;

impl Peers {
    /// For a node with this identity.
    pub(super) fn new(identity: NodeIdentity) -> Self {
        Peers {
            identity,
            links: Arc::default(),
        }
    }

    /// The paths to workers that there are links to.
    pub(super) fn paths(&self) -> Vec<PathProfile> {
        let links = self.links.lock().unwrap_or_else(PoisonError::into_inner);
        let open = links.iter().filter_map(|(node_id, entry)| {
            // One that is being made has not been measured.
            let link = entry.try_lock().ok()?;
            let link = link.as_ref().filter(|link| link.close_reason().is_none())?;
            Some(path(node_id, link.rtt()))
        });
        open.collect()
    }

    /// The link to a worker, made if there is none.
    pub(crate) async fn link(&self, seat: &Seat) -> Result<Link, String> {
        let entry = {
            let mut links = self.links.lock().unwrap_or_else(PoisonError::into_inner);
            links.entry(seat.node_id.clone()).or_default().clone()
        };
        // Whoever asks meanwhile waits for the same link.
        let mut link = entry.lock().await;
        if let Some(link) = link.as_ref().filter(|link| link.close_reason().is_none()) {
            return Ok(link.clone());
        }
        let address: SocketAddr = seat
            .address
            .parse()
            .map_err(|_| format!("its address {:?} is none", seat.address))?;
        let config = LinkConfig {
            handshake_timeout: DIAL_TIMEOUT,
            ..LinkConfig::default()
        };
        let connector = Connector::toward(address, self.identity.clone(), config)
            .map_err(|error| error.to_string())?;
        let made = connector
            .connect(address, Role::Worker)
            .await
            .map_err(|error| error.to_string())?;
        if made.node_id() != seat.node_id {
            return Err(format!(
                "{address} is {} and not {}",
                made.node_name(),
                seat.name
            ));
        }
        *link = Some(made.clone());
        Ok(made)
    }
}

/// A path to the node `node_id`, the head if that is empty.
pub(super) fn path(node_id: &str, rtt: Duration) -> PathProfile {
    PathProfile {
        node_id: node_id.to_owned(),
        rtt_us: u32::try_from(rtt.as_micros()).unwrap_or(u32::MAX),
        bandwidth: 0.0,
    }
}

/// On a LAN a worker that does not answer within this time is not there.
const DIAL_TIMEOUT: Duration = Duration::from_secs(1);
