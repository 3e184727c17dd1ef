//! Many datagrams with one system call (`recvmmsg`, `sendmmsg`), UDP GRO and GSO, and the error queue.
//!
//! All of these calls are here, because they are unsafe. Every array that the kernel reads or writes through
//! pointers lies on the stack of the calling function, or in slices that it borrows, for the whole call.
//! Nothing is allocated.
//!
//! Not quinn-udp: its `send` takes one destination for each call, where a relay has many, and it does not read
//! the error queue.

#[cfg(feature = "tokio")]
mod error_queue;

use std::io;
use std::mem::{MaybeUninit, size_of, zeroed};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

use libc::{c_int, cmsghdr, iovec, mmsghdr, msghdr, sockaddr_storage, socklen_t};
use nix::sys::socket::{setsockopt, sockopt};
use socket2::SockAddr;

#[cfg(feature = "tokio")]
pub use error_queue::ErrorQueue;

use crate::addresses::canonical;

/// Maximum number of datagrams, or runs of them, in one system call.
pub const BATCH: usize = 64;

/// Contents of one receive buffer.
#[derive(Clone, Copy, Debug)]
pub struct Received {
    /// Address of the sender.
    pub from: SocketAddr,
    /// Local address that it was sent to, on a socket that [`tell_destinations`].
    pub to: Option<IpAddr>,
    /// Number of bytes in the buffer.
    pub len: usize,
    /// On a socket that [`receive_runs`], the length of the datagrams in the buffer, of which the last may be
    /// shorter. 0: it holds one.
    pub segment: usize,
    /// The datagram was longer than the buffer.
    pub truncated: bool,
}

/// Receives waiting datagrams into the first [`BATCH`] of `buffers`, without blocking. `received` then has
/// one entry for each buffer that was filled, in their order.
///
/// # Errors
/// [`io::ErrorKind::WouldBlock`] if nothing is there; what the socket says otherwise, such as
/// [`io::ErrorKind::ConnectionRefused`] on a connected one.
pub fn recv<'b>(
    socket: BorrowedFd<'_>,
    buffers: impl IntoIterator<Item = &'b mut [u8]>,
    received: &mut Vec<Received>,
) -> io::Result<()> {
    received.clear();
    let mut names = [const { MaybeUninit::<sockaddr_storage>::uninit() }; BATCH];
    let mut controls = [Control::EMPTY; BATCH];
    let mut vectors = EMPTY_VECTORS;
    let mut messages = empty_messages();
    let mut count = 0;
    for (index, buffer) in buffers.into_iter().take(BATCH).enumerate() {
        vectors[index] = iovec {
            iov_base: buffer.as_mut_ptr().cast(),
            iov_len: buffer.len(),
        };
        let header = &mut messages[index].msg_hdr;
        header.msg_name = names[index].as_mut_ptr().cast();
        header.msg_namelen = size_of::<sockaddr_storage>() as socklen_t;
        header.msg_iov = &raw mut vectors[index];
        header.msg_iovlen = 1;
        header.msg_control = controls[index].0.as_mut_ptr().cast();
        header.msg_controllen = size_of::<Control>() as _;
        count = index + 1;
    }
    // SAFETY: the first `count` headers point at a name, a vector, a buffer and a control block of the stated
    // lengths, all of which outlive the call and are not otherwise borrowed: each buffer is an exclusive
    // borrow for `'b`.
    let filled = check(unsafe {
        libc::recvmmsg(
            socket.as_raw_fd(),
            messages.as_mut_ptr(),
            count as _,
            libc::MSG_DONTWAIT as _,
            ptr::null_mut(),
        )
    })?;
    for (name, message) in names.iter().zip(&messages).take(filled) {
        let header = &message.msg_hdr;
        // SAFETY: the kernel wrote `msg_namelen` bytes of an address, and `sockaddr_storage` has room for
        // any.
        let from = unsafe { socket_address(name.as_ptr(), header.msg_namelen) };
        let (to, segment) = told(header);
        received.push(Received {
            from: from.unwrap_or(NOBODY),
            to,
            len: message.msg_len as usize,
            segment,
            truncated: header.msg_flags & libc::MSG_TRUNC != 0,
        });
    }
    Ok(())
}

