//! Sockets that listen on every address of the machine, IPv4 and IPv6.
//!
//! A socket on `[::]` accepts both families here, whatever `net.ipv6.bindv6only` says. On a machine without IPv6 it
//! falls back to `0.0.0.0`. IPv4 peers of such a socket appear as `::ffff:a.b.c.d`;
//! [`canonical`](crate::addresses::canonical) gives their IPv4 address back.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use socket2::{Domain, Protocol, Socket, Type};

/// Every address of this machine.
pub fn anywhere(port: u16) -> SocketAddr {
    SocketAddr::from((Ipv6Addr::UNSPECIFIED, port))
}

/// A UDP socket on this address. `buffers`: bytes to ask the kernel for, which caps them.
///
/// # Errors
/// The system's.
pub fn udp(address: SocketAddr, buffers: Option<usize>) -> io::Result<std::net::UdpSocket> {
    let socket = with_fallback(address, |address| {
        let socket = open(address, Type::DGRAM, Protocol::UDP)?;
        if let Some(bytes) = buffers {
            // More is better, less still works.
            let _ = socket.set_recv_buffer_size(bytes);
            let _ = socket.set_send_buffer_size(bytes);
        }
        socket.bind(&address.into())?;
        Ok(socket)
    })?;
    Ok(socket.into())
}

/// A TCP listener on this address, not blocking, for a Tokio runtime.
///
/// # Errors
/// The system's.
#[cfg(feature = "tokio")]
pub fn tcp(address: SocketAddr) -> io::Result<tokio::net::TcpListener> {
    let socket = with_fallback(address, |address| {
        let socket = open(address, Type::STREAM, Protocol::TCP)?;
        // As std and tokio do: a restarted service gets its port back at once.
        socket.set_reuse_address(true)?;
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        Ok(socket)
    })?;
    socket.set_nonblocking(true)?;
    tokio::net::TcpListener::from_std(socket.into())
}

/// The address of any free port that can send to `peer`.
pub fn toward(peer: SocketAddr) -> SocketAddr {
    match peer {
        SocketAddr::V4(_) => SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
        SocketAddr::V6(_) => SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)),
    }
}

fn open(address: SocketAddr, kind: Type, protocol: Protocol) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), kind, Some(protocol))?;
    if is_anywhere(address) {
        socket.set_only_v6(false)?;
    }
    Ok(socket)
}

fn with_fallback<T>(
    address: SocketAddr,
    bind: impl Fn(SocketAddr) -> io::Result<T>,
) -> io::Result<T> {
    match bind(address) {
        Err(error) if is_anywhere(address) && lacks_ipv6(&error) => {
            bind(SocketAddr::from((Ipv4Addr::UNSPECIFIED, address.port())))
        }
        bound => bound,
    }
}

fn is_anywhere(address: SocketAddr) -> bool {
    address.is_ipv6() && address.ip().is_unspecified()
}

/// A kernel without IPv6 has no such sockets; one in which it is turned off has no address to bind to.
fn lacks_ipv6(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::AddrNotAvailable
        || error.kind() == io::ErrorKind::Unsupported
        || error
            .raw_os_error()
            .is_some_and(|errno| [EAFNOSUPPORT, EPROTONOSUPPORT].contains(&errno))
}

/// Connections that wait to be accepted.
#[cfg(feature = "tokio")]
const BACKLOG: i32 = 4096;

// Linux's numbers, the same on every architecture that we build for.
const EAFNOSUPPORT: i32 = 97;
const EPROTONOSUPPORT: i32 = 93;

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;
    use crate::addresses::canonical;

    #[test]
    fn a_socket_on_any_address_hears_both_families() {
        let socket = udp(anywhere(0), None).expect("a socket");
        let port = socket.local_addr().expect("an address").port();
        for host in ["127.0.0.1", "::1"] {
            let client = std::net::UdpSocket::bind((host, 0)).expect("a client");
            client.send_to(b"hello", (host, port)).expect("sent");
            let mut buffer = [0; 8];
            let (_, from) = socket.recv_from(&mut buffer).expect("received");
            assert_eq!(canonical(from), client.local_addr().expect("an address"));
            // The kernel takes the IPv4 address itself as well.
            socket.send_to(b"back", canonical(from)).expect("answered");
            client.recv(&mut buffer).expect("the answer");
        }
    }

    #[cfg(feature = "tokio")]
    #[tokio::test]
    async fn a_listener_on_any_address_accepts_both_families() {
        let listener = tcp(anywhere(0)).expect("a listener");
        let port = listener.local_addr().expect("an address").port();
        for host in ["127.0.0.1", "::1"] {
            let connect = tokio::net::TcpStream::connect((host, port));
            let (stream, accepted) = tokio::join!(connect, listener.accept());
            let own = stream.expect("connected").local_addr().expect("an address");
            assert_eq!(canonical(accepted.expect("accepted").1), own);
        }
    }

    #[test]
    fn without_ipv6_it_is_every_ipv4_address() {
        for errno in [EAFNOSUPPORT, 99] {
            let tried = RefCell::new(Vec::new());
            let bound = with_fallback(anywhere(7), |address| {
                tried.borrow_mut().push(address.to_string());
                match address.is_ipv6() {
                    true => Err(io::Error::from_raw_os_error(errno)),
                    false => Ok(()),
                }
            });
            assert!(bound.is_ok());
            assert_eq!(*tried.borrow(), ["[::]:7", "0.0.0.0:7"]);
        }
        let taken = with_fallback(anywhere(7), |_| {
            Err::<(), _>(io::Error::from(io::ErrorKind::AddrInUse))
        });
        assert_eq!(taken.expect_err("taken").kind(), io::ErrorKind::AddrInUse);
    }
}
