//! A head and workers on loopback, for the tests of joining and of links.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arcanum_attestor::{Approval, Attestor};
use mesh_net::quic::{Connector, Link, LinkConfig, Listener, join};
use mesh_net::trust::{JoinToken, NodeIdentity, Role, Validity};
use tempfile::TempDir;

pub(crate) const HOUR: Duration = Duration::from_secs(3600);
pub(crate) const LOOPBACK: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 0);

/// A head with its mesh.
pub(crate) struct TestHead {
    pub(crate) dir: TempDir,
    pub(crate) authority: Arc<Attestor>,
    pub(crate) listener: Listener,
    pub(crate) address: SocketAddr,
    pub(crate) address_list: [SocketAddr; 1],
}

impl TestHead {
    pub(crate) fn start(mesh: &str) -> Self {
        Self::open(
            tempfile::tempdir().expect("temporary directory"),
            mesh,
            Validity::default(),
        )
    }

    pub(crate) fn start_with(mesh: &str, approval: Approval) -> Self {
        let dir = tempfile::tempdir().expect("temporary directory");
        Self::open_with(dir, mesh, Validity::default(), approval)
    }

    pub(crate) fn open(dir: TempDir, mesh: &str, validity: Validity) -> Self {
        Self::open_with(dir, mesh, validity, Approval::Automatic)
    }

    pub(crate) fn open_with(
        dir: TempDir,
        mesh: &str,
        validity: Validity,
        approval: Approval,
    ) -> Self {
        let authority = Attestor::open(dir.path(), mesh, validity).expect("authority");
        let authority = Arc::new(authority.with_approval(approval));
        let identity = authority
            .head_identity(dir.path(), "head", SystemTime::now())
            .expect("identity");
        let admission = Some(authority.clone() as Arc<_>);
        let listener =
            Listener::bind(LOOPBACK, identity, admission, LinkConfig::default()).expect("listener");
        let address = listener.local_addr().expect("address");
        Self {
            dir,
            authority,
            listener,
            address,
            address_list: [address],
        }
    }

    /// The same head after a restart, on another port.
    pub(crate) async fn restart(self) -> Self {
        let mesh = self.authority.root().mesh().to_owned();
        self.listener
            .shutdown(dcf::ErrorCode::DRAINING, "restarting")
            .await;
        Self::open(self.stop(), &mesh, Validity::default())
    }

    /// Ends the head; its state directory stays.
    pub(crate) fn stop(self) -> TempDir {
        self.dir
    }

    pub(crate) fn token(&self) -> JoinToken {
        self.authority
            .create_token(HOUR, "test", SystemTime::now())
            .expect("token")
    }

    pub(crate) async fn worker(&self, name: &str) -> TestWorker {
        let dir = tempfile::tempdir().expect("temporary directory");
        let identity = join(&[self.address], &self.token(), dir.path(), name)
            .await
            .expect("joins");
        TestWorker { dir, identity }
    }

    /// Both ends of a new link: the worker's, then the head's.
    pub(crate) async fn link(&self, worker: &TestWorker, config: LinkConfig) -> (Link, Link) {
        let connector =
            Connector::bind(LOOPBACK, worker.identity.clone(), config).expect("connector");
        let (near, far) = tokio::join!(
            connector.connect(self.address, Role::Head),
            self.listener.accept()
        );
        (near.expect("connects"), far.expect("accepted"))
    }
}

/// A node that has joined.
pub(crate) struct TestWorker {
    pub(crate) dir: TempDir,
    pub(crate) identity: NodeIdentity,
}

/// A file of a state directory.
pub(crate) fn state_file(dir: &TempDir, name: &str) -> PathBuf {
    dir.path().join(name)
}
