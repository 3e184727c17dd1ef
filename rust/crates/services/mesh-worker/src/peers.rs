//! Links to other workers: made when they are needed, shared by the streams of all rings.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use mesh_base::addresses::{self, race};
use mesh_net::quic::{Connector, Link, LinkConfig, probe};
use mesh_net::trust::{NodeIdentity, Role};
use mesh_proto::{NodeAddr, PathProfile};

use crate::lock::lock;

/// Dials other workers.
#[derive(Clone)]
pub(crate) struct Peers {
    identity: NodeIdentity,
    links: Arc<Mutex<HashMap<String, Entry>>>,
}

/// Locked while a link is being made.
type Entry = Arc<tokio::sync::Mutex<Option<Made>>>;

struct Made {
    link: Link,
    /// As the head, or the LAN, named the worker.
    seat: NodeAddr,
    /// Before anything filled the path.
    rtt: Duration,
    /// Bytes per second; 0 is unknown.
    bandwidth: f64,
    /// True if measuring the bandwidth was tried.
    measured: bool,
}

impl Made {
    fn is_open(&self) -> bool {
        self.link.close_reason().is_none()
    }
}

impl Peers {
    pub(crate) fn new(identity: NodeIdentity) -> Self {
        Peers {
            identity,
            links: Arc::default(),
        }
    }

    pub(crate) fn paths(&self) -> Vec<PathProfile> {
        let links = lock(&self.links);
        let open = links.iter().filter_map(|(node_id, entry)| {
            // One that is being made has not been measured.
            let made = entry.try_lock().ok()?;
            let made = made.as_ref().filter(|made| made.is_open())?;
            Some(path(node_id, made.rtt, made.bandwidth))
        });
        open.collect()
    }

    /// Notes how far the workers are away that there are links to.
    pub(crate) fn note_round_trips(&self) {
        let links = lock(&self.links);
        for entry in links.values() {
            if let Ok(mut made) = entry.try_lock()
                && let Some(made) = made.as_mut()
            {
                made.rtt = made.link.rtt();
            }
        }
    }

    /// Measures the bandwidth of the links where that has not been tried, one after the other, until it is
    /// not `idle` any more.
    pub(super) async fn measure(&self, idle: impl Fn() -> bool) {
        let entries: Vec<Entry> = lock(&self.links).values().cloned().collect();
        for entry in entries {
            if !idle() {
                return;
            }
            let link = match &mut *entry.lock().await {
                Some(made) if made.is_open() && !made.measured => {
                    made.measured = true;
                    made.link.clone()
                }
                _ => continue,
            };
            if let Some(bandwidth) = bandwidth(&link).await
                && let Some(made) = &mut *entry.lock().await
                && made.link.id() == link.id()
            {
                made.bandwidth = bandwidth;
            }
        }
    }

    /// Makes the next stream to a worker use a new link. Streams on the present link are not disturbed.
    pub(crate) fn forget(&self, node_id: &str) {
        lock(&self.links).remove(node_id);
    }

    /// Returns the link to a worker, and makes it if there is none.
    pub(crate) async fn link(&self, seat: &NodeAddr) -> Result<Link, String> {
        let node_id = seat.node_id.clone();
        let entry = lock(&self.links).entry(node_id).or_default().clone();
        // Other callers meanwhile wait for the same link.
        let mut entry = entry.lock().await;
        if let Some(made) = entry.as_mut().filter(|made| made.is_open()) {
            // A worker that has moved is dialled again: this side's packets would keep going to its old
            // address.
            if made.seat == *seat || made.link.answers(MOVED).await {
                made.seat.clone_from(seat);
                return Ok(made.link.clone());
            }
        }
        let first: Result<SocketAddr, _> = seat.address.parse();
        let first = first.map_err(|_| format!("invalid address {:?}", seat.address))?;
        let others = seat.addresses.iter().filter_map(|other| other.parse().ok());
        let config = LinkConfig {
            handshake_timeout: DIAL_TIMEOUT,
            ..LinkConfig::default()
        };
        let attempt = |address| self.dial(seat, address, &config);
        let addresses = addresses::ordered([first].into_iter().chain(others));
        let dialled = tokio::time::timeout(
            DIAL_TIMEOUT + addresses::ATTEMPT_DELAY,
            race(&addresses, attempt),
        );
        let (_, link) = match dialled.await {
            Ok(Ok(won)) => won,
            Ok(Err(failed)) => {
                let texts: Vec<String> = failed.into_iter().map(|(_, error)| error).collect();
                return Err(texts.join("; "));
            }
            Err(_) => return Err(format!("no answer from {addresses:?}")),
        };
        *entry = Some(Made {
            rtt: link.rtt(),
            link: link.clone(),
            seat: seat.clone(),
            bandwidth: 0.0,
            measured: false,
        });
        Ok(link)
    }

    /// A link to the worker in `seat` at one of its addresses. Private addresses of different machines may be
    /// the same, so another machine may answer.
    async fn dial(
        &self,
        seat: &NodeAddr,
        address: SocketAddr,
        config: &LinkConfig,
    ) -> Result<Link, String> {
        let connector = Connector::toward(address, self.identity.clone(), config.clone())
            .map_err(|error| error.to_string())?;
        let link = connector.connect(address, Role::Worker).await;
        let link = link.map_err(|error| error.to_string())?;
        if link.node_id() != seat.node_id {
            return Err(format!(
                "{address} is {} and not {}",
                link.node_name(),
                seat.name
            ));
        }
        Ok(link)
    }
}

/// A path to the node `node_id`, the head if that is empty, of so many bytes per second.
pub(crate) fn path(node_id: &str, rtt: Duration, bandwidth: f64) -> PathProfile {
    PathProfile {
        node_id: node_id.to_owned(),
        rtt_us: u32::try_from(rtt.as_micros()).unwrap_or(u32::MAX),
        bandwidth,
    }
}

/// The best of several measurements: a machine that is busy meanwhile looks slower than its network. `None`:
/// none succeeded.
pub(crate) async fn bandwidth(link: &Link) -> Option<f64> {
    let mut best: Option<f64> = None;
    for again in 0..MEASUREMENTS {
        if again > 0 {
            tokio::time::sleep(REST).await;
        }
        match probe::bandwidth(link).await {
            Ok(found) => best = Some(found.max(best.unwrap_or_default())),
            Err(error) => {
                tracing::debug!(peer = link.node_name(), %error, "bandwidth not measured");
                break;
            }
        }
    }
    best
}

/// A worker that does not answer within this time is not there. A handshake is some milliseconds of work on
/// either side, which a machine that does much else may begin late.
const DIAL_TIMEOUT: Duration = Duration::from_millis(1500);

/// Time that a worker with a new address has to answer at its old one.
const MOVED: Duration = Duration::from_millis(500);

const MEASUREMENTS: u32 = 3;

const REST: Duration = Duration::from_millis(300);
