//! Heartbeats to the head.

use std::net::SocketAddr;
use std::time::Duration;

use dcf::MsgType;
use mesh_base::listen;
use mesh_net::quic::{Link, timestamp_us};
use mesh_net::seal::Sealer;
use mesh_proto::{Load, Welcome};
use prost::Message as _;
use tokio::net::UdpSocket;

/// Sealed heartbeats over UDP, from whichever address this machine has at the moment.
pub(crate) struct Heartbeats {
    socket: UdpSocket,
    target: SocketAddr,
    sealer: Sealer,
    interval: tokio::time::Interval,
    sequence: u32,
}

impl Heartbeats {
    pub(crate) fn new(link: &Link, welcome: &Welcome) -> Result<Self, String> {
        let context = welcome.session.to_be_bytes();
        let key = link.export_key("hydramesh heartbeat", &context);
        let key = key.map_err(|error| error.to_string())?;
        let port = u16::try_from(welcome.heartbeat_port)
            .map_err(|_| format!("its heartbeat port {} is none", welcome.heartbeat_port))?;
        let target = SocketAddr::new(link.remote_addr().ip(), port);
        let socket = unconnected_socket(target)
            .map_err(|error| format!("no socket for heartbeats: {error}"))?;
        let seconds = f64::from(welcome.heartbeat_seconds);
        let every = if (0.1..=60.0).contains(&seconds) {
            Duration::from_secs_f64(seconds)
        } else {
            HEARTBEAT
        };
        let mut interval = tokio::time::interval(every);
        interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        Ok(Heartbeats {
            socket,
            target,
            sealer: Sealer::new(&key, welcome.session),
            interval,
            sequence: 0,
        })
    }

    pub(crate) async fn due(&mut self) {
        self.interval.tick().await;
    }

    pub(crate) async fn send(&mut self, load: Load) {
        let sequence = self.sequence;
        self.sequence = sequence.wrapping_add(1);
        let (kind, load) = (MsgType::SEALED_HEARTBEAT, load.encode_to_vec());
        let sealed = self.sealer.seal(kind, sequence, timestamp_us(), &load);
        let sent = async {
            let datagram = sealed?.encode_datagram();
            anyhow::Ok(self.socket.send_to(&datagram, self.target).await?)
        };
        if let Err(error) = sent.await {
            // It may be lost on the way as well; the next one follows.
            tracing::debug!(%error, "heartbeat not sent");
        }
    }
}

/// A connected socket would keep the address that this machine had at first.
fn unconnected_socket(target: SocketAddr) -> std::io::Result<UdpSocket> {
    let socket = listen::udp(listen::toward(target), None)?;
    socket.set_nonblocking(true)?;
    UdpSocket::from_std(socket)
}

const HEARTBEAT: Duration = Duration::from_secs(2);
