//! Workers that hold parts of a model: they load at once what a ring gives them, and the driver answers as a
//! worker with the whole model would.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use dcf::{ErrorCode, Message, MsgType};
use mesh_net::quic::{self, Connector, Link, LinkConfig, MsgStream};
use mesh_net::seal::Sealer;
use mesh_net::trust::{Applicant, DenyList, MeshRoot, NodeIdentity, Role, Subject, Validity};
use mesh_proto::{
    Generate, Hello, LayerOffer, Load, ModelCard, NodeProfile, Offer, PROTOCOL_VERSION, PartPhase,
    PartState, Recovery, Ring, RingState, Welcome,
};
use prost::Message as _;
use tempfile::TempDir;
use tokio::net::UdpSocket;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;

use super::{FINGERPRINT, MODEL, Script, Seen, TestHead, answer};

/// Layers of the model.
pub(crate) const LAYERS: u32 = 12;
const MIB: u64 = 1 << 20;

/// A worker that offers layers.
pub(crate) struct RingWorker {
    pub(crate) name: String,
    pub(crate) node_id: String,
    pub(crate) seen: Arc<Seen>,
    /// Rings as last told, by their ids.
    pub(crate) told: Arc<Mutex<BTreeMap<u64, Ring>>>,
    /// Keeps new epochs from being served while it is set.
    pub(crate) hold: Arc<AtomicBool>,
    /// Goes out on its control stream.
    messages: mpsc::UnboundedSender<Message>,
    link: Link,
    connector: Connector,
    identity: NodeIdentity,
    dir: Arc<TempDir>,
    serving: AbortHandle,
}

impl RingWorker {
    /// Joins and offers the model; there is room for so many layers. Who has room to spare is slow, so that
    /// it becomes a standby and no member.
    pub(crate) async fn join(head: &TestHead, name: &str, layers: u64, script: Script) -> Self {
        let decode_us = if layers > u64::from(LAYERS) {
            3000.0
        } else {
            1000.0
        };
        Self::join_with_speed(head, name, layers, decode_us, script).await
    }

