//! The UDP socket under an endpoint, which also listens to what ICMP says about peers.
//!
//! quinn's socket does not ask for ICMP errors and its driver would stop at one. This wrapper asks for them, keeps them
//! from quinn, and lets the links to the address in question find out whether their peer is still there.

use std::fmt;
use std::io::{self, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use quinn::udp::{RecvMeta, Transmit};
use quinn::{
    AsyncUdpSocket, Endpoint, EndpointConfig, Runtime, ServerConfig, TokioRuntime, UdpPoller,
};

use super::link::{Link, WeakLink, canonical};
use crate::udp::sys;

/// A QUIC endpoint whose links end when their peer's process is gone.
#[derive(Clone, Debug)]
pub(super) struct Carrier {
    pub(super) endpoint: Endpoint,
    links: Arc<Links>,
}

impl Carrier {
    pub(super) fn bind(address: SocketAddr, server: Option<ServerConfig>) -> io::Result<Self> {
        let socket = UdpSocket::bind(address)?;
        let links = Arc::new(Links::default());
        let errors = OwnedFd::from(socket.try_clone()?);
        let listening = sys::report_icmp_errors(errors.as_fd());
        if let Err(error) = &listening {
            tracing::debug!(%error, "no ICMP errors on this system; lost peers are noticed by their silence");
        }
        let inner = TokioRuntime.wrap_udp_socket(socket)?;
        let socket = Arc::new(WatchedSocket {
            inner,
            errors,
            links: links.clone(),
        });
        let config = EndpointConfig::default();
        let endpoint =
            Endpoint::new_with_abstract_socket(config, server, socket, Arc::new(TokioRuntime))?;
        Ok(Self { endpoint, links })
    }

    /// Has the link end soon after its peer's port is closed.
    pub(super) fn watch(&self, link: &Link) {
        let mut links = self
            .links
            .all
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        links.retain(|link| {
            link.upgrade()
                .is_some_and(|link| link.close_reason().is_none())
        });
        links.push(link.downgrade());
    }
}

#[derive(Default)]
struct Links {
    all: Mutex<Vec<WeakLink>>,
}

impl Links {
    fn unreachable(&self, address: SocketAddr) {
        let links = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        for link in links.iter().filter_map(WeakLink::upgrade) {
            if link.remote_addr() == canonical(address) && link.close_reason().is_none() {
                tracing::debug!(?link, "port unreachable");
                tokio::spawn(link.suspect());
            }
        }
    }
}

impl fmt::Debug for Links {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Links")
    }
}

#[derive(Debug)]
struct WatchedSocket {
    inner: Arc<dyn AsyncUdpSocket>,
    /// The same socket, for its error queue.
    errors: OwnedFd,
    links: Arc<Links>,
}

impl WatchedSocket {
    fn drain_errors(&self) {
        // Bounded: a flood of ICMP must not hold up the driver.
        for _ in 0..64 {
            match sys::next_icmp_error(self.errors.as_fd()) {
                Ok(Some(icmp)) if icmp.port_unreachable => self.links.unreachable(icmp.destination),
                Ok(Some(_)) => {}
                Ok(None) | Err(_) => return,
            }
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
            Err(error) if is_icmp_error(&error) => {
                self.drain_errors();
                Ok(())
            }
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
                Poll::Ready(Err(error)) if is_icmp_error(&error) => self.drain_errors(),
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

/// The errors that the kernel makes of ICMP messages (icmp(7), `icmp_err_convert`), as far as they can be told from the
/// socket's own.
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
