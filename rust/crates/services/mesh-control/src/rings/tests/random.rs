use proptest::prelude::*;

use super::*;

/// Something that happens to a worker, or to the mesh.
#[derive(Debug, Clone)]
enum Happening {
    Join(usize, u64),
    Offer(usize, u64),
    Leave(Vec<usize>),
    /// The complaining member, the members that it does not reach, and true if their links are closed.
    Complain(usize, Vec<usize>, bool),
    Hear(Vec<usize>),
    Ready(usize),
    Fails(usize),
    Serves,
    Silent(usize),
    /// A report of an epoch that is not the present one.
    Stale(usize, u32),
    Drain(usize),
    Undrain(usize),
    SaysDraining(usize, bool),
    Rebalance(bool),
    Pass(u32),
}

fn happening() -> impl Strategy<Value = Happening> {
    let node = 0..NODES.len();
    prop_oneof![
        4 => (node.clone(), 1..20u64).prop_map(|(node, layers)| Happening::Join(node, layers)),
        2 => (node.clone(), 1..20u64).prop_map(|(node, layers)| Happening::Offer(node, layers)),
        2 => prop::collection::vec(node.clone(), 1..3).prop_map(Happening::Leave),
        2 => (node.clone(), prop::collection::vec(node.clone(), 1..3), any::<bool>())
            .prop_map(|(by, them, severed)| Happening::Complain(by, them, severed)),
        4 => prop::collection::vec(node.clone(), 1..6).prop_map(Happening::Hear),
        6 => node.clone().prop_map(Happening::Ready),
        1 => node.clone().prop_map(Happening::Fails),
        6 => Just(Happening::Serves),
        1 => node.clone().prop_map(Happening::Silent),
        2 => (node.clone(), 0..9u32).prop_map(|(node, epoch)| Happening::Stale(node, epoch)),
        1 => node.clone().prop_map(Happening::Drain),
        1 => node.clone().prop_map(Happening::Undrain),
        1 => (node, any::<bool>()).prop_map(|(node, draining)| Happening::SaysDraining(node, draining)),
        1 => any::<bool>().prop_map(Happening::Rebalance),
        6 => (1..40u32).prop_map(Happening::Pass),
    ]
}

const NODES: [&str; 6] = ["a", "b", "c", "d", "e", "f"];

