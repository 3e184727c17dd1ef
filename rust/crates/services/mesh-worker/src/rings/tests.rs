//! Rings of real stages on real links, with the test in the head's place.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use arcanum_attestor::Attestor;
use dcf::{Message, MsgType};
use futures::StreamExt;
use mesh_engine::{Event as Answer, Request};
use mesh_engine_ort::{OrtOptions, OrtStage};
use mesh_model::Model;
use mesh_net::quic::{LinkConfig, Listener, join};
use mesh_net::trust::Validity;
use mesh_proto::{NodeAddr, Offer, PartPhase, Ring, RingStage, RingState};
use mesh_testkit::paths;
use mesh_worker_core::Lease;
use prost::Message as _;
use tempfile::TempDir;
use tokio::sync::mpsc;

use super::Rings;
use crate::config::{Config, RingConfig};

const LOOPBACK: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 0);
const RING: u64 = 7;
const RTT: Duration = Duration::from_micros(200);

struct Mesh {
    nodes: Vec<Node>,
    epoch: u32,
    _head: (TempDir, Listener),
}

struct Node {
    rings: Arc<Rings>,
    node_id: String,
    lease: Lease,
    outbox: mpsc::UnboundedSender<Message>,
    reports: mpsc::UnboundedReceiver<Message>,
    offer: Offer,
    last: Option<RingState>,
    _dir: TempDir,
}

impl Mesh {
    async fn start(nodes: usize) -> Mesh {
        let dir = tempfile::tempdir().unwrap();
        let authority = Attestor::open(dir.path(), "attic", Validity::default()).unwrap();
        let authority = Arc::new(authority);
        let now = SystemTime::now();
        let identity = authority.head_identity(dir.path(), "head", now).unwrap();
        let admission = Some(authority.clone() as Arc<_>);
        let head = Listener::bind(LOOPBACK, identity, admission, LinkConfig::default()).unwrap();
        let address = head.local_addr().unwrap();
        let mut mesh = Mesh {
            nodes: Vec::new(),
            epoch: 0,
            _head: (dir, head),
        };
        for i in 0..nodes {
            let dir = tempfile::tempdir().unwrap();
            let hour = Duration::from_secs(3600);
            let token = authority.create_token(hour, "test", now).unwrap();
            let name = format!("node-{i}");
            let identity = join(&[address], &token, dir.path(), &name).await.unwrap();
            let config = Arc::new(Config {
                state_dir: dir.path().to_owned(),
                ort_library: Some(paths::ort_library().unwrap()),
                threads: 1,
                ring: RingConfig {
                    models: vec![paths::smollm2().unwrap().display().to_string()],
                    listen: LOOPBACK,
                    format: crate::config::Format::File,
                    ..RingConfig::default()
                },
                ..Config::default()
            });
            let rings = tokio::task::spawn_blocking(move || {
                let models = crate::models::Models::open(&config)?;
                Ok::<_, crate::WorkerError>(Rings::open(&config, models))
            })
            .await;
            let (rings, failures) = rings.unwrap().unwrap();
            assert!(failures.is_empty(), "{failures:?}");
            rings.listen(&identity).unwrap();
            let (outbox, mut reports) = mpsc::unbounded_channel();
            let lease = rings.linked(outbox.clone(), RTT, Vec::new());
            let offer = reports.recv().await.unwrap();
            let offer = Offer::decode(offer.payload).unwrap();
            mesh.nodes.push(Node {
                rings,
                node_id: identity.node_id(),
                lease,
                outbox,
                reports,
                offer,
                last: None,
                _dir: dir,
            });
        }
        mesh
    }

    fn seat(&self, node: usize) -> NodeAddr {
        let node = &self.nodes[node];
        NodeAddr {
            addresses: Vec::new(),
            node_id: node.node_id.clone(),
            name: "a node".to_owned(),
            address: format!("127.0.0.1:{}", node.offer.ring_port),
        }
    }

    /// A new epoch: each stage's end, member and standby.
    fn configure(&mut self, stages: &[(u32, usize, Option<usize>)]) {
        self.epoch += 1;
        self.configure_again(stages);
    }

    fn configure_again(&mut self, stages: &[(u32, usize, Option<usize>)]) {
        let card = self.nodes[0].offer.models[0].card.clone().unwrap();
        let mut start = 0;
        let stages = stages.iter().map(|&(end, member, standby)| RingStage {
            layer_start: std::mem::replace(&mut start, end),
            layer_end: end,
            member: Some(self.seat(member)),
            standby: standby.map(|node| self.seat(node)),
            format: String::new(),
        });
        let ring = Ring {
            ring: RING,
            epoch: self.epoch,
            model: card.name,
            fingerprint: card.fingerprint,
            stages: stages.collect(),
            slots: 4,
            context: 1024,
            kv_tokens: 4096,
            half_rows: false,
            reason: "a test".to_owned(),
        };
        for node in &self.nodes {
            let id = &node.node_id;
            let holds =
                |seat: &Option<NodeAddr>| seat.as_ref().is_some_and(|seat| seat.node_id == *id);
            if ring
                .stages
                .iter()
                .any(|s| holds(&s.member) || holds(&s.standby))
            {
                node.rings.configure(node.lease, ring.clone());
            }
        }
    }

