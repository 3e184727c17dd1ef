//! The system calls that std does not have: `recvmmsg`, `sendmmsg`, UDP GRO and GSO, and the error queue.
//!
//! All arrays that the kernel reads or writes through pointers live on the stack of the calling function, or in slices
//! that it borrows, for the whole call.

use std::io;
use std::mem::{MaybeUninit, size_of, zeroed};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr;

use libc::{
    c_int, c_void, cmsghdr, iovec, mmsghdr, msghdr, sockaddr_in, sockaddr_in6, sockaddr_storage,
    socklen_t,
};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use mesh_base::addresses::canonical;
use mesh_base::routes::Routes;

use super::{BATCH, Outgoing};

/// Bytes per receive buffer: the largest UDP payload there is, which is also the largest GRO run.
pub(super) const BUFFER: usize = 65_536;

/// One filled receive buffer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Received {
    pub(super) from: SocketAddr,
    /// The address of this machine that it was sent to, if [`enable_packet_info`] asked for that.
    pub(super) to: Option<IpAddr>,
    /// Bytes in the buffer.
    pub(super) len: usize,
    /// Length of the datagrams in it, the last may be shorter; 0: it holds one.
    pub(super) segment: usize,
    /// Part of it was lost.
    pub(super) truncated: bool,
}