    /// The same with so many microseconds for one row of one layer.
    pub(crate) async fn join_with_speed(
        head: &TestHead,
        name: &str,
        layers: u64,
        decode_us: f32,
        script: Script,
    ) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let token = head.token().await;
        let identity = quic::join(&[head.address("quic")], &token, dir.path(), name)
            .await
            .unwrap();
        let offer = offer(layers, decode_us);
        let dir = Arc::new(dir);
        Self::connect(head.address("quic"), identity, dir, name, offer, script).await
    }

    /// A worker of an earlier version, whose certificate names no identity.
    pub(crate) async fn join_earlier(
        head: &TestHead,
        name: &str,
        layers: u64,
        script: Script,
    ) -> Self {
        let dir = Arc::new(tempfile::tempdir().unwrap());
        let root = MeshRoot::load_or_create(head.dir.path(), "hydramesh").unwrap();
        let applicant = Applicant::open(dir.path()).unwrap();
        let request = applicant.request().unwrap();
        let subject = Subject {
            request: &request,
            name,
            role: Role::Worker,
            identity: None,
        };
        let issued = root
            .issue(&subject, &Validity::default(), SystemTime::now())
            .unwrap();
        let deny_list = DenyList::open(dir.path()).unwrap();
        let identity = NodeIdentity::store(dir.path(), applicant, issued, deny_list).unwrap();
        let offer = offer(layers, 1000.0);
        Self::connect(head.address("quic"), identity, dir, name, offer, script).await
    }

    /// The key of its certificate.
    pub(crate) fn key_id(&self) -> String {
        self.identity.member().key_id.clone()
    }

    /// The same node again, on a new link.
    pub(crate) async fn come_back(&self, head: &TestHead, layers: u64, script: Script) -> Self {
        let (identity, dir) = (self.identity.clone(), self.dir.clone());
        let offer = offer(layers, 1000.0);
        Self::connect(
            head.address("quic"),
            identity,
            dir,
            &self.name,
            offer,
            script,
        )
        .await
    }

    async fn connect(
        head: SocketAddr,
        identity: NodeIdentity,
        dir: Arc<TempDir>,
        name: &str,
        offer: Offer,
        script: Script,
    ) -> Self {
        let connector = Connector::toward(head, identity.clone(), LinkConfig::default()).unwrap();
        let link = connector.connect(head, Role::Head).await.unwrap();
        let mut control = link.open().await.unwrap();
        let hello = Hello {
            node_name: name.into(),
            version: "test".into(),
            models: Vec::new(),
            protocol: PROTOCOL_VERSION,
            reserved_for: Vec::new(),
            ..Hello::default()
        };
        let send = |kind, body: Vec<u8>| Message::new(kind, 0, 0, body);
        control
            .send(send(MsgType::HELLO, hello.encode_to_vec()))
            .await
            .unwrap();
        let welcome = control.recv().await.unwrap().unwrap();
        let welcome = Welcome::decode(welcome.payload).unwrap();
        control
            .send(send(MsgType::OFFER, offer.encode_to_vec()))
            .await
            .unwrap();
        let seen = Arc::new(Seen::default());
        let told = Arc::new(Mutex::new(BTreeMap::new()));
        let hold = Arc::new(AtomicBool::new(false));
        let (messages, outgoing) = mpsc::unbounded_channel();
        let work = Work {
            node_id: identity.node_id().to_owned(),
            link: link.clone(),
            script,
            seen: seen.clone(),
            told: told.clone(),
            hold: hold.clone(),
        };
        let serving = tokio::spawn(work.serve(control, welcome, outgoing)).abort_handle();
        Self {
            name: name.to_owned(),
            node_id: identity.node_id().to_owned(),
            seen,
            told,
            hold,
            messages,
            link,
            connector,
            identity,
            dir,
            serving,
        }
    }

    /// Its process dies.
    pub(crate) async fn die(&self) {
        self.serving.abort();
        self.connector.shutdown(ErrorCode::INTERNAL, "died").await;
    }

    /// Says that its links to others are closed.
    pub(crate) fn complain(&self, suspects: &[&RingWorker]) {
        let ring = self.ring().expect("a ring");
        let suspects: Vec<String> = suspects
            .iter()
            .map(|worker| worker.node_id.clone())
            .collect();
        let state = RingState {
            severed: suspects.clone(),
            suspects,
            ..state(&self.node_id, &ring, true)
        };
        self.messages.send(message(&state)).unwrap();
    }

    /// Says that it has become larger or faster.
    pub(crate) fn offer_again(&self, layers: u64, decode_us: f32) {
        let offer = offer(layers, decode_us).encode_to_vec();
        let message = Message::new(MsgType::OFFER, 0, 0, offer);
        self.messages.send(message).unwrap();
    }

    /// The ring that it was told last.
    pub(crate) fn ring(&self) -> Option<Ring> {
        self.told.lock().unwrap().values().next_back().cloned()
    }

    pub(crate) fn generates(&self) -> Vec<Generate> {
        self.seen.generates.lock().unwrap().clone()
    }
}

impl Drop for RingWorker {
    fn drop(&mut self) {
        self.serving.abort();
        self.link.close(ErrorCode::OK, "test over");
    }
}

struct Work {
    node_id: String,
    link: Link,
    script: Script,
    seen: Arc<Seen>,
    told: Arc<Mutex<BTreeMap<u64, Ring>>>,
    hold: Arc<AtomicBool>,
}

