//! Gossip over a running head: workers reach each other through it, and it shows the fleet.

mod support;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use dcf::{Message, MsgType};
use mesh_audit::archive::Archive;
use mesh_audit::home::{Lock, Tier};
use mesh_audit::kept::{SHOWN, ShownEpochs};
use mesh_audit::record;
use mesh_audit::store::Limits;
use mesh_gossip::{Config, Event, Gossip, MemberState, Now, Pulse, Refusal};
use mesh_identity::NodeId;
use mesh_net::quic::{self, Connector, LinkConfig};
use mesh_net::trust::{NodeIdentity, Role};
use mesh_proto::{GossipFrame, GossipIdentities, Hello, PROTOCOL_VERSION};
use prost::Message as _;
use serde_json::json;
use support::{Script, TestHead, eventually};
use tempfile::TempDir;

/// A node that gossips over its link to the head and does nothing else.
struct Node {
    core: Arc<Mutex<Gossip>>,
    sighted: Arc<Mutex<Vec<String>>>,
    id: NodeId,
    /// Sends this frame, which need not be its own, to a node.
    send: tokio::sync::mpsc::Sender<(Vec<u8>, NodeId)>,
    _dir: TempDir,
}

fn now() -> Now {
    Now {
        instant: Instant::now(),
        unix: mesh_base::clock::unix_seconds(SystemTime::now()),
    }
}

fn message(kind: MsgType, body: &impl prost::Message) -> Message {
    Message::new(kind, 0, 0, body.encode_to_vec())
}

fn sent(frame: Vec<u8>, to: &[NodeId]) -> Message {
    let to = to.iter().map(|to| to.as_bytes().to_vec()).collect();
    message(MsgType::GOSSIP, &GossipFrame { to, frame })
}

async fn join(head: &TestHead, name: &str, seed: u64) -> Node {
    let dir = tempfile::tempdir().unwrap();
    let (address, token) = (head.address("quic"), head.token().await);
    let joined = quic::join(&[address], &token, dir.path(), name).await;
    let identity: NodeIdentity = joined.unwrap();
    let signer = identity.signer().unwrap();
    let config = Config {
        interval: Duration::from_millis(300),
        most_peers: 8,
        epoch: now().unix,
        seed,
    };
    let mesh = (identity.root_sha256(), signer.root);
    let mut core = Gossip::new(config, signer.key, mesh, now());
    core.set_pulse(Pulse {
        memory_total: Some(seed << 40),
        ..Pulse::default()
    });
    let id = core.own_id();
    let core = Arc::new(Mutex::new(core));
    let sighted = Arc::new(Mutex::new(Vec::new()));
    let (send, mut to_send) = tokio::sync::mpsc::channel::<(Vec<u8>, NodeId)>(8);
    let (gossip, heard) = (core.clone(), sighted.clone());
    tokio::spawn(async move {
        let connector = Connector::toward(address, identity, LinkConfig::default()).unwrap();
        let link = connector.connect(address, Role::Head).await.unwrap();
        let mut control = link.open().await.unwrap();
        let hello = Hello {
            protocol: PROTOCOL_VERSION,
            ..Hello::default()
        };
        control.send(message(MsgType::HELLO, &hello)).await.unwrap();
        let (mut out, mut control) = control.split();
        let mut ticks = tokio::time::interval(Duration::from_millis(20));
        let mut shown = false;
        loop {
            let received = tokio::select! {
                received = control.recv() => received,
                Some((frame, to)) = to_send.recv() => {
                    out.send(sent(frame, &[to])).await.unwrap();
                    continue;
                }
                _ = ticks.tick() => {
                    let frames: Vec<_> = {
                        let mut core = gossip.lock().unwrap();
                        std::iter::from_fn(|| core.poll(now())).collect()
                    };
                    for transmit in frames {
                        out.send(sent(transmit.frame, &transmit.to)).await.unwrap();
                    }
                    continue;
                }
            };
            let Ok(Some(received)) = received else { return };
            match received.kind {
                MsgType::GOSSIP_IDENTITIES => {
                    let told = GossipIdentities::decode(received.payload).unwrap();
                    for document in told.documents {
                        gossip.lock().unwrap().introduce(&document, now()).unwrap();
                    }
                    if !std::mem::replace(&mut shown, true) {
                        let documents = vec![signer.document.clone()];
                        let own = GossipIdentities { documents };
                        out.send(message(MsgType::GOSSIP_IDENTITIES, &own))
                            .await
                            .unwrap();
                    }
                }
                MsgType::GOSSIP => {
                    let frame = GossipFrame::decode(received.payload).unwrap().frame;
                    let mut core = gossip.lock().unwrap();
                    let _ = core.receive(&frame, now());
                    while let Some(event) = core.poll_event() {
                        if let Event::Sighted(sighting) = event {
                            heard.lock().unwrap().push(sighting.subject);
                        }
                    }
                }
                _ => {}
            }
        }
    });
    Node {
        core,
        sighted,
        id,
        send,
        _dir: dir,
    }
}

