use std::net::UdpSocket as StdSocket;

use futures::FutureExt as _;

use super::*;

const LOOPBACK: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 0);

/// Receives until `count` datagrams have arrived; their order is kept.
async fn receive(socket: &BatchSocket, count: usize) -> Vec<(SocketAddr, Vec<u8>)> {
    let mut batch = RecvBatch::new();
    let mut all = Vec::new();
    while all.len() < count {
        let received =
            tokio::time::timeout(std::time::Duration::from_secs(5), socket.recv(&mut batch));
        received.await.expect("datagrams arrive").expect("received");
        all.extend(
            batch
                .datagrams()
                .map(|datagram| (datagram.from, datagram.data.to_vec())),
        );
    }
    all
}

#[tokio::test]
async fn a_batch_reaches_many_destinations_whole_and_in_order() {
    let sender = BatchSocket::bind(LOOPBACK).expect("bind");
    let receivers: Vec<_> = (0..5)
        .map(|_| BatchSocket::bind(LOOPBACK).expect("bind"))
        .collect();
    let mut batch = SendBatch::new();
    let payload = |index: usize| vec![index as u8; 1 + index * 7];
    for index in 0..200 {
        let (head, tail) = (payload(index), [1, 2, 3]);
        batch.push_parts(receivers[index % 5].local_addr(), &[&head, &tail]);
    }
    assert_eq!(batch.len(), 200);
    assert_eq!(sender.send(&mut batch).await.expect("sent"), 200);
    assert!(batch.is_empty());
    for (number, receiver) in receivers.iter().enumerate() {
        let expected: Vec<_> = (0..40)
            .map(|round| [payload(round * 5 + number), vec![1, 2, 3]].concat())
            .map(|data| (sender.local_addr(), data))
            .collect();
        assert_eq!(receive(receiver, 40).await, expected);
    }
}

#[tokio::test]
async fn runs_of_equal_length_keep_their_boundaries() {
    let (sender, receiver) = (
        BatchSocket::bind(LOOPBACK).expect("bind"),
        BatchSocket::bind(LOOPBACK).expect("bind"),
    );
    let mut batch = SendBatch::new();
    // Runs that end in a shorter one, a longer one, an empty one, and a run longer than GSO takes.
    let lengths: Vec<usize> = [
        vec![100; 10],
        vec![60],
        vec![100; 3],
        vec![200; 2],
        vec![0],
        vec![1; 150],
    ]
    .concat();
    for (index, &len) in lengths.iter().enumerate() {
        batch.push(receiver.local_addr(), &vec![index as u8; len]);
    }
    sender.send(&mut batch).await.expect("sent");
    let received = receive(&receiver, lengths.len()).await;
    for (index, (_, data)) in received.iter().enumerate() {
        assert_eq!(*data, vec![index as u8; lengths[index]], "datagram {index}");
    }
}

#[tokio::test]
async fn plain_sockets_get_single_datagrams() {
    let sender = BatchSocket::bind(LOOPBACK).expect("bind");
    let plain = StdSocket::bind(LOOPBACK).expect("bind");
    let mut batch = SendBatch::new();
    for index in 0..20u8 {
        batch.push(plain.local_addr().expect("address"), &[index; 50]);
    }
    sender.send(&mut batch).await.expect("sent");
    plain
        .set_read_timeout(Some(std::time::Duration::from_secs(5)))
        .expect("timeout");
    for index in 0..20u8 {
        let mut buffer = [0; 1000];
        let (len, _) = plain.recv_from(&mut buffer).expect("received");
        assert_eq!(buffer[..len], [index; 50]);
    }
}

#[tokio::test]
async fn the_largest_datagram_passes_and_a_larger_one_is_skipped() {
    let (sender, receiver) = (
        BatchSocket::bind(LOOPBACK).expect("bind"),
        BatchSocket::bind(LOOPBACK).expect("bind"),
    );
    let mut batch = SendBatch::new();
    batch.push(receiver.local_addr(), &vec![1; dcf::MAX_DATAGRAM + 1]);
    batch.push(receiver.local_addr(), &vec![2; dcf::MAX_DATAGRAM]);
    assert_eq!(sender.send(&mut batch).await.expect("sent"), 1);
    assert_eq!(receive(&receiver, 1).await[0].1, vec![2; dcf::MAX_DATAGRAM]);
}

