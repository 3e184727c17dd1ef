//! Sealed DCF: sessions of clients that hold a key or token.

mod support;

use std::net::{IpAddr, SocketAddr, UdpSocket as StdSocket};
use std::time::{Duration, Instant};

use dcf::{ErrorCode, HEADER_LEN, Message, MsgType};
use mesh_base::clock::timestamp_us;
use mesh_client::dcf_udp::{DcfClient, DcfError, SealedTarget};
use mesh_net::quic::{SessionError, SessionTerms, open_session};
use mesh_net::sealed::SealedSession;
use mesh_net::trust::root_digest;
use serde_json::json;
use support::{
    DcfPeer, MODEL, PICTURES, Script, TestHead, chat, eventually, issued, send, trail, truth,
    undisturbed,
};
use tokio::net::UdpSocket;

/// An address of this machine that other machines could use, else a loopback address.
fn own_address() -> IpAddr {
    let socket = StdSocket::bind("0.0.0.0:0").unwrap();
    let routed = socket
        .connect("192.0.2.1:9")
        .and_then(|()| socket.local_addr());
    routed.map_or([127, 0, 0, 1].into(), |address| address.ip())
}

/// A head whose ports for DCF and QUIC are open to other machines.
async fn open_head() -> TestHead {
    TestHead::start(|config| {
        config.http.require_key = true;
        config.dcf.clients = ([0, 0, 0, 0], 0).into();
        config.quic.listen = ([0, 0, 0, 0], 0).into();
    })
    .await
}

/// A port of a head, at an address that other machines could use if it is open to them.
fn at(head: &TestHead, name: &str) -> SocketAddr {
    let bound = head.handle.addresses()[name];
    match bound.ip().is_unspecified() {
        true => SocketAddr::new(own_address(), bound.port()),
        false => bound,
    }
}

fn root(head: &TestHead) -> [u8; 32] {
    let text = std::fs::read_to_string(head.dir.path().join("root.crt")).unwrap();
    root_digest(&text).unwrap()
}

/// Asks this head for a session, as one of the mesh of that head.
async fn session(
    head: &TestHead,
    of: &TestHead,
    credential: &str,
) -> Result<(SealedSession, SessionTerms), SessionError> {
    open_session(&[at(head, "quic")], &root(of), credential, "").await
}

async fn client(head: &TestHead, credential: &str) -> Result<DcfClient, DcfError> {
    let target = SealedTarget {
        head: &at(head, "quic").to_string(),
        root: &root(head),
        credential,
        tenant: "",
    };
    DcfClient::sealed(target).await
}

fn refusal<T>(result: Result<T, DcfError>) -> (ErrorCode, String) {
    match result {
        Err(DcfError::Refused { code, text })
        | Err(DcfError::Session(SessionError::Refused { code, text })) => (code, text),
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("accepted"),
    }
}

const SILENCE: Duration = Duration::from_secs(10);

/// A client's socket and session, datagram by datagram.
struct Raw {
    socket: UdpSocket,
    session: SealedSession,
    head: SocketAddr,
}

impl Raw {
    async fn open(head: &TestHead, token: &str) -> Self {
        let (session, terms) = session(head, head, token).await.unwrap();
        assert_eq!(terms.udp, at(head, "dcf.clients"));
        Self {
            socket: UdpSocket::bind((own_address(), 0)).await.unwrap(),
            session,
            head: terms.udp,
        }
    }

    fn sealed(&mut self, kind: MsgType, sequence: u32, payload: &[u8], now: Instant) -> Vec<u8> {
        let message = Message::new(kind, sequence, timestamp_us(), payload.to_vec());
        let sealed = self.session.seal(&message, 64, now).unwrap();
        sealed.encode_datagram().to_vec()
    }

    async fn send(&self, datagram: &[u8]) {
        self.socket.send_to(datagram, self.head).await.unwrap();
    }

    /// The next datagram, as it is.
    async fn receive(&self, limit: Duration) -> Option<Vec<u8>> {
        let mut buffer = vec![0; 65_536];
        let received = tokio::time::timeout(limit, self.socket.recv_from(&mut buffer)).await;
        let (len, _) = received.ok()?.unwrap();
        buffer.truncate(len);
        Some(buffer)
    }