impl Node {
    /// Peers that it takes for alive.
    fn alive(&self) -> BTreeMap<String, String> {
        let members = self.core.lock().unwrap().members(now());
        let alive = members
            .into_iter()
            .filter(|member| member.state == MemberState::Alive);
        alive.map(|member| (member.name, member.role)).collect()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workers_gossip_through_the_head_and_hear_of_an_expulsion() {
    let head = TestHead::start(|config| config.gossip.interval = Duration::from_millis(300)).await;
    // One of an earlier version, which ignores the invitation.
    let _old = head.worker("old", Script::default()).await;
    let (attic, barn) = (join(&head, "attic", 1).await, join(&head, "barn", 2).await);
    let knows = |node: &Node, other: &str| {
        let alive = node.alive();
        alive.len() == 2 && alive["head"] == "head" && alive[other] == "worker"
    };
    eventually("both know each other", || async {
        knows(&attic, "barn") && knows(&barn, "attic")
    })
    .await;
    eventually("the head shows the fleet", || async {
        let (_, mesh) = head.get("/v1/mesh").await;
        let fleet = &mesh["gossip"]["fleet"];
        mesh["gossip"]["alive"] == 2
            && fleet["nodes"] == 3
            && fleet["memory_total"].as_u64() >= Some(3 << 40)
    })
    .await;

    // The head carries no frame under another node's name, and those that come change nothing.
    let forged = barn.core.lock().unwrap().sign_content(b"");
    attic.send.send((forged, barn.id)).await.unwrap();
    let mut own = attic.core.lock().unwrap().sign_content(b"");
    *own.last_mut().unwrap() ^= 1;
    attic.send.send((own, barn.id)).await.unwrap();
    eventually("a changed frame is refused by its receiver", || async {
        let counts = barn.core.lock().unwrap().counts();
        counts.refused_for(Refusal::Signature) == 1
    })
    .await;
    let counts = barn.core.lock().unwrap().counts();
    assert_eq!(counts.refused_for(Refusal::Own), 0, "it was carried");

    let request = head
        .http
        .post(head.url("/v1/mesh/nodes/expel"))
        .bearer_auth(head.admin_key());
    let body = json!({ "node": "old", "reason": "sold" });
    assert_eq!(request.json(&body).send().await.unwrap().status(), 200);
    eventually("both hear of it", || async {
        let heard = |node: &Node| node.sighted.lock().unwrap().len();
        heard(&attic) == 1 && heard(&barn) == 1
    })
    .await;
    let (_, mesh) = head.get("/v1/mesh").await;
    assert_eq!(mesh["gossip"]["threats"], 1);
    eventually("the metrics count the peers", || async {
        let metrics = head.http.get(head.url("/metrics")).send().await.unwrap();
        let metrics = metrics.text().await.unwrap();
        metrics.contains("hydramesh_head_gossip_members{state=\"alive\"} 2")
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn epochs_of_the_audit_trail_reach_the_nodes_and_their_sightings_reach_the_head() {
    let prepared = tempfile::tempdir().unwrap();
    let dir = prepared.path().join("audit");
    let now_ms = 1000 * now().unix;
    let mut epochs = Vec::new();
    {
        let folder = Lock::take(&dir).unwrap();
        let opened = folder.open(Tier::Master, "mesh", None, Limits::default(), now_ms);
        let mut store = opened.unwrap().store;
        for _ in 0..6 {
            store.append(&record::Event::Stop, now_ms).unwrap();
            store.end_epoch(now_ms).unwrap();
        }
        epochs.extend(store.ended_epochs(SHOWN).unwrap());
    }
    let head = TestHead::start(|config| {
        config.gossip.interval = Duration::from_millis(300);
        config.state_dir = prepared.path().to_owned();
    })
    .await;
    let key = std::fs::read_to_string(prepared.path().join("admin.key")).unwrap();
    std::fs::write(head.dir.path().join("admin.key"), key).unwrap();
    let attic = join(&head, "attic", 1).await;
    eventually("it is shown the epochs", || async {
        let memory = attic.core.lock().unwrap().memory();
        let mut shown = memory
            .iter()
            .filter_map(|record| ShownEpochs::read(&record.name, &record.value));
        shown.any(|shown| shown.tier == Tier::Master && shown.epochs == epochs)
    })
    .await;

    let sighting = ("bad-piece", "barn", "piece 3 of a model");
    attic.core.lock().unwrap().sight(sighting, now()).unwrap();
    eventually("the head shows the sighting", || async {
        let (_, mesh) = head.get("/v1/mesh").await;
        let shown = &mesh["gossip"]["sightings"][0];
        shown["kind"] == "bad-piece"
            && shown["subject"] == "barn"
            && shown["detail"] == "piece 3 of a model"
            && shown["reporter"] == attic.id.to_string()
            && shown["reporter_name"] == "attic"
    })
    .await;
    eventually("it is in the audit trail", || async {
        let archive = Archive::open(&dir.join("master")).unwrap();
        let mut found = false;
        let read = archive.entries(0, |_, entry| {
            let event = record::split(entry).map(|(text, _)| record::event(text));
            found |= matches!(event, Ok(Some(record::Event::Sighting { .. })));
            true
        });
        read.unwrap();
        found
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_head_without_gossip_invites_nobody() {
    let head = TestHead::start(|config| config.gossip.enabled = false).await;
    let attic = join(&head, "attic", 1).await;
    eventually("it is connected", || async {
        let (_, mesh) = head.get("/v1/mesh").await;
        mesh["workers"].as_array().unwrap().len() == 1
    })
    .await;
    let (_, mesh) = head.get("/v1/mesh").await;
    assert!(mesh["gossip"].is_null() && attic.alive().is_empty());
}
