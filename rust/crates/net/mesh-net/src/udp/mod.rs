//! UDP with many datagrams per system call.
//!
//! [`BatchSocket`] receives up to [`BATCH`] buffers with one `recvmmsg` and sends up to [`BATCH`] with one `sendmmsg`,
//! to as many destinations. Where the kernel has them it uses GRO and GSO: a run of datagrams between the same two
//! sockets crosses the stack as one. Batches are reused, so that a relay allocates nothing once it runs.

use std::io;
use std::net::SocketAddr;
use std::ops::{Range, RangeInclusive};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};

use mesh_base::datagrams::{self, Received};
use mesh_base::listen;
use mesh_base::routes::Routes;
use mesh_base::sync::lock;
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
        let socket = listen::udp(address, Some(SOCKET_BUFFER));
        socket.and_then(Self::from_std).map_err(|error| {
            let text = format!("cannot listen on {address}/udp: {error}");
            io::Error::new(error.kind(), text)
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
        let fill = || self.fill(batch);
        self.io.async_io(Interest::READABLE, fill).await
    }

    fn fill(&self, batch: &mut RecvBatch) -> io::Result<usize> {
        batch.clear();
        loop {
            let buffers = batch.storage.chunks_exact_mut(BUFFER);
            match datagrams::recv(self.io.as_fd(), buffers, &mut batch.received) {
                // An earlier datagram met a closed port; that says nothing about this call.
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => break result?,
            }
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
            let drain = || self.drain(batch);
            sent += self.io.async_io(Interest::WRITABLE, drain).await?;
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
        let SendBatch { datagrams, bytes } = batch;
        let taken = send(self.io.as_fd(), datagrams, bytes, gso, routes.as_deref())?;
        drop(routes);
        batch.advance(taken);
        Ok(taken)
    }

    fn routes(&self) -> Option<MutexGuard<'_, Routes>> {
        self.routes.as_ref().map(lock)
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
        if self.forget(batch.datagrams[0].destination) {
            return;
        }
        let gso_refused = matches!(error.raw_os_error(), Some(libc::EIO | libc::EINVAL));
        if gso_refused
            && run_length(&batch.datagrams) > 1
            && self.gso.swap(false, Ordering::Relaxed)
        {
            tracing::debug!(%error, "no UDP GSO here");
            return;
        }
        let refused = &batch.datagrams[0];
        tracing::debug!(destination = %refused.destination, bytes = refused.range.len(), %error, "datagram refused");
        batch.advance(1);
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
            let segment = match buffer.segment {
                0 => buffer.len.max(1),
                segment => segment,
            };
            // An empty datagram is one, too.
            for at in (0..buffer.len.max(1)).step_by(segment) {
                let end = (at + segment).min(buffer.len);
                self.datagrams.push((buffer.from, start + at..start + end));
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
    /// Those that have not been sent yet.
    datagrams: Vec<QueuedDatagram>,
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
        self.datagrams.len()
    }

    /// True if all datagrams have been sent.
    pub fn is_empty(&self) -> bool {
        self.datagrams.is_empty()
    }

    /// Drops all datagrams that have not been sent.
    pub fn clear(&mut self) {
        self.advance(self.len());
    }

    /// Removes datagrams from the front.
    fn advance(&mut self, count: usize) {
        self.datagrams.drain(..count);
        if self.is_empty() {
            self.bytes.clear();
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
    let most = MAX_RUN.min(MAX_RUN_BYTES / segment).min(outgoing.len());
    let is_alike = |next: &&QueuedDatagram, lengths: RangeInclusive<usize>| {
        next.destination == first.destination && lengths.contains(&next.range.len())
    };
    let whole = outgoing[..most]
        .iter()
        .take_while(|next| is_alike(next, segment..=segment));
    let length = whole.count();
    let last = outgoing[..most].get(length);
    length + usize::from(last.is_some_and(|last| is_alike(&last, 1..=segment)))
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
