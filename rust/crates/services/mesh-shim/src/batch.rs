//! Many datagrams with one system call, by `recvmmsg` and `sendmmsg`.
//!
//! Unsafe, because no safe interface to the two reuses its memory: each function fills the kernel's structures on its own
//! stack with pointers into slices that it borrows, and none of them outlives the call.
#![allow(unsafe_code)]

use std::{
    io, mem,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6},
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    ptr,
};

use dcf::Version;
use mesh_base::addresses::canonical;
use mesh_base::routes::Routes;
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
        // Datagrams that are sent on with a version byte have one in front already.
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
        self.take(socket, None)
    }

    /// The same for a socket on every address that [`tell_destinations`] was called for: notes where each source is answered
    /// from.
    ///
    /// # Errors
    /// As [`RecvBatch::recv`].
    pub fn recv_noting(&mut self, socket: &impl AsFd, routes: &mut Routes) -> io::Result<usize> {
        self.take(socket, Some(routes))
    }

    fn take(&mut self, socket: &impl AsFd, mut routes: Option<&mut Routes>) -> io::Result<usize> {
        self.count = 0;
        // SAFETY: these are plain C structures, for which all zeroes is a valid value.
        let (mut names, mut iovecs, mut headers): (
            [libc::sockaddr_in6; BATCH],
            [libc::iovec; BATCH],
            [libc::mmsghdr; BATCH],
        ) = unsafe { (mem::zeroed(), mem::zeroed(), mem::zeroed()) };
        let mut controls = [const { Control([0; CONTROL]) }; BATCH];
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
            if routes.is_some() {
                header.msg_control = (&raw mut controls[index]).cast();
                header.msg_controllen = size_of::<Control>() as _;
            }
        }
        // SAFETY: every header points to a name, an I/O vector and through that to a buffer, and to a control block or none,
        // that live until the end of this function, are of the length given, and do not overlap; a null timeout is allowed.
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
            let from = from_raw(&names[index]);
            self.received[index] = (len, from);
            if let Some(routes) = &mut routes
                && let Some(local) = destination(&headers[index].msg_hdr)
            {
                routes.note(from, local);
            }
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
    send_all(socket, datagrams, None)
}

/// The same, each from the address of this machine that its receiver sent to.
pub fn answer<'a>(
    socket: &impl AsFd,
    datagrams: impl IntoIterator<Item = (&'a [u8], Option<SocketAddr>)>,
    routes: &Routes,
) -> SendReport {
    send_all(socket, datagrams, Some(routes))
}

fn send_all<'a>(
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

/// Has the system say to which address of this machine each datagram of a socket was sent.
///
/// # Errors
/// The system's.
pub fn tell_destinations(socket: &std::net::UdpSocket) -> io::Result<()> {
    let on = |level, option| {
        let on: libc::c_int = 1;
        // SAFETY: the option's value is a `c_int`, which outlives the call.
        let result = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                level,
                option,
                (&raw const on).cast(),
                size_of::<libc::c_int>() as libc::socklen_t,
            )
        };
        if result == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    };
    if socket.local_addr()?.is_ipv6() {
        on(libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO)?;
    }
    // A dual-stack socket says it for IPv4 datagrams this way.
    on(libc::IPPROTO_IP, libc::IP_PKTINFO)
}

