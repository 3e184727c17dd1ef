//! UDP with many datagrams per system call.
//!
//! [`BatchSocket`] receives up to [`BATCH`] buffers with one `recvmmsg` and sends up to [`BATCH`] with one `sendmmsg`,
//! to as many destinations. Where the kernel has them it uses GRO and GSO: a run of datagrams between the same two
//! sockets crosses the stack as one. Batches are reused, so that a relay allocates nothing once it runs.

use std::io;
use std::net::SocketAddr;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use mesh_base::datagrams::{self, Received};
use mesh_base::routes::Routes;
use tokio::io::Interest;
use tokio::net::UdpSocket;

pub use mesh_base::datagrams::BATCH;

/// A UDP socket that sends and receives batches of datagrams.
#[derive(Debug)]
pub struct BatchSocket {
    io: UdpSocket,
    local: SocketAddr,
    /// Cleared when the kernel or the device turns out to have no GSO.
    gso: AtomicBool,
    /// Local addresses to answer peers from, for a socket that is bound to all addresses.
    routes: Option<Mutex<Routes>>,
}

impl BatchSocket {
    /// Binds to an address; port 0 takes a free one. Must be called on a tokio runtime. The error names the address.
    pub fn bind(address: SocketAddr) -> io::Result<Self> {
        let bind = || {
            let socket = mesh_base::listen::udp(address, |socket| {
                // More is better, less still works.
                let _ = socket.set_recv_buffer_size(SOCKET_BUFFER);
                let _ = socket.set_send_buffer_size(SOCKET_BUFFER);
                Ok(())
            })?;
            Self::from_std(socket)
        };
        bind().map_err(|error| {
            io::Error::new(
                error.kind(),
                format!("cannot listen on {address}/udp: {error}"),
            )
        })
    }

    /// Takes over a socket. Must be called on a tokio runtime.
    pub fn from_std(socket: std::net::UdpSocket) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        // Old kernels have no GRO: every buffer then holds one datagram.
        if let Err(error) = datagrams::receive_runs(socket.as_fd()) {
            tracing::debug!(%error, "no UDP GRO");
        }
        let local = socket.local_addr()?;
        let mut routes = None;
        if local.ip().is_unspecified() {
            match datagrams::tell_destinations(socket.as_fd(), local.is_ipv6()) {
                Ok(()) => routes = Some(Mutex::default()),
                Err(error) => tracing::debug!(%error, "answers leave from the preferred address"),
            }
        }
        let io = UdpSocket::from_std(socket)?;
        Ok(Self {
            io,
            local,
            gso: AtomicBool::new(true),
            routes,
        })
    }

    /// The address that the socket is bound to.
    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }

    /// Waits for datagrams and fills `batch` with them. Returns their number, at least one. Cancel-safe.
    pub async fn recv(&self, batch: &mut RecvBatch) -> io::Result<usize> {
        self.io
            .async_io(Interest::READABLE, || self.fill(batch))
            .await
    }

    /// Fills `batch` with the datagrams that have arrived; fails with `WouldBlock` if there are none.
    pub fn try_recv(&self, batch: &mut RecvBatch) -> io::Result<usize> {
        self.io.try_io(Interest::READABLE, || self.fill(batch))
    }

    fn fill(&self, batch: &mut RecvBatch) -> io::Result<usize> {
        batch.clear();
        loop {
            let buffers = batch.storage.chunks_exact_mut(BUFFER);
            match datagrams::recv(self.io.as_fd(), buffers, &mut batch.received) {
                // An earlier datagram met a closed port; that says nothing about this call.
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => continue,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                result => result?,
            }
            break;
        }
        if let Some(mut routes) = self.routes() {
            for received in &batch.received {
                if let Some(to) = received.to {
                    routes.note(received.from, to);
                }
            }
        }
        batch.split_segments();
        Ok(batch.len())
    }

    /// Sends the whole batch and clears it; waits while the socket's buffer is full. Returns how many datagrams the
    /// kernel took: one that it refuses, for example because its destination has no route, is skipped.
    pub async fn send(&self, batch: &mut SendBatch) -> io::Result<usize> {
        let mut sent = 0;
        while !batch.is_empty() {
            sent += self
                .io
                .async_io(Interest::WRITABLE, || self.drain(batch))
                .await?;
        }
        Ok(sent)
    }

    /// Sends as many datagrams as the socket's buffer accepts, and removes them from the batch. Fails with
    /// `WouldBlock` if it accepts none.
    pub fn try_send(&self, batch: &mut SendBatch) -> io::Result<usize> {
        self.io.try_io(Interest::WRITABLE, || self.drain(batch))
    }

    fn drain(&self, batch: &mut SendBatch) -> io::Result<usize> {
        let mut sent = 0;
        while !batch.is_empty() {
            match self.send_some(batch) {
                Ok(count) => sent += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return if sent > 0 { Ok(sent) } else { Err(error) };
                }
                Err(error) => self.skip_refused(batch, &error),
            }
        }
        Ok(sent)
    }

    /// Sends one datagram; waits while the socket's buffer is full.
    pub async fn send_to(&self, data: &[u8], destination: SocketAddr) -> io::Result<()> {
        let outgoing = [QueuedDatagram {
            destination,
            range: 0..data.len(),
        }];
        let send = || {
            let routes = self.routes();
            send(self.io.as_fd(), &outgoing, data, false, routes.as_deref())
        };
        let mut sent = self.io.async_io(Interest::WRITABLE, send).await;
        if sent.is_err() && self.forget(destination) {
            sent = self.io.async_io(Interest::WRITABLE, send).await;
        }
        sent.map(|_| ())
    }

    fn send_some(&self, batch: &mut SendBatch) -> io::Result<usize> {
        let gso = self.gso.load(Ordering::Relaxed);
        let routes = self.routes();
        let sent = send(
            self.io.as_fd(),
            batch.pending(),
            &batch.bytes,
            gso,
            routes.as_deref(),
        );
        drop(routes);
        let taken = sent?;
        batch.advance(taken);
        batch.recycle();
        Ok(taken)
    }

    fn routes(&self) -> Option<MutexGuard<'_, Routes>> {
        let routes = self.routes.as_ref()?;
        Some(routes.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Lets the routing table say again where answers to this peer leave from. True if it did not before.
    fn forget(&self, peer: SocketAddr) -> bool {
        self.routes().is_some_and(|mut routes| routes.forget(peer))
    }

    /// After an error at the first pending datagram: turns GSO off if that may be the cause, else skips the datagram.
    fn skip_refused(&self, batch: &mut SendBatch, error: &io::Error) {
        // An error of an earlier datagram (ICMP) is reported once and says nothing about this one.
        if error.kind() == io::ErrorKind::ConnectionRefused {
            return;
        }
        // The address that it was to leave from may be gone.
        if self.forget(batch.pending()[0].destination) {
            return;
        }
        let gso_refused = error
            .raw_os_error()
            .is_some_and(|errno| [libc::EIO, libc::EINVAL].contains(&errno));
        if gso_refused && run_length(batch.pending()) > 1 && self.gso.swap(false, Ordering::Relaxed)
        {
            tracing::debug!(%error, "no UDP GSO here");
            return;
        }
        let refused = &batch.pending()[0];
        tracing::debug!(destination = %refused.destination, bytes = refused.range.len(), %error, "datagram refused");
        batch.advance(1);
        batch.recycle();
    }
}