/// A datagram to send, or a run of them.
#[derive(Clone, Copy, Debug, Default)]
pub struct Datagram<'a> {
    /// Bytes of the datagram or run.
    pub bytes: &'a [u8],
    /// Destination; `None` sends to the socket's peer.
    pub to: Option<SocketAddr>,
    /// The address of this machine that it leaves from, where the routing table is not to choose one. Without
    /// effect unless it is of the destination's family.
    pub from: Option<IpAddr>,
    /// If not 0, the bytes are a run of datagrams of this length, of which the last may be shorter (GSO).
    pub segment: u16,
}

/// Sends the first [`BATCH`] of `datagrams` without waiting. Returns how many were taken.
///
/// # Errors
/// Only if none was taken: an error concerns the first one, or one that was sent earlier
/// ([`io::ErrorKind::ConnectionRefused`]).
pub fn send<'a>(
    socket: BorrowedFd<'_>,
    datagrams: impl IntoIterator<Item = Datagram<'a>>,
) -> io::Result<usize> {
    let mut names = [const { None::<SockAddr> }; BATCH];
    let mut controls = [Control::EMPTY; BATCH];
    let mut vectors = EMPTY_VECTORS;
    let mut messages = empty_messages();
    let mut count = 0;
    for (index, datagram) in datagrams.into_iter().take(BATCH).enumerate() {
        vectors[index] = iovec {
            iov_base: datagram.bytes.as_ptr().cast_mut().cast(),
            iov_len: datagram.bytes.len(),
        };
        let header = &mut messages[index].msg_hdr;
        header.msg_iov = &raw mut vectors[index];
        header.msg_iovlen = 1;
        let mut control = ControlWriter::new(&mut controls[index]);
        if let Some(to) = datagram.to {
            let name = names[index].insert(to.into());
            header.msg_namelen = name.len();
            header.msg_name = name.as_ptr().cast_mut().cast();
            if let Some(from) = datagram.from {
                control.push_source(from, to);
            }
        }
        if datagram.segment > 0 {
            control.push(libc::SOL_UDP, libc::UDP_SEGMENT, datagram.segment);
        }
        control.finish(header);
        count = index + 1;
    }
    // SAFETY: the first `count` headers point at names, vectors, bytes and control blocks of the stated
    // lengths, all of which outlive the call: the bytes are borrowed for `'a`. The kernel only reads through
    // them.
    check(unsafe {
        libc::sendmmsg(
            socket.as_raw_fd(),
            messages.as_mut_ptr(),
            count as _,
            libc::MSG_DONTWAIT as _,
        )
    })
}

/// Asks the kernel to hand over runs of datagrams in one buffer (GRO).
///
/// # Errors
/// The system's; old kernels have no GRO.
pub fn receive_runs(socket: BorrowedFd<'_>) -> io::Result<()> {
    Ok(setsockopt(&socket, sockopt::UdpGroSegment, &true)?)
}

/// Asks the kernel to report the local address that each datagram was sent to.
///
/// # Errors
/// The system's.
pub fn tell_destinations(socket: BorrowedFd<'_>, is_ipv6: bool) -> io::Result<()> {
    if is_ipv6 {
        setsockopt(&socket, sockopt::Ipv6RecvPacketInfo, &true)?;
    }
    // A dual-stack socket reports the address of IPv4 datagrams by this option.
    Ok(setsockopt(&socket, sockopt::Ipv4PacketInfo, &true)?)
}

/// Asks the kernel to keep the ICMP errors of what this socket sends in its error queue.
///
/// # Errors
/// The system's.
pub fn report_icmp_errors(socket: BorrowedFd<'_>) -> io::Result<()> {
    // A dual-stack socket takes both options, an IPv4 socket only the first.
    let v6 = setsockopt(&socket, sockopt::Ipv6RecvErr, &true);
    Ok(setsockopt(&socket, sockopt::Ipv4RecvErr, &true).or(v6)?)
}

/// An ICMP error about a datagram that was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IcmpError {
    /// Destination of the datagram.
    pub destination: SocketAddr,
    /// The port is unreachable: the machine answers, but no process listens on the port.
    pub port_unreachable: bool,
}

