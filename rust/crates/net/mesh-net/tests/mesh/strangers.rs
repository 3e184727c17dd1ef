//! Connections of those that have no certificate and mean harm: they hold up nobody.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use dcf::{ErrorCode, Message, MsgType};
use mesh_identity::{IdentityKey, Purpose, Transcript};
use mesh_net::quic::join;
use mesh_net::trust::Applicant;
use mesh_proto::{Evidence, JoinRequest, SignedEvidence};
use prost::Message as _;
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{ClientConfig, Connection, Endpoint, TransportConfig};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{DigitallySignedStruct, SignatureScheme};
use tokio::net::UdpSocket;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::common::{LOOPBACK, TestHead};
use mesh_net::quic::{LinkConfig, Listener};

const JOIN: &[u8] = b"hydramesh-join/1";
const LINK: &[u8] = b"hydramesh/1";

/// More than there is room for.
const MANY: usize = 300;

/// Far less than those that are silent may stay, and enough for a busy machine.
const SOON: Duration = Duration::from_secs(5);

#[derive(Debug)]
struct TakesAnything;

impl ServerCertVerifier for TakesAnything {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        aws_lc_rs::default_provider()
            .signature_verification_algorithms
            .supported_schemes()
    }
}

/// Somebody who knows nothing of the mesh.
fn stranger(protocol: &[u8]) -> Endpoint {
    stranger_with(protocol, aws_lc_rs::default_provider())
}

fn stranger_with(protocol: &[u8], provider: CryptoProvider) -> Endpoint {
    let provider = Arc::new(provider);
    let mut tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("TLS 1.3")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(TakesAnything))
        .with_no_client_auth();
    tls.alpn_protocols = vec![protocol.to_vec()];
    let mut config =
        ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls).expect("a config")));
    let mut transport = TransportConfig::default();
    transport.keep_alive_interval(Some(Duration::from_secs(1)));
    config.transport_config(Arc::new(transport));
    let mut endpoint = Endpoint::client(LOOPBACK).expect("a socket");
    endpoint.set_default_client_config(config);
    endpoint
}

async fn connect(endpoint: &Endpoint, address: SocketAddr) -> Connection {
    let connecting = endpoint.connect(address, "x").expect("an attempt");
    timeout(Duration::from_secs(20), connecting)
        .await
        .expect("in time")
        .expect("a connection")
}

async fn connections(endpoint: &Endpoint, address: SocketAddr, count: usize) -> Vec<Connection> {
    let mut all = Vec::new();
    for _ in 0..count {
        all.push(connect(endpoint, address).await);
    }
    all
}

/// A new node joins, and one that was here before comes back.
async fn honest_nodes_get_in(head: &TestHead, before: &super::common::TestWorker) {
    let dir = tempfile::tempdir().expect("temporary directory");
    let (address, token) = ([head.address], head.token());
    let joined = timeout(SOON, join(&address, &token, dir.path(), "new"));
    joined.await.expect("joins in time").expect("joins");
    let linked = timeout(SOON, head.link(before, LinkConfig::default()));
    let (near, _far) = linked.await.expect("links in time");
    assert!(near.open().await.is_ok(), "a link has streams");
}

