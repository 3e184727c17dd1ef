use std::net::UdpSocket;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use super::*;

const LOOPBACK: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

fn bound(address: impl std::net::ToSocketAddrs) -> UdpSocket {
    UdpSocket::bind(address).expect("bound")
}

fn address(socket: &UdpSocket) -> SocketAddr {
    socket.local_addr().expect("bound")
}

fn to(bytes: &[u8], to: SocketAddr) -> Datagram<'_> {
    Datagram {
        bytes,
        to: Some(to),
        ..Datagram::default()
    }
}

/// Receives into buffers of `size` bytes until `count` of them are filled.
fn receive(socket: &UdpSocket, size: usize, count: usize) -> Vec<(Received, Vec<u8>)> {
    let mut storage = vec![0; BATCH * size];
    let (mut received, mut all) = (Vec::new(), Vec::new());
    let deadline = Instant::now() + Duration::from_secs(5);
    while all.len() < count {
        assert!(Instant::now() < deadline, "only {} arrived", all.len());
        match recv(
            socket.as_fd(),
            storage.chunks_exact_mut(size),
            &mut received,
        ) {
            Ok(()) => all.extend(
                received
                    .iter()
                    .zip(storage.chunks_exact(size))
                    .map(|(received, buffer)| (*received, buffer[..received.len].to_vec())),
            ),
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
        }
    }
    all
}

#[test]
fn datagrams_of_every_size_arrive_in_order_with_their_sender() {
    for ip in ["127.0.0.1:0", "[::1]:0"] {
        let (a, b) = (bound(ip), bound(ip));
        let bytes: Vec<Vec<u8>> = (0..BATCH + 9).map(|n| vec![n as u8; 3 * n]).collect();
        let datagrams = || bytes.iter().map(|bytes| to(bytes, address(&b)));
        let sent = send(a.as_fd(), datagrams()).expect("sent");
        assert_eq!(sent, BATCH, "a batch at a time");
        let sent = send(a.as_fd(), datagrams().skip(BATCH)).expect("sent");
        assert_eq!(sent, 9);
        let received = receive(&b, 1 << 16, bytes.len());
        for ((received, data), sent) in received.iter().zip(&bytes) {
            assert_eq!(data, sent);
            assert_eq!(received.from, address(&a));
            assert_eq!((received.to, received.segment), (None, 0));
            assert!(!received.truncated);
        }
    }
}

#[test]
fn nothing_to_receive_or_to_send_is_no_wait() {
    let socket = bound(LOOPBACK);
    let mut received = Vec::new();
    let mut buffer = [0; 9];
    let error = recv(socket.as_fd(), [&mut buffer[..]], &mut received).expect_err("nothing");
    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    assert_eq!(send(socket.as_fd(), []).expect("none"), 0);
}

#[test]
fn what_does_not_fit_a_buffer_is_marked() {
    let (a, b) = (bound(LOOPBACK), bound(LOOPBACK));
    send(
        a.as_fd(),
        [to(&[7; 100], address(&b)), to(&[8; 50], address(&b))],
    )
    .expect("sent");
    let received = receive(&b, 50, 2);
    assert_eq!(received[0].1, [7; 50]);
    assert_eq!(received[1].1, [8; 50]);
    let marks: Vec<bool> = received.iter().map(|(one, _)| one.truncated).collect();
    assert_eq!(marks, [true, false]);
}

#[test]
fn an_error_concerns_the_first_datagram_alone() {
    let (a, b) = (bound(LOOPBACK), bound(LOOPBACK));
    let too_long = vec![0; 65_508];
    let datagrams = [
        to(b"one", address(&b)),
        to(&too_long, address(&b)),
        to(b"two", address(&b)),
    ];
    assert_eq!(send(a.as_fd(), datagrams).expect("the first"), 1);
    let error = send(a.as_fd(), datagrams[1..].iter().copied()).expect_err("too long");
    assert_eq!(error.raw_os_error(), Some(libc::EMSGSIZE));
    assert_eq!(
        send(a.as_fd(), datagrams[2..].iter().copied()).expect("the last"),
        1
    );
    let data: Vec<_> = receive(&b, 100, 2)
        .into_iter()
        .map(|(_, data)| data)
        .collect();
    assert_eq!(data, [b"one", b"two"]);
}