    /// Waits until `node` reports something.
    async fn wait(
        &mut self,
        node: usize,
        what: &str,
        is: impl Fn(&RingState) -> bool,
    ) -> RingState {
        let epoch = self.epoch;
        let wait = async {
            loop {
                let message = self.nodes[node].reports.recv().await.unwrap();
                if message.kind != MsgType::RING_STATE {
                    continue;
                }
                let state = RingState::decode(message.payload).unwrap();
                let fits = state.epoch == epoch && is(&state);
                self.nodes[node].last = Some(state.clone());
                if fits {
                    return state;
                }
            }
        };
        let waited = tokio::time::timeout(Duration::from_secs(60), wait).await;
        match waited {
            Ok(state) => state,
            Err(_) => panic!("not {what}: {:?}", self.nodes[node].last),
        }
    }

    async fn serving(&mut self, driver: usize) {
        self.wait(driver, "serving", |state| state.serving).await;
    }

    async fn mirrored(&mut self, member: usize) {
        self.wait(member, "mirrored", |state| {
            state.parts.iter().all(|part| {
                part.standby || (part.phase() == PartPhase::Ready && part.lag_rows == 0)
            })
        })
        .await;
    }

    fn submit(&self, driver: usize, request: Request) -> mesh_engine::RequestStream {
        self.nodes[driver]
            .rings
            .find("")
            .unwrap()
            .engine
            .submit(request)
    }

    /// The node loses the head, which ends its deployments, and finds it again.
    fn lose(&mut self, node: usize) {
        let node = &mut self.nodes[node];
        node.rings.unlinked();
        let core = node.rings.core();
        core.change(|core| core.head_lost(None, Instant::now(), 0.0));
        node.lease = node.rings.linked(node.outbox.clone(), RTT, Vec::new());
    }
}

fn request(seed: u32, tokens: u32) -> Request {
    let prompt = (0..40 + seed * 7)
        .map(|i| (i * 7919 + seed * 31) % 49_000 + 5)
        .collect();
    Request {
        ignore_eos: true,
        ..Request::greedy(format!("request {seed}"), prompt, tokens)
    }
}

/// Answers of one worker with the whole model.
fn expected(requests: &[Request]) -> Vec<Vec<u32>> {
    let model = Model::open(paths::smollm2().unwrap()).unwrap();
    let options = OrtOptions {
        library: Some(paths::ort_library().unwrap()),
        threads: 1,
        context: 1024,
        ..OrtOptions::default()
    };
    let stage = OrtStage::load(&model, 0..model.config().layers, options).unwrap();
    let vocabulary = Arc::new(model.clone());
    let config = mesh_engine::SchedulerConfig::default();
    let engine = mesh_engine::Engine::start("whole", Box::new(stage), vocabulary, config).unwrap();
    requests
        .iter()
        .map(|request| {
            let stream = engine.handle().submit(request.clone());
            tokens(&futures::executor::block_on(stream.collect::<Vec<_>>()))
        })
        .collect()
}

