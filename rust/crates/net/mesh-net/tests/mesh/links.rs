//! Links between nodes: streams of messages, limits, ends, keys.

use std::time::{Duration, Instant};

use crate::common::{LOOPBACK, TestHead};
use bytes::Bytes;
use dcf::{ErrorCode, Message, MsgType, StreamError};
use mesh_net::quic::{Closed, Connector, Link, LinkConfig, NamedGroup, StreamFailure, probe};
use mesh_net::seal::{OpenError, Opener, Sealer};
use mesh_net::trust::Role;

async fn pair() -> (TestHead, Link, Link) {
    let head = TestHead::start("attic");
    let worker = head.worker("laptop").await;
    let (near, far) = head.link(&worker, LinkConfig::default()).await;
    (head, near, far)
}

fn message(len: usize) -> Message {
    let payload: Vec<u8> = (0..len).map(|at| (at * 31 + at / 251) as u8).collect();
    Message::new(MsgType::TOKENS, len as u32, 7, payload)
}

#[tokio::test]
async fn the_key_exchange_is_hybrid_post_quantum_on_both_sides() {
    let (_head, near, far) = pair().await;
    assert_eq!(near.handshake_group(), Some(NamedGroup::X25519MLKEM768));
    assert_eq!(far.handshake_group(), Some(NamedGroup::X25519MLKEM768));
}

#[tokio::test]
async fn messages_of_any_size_arrive_whole_and_in_order() {
    let (_head, near, far) = pair().await;
    let sizes = [0, 1, 17, 1200, 1201, 65_535, 1 << 20, 10_000_000, 0, 3];
    let echo = tokio::spawn(async move {
        let mut stream = far.accept().await.expect("accepts");
        while let Some(message) = stream.recv().await.expect("receives") {
            stream.send(message).await.expect("echoes");
        }
        stream.finish().expect("finishes");
        far
    });
    let (mut send, mut recv) = near.open().await.expect("opens").split();
    let sender = tokio::spawn(async move {
        for size in sizes {
            send.send(message(size)).await.expect("sends");
        }
        send.finish().expect("finishes");
        send
    });
    for size in sizes {
        assert!(
            recv.recv().await.expect("receives") == Some(message(size)),
            "message of {size} bytes"
        );
    }
    assert_eq!(recv.recv().await.expect("clean end"), None);
    sender.await.expect("sender");
    echo.await.expect("echo");
}

#[tokio::test]
async fn a_links_bandwidth_is_measured_and_a_peer_that_sends_on_is_stopped() {
    let (_head, near, far) = pair().await;
    let answering = tokio::spawn(async move {
        let mut answers = Vec::new();
        for _ in 0..4 {
            let mut stream = far.accept().await.expect("accepts");
            let first = stream.recv().await.expect("receives").expect("a message");
            answers.push(probe::answer(&first, stream).await);
        }
        (far, answers)
    });
    let bandwidth = probe::bandwidth(&near).await.expect("measured");
    assert!(
        (1e5..1e11).contains(&bandwidth),
        "{bandwidth} bytes a second"
    );

    for len in [0, 64 << 10] {
        let mut endless = near.open().await.expect("opens");
        let probes = async {
            let probe = || Message::new(MsgType::PROBE, 0, 0, vec![0; len]);
            while endless.send(probe()).await.is_ok() {}
        };
        tokio::time::timeout(Duration::from_secs(5), probes)
            .await
            .expect("stopped in time");
    }
    let (_far, answers) = answering.await.expect("answers");
    assert!(
        matches!(answers[..], [Ok(()), Ok(()), Err(_), Err(_)]),
        "{answers:?}"
    );
}

