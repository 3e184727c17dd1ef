//! Every door of a head, and every kind of key or token that must not open it.

mod support;

use std::collections::BTreeMap;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use dcf::ErrorCode;
use mesh_curtain::PREFIX;
use mesh_net::quic::{self, JoinError, SessionError, open_session};
use mesh_net::trust::{JoinToken, TOKEN_EXPIRED, TOKEN_UNKNOWN, TOKEN_USED, root_digest};
use serde_json::{Value, json};
use support::{DcfPeer, MODEL, Script, TestHead, chat, issued, send, trail};

/// A door at which a key or token is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Door {
    /// A request of a client, with a bearer.
    Http,
    /// A request of an administrator, with a bearer.
    Admin,
    /// A ClientHello over QUIC, then a task in the session.
    Sealed,
}

const DOORS: [Door; 3] = [Door::Http, Door::Admin, Door::Sealed];

/// Shows a token, for this tenant or none; the refusal in the head's words, if it is refused.
async fn show(door: Door, head: &TestHead, token: &str, tenant: &str) -> Option<String> {
    match door {
        Door::Http | Door::Admin => {
            let request = match door {
                Door::Http => head
                    .http
                    .post(head.url("/v1/chat/completions"))
                    .json(&chat("why?", 1)),
                _ => head.http.get(head.url("/v1/mesh/nodes")),
            };
            let request = match token {
                "" => request,
                token => request.bearer_auth(token),
            };
            let answer = request.header("openai-organization", tenant).send().await;
            let answer = answer.unwrap();
            let status = answer.status().as_u16();
            let body: Value = answer.json().await.unwrap_or_default();
            if status == 200 {
                return None;
            }
            assert!(matches!(status, 401 | 403), "{status} {body}");
            Some(body["error"]["message"].as_str().unwrap().to_owned())
        }
        Door::Sealed => {
            let root = std::fs::read_to_string(head.dir.path().join("root.crt")).unwrap();
            let root = root_digest(&root).unwrap();
            let asked = open_session(&[head.address("quic")], &root, token, tenant).await;
            let (session, terms) = match asked {
                Ok(opened) => opened,
                Err(SessionError::Refused { code, text }) => {
                    assert_eq!(code, ErrorCode::UNAUTHORIZED);
                    return Some(text);
                }
                Err(error) => panic!("{error}"),
            };
            let peer = DcfPeer::toward(terms.udp).await;
            ask_in(session, &peer).await
        }
    }
}