impl Mesh {
    fn happens(&mut self, happening: &Happening) {
        let is_there = |mesh: &Mesh, node: &str| {
            mesh.rings
                .nodes
                .get(node)
                .is_some_and(|node| node.connected)
        };
        let told = |mesh: &Mesh, node: &str| -> Vec<u64> {
            let rings = mesh.told.keys().filter(|(told, _)| told == node);
            rings.map(|(_, ring)| *ring).collect()
        };
        match happening {
            Happening::Join(node, layers) => {
                let node = NODES[*node];
                self.told.retain(|(told, _), _| told != node);
                self.join(node, *layers);
            }
            // Memory that is in use does not go away: a worker that offers less than it holds is not part of
            // this test.
            Happening::Offer(node, layers) => {
                let node = NODES[*node];
                let held: u64 = self
                    .rings
                    .rings
                    .values()
                    .map(|ring| ring.bytes_on(node))
                    .sum();
                if is_there(self, node) && layers * 10 * MIB >= held {
                    self.offer(node, *layers, |_| {});
                }
            }
            Happening::Leave(nodes) => {
                let nodes: Vec<&str> = nodes.iter().map(|node| NODES[*node]).collect();
                self.leave(&nodes);
            }
            Happening::Complain(by, suspects, severed) => {
                let by = NODES[*by];
                let suspects: Vec<String> = suspects
                    .iter()
                    .map(|node| NODES[*node].to_owned())
                    .collect();
                for ring in told(self, by) {
                    let state = RingState {
                        severed: if *severed {
                            suspects.clone()
                        } else {
                            Vec::new()
                        },
                        suspects: suspects.clone(),
                        ..self.report(by, ring, PartPhase::Ready)
                    };
                    self.rings.state(by, state, self.now);
                }
                self.poll();
            }
            Happening::Hear(nodes) => {
                for node in nodes {
                    self.rings.heard(NODES[*node], self.now);
                }
                self.poll();
            }
            Happening::Ready(node) => {
                for ring in told(self, NODES[*node]) {
                    if self.told.contains_key(&(NODES[*node].to_owned(), ring)) {
                        self.ready(NODES[*node], ring);
                    }
                }
            }
            Happening::Fails(node) => {
                if let Some(ring) = told(self, NODES[*node]).last() {
                    let state = self.report(NODES[*node], *ring, PartPhase::Failed);
                    self.rings.state(NODES[*node], state, self.now);
                    self.poll();
                }
            }
            Happening::Serves => {
                let rings: Vec<u64> = self.rings.rings.keys().copied().collect();
                for ring in rings {
                    if self.rings.rings.contains_key(&ring) {
                        self.serves(ring);
                    }
                }
            }
            Happening::Silent(node) => {
                for ring in told(self, NODES[*node]) {
                    self.rings
                        .suspected(NODES[*node], ring, "no token", self.now);
                }
                self.poll();
            }
            Happening::Stale(node, epoch) => {
                for ring in told(self, NODES[*node]) {
                    let present = self.rings.rings.get(&ring).map(|ring| ring.epoch);
                    if is_there(self, NODES[*node]) && present != Some(*epoch) {
                        let state = RingState {
                            epoch: *epoch,
                            serving: true,
                            suspects: NODES.map(str::to_owned).to_vec(),
                            ..self.report(NODES[*node], ring, PartPhase::Failed)
                        };
                        let before = self.rings.view(self.now);
                        self.rings.state(NODES[*node], state, self.now);
                        assert_eq!(
                            self.rings.view(self.now),
                            before,
                            "an old epoch changes nothing"
                        );
                    }
                }
                self.poll();
            }
            Happening::Drain(node) => {
                let before = self.rings.view(self.now);
                if self.rings.drain(NODES[*node], self.now).is_err() {
                    assert_eq!(
                        self.rings.view(self.now),
                        before,
                        "a refusal changes nothing"
                    );
                }
                self.poll();
            }
            Happening::Undrain(node) => {
                self.rings.undrain(NODES[*node], self.now);
                self.poll();
            }
            Happening::SaysDraining(node, draining) => {
                self.rings.says_draining(NODES[*node], *draining);
                self.poll();
            }
            Happening::Rebalance(dry_run) => {
                let _ = self.rings.rebalance(None, *dry_run, self.now);
                self.poll();
            }
            Happening::Pass(tenths) => self.pass(f64::from(*tenths) / 10.0),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_rings_are_whole_and_fit(
        happenings in prop::collection::vec(happening(), 1..120),
        standbys in any::<bool>(),
        stages in prop::option::of(1..4u32),
        double_stages in any::<bool>(),
    ) {
        let mut mesh = Mesh::new(|settings| {
            settings.standbys = standbys;
            settings.stages = stages;
            settings.double_stages = double_stages;
        });
        for happening in &happenings {
            let members_before: BTreeMap<u64, BTreeSet<String>> = mesh
                .rings
                .rings
                .iter()
                .map(|(id, ring)| (*id, ring.parts().map(|part| part.node.clone()).collect()))
                .collect();
            mesh.happens(happening);
            mesh.check();
            for (id, ring) in &mesh.rings.rings {
                let before = members_before.get(id);
                for part in ring.parts() {
                    let is_new = before.is_none_or(|before| !before.contains(&part.node));
                    let node = &mesh.rings.nodes[&part.node];
                    prop_assert!(!is_new || !node.is_draining(), "{} is drained and got a stage", part.node);
                }
                if !double_stages {
                    let members: BTreeSet<&str> = ring.stages.iter().map(|stage| stage.member.node.as_str()).collect();
                    prop_assert_eq!(members.len(), ring.stages.len());
                }
            }
        }
        // Left to themselves, workers that are there and can hold the model serve it in the end.
        for node in NODES {
            mesh.rings.undrain(node, mesh.now);
            mesh.rings.says_draining(node, false);
            mesh.join(node, 20);
        }
        for _ in 0..12 {
            mesh.pass(120.0);
            mesh.all_work();
            mesh.check();
        }
        prop_assert_eq!(mesh.serving.len(), 1, "{:?}", mesh.rings.view(mesh.now));
    }
}