#[tokio::test]
async fn who_cannot_exchange_keys_by_ml_kem_is_refused_unless_that_is_allowed() {
    let classical = CryptoProvider {
        kx_groups: vec![aws_lc_rs::kx_group::X25519],
        ..aws_lc_rs::default_provider()
    };
    let old = stranger_with(JOIN, classical);
    let head = TestHead::start("attic");
    let connecting = old.connect(head.address, "x").expect("an attempt");
    let refused = timeout(SOON, connecting).await.expect("in time");
    let error = refused.expect_err("no connection").to_string();
    assert!(error.contains("handshake failed"), "{error}");
    connect(&stranger(JOIN), head.address).await;

    let identity = head
        .authority
        .head_identity(head.dir.path(), "head", SystemTime::now())
        .expect("identity");
    let config = LinkConfig {
        classical: true,
        ..LinkConfig::default()
    };
    let lenient = Listener::bind(LOOPBACK, identity, None, config).expect("listener");
    let address = lenient.local_addr().expect("address");
    connect(&old, address).await;
    connect(&stranger(JOIN), address).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn silent_connections_of_strangers_keep_nobody_out() {
    let head = TestHead::start("attic");
    let worker = head.worker("before").await;
    let silent = stranger(JOIN);
    let held = connections(&silent, head.address, MANY).await;
    honest_nodes_get_in(&head, &worker).await;
    let open = held.iter().filter(|held| held.close_reason().is_none());
    let open = open.count();
    assert!(
        open <= 64,
        "{open} wait, which is more than there is room for"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn handshakes_that_stop_half_way_keep_nobody_out() {
    let head = TestHead::start("attic");
    let worker = head.worker("before").await;
    let (first, _far) = head.link(&worker, LinkConfig::default()).await;
    let mut relays = JoinSet::new();
    let client = stranger(JOIN);
    let mut attempts = Vec::new();
    for _ in 0..MANY {
        let relay = UdpSocket::bind(LOOPBACK).await.expect("a socket");
        let here = relay.local_addr().expect("an address");
        let there = head.address;
        relays.spawn(async move {
            let (mut buffer, mut passed, mut from) = ([0; 2048], 0, None);
            while let Ok((len, address)) = relay.recv_from(&mut buffer).await {
                if address == there {
                    if let Some(client) = from {
                        let _ = relay.send_to(&buffer[..len], client).await;
                    }
                // A first flight, and the one with the token of the Retry packet; never the end of the handshake.
                } else if passed < 4 {
                    (passed, from) = (passed + 1, Some(address));
                    let _ = relay.send_to(&buffer[..len], there).await;
                }
            }
        });
        attempts.push(client.connect(here, "x").expect("an attempt"));
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    honest_nodes_get_in(&head, &worker).await;
    assert!(first.close_reason().is_none(), "links notice nothing");
    drop(attempts);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_asks_for_nothing_in_time_is_cut_off() {
    let head = TestHead::start("attic");
    let client = stranger(JOIN);
    let silent = connect(&client, head.address).await;
    let opened = connect(&client, head.address).await;
    let (mut send, _recv) = opened.open_bi().await.expect("a stream");
    send.write_all(&[5]).await.expect("sent");
    let empty = connect(&client, head.address).await;
    let (mut nothing, _nothing) = empty.open_bi().await.expect("a stream");
    nothing.finish().expect("finished");
    let slow = connect(&client, head.address).await;
    let dripping = tokio::spawn({
        let slow = slow.clone();
        async move {
            let (mut send, _recv) = slow.open_bi().await.expect("a stream");
            while send.write_all(&[5]).await.is_ok() {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    });
    let begun = Instant::now();
    for connection in [&silent, &opened, &empty, &slow] {
        let closed = timeout(Duration::from_secs(10), connection.closed()).await;
        assert!(closed.is_ok(), "{:?}", begun.elapsed());
    }
    dripping.await.expect("no panic");
    let refused = connect(&stranger(LINK), head.address).await;
    let closed = timeout(SOON, refused.closed()).await;
    assert!(closed.is_ok(), "no link without a certificate");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stranger_has_one_stream_and_a_small_window() {
    let head = TestHead::start("attic");
    let client = stranger(JOIN);
    let connection = connect(&client, head.address).await;
    let (mut send, _recv) = connection.open_bi().await.expect("one stream");
    let moment = Duration::from_millis(500);
    assert!(timeout(moment, connection.open_bi()).await.is_err());
    assert!(timeout(moment, connection.open_uni()).await.is_err());
    // A message that is as large as a join may be, of which the last byte never comes.
    let mut header = [0; 17];
    header[0] = 5;
    header[13..].copy_from_slice(&(60u32 << 10).to_be_bytes());
    send.write_all(&header).await.expect("sent");
    let mut sent = 0;
    while let Ok(Ok(len)) = timeout(moment, send.write(&[0; 4096])).await {
        sent += len;
        assert!(sent < 1 << 20, "{sent} bytes were taken ahead");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_node_has_only_so_many_links() {
    let head = TestHead::start("attic");
    let (greedy, other) = (head.worker("greedy").await, head.worker("other").await);
    let mut links = Vec::new();
    for _ in 0..64 {
        links.push(head.link(&greedy, LinkConfig::default()).await);
    }
    let connector =
        mesh_net::quic::Connector::bind(LOOPBACK, greedy.identity.clone(), LinkConfig::default())
            .expect("connector");
    let error = connector
        .connect(head.address, mesh_net::trust::Role::Head)
        .await
        .expect_err("too many");
    assert!(
        error.to_string().contains("64 links of this node"),
        "{error}"
    );
    assert!(error.is_transient());
    head.link(&other, LinkConfig::default()).await;
}

#[tokio::test]
async fn who_has_no_certificate_gets_no_link() {
    let head = TestHead::start("attic");
    let endpoint = stranger(LINK);
    let connection = connect(&endpoint, head.address).await;
    let quinn::ConnectionError::ApplicationClosed(close) = connection.closed().await else {
        panic!("not closed by the head")
    };
    assert_eq!(
        close.error_code,
        u32::from(ErrorCode::UNAUTHORIZED.0).into()
    );
    let text = String::from_utf8_lossy(&close.reason);
    assert!(text.contains("join with a token first"), "{text}");
    let accepted = timeout(Duration::from_millis(100), head.listener.accept()).await;
    assert!(accepted.is_err(), "nothing may be accepted");
}

#[tokio::test]
async fn who_has_no_certificate_cannot_renew_and_nonsense_is_answered_with_an_error() {
    let head = TestHead::start("attic");
    let endpoint = stranger(JOIN);
    for (kind, expected) in [
        (MsgType::RENEW_REQUEST, ErrorCode::UNAUTHORIZED),
        (MsgType::JOIN_REQUEST, ErrorCode::INVALID_PAYLOAD),
        (MsgType::GENERATE, ErrorCode::INVALID_PAYLOAD),
    ] {
        let answer = ask(&endpoint, head.address, kind, Vec::new()).await;
        assert_eq!((answer.kind, answer.sequence), (MsgType::ERROR, 9));
        assert_eq!(
            answer.error_body().expect("a body").code,
            expected,
            "{kind}"
        );
    }
}

/// One request to the head's admission, as anybody can send it, and its answer.
async fn ask(endpoint: &Endpoint, head: SocketAddr, kind: MsgType, body: Vec<u8>) -> Message {
    let connection = connect(endpoint, head).await;
    let (mut send, mut recv) = connection.open_bi().await.expect("a stream");
    let request = Message::new(kind, 9, 0, body).encode_datagram();
    send.write_all(&request).await.expect("sent");
    send.finish().expect("finished");
    let answer = recv.read_to_end(64 << 10).await.expect("an answer");
    Message::decode_datagram(answer.into()).expect("a message")
}

/// A proof of an identity that was made for another connection, as somebody in the middle could pass it on, and one that
/// was made up, cost the token nothing and admit nobody.
#[tokio::test]
async fn a_proof_of_another_connection_admits_nobody() {
    let head = TestHead::start("attic");
    let token = head.token();
    let dir = tempfile::tempdir().expect("temporary directory");
    let csr = Applicant::open(dir.path()).and_then(|keys| keys.request());
    let csr = csr.expect("a request");
    let (id, root) = (token.id(), *token.root_sha256());
    let key = IdentityKey::generate();
    let endpoint = stranger(JOIN);
    for session in [[0; 32], [1; 32]] {
        let transcript = Transcript {
            purpose: Purpose::Join,
            session: &session,
            root: &root,
            request: &csr,
            token: &id,
            name: "laptop",
            successor: None,
            evidence: None,
        };
        let proof = transcript.prove(&key);
        let request = JoinRequest {
            token_id: id.clone(),
            token_secret: token.secret().to_vec(),
            csr: csr.clone(),
            node_name: "laptop".to_owned(),
            identity: Some(proof),
            root: root.to_vec(),
            evidence: None,
        };
        let body = request.encode_to_vec();
        let answer = ask(&endpoint, head.address, MsgType::JOIN_REQUEST, body).await;
        let error = answer.error_body().expect("refused");
        assert_eq!(error.code, ErrorCode::INVALID_PAYLOAD);
        assert!(
            error.text.contains("does not fit this connection"),
            "{}",
            error.text
        );
    }
    assert!(head.authority.members().is_empty());
    join(&[head.address], &token, dir.path(), "laptop")
        .await
        .expect("the token is unused");
}

/// Evidence that is altered, unsigned, another node's or another session's is refused and costs the token nothing.
#[tokio::test]
async fn evidence_at_a_join_counts_for_its_node_and_session_alone() {
    let head = TestHead::start("attic");
    let token = head.token();
    let dir = tempfile::tempdir().expect("temporary directory");
    let csr = Applicant::open(dir.path()).and_then(|keys| keys.request());
    let csr = csr.expect("a request");
    let (id, root) = (token.id(), *token.root_sha256());
    let (key, other) = (IdentityKey::generate(), IdentityKey::generate());
    let body = Evidence {
        form: 1,
        os: "debian".to_owned(),
        ..Evidence::default()
    };
    let body = body.encode_to_vec();
    let endpoint = stranger(JOIN);
    let spoilt = ["altered", "unsigned", "foreign", "replayed", "long", "good"];
    for what in spoilt {
        let connection = connect(&endpoint, head.address).await;
        let mut session = [0; 32];
        connection
            .export_keying_material(&mut session, b"hydramesh identity proof", &root)
            .expect("a key");
        let transcript = Transcript {
            purpose: Purpose::Join,
            session: &session,
            root: &root,
            request: &csr,
            token: &id,
            name: "laptop",
            successor: None,
            evidence: None,
        };
        let vouching = Transcript {
            evidence: Some(&body),
            ..transcript
        };
        let proof = match what {
            "unsigned" => None,
            "foreign" => Some(vouching.prove(&other)),
            "replayed" => Some(
                Transcript {
                    session: &[1; 32],
                    ..vouching
                }
                .prove(&key),
            ),
            _ => Some(vouching.prove(&key)),
        };
        let mut said = body.clone();
        match what {
            "altered" => *said.last_mut().expect("some") ^= 1,
            "long" => said.resize(30_000, 0),
            _ => {}
        }
        let request = JoinRequest {
            token_id: id.clone(),
            token_secret: token.secret().to_vec(),
            csr: csr.clone(),
            node_name: "laptop".to_owned(),
            identity: Some(transcript.prove(&key)),
            evidence: Some(SignedEvidence {
                body: said,
                proof,
                quote: None,
            }),
            root: Vec::new(),
        };
        let (mut send, mut recv) = connection.open_bi().await.expect("a stream");
        let request = Message::new(MsgType::JOIN_REQUEST, 9, 0, request.encode_to_vec());
        send.write_all(&request.encode_datagram())
            .await
            .expect("sent");
        send.finish().expect("finished");
        let answer = recv.read_to_end(64 << 10).await.expect("an answer");
        if what == "good" {
            assert_eq!(answer.first(), Some(&MsgType::JOIN_RESPONSE.0));
            let members = head.authority.members();
            let record = members[&key.node_id().to_string()].evidence.as_ref();
            assert_eq!(record.expect("kept").evidence.os, "debian");
        } else {
            let answer = Message::decode_datagram(answer.into()).expect("a message");
            let error = answer.error_body().expect("refused");
            assert!(error.text.contains("evidence refused"), "{}", error.text);
        }
    }
}
