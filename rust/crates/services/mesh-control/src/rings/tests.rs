//! A made-up mesh: workers that do what rings tell them, with simulated time.

mod doubt;
mod drain;
mod failover;
mod form;
mod random;
mod rebalance;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use mesh_proto::{LayerOffer, ModelCard, NodeProfile, Offer, PartPhase, PartState, RingState};

use super::*;
use crate::logs::Logs;

const MIB: u64 = 1 << 20;
/// Layers of the model.
const LAYERS: u32 = 12;
const MODEL: &str = "m";

/// The last message to a worker about one ring.
type Told = BTreeMap<(String, u64), mesh_proto::Ring>;

struct Mesh {
    rings: Rings,
    now: Instant,
    told: Told,
    /// Model and ring by the worker that serves them.
    serving: BTreeMap<(String, String), u64>,
    /// Workers that the head asked for a sign of life.
    asked: Vec<String>,
    /// All members ever sent, by ring and epoch.
    sent: BTreeMap<(u64, u32), Vec<String>>,
    port: u16,
}

impl Mesh {
    fn new(change: impl FnOnce(&mut Settings)) -> Self {
        // One context of KV rows, so that a layer takes 10 MiB.
        let mut settings = Settings {
            slots: 1,
            ..Settings::default()
        };
        change(&mut settings);
        Self {
            rings: Rings::new(settings, 100),
            now: Instant::now(),
            told: BTreeMap::new(),
            serving: BTreeMap::new(),
            asked: Vec::new(),
            sent: BTreeMap::new(),
            port: 7000,
        }
    }

    /// A mesh in which these workers, with room for so many layers each, have formed a ring that serves.
    fn serving(change: impl FnOnce(&mut Settings), workers: &[(&str, u64)]) -> Self {
        let mut mesh = Self::new(change);
        for (node, layers) in workers {
            mesh.join(node, *layers);
        }
        mesh.pass(2.0);
        mesh.all_work();
        assert_eq!(mesh.ring().state, "serving");
        mesh
    }

    /// A worker joins that has room for so many layers.
    fn join(&mut self, node: &str, layers: u64) {
        self.join_with(node, layers, |_| {});
    }

    fn join_with(&mut self, node: &str, layers: u64, change: impl FnOnce(&mut Offer)) {
        let arrival = Arrival {
            name: format!("worker-{node}"),
            whole: Vec::new(),
            head_ip: None,
        };
        self.rings.joined(node, arrival, self.now);
        self.offer(node, layers, change);
    }

    fn offer(&mut self, node: &str, layers: u64, change: impl FnOnce(&mut Offer)) {
        let mut offer = offer(layers);
        change(&mut offer);
        self.port += 1;
        let address = SocketAddr::from(([127, 0, 0, 1], self.port));
        self.rings.offered(node, address, offer, self.now);
        self.poll();
    }

    fn leave(&mut self, nodes: &[&str]) {
        for node in nodes {
            self.rings.left(node, "its link is closed", self.now);
            self.told.retain(|(told, _), _| told != node);
        }
        self.poll();
    }

    fn pass(&mut self, seconds: f64) {
        self.now += Duration::from_secs_f64(seconds);
        self.poll();
    }

    fn poll(&mut self) {
        for action in self.rings.poll(self.now) {
            match action {
                Action::Send { node, ring } => {
                    assert!(
                        self.rings.nodes[&node].connected,
                        "{node} is sent a ring and is not there"
                    );
                    if !ring.stages.is_empty() {
                        let members = members(&ring);
                        let same = self
                            .sent
                            .entry((ring.ring, ring.epoch))
                            .or_insert_with(|| members.clone());
                        assert_eq!(*same, members, "the members of an epoch never change");
                    }
                    let before = self.told.insert((node, ring.ring), ring.clone());
                    if let Some(before) = before {
                        assert!(before.epoch <= ring.epoch, "epochs only grow");
                    }
                }
                Action::Serve { node, ring, card } => {
                    assert_eq!(card.name, MODEL);
                    let key = (node, card.name);
                    self.serving.insert(key, ring);
                }
                Action::Withdraw { node, model, ring } => {
                    let was = self.serving.remove(&(node.clone(), model));
                    assert_eq!(was, Some(ring), "{node} served that");
                }
                Action::Ask { node } => self.asked.push(node),
            }
        }
    }

    /// The one ring that counts.
    fn ring(&self) -> mesh_api::Ring {
        let mut rings = self.rings.view(self.now);
        rings.retain(|ring| ring.state != "retiring");
        assert_eq!(rings.len(), 1, "{rings:?}");
        rings.remove(0)
    }

    fn members(&self) -> Vec<String> {
        let ring = self.ring();
        ring.stages
            .iter()
            .map(|stage| stage.member.node_id.clone())
            .collect()
    }

    fn standbys(&self) -> Vec<Option<String>> {
        let ring = self.ring();
        let standby =
            |stage: &mesh_api::RingStage| stage.standby.as_ref().map(|part| part.node_id.clone());
        ring.stages.iter().map(standby).collect()
    }

