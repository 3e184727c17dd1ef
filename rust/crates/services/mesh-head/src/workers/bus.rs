//! The worker bus, 7778/udp: sealed heartbeats of the mesh's workers. All other datagrams are of workers
//! without an identity ([`super::legacy`]).

use std::sync::Arc;

use bytes::Bytes;
use dcf::{DecodeError, Message, MsgType};
use mesh_control::registry::Registry;
use mesh_net::udp::{BatchSocket, Datagram, RecvBatch};
use mesh_proto::Load;
use prost::Message as _;
use tracing::debug;

use super::legacy::LegacyBus;
use super::verdict::Verdict;
use crate::mesh::Mesh;
use crate::metrics::DatagramCounters;

/// Serves the bus; never returns.
pub(crate) async fn serve(mesh: Arc<Mesh>, socket: Arc<BatchSocket>) {
    let counters = mesh.metrics.datagrams("workers");
    let mut bus = WorkerBus {
        legacy: LegacyBus::new(mesh.clone(), socket.clone()),
        counters,
        mesh,
    };
    let mut batch = RecvBatch::new();
    loop {
        match socket.recv(&mut batch).await {
            Ok(_) => {
                for datagram in batch.datagrams() {
                    bus.take(&datagram).count(&bus.counters);
                }
                bus.legacy.reply().await;
            }
            Err(error) => {
                debug!(%error, "worker bus");
                tokio::task::yield_now().await;
            }
        }
    }
}

struct WorkerBus {
    mesh: Arc<Mesh>,
    counters: DatagramCounters,
    legacy: LegacyBus,
}

impl WorkerBus {
    fn take(&mut self, datagram: &Datagram<'_>) -> Verdict {
        // Looked at before anything is copied: most junk ends here.
        let (version, header) = match dcf::Header::decode_datagram(datagram.data) {
            Ok(framed) => framed,
            Err(error) => {
                if matches!(error, DecodeError::OtherVersion(_)) {
                    debug!(from = %datagram.from, %error, "dropped");
                }
                return Verdict::Malformed;
            }
        };
        if header.kind() != MsgType::SEALED_HEARTBEAT {
            return self.legacy.take(datagram, version, header.kind());
        }
        match Message::decode_datagram(Bytes::copy_from_slice(datagram.data)) {
            Ok(message) => self.sealed_heartbeat(&message),
            Err(_) => Verdict::Malformed,
        }
    }

    fn sealed_heartbeat(&self, message: &Message) -> Verdict {
        let Some((worker, plaintext)) = self.mesh.sessions.unseal(message) else {
            return Verdict::Untrusted;
        };
        match Load::decode(plaintext) {
            Ok(load) => {
                self.mesh.clock_heard(worker, message.timestamp_us);
                self.mesh.report(worker, load);
                let node = |registry: &Registry| registry.node_of(worker).map(str::to_owned);
                if let Some(node) = self.mesh.with_registry(node) {
                    let bytes = message.payload.len();
                    self.mesh.audit.message("bus", message.kind, node, bytes);
                }
                Verdict::Accepted
            }
            Err(_) => Verdict::Malformed,
        }
    }
}
