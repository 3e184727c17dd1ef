//! A worker whose certificate, files or membership are not what they should be, against a head that is only
//! its listener. It serves nothing.

#[allow(dead_code, reason = "other tests use more of it")]
mod common;

use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, SystemTime};

use dcf::{Message, MsgType};
use mesh_net::quic::{self, Connector, LinkConfig, timestamp_us};
use mesh_net::trust::{EXPELLED, NodeIdentity, Role, Validity};
use mesh_proto::{Expelled, ExpelledNode, Models};
use mesh_service::ask;
use mesh_testkit::paths;
use mesh_worker::{Config, Worker, WorkerError, WorkerHandle};
use prost::Message as _;
use tempfile::TempDir;
use tokio::time::timeout;

use common::{ANY, Head, PATIENCE};

const LIFE: Duration = Duration::from_secs(3600);

/// A head whose certificates are good for so long, and are not renewed after that.
async fn head_for(dir: TempDir, life: Duration) -> Head {
    let validity = Validity {
        life,
        renewal_grace: Duration::ZERO,
    };
    Head::open(dir, validity).await
}

async fn join(head: &Head, dir: &Path, name: &str) -> NodeIdentity {
    let token = head.token().parse().unwrap();
    let joined = quic::join(&[head.address()], &token, dir, name).await;
    joined.unwrap()
}

fn config(state: &Path, head: &Head) -> Config {
    let models = state.join("no-models");
    std::fs::create_dir_all(&models).unwrap();
    let mut config = Config {
        state_dir: state.to_owned(),
        node_name: Some("laptop".to_owned()),
        head: Some(head.address().to_string()),
        local_models: Some(models),
        ort_library: Some(paths::ort_library().unwrap()),
        threads: 1,
        ..Config::default()
    };
    (config.http.listen, config.dcf.listen, config.ring.listen) = (ANY, ANY, ANY);
    config
}

