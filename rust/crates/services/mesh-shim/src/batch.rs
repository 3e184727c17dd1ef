//! Datagrams in batches, one system call for many of them.

use std::{
    io,
    net::SocketAddr,
    os::fd::{AsFd, BorrowedFd},
};

use dcf::Version;
use mesh_base::{
    datagrams::{self, Datagram, Received},
    routes::Routes,
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::bridge;

pub use mesh_base::datagrams::BATCH;

/// Received datagrams, in memory that is used again for the next batch.
#[derive(Debug)]
pub struct RecvBatch {
    bytes: Box<[u8]>,
    received: Vec<Received>,
}

impl RecvBatch {
    /// An empty batch with room for [`BATCH`] datagrams of any size. Pages that no datagram reaches cost
    /// nothing.
    #[must_use]
    pub fn new() -> Self {
        let mut bytes = vec![0; BATCH * STRIDE];
        // Datagrams that are sent on with a version byte have one in front already.
        for datagram in bytes.chunks_exact_mut(STRIDE) {
            datagram[0] = Version::BYTE;
        }
        Self {
            bytes: bytes.into(),
            received: Vec::with_capacity(BATCH),
        }
    }

    /// Takes the datagrams that have arrived at `socket`, without waiting, in place of those in the batch.
    /// Returns the number of datagrams. `routes`, for a socket on every address that
    /// [`datagrams::tell_destinations`] was called for, notes where each source is answered from.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] if there are none; else the socket's error, such as
    /// [`io::ErrorKind::ConnectionRefused`] on a connected one.
    pub fn recv(&mut self, socket: &impl AsFd, routes: Option<&mut Routes>) -> io::Result<usize> {
        let buffers = self.bytes.chunks_exact_mut(STRIDE);
        let buffers = buffers.map(|buffer| &mut buffer[HEADROOM..]);
        datagrams::recv(socket.as_fd(), buffers, &mut self.received)?;
        if let Some(routes) = routes {
            for received in &self.received {
                if let Some(local) = received.to {
                    routes.note(received.from, local);
                }
            }
        }
        Ok(self.len())
    }

    /// Datagrams in the batch.
    #[must_use]
    pub fn len(&self) -> usize {
        self.received.len()
    }

    /// Returns true if it holds no datagrams.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.received.is_empty()
    }

    /// Datagram `index` and its source.
    ///
    /// # Panics
    /// If `index` is not below [`RecvBatch::len`].
    #[must_use]
    pub fn get(&self, index: usize) -> (&[u8], SocketAddr) {
        let Received { len, from, .. } = self.received[index];
        (&self.bytes[index * STRIDE + HEADROOM..][..len], from)
    }

    /// The first `len` bytes of one datagram as a datagram of `version`: with or without its version byte,
    /// and not copied.
    ///
    /// # Panics
    /// If `index` is not below [`RecvBatch::len`], or if the datagram is shorter than `len`.
    #[must_use]
    pub fn reframed(&self, index: usize, len: usize, version: Version) -> &[u8] {
        let (datagram, _) = self.get(index);
        let shift = bridge::reframed(&datagram[..len], version);
        let end = index * STRIDE + HEADROOM + len;
        let start = (index * STRIDE + HEADROOM).saturating_add_signed(shift);
        &self.bytes[start..end.max(start)]
    }

    /// Datagram `index`, to be changed in place, and its source.
    ///
    /// # Panics
    /// If `index` is not below [`RecvBatch::len`].
    #[must_use]
    pub fn get_mut(&mut self, index: usize) -> (&mut [u8], SocketAddr) {
        let Received { len, from, .. } = self.received[index];
        (&mut self.bytes[index * STRIDE + HEADROOM..][..len], from)
    }
}

impl Default for RecvBatch {
    fn default() -> Self {
        Self::new()
    }
}

/// Result of sending a batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SendReport {
    /// Datagrams that the kernel took.
    pub sent: usize,
    /// Datagrams that the kernel refused.
    pub failed: usize,
    /// True if the receiver's machine reported, for earlier datagrams, that its port is closed.
    pub refused: bool,
}

