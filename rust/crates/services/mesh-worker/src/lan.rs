//! Location of the head: an address, or to be found on the LAN.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use mesh_base::addresses::{self, Preferred};
use mesh_net::discovery::{Announcement, Discovery, Found};
use mesh_net::trust::{NodeIdentity, Role};
use tokio::sync::watch;

use crate::config::Config;
use crate::error::WorkerError;
use crate::token::{read_token, unusable};

#[derive(Clone)]
pub(crate) enum HeadPlace {
    /// At this address, `host:port`; which of its addresses worked last.
    At(String, Preferred),
    Lan(Lan),
}

/// The nodes of the mesh that are found on the LAN.
#[derive(Clone)]
pub(crate) struct Lan {
    discovery: Arc<Discovery>,
    /// The address of a head that worked last.
    preferred: Preferred,
}

impl Lan {
    /// Begins to look for the mesh that this worker belongs to or should join. `None` if the configuration
    /// does not allow it.
    pub(crate) fn start(config: &Config) -> Result<Option<Self>, WorkerError> {
        if !config.mdns {
            return Ok(None);
        }
        let identity = NodeIdentity::load(&config.state_dir);
        let roots = match (read_token(config)?, identity) {
            (Some(token), Ok(identity)) if identity.roots().is_of_mesh(token.root_sha256()) => {
                identity.roots().digests()
            }
            (Some(token), _) => vec![*token.root_sha256()],
            (None, Ok(identity)) => identity.roots().digests(),
            (None, Err(error)) => return Err(unusable(error)),
        };
        match Discovery::of_roots(&roots) {
            Ok(discovery) => Ok(Some(Lan {
                discovery: Arc::new(discovery),
                preferred: Preferred::default(),
            })),
            Err(error) if config.head.is_some() => {
                tracing::warn!(%error, "other workers cannot be found on the LAN");
                Ok(None)
            }
            Err(error) => Err(WorkerError::Internal(error.to_string())),
        }
    }

    /// Announces on the LAN the port where this worker listens for others.
    pub(crate) fn announce(&self, identity: &NodeIdentity, port: u16) {
        let announcement = Announcement {
            role: Role::Worker,
            node_id: identity.node_id(),
            name: identity.member().name.clone(),
            root: identity.root_sha256(),
            former_root: identity.former_root(),
            port,
        };
        if let Err(error) = self.discovery.announce(&announcement) {
            tracing::warn!(%error, "others cannot find this worker on the LAN");
        }
    }

    pub(crate) fn found(&self) -> watch::Receiver<Vec<Found>> {
        self.discovery.found()
    }
}

impl HeadPlace {
    /// All its addresses, in the order to try them, or the reason why it has none. Waits a moment for a head to
    /// be found.
    pub(crate) async fn resolve(&self) -> Result<Vec<SocketAddr>, String> {
        match self {
            HeadPlace::At(head, preferred) => {
                let found = addresses::resolve(head).await;
                let found = found.map_err(|error| format!("{head} cannot be resolved: {error}"))?;
                Ok(preferred.first(found))
            }
            HeadPlace::Lan(lan) => {
                let mut found = lan.found();
                let is_head = |node: &&Found| node.role == Role::Head;
                let there = found.wait_for(|nodes| nodes.iter().any(|node| is_head(&node)));
                let nodes = tokio::time::timeout(FIND, there).await;
                let Ok(Ok(nodes)) = nodes else {
                    return Err(format!(
                        "no head found by multicast DNS within {} s; {}",
                        FIND.as_secs(),
                        mesh_net::discovery::LIKELY_CAUSES
                    ));
                };
                let heads = nodes.iter().filter(is_head);
                let all = addresses::ordered(heads.flat_map(|head| head.addresses.clone()));
                Ok(lan.preferred.first(all))
            }
        }
    }

    /// The head answered at this address.
    pub(crate) fn remember(&self, address: SocketAddr) {
        match self {
            HeadPlace::At(_, preferred) => preferred.remember(address),
            HeadPlace::Lan(lan) => lan.preferred.remember(address),
        }
    }
}

impl fmt::Display for HeadPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            HeadPlace::At(head, _) => f.write_str(head),
            HeadPlace::Lan(_) => f.write_str("the LAN"),
        }
    }
}

/// Answers to multicast DNS come within a second or two.
const FIND: Duration = Duration::from_secs(5);
