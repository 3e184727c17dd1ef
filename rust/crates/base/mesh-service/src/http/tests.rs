//! Real connections that are slow, silent or many.

use std::io;
use std::time::Instant;

use axum::extract::ConnectInfo;
use axum::routing::get;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::server::MOST_BUFFER;
use super::*;

async fn slow(ConnectInfo(peer): ConnectInfo<SocketAddr>) -> String {
    tokio::time::sleep(Duration::from_millis(100)).await;
    format!("hello {}", peer.ip())
}

#[tokio::test]
async fn an_open_request_finishes_during_the_drain_and_new_connections_are_refused() {
    let listener = bind(([127, 0, 0, 1], 0).into()).await.expect("bind");
    let address = listener.local_addr().expect("address");
    let draining = CancellationToken::new();
    let router = Router::new().route("/", get(slow));
    let server = tokio::spawn(serve(
        Connections::default(),
        listener,
        None,
        router,
        draining.clone(),
        Duration::from_secs(5),
    ));

    let mut client = TcpStream::connect(address).await.expect("connect");
    client
        .write_all(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        .await
        .expect("send");
    tokio::time::sleep(Duration::from_millis(30)).await;
    draining.cancel();
    let mut answer = String::new();
    client.read_to_string(&mut answer).await.expect("answer");
    assert!(answer.ends_with("hello 127.0.0.1"), "{answer}");
    server.await.expect("join").expect("served");
    assert!(TcpStream::connect(address).await.is_err());
}

#[tokio::test]
async fn a_request_beyond_the_limit_is_cut() {
    let listener = bind(([127, 0, 0, 1], 0).into()).await.expect("bind");
    let address = listener.local_addr().expect("address");
    let draining = CancellationToken::new();
    let router = Router::new().route("/", get(std::future::pending::<String>));
    let server = tokio::spawn(serve(
        Connections::default(),
        listener,
        None,
        router,
        draining.clone(),
        Duration::from_millis(50),
    ));
    let mut client = TcpStream::connect(address).await.expect("connect");
    client
        .write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        .await
        .expect("send");
    tokio::time::sleep(Duration::from_millis(20)).await;
    draining.cancel();
    tokio::time::timeout(Duration::from_secs(2), server)
        .await
        .expect("in time")
        .expect("join")
        .expect("served");
}

async fn until_closed(client: &mut TcpStream) -> (String, Duration) {
    let started = Instant::now();
    let mut answer = Vec::new();
    let read = tokio::time::timeout(Duration::from_secs(20), client.read_to_end(&mut answer));
    // A reset is a close, too.
    let _ = read.await.expect("closed within 20 s");
    (String::from_utf8(answer).expect("UTF-8"), started.elapsed())
}

/// A server that is impatient, and its address.
async fn impatient(change: impl FnOnce(&mut Connections)) -> (SocketAddr, CancellationToken) {
    let listener = bind(([127, 0, 0, 1], 0).into()).await.expect("bind");
    let address = listener.local_addr().expect("address");
    let short = Duration::from_millis(400);
    let mut connections = Connections {
        header_timeout: short,
        idle_timeout: 3 * short,
        body_timeout: short,
        write_timeout: short,
        ..Connections::default()
    };
    change(&mut connections);
    let draining = CancellationToken::new();
    let big = || async { "x".repeat(64 << 20) };
    let router = Router::new()
        .route("/health", get(|| async { "alive" }))
        .route("/slow", get(std::future::pending::<String>))
        .route("/big", get(big))
        .route(
            "/body",
            axum::routing::post(|body: String| async move { body.len().to_string() }),
        )
        .layer(axum::extract::DefaultBodyLimit::disable());
    let limit = Duration::from_secs(1);
    tokio::spawn(serve(
        connections,
        listener,
        None,
        router,
        draining.clone(),
        limit,
    ));
    (address, draining)
}

async fn send(address: SocketAddr, text: &str) -> TcpStream {
    let mut client = TcpStream::connect(address).await.expect("connect");
    client.write_all(text.as_bytes()).await.expect("send");
    client
}

#[tokio::test]
async fn silence_ends_a_connection_wherever_it_begins() {
    let (address, _draining) = impatient(|_| {}).await;
    for (text, answer) in [
        ("", ""),
        ("GET /health HTTP/1.1\r\nhost: x\r\nx-half", ""),
        ("PRI * HTTP/2.0\r\n", ""),
        ("GET /health HTTP/1.1\r\nhost: x\r\n\r\n", "alive"),
        ("GET /health HTTP/1.1\r\nhost: x\r\n\r\nGET /hea", "alive"),
        (
            "POST /body HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\nabc",
            "did not arrive in time",
        ),
    ] {
        let mut client = send(address, text).await;
        let (got, _) = until_closed(&mut client).await;
        assert!(
            got.contains(answer) && got.is_empty() == answer.is_empty(),
            "{text:?}: {got:?}"
        );
    }
    // Bytes that drop in one by one buy no time.
    let mut client = send(address, "GET /health HTTP/1.1\r\n").await;
    let started = Instant::now();
    while client.write_all(b"x").await.is_ok() {
        assert!(started.elapsed() < Duration::from_secs(10));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn a_client_that_takes_nothing_is_cut_and_one_that_waits_is_not() {
    let (address, _draining) = impatient(|_| {}).await;
    let mut waiting = send(address, "GET /slow HTTP/1.1\r\nhost: x\r\n\r\n").await;
    let mut client = send(address, "GET /big HTTP/1.1\r\nhost: x\r\n\r\n").await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let (got, _) = until_closed(&mut client).await;
    assert!(got.len() < 64 << 20, "{}", got.len());
    let quiet = tokio::time::timeout(Duration::from_millis(50), waiting.read_u8());
    assert!(quiet.await.is_err(), "it still waits for its answer");
}

/// A client that speaks HTTP/2 by hand: its streams have no window, and it has asked for `path`.
async fn without_window(address: SocketAddr, path: &str) -> TcpStream {
    let mut sent = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    // SETTINGS_INITIAL_WINDOW_SIZE = 0
    sent.extend(frame(4, 0, 0, &[0, 4, 0, 0, 0, 0]));
    // :method GET, :scheme http, :authority and :path as literals.
    let len = u8::try_from(path.len()).expect("a short path");
    let mut head = vec![0x82, 0x86, 0x41, 1, b'x', 0x04, len];
    head.extend(path.as_bytes());
    sent.extend(frame(1, 0x5, 1, &head));
    let mut client = TcpStream::connect(address).await.expect("connect");
    client.write_all(&sent).await.expect("send");
    client
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let len = u32::try_from(payload.len()).expect("a short frame");
    let mut frame = len.to_be_bytes()[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// Answers SETTINGS and PING until the connection ends, or for `limit`: bytes of data, PINGs, and whether it ended.
///
/// Grants `window` every 100 ms.
async fn answer_pings(client: TcpStream, window: u32, limit: Duration) -> (usize, usize, bool) {
    let (mut reader, mut writer) = client.into_split();
    let (mut data, mut pings) = (0, 0);
    let (acknowledge, mut acknowledged) = tokio::sync::mpsc::channel(64);
    let read = async {
        loop {
            let mut head = [0; 9];
            if reader.read_exact(&mut head).await.is_err() {
                return;
            }
            let len = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
            let mut payload = vec![0; len];
            if reader.read_exact(&mut payload).await.is_err() {
                return;
            }
            match (head[3], head[4]) {
                (0, _) => data += len,
                (4, 0) => acknowledge.send(frame(4, 1, 0, &[])).await.expect("send"),
                (6, 0) => {
                    pings += 1;
                    let pong = frame(6, 1, 0, &payload);
                    acknowledge.send(pong).await.expect("send");
                }
                _ => {}
            }
        }
    };
    let write = async {
        let mut grants = tokio::time::interval(Duration::from_millis(100));
        loop {
            let frames = tokio::select! {
                Some(frame) = acknowledged.recv() => frame,
                _ = grants.tick(), if window > 0 => {
                    let window = window.to_be_bytes();
                    [frame(8, 0, 0, &window), frame(8, 0, 1, &window)].concat()
                }
            };
            if writer.write_all(&frames).await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    };
    let ended = tokio::select! {
        () = read => true,
        () = write => unreachable!(),
        () = tokio::time::sleep(limit) => false,
    };
    (data, pings, ended)
}

#[tokio::test]
async fn a_client_without_a_window_is_cut_and_slow_ones_are_not() {
    let (address, _draining) = impatient(|connections| {
        connections.header_timeout = Duration::from_millis(200);
        connections.write_timeout = Duration::from_secs(2);
        connections.idle_timeout = Duration::from_secs(2);
    })
    .await;
    let run = |path, window, seconds| async move {
        let client = without_window(address, path).await;
        answer_pings(client, window, Duration::from_secs(seconds)).await
    };
    let (stuck, waiting, slow) = tokio::join!(
        run("/health", 0, 20),
        run("/slow", 0, 6),
        run("/big", 4096, 6)
    );
    let (data, pings, ended) = stuck;
    assert!(ended && data == 0 && pings > 0, "{stuck:?}");
    let (_, pings, ended) = waiting;
    assert!(!ended && pings > 0, "{waiting:?}");
    let (data, _, ended) = slow;
    assert!(!ended && data > 40_000, "{slow:?}");
}

#[tokio::test]
async fn a_stuck_stream_ends_alone() {
    let (address, _draining) = impatient(|connections| {
        connections.write_timeout = Duration::from_secs(1);
        connections.idle_timeout = Duration::from_secs(30);
        connections.header_timeout = Duration::from_secs(30);
    })
    .await;
    let mut client = without_window(address, "/health").await;
    // Another request, of which the answer is still being made.
    let mut head = vec![0x82, 0x86, 0x41, 1, b'x', 0x04, 5];
    head.extend(b"/slow");
    client
        .write_all(&frame(1, 0x5, 3, &head))
        .await
        .expect("send");
    let mut resets = Vec::new();
    let limit = Duration::from_secs(20);
    let reset = tokio::time::timeout(limit, next_of(&mut client, 3, &mut resets)).await;
    assert_eq!(reset.expect("a reset in time").expect("open"), 1);
    // The connection and its other streams go on.
    let mut head = vec![0x82, 0x86, 0x41, 1, b'x', 0x04, 7];
    head.extend(b"/health");
    client
        .write_all(&frame(1, 0x5, 5, &head))
        .await
        .expect("send");
    client
        .write_all(&frame(8, 0, 5, &1000u32.to_be_bytes()))
        .await
        .expect("send");
    let data = tokio::time::timeout(limit, next_of(&mut client, 0, &mut resets)).await;
    assert_eq!(data.expect("data in time").expect("open"), 5);
    assert_eq!(resets, [1]);
}

/// Reads up to a frame of this kind: its stream. Collects the streams that were reset.
async fn next_of(client: &mut TcpStream, kind: u8, resets: &mut Vec<u32>) -> io::Result<u32> {
    loop {
        let mut head = [0; 9];
        client.read_exact(&mut head).await?;
        let len = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        let mut payload = vec![0; len];
        client.read_exact(&mut payload).await?;
        let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
        if head[3] == 3 {
            resets.push(stream);
        }
        if (head[3], head[4] & 1) == (4, 0) {
            client.write_all(&frame(4, 1, 0, &[])).await?;
        }
        if head[3] == kind {
            return Ok(stream);
        }
    }
}

#[tokio::test]
async fn unfinished_requests_make_room_for_finished_ones() {
    let (address, _draining) = impatient(|connections| {
        connections.unfinished = 1 << 20;
        connections.header_timeout = Duration::from_secs(600);
        connections.body_timeout = Duration::from_secs(600);
    })
    .await;
    let mut half = Vec::new();
    for _ in 0..40 {
        let mut post =
            "POST /body HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n".to_owned();
        post.push_str(&"z".repeat(100_000));
        half.push(send(address, &post).await);
    }
    let len = 500_000;
    let mut post = format!(
        "POST /body HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len}\r\n\r\n"
    );
    post.push_str(&"z".repeat(len));
    let (got, _) = until_closed(&mut send(address, &post).await).await;
    assert!(got.ends_with("500000"), "{got}");
    let mut oldest = half.swap_remove(0);
    let mut said = [0; 1000];
    let len = tokio::time::timeout(Duration::from_secs(10), oldest.read(&mut said))
        .await
        .expect("an answer")
        .expect("a byte");
    let said = String::from_utf8_lossy(&said[..len]);
    assert!(
        said.contains("too many requests are on their way"),
        "{said}"
    );
    // A client that only reads at its end gets there.
    let rest = "z".repeat(900_000);
    oldest.write_all(rest.as_bytes()).await.expect("taken");

    // Heads count, too.
    let mut heads = Vec::new();
    for _ in 0..40 {
        let head = format!(
            "GET /health HTTP/1.1\r\nhost: x\r\nx: {}",
            "y".repeat(50_000)
        );
        heads.push(send(address, &head).await);
    }
    let (got, _) = until_closed(&mut heads[0]).await;
    assert!(got.is_empty(), "{got}");
    let health = "GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    let (got, _) = until_closed(&mut send(address, health).await).await;
    assert!(got.ends_with("alive"), "{got}");
}

#[tokio::test]
async fn a_head_has_a_bound_and_bodies_do_not_share_it() {
    let (address, _draining) = impatient(|_| {}).await;
    let mut head = "GET /health HTTP/1.1\r\nhost: x\r\nx: ".to_owned();
    // No more than is read, since a close with more to read is a reset.
    head.push_str(&"y".repeat(MOST_BUFFER - head.len()));
    let (got, _) = until_closed(&mut send(address, &head).await).await;
    assert!(got.starts_with("HTTP/1.1 431"), "{got}");
    let len = 8 << 20;
    let mut post = format!(
        "POST /body HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len}\r\n\r\n"
    );
    post.push_str(&"z".repeat(len));
    let (got, _) = until_closed(&mut send(address, &post).await).await;
    assert!(got.ends_with("8388608"), "{got}");
    let big = "GET /big HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    let (got, _) = until_closed(&mut send(address, big).await).await;
    let (head, body) = got.split_once("\r\n\r\n").expect("a head");
    assert!(head.contains("content-length: 67108864"), "{head}");
    assert_eq!(body.len(), 64 << 20);
}

#[tokio::test]
async fn health_is_answered_whatever_others_hold() {
    let (address, _draining) = impatient(|connections| {
        connections.total = 4;
        connections.header_timeout = Duration::from_secs(600);
    })
    .await;
    let health = "GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    let mut half = Vec::new();
    for _ in 0..20 {
        half.push(send(address, "GET / HTTP/1.1\r\nx-half").await);
    }
    let (got, _) = until_closed(&mut send(address, health).await).await;
    assert!(got.ends_with("alive"), "{got}");
    let mut running = Vec::new();
    for _ in 0..4 {
        running.push(send(address, "GET /slow HTTP/1.1\r\nhost: x\r\n\r\n").await);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let (got, _) = until_closed(&mut send(address, health).await).await;
    assert!(got.ends_with("alive"), "{got}");
    let other = "GET /big HTTP/1.1\r\nhost: x\r\n\r\n";
    let (got, _) = until_closed(&mut send(address, other).await).await;
    assert!(
        got.starts_with("HTTP/1.1 503") && got.contains("retry-after"),
        "{got}"
    );
}

#[test]
fn as_many_connections_as_files_allow() {
    let bounds = |files| Connections::default().bounds(files);
    assert_eq!((bounds(128).total, bounds(128).per_source), (80, 40));
    assert_eq!(bounds(1024).total, 760);
    assert_eq!(bounds(1 << 20).total, 1024);
    assert!(bounds(10).total >= 1);
    let few = Connections {
        total: 5,
        ..Connections::default()
    };
    assert_eq!(few.bounds(1024).total, 5);
    let many = Connections {
        total: 100_000,
        ..Connections::default()
    };
    assert_eq!(many.bounds(1 << 20).total, 16_384);
}

#[tokio::test]
async fn a_taken_port_is_named() {
    let listener = bind(([127, 0, 0, 1], 0).into()).await.expect("bind");
    let address = listener.local_addr().expect("address");
    let error = bind(address).await.expect_err("taken").to_string();
    assert!(error.contains(&address.to_string()), "{error}");
}