/// Takes one error from the queue of a socket that [`report_icmp_errors`], without waiting.
///
/// # Errors
/// The system's.
pub fn next_icmp_error(socket: BorrowedFd<'_>) -> io::Result<Option<IcmpError>> {
    let mut name = MaybeUninit::<sockaddr_storage>::uninit();
    let mut control = Control::EMPTY;
    // SAFETY: an all-zero `msghdr` is a valid one.
    let mut header: msghdr = unsafe { zeroed() };
    header.msg_name = name.as_mut_ptr().cast();
    header.msg_namelen = size_of::<sockaddr_storage>() as socklen_t;
    header.msg_control = control.0.as_mut_ptr().cast();
    header.msg_controllen = size_of::<Control>() as _;
    // SAFETY: `header` points at a name and a control block of the stated lengths, which outlive the call.
    let result = unsafe {
        libc::recvmsg(
            socket.as_raw_fd(),
            &raw mut header,
            libc::MSG_ERRQUEUE | libc::MSG_DONTWAIT,
        )
    };
    if result < 0 {
        let error = io::Error::last_os_error();
        return match error.kind() {
            io::ErrorKind::WouldBlock => Ok(None),
            _ => Err(error),
        };
    }
    // SAFETY: the kernel wrote `msg_namelen` bytes of an address.
    let Some(destination) = (unsafe { socket_address(name.as_ptr(), header.msg_namelen) }) else {
        return Ok(None);
    };
    let errno = control_messages(&header)
        .filter(|(level, kind, _)| {
            matches!(
                (*level, *kind),
                (libc::IPPROTO_IP, libc::IP_RECVERR) | (libc::IPPROTO_IPV6, libc::IPV6_RECVERR)
            )
        })
        .find_map(|(_, _, data)| data.first_chunk().map(|errno| u32::from_ne_bytes(*errno)));
    Ok(Some(IcmpError {
        destination,
        port_unreachable: errno == Some(libc::ECONNREFUSED as u32),
    }))
}

/// Room for control messages, aligned as their headers want it.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
struct Control([u8; 128]);

impl Control {
    const EMPTY: Self = Self([0; 128]);
}

const EMPTY_VECTORS: [iovec; BATCH] = [iovec {
    iov_base: ptr::null_mut(),
    iov_len: 0,
}; BATCH];

fn empty_messages() -> [mmsghdr; BATCH] {
    // SAFETY: `mmsghdr` is made of integers and pointers, for which all-zero is a valid value.
    unsafe { zeroed() }
}

/// Level, type and data of the control messages that the kernel wrote for `header`.
fn control_messages(header: &msghdr) -> impl Iterator<Item = (c_int, c_int, &[u8])> {
    // SAFETY: `msg_control` and `msg_controllen` describe a control block that the kernel filled.
    let mut next: *const cmsghdr = unsafe { libc::CMSG_FIRSTHDR(header) };
    std::iter::from_fn(move || {
        // SAFETY: the CMSG macros return null or a header inside the block.
        let message = unsafe { next.as_ref() }?;
        // SAFETY: a header that the kernel wrote is followed by `cmsg_len` bytes, itself included.
        let data = unsafe {
            let empty = libc::CMSG_LEN(0) as usize;
            std::slice::from_raw_parts(
                libc::CMSG_DATA(message),
                (message.cmsg_len as usize).saturating_sub(empty),
            )
        };
        // SAFETY: as for CMSG_FIRSTHDR.
        next = unsafe { libc::CMSG_NXTHDR(header, message) };
        Some((message.cmsg_level, message.cmsg_type, data))
    })
}