#[test]
fn a_connected_socket_sends_to_its_peer() {
    let (a, b) = (bound(LOOPBACK), bound(LOOPBACK));
    a.connect(address(&b)).expect("connected");
    let datagram = Datagram {
        bytes: b"hello",
        ..Datagram::default()
    };
    assert_eq!(send(a.as_fd(), [datagram]).expect("sent"), 1);
    assert_eq!(receive(&b, 100, 1)[0].1, b"hello");
}

#[test]
fn a_run_is_cut_into_its_datagrams_or_arrives_as_a_run() {
    let (a, plain, runs) = (bound(LOOPBACK), bound(LOOPBACK), bound(LOOPBACK));
    if receive_runs(runs.as_fd()).is_err() {
        return; // an old kernel
    }
    let bytes: Vec<u8> = (0..250).collect();
    let run = |to| Datagram {
        bytes: &bytes,
        to: Some(to),
        from: None,
        segment: 100,
    };
    send(a.as_fd(), [run(address(&plain)), run(address(&runs))]).expect("sent");
    let cut: Vec<Vec<u8>> = receive(&plain, 1000, 3)
        .into_iter()
        .map(|(_, data)| data)
        .collect();
    assert_eq!(cut, [&bytes[..100], &bytes[100..200], &bytes[200..]]);
    let mut whole = Vec::new();
    while whole.len() < bytes.len() {
        let (received, data) = receive(&runs, 1000, 1).remove(0);
        assert!(data.len() <= 100 || received.segment == 100, "{received:?}");
        whole.extend(data);
    }
    assert_eq!(whole, bytes);
}

#[test]
fn destinations_are_told_and_chosen_as_senders() {
    let server = crate::listen::udp(crate::listen::anywhere(0), None).expect("bound");
    let port = address(&server).port();
    tell_destinations(server.as_fd(), address(&server).is_ipv6()).expect("set");
    for (client, asked) in [("127.0.0.1:0", "127.0.0.9"), ("[::1]:0", "::1")] {
        let asked: IpAddr = asked.parse().expect("an address");
        let Ok(client) = UdpSocket::bind(client) else {
            continue; // no IPv6 on this machine
        };
        client
            .set_read_timeout(Some(Duration::from_secs(5)))
            .expect("set");
        // It takes answers from there alone.
        client.connect((asked, port)).expect("connected");
        client.send(b"who?").expect("sent");
        let (question, _) = receive(&server, 100, 1).remove(0);
        assert_eq!(
            question.from,
            address(&client),
            "IPv4 peers have IPv4 addresses"
        );
        assert_eq!(question.to.map(|to| to.to_canonical()), Some(asked));
        // Both control messages fit.
        let answer = Datagram {
            bytes: b"meme",
            to: Some(question.from),
            from: Some(asked),
            segment: 2,
        };
        send(server.as_fd(), [answer]).expect("sent");
        assert_eq!(client.recv(&mut [0; 9]).expect("an answer"), 2);
        // An address of another machine is refused, one of another family passed over.
        let elsewhere = match asked {
            IpAddr::V4(_) => IpAddr::from([192, 0, 2, 1]),
            IpAddr::V6(_) => IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, 1]),
        };
        let refused = Datagram {
            from: Some(elsewhere),
            ..answer
        };
        send(server.as_fd(), [refused]).expect_err("not ours");
        let other_family = match asked {
            IpAddr::V4(_) => IpAddr::from([0; 16]),
            IpAddr::V6(_) => IpAddr::from([127, 0, 0, 1]),
        };
        let passed_over = Datagram {
            from: Some(other_family),
            ..answer
        };
        assert_eq!(send(server.as_fd(), [passed_over]).expect("sent"), 1);
    }
}

#[test]
fn storms_of_unreachable_ports_are_reported_with_their_destination() {
    let socket = bound(LOOPBACK);
    report_icmp_errors(socket.as_fd()).expect("Linux has it");
    let closed = address(&bound(LOOPBACK));
    assert_eq!(next_icmp_error(socket.as_fd()).expect("empty"), None);
    socket.send_to(b"x", closed).expect("sent");
    let deadline = Instant::now() + Duration::from_secs(5);
    let error = loop {
        if let Some(error) = next_icmp_error(socket.as_fd()).expect("readable") {
            break error;
        }
        assert!(Instant::now() < deadline, "no ICMP error");
        std::thread::sleep(Duration::from_millis(5));
    };
    let expected = IcmpError {
        destination: closed,
        port_unreachable: true,
    };
    assert_eq!(error, expected);
}