/// Sends `datagrams`, each to its address, or to the socket's peer if it has none. A datagram that cannot be
/// sent is counted and left out; the call waits while the send buffer is full, but only so long that
/// receiving does not suffer. `routes`: each leaves from the address of this machine that its receiver sent to.
pub fn send<'a>(
    socket: &impl AsFd,
    datagrams: impl IntoIterator<Item = (&'a [u8], Option<SocketAddr>)>,
    routes: Option<&Routes>,
) -> SendReport {
    let mut datagrams = datagrams.into_iter().peekable();
    let mut report = SendReport::default();
    while datagrams.peek().is_some() {
        send_batch(socket.as_fd(), &mut datagrams, routes, &mut report);
    }
    report
}

fn send_batch<'a>(
    socket: BorrowedFd<'_>,
    datagrams: &mut impl Iterator<Item = (&'a [u8], Option<SocketAddr>)>,
    routes: Option<&Routes>,
    report: &mut SendReport,
) {
    let mut batch = [Datagram::default(); BATCH];
    let mut count = 0;
    for (slot, (bytes, to)) in batch.iter_mut().zip(datagrams) {
        let from = to.and_then(|to| routes?.get(to));
        (slot.bytes, slot.to, slot.from) = (bytes, to, from);
        count += 1;
    }
    let mut rest = &mut batch[..count];
    let mut retried = false;
    while !rest.is_empty() {
        let error = match datagrams::send(socket, rest.iter().copied()) {
            Ok(sent) => {
                report.sent += sent;
                rest = &mut rest[sent..];
                retried = false;
                continue;
            }
            Err(error) => error,
        };
        let again = match error.kind() {
            io::ErrorKind::Interrupted => continue,
            // The error is about an earlier datagram; asking has taken it from the socket.
            io::ErrorKind::ConnectionRefused => {
                report.refused = true;
                !retried
            }
            io::ErrorKind::WouldBlock => !retried && wait_for_room(socket),
            // The address that it was to leave from may be gone: the routing table knows another one.
            _ => rest[0].from.take().is_some(),
        };
        retried = true;
        if !again {
            report.failed += 1;
            rest = &mut rest[1..];
            retried = false;
        }
    }
}

fn wait_for_room(socket: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::new(socket, PollFlags::POLLOUT)];
    poll(&mut fds, PollTimeout::from(SEND_WAIT_MS)).is_ok_and(|ready| ready > 0)
}

/// Room for one datagram: the largest possible one and its headroom, rounded up.
const STRIDE: usize = 1 << 16;
/// Room before each datagram for the version byte that it may be sent on with.
const HEADROOM: usize = Version::V5_1.prefix().len();
const SEND_WAIT_MS: u8 = 5;

#[cfg(test)]
mod tests {
    use std::{
        net::{IpAddr, UdpSocket},
        thread,
        time::Duration,
    };

    use super::*;

    fn receive(
        batch: &mut RecvBatch,
        socket: &UdpSocket,
        count: usize,
    ) -> Vec<(Vec<u8>, SocketAddr)> {
        let mut received = Vec::new();
        for _ in 0..200 {
            match batch.recv(socket, None) {
                Ok(n) => received.extend((0..n).map(|index| {
                    let (bytes, source) = batch.get(index);
                    (bytes.to_vec(), source)
                })),
                Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
            }
            if received.len() >= count {
                break;
            }
            thread::sleep(Duration::from_millis(5));
        }
        received
    }

    #[test]
    fn datagrams_of_every_size_arrive_in_order_with_their_source() {
        for ip in ["127.0.0.1:0", "[::1]:0"] {
            let (a, b) = (UdpSocket::bind(ip).unwrap(), UdpSocket::bind(ip).unwrap());
            let to = Some(b.local_addr().unwrap());
            let sent: Vec<Vec<u8>> = (0..BATCH + 9)
                .map(|n| vec![n as u8; 3 * n])
                .chain([vec![1; 65_000]])
                .collect();
            let report = send(&a, sent.iter().map(|bytes| (&bytes[..], to)), None);
            assert_eq!(
                report,
                SendReport {
                    sent: sent.len(),
                    failed: 0,
                    refused: false
                }
            );
            let received = receive(&mut RecvBatch::new(), &b, sent.len());
            assert_eq!(received.len(), sent.len());
            for ((bytes, source), sent) in received.iter().zip(&sent) {
                assert_eq!(bytes, sent);
                assert_eq!(*source, a.local_addr().unwrap());
            }
        }
    }