async fn worker(config: Config) -> WorkerHandle {
    let started = timeout(PATIENCE, Worker::start(config)).await;
    started.unwrap().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_was_away_for_too_long_takes_a_new_token_and_stays_the_same_node() {
    let head = head_for(tempfile::tempdir().unwrap(), Duration::from_secs(1)).await;
    let state = tempfile::tempdir().unwrap();
    let before = join(&head, state.path(), "laptop").await.node_id();
    tokio::time::sleep(Duration::from_millis(2100)).await;
    let Head {
        dir,
        listener,
        authority,
        ..
    } = head;
    drop((listener, authority));
    let head = head_for(dir, LIFE).await;

    // The token in its configuration is used up.
    let elsewhere = tempfile::tempdir().unwrap();
    let used = head.token();
    let token = used.parse().unwrap();
    quic::join(&[head.address()], &token, elsewhere.path(), "other")
        .await
        .unwrap();
    let file = state.path().join("token");
    std::fs::write(&file, &used).unwrap();
    let mut config = config(state.path(), &head);
    config.join_token_file = Some(file.clone());
    let worker = worker(config).await;
    let early = timeout(Duration::from_secs(2), head.listener.accept()).await;
    assert!(early.is_err(), "it has no certificate that holds");
    let said = ask::get(state.path(), "/ready").await.unwrap_err();
    assert!(said.to_string().contains("new token"), "{said}");

    std::fs::write(&file, head.token()).unwrap();
    let (link, _control, _) = head.accept().await;
    assert_eq!(link.node_id(), before);
    worker.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_identity_that_is_not_whole_is_named_and_left_alone() {
    let head = head_for(tempfile::tempdir().unwrap(), LIFE).await;
    for file in ["node.key", "node.crt", "root.crt", "expelled.json"] {
        let state = tempfile::tempdir().unwrap();
        join(&head, state.path(), "laptop").await;
        std::fs::write(state.path().join(file), "junk").unwrap();
        let started = Worker::start(config(state.path(), &head)).await;
        let Err(error @ WorkerError::Identity(_)) = started else {
            panic!("{file}: it started");
        };
        let error = error.to_string();
        assert!(error.contains(file) && error.contains("damaged"), "{error}");
        let text = std::fs::read_to_string(state.path().join(file)).unwrap();
        assert_eq!(text, "junk");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_expelled_worker_says_so_and_asks_rarely() {
    let head = head_for(tempfile::tempdir().unwrap(), LIFE).await;
    let state = tempfile::tempdir().unwrap();
    let identity = join(&head, state.path(), "laptop").await;
    let worker = worker(config(state.path(), &head)).await;
    let (link, _control, _) = head.accept().await;
    let expelled = head
        .authority
        .expel(&identity.node_id(), "laptop", "sold", SystemTime::now());
    expelled.unwrap();
    assert!(link.close_reason().is_some());
    let mut said = String::new();
    for _ in 0..100 {
        tokio::time::sleep(Duration::from_millis(100)).await;
        said = ask::get(state.path(), "/ready")
            .await
            .unwrap_err()
            .to_string();
        if said.contains("refused the connection") {
            break;
        }
    }
    assert!(
        said.contains("expelled") && said.contains("sold") && said.contains("nodes readmit"),
        "{said}"
    );
    // One that has lost its certificate and comes with a new token is the same node.
    let copy = tempfile::tempdir().unwrap();
    std::fs::copy(state.path().join("node.key"), copy.path().join("node.key")).unwrap();
    let mut config = config(copy.path(), &head);
    config.join_token = Some(head.token());
    let started = timeout(PATIENCE, Worker::start(config)).await.unwrap();
    let second = started.expect("it stays up and asks rarely");
    let open = head.authority.token_records();
    assert!(open.iter().any(|record| record.uses.is_empty()));
    second.shutdown().await.unwrap();

    head.authority.readmit(&identity.node_id()).unwrap();
    let again = timeout(Duration::from_secs(7), head.listener.accept()).await;
    assert!(again.is_err(), "it used to ask every five seconds");
    worker.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_has_no_dealings_with_nodes_that_the_head_names_also_after_a_restart() {
    let head = head_for(tempfile::tempdir().unwrap(), LIFE).await;
    let (state, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    join(&head, state.path(), "laptop").await;
    let rogue = join(&head, elsewhere.path(), "rogue").await;
    let mut config = config(state.path(), &head);
    // It shares models, so it listens for others.
    config.store.dir = Some(state.path().join("store"));
    let running = worker(config.clone()).await;
    let (_link, mut control, _) = head.accept().await;
    let port = async {
        loop {
            let message = control.recv().await.unwrap().expect("a message");
            if message.kind == MsgType::MODELS {
                return Models::decode(message.payload).unwrap().port;
            }
        }
    };
    let port = timeout(PATIENCE, port).await.unwrap();
    let address = SocketAddr::new(ANY.ip(), u16::try_from(port).unwrap());
    let connector = Connector::bind(ANY, rogue.clone(), LinkConfig::default()).unwrap();
    let link = connector.connect(address, Role::Worker).await.unwrap();

    let list = Expelled {
        nodes: vec![ExpelledNode {
            node_id: rogue.node_id(),
            name: "rogue".to_owned(),
            since: 1_795_910_400,
        }],
    };
    let list = Message::new(MsgType::EXPELLED, 0, timestamp_us(), list.encode_to_vec());
    control.send(list).await.unwrap();
    let closed = timeout(Duration::from_secs(5), link.closed()).await;
    let closed = closed.expect("within five seconds").to_string();
    assert!(closed.contains("expelled"), "{closed}");
    let refused = connector.connect(address, Role::Worker).await.unwrap_err();
    assert!(
        matches!(&refused, quic::ConnectError::Refused { code, .. } if *code == EXPELLED),
        "{refused:?}"
    );
    running.shutdown().await.unwrap();
    let kept = NodeIdentity::load(state.path()).unwrap();
    assert!(kept.deny_list().contains(&rogue.node_id()));
    drop(head.dir);
}