fn send_batch<'a>(
    socket: BorrowedFd<'_>,
    datagrams: &mut impl Iterator<Item = (&'a [u8], Option<SocketAddr>)>,
    routes: Option<&Routes>,
    report: &mut SendReport,
) {
    // SAFETY: these are plain C structures, for which all zeroes is a valid value.
    let (mut names, mut iovecs, mut headers): (
        [libc::sockaddr_in6; BATCH],
        [libc::iovec; BATCH],
        [libc::mmsghdr; BATCH],
    ) = unsafe { (mem::zeroed(), mem::zeroed(), mem::zeroed()) };
    let mut controls = [const { Control([0; CONTROL]) }; BATCH];
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
            if let Some(source) = routes.and_then(|routes| routes.get(to)) {
                set_source(header, &mut controls[index], source);
            }
        }
        count = index + 1;
    }

    let mut rest = &mut headers[..count];
    let mut retried = false;
    while !rest.is_empty() {
        // SAFETY: every header points to an I/O vector and through that to a datagram, and to a name and a control block or to
        // none; all of them live until the end of this function, and the kernel only reads them.
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
            // The address that it was to leave from may be gone: the routing table knows another one.
            _ if rest[0].msg_hdr.msg_controllen > 0 => {
                rest[0].msg_hdr.msg_control = ptr::null_mut();
                rest[0].msg_hdr.msg_controllen = 0;
                true
            }
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

/// Room for control messages, aligned as their headers want it.
#[repr(C, align(8))]
struct Control([u8; CONTROL]);

/// The destination of a datagram, by the control messages of [`tell_destinations`].
fn destination(header: &libc::msghdr) -> Option<IpAddr> {
    let mut found = None;
    // SAFETY: `msg_control` and `msg_controllen` describe a control block that the kernel filled.
    let mut next: *const libc::cmsghdr = unsafe { libc::CMSG_FIRSTHDR(header) };
    // SAFETY: the CMSG macros return null or a header inside the block.
    while let Some(message) = unsafe { next.as_ref() } {
        // SAFETY: a header that the kernel wrote is followed by the data of its type, which may be unaligned.
        unsafe {
            let data = libc::CMSG_DATA(message);
            match (message.cmsg_level, message.cmsg_type) {
                (libc::IPPROTO_IP, libc::IP_PKTINFO) => {
                    let info: libc::in_pktinfo = ptr::read_unaligned(data.cast());
                    // It is the address that a broadcast is answered from, too.
                    return Some(Ipv4Addr::from(u32::from_be(info.ipi_spec_dst.s_addr)).into());
                }
                (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => {
                    let info: libc::in6_pktinfo = ptr::read_unaligned(data.cast());
                    found = Some(Ipv6Addr::from(info.ipi6_addr.s6_addr).into());
                }
                _ => {}
            }
            next = libc::CMSG_NXTHDR(header, message);
        }
    }
    found
}

/// Has a datagram leave from this address.
fn set_source(header: &mut libc::msghdr, control: &mut Control, source: IpAddr) {
    // SAFETY: these are plain C structures, for which all zeroes is a valid value.
    let (mut v4, mut v6): (libc::in_pktinfo, libc::in6_pktinfo) = unsafe { mem::zeroed() };
    let (level, kind, info, len) = match source {
        IpAddr::V4(ip) => {
            v4.ipi_spec_dst.s_addr = u32::from(ip).to_be();
            let len = size_of::<libc::in_pktinfo>();
            (
                libc::IPPROTO_IP,
                libc::IP_PKTINFO,
                (&raw const v4).cast::<u8>(),
                len,
            )
        }
        IpAddr::V6(ip) => {
            v6.ipi6_addr.s6_addr = ip.octets();
            let len = size_of::<libc::in6_pktinfo>();
            (
                libc::IPPROTO_IPV6,
                libc::IPV6_PKTINFO,
                (&raw const v6).cast::<u8>(),
                len,
            )
        }
    };
    header.msg_control = (&raw mut *control).cast();
    // SAFETY: the block is aligned for a header and has room for one with either structure behind it (40 bytes); `info` points
    // to `len` bytes.
    unsafe {
        header.msg_controllen = libc::CMSG_SPACE(len as u32) as _;
        let message = libc::CMSG_FIRSTHDR(header);
        (*message).cmsg_level = level;
        (*message).cmsg_type = kind;
        (*message).cmsg_len = libc::CMSG_LEN(len as u32) as _;
        ptr::copy_nonoverlapping(info, libc::CMSG_DATA(message), len);
    }
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
        // An IPv4 client of a dual-stack socket is known by its IPv4 address, which the kernel takes back as well.
        libc::AF_INET6 => canonical(SocketAddr::V6(SocketAddrV6::new(
            Ipv6Addr::from(raw.sin6_addr.s6_addr),
            u16::from_be(raw.sin6_port),
            raw.sin6_flowinfo,
            raw.sin6_scope_id,
        ))),
        _ => NOBODY,
    }
}

/// Room for one datagram: the largest possible one and its headroom, rounded up.
const STRIDE: usize = 1 << 16;
/// Room before each datagram for the version byte that it may be sent on with.
const HEADROOM: usize = Version::V5_1.prefix().len();
const NAME_LEN: libc::socklen_t = size_of::<libc::sockaddr_in6>() as libc::socklen_t;
const NOBODY: SocketAddr = SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0));
/// For the control messages of both families.
const CONTROL: usize = 128;
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
    fn a_client_is_answered_from_the_address_that_it_asked() {
        let server = mesh_base::listen::udp(mesh_base::listen::anywhere(0), |_| Ok(())).unwrap();
        server.set_nonblocking(true).unwrap();
        tell_destinations(&server).unwrap();
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
            while batch.recv_noting(&server, &mut routes).is_err() {
                thread::sleep(Duration::from_millis(1));
            }
            let (_, from) = batch.get(0);
            assert_eq!(
                from,
                client.local_addr().unwrap(),
                "IPv4 clients have IPv4 addresses"
            );
            let report = answer(&server, [(&b"me"[..], Some(from))], &routes);
            assert_eq!((report.sent, report.failed), (1, 0));
            assert_eq!(client.recv(&mut [0; 8]).unwrap(), 2);
            // An address that is gone does not keep it from its answer.
            routes.note(from, IpAddr::from([192, 0, 2, 1]));
            let report = answer(&server, [(&b"me"[..], Some(from))], &routes);
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
