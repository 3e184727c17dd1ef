//! Rotation of the mesh root at a running head.

mod support;

use std::time::{Duration, SystemTime};

use dcf::{Message, MsgType};
use mesh_head::Config;
use mesh_net::quic::{self, Connector, LinkConfig};
use mesh_net::trust::{
    MeshRoot, NodeIdentity, Role, install_intermediate, read_papers, request_intermediate,
    sign_intermediate,
};
use mesh_proto::{Hello, PROTOCOL_VERSION, SignedSuccession};
use prost::Message as _;
use serde_json::{Value, json};
use support::TestHead;

async fn admin(head: &TestHead, path: &str, body: Option<Value>) -> (u16, Value) {
    let request = match body {
        Some(body) => head.http.post(head.url(path)).json(&body),
        None => head.http.get(head.url(path)),
    };
    let answer = request.bearer_auth(head.admin_key()).send().await.unwrap();
    let status = answer.status().as_u16();
    (status, answer.json().await.unwrap_or_default())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connected_worker_hears_of_a_new_root_and_so_does_one_that_connects_later() {
    let head = TestHead::start(|_| {}).await;
    let [dir, later] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let address = head.address("quic");
    let join = async |dir: &tempfile::TempDir, name: &str| {
        let token = head.token().await;
        quic::join(&[address], &token, dir.path(), name)
            .await
            .unwrap()
    };
    let worker = join(&dir, "attic").await;
    let absent = join(&later, "barn").await;
    let succession = hear_of_a_root(&head, &worker);
    let rotate = async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        let refused = admin(
            &head,
            "/v1/mesh/root/rotate",
            Some(json!({ "overlap_seconds": 5 })),
        );
        assert_eq!(refused.await.0, 400, "too short for anybody to hear of it");
        admin(&head, "/v1/mesh/root/rotate", Some(json!({}))).await
    };
    let (succession, (status, rotated)) = tokio::join!(succession, rotate);
    assert_eq!(status, 200, "{rotated}");
    let old = data_encoding::HEXLOWER.encode(&worker.root_sha256());
    assert_eq!(rotated["former"]["root"], old);
    assert_eq!(
        admin(&head, "/v1/mesh/root", None).await,
        (200, rotated.clone())
    );
    let until = rotated["former"]["accepted_until"].as_u64().unwrap();
    let in_days = (until - mesh_base::clock::unix_seconds(SystemTime::now())) / 86_400;
    assert!((29..=30).contains(&in_days), "{in_days}");
    let (status, refused) = admin(&head, "/v1/mesh/root/rotate", Some(json!({}))).await;
    assert_eq!(
        (status, &refused["error"]["code"]),
        (409, &json!("rotation_under_way"))
    );

    assert!(worker.learn(&succession).unwrap());
    quic::renew(&[address], &worker).await.unwrap();
    assert!(!worker.is_root_due());
    assert_eq!(
        rotated["root"],
        data_encoding::HEXLOWER.encode(&worker.root_sha256())
    );
    let heard = hear_of_a_root(&head, &absent).await;
    assert!(absent.learn(&heard).unwrap());
    // New tokens pin the new root, and the rotation outlasts the head's process.
    assert_eq!(*head.token().await.root_sha256(), worker.root_sha256());
    let TestHead { handle, dir, .. } = head;
    handle.shutdown().await.unwrap();
    let state_dir = dir.path().to_owned();
    let again = TestHead::start(move |config: &mut Config| config.state_dir = state_dir).await;
    let shown = again.http.get(again.url("/v1/mesh/root"));
    let key = std::fs::read_to_string(dir.path().join("admin.key")).unwrap();
    let shown = shown.bearer_auth(key.trim()).send().await.unwrap();
    assert_eq!(shown.json::<Value>().await.unwrap(), rotated);
    let own = NodeIdentity::load(dir.path()).unwrap();
    assert!(!own.is_root_due());
    again.handle.shutdown().await.unwrap();
}

/// Connects as a worker does, and waits for the message.
async fn hear_of_a_root(head: &TestHead, identity: &NodeIdentity) -> SignedSuccession {
    let address = head.address("quic");
    let connector = Connector::toward(address, identity.clone(), LinkConfig::default()).unwrap();
    let link = connector.connect(address, Role::Head).await.unwrap();
    let mut control = link.open().await.unwrap();
    let hello = Hello {
        protocol: PROTOCOL_VERSION,
        ..Hello::default()
    };
    let hello = Message::new(MsgType::HELLO, 0, 0, hello.encode_to_vec());
    control.send(hello).await.unwrap();
    let heard = async {
        loop {
            let message = control.recv().await.unwrap().expect("a message");
            if message.kind == MsgType::ROOT_SUCCESSION {
                return SignedSuccession::decode(message.payload).unwrap();
            }
        }
    };
    let heard = tokio::time::timeout(Duration::from_secs(5), heard).await;
    assert!(link.close_reason().is_none());
    heard.expect("it is told in time")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_head_with_an_intermediate_alone_starts_admits_and_endorses_its_trail() {
    let (dir, now) = (tempfile::tempdir().unwrap(), SystemTime::now());
    let root = MeshRoot::load_or_create(dir.path(), "hydramesh").unwrap();
    let key = dir.path().join("root.key");
    let request = request_intermediate(dir.path()).unwrap();
    let signed = sign_intermediate(&key, &request, Duration::from_secs(86_400), now).unwrap();
    let until = install_intermediate(dir.path(), &signed, now).unwrap();
    std::fs::remove_file(&key).unwrap();
    let head = TestHead::start(|config| config.state_dir = dir.path().to_owned()).await;
    let admin_key = std::fs::read_to_string(dir.path().join("admin.key")).unwrap();
    let shown = head.http.get(head.url("/v1/mesh/root"));
    let shown = shown.bearer_auth(admin_key.trim()).send().await.unwrap();
    let shown: Value = shown.json().await.unwrap();
    assert_eq!(shown["intermediate_until"], until);
    let rotate = head.http.post(head.url("/v1/mesh/root/rotate"));
    let rotate = rotate.bearer_auth(admin_key.trim()).json(&json!({}));
    let refused = rotate.send().await.unwrap();
    assert!(refused.status().is_client_error() || refused.status().is_server_error());
    let text = refused.text().await.unwrap();
    assert!(text.contains("root.key"), "{text}");
    let TestHead { handle, .. } = head;
    handle.shutdown().await.unwrap();
    let trail = dir.path().join("audit").join("master");
    let archive = mesh_audit::archive::Archive::open(&trail).unwrap();
    let document = archive.document().unwrap().expect("the trail is endorsed");
    let document = read_papers(&document).unwrap();
    assert_eq!(document.root, root.sha256());
    assert_eq!(document.role, "head");
}