/// By the control messages that the kernel wrote: where a datagram was sent to ([`tell_destinations`]), and
/// the length of the datagrams of a run ([`receive_runs`]), or 0.
fn told(header: &msghdr) -> (Option<IpAddr>, usize) {
    let (mut v4, mut v6, mut segment) = (None, None, 0);
    for (level, kind, data) in control_messages(header) {
        match (level, kind) {
            (libc::IPPROTO_IP, libc::IP_PKTINFO) => {
                // struct in_pktinfo: interface index, local address, address in the header (ip(7)). The local
                // address is the one that a broadcast is answered from, too.
                let local: Option<[u8; 4]> = data.get(4..8).and_then(|local| local.try_into().ok());
                v4 = local.map(IpAddr::from);
            }
            (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => {
                // struct in6_pktinfo: address, interface index (ipv6(7)).
                let local = data.first_chunk::<16>();
                v6 = local.map(|address| IpAddr::from(*address));
            }
            (libc::SOL_UDP, libc::UDP_GRO) => {
                let size = data.first_chunk().map(|size| c_int::from_ne_bytes(*size));
                segment = size.map_or(0, |size| size.max(0) as usize);
            }
            _ => {}
        }
    }
    (v4.or(v6), segment)
}

/// Writes the control messages of one header.
struct ControlWriter<'a> {
    block: &'a mut Control,
    used: usize,
}

impl<'a> ControlWriter<'a> {
    fn new(block: &'a mut Control) -> Self {
        Self { block, used: 0 }
    }

    fn push<T: Copy>(&mut self, level: c_int, kind: c_int, value: T) {
        // SAFETY: pure arithmetic.
        let (space, len) = unsafe {
            let size = size_of::<T>() as u32;
            (libc::CMSG_SPACE(size) as usize, libc::CMSG_LEN(size))
        };
        assert!(
            self.used + space <= size_of::<Control>(),
            "the block has room for both messages"
        );
        // SAFETY: the block is aligned for `cmsghdr`, and so is every multiple of CMSG_SPACE in it; header
        // and value lie in the `space` bytes that are left.
        unsafe {
            let header = self.block.0.as_mut_ptr().add(self.used).cast::<cmsghdr>();
            header.write(zeroed());
            (*header).cmsg_level = level;
            (*header).cmsg_type = kind;
            (*header).cmsg_len = len as _;
            ptr::write_unaligned(libc::CMSG_DATA(header).cast::<T>(), value);
        }
        self.used += space;
    }

    /// Has the datagram leave from `source`, which must be of the destination's family.
    fn push_source(&mut self, source: IpAddr, destination: SocketAddr) {
        match (source, destination.ip()) {
            (IpAddr::V4(source), IpAddr::V4(_)) => {
                let info = libc::in_pktinfo {
                    ipi_ifindex: 0,
                    ipi_spec_dst: libc::in_addr {
                        s_addr: u32::from(source).to_be(),
                    },
                    ipi_addr: libc::in_addr { s_addr: 0 },
                };
                self.push(libc::IPPROTO_IP, libc::IP_PKTINFO, info);
            }
            (IpAddr::V6(source), IpAddr::V6(_)) => {
                let info = libc::in6_pktinfo {
                    ipi6_addr: libc::in6_addr {
                        s6_addr: source.octets(),
                    },
                    ipi6_ifindex: 0,
                };
                self.push(libc::IPPROTO_IPV6, libc::IPV6_PKTINFO, info);
            }
            _ => {}
        }
    }

    fn finish(self, header: &mut msghdr) {
        if self.used > 0 {
            header.msg_control = self.block.0.as_mut_ptr().cast();
            header.msg_controllen = self.used as _;
        }
    }
}

/// # Safety
/// `name` points at a `sockaddr_storage` of which the first `len` bytes are initialised.
unsafe fn socket_address(name: *const sockaddr_storage, len: socklen_t) -> Option<SocketAddr> {
    let len = (len as usize).min(size_of::<sockaddr_storage>());
    // SAFETY: a `SockAddr` begins as zeros, and these become the bytes that the kernel wrote.
    let copied = unsafe {
        SockAddr::try_init(|storage, _| {
            ptr::copy_nonoverlapping(name.cast::<u8>(), storage.cast(), len);
            Ok(())
        })
    };
    // An IPv4 peer of a dual-stack socket is known by its IPv4 address, which the kernel takes back as well.
    copied.ok()?.1.as_socket().map(canonical)
}

fn check(result: c_int) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// The sender of a datagram whose address is of a family that no UDP socket has.
const NOBODY: SocketAddr = SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0));

#[cfg(test)]
mod tests;