/// The refusal of a task in a session.
async fn ask_in(mut session: mesh_net::sealed::SealedSession, peer: &DcfPeer) -> Option<String> {
    let now = std::time::Instant::now;
    let task = format!(r#"{{"prompt":"why?","max_tokens":1,"model":"{MODEL}"}}"#);
    let task = dcf::Message::new(dcf::MsgType::TASK, 1, 0, task);
    let sealed = session.seal(&task, 64, now()).unwrap();
    peer.send_raw(&sealed.encode_datagram()).await;
    let answer = peer.receive_raw(Duration::from_secs(10)).await.unwrap();
    let answer = dcf::Message::decode_datagram(answer.into()).unwrap();
    let inner = session.open(&answer, now()).unwrap();
    let inner = dcf::Message::decode_datagram(inner).unwrap();
    let error = inner.error_body()?;
    assert_eq!(error.code, ErrorCode::UNAUTHORIZED);
    Some(error.text.into_owned())
}

/// The token with the bit of a byte changed, in its text.
fn altered(token: &str, at: usize) -> String {
    let mut bytes = URL_SAFE_NO_PAD.decode(&token[PREFIX.len()..]).unwrap();
    let at = at % bytes.len();
    bytes[at] ^= 1 << (at % 8);
    format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(bytes))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_door_refuses_every_kind_of_bad_token_in_words_and_the_trail_names_the_reason() {
    let head = TestHead::start(|config| config.http.require_key = true).await;
    let other = TestHead::start(|_| {}).await;
    let _worker = head.worker("w", Script::default()).await;
    // Good for all doors.
    let wide = json!({ "tier": "master", "tenant": "lab", "rights": ["admin", "infer:*"] });
    let (good, _) = issued(&head, wide.clone()).await;
    let (revoked, revoked_id) = issued(&head, wide.clone()).await;
    let body = Some(json!({ "id": revoked_id }));
    let admin = head.admin_key();
    assert_eq!(
        send(&head, &admin, "/v1/mesh/keys/revoke", body).await.0,
        200
    );
    let mut short = wide.clone();
    short["ttl_seconds"] = 1.into();
    let (expired, expired_id) = issued(&head, short).await;
    let (foreign, _) = issued(&other, wide).await;
    let (narrow, narrow_id) = issued(&head, json!({ "rights": ["embed"] })).await;
    tokio::time::sleep(Duration::from_millis(1_100)).await;

    let mut cases: Vec<(&str, String, &str, &str)> = vec![
        ("no token", String::new(), "", "sent"),
        ("expired", expired, "", "expired"),
        ("another mesh", foreign, "", "another issuer"),
        ("wrong tenant", good.clone(), "shop", "tenant \"lab\""),
        ("revoked", revoked, "", "revoked"),
        ("too narrow", narrow, "", "this needs the right"),
    ];
    // Each byte of a token is tried in mesh-curtain.
    for at in [0, 3, 40, 90, 300, 2_000, 3_500] {
        cases.push(("altered", altered(&good, at), "", "token"));
    }
    let mut table = BTreeMap::new();
    for door in DOORS {
        assert_eq!(show(door, &head, &good, "lab").await, None, "{door:?}");
        for (case, token, tenant, part) in &cases {
            let refusal = show(door, &head, token, tenant).await;
            let refusal = refusal.unwrap_or_else(|| panic!("{door:?} opens to: {case}"));
            assert!(refusal.contains(part), "{door:?}, {case}: {refusal}");
            assert!(!refusal.contains(&token[token.len() / 2..]) || token.is_empty());
            table.insert((door, *case), refusal);
        }
        assert_eq!(show(door, &head, &good, "").await, None, "{door:?}");
    }
    // The same words at each door.
    for case in ["expired", "another mesh", "wrong tenant", "revoked"] {
        let of = |door| table[&(door, case)].replace(char::is_numeric, "");
        assert_eq!(of(Door::Http), of(Door::Sealed), "{case}");
    }

    let TestHead { handle, dir, .. } = head;
    handle.shutdown().await.unwrap();
    let records = trail(dir.path(), "master");
    let refused: Vec<(String, String)> = records
        .iter()
        .filter(|record| record["decision"] == "refused")
        .map(|record| {
            let text = |name: &str| record[name].as_str().unwrap().to_owned();
            (text("token"), text("note"))
        })
        .collect();
    for (door, narrow_door) in [("http", "http"), ("quic", "dcf")] {
        for (door, id, reason) in [
            (door, expired_id.as_str(), "expired token"),
            (door, &revoked_id, "revoked or unknown token"),
            (door, "", "token of another issuer"),
            (door, "", "wrong tenant"),
            (narrow_door, &narrow_id, "missing right"),
        ] {
            let note = format!("{door}: {reason}");
            assert!(
                refused
                    .iter()
                    .any(|record| record.0 == id && record.1.starts_with(&note)),
                "{note} of {id:?} is not in {refused:?}"
            );
        }
    }
    // Far fewer records than refusals, and none for a request without a token.
    assert!(refused.len() <= 30, "{refused:?}");
    assert!(!format!("{refused:?}").contains(&good[200..240]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refused_api_keys_are_recorded_without_their_text_and_a_flood_of_them_is_one_record() {
    let keys = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(&keys, "sk-good\n").unwrap();
    let path = keys.path().to_owned();
    let head = TestHead::start(|config| config.http.api_keys_file = Some(path)).await;
    for number in 0..200 {
        let (status, _) = send(&head, &format!("guess-{number}"), "/v1/models", None).await;
        assert_eq!(status, 401);
    }
    let TestHead { handle, dir, .. } = head;
    handle.shutdown().await.unwrap();
    let records = trail(dir.path(), "master");
    let refused = records
        .iter()
        .filter(|record| record["decision"] == "refused");
    let notes: Vec<&str> = refused
        .map(|record| record["note"].as_str().unwrap())
        .collect();
    assert_eq!(
        notes,
        [
            "http: unknown API key, from 127.0.0.1",
            "http: unknown API key, 199 times, last from 127.0.0.1"
        ]
    );
    assert!(!format!("{records:?}").contains("guess"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_quic_join_refuses_every_kind_of_bad_join_token() {
    let head = TestHead::start(|_| {}).await;
    let other = TestHead::start(|_| {}).await;
    let admin = head.admin_key();
    let make = async |life: u64| {
        let asked = Some(json!({ "ttl_seconds": life }));
        let (status, answer) = send(&head, &admin, "/v1/mesh/tokens", asked).await;
        assert_eq!(status, 200, "{answer}");
        answer["token"]
            .as_str()
            .unwrap()
            .parse::<JoinToken>()
            .unwrap()
    };
    let join = async |token: &JoinToken| {
        let dir = tempfile::tempdir().unwrap();
        let joined = quic::join(&[head.address("quic")], token, dir.path(), "n").await;
        match joined {
            Ok(_) => None,
            Err(JoinError::Refused { code, .. }) => Some(code),
            Err(JoinError::ForeignMesh { .. }) => Some(ErrorCode::UNAUTHORIZED),
            Err(error) => panic!("{error}"),
        }
    };
    let short = make(1).await;
    let used = make(60).await;
    assert_eq!(join(&used).await, None);
    assert_eq!(join(&used).await, Some(TOKEN_USED));
    let revoked = make(60).await;
    let body = Some(json!({ "id": revoked.id() }));
    let (status, answer) = send(&head, &admin, "/v1/mesh/tokens/revoke", body).await;
    assert_eq!(status, 200, "{answer}");
    assert_eq!(join(&revoked).await, Some(TOKEN_UNKNOWN));
    tokio::time::sleep(Duration::from_millis(1_100)).await;
    assert_eq!(join(&short).await, Some(TOKEN_EXPIRED));
    assert_eq!(
        join(&other.token().await).await,
        Some(ErrorCode::UNAUTHORIZED)
    );
    // Two at once: one gets in.
    let once = make(60).await;
    let mut both: Vec<_> = <[_; 2]>::from(tokio::join!(join(&once), join(&once))).into();
    both.sort();
    assert_eq!(both, [None, Some(TOKEN_USED)]);
}
