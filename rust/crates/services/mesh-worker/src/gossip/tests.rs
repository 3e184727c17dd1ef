//! A worker that gossips with a head's node, whose frames the test carries.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::SystemTime;

use arcanum_attestor::Attestor;
use mesh_audit::home::Tier;
use mesh_audit::kept::{EpochRoot, Kept, ShownEpochs};
use mesh_net::quic::{LinkConfig, Listener, join};
use mesh_net::trust::Validity;
use prost::Message as _;
use tempfile::TempDir;

use super::*;

struct Pair {
    head: Gossip,
    head_identity: NodeIdentity,
    identity: NodeIdentity,
    config: GossipConfig,
    dirs: [TempDir; 2],
}

impl Pair {
    async fn new() -> Self {
        let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let now = SystemTime::now();
        let authority = Attestor::open(dirs[0].path(), "attic", Validity::default()).unwrap();
        let head_identity = authority.head_identity(dirs[0].path(), "head", now);
        let head_identity = head_identity.unwrap();
        let hour = Duration::from_secs(3600);
        let token = authority.create_token(hour, "test", now).unwrap();
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let admission = Some(Arc::new(authority) as Arc<_>);
        let listener = Listener::bind(any, head_identity.clone(), admission, LinkConfig::default());
        let listener = listener.unwrap();
        let address = listener.local_addr().unwrap();
        let joined = join(&[address], &token, dirs[1].path(), "worker").await;
        Self {
            head: node(&head_identity),
            head_identity,
            identity: joined.unwrap(),
            config: GossipConfig::default(),
            dirs,
        }
    }

    /// The worker as after a start.
    fn worker(&mut self) -> WorkerGossip {
        let worker = WorkerGossip::new(self.config.clone(), self.dirs[1].path().to_owned());
        let documents = vec![self.head_identity.signer().unwrap().document];
        worker.introduced(&self.identity, &GossipIdentities { documents });
        let document = self.identity.signer().unwrap().document;
        self.head.introduce(&document, now(&self.identity)).unwrap();
        worker
    }

    fn publish(&mut self, shown: &ShownEpochs) {
        let (name, life) = (shown.record_name(), Duration::from_secs(3600));
        let value = shown.to_value();
        let now = now(&self.identity);
        self.head
            .remember(name.as_bytes(), &value, life, now)
            .unwrap();
    }

    /// Carries frames until the head's node tells an event that is looked for, or for two seconds.
    async fn carry<T>(
        &mut self,
        worker: &WorkerGossip,
        look: impl Fn(&WorkerGossip, Option<Event>) -> Option<T>,
    ) -> Option<T> {
        for _ in 0..200 {
            while let Some(transmit) = self.head.poll(now(&self.identity)) {
                worker.receive(&GossipFrame {
                    to: Vec::new(),
                    frame: transmit.frame,
                });
            }
            while let Ok(message) = worker.poll() {
                if message.kind == MsgType::GOSSIP {
                    let frame = GossipFrame::decode(message.payload).unwrap().frame;
                    let _ = self.head.receive(&frame, now(&self.identity));
                }
            }
            let mut event = self.head.poll_event();
            loop {
                if let Some(found) = look(worker, event.take()) {
                    return Some(found);
                }
                event = self.head.poll_event();
                if event.is_none() {
                    break;
                }
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        None
    }
}

/// A head's node that begins anew.
fn node(identity: &NodeIdentity) -> Gossip {
    let (now, signer) = (now(identity), identity.signer().unwrap());
    let config = Config {
        interval: Duration::from_millis(200),
        most_peers: 4,
        epoch: now.unix,
        seed: 1,
    };
    let mesh = (identity.root_sha256(), signer.root);
    Gossip::new(config, signer.key, mesh, now)
}

fn sighted(event: Option<Event>) -> Option<(String, String, String)> {
    match event {
        Some(Event::Sighted(it)) => Some((it.kind, it.subject, it.detail)),
        _ => None,
    }
}

#[tokio::test]
async fn a_head_that_shows_another_past_than_a_worker_kept_is_reported_after_a_restart_too() {
    let mut pair = Pair::new().await;
    let worker = pair.worker();
    let shown = |root: u8| ShownEpochs {
        tier: Tier::Master,
        trail: "attic/audit/master/1-00".to_owned(),
        epochs: vec![EpochRoot {
            epoch: 3,
            size: 99,
            root: [root; 32],
            note: [root; 32],
        }],
    };
    pair.publish(&shown(1));
    let dir = pair.dirs[1].path().to_owned();
    let save = |worker: &WorkerGossip| {
        let mut guard = lock(&worker.inner);
        let unsaved = guard.as_mut().unwrap().keeper.unsaved();
        unsaved.map(|unsaved| unsaved.write())
    };
    assert!(
        pair.carry(&worker, |worker, _| save(worker))
            .await
            .is_some()
    );
    let kept = Kept::read(&dir).unwrap();
    assert_eq!(kept.epochs_of("attic/audit/master/1-00"), shown(1).epochs);

    // Both begin anew, and the head has written its trail anew meanwhile.
    pair.head = node(&pair.head_identity);
    let worker = pair.worker();
    pair.publish(&shown(2));
    let told = pair.carry(&worker, |_, event| sighted(event)).await;
    let (kind, subject, detail) = told.unwrap();
    assert_eq!(
        (&kind[..], subject),
        ("audit-rewritten", pair.head_identity.node_id())
    );
    assert!(detail.contains("master: epoch 3"), "{detail}");
}

#[tokio::test]
async fn attacks_that_a_worker_sees_itself_are_told_once() {
    let mut pair = Pair::new().await;
    let worker = pair.worker();
    let refused = [Refused::Expelled {
        node_id: "aa".to_owned(),
        name: "rogue".to_owned(),
    }];
    let accused = [BadSource {
        node_id: "bb".to_owned(),
        fingerprint: "cc".to_owned(),
        ..BadSource::default()
    }];
    let mut told = std::collections::BTreeSet::new();
    for _ in 0..2 {
        worker.report(&refused, &accused);
        let seen = pair.carry(&worker, |_, event| sighted(event)).await;
        told.extend(seen.map(|(kind, subject, _)| (kind, subject)));
    }
    let wanted = [("bad-piece", "bb"), ("expelled-calls", "aa")];
    let wanted = wanted.map(|(kind, subject)| (kind.to_owned(), subject.to_owned()));
    assert_eq!(told, wanted.into());
    assert_eq!(pair.head.sightings().len(), 2);
}