    fn opened(&mut self, datagram: &[u8]) -> Message {
        let message = Message::decode_datagram(datagram.to_vec().into()).unwrap();
        let inner = self.session.open(&message, Instant::now()).unwrap();
        Message::decode_datagram(inner).unwrap()
    }

    /// Shows the address of its socket to the head.
    async fn prove(&mut self) {
        let asked = self.sealed(MsgType::HEALTH, 1, b"", Instant::now());
        self.send(&asked).await;
        let answer = self.receive(SILENCE).await.unwrap();
        assert!(answer.len() <= asked.len());
        let answer = self.opened(&answer);
        if answer.kind == MsgType::CHALLENGE {
            let cookie = answer.payload.to_vec();
            let reply = self.sealed(MsgType::CHALLENGE_REPLY, 1, &cookie, Instant::now());
            self.send(&reply).await;
            let answer = self.receive(SILENCE).await.unwrap();
            assert_eq!(self.opened(&answer).kind, MsgType::ACK);
        }
    }
}

/// The value of a counter of sealed datagrams.
async fn counted(head: &TestHead, outcome: &str) -> u64 {
    let text = head.http.get(head.url("/metrics")).send().await.unwrap();
    let text = text.text().await.unwrap();
    let name =
        format!("hydramesh_head_datagrams_total{{socket=\"sealed\",outcome=\"{outcome}\"}} ");
    let value = text.lines().find_map(|line| line.strip_prefix(&name));
    value.map_or(0, |value| value.parse().unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_with_a_token_or_key_asks_in_a_session_and_has_its_rights_and_no_more() {
    let keys = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(&keys, "sk-plain\nsk-old expires=2020-01-01\n").unwrap();
    let path = keys.path().to_owned();
    let head = TestHead::start(|config| {
        config.http.api_keys_file = Some(path);
        config.dcf.clients = ([0, 0, 0, 0], 0).into();
        config.quic.listen = ([0, 0, 0, 0], 0).into();
    })
    .await;
    let script = Script {
        draws: true,
        ..Script::default()
    };
    let worker = head.worker("w", script).await;
    let (infer, id) = issued(
        &head,
        json!({ "rights": [format!("infer:{MODEL}")], "tenant": "lab" }),
    )
    .await;
    let task = json!({ "prompt": "why?", "max_tokens": 3, "stream": true });
    for credential in [infer.as_str(), "sk-plain"] {
        let mut client = client(&head, credential).await.unwrap();
        let answer = client.ask(&task, SILENCE, &mut |_| {}).await.unwrap();
        assert_eq!(answer.text, truth("why?", 3));
    }
    // The same words as over HTTP.
    let (other, _) = issued(&head, json!({ "rights": ["infer:Qwen*", "image"] })).await;
    let (status, error) = send(&head, &other, "/v1/chat/completions", Some(chat("why?", 3))).await;
    assert_eq!(status, 403);
    let mut narrow = client(&head, &other).await.unwrap();
    let (code, text) = refusal(narrow.ask(&task, SILENCE, &mut |_| {}).await);
    assert_eq!(code, ErrorCode::UNAUTHORIZED);
    assert_eq!(error["error"]["message"], text);
    let embed = json!({ "kind": "embed", "input": "x" });
    let (_, text) = refusal(narrow.ask(&embed, SILENCE, &mut |_| {}).await);
    assert!(text.contains("the right embed"), "{text}");
    // An image has many Chunks.
    let image = json!({ "kind": "image", "model": PICTURES, "prompt": "x", "seed": 5 });
    let png = narrow.ask_file(&image, SILENCE).await.unwrap();
    let drawn = worker.seen.images.lock().unwrap().last().cloned();
    assert_eq!(png, undisturbed(&drawn.unwrap()));
    let mut without = client(&head, &infer).await.unwrap();
    let (_, text) = refusal(without.ask_file(&image, SILENCE).await.map(|_| ()));
    assert!(text.contains("the right image"), "{text}");

    for (credential, part) in [
        ("", "no API key or curtain token"),
        ("sk-unknown", "not one of this head's"),
        ("sk-old", "expired"),
    ] {
        let (code, text) = refusal(client(&head, credential).await);
        assert_eq!(code, ErrorCode::UNAUTHORIZED);
        assert!(text.contains(part), "{text}");
    }
    let TestHead { handle, dir, .. } = head;
    handle.shutdown().await.unwrap();
    let requests = trail(dir.path(), "grimoire-public");
    let by_token = |record: &&serde_json::Value| {
        record["kind"] == "request" && record["front"] == "dcf" && record["key"] == json!(id)
    };
    assert_eq!(requests.iter().filter(by_token).count(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_head_without_keys_opens_no_session_to_a_stranger_and_one_of_another_mesh_gets_no_token()
{
    let head = TestHead::start(|_| {}).await;
    let other = TestHead::start(|_| {}).await;
    for credential in ["", "anything"] {
        assert!(matches!(
            session(&head, &head, credential).await,
            Err(SessionError::Refused {
                code: ErrorCode::UNAUTHORIZED,
                ..
            })
        ));
    }
    let error = session(&other, &head, "hydra-cap1.x").await.unwrap_err();
    assert!(
        matches!(
            error,
            SessionError::ForeignMesh {
                presented: Some(_),
                ..
            }
        ),
        "{error}"
    );
    let off = TestHead::start(|config| config.dcf.sessions = 0).await;
    let error = session(&off, &off, &off.admin_key())
        .await
        .unwrap_err()
        .to_string();
    assert!(error.contains("dcf.sessions"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replayed_stale_reflected_and_altered_datagrams_are_refused() {
    let head = open_head().await;
    let (token, _) = issued(&head, json!({})).await;
    let mut raw = Raw::open(&head, &token).await;
    raw.prove().await;
    let ask = raw.sealed(MsgType::HEALTH, 9, b"", Instant::now());
    raw.send(&ask).await;
    let answer = raw.receive(SILENCE).await.unwrap();
    let opened = raw.opened(&answer);
    assert_eq!((opened.kind, opened.sequence), (MsgType::HEALTH, 9));
    let accepted = counted(&head, "accepted").await;

    let mut bad = vec![ask.clone(), answer.clone()];
    // The head's own bytes under a time that fits the other direction.
    let mut reflected = answer;
    reflected[5..13].copy_from_slice(&ask[5..13]);
    bad.push(reflected);
    let ahead = Instant::now() + Duration::from_secs(40);
    bad.push(raw.sealed(MsgType::HEALTH, 10, b"", ahead));
    let fresh = raw.sealed(MsgType::HEALTH, 11, b"", Instant::now());
    for at in 0..fresh.len() {
        let mut altered = fresh.clone();
        altered[at] ^= 1 << (at % 8);
        bad.push(altered);
    }
    // Sealed with the keys of another session.
    let mut other = Raw::open(&head, &token).await;
    let mut of_other = other.sealed(MsgType::HEALTH, 12, b"", Instant::now());
    of_other[HEADER_LEN..HEADER_LEN + 8].copy_from_slice(&raw.session.id().to_be_bytes());
    bad.push(of_other);
    for datagram in &bad {
        raw.send(datagram).await;
    }
    // None of them used the counter up or moved the window.
    raw.send(&fresh).await;
    let answer = raw.receive(SILENCE).await.unwrap();
    assert_eq!(raw.opened(&answer).sequence, 11);
    assert_eq!(raw.receive(Duration::from_millis(200)).await, None);
    assert_eq!(counted(&head, "accepted").await, accepted + 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_ends_with_its_token_and_the_client_is_told_within_five_seconds() {
    let head = open_head().await;
    let (revoked, id) = issued(&head, json!({})).await;
    let (short, _) = issued(&head, json!({ "ttl_seconds": 3 })).await;
    let mut first = Raw::open(&head, &revoked).await;
    let mut second = Raw::open(&head, &short).await;
    first.prove().await;
    second.prove().await;
    let admin = head.admin_key();
    let body = Some(json!({ "id": id }));
    let answer = send(&head, &admin, "/v1/mesh/keys/revoke", body).await;
    assert_eq!(answer.0, 200);
    for (raw, part) in [(&mut first, "revoked"), (&mut second, "expired")] {
        let told = raw.receive(Duration::from_secs(5)).await.expect("told");
        let told = raw.opened(&told);
        let error = told.error_body().expect("an Error");
        assert_eq!((told.sequence, error.code), (0, ErrorCode::UNAUTHORIZED));
        assert!(error.text.contains(part), "{}", error.text);
        // A task later on gets the same words.
        let task = raw.sealed(MsgType::TASK, 77, b"why?", Instant::now());
        raw.send(&task).await;
        let answer = raw.receive(SILENCE).await.unwrap();
        let answer = raw.opened(&answer);
        assert_eq!((answer.kind, answer.sequence), (MsgType::ERROR, 77));
        let error = answer.error_body().expect("an Error").text.into_owned();
        assert!(error.contains(part), "{error}");
    }
    let (_, text) = refusal(client(&head, &revoked).await);
    assert!(text.contains("revoked"), "{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sessions_that_are_silent_or_too_many_end() {
    let head = TestHead::start(|config| {
        config.dcf.sessions = 8;
        config.dcf.session_idle = Duration::from_secs(3);
    })
    .await;
    let (token, _) = issued(&head, json!({})).await;
    let open = async || {
        let (session, terms) = session(&head, &head, &token).await.unwrap();
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let mut raw = Raw {
            socket,
            session,
            head: terms.udp,
        };
        raw.prove().await;
        raw
    };
    // A token has an eighth of them.
    let mut first = open().await;
    let mut second = open().await;
    for (raw, part) in [(&mut first, "dcf.sessions"), (&mut second, "nothing came")] {
        let told = raw.receive(Duration::from_secs(6)).await.expect("told");
        let told = raw.opened(&told);
        let text = told.error_body().expect("an Error").text.into_owned();
        assert!(text.contains(part), "{text}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_address_that_is_not_proven_gets_no_more_bytes_than_it_sent() {
    if own_address().is_loopback() {
        return eprintln!("this machine has no address beyond loopback");
    }
    let head = open_head().await;
    let _worker = head.worker("w", Script::default()).await;
    let (token, _) = issued(&head, json!({})).await;
    let mut raw = Raw::open(&head, &token).await;
    raw.prove().await;
    let elsewhere = UdpSocket::bind((own_address(), 0)).await.unwrap();
    let task = raw.sealed(MsgType::TASK, 5, b"why?", Instant::now());
    elsewhere.send_to(&task, raw.head).await.unwrap();
    let mut buffer = [0; 2048];
    let len = elsewhere.recv(&mut buffer).await.unwrap();
    assert!(len <= task.len());
    assert_eq!(raw.opened(&buffer[..len]).kind, MsgType::CHALLENGE);
    // Answers still go to the address that is proven.
    let health = raw.sealed(MsgType::HEALTH, 6, b"", Instant::now());
    raw.send(&health).await;
    let answer = raw.receive(SILENCE).await.unwrap();
    assert_eq!(raw.opened(&answer).sequence, 6);
    // The task was not taken.
    assert_eq!(raw.receive(Duration::from_millis(200)).await, None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn plain_dcf_from_beyond_loopback_is_refused_unless_its_network_is_trusted() {
    if own_address().is_loopback() {
        return eprintln!("this machine has no address beyond loopback");
    }
    let head = open_head().await;
    let peer = DcfPeer {
        socket: UdpSocket::bind((own_address(), 0)).await.unwrap(),
        head: at(&head, "dcf.clients"),
    };
    let task = [b'x'; 100];
    peer.send(0x02, 3, &task).await;
    let (kind, sequence, payload) = peer.receive().await;
    assert_eq!((kind, sequence, payload[0]), (0xFF, 3, 0x45));
    assert!(payload.len() <= task.len());
    for kind in [0x06, 0x08, 0x29] {
        peer.send(kind, 4, &task).await;
    }
    peer.nothing_comes().await;
    eventually("they are counted", || async {
        let text = head.http.get(head.url("/metrics")).send().await.unwrap();
        let text = text.text().await.unwrap();
        text.contains("datagrams_total{socket=\"clients\",outcome=\"untrusted\"} 4")
    })
    .await;
}