/// Datagrams that were received together. Reused between calls.
#[derive(Debug)]
pub struct RecvBatch {
    storage: Vec<u8>,
    received: Vec<Received>,
    datagrams: Vec<(SocketAddr, Range<usize>)>,
}

impl RecvBatch {
    /// An empty batch with room for one system call.
    pub fn new() -> Self {
        Self {
            storage: vec![0; BATCH * BUFFER],
            received: Vec::with_capacity(BATCH),
            datagrams: Vec::with_capacity(4 * BATCH),
        }
    }

    /// Number of datagrams in the batch.
    pub fn len(&self) -> usize {
        self.datagrams.len()
    }

    /// True if the batch is empty.
    pub fn is_empty(&self) -> bool {
        self.datagrams.is_empty()
    }

    /// The datagrams, in the order of their arrival.
    pub fn datagrams(&self) -> impl Iterator<Item = Datagram<'_>> {
        self.datagrams.iter().map(|(from, range)| Datagram {
            from: *from,
            data: &self.storage[range.clone()],
        })
    }

    fn clear(&mut self) {
        self.datagrams.clear();
    }

    /// Splits buffers that GRO filled with several datagrams.
    fn split_segments(&mut self) {
        for (index, buffer) in self.received.iter().enumerate() {
            let start = index * BUFFER;
            // Longer than any DCF datagram.
            if buffer.truncated {
                continue;
            }
            let segment = if buffer.segment == 0 {
                buffer.len.max(1)
            } else {
                buffer.segment
            };
            let mut at = 0;
            // An empty datagram is one, too.
            loop {
                let end = (at + segment).min(buffer.len);
                self.datagrams.push((buffer.from, start + at..start + end));
                at = end;
                if at >= buffer.len {
                    break;
                }
            }
        }
    }
}

impl Default for RecvBatch {
    fn default() -> Self {
        Self::new()
    }
}

