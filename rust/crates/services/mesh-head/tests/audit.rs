//! The audit trail of a running head.

mod support;

use std::path::Path;

use mesh_audit::archive::Archive;
use mesh_audit::record;
use mesh_audit::verify::{Options, verify};
use serde_json::{Value, json};
use support::{Script, TestHead, chat};

/// All records of the trail of a tier, verified.
fn records(state_dir: &Path, tier: &str) -> Vec<Value> {
    let archive = Archive::open(&state_dir.join("audit").join(tier)).unwrap();
    let report = verify(&archive, &Options::default()).unwrap();
    assert_eq!(report.findings, []);
    assert_eq!(report.signed, report.size);
    let mut records = Vec::new();
    let read = archive.entries(0, |_, entry| {
        let (text, _) = record::split(entry).unwrap();
        records.push(serde_json::from_slice(text).unwrap());
        true
    });
    read.unwrap();
    records
}

fn of<'a>(records: &'a [Value], kind: &str) -> Vec<&'a Value> {
    records
        .iter()
        .filter(|record| record["kind"] == kind)
        .collect()
}

async fn admin(head: &TestHead, path: &str, body: Value) -> u16 {
    let request = head.http.post(head.url(path)).bearer_auth(head.admin_key());
    let sent = request.json(&body).send().await.unwrap();
    sent.status().as_u16()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn decisions_and_requests_are_in_the_trail_and_no_text_is() {
    let head = TestHead::start(|_| {}).await;
    let _worker = head.worker("attic", Script::default()).await;
    head.until_ready("attic").await;
    let (status, answer) = head
        .post("/v1/chat/completions", chat("my secret question", 3))
        .await;
    assert_eq!(status, 200, "{answer}");
    let body =
        json!({ "model": "no such model", "messages": [{ "role": "user", "content": "x" }] });
    assert_eq!(head.post("/v1/chat/completions", body).await.0, 404);
    assert_eq!(
        admin(&head, "/v1/mesh/drain", json!({ "worker": "attic" })).await,
        200
    );
    assert_eq!(
        admin(&head, "/v1/mesh/undrain", json!({ "worker": "attic" })).await,
        200
    );
    let body = json!({ "node": "attic", "reason": "sold" });
    assert_eq!(admin(&head, "/v1/mesh/nodes/expel", body).await, 200);
    let metrics = head.http.get(head.url("/metrics")).send().await.unwrap();
    let metrics = metrics.text().await.unwrap();
    assert!(
        metrics.contains("hydramesh_head_audit_records_total{state=\"lost\"} 0"),
        "{metrics}"
    );
    let TestHead { handle, dir, .. } = head;
    handle.shutdown().await.unwrap();

    let master = records(dir.path(), "master");
    assert_eq!(master[0]["kind"], "start");
    assert_eq!(master.last().unwrap()["kind"], "stop");
    let joins = of(&master, "join");
    let joined = joins.iter().find(|join| join["how"] == "joined").unwrap();
    assert_eq!(joined["name"], "attic");
    let token = &joined["token"];
    let tokens = of(&master, "token");
    assert!(
        tokens
            .iter()
            .any(|one| one["token"] == *token && one["decision"] == "created"),
        "{tokens:?}"
    );
    assert!(
        tokens
            .iter()
            .any(|one| one["token"] == *token && one["decision"] == "used"),
        "{tokens:?}"
    );
    let connected = joins
        .iter()
        .find(|join| join["how"] == "connected")
        .unwrap();
    assert_eq!(connected["node"], joined["node"]);
    assert_eq!(of(&master, "model")[0]["models"][0], support::MODEL);
    let drains: Vec<&Value> = of(&master, "drain")
        .iter()
        .map(|drain| &drain["decision"])
        .collect();
    assert_eq!(drains, ["drained", "undrained"]);
    let revoked = of(&master, "revoke")[0];
    assert_eq!(
        (&revoked["decision"], &revoked["reason"]),
        (&json!("expelled"), &json!("sold"))
    );
    assert!(!of(&master, "leave").is_empty());
    assert!(
        of(&master, "message")
            .iter()
            .all(|message| message["from"] == joined["node"])
    );

    let public = records(dir.path(), "grimoire-public");
    let outcomes: Vec<&Value> = public.iter().map(|request| &request["outcome"]).collect();
    assert_eq!(outcomes, ["complete", "rejected"]);
    assert_eq!(
        (&public[0]["model"], &public[0]["task"]),
        (&json!(support::MODEL), &json!("generate"))
    );
    let all = format!("{master:?}{public:?}");
    for text in [
        "secret question",
        &std::fs::read_to_string(dir.path().join("admin.key")).unwrap(),
    ] {
        assert!(!all.contains(text.trim()), "{text} is in the trail");
    }

    // The next life goes on in the same trails.
    let before = master.len();
    let state_dir = dir.path().to_owned();
    let again = TestHead::start(move |config| config.state_dir = state_dir).await;
    again.handle.shutdown().await.unwrap();
    let master = records(dir.path(), "master");
    assert_eq!(master.len(), before + 2);
    assert_eq!(master[before]["kind"], "start");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_head_without_a_trail_writes_none() {
    let head = TestHead::start(|config| config.audit.enabled = false).await;
    let TestHead { handle, dir, .. } = head;
    handle.shutdown().await.unwrap();
    assert!(!dir.path().join("audit").exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn envelopes_of_dcf_messages_are_in_the_trail_and_the_heads_identity_endorses_it() {
    let head = TestHead::start(|config| {
        config.dcf.legacy_workers = true;
        config.drain_limit = std::time::Duration::from_millis(300);
    })
    .await;
    let peer = head.dcf().await;
    // Two Chunks of three, Health in both versions, and what is no message of a client.
    let chunk = |index: u16| {
        let place = [3_u16.to_be_bytes(), index.to_be_bytes()].concat();
        [&place[..], &[7; 16], b"some text"].concat()
    };
    peer.send(0x06, 1, &chunk(0)).await;
    peer.send(0x06, 1, &chunk(1)).await;
    peer.send(0x02, 2, b"my secret question").await;
    peer.send_new(0x02, 3, b"my secret question").await;
    peer.send(0x7E, 4, b"junk").await;
    peer.send(0x08, 5, b"").await;
    peer.send_new(0x08, 6, b"").await;
    let worker = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let bus = head.address("dcf.workers");
    for kind in [0x08, 0x01] {
        let port = worker.local_addr().unwrap().port().to_string();
        let message = support::datagram(kind, 0, port.as_bytes());
        worker.send_to(&message, bus).await.unwrap();
    }
    support::eventually("the worker is there", || async {
        head.get("/v1/mesh").await.1["workers"][0]["kind"] == "v5.0.0"
    })
    .await;
    // All that was sent before has been taken once this is answered.
    peer.send(0x08, 7, b"").await;
    while peer
        .receive_raw(std::time::Duration::from_secs(5))
        .await
        .is_some_and(|answer| answer[..5] != [0x08, 0, 0, 0, 7])
    {}
    let TestHead { handle, dir, .. } = head;
    handle.shutdown().await.unwrap();

    let master = records(dir.path(), "master");
    let counted = |carrier: &str, message: &str| {
        let all = of(&master, "message").into_iter();
        let like = all.filter(|one| one["carrier"] == carrier && one["message"] == message);
        like.map(|one| one["count"].as_u64().unwrap()).sum::<u64>()
    };
    let counts = ["Chunk", "Task", "Health"].map(|kind| counted("dcf", kind));
    assert_eq!(counts, [2, 2, 3], "{:?}", of(&master, "message"));
    assert_eq!(
        ["Health", "Heartbeat"].map(|kind| counted("bus", kind)),
        [1, 1]
    );
    let joins = of(&master, "join");
    assert!(
        joins.iter().any(|join| join["how"] == "without identity"),
        "{joins:?}"
    );
    assert!(!format!("{master:?}").contains("secret question"));

    let identity = mesh_net::trust::NodeIdentity::load(dir.path()).unwrap();
    let archive = Archive::open(&dir.path().join("audit/master")).unwrap();
    let report = verify(&archive, &Options::default()).unwrap();
    let key = identity.public_key().unwrap();
    assert_eq!(report.identity.as_deref(), Some(key.as_bytes()));
    let document = archive.document().unwrap().unwrap();
    let document = mesh_net::trust::read_papers(&document).unwrap();
    assert_eq!((document.key, document.root), (key, identity.root_sha256()));
}