#[tokio::test]
async fn an_oversized_message_is_refused_by_the_sender_and_closes_the_receivers_stream() {
    let head = TestHead::start("attic");
    let worker = head.worker("laptop").await;
    let small = LinkConfig {
        max_message: 1000,
        ..LinkConfig::default()
    };
    // The head's limit is the default: it may send what this worker does not take.
    let (near, far) = head.link(&worker, small).await;

    let mut stream = near.open().await.expect("opens");
    let error = stream
        .send(message(1001))
        .await
        .expect_err("over our own limit");
    assert!(
        matches!(
            error,
            StreamFailure::Codec(StreamError::TooLarge {
                len: 1001,
                limit: 1000,
                ..
            })
        ),
        "{error:?}"
    );
    assert!(matches!(
        stream.send(message(1)).await,
        Err(StreamFailure::Finished)
    ));

    let mut theirs = far.open().await.expect("opens");
    theirs.send(message(1000)).await.expect("within the limit");
    theirs
        .send(message(1001))
        .await
        .expect("within the head's limit");
    let mut incoming = near.accept().await.expect("accepts");
    assert_eq!(
        incoming.recv().await.expect("within the limit"),
        Some(message(1000))
    );
    let error = incoming
        .recv()
        .await
        .expect_err("over the limit")
        .to_string();
    assert!(
        error.contains("1001 bytes") && error.contains("limit is 1000"),
        "{error}"
    );
    assert!(incoming.recv().await.expect("final").is_none());
    let stopped = tokio::time::timeout(Duration::from_secs(5), async {
        while theirs.send(message(500)).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    stopped
        .await
        .expect("the sender learns that the stream is closed");
    assert_eq!(near.close_reason(), None, "the link goes on");
}

#[tokio::test]
async fn a_cancelled_stream_is_no_finished_one() {
    let (_head, near, far) = pair().await;
    let mut stream = near.open().await.expect("opens");
    stream.send(message(10)).await.expect("sends");
    let mut theirs = far.accept().await.expect("accepts");
    assert!(theirs.recv().await.expect("receives").is_some());
    drop(stream);
    let error = theirs.recv().await.expect_err("cancelled");
    assert!(
        matches!(error, StreamFailure::Cancelled(ErrorCode::CANCELLED)),
        "{error:?}"
    );

    let mut stream = near.open().await.expect("opens");
    stream.send(message(10)).await.expect("sends");
    let (send, _recv) = far.accept().await.expect("accepts").split();
    let stopped = send.stopped();
    stream.reset(ErrorCode::TIMEOUT);
    assert_eq!(stopped.await, Some(ErrorCode::TIMEOUT));
}

#[tokio::test]
async fn a_reader_that_waits_holds_the_sender_back() {
    let head = TestHead::start("attic");
    let worker = head.worker("laptop").await;
    let (near, far) = head.link(&worker, LinkConfig::default()).await;
    let mut stream = far.open().await.expect("opens");
    let mut sent = 0;
    let chunk = message(1 << 20);
    while tokio::time::timeout(Duration::from_millis(300), stream.send(chunk.clone()))
        .await
        .is_ok()
    {
        sent += 1;
        assert!(sent < 100, "nobody reads, and everything is taken");
    }
    // What was cut off above continues with the next send.
    let mut incoming = near.accept().await.expect("accepts");
    let reader = tokio::spawn(async move {
        let mut count = 0;
        while let Some(message) = incoming.recv().await.expect("receives") {
            assert_eq!(message.payload.len(), 1 << 20);
            count += 1;
        }
        count
    });
    stream.send(chunk).await.expect("sends again");
    stream.finish().expect("finishes");
    assert_eq!(reader.await.expect("reader"), sent + 2);
}

#[tokio::test]
async fn a_closed_link_tells_the_other_side_why() {
    let (_head, near, far) = pair().await;
    far.close(ErrorCode::DRAINING, "head restarts");
    let reason = near.closed().await;
    assert_eq!(
        reason,
        Closed::ByPeer {
            code: ErrorCode::DRAINING,
            text: "head restarts".into()
        }
    );
    assert_eq!(near.close_reason(), Some(reason));
    assert!(matches!(
        near.open().await,
        Err(StreamFailure::Link(Closed::ByPeer { .. }))
    ));
    assert_eq!(far.closed().await, Closed::ByUs);
}

#[tokio::test]
async fn bytes_that_are_no_messages_end_the_stream_only() {
    let (_head, near, far) = pair().await;
    let mut stream = near.open().await.expect("opens");
    // A legal frame whose payload is read as frames by nobody: type 0x0a is unassigned outside the internal range.
    let error = {
        stream
            .send(Message::new(MsgType(0x0a), 0, 0, Bytes::new()))
            .await
            .expect("the encoder takes any type");
        let mut theirs = far.accept().await.expect("accepts");
        theirs.recv().await.expect_err("not a DCF type")
    };
    assert!(
        matches!(error, StreamFailure::Codec(StreamError::UnknownType(0x0a))),
        "{error:?}"
    );
    assert_eq!(far.close_reason(), None);
}

#[tokio::test]
async fn both_ends_export_the_same_key_and_every_link_another() {
    let head = TestHead::start("attic");
    let worker = head.worker("laptop").await;
    let (near, far) = head.link(&worker, LinkConfig::default()).await;
    let export = |link: &Link, context: &[u8]| {
        link.export_key("hydramesh heartbeat", context)
            .expect("exports")
    };
    let key = export(&near, b"1");
    assert_eq!(key, export(&far, b"1"));
    assert_ne!(key, export(&near, b"2"));
    let (other, _far) = head.link(&worker, LinkConfig::default()).await;
    assert_ne!(key, export(&other, b"1"));
}

#[tokio::test]
async fn a_heartbeat_sealed_by_one_end_is_opened_by_the_other_once() {
    let (_head, near, far) = pair().await;
    let label = "hydramesh heartbeat";
    let mut sealer = Sealer::new(&near.export_key(label, b"s").expect("exports"), 5);
    let mut opener = Opener::new(&far.export_key(label, b"s").expect("exports"), 5);
    let sealed = sealer
        .seal(MsgType::SEALED_HEARTBEAT, 0, 1, b"load")
        .expect("sealed");
    let received = Message::decode_datagram(sealed.encode_datagram()).expect("a DCF message");
    assert_eq!(opener.open(&received).expect("authentic"), "load");
    assert_eq!(
        opener.open(&received),
        Err(OpenError::Replayed { counter: 0 })
    );
    let mut elsewhere = Opener::new(&far.export_key(label, b"other").expect("exports"), 5);
    assert_eq!(elsewhere.open(&received), Err(OpenError::NotAuthentic));
}

/// The far side of the test below: a worker in a process of its own, to be killed.
#[test]
fn helper_process_that_holds_a_link() {
    let (Ok(dir), Ok(head)) = (
        std::env::var("HELPER_STATE_DIR"),
        std::env::var("HELPER_HEAD"),
    ) else {
        return;
    };
    let runtime = tokio::runtime::Runtime::new().expect("runtime");
    runtime.block_on(async {
        let identity = mesh_net::trust::NodeIdentity::load(dir.as_ref()).expect("identity");
        let link = mesh_net::quic::connect(head.parse().expect("address"), &identity)
            .await
            .expect("connects");
        link.closed().await
    });
}

#[tokio::test]
async fn a_killed_process_is_noticed_in_well_under_the_idle_timeout() {
    let head = TestHead::start("attic");
    let worker = head.worker("laptop").await;
    let mut process = std::process::Command::new(std::env::current_exe().expect("this test"))
        .args([
            "--exact",
            "links::helper_process_that_holds_a_link",
            "--nocapture",
        ])
        .env("HELPER_STATE_DIR", worker.dir.path())
        .env("HELPER_HEAD", head.address.to_string())
        .stdout(std::process::Stdio::null())
        .spawn()
        .expect("spawns");
    let link = tokio::time::timeout(Duration::from_secs(20), head.listener.accept()).await;
    let link = link.expect("in time").expect("accepted");
    tokio::time::sleep(Duration::from_millis(100)).await;
    process.kill().expect("killed");
    process.wait().expect("reaped");
    let killed = Instant::now();
    assert_eq!(link.closed().await, Closed::Gone);
    assert!(
        killed.elapsed() < Duration::from_millis(1500),
        "took {:?}",
        killed.elapsed()
    );
}

#[tokio::test]
async fn a_silent_peer_is_given_up_at_the_idle_timeout() {
    let head = TestHead::start("attic");
    let worker = head.worker("laptop").await;
    let config = LinkConfig {
        keep_alive: Duration::from_millis(100),
        idle_timeout: Duration::from_millis(400),
        ..LinkConfig::default()
    };
    // A relay that stops relaying: the port stays open, nothing comes back.
    let relay = tokio::net::UdpSocket::bind(LOOPBACK).await.expect("bind");
    let relay_address = relay.local_addr().expect("address");
    let (cut, mut is_cut) = tokio::sync::oneshot::channel::<()>();
    let to = head.address;
    let relaying = tokio::spawn(async move {
        let mut buffer = vec![0; 65_536];
        let mut client = None;
        loop {
            tokio::select! {
                received = relay.recv_from(&mut buffer) => {
                    let Ok((len, from)) = received else { continue };
                    let destination = if from == to { client } else { client = Some(from); Some(to) };
                    if let Some(destination) = destination {
                        let _ = relay.send_to(&buffer[..len], destination).await;
                    }
                }
                _ = &mut is_cut => break,
            }
        }
        relay
    });
    let connector = Connector::bind(LOOPBACK, worker.identity.clone(), config).expect("connector");
    let (near, far) = tokio::join!(
        connector.connect(relay_address, Role::Head),
        head.listener.accept()
    );
    let (near, _far) = (near.expect("connects"), far.expect("accepted"));
    tokio::time::sleep(Duration::from_millis(800)).await;
    assert_eq!(near.close_reason(), None, "keep-alives hold an idle link");
    cut.send(()).expect("relay runs");
    let _still_bound = relaying.await.expect("relay");
    let started = Instant::now();
    assert_eq!(near.closed().await, Closed::Silent);
    assert!(
        started.elapsed() < Duration::from_secs(2),
        "took {:?}",
        started.elapsed()
    );
}