impl Work {
    async fn serve(
        self,
        mut control: MsgStream,
        welcome: Welcome,
        mut outgoing: mpsc::UnboundedReceiver<Message>,
    ) {
        let key = self
            .link
            .export_key("hydramesh heartbeat", &welcome.session.to_be_bytes())
            .unwrap();
        let mut sealer = Sealer::new(&key, welcome.session);
        let target = SocketAddr::new(
            self.link.remote_addr().ip(),
            u16::try_from(welcome.heartbeat_port).unwrap(),
        );
        let udp = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let mut beats = tokio::time::interval(Duration::from_secs_f32(welcome.heartbeat_seconds));
        let mut looks = tokio::time::interval(Duration::from_millis(20));
        let mut reported: BTreeMap<u64, RingState> = BTreeMap::new();
        loop {
            tokio::select! {
                accepted = self.link.accept() => match accepted {
                    Ok(stream) => self.take(stream),
                    Err(_) => return,
                },
                order = control.recv() => match order {
                    Ok(Some(order)) if order.kind == MsgType::RING => {
                        let ring = Ring::decode(order.payload).unwrap();
                        let mut told = self.told.lock().unwrap();
                        let known = told.get(&ring.ring).map_or(0, |ring| ring.epoch);
                        assert!(ring.epoch >= known, "epochs only grow");
                        told.insert(ring.ring, ring);
                    }
                    Ok(Some(_)) => {}
                    _ => return,
                },
                Some(message) = outgoing.recv() => drop(control.send(message).await),
                _ = looks.tick() => {
                    let rings: Vec<Ring> = self.told.lock().unwrap().values().cloned().collect();
                    for ring in rings {
                        let serves = !self.hold.load(Ordering::SeqCst) && self.drives(&ring);
                        let mut state = state(&self.node_id, &ring, serves);
                        if reported.get(&ring.ring) == Some(&state) || state.parts.is_empty() {
                            continue;
                        }
                        reported.insert(ring.ring, state.clone());
                        if serves && ring.epoch > 1 {
                            state.recovery = Some(Recovery { gap_us: 120_000, rows: 3, requests: 1 });
                        }
                        let _ = control.send(message(&state)).await;
                    }
                }
                _ = beats.tick() => {
                    let load = Load::default();
                    let sealed = sealer.seal(MsgType::SEALED_HEARTBEAT, 0, 0, &load.encode_to_vec()).unwrap();
                    udp.send_to(&sealed.encode_datagram(), target).await.unwrap();
                }
            }
        }
    }

    /// Answers if it drives a ring; else it does not have the model.
    fn take(&self, stream: MsgStream) {
        let drives = self
            .told
            .lock()
            .unwrap()
            .values()
            .any(|ring| self.drives(ring));
        let (link, script, seen) = (self.link.clone(), self.script.clone(), self.seen.clone());
        tokio::spawn(async move {
            if drives {
                return answer(link, stream, script, seen).await;
            }
            let mut stream = stream;
            let error = Message::error(
                0,
                0,
                ErrorCode::DRAINING,
                "moved: this worker drives no ring",
            );
            let _ = stream.send(error).await;
            let _ = stream.finish();
        });
    }

    fn drives(&self, ring: &Ring) -> bool {
        let driver = ring.stages.last().and_then(|stage| stage.member.as_ref());
        driver.is_some_and(|addr| addr.node_id == self.node_id)
    }
}

fn message(state: &RingState) -> Message {
    Message::new(MsgType::RING_STATE, 0, 0, state.encode_to_vec())
}

/// All parts are loaded.
fn state(node_id: &str, ring: &Ring, serving: bool) -> RingState {
    let is_mine = |addr: &Option<mesh_proto::NodeAddr>| {
        addr.as_ref().is_some_and(|addr| addr.node_id == node_id)
    };
    let part = |stage: usize, standby| PartState {
        stage: u32::try_from(stage).unwrap(),
        standby,
        phase: PartPhase::Ready.into(),
        step_us: 1500.0,
        ..Default::default()
    };
    let mut parts = Vec::new();
    for (index, stage) in ring.stages.iter().enumerate() {
        parts.extend(is_mine(&stage.member).then(|| part(index, false)));
        parts.extend(is_mine(&stage.standby).then(|| part(index, true)));
    }
    let drives = ring
        .stages
        .last()
        .is_some_and(|stage| is_mine(&stage.member));
    RingState {
        ring: ring.ring,
        epoch: ring.epoch,
        parts,
        serving: serving && drives,
        card: (serving && drives).then(|| ModelCard {
            name: MODEL.into(),
            architecture: "llama".into(),
            fingerprint: FINGERPRINT.into(),
            context: ring.context,
            slots: ring.slots,
            decode_tps: 100.0,
            prefill_tps: 1000.0,
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn offer(layers: u64, decode_us: f32) -> Offer {
    let card = ModelCard {
        name: MODEL.into(),
        architecture: "llama".into(),
        fingerprint: FINGERPRINT.into(),
        context: 1024,
        ..Default::default()
    };
    let offer = LayerOffer {
        card: Some(card),
        layers: LAYERS,
        hidden: 64,
        layer_bytes: 9 * MIB,
        kv_bytes: 1024,
        format: "file".into(),
        decode_us,
        prefill_us: 100.0,
        logits_us: 100.0,
        ..Default::default()
    };
    Offer {
        ring_port: 7781,
        profile: Some(NodeProfile {
            memory_total: 64 << 30,
            memory_available: layers * 10 * MIB,
            ..Default::default()
        }),
        models: vec![offer],
    }
}
