//! Identities of workers, expulsion, tokens and keys.

mod support;

use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use dcf::{Message, MsgType};
use mesh_head::config::ApprovalRule;
use mesh_net::quic::{self, Closed, ConnectError, Connector, Link, LinkConfig, MsgStream};
use mesh_net::trust::{EXPELLED, JoinToken, NodeIdentity, Role, rotate_identity};
use mesh_proto::{Expelled, Hello, PROTOCOL_VERSION};
use mesh_service::reload::Report;
use prost::Message as _;
use serde_json::{Value, json};
use support::{Fate, Script, TestHead, chat, eventually, streamed, streamed_text, truth};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// A worker that says what it is told to and serves nothing.
struct Raw {
    identity: NodeIdentity,
    link: Link,
    control: MsgStream,
    _connector: Connector,
    _dir: Arc<TempDir>,
}

impl Raw {
    /// Joins under one name and calls itself another.
    async fn join(head: &TestHead, name: &str, says: &str) -> Self {
        let dir = Arc::new(tempfile::tempdir().unwrap());
        let token = head.token().await;
        let identity = quic::join(&[head.address("quic")], &token, dir.path(), name)
            .await
            .unwrap();
        let connector = Connector::toward(
            head.address("quic"),
            identity.clone(),
            LinkConfig::default(),
        )
        .unwrap();
        let link = connector
            .connect(head.address("quic"), Role::Head)
            .await
            .unwrap();
        let mut control = link.open().await.unwrap();
        let hello = Hello {
            node_name: says.to_owned(),
            protocol: PROTOCOL_VERSION,
            ..Hello::default()
        };
        let hello = Message::new(MsgType::HELLO, 0, 0, hello.encode_to_vec());
        control.send(hello).await.unwrap();
        let welcome = control.recv().await.unwrap().unwrap();
        assert_eq!(welcome.kind, MsgType::WELCOME);
        Self {
            identity,
            link,
            control,
            _connector: connector,
            _dir: dir,
        }
    }

