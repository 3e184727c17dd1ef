//! Many datagrams with one system call, by `recvmmsg` and `sendmmsg`.
//!
//! Unsafe, because no safe interface to the two reuses its memory: each function fills the kernel's structures on its own
//! stack with pointers into slices that it borrows, and none of them outlives the call.
#![allow(unsafe_code)]

use std::{
    io, mem,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6},
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    ptr,
};

use dcf::Version;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::bridge;

/// Most datagrams of one system call.
pub const BATCH: usize = 64;

/// Received datagrams, in memory that is used again for the next batch.
#[derive(Debug)]
pub struct RecvBatch {
    bytes: Box<[u8]>,
    received: [(usize, SocketAddr); BATCH],
    count: usize,
}

impl RecvBatch {
    /// An empty batch with room for [`BATCH`] datagrams of any size. Pages that no datagram reaches cost nothing.
    #[must_use]
    pub fn new() -> Self {
        let mut bytes = vec![0; BATCH * STRIDE];
        // What is sent on with a version byte before it has one already.
        for datagram in bytes.chunks_exact_mut(STRIDE) {
            datagram[0] = Version::BYTE;
        }
        Self {
            bytes: bytes.into(),
            received: [(0, NOBODY); BATCH],
            count: 0,
        }
    }

    /// Takes what has arrived at `socket`, without waiting, in place of what was in the batch. Returns the number of
    /// datagrams.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] if there are none; what the socket says otherwise, such as
    /// [`io::ErrorKind::ConnectionRefused`] on a connected one.
    pub fn recv(&mut self, socket: &impl AsFd) -> io::Result<usize> {
        self.count = 0;
        // SAFETY: these are plain C structures, for which all zeroes is a valid value.
        let (mut names, mut iovecs, mut headers): (
            [libc::sockaddr_in6; BATCH],
            [libc::iovec; BATCH],
            [libc::mmsghdr; BATCH],
        ) = unsafe { (mem::zeroed(), mem::zeroed(), mem::zeroed()) };
        for (index, buffer) in self.bytes.chunks_exact_mut(STRIDE).enumerate() {
            let buffer = &mut buffer[HEADROOM..];
            iovecs[index] = libc::iovec {
                iov_base: buffer.as_mut_ptr().cast(),
                iov_len: buffer.len(),
            };
            let header = &mut headers[index].msg_hdr;
            header.msg_name = (&raw mut names[index]).cast();
            header.msg_namelen = NAME_LEN;
            header.msg_iov = &raw mut iovecs[index];
            header.msg_iovlen = 1;
        }
        // SAFETY: every header points to a name, an I/O vector and through that to a buffer that live until the end of
        // this function, are of the length given, and do not overlap; a null timeout is allowed.
        let count = unsafe {
            libc::recvmmsg(
                socket.as_fd().as_raw_fd(),
                headers.as_mut_ptr(),
                BATCH as libc::c_uint,
                libc::MSG_DONTWAIT as _,
                ptr::null_mut(),
            )
        };
        let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
        for index in 0..count {
            let len = (headers[index].msg_len as usize).min(STRIDE - HEADROOM);
            self.received[index] = (len, from_raw(&names[index]));
        }
        self.count = count;
        Ok(count)
    }

    /// Datagrams in the batch.
    #[must_use]
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// One datagram and its source.
    ///
    /// # Panics
    /// If `index` is not below [`RecvBatch::len`].
    #[must_use]
    pub fn get(&self, index: usize) -> (&[u8], SocketAddr) {
        let (len, source) = self.received[..self.count][index];
        (&self.bytes[index * STRIDE + HEADROOM..][..len], source)
    }

    /// The first `len` bytes of one datagram as a datagram of `version`: with or without its version byte, and not copied.
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

    /// One datagram, to be changed in place, and its source.
    ///
    /// # Panics
    /// If `index` is not below [`RecvBatch::len`].
    #[must_use]
    pub fn get_mut(&mut self, index: usize) -> (&mut [u8], SocketAddr) {
        let (len, source) = self.received[..self.count][index];
        (&mut self.bytes[index * STRIDE + HEADROOM..][..len], source)
    }
}

impl Default for RecvBatch {
    fn default() -> Self {
        Self::new()
    }
}

/// What became of datagrams that were to be sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SendReport {
    /// The kernel took them.
    pub sent: usize,
    /// It did not.
    pub failed: usize,
    /// The receiver's machine said about earlier ones that nobody listens there.
    pub refused: bool,
}

/// Sends `datagrams`, each to its address, or to the socket's peer where there is none. A datagram that cannot be sent is
/// counted and left out; a full send buffer is waited for, but only so long that receiving does not suffer.
pub fn send<'a>(
    socket: &impl AsFd,
    datagrams: impl IntoIterator<Item = (&'a [u8], Option<SocketAddr>)>,
) -> SendReport {
    let mut datagrams = datagrams.into_iter().peekable();
    let mut report = SendReport::default();
    while datagrams.peek().is_some() {
        send_batch(socket.as_fd(), &mut datagrams, &mut report);
    }
    report
}

