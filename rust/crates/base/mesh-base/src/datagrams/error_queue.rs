//! Waiting for ICMP errors.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::{IcmpError, next_icmp_error};

/// The error queue of a socket that [`report_icmp_errors`](super::report_icmp_errors), to wait on.
pub struct ErrorQueue {
    fd: AsyncFd<OwnedFd>,
}

impl ErrorQueue {
    /// Takes a second descriptor of the socket. Must be called on a tokio runtime.
    ///
    /// # Errors
    /// The system's.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        // SAFETY: an `OwnedFd` is an open descriptor, always the same one, until it is dropped with the
        // `AsyncFd`.
        let fd = unsafe { AsyncFd::register_with_interest(fd, Interest::ERROR) }?;
        Ok(Self { fd })
    }

    /// Waits for the next error.
    ///
    /// # Errors
    /// The system's.
    pub async fn next(&self) -> io::Result<IcmpError> {
        let take = |fd: &OwnedFd| {
            next_icmp_error(fd.as_fd())?.ok_or_else(|| io::ErrorKind::WouldBlock.into())
        };
        self.fd.async_io(Interest::ERROR, take).await
    }
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::time::Duration;

    use super::*;
    use crate::datagrams::report_icmp_errors;

    #[tokio::test]
    async fn an_error_queue_is_waited_on() {
        let socket = UdpSocket::bind("127.0.0.1:0").expect("bound");
        report_icmp_errors(socket.as_fd()).expect("Linux has it");
        let twin = socket.try_clone().expect("cloned");
        let queue = ErrorQueue::new(twin.into()).expect("registered");
        let closed = {
            let taken = UdpSocket::bind("127.0.0.1:0").expect("bound");
            taken.local_addr().expect("an address")
        };
        socket.send_to(b"x", closed).expect("sent");
        let error = tokio::time::timeout(Duration::from_secs(5), queue.next()).await;
        assert_eq!(
            error.expect("in time").expect("readable").destination,
            closed
        );
    }
}