    #[test]
    fn a_client_is_answered_from_the_address_that_it_asked() {
        let server = mesh_base::listen::udp(mesh_base::listen::anywhere(0), None).unwrap();
        server.set_nonblocking(true).unwrap();
        datagrams::tell_destinations(server.as_fd(), true).unwrap();
        let port = server.local_addr().unwrap().port();
        let (mut routes, mut batch) = (Routes::new(), RecvBatch::new());
        for (client, asked) in [("127.0.0.1:0", "127.0.0.9"), ("[::1]:0", "::1")] {
            let client = UdpSocket::bind(client).unwrap();
            client
                .set_read_timeout(Some(Duration::from_secs(5)))
                .unwrap();
            // It takes answers from there alone.
            client.connect((asked, port)).unwrap();
            client.send(b"who?").unwrap();
            while batch.recv(&server, Some(&mut routes)).is_err() {
                thread::sleep(Duration::from_millis(1));
            }
            let (_, from) = batch.get(0);
            assert_eq!(
                from,
                client.local_addr().unwrap(),
                "IPv4 clients have IPv4 addresses"
            );
            let report = send(&server, [(&b"me"[..], Some(from))], Some(&routes));
            assert_eq!((report.sent, report.failed), (1, 0));
            assert_eq!(client.recv(&mut [0; 8]).unwrap(), 2);
            // An address that is gone does not keep it from its answer.
            routes.note(from, IpAddr::from([192, 0, 2, 1]));
            let report = send(&server, [(&b"me"[..], Some(from))], Some(&routes));
            assert_eq!((report.sent, report.failed), (1, 0));
        }
    }

    #[test]
    fn a_datagram_is_sent_on_in_either_version_without_a_copy() {
        let (a, b) = (
            UdpSocket::bind("127.0.0.1:0").unwrap(),
            UdpSocket::bind("127.0.0.1:0").unwrap(),
        );
        let to = Some(b.local_addr().unwrap());
        let (old, new) = (Version::V5_0, Version::V5_1);
        let mut batch = RecvBatch::new();
        for _ in 0..2 {
            send(
                &a,
                [(&b"\x02old....."[..], to), (b"\x51\x02new.....", to)],
                None,
            );
            let mut count = 0;
            while count < 2 {
                if batch.recv(&b, None).is_err() {
                    thread::sleep(Duration::from_millis(1));
                    continue;
                }
                for index in 0..batch.len() {
                    let plain = if batch.get(index).0[0] == 2 {
                        &b"\x02old"[..]
                    } else {
                        b"\x02new"
                    };
                    let len = plain.len() + usize::from(batch.get(index).0[0] != 2);
                    assert_eq!(batch.reframed(index, len, old), plain);
                    assert_eq!(batch.reframed(index, len, new), [&[0x51], plain].concat());
                    count += 1;
                }
            }
        }
    }

    #[test]
    fn one_datagram_that_cannot_go_does_not_stop_the_others() {
        let (a, b) = (
            UdpSocket::bind("127.0.0.1:0").unwrap(),
            UdpSocket::bind("127.0.0.1:0").unwrap(),
        );
        let to = Some(b.local_addr().unwrap());
        let too_long = vec![0; 65_508];
        let report = send(&a, [(&b"one"[..], to), (&too_long, to), (b"two", to)], None);
        assert_eq!(
            report,
            SendReport {
                sent: 2,
                failed: 1,
                refused: false
            }
        );
        let received = receive(&mut RecvBatch::new(), &b, 2);
        assert_eq!(
            received
                .iter()
                .map(|(bytes, _)| &bytes[..])
                .collect::<Vec<_>>(),
            [b"one", b"two"]
        );
    }

    #[test]
    fn a_closed_port_is_reported() {
        let (a, b) = (
            UdpSocket::bind("127.0.0.1:0").unwrap(),
            UdpSocket::bind("127.0.0.1:0").unwrap(),
        );
        a.connect(b.local_addr().unwrap()).unwrap();
        drop(b);
        let mut refused = false;
        for _ in 0..100 {
            refused |= send(&a, [(&b"anyone?"[..], None)], None).refused;
            thread::sleep(Duration::from_millis(1));
        }
        assert!(refused);
    }
}