    /// The next list of expelled nodes.
    async fn told(&mut self) -> Vec<String> {
        let list = async {
            loop {
                let message = self.control.recv().await.unwrap().expect("a message");
                if message.kind == MsgType::EXPELLED {
                    let list = Expelled::decode(message.payload).unwrap();
                    return list.nodes.into_iter().map(|node| node.node_id).collect();
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(5), list)
            .await
            .expect("it is told in time")
    }
}

async fn admin(head: &TestHead, path: &str, body: Option<Value>) -> (u16, Value) {
    let request = match body {
        Some(body) => head.http.post(head.url(path)).body(body.to_string()),
        None => head.http.get(head.url(path)),
    };
    let answer = request.bearer_auth(head.admin_key()).send().await.unwrap();
    (
        answer.status().as_u16(),
        answer.json().await.unwrap_or_default(),
    )
}

async fn node(head: &TestHead, name: &str) -> Value {
    let (status, answer) = admin(head, "/v1/mesh/nodes", None).await;
    assert_eq!(status, 200);
    let nodes = answer["nodes"].as_array().unwrap();
    let found = nodes.iter().find(|node| node["name"] == name);
    found.cloned().unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_is_called_what_its_certificate_says() {
    let head = TestHead::start(|_| {}).await;
    let _first = Raw::join(&head, "attic", "attic").await;
    let _liar = Raw::join(&head, "attic", "attic").await;
    let _other = Raw::join(&head, "barn", "\u{1b}[31mhead").await;
    let (_, mesh) = head.get("/v1/mesh").await;
    let mut names: Vec<&str> = mesh["workers"]
        .as_array()
        .unwrap()
        .iter()
        .map(|worker| worker["name"].as_str().unwrap())
        .collect();
    names.sort_unstable();
    assert_eq!(names, ["attic", "attic-2", "barn"]);
    for name in names {
        assert_eq!(node(&head, name).await["state"], "connected");
    }
    // Names are labels there.
    tokio::time::sleep(Duration::from_millis(600)).await;
    let metrics = head.http.get(head.url("/metrics")).send().await.unwrap();
    let metrics = metrics.text().await.unwrap();
    assert!(
        metrics.contains("\"attic-2\"") && !metrics.contains("[31m"),
        "{metrics}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_expelled_worker_is_out_at_once_and_its_answers_go_on_elsewhere() {
    let head = TestHead::start(|_| {}).await;
    let slow = |decode_tps| Script {
        decode_tps,
        pace: Duration::from_millis(50),
        fate: Fate::Finish,
        ..Script::default()
    };
    // The faster one gets the request.
    let rogue = head.worker("rogue", slow(500.0)).await;
    let honest = head.worker("honest", slow(50.0)).await;
    let mut witness = Raw::join(&head, "witness", "witness").await;
    assert!(witness.told().await.is_empty(), "told when it connects");

    let url = head.url("/v1/chat/completions");
    let (http, body) = (head.http.clone(), streamed(chat("why?", 40)));
    let asking = tokio::spawn(async move {
        let answer = http.post(url).body(body.to_string()).send().await.unwrap();
        answer.text().await.unwrap()
    });
    eventually("somebody answers", || async {
        rogue.requests() + honest.requests() == 1
    })
    .await;
    let answering = match rogue.requests() {
        1 => ("rogue", &rogue),
        _ => ("honest", &honest),
    };
    tokio::time::sleep(Duration::from_millis(300)).await;
    let at = Instant::now();
    let body = json!({ "node": answering.0, "reason": "it lies" });
    let (status, answer) = admin(&head, "/v1/mesh/nodes/expel", Some(body.clone())).await;
    assert_eq!(status, 200, "{answer}");
    assert_eq!(answer["was_connected"], true);
    let id = answer["node_id"].as_str().unwrap().to_owned();
    // Workers of earlier versions know it by the key of its certificate.
    let key = node(&head, answering.0).await["key_id"].clone();
    let key = key.as_str().unwrap();
    assert_eq!(witness.told().await, [&*id, key]);
    let (_, mesh) = head.get("/v1/mesh").await;
    assert!(!mesh["workers"].to_string().contains(&id), "{mesh}");
    assert!(at.elapsed() < Duration::from_secs(5), "{:?}", at.elapsed());

    let text = asking.await.unwrap();
    let events: Vec<String> = text
        .split("\n\n")
        .filter_map(|event| event.strip_prefix("data: "))
        .map(str::to_owned)
        .collect();
    assert_eq!(streamed_text(&events), truth("why?", 40));
    assert_eq!(rogue.requests() + honest.requests(), 2, "it ran again");

    let expelled = node(&head, answering.0).await;
    assert_eq!(
        (&expelled["state"], &expelled["reason"]),
        (&json!("expelled"), &json!("it lies"))
    );
    // Again is the same; an unknown one and the head itself are refused.
    let (status, _) = admin(&head, "/v1/mesh/nodes/expel", Some(body)).await;
    assert_eq!(status, 200);
    for (wanted, expected) in [("nobody", 404), ("", 404)] {
        let body = json!({ "node": wanted });
        let (status, answer) = admin(&head, "/v1/mesh/nodes/expel", Some(body)).await;
        assert_eq!(status, expected, "{answer}");
    }
    let body = json!({ "node": witness.link.node_id() });
    let (status, answer) = admin(&head, "/v1/mesh/nodes/expel", Some(body)).await;
    assert_eq!(status, 400, "{answer}");
    let (status, _) = head
        .post("/v1/mesh/nodes/expel", json!({ "node": "honest" }))
        .await;
    assert_eq!(status, 401, "an administrator's");

    let (status, _) = admin(&head, "/v1/mesh/nodes/readmit", Some(json!({ "node": id }))).await;
    assert_eq!(status, 200);
    assert_eq!(witness.told().await, [&*id, key], "of the second time");
    assert!(witness.told().await.is_empty());
    let (status, answer) =
        admin(&head, "/v1/mesh/nodes/readmit", Some(json!({ "node": id }))).await;
    assert_eq!(status, 404, "{answer}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_expelled_node_stays_out_when_the_head_starts_again() {
    let head = TestHead::start(|_| {}).await;
    let worker = Raw::join(&head, "attic", "attic").await;
    let body = json!({ "node": "attic" });
    let (status, _) = admin(&head, "/v1/mesh/nodes/expel", Some(body)).await;
    assert_eq!(status, 200);
    let closed = tokio::time::timeout(Duration::from_secs(5), worker.link.closed()).await;
    assert!(
        matches!(closed, Ok(Closed::ByPeer { code, .. }) if code == EXPELLED),
        "{closed:?}"
    );
    let TestHead { handle, dir, .. } = head;
    handle.shutdown().await.unwrap();
    let state_dir = dir.path().to_owned();
    let again = TestHead::start(move |config| config.state_dir = state_dir).await;
    let error = quic::connect(again.address("quic"), &worker.identity)
        .await
        .unwrap_err();
    assert!(
        matches!(&error, ConnectError::Refused { code, .. } if *code == EXPELLED),
        "{error:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_are_listed_without_their_secrets_and_can_be_revoked() {
    let head = TestHead::start(|_| {}).await;
    let body = json!({ "ttl_seconds": 600, "note": "for the barn" });
    let (_, created) = admin(&head, "/v1/mesh/tokens", Some(body)).await;
    let token: JoinToken = created["token"].as_str().unwrap().parse().unwrap();
    let _worker = Raw::join(&head, "attic", "attic").await;
    let (status, list) = admin(&head, "/v1/mesh/tokens", None).await;
    assert_eq!(status, 200);
    let shown = |id: &str| {
        let tokens = list["tokens"].as_array().unwrap();
        tokens.iter().find(|t| t["id"] == id).cloned().unwrap()
    };
    let open = shown(&token.id());
    assert_eq!(
        (&open["state"], &open["uses_left"], &open["note"]),
        (&json!("open"), &json!(1), &json!("for the barn"))
    );
    assert!(open["expires_in_seconds"].as_u64().unwrap() <= 600);
    assert!(open["age_seconds"].as_u64().unwrap() < 600);
    let text = list.to_string();
    let secret = created["token"].as_str().unwrap();
    assert!(!text.contains(secret) && !text.contains("secret"), "{text}");
    let used = list["tokens"].as_array().unwrap().iter();
    let used = used.clone().find(|token| token["state"] == "used").unwrap();
    assert_eq!(
        (&used["used_by"]["name"], &used["uses_left"]),
        (&json!("attic"), &json!(0))
    );

    let revoke = |id: Value| admin(&head, "/v1/mesh/tokens/revoke", Some(json!({ "id": id })));
    let (status, answer) = revoke(json!(token.id())).await;
    assert_eq!(status, 200, "{answer}");
    let (status, answer) = revoke(json!(token.id())).await;
    assert_eq!(
        (status, &answer["error"]["code"]),
        (404, &json!("token_not_found"))
    );
    let (status, answer) = revoke(used["id"].clone()).await;
    assert_eq!(status, 409, "{answer}");
    let message = answer["error"]["message"].as_str().unwrap();
    assert!(message.contains("nodes expel attic"), "{message}");
    let dir = tempfile::tempdir().unwrap();
    let error = quic::join(&[head.address("quic")], &token, dir.path(), "barn").await;
    let error = error.unwrap_err().to_string();
    assert!(error.contains("does not know this token"), "{error}");
    for (path, body) in [
        ("/v1/mesh/tokens/revoke", json!({ "id": "x" })),
        ("/v1/mesh/tokens", json!({})),
    ] {
        assert_eq!(head.post(path, body).await.0, 401, "{path}");
    }
    for path in ["/v1/mesh/tokens", "/v1/mesh/nodes"] {
        assert_eq!(head.get(path).await.0, 401, "{path}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_that_was_taken_back_is_refused_on_connections_that_are_open() {
    let keys = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(keys.path(), "sk-old\nsk-kept\n").unwrap();
    let path = keys.path().to_owned();
    let head = TestHead::start(|config| config.http.api_keys_file = Some(path.clone())).await;
    let mut stream = tokio::net::TcpStream::connect(head.address("http"))
        .await
        .unwrap();
    let mut status = async |key: &str| {
        let request =
            format!("GET /v1/models HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        let mut buffer = [0; 4096];
        // Until the body, whose length is told, is whole.
        loop {
            let read = stream.read(&mut buffer).await.unwrap();
            assert_ne!(read, 0, "the connection stays open");
            answer.extend_from_slice(&buffer[..read]);
            let text = String::from_utf8_lossy(&answer).to_lowercase();
            let Some((head, body)) = text.split_once("\r\n\r\n") else {
                continue;
            };
            let length = head.split("content-length: ").nth(1).unwrap();
            let length: usize = length.lines().next().unwrap().trim().parse().unwrap();
            if body.len() >= length {
                return head[9..12].parse::<u16>().unwrap();
            }
        }
    };
    assert_eq!(status("sk-old").await, 200);
    assert_eq!(status("sk-new").await, 401);
    std::fs::write(keys.path(), "sk-new\nsk-kept\n").unwrap();
    let mut report = Report::default();
    let config = head.handle.mesh().live().clone();
    head.handle.live().reload(&config, &mut report);
    assert_eq!(report.failed, Vec::<String>::new());
    assert_eq!(status("sk-old").await, 401);
    assert_eq!(status("sk-new").await, 200);
    assert_eq!(status("sk-kept").await, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_state_directory_is_private_and_leftovers_of_a_killed_process_go() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("var/head");
    std::fs::create_dir_all(&state).unwrap();
    std::fs::set_permissions(&state, std::fs::Permissions::from_mode(0o700)).unwrap();
    std::fs::write(state.join(".tmpAb12Cd"), "half a key").unwrap();
    let leftover = state.join(".tmpAb12Cd");
    let in_config = state.clone();
    let head = TestHead::start(move |config| config.state_dir = in_config).await;
    assert!(!leftover.exists());
    head.handle.shutdown().await.unwrap();

    let fresh = dir.path().join("new/head");
    let in_config = fresh.clone();
    let head = TestHead::start(move |config| config.state_dir = in_config).await;
    let mode = |path: &std::path::Path| path.metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&fresh), 0o700);
    for entry in std::fs::read_dir(&fresh).unwrap() {
        let path = entry.unwrap().path();
        let public = ["root.crt", "node.crt", "addresses.json"];
        let is_public = public.iter().any(|name| path.ends_with(name));
        let private = if path.is_dir() { 0o700 } else { 0o600 };
        assert!(is_public || mode(&path) == private, "{}", path.display());
    }
    head.handle.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_waits_is_listed_and_joins_when_an_operator_approves_it() {
    let head = TestHead::start(|config| config.trust.approval = ApprovalRule::Manual).await;
    let token = head.token().await;
    let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let address = [head.address("quic")];
    let join = |dir: &TempDir| {
        let (dir, token) = (dir.path().to_owned(), token.clone());
        async move { quic::join(&address, &token, &dir, "attic").await }
    };
    let error = join(&dir).await.unwrap_err();
    assert!(error.is_transient(), "{error:?}");
    let waiting = node(&head, "attic").await;
    assert_eq!(waiting["state"], "pending");
    assert_eq!(waiting["token"], token.id());
    let id = waiting["node_id"].as_str().unwrap().to_owned();
    for (named, expected) in [("barn", 404), (&id[..8], 200), (&id, 200)] {
        let body = json!({ "node": named });
        let (status, answer) = admin(&head, "/v1/mesh/nodes/approve", Some(body)).await;
        assert_eq!(status, expected, "{answer}");
    }
    assert_eq!(node(&head, "attic").await["state"], "approved");
    join(&other).await.unwrap_err();
    let identity = join(&dir).await.unwrap();
    assert_eq!(identity.node_id(), id);
    let known = node(&head, "attic").await;
    assert_eq!(known["state"], "absent");
    assert_eq!(known["algorithm"], "ml-dsa-65");
    assert_eq!(known["key_id"], *identity.member().key_id);
    let (status, _) = head
        .post("/v1/mesh/nodes/approve", json!({ "node": id }))
        .await;
    assert_eq!(status, 401, "an administrator's");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_for_several_nodes_says_who_used_it_and_how_many_may_still() {
    let head = TestHead::start(|_| {}).await;
    for bad in [
        json!({ "nodes": 0 }),
        json!({ "nodes": 1025 }),
        json!({ "role": "head" }),
    ] {
        let (status, answer) = admin(&head, "/v1/mesh/tokens", Some(bad)).await;
        assert_eq!(status, 400, "{answer}");
    }
    let body = json!({ "nodes": 2, "role": "worker", "note": "shelf" });
    let (status, made) = admin(&head, "/v1/mesh/tokens", Some(body)).await;
    assert_eq!(status, 200, "{made}");
    let token: JoinToken = made["token"].as_str().unwrap().parse().unwrap();
    let shown = || async {
        let (_, list) = admin(&head, "/v1/mesh/tokens", None).await;
        let tokens = list["tokens"].as_array().unwrap().iter();
        let mut tokens = tokens.filter(|one| one["id"] == token.id());
        tokens.next().unwrap().clone()
    };
    assert_eq!(shown().await["uses_left"], 2);
    for (name, left, state) in [("attic", 1, "open"), ("barn", 0, "used")] {
        let dir = tempfile::tempdir().unwrap();
        quic::join(&[head.address("quic")], &token, dir.path(), name)
            .await
            .unwrap();
        let token = shown().await;
        assert_eq!(
            (&token["uses_left"], &token["state"]),
            (&json!(left), &json!(state))
        );
        assert_eq!(token["used_by"]["name"], name);
    }
    assert_eq!(shown().await["uses"][0]["name"], "attic");
    assert_eq!(shown().await["nodes"], 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rotated_identity_is_refused_by_all_workers_within_five_seconds_and_its_streams_end() {
    let head = TestHead::start(|_| {}).await;
    let worker = Raw::join(&head, "attic", "attic").await;
    let mut witness = Raw::join(&head, "witness", "witness").await;
    assert!(witness.told().await.is_empty(), "told when it connects");
    let (old, next) = rotate_identity(worker._dir.path()).unwrap();
    let fresh = NodeIdentity::load(worker._dir.path()).unwrap();
    let at = Instant::now();
    quic::renew(&[head.address("quic")], &fresh).await.unwrap();
    assert_eq!(witness.told().await, [old.to_string()]);
    let closed = tokio::time::timeout(Duration::from_secs(5), worker.link.closed()).await;
    assert!(
        matches!(closed, Ok(Closed::ByPeer { code, .. }) if code == EXPELLED),
        "{closed:?}"
    );
    assert!(at.elapsed() < Duration::from_secs(5), "{:?}", at.elapsed());
    let (_, list) = admin(&head, "/v1/mesh/nodes", None).await;
    let nodes = list["nodes"].as_array().unwrap();
    let of = |id: String| nodes.iter().find(|node| node["node_id"] == *id).unwrap();
    assert_eq!(of(old.to_string())["state"], "replaced");
    assert_eq!(of(old.to_string())["replaced_by"], *next.to_string());
    let known = of(next.to_string());
    assert_eq!(known["name"], "attic");
    assert_eq!(known["former_ids"], json!([old.to_string()]));
}
