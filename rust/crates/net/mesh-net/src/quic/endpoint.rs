//! The UDP socket under an endpoint, which also receives ICMP errors about peers.
//!
//! quinn's socket does not ask for ICMP errors and its driver would stop at one. This wrapper asks for them, keeps them
//! from quinn, and lets the links to the address in question find out whether their peer is still there.

use std::io::{self, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use dcf::ErrorCode;
use mesh_base::datagrams;
use mesh_base::sync::lock;
use quinn::udp::{RecvMeta, Transmit};
use quinn::{
    AsyncUdpSocket, Endpoint, EndpointConfig, Runtime, ServerConfig, TokioRuntime, UdpPoller,
};
use tokio::task::AbortHandle;

use super::error::ConnectError;
use super::link::{Link, WeakLink, canonical};

/// A QUIC endpoint whose links end when their peer's process is gone.
#[derive(Clone, Debug)]
pub(super) struct LinkEndpoint {
    pub(super) endpoint: Endpoint,
    links: Arc<Links>,
}

impl LinkEndpoint {
    pub(super) fn bind(
        address: SocketAddr,
        server: Option<ServerConfig>,
    ) -> Result<Self, ConnectError> {
        Self::open(address, server).map_err(|source| ConnectError::Socket { address, source })
    }

    fn open(address: SocketAddr, server: Option<ServerConfig>) -> io::Result<Self> {
        let socket = mesh_base::listen::udp(address, None)?;
        let links = Arc::new(Links::default());
        let errors = listen_to_icmp(&socket, links.clone())
            .inspect_err(|error| tracing::debug!(%error, "no ICMP errors here; lost peers are noticed by their silence"))
            .ok();
        let inner = TokioRuntime.wrap_udp_socket(socket)?;
        let socket = Arc::new(WatchedSocket { inner, errors });
        let config = EndpointConfig::default();
        let endpoint =
            Endpoint::new_with_abstract_socket(config, server, socket, Arc::new(TokioRuntime))?;
        Ok(Self { endpoint, links })
    }

    /// Number of links that this node has here.
    pub(super) fn links_of(&self, node_id: &str) -> usize {
        let links = lock(&self.links.0);
        let open = links.iter().filter_map(WeakLink::upgrade);
        open.filter(|link| link.node_id() == node_id && link.close_reason().is_none())
            .count()
    }

    /// Has the link end soon after its peer's port is closed.
    pub(super) fn watch(&self, link: &Link) {
        let is_open = |link: Link| link.close_reason().is_none();
        let mut links = lock(&self.links.0);
        links.retain(|link| link.upgrade().is_some_and(is_open));
        links.push(link.downgrade());
    }

    /// Closes all links and waits until the peers know.
    pub(super) async fn shutdown(&self, code: ErrorCode, text: &str) {
        self.endpoint
            .close(u32::from(code.0).into(), text.as_bytes());
        self.endpoint.wait_idle().await;
    }
}

#[derive(Debug, Default)]
struct Links(Mutex<Vec<WeakLink>>);

impl Links {
    fn unreachable(&self, address: SocketAddr) {
        let links = lock(&self.0);
        for link in links.iter().filter_map(WeakLink::upgrade) {
            if link.remote_addr() == canonical(address) && link.close_reason().is_none() {
                tracing::debug!(?link, "port unreachable");
                link.reported_closed();
            }
        }
    }
}

/// Starts a task that reads the socket's error queue. quinn does not notice it: the kernel signals an error,
/// not readability.
fn listen_to_icmp(socket: &UdpSocket, links: Arc<Links>) -> io::Result<AbortHandle> {
    datagrams::report_icmp_errors(socket.as_fd())?;
    let queue = datagrams::ErrorQueue::new(OwnedFd::from(socket.try_clone()?))?;
    let task = tokio::spawn(async move {
        loop {
            match queue.next().await {
                Ok(icmp) if icmp.port_unreachable => links.unreachable(icmp.destination),
                Ok(_) => {}
                Err(error) => {
                    tracing::debug!(%error, "error queue");
                    return;
                }
            }
        }
    });
    Ok(task.abort_handle())
}

#[derive(Debug)]
struct WatchedSocket {
    inner: Arc<dyn AsyncUdpSocket>,
    /// The task that reads the error queue.
    errors: Option<AbortHandle>,
}

impl Drop for WatchedSocket {
    fn drop(&mut self) {
        if let Some(errors) = &self.errors {
            errors.abort();
        }
    }
}

impl AsyncUdpSocket for WatchedSocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        self.inner.clone().create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        match self.inner.try_send(transmit) {
            // An earlier datagram's error, reported here because this call came first. The datagram at hand was not
            // sent; QUIC sends it again as it does any lost one.
            Err(error) if is_icmp_error(&error) => Ok(()),
            result => result,
        }
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        loop {
            match self.inner.poll_recv(cx, bufs, meta) {
                // Reported once; the error queue has the details.
                Poll::Ready(Err(error)) if is_icmp_error(&error) => {}
                result => return result,
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.inner.max_transmit_segments()
    }

    fn max_receive_segments(&self) -> usize {
        self.inner.max_receive_segments()
    }

    fn may_fragment(&self) -> bool {
        self.inner.may_fragment()
    }
}

/// True for errors that the kernel derives from ICMP messages (icmp(7), `icmp_err_convert`), as far as they
/// differ from the socket's own.
fn is_icmp_error(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionRefused
            | io::ErrorKind::HostUnreachable
            | io::ErrorKind::NetworkUnreachable
    ) || error
        .raw_os_error()
        .is_some_and(|errno| [libc::EHOSTDOWN, libc::EPROTO, libc::ENOPROTOOPT].contains(&errno))
}