fn send_batch<'a>(
    socket: BorrowedFd<'_>,
    datagrams: &mut impl Iterator<Item = (&'a [u8], Option<SocketAddr>)>,
    report: &mut SendReport,
) {
    // SAFETY: these are plain C structures, for which all zeroes is a valid value.
    let (mut names, mut iovecs, mut headers): (
        [libc::sockaddr_in6; BATCH],
        [libc::iovec; BATCH],
        [libc::mmsghdr; BATCH],
    ) = unsafe { (mem::zeroed(), mem::zeroed(), mem::zeroed()) };
    let mut count = 0;
    for (index, (bytes, to)) in datagrams.take(BATCH).enumerate() {
        iovecs[index] = libc::iovec {
            iov_base: bytes.as_ptr().cast_mut().cast(),
            iov_len: bytes.len(),
        };
        let header = &mut headers[index].msg_hdr;
        header.msg_iov = &raw mut iovecs[index];
        header.msg_iovlen = 1;
        if let Some(to) = to {
            header.msg_namelen = to_raw(to, &mut names[index]);
            header.msg_name = (&raw mut names[index]).cast();
        }
        count = index + 1;
    }

    let mut rest = &mut headers[..count];
    let mut retried = false;
    while !rest.is_empty() {
        // SAFETY: every header points to an I/O vector and through that to a datagram, and to a name or to none; all of
        // them live until the end of this function, and the kernel only reads them.
        let sent = unsafe {
            libc::sendmmsg(
                socket.as_raw_fd(),
                rest.as_mut_ptr(),
                rest.len() as libc::c_uint,
                libc::MSG_DONTWAIT as _,
            )
        };
        if let Ok(sent) = usize::try_from(sent) {
            report.sent += sent;
            rest = &mut rest[sent..];
            retried = false;
            continue;
        }
        let error = io::Error::last_os_error();
        let again = match error.kind() {
            io::ErrorKind::Interrupted => continue,
            // The error is about an earlier datagram; asking has taken it from the socket.
            io::ErrorKind::ConnectionRefused => {
                report.refused = true;
                !retried
            }
            io::ErrorKind::WouldBlock => !retried && wait_for_room(socket),
            _ => false,
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

/// Writes `address` into `raw` and returns its length there.
fn to_raw(address: SocketAddr, raw: &mut libc::sockaddr_in6) -> libc::socklen_t {
    match address {
        SocketAddr::V4(v4) => {
            let v4 = libc::sockaddr_in {
                sin_family: libc::AF_INET as libc::sa_family_t,
                sin_port: v4.port().to_be(),
                sin_addr: libc::in_addr {
                    s_addr: u32::from_ne_bytes(v4.ip().octets()),
                },
                sin_zero: [0; 8],
            };
            // SAFETY: a sockaddr_in6 is larger than a sockaddr_in and at least as strictly aligned.
            unsafe { (&raw mut *raw).cast::<libc::sockaddr_in>().write(v4) };
            size_of::<libc::sockaddr_in>() as libc::socklen_t
        }
        SocketAddr::V6(v6) => {
            raw.sin6_family = libc::AF_INET6 as libc::sa_family_t;
            raw.sin6_port = v6.port().to_be();
            raw.sin6_flowinfo = v6.flowinfo();
            raw.sin6_addr.s6_addr = v6.ip().octets();
            raw.sin6_scope_id = v6.scope_id();
            NAME_LEN
        }
    }
}

/// Reads what the kernel wrote; an address of another family, which no UDP socket has, becomes [`NOBODY`].
fn from_raw(raw: &libc::sockaddr_in6) -> SocketAddr {
    match i32::from(raw.sin6_family) {
        libc::AF_INET => {
            // SAFETY: the family says that the kernel wrote a sockaddr_in, which is smaller and no more strictly aligned.
            let v4 = unsafe { (&raw const *raw).cast::<libc::sockaddr_in>().read() };
            let ip = Ipv4Addr::from(v4.sin_addr.s_addr.to_ne_bytes());
            SocketAddr::V4(SocketAddrV4::new(ip, u16::from_be(v4.sin_port)))
        }
        libc::AF_INET6 => SocketAddr::V6(SocketAddrV6::new(
            Ipv6Addr::from(raw.sin6_addr.s6_addr),
            u16::from_be(raw.sin6_port),
            raw.sin6_flowinfo,
            raw.sin6_scope_id,
        )),
        _ => NOBODY,
    }
}

/// Room for one datagram: the largest possible one and its headroom, rounded up.
const STRIDE: usize = 1 << 16;
/// Room before each datagram for the version byte that it may be sent on with.
const HEADROOM: usize = Version::V5_1.prefix().len();
const NAME_LEN: libc::socklen_t = size_of::<libc::sockaddr_in6>() as libc::socklen_t;
const NOBODY: SocketAddr = SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0));
const SEND_WAIT_MS: u8 = 5;

#[cfg(test)]
mod tests {
    use std::{net::UdpSocket, thread, time::Duration};

    use super::*;

    fn receive(
        batch: &mut RecvBatch,
        socket: &UdpSocket,
        count: usize,
    ) -> Vec<(Vec<u8>, SocketAddr)> {
        let mut received = Vec::new();
        for _ in 0..200 {
            match batch.recv(socket) {
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
            let report = send(&a, sent.iter().map(|bytes| (&bytes[..], to)));
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
    fn a_datagram_is_sent_on_in_either_version_without_a_copy() {
        let (a, b) = (
            UdpSocket::bind("127.0.0.1:0").unwrap(),
            UdpSocket::bind("127.0.0.1:0").unwrap(),
        );
        let to = Some(b.local_addr().unwrap());
        let (old, new) = (Version::V5_0, Version::V5_1);
        let mut batch = RecvBatch::new();
        for _ in 0..2 {
            send(&a, [(&b"\x02old....."[..], to), (b"\x51\x02new.....", to)]);
            let mut count = 0;
            while count < 2 {
                if batch.recv(&b).is_err() {
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
        let report = send(&a, [(&b"one"[..], to), (&too_long, to), (b"two", to)]);
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
            refused |= send(&a, [(&b"anyone?"[..], None)]).refused;
            thread::sleep(Duration::from_millis(1));
        }
        assert!(refused);
    }
}