fn tokens(events: &[Answer]) -> Vec<u32> {
    let mut all = Vec::new();
    for event in events {
        match event {
            Answer::Tokens(tokens) => {
                assert_eq!(tokens.index as usize, all.len());
                all.extend(&tokens.tokens);
            }
            Answer::Done(_) => {}
            other => panic!("{other:?}"),
        }
    }
    all
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ring_of_three_answers_as_one_worker_and_outlives_a_member() {
    let requests: Vec<Request> = (0..3).map(|seed| request(seed, 60)).collect();
    let expected = expected(&requests);
    let mut mesh = Mesh::start(5).await;
    mesh.configure(&[(9, 0, None), (21, 1, Some(3)), (30, 2, None)]);
    mesh.serving(2).await;

    let begun = Instant::now();
    for (request, expected) in requests.iter().zip(&expected) {
        let events: Vec<Answer> = mesh.submit(2, request.clone()).collect().await;
        assert_eq!(tokens(&events), *expected);
    }
    let took = begun.elapsed();
    println!("180 tokens in {took:.1?}");

    // The middle stage goes over to its standby while three answers are in progress.
    mesh.mirrored(1).await;
    let mut streams: Vec<_> = requests.iter().map(|r| mesh.submit(2, r.clone())).collect();
    let mut events: Vec<Vec<Answer>> = vec![Vec::new(); streams.len()];
    for _ in 0..20 {
        for (stream, events) in streams.iter_mut().zip(&mut events) {
            events.extend(stream.next().await);
        }
    }
    mesh.lose(1);
    mesh.configure(&[(9, 0, None), (21, 3, Some(4)), (30, 2, None)]);
    for (stream, events) in streams.into_iter().zip(&mut events) {
        events.extend(stream.collect::<Vec<_>>().await);
    }
    for (events, expected) in events.iter().zip(&expected) {
        assert_eq!(tokens(events), *expected);
    }
    let state = mesh
        .wait(2, "recovered", |state| state.recovery.is_some())
        .await;
    println!("{:?}", state.recovery);

    // Then to its new standby, and stage 0 to a node that has nothing.
    mesh.mirrored(3).await;
    let mut stream = mesh.submit(2, requests[1].clone());
    let mut events = Vec::new();
    for _ in 0..20 {
        events.extend(stream.next().await);
    }
    mesh.configure(&[(9, 1, None), (21, 4, None), (30, 2, None)]);
    events.extend(stream.collect::<Vec<_>>().await);
    assert_eq!(tokens(&events), expected[1]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_standby_of_the_last_stage_becomes_the_driver_and_knows_what_was_said() {
    let requests = [request(5, 40)];
    let expected = expected(&requests);
    let mut mesh = Mesh::start(3).await;
    mesh.configure(&[(15, 0, None), (30, 1, Some(2))]);
    mesh.serving(1).await;
    let mut stream = mesh.submit(1, requests[0].clone());
    let mut events = Vec::new();
    for _ in 0..10 {
        events.extend(stream.next().await);
    }
    // The same members in a new epoch make new links, and the answer goes on.
    let (peers, seat) = (
        mesh.nodes[1].rings.net.get().unwrap().peers.clone(),
        mesh.seat(0),
    );
    let before = peers.link(&seat).await.unwrap();
    mesh.configure(&[(15, 0, None), (30, 1, Some(2))]);
    mesh.serving(1).await;
    for _ in 0..10 {
        events.extend(stream.next().await);
    }
    let after = peers.link(&seat).await.unwrap();
    assert_ne!(before.id(), after.id());
    mesh.lose(1);
    mesh.configure(&[(15, 0, None), (30, 2, None)]);
    mesh.serving(2).await;
    // The head would send the request again, with the tokens so far.
    let rest: Vec<Answer> = stream.collect().await;
    let (last, more) = rest.split_last().unwrap();
    events.extend(more.to_vec());
    assert!(
        matches!(
            last,
            Answer::Failed(mesh_engine::RequestError::Moved { .. })
        ),
        "{last:?}"
    );
    let mut all = tokens(&events);
    let again = Request {
        generated: all.clone(),
        ..requests[0].clone()
    };
    let events: Vec<Answer> = mesh.submit(2, again).collect().await;
    for event in &events {
        match event {
            Answer::Tokens(tokens) => all.extend(&tokens.tokens),
            Answer::Done(done) => assert!(done.cached_tokens > 30, "{done:?}"),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(all, expected[0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_part_that_is_loaded_afresh_has_its_inputs_replayed_and_nothing_else_is_computed_again() {
    let long = Request {
        prompt_tokens: (0..700u32).map(|i| i * 7919 % 49_000 + 5).collect(),
        ..request(1, 24)
    };
    let expected = expected(std::slice::from_ref(&long));
    let mut mesh = Mesh::start(5).await;
    mesh.configure(&[(10, 0, None), (20, 1, None), (30, 2, None)]);
    mesh.serving(2).await;
    let mut stream = mesh.submit(2, long);
    let mut events = Vec::new();
    for _ in 0..10 {
        events.extend(stream.next().await);
    }
    let mut members = [0, 1];
    for (stage, spare) in [(1, 3), (0, 4)] {
        let lost = std::mem::replace(&mut members[stage], spare);
        mesh.lose(lost);
        mesh.configure(&[
            (10, members[0], None),
            (20, members[1], None),
            (30, 2, None),
        ]);
        let state = mesh
            .wait(2, "recovered", |state| state.recovery.is_some())
            .await;
        let recovery = state.recovery.unwrap();
        println!("stage {stage}: {recovery:?}");
        // The tail that was under way is computed again by all; the rest by the new member alone.
        assert!((700..730).contains(&recovery.rows), "{recovery:?}");
        for _ in 0..5 {
            events.extend(stream.next().await);
        }
    }
    events.extend(stream.collect::<Vec<_>>().await);
    assert_eq!(tokens(&events), expected[0]);
}
