//! The life of a rotation of the mesh root after its beginning: the head is announced under both roots, and
//! the former one is dropped once its time is over.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arcanum_attestor::Attestor;
use data_encoding::HEXLOWER;
use mesh_net::discovery::{Announcement, Discovery};
use mesh_net::trust::{NodeIdentity, Role, TrustError};
use tokio::time::MissedTickBehavior;
use tracing::warn;

use crate::config::Config;
use crate::mesh::Mesh;

/// Keeps watch over the roots of a running head.
pub(crate) struct RootWatch {
    pub(crate) mesh: Arc<Mesh>,
    pub(crate) authority: Arc<Attestor>,
    pub(crate) own: NodeIdentity,
    pub(crate) announcer: Option<Announcer>,
}

impl RootWatch {
    /// Never returns.
    pub(crate) async fn run(mut self) {
        let mut checks = tokio::time::interval(CHECK_EVERY);
        checks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            checks.tick().await;
            let root = self.authority.root().sha256();
            if self.own.root_sha256() != root || self.own.is_root_due() {
                // A rotation that could not be followed when it began.
                self.follow().await;
            } else {
                self.drop_former().await;
            }
            if let Some(announcer) = &mut self.announcer {
                announcer.follow(&self.own);
            }
        }
    }

    async fn follow(&self) {
        let (mesh, authority, own) = (self.mesh.clone(), self.authority.clone(), self.own.clone());
        let work = move || follow(&mesh, &authority, &own, SystemTime::now());
        match tokio::task::spawn_blocking(work).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => warn!(%error, "the head has no certificate of the new root yet"),
            Err(error) => warn!(%error, "the head has no certificate of the new root yet"),
        }
    }

    async fn drop_former(&self) {
        let authority = self.authority.clone();
        let work = move || authority.drop_former_root(SystemTime::now());
        match tokio::task::spawn_blocking(work).await {
            Ok(Ok(true)) => {
                let root = HEXLOWER.encode(&self.own.root_sha256());
                self.mesh.audit.root(&root, "alone");
                self.mesh.tell_succession(None);
            }
            Ok(Ok(false)) => {}
            Ok(Err(error)) => warn!(%error, "the former mesh root is not removed"),
            Err(error) => warn!(%error, "the former mesh root is not removed"),
        }
    }
}

/// Gives the head a certificate of the new root, and tells the workers of it. Blocks on the disk.
pub(crate) fn follow(
    mesh: &Mesh,
    authority: &Attestor,
    own: &NodeIdentity,
    now: SystemTime,
) -> Result<(), TrustError> {
    let root = authority.root();
    let Some(signed) = root.succession(now) else {
        return Ok(());
    };
    own.learn(signed)?;
    // It shows certificates of both roots before anybody asks for the new one.
    own.renew_by(authority, now)?;
    mesh.tell_succession(Some(signed));
    Ok(())
}

/// Announces the head on the LAN.
pub(crate) struct Announcer {
    discovery: Discovery,
    announced: Announcement,
}

impl Announcer {
    /// Announces this head, if the configuration allows it. A failure does not keep the head from starting.
    pub(crate) fn start(config: &Config, own: &NodeIdentity, port: u16) -> Option<Self> {
        if !config.mdns {
            return None;
        }
        let announced = Announcement {
            role: Role::Head,
            node_id: own.node_id(),
            name: config.mesh_name.clone(),
            root: own.root_sha256(),
            former_root: own.former_root(),
            port,
        };
        let discovery = Discovery::of_roots(&own.roots().digests()).and_then(|discovery| {
            discovery.announce(&announced)?;
            Ok(discovery)
        });
        let discovery = discovery
            .inspect_err(|error| warn!(%error, "workers cannot find this head on the LAN"))
            .ok()?;
        Some(Self {
            discovery,
            announced,
        })
    }

    /// Announces the roots anew if they have changed.
    fn follow(&mut self, own: &NodeIdentity) {
        let (root, former) = (own.root_sha256(), own.former_root());
        if (self.announced.root, self.announced.former_root) == (root, former) {
            return;
        }
        self.announced.root = root;
        self.announced.former_root = former;
        if let Err(error) = self.discovery.announce(&self.announced) {
            warn!(%error, "workers cannot find this head on the LAN");
        }
    }
}

const CHECK_EVERY: Duration = Duration::from_secs(10);