    fn id(&self) -> u64 {
        u64::from_str_radix(&self.ring().ring, 16).unwrap()
    }

    /// Report of this worker on a ring if all its parts were in this phase.
    fn report(&self, node: &str, ring: u64, phase: PartPhase) -> RingState {
        let told = &self.told[&(node.to_owned(), ring)];
        let holds = |addr: &Option<mesh_proto::NodeAddr>| {
            addr.as_ref().is_some_and(|addr| addr.node_id == node)
        };
        let part = |stage: usize, standby| PartState {
            stage: stage as u32,
            standby,
            phase: phase.into(),
            ..Default::default()
        };
        let parts = told.stages.iter().enumerate().flat_map(|(index, stage)| {
            [
                holds(&stage.member).then(|| part(index, false)),
                holds(&stage.standby).then(|| part(index, true)),
            ]
        });
        RingState {
            ring,
            epoch: told.epoch,
            parts: parts.flatten().collect(),
            ..Default::default()
        }
    }

    /// A worker's parts are all loaded.
    fn ready(&mut self, node: &str, ring: u64) {
        let report = self.report(node, ring, PartPhase::Ready);
        self.rings.state(node, report, self.now);
        self.poll();
    }

    /// The driver of a ring serves.
    fn serves(&mut self, ring: u64) {
        let view = self.rings.rings[&ring].clone();
        let driver = view.driver().to_owned();
        let card = ModelCard {
            name: MODEL.into(),
            slots: 8,
            context: view.context,
            ..Default::default()
        };
        let state = RingState {
            serving: true,
            card: Some(card),
            ..self.report(&driver, ring, PartPhase::Ready)
        };
        self.rings.state(&driver, state, self.now);
        self.poll();
    }

    /// Everybody loads what is asked of them and the drivers serve.
    fn all_work(&mut self) {
        // Standbys that are found once a ring serves have to load, too.
        for _ in 0..3 {
            let told: Vec<(String, u64)> = self.told.keys().cloned().collect();
            for (node, ring) in told {
                if self.rings.rings.contains_key(&ring)
                    && self.told.contains_key(&(node.clone(), ring))
                {
                    self.ready(&node, ring);
                }
            }
            let rings: Vec<u64> = self.rings.rings.keys().copied().collect();
            for ring in rings {
                self.serves(ring);
            }
        }
    }

    /// One worker says that others do not answer.
    fn complain(&mut self, by: &str, suspects: &[&str]) {
        let ring = self.id();
        let state = RingState {
            serving: self.rings.rings[&ring].driver() == by,
            suspects: suspects.iter().map(|node| (*node).to_owned()).collect(),
            ..self.report(by, ring, PartPhase::Ready)
        };
        self.rings.state(by, state, self.now);
        self.poll();
    }

    fn failovers(&self) -> u64 {
        self.rings.counts.failovers.values().sum()
    }

    /// Checks the invariants that hold at any moment.
    fn check(&self) {
        for ring in self.rings.rings.values() {
            let mut end = 0;
            for stage in &ring.stages {
                assert_eq!(stage.layers.start, end, "layers are covered once");
                assert!(stage.layers.end > end);
                end = stage.layers.end;
                assert!(
                    stage
                        .standby
                        .as_ref()
                        .is_none_or(|part| part.node != stage.member.node),
                    "nobody stands by for itself"
                );
            }
            assert_eq!(end, LAYERS, "all layers are covered");
            for part in ring.parts() {
                assert!(
                    self.rings
                        .nodes
                        .get(&part.node)
                        .is_some_and(|node| node.connected),
                    "a lost worker has no stage"
                );
            }
        }
        for (id, node) in &self.rings.nodes {
            let used: u64 = self
                .rings
                .rings
                .values()
                .map(|ring| ring.bytes_on(id))
                .sum();
            assert!(
                !node.connected || used <= node.profile.memory_available,
                "{id} holds {} of {} MiB",
                used / MIB,
                node.profile.memory_available / MIB
            );
        }
        let drivers: BTreeSet<u64> = self.serving.values().copied().collect();
        for ring in drivers {
            assert!(self.rings.rings.contains_key(&ring), "what serves exists");
        }
    }
}

/// Room for so many layers of 10 MiB with the KV rows of one context.
fn offer(layers: u64) -> Offer {
    let card = ModelCard {
        name: MODEL.into(),
        fingerprint: "f".into(),
        context: 1024,
        ..Default::default()
    };
    let offer = LayerOffer {
        card: Some(card),
        layers: LAYERS,
        hidden: 64,
        layer_bytes: 9 * MIB,
        kv_bytes: 1024,
        decode_us: 1000.0,
        prefill_us: 100.0,
        logits_us: 100.0,
        format: "file".into(),
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

fn members(ring: &mesh_proto::Ring) -> Vec<String> {
    let node = |stage: &mesh_proto::RingStage| {
        format!(
            "{}..{} {}",
            stage.layer_start,
            stage.layer_end,
            stage.member.as_ref().unwrap().node_id
        )
    };
    ring.stages.iter().map(node).collect()
}