/// A datagram in a received batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Datagram<'a> {
    /// Address of the sender.
    pub from: SocketAddr,
    /// Payload of the datagram.
    pub data: &'a [u8],
}

/// Datagrams that are to be sent together. Reused between calls.
#[derive(Debug, Default)]
pub struct SendBatch {
    bytes: Vec<u8>,
    datagrams: Vec<QueuedDatagram>,
    /// Index of the first datagram that has not been sent yet.
    next: usize,
}

impl SendBatch {
    /// An empty batch.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a datagram with these bytes.
    pub fn push(&mut self, destination: SocketAddr, data: &[u8]) {
        self.push_parts(destination, &[data]);
    }

    /// Adds a datagram that is made of several parts, such as header and payload.
    pub fn push_parts(&mut self, destination: SocketAddr, parts: &[&[u8]]) {
        let start = self.bytes.len();
        for part in parts {
            self.bytes.extend_from_slice(part);
        }
        self.datagrams.push(QueuedDatagram {
            destination,
            range: start..self.bytes.len(),
        });
    }

    /// Number of datagrams that have not been sent yet.
    pub fn len(&self) -> usize {
        self.datagrams.len() - self.next
    }

    /// True if all datagrams have been sent.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Drops all datagrams that have not been sent.
    pub fn clear(&mut self) {
        self.next = self.datagrams.len();
        self.recycle();
    }

    fn pending(&self) -> &[QueuedDatagram] {
        &self.datagrams[self.next..]
    }

    fn advance(&mut self, count: usize) {
        self.next += count;
    }

    /// Clears the buffers once everything is sent.
    fn recycle(&mut self) {
        if self.is_empty() {
            self.bytes.clear();
            self.datagrams.clear();
            self.next = 0;
        }
    }
}

#[derive(Debug)]
struct QueuedDatagram {
    destination: SocketAddr,
    /// Position of the datagram in the batch's bytes.
    range: Range<usize>,
}

/// Sends datagrams from the front of `outgoing`, with bytes in `bytes`, without waiting, from the addresses
/// in `routes`. Returns the number of datagrams sent; an error concerns the first.
fn send(
    socket: BorrowedFd<'_>,
    outgoing: &[QueuedDatagram],
    bytes: &[u8],
    gso: bool,
    routes: Option<&Routes>,
) -> io::Result<usize> {
    let mut runs = [0; BATCH];
    let mut rest = outgoing;
    let datagrams = runs.iter_mut().map_while(|run| {
        let first = rest.first()?;
        *run = if gso { run_length(rest) } else { 1 };
        // The datagrams of a run lie next to each other in `bytes`.
        let span = first.range.start..rest[*run - 1].range.end;
        rest = &rest[*run..];
        Some(datagrams::Datagram {
            bytes: &bytes[span],
            to: Some(first.destination),
            from: routes.and_then(|routes| routes.get(first.destination)),
            // Fits: a run has at most MAX_RUN_SEGMENT bytes for each datagram.
            segment: if *run > 1 {
                first.range.len() as u16
            } else {
                0
            },
        })
    });
    let taken = datagrams::send(socket, datagrams)?;
    Ok(runs[..taken].iter().sum())
}

/// Number of datagrams from the front that GSO can send as one run: same destination and length; the last may
/// be shorter.
fn run_length(outgoing: &[QueuedDatagram]) -> usize {
    let Some(first) = outgoing.first() else {
        return 0;
    };
    let segment = first.range.len();
    if segment == 0 || segment > MAX_RUN_SEGMENT {
        return 1;
    }
    let most = MAX_RUN.min(MAX_RUN_BYTES / segment);
    let mut length = 1;
    while length < most {
        let Some(next) = outgoing.get(length) else {
            break;
        };
        if next.destination != first.destination
            || next.range.is_empty()
            || next.range.len() > segment
        {
            break;
        }
        length += 1;
        if next.range.len() < segment {
            break;
        }
    }
    length
}

/// Buffers to ask the kernel for, bytes. It caps them at `net.core.rmem_max` and `net.core.wmem_max`.
const SOCKET_BUFFER: usize = 4 << 20;

/// Bytes per receive buffer: the largest UDP payload there is, which is also the largest GRO run.
const BUFFER: usize = 65_536;

/// Longest datagram in a run: what an Ethernet frame carries without fragments, because the kernel refuses to
/// segment beyond the MTU.
const MAX_RUN_SEGMENT: usize = 1400;

/// Most datagrams in a run (the kernel's `UDP_MAX_SEGMENTS`).
const MAX_RUN: usize = 64;

/// Most bytes in a run.
const MAX_RUN_BYTES: usize = 65_000;

#[cfg(test)]
mod tests;
