//! As much of a head as a worker sees.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arcanum_attestor::Attestor;
use dcf::{Message, MsgType};
use mesh_net::quic::{Link, LinkConfig, Listener, MsgStream, timestamp_us};
use mesh_net::trust::Validity;
use mesh_proto::{Hello, Welcome};
use prost::Message as _;
use tempfile::TempDir;
use tokio::net::UdpSocket;
use tokio::time::timeout;

pub(crate) const PATIENCE: Duration = Duration::from_secs(90);
pub(crate) const ANY: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

pub(crate) struct Head {
    pub(crate) authority: Arc<Attestor>,
    pub(crate) listener: Listener,
    pub(crate) heartbeats: UdpSocket,
    pub(crate) dir: TempDir,
}

impl Head {
    pub(crate) async fn start() -> Self {
        Self::open(tempfile::tempdir().unwrap(), Validity::default()).await
    }

    /// A head whose root lies in `dir`.
    pub(crate) async fn open(dir: TempDir, validity: Validity) -> Self {
        let authority = Arc::new(Attestor::open(dir.path(), "test", validity).unwrap());
        let now = SystemTime::now();
        let identity = authority.head_identity(dir.path(), "head", now).unwrap();
        let admission = Some(authority.clone() as Arc<_>);
        Head {
            authority,
            listener: Listener::bind(ANY, identity, admission, LinkConfig::default()).unwrap(),
            heartbeats: UdpSocket::bind(ANY).await.unwrap(),
            dir,
        }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.listener.local_addr().unwrap()
    }

    pub(crate) fn token(&self) -> String {
        let hour = Duration::from_secs(3600);
        let token = self.authority.create_token(hour, "test", SystemTime::now());
        token.unwrap().to_string()
    }

    /// The worker's next link with its control stream, after Hello and Welcome.
    pub(crate) async fn accept(&self) -> (Link, MsgStream, Hello) {
        let link = timeout(PATIENCE, self.listener.accept()).await;
        let link = link.expect("it connects").unwrap();
        let mut control = link.accept().await.unwrap();
        let hello = control.recv().await.unwrap().unwrap();
        assert_eq!(hello.kind, MsgType::HELLO);
        let welcome = Welcome {
            mesh: "test".to_owned(),
            heartbeat_seconds: 2.0,
            heartbeat_port: self.heartbeats.local_addr().unwrap().port().into(),
            session: 77,
            version: "0".to_owned(),
        };
        let message = Message::new(MsgType::WELCOME, 0, timestamp_us(), welcome.encode_to_vec());
        control.send(message).await.unwrap();
        (link, control, Hello::decode(hello.payload).unwrap())
    }
}