/// Receives into the buffers of [`BUFFER`] bytes that `storage` is made of, without waiting.
pub(super) fn recv(
    fd: BorrowedFd<'_>,
    storage: &mut [u8],
    received: &mut Vec<Received>,
) -> io::Result<()> {
    let mut names = [const { MaybeUninit::<sockaddr_storage>::uninit() }; BATCH];
    let mut controls = [Control::EMPTY; BATCH];
    let mut vectors = [iovec {
        iov_base: ptr::null_mut(),
        iov_len: 0,
    }; BATCH];
    let mut messages = empty_messages();
    let buffers = storage.chunks_exact_mut(BUFFER).take(BATCH);
    let mut count = 0;
    for (index, buffer) in buffers.enumerate() {
        vectors[index] = iovec {
            iov_base: buffer.as_mut_ptr().cast(),
            iov_len: BUFFER,
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
    // SAFETY: the first `count` headers point at a name, a vector, a buffer and a control block of the stated lengths,
    // all of which outlive the call and are not otherwise borrowed.
    let filled = check(unsafe {
        libc::recvmmsg(
            fd.as_raw_fd(),
            messages.as_mut_ptr(),
            count as _,
            libc::MSG_DONTWAIT as _,
            ptr::null_mut(),
        )
    })?;
    for (index, message) in messages.iter().enumerate().take(filled) {
        // SAFETY: the kernel wrote `msg_namelen` bytes of an address, and `sockaddr_storage` has room for any.
        let from = unsafe { socket_address(names[index].as_ptr(), message.msg_hdr.msg_namelen) };
        let Some(from) = from else { continue };
        received.push(Received {
            from,
            to: destination(&message.msg_hdr),
            len: message.msg_len as usize,
            segment: gro_segment(&message.msg_hdr),
            truncated: message.msg_hdr.msg_flags & libc::MSG_TRUNC != 0,
        });
    }
    Ok(())
}

/// Sends datagrams from the front of `outgoing`, whose bytes are in `bytes`, without waiting; from the addresses that
/// `routes` says. Returns how many were taken; an error concerns the first.
pub(super) fn send(
    fd: BorrowedFd<'_>,
    outgoing: &[Outgoing],
    bytes: &[u8],
    gso: bool,
    routes: Option<&Routes>,
) -> io::Result<usize> {
    let mut names = [const { MaybeUninit::<sockaddr_storage>::uninit() }; BATCH];
    let mut controls = [Control::EMPTY; BATCH];
    let mut vectors = [iovec {
        iov_base: ptr::null_mut(),
        iov_len: 0,
    }; BATCH];
    let mut runs = [0; BATCH];
    let mut messages = empty_messages();
    let mut rest = outgoing;
    let mut count = 0;
    while count < BATCH && !rest.is_empty() {
        let run = if gso { run_length(rest) } else { 1 };
        let first = &rest[0];
        // The datagrams of a run lie next to each other in `bytes`, so one vector spans them all.
        let span = &bytes[first.range.start..rest[run - 1].range.end];
        vectors[count] = iovec {
            iov_base: span.as_ptr().cast_mut().cast(),
            iov_len: span.len(),
        };
        let header = &mut messages[count].msg_hdr;
        header.msg_namelen = write_address(first.destination, &mut names[count]);
        header.msg_name = names[count].as_mut_ptr().cast();
        header.msg_iov = &raw mut vectors[count];
        header.msg_iovlen = 1;
        let mut control = ControlWriter::new(&mut controls[count]);
        if run > 1 {
            // A run has at most MAX_RUN_SEGMENT bytes per datagram.
            control.push(libc::SOL_UDP, libc::UDP_SEGMENT, first.range.len() as u16);
        }
        if let Some(source) = routes.and_then(|routes| routes.get(first.destination)) {
            control.push_source(source, first.destination);
        }
        control.finish(header);
        runs[count] = run;
        count += 1;
        rest = &rest[run..];
    }
    // SAFETY: the first `count` headers point at names, vectors and control blocks of the stated lengths, all of which
    // outlive the call; the kernel only reads through them.
    let taken = check(unsafe {
        libc::sendmmsg(
            fd.as_raw_fd(),
            messages.as_mut_ptr(),
            count as _,
            libc::MSG_DONTWAIT as _,
        )
    })?;
    Ok(runs[..taken].iter().sum())
}

/// Whether the first datagrams form a run that GSO would send as one.
pub(super) fn begins_run(outgoing: &[Outgoing]) -> bool {
    !outgoing.is_empty() && run_length(outgoing) > 1
}

/// How many datagrams from the front go to one destination with the same length; the last may be shorter.
fn run_length(outgoing: &[Outgoing]) -> usize {
    let first = &outgoing[0];
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

/// Asks the kernel to hand over runs of datagrams in one buffer.
pub(super) fn enable_gro(fd: BorrowedFd<'_>) -> io::Result<()> {
    set_option(fd, libc::SOL_UDP, libc::UDP_GRO)
}

/// Asks the kernel to say to which address of this machine each datagram was sent.
pub(super) fn enable_packet_info(fd: BorrowedFd<'_>, is_ipv6: bool) -> io::Result<()> {
    if is_ipv6 {
        set_option(fd, libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO)?;
    }
    // A dual-stack socket says it for IPv4 datagrams this way.
    set_option(fd, libc::IPPROTO_IP, libc::IP_PKTINFO)
}

/// Asks the kernel to keep the ICMP errors of what this socket sends in its error queue.
pub(crate) fn report_icmp_errors(fd: BorrowedFd<'_>) -> io::Result<()> {
    // A dual-stack socket takes both options, an IPv4 socket only the first.
    let v6 = set_option(fd, libc::IPPROTO_IPV6, libc::IPV6_RECVERR);
    set_option(fd, libc::IPPROTO_IP, libc::IP_RECVERR).or(v6)
}

/// An ICMP error about a datagram that was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct IcmpError {
    /// Where the datagram was going.
    pub(crate) destination: SocketAddr,
    /// Nobody listens on the port: the machine is there, the process is not.
    pub(crate) port_unreachable: bool,
}

/// The error queue of a socket that [`report_icmp_errors`], to wait on.
pub(crate) struct ErrorQueue {
    fd: AsyncFd<OwnedFd>,
}

impl ErrorQueue {
    /// Takes a second descriptor of the socket. Must be called on a tokio runtime.
    pub(crate) fn new(fd: OwnedFd) -> io::Result<Self> {
        // SAFETY: an `OwnedFd` is an open descriptor, always the same one, until it is dropped with the `AsyncFd`.
        let fd = unsafe { AsyncFd::register_with_interest(fd, Interest::ERROR) }?;
        Ok(Self { fd })
    }

    /// Waits for the next error.
    pub(crate) async fn next(&self) -> io::Result<IcmpError> {
        let take = |fd: &OwnedFd| {
            next_icmp_error(fd.as_fd())?.ok_or_else(|| io::ErrorKind::WouldBlock.into())
        };
        self.fd.async_io(Interest::ERROR, take).await
    }
}

/// Takes one error from the queue, without waiting.
pub(crate) fn next_icmp_error(fd: BorrowedFd<'_>) -> io::Result<Option<IcmpError>> {
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
            fd.as_raw_fd(),
            &raw mut header,
            libc::MSG_ERRQUEUE | libc::MSG_DONTWAIT,
        )
    };
    if result < 0 {
        let error = io::Error::last_os_error();
        return if error.kind() == io::ErrorKind::WouldBlock {
            Ok(None)
        } else {
            Err(error)
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

fn set_option(fd: BorrowedFd<'_>, level: c_int, option: c_int) -> io::Result<()> {
    let on: c_int = 1;
    // SAFETY: the option's value is a `c_int`, which outlives the call.
    let result = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            level,
            option,
            (&raw const on).cast::<c_void>(),
            size_of::<c_int>() as socklen_t,
        )
    };
    check(result).map(drop)
}

/// Room for control messages, aligned as their headers want it.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
struct Control([u8; 128]);

impl Control {
    const EMPTY: Self = Self([0; 128]);
}

fn empty_messages() -> [mmsghdr; BATCH] {
    // SAFETY: `mmsghdr` is made of integers and pointers, for which all-zero is a valid value.
    unsafe { zeroed() }
}

fn gro_segment(header: &msghdr) -> usize {
    control_messages(header)
        .filter(|(level, kind, _)| (*level, *kind) == (libc::SOL_UDP, libc::UDP_GRO))
        .find_map(|(_, _, data)| data.first_chunk().map(|size| c_int::from_ne_bytes(*size)))
        .and_then(|size| usize::try_from(size).ok())
        .unwrap_or(0)
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

/// The destination of a datagram, by the control messages of [`enable_packet_info`].
fn destination(header: &msghdr) -> Option<IpAddr> {
    let mut found = None;
    for (level, kind, data) in control_messages(header) {
        match (level, kind) {
            (libc::IPPROTO_IP, libc::IP_PKTINFO) => {
                // struct in_pktinfo: interface index, local address, address in the header (ip(7)).
                let local: Option<[u8; 4]> = data.get(4..8).and_then(|local| local.try_into().ok());
                if let Some(local) = local {
                    // It is the address that a broadcast is answered from, too.
                    return Some(IpAddr::from(local));
                }
            }
            (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => {
                // struct in6_pktinfo: address, interface index (ipv6(7)).
                found = data
                    .first_chunk::<16>()
                    .map(|address| IpAddr::from(*address));
            }
            _ => {}
        }
    }
    found
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
        // SAFETY: the block is aligned for `cmsghdr`, and so is every multiple of CMSG_SPACE in it; header and value lie in
        // the `space` bytes that are left.
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
    let len = len as usize;
    if len < size_of::<libc::sa_family_t>() {
        return None;
    }
    // SAFETY: the family is the first field of every address, and it is initialised.
    let family = unsafe { (*name).ss_family };
    match c_int::from(family) {
        libc::AF_INET if len >= size_of::<sockaddr_in>() => {
            // SAFETY: the family says that this is a `sockaddr_in`, and it is whole.
            let v4 = unsafe { &*name.cast::<sockaddr_in>() };
            let ip = Ipv4Addr::from(u32::from_be(v4.sin_addr.s_addr));
            Some(SocketAddrV4::new(ip, u16::from_be(v4.sin_port)).into())
        }
        libc::AF_INET6 if len >= size_of::<sockaddr_in6>() => {
            // SAFETY: the family says that this is a `sockaddr_in6`, and it is whole.
            let v6 = unsafe { &*name.cast::<sockaddr_in6>() };
            let ip = Ipv6Addr::from(v6.sin6_addr.s6_addr);
            let address = SocketAddrV6::new(
                ip,
                u16::from_be(v6.sin6_port),
                v6.sin6_flowinfo,
                v6.sin6_scope_id,
            );
            // An IPv4 peer of a dual-stack socket is known by its IPv4 address, which the kernel takes back as well.
            Some(canonical(address.into()))
        }
        _ => None,
    }
}

/// Writes an address where the kernel reads it; returns its length.
fn write_address(address: SocketAddr, name: &mut MaybeUninit<sockaddr_storage>) -> socklen_t {
    match address {
        SocketAddr::V4(v4) => {
            let raw = sockaddr_in {
                sin_family: libc::AF_INET as libc::sa_family_t,
                sin_port: v4.port().to_be(),
                sin_addr: libc::in_addr {
                    s_addr: u32::from(*v4.ip()).to_be(),
                },
                sin_zero: [0; 8],
            };
            // SAFETY: `sockaddr_storage` is aligned and large enough for every address.
            unsafe { name.as_mut_ptr().cast::<sockaddr_in>().write(raw) };
            size_of::<sockaddr_in>() as socklen_t
        }
        SocketAddr::V6(v6) => {
            let raw = sockaddr_in6 {
                sin6_family: libc::AF_INET6 as libc::sa_family_t,
                sin6_port: v6.port().to_be(),
                sin6_flowinfo: v6.flowinfo(),
                sin6_addr: libc::in6_addr {
                    s6_addr: v6.ip().octets(),
                },
                sin6_scope_id: v6.scope_id(),
            };
            // SAFETY: as above.
            unsafe { name.as_mut_ptr().cast::<sockaddr_in6>().write(raw) };
            size_of::<sockaddr_in6>() as socklen_t
        }
    }
}

fn check(result: c_int) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Longest datagram in a run: what an Ethernet frame carries without fragments, because the kernel refuses to segment
/// beyond the MTU.
const MAX_RUN_SEGMENT: usize = 1400;

/// Most datagrams in a run (the kernel's `UDP_MAX_SEGMENTS`).
const MAX_RUN: usize = 64;

/// Most bytes in a run.
const MAX_RUN_BYTES: usize = 65_000;