#[tokio::test]
async fn a_closed_port_disturbs_nobody() {
    let sender = BatchSocket::bind(LOOPBACK).expect("bind");
    let receiver = BatchSocket::bind(LOOPBACK).expect("bind");
    let closed = StdSocket::bind(LOOPBACK)
        .expect("bind")
        .local_addr()
        .expect("address");
    for _ in 0..10 {
        let mut batch = SendBatch::new();
        batch.push(closed, b"nobody");
        batch.push(receiver.local_addr(), b"somebody");
        sender.send(&mut batch).await.expect("sent");
        assert_eq!(receive(&receiver, 1).await[0].1, b"somebody");
    }
    sender
        .send_to(b"one", receiver.local_addr())
        .await
        .expect("sent");
    assert_eq!(receive(&receiver, 1).await[0].1, b"one");
    let mut batch = RecvBatch::new();
    let received = sender.recv(&mut batch).now_or_never();
    assert!(received.is_none(), "nothing there");
}

#[tokio::test]
async fn ipv6_works_and_a_taken_port_is_named() {
    let local = "[::1]:0".parse().expect("an address");
    let (Ok(sender), Ok(receiver)) = (BatchSocket::bind(local), BatchSocket::bind(local)) else {
        return; // no IPv6 on this machine
    };
    let mut batch = SendBatch::new();
    batch.push(receiver.local_addr(), b"six");
    sender.send(&mut batch).await.expect("sent");
    assert_eq!(
        receive(&receiver, 1).await,
        [(sender.local_addr(), b"six".to_vec())]
    );
    let error = BatchSocket::bind(receiver.local_addr())
        .expect_err("taken")
        .to_string();
    assert!(
        error.contains(&receiver.local_addr().to_string()),
        "{error}"
    );
}

#[tokio::test]
async fn a_peer_is_answered_from_the_address_that_it_asked() {
    let server = BatchSocket::bind(mesh_base::listen::anywhere(0)).expect("bind");
    let port = server.local_addr().port();
    let mut batch = SendBatch::new();
    for (client, asked) in [
        ("127.0.0.1:0", "127.0.0.9"),
        ("127.0.0.1:0", "127.0.0.1"),
        ("[::1]:0", "::1"),
    ] {
        let client = StdSocket::bind(client).expect("bind");
        let patience = std::time::Duration::from_secs(5);
        client.set_read_timeout(Some(patience)).expect("set");
        // It takes answers from there alone.
        client.connect((asked, port)).expect("connected");
        client.send(b"who?").expect("sent");
        let (from, _) = receive(&server, 1).await.remove(0);
        assert_eq!(
            from,
            client.local_addr().expect("bound"),
            "IPv4 peers have IPv4 addresses"
        );
        // A run of equal datagrams carries both control messages.
        for _ in 0..3 {
            batch.push(from, b"me");
        }
        server.send(&mut batch).await.expect("sent");
        server.send_to(b"and me", from).await.expect("sent");
        let mut buffer = [0; 16];
        let mut bytes = 0;
        while bytes < 12 {
            bytes += client.recv(&mut buffer).expect("an answer");
        }
    }
}

#[tokio::test]
async fn an_address_that_is_gone_does_not_keep_a_peer_from_its_answer() {
    let server = BatchSocket::bind(mesh_base::listen::anywhere(0)).expect("bind");
    let client = BatchSocket::bind(LOOPBACK).expect("bind");
    let peer = client.local_addr();
    let gone = std::net::IpAddr::from([192, 0, 2, 1]);
    for batched in [true, false] {
        server.routes().expect("routes").note(peer, gone);
        if batched {
            let mut batch = SendBatch::new();
            batch.push(peer, b"here");
            assert_eq!(server.send(&mut batch).await.expect("sent"), 1);
        } else {
            server.send_to(b"here", peer).await.expect("sent");
        }
        assert_eq!(receive(&client, 1).await[0].1, b"here");
    }
}
