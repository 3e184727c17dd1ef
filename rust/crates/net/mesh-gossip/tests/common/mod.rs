//! A network of nodes in simulated time: real signatures, frames that are late, lost, cut off or forged.

#![allow(dead_code, reason = "each test uses some of it")]

pub(crate) mod hostile;
pub(crate) mod partition;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_gossip::{Config, Event, Gossip, Now};
use mesh_identity::{Document, IdentityKey, NodeId};

pub(crate) const MESH: [u8; 32] = [7; 32];
pub(crate) const START: u64 = 1_800_000_000;

/// Nodes, and the frames on their way.
pub(crate) struct Net {
    pub(crate) nodes: Vec<Gossip>,
    pub(crate) keys: Vec<Arc<IdentityKey>>,
    pub(crate) index: HashMap<NodeId, usize>,
    began: Instant,
    pub(crate) time: Duration,
    flying: BinaryHeap<Reverse<(Duration, u64, usize)>>,
    frames: HashMap<u64, Arc<Vec<u8>>>,
    next_frame: u64,
    random: fastrand::Rng,
    /// Part of the frames that is lost.
    pub(crate) loss: f64,
    /// Part of the frames beside which a forged one arrives.
    pub(crate) forged: f64,
    pub(crate) forgeries: u64,
    /// Nodes below this index and the others do not hear each other.
    pub(crate) cut: Option<usize>,
    /// Keep the frames that node 0 takes.
    pub(crate) record: bool,
    pub(crate) recorded: Vec<Vec<u8>>,
    /// Events of each node, with their times.
    pub(crate) events: Vec<Vec<(Duration, Event)>>,
}

pub(crate) fn root() -> IdentityKey {
    IdentityKey::from_seed(&[9; 32])
}

pub(crate) fn key(number: usize) -> Arc<IdentityKey> {
    let mut seed = [3; 32];
    seed[..8].copy_from_slice(&(number as u64).to_be_bytes());
    Arc::new(IdentityKey::from_seed(&seed))
}

pub(crate) fn document(key: &IdentityKey, name: &str, not_after: u64) -> Vec<u8> {
    Document {
        key: key.public().clone(),
        name: name.to_owned(),
        role: "worker".to_owned(),
        mesh: "test".to_owned(),
        root: MESH,
        not_before: START - 3600,
        not_after,
    }
    .sign(&root())
}

pub(crate) fn node(number: usize, interval: Duration, now: Now) -> Gossip {
    let config = Config {
        interval,
        most_peers: 256,
        epoch: START,
        seed: 1000 + number as u64,
    };
    Gossip::new(config, key(number), (MESH, root().public().clone()), now)
}

impl Net {
    /// Nodes that know each other's documents.
    pub(crate) fn new(size: usize, interval: Duration, seed: u64) -> Self {
        let began = Instant::now();
        let now = Now {
            instant: began,
            unix: START,
        };
        let keys: Vec<_> = (0..size).map(key).collect();
        let documents: Vec<_> = keys
            .iter()
            .map(|key| document(key, "node", START + 86400))
            .collect();
        let mut nodes: Vec<Gossip> = (0..size)
            .map(|number| node(number, interval, now))
            .collect();
        for (number, node) in nodes.iter_mut().enumerate() {
            for (other, document) in documents.iter().enumerate() {
                if other != number {
                    node.introduce(document, now).unwrap();
                }
            }
        }
        Self {
            index: keys
                .iter()
                .enumerate()
                .map(|(number, key)| (key.node_id(), number))
                .collect(),
            events: vec![Vec::new(); size],
            nodes,
            keys,
            began,
            time: Duration::ZERO,
            flying: BinaryHeap::new(),
            frames: HashMap::new(),
            next_frame: 0,
            random: fastrand::Rng::with_seed(seed),
            loss: 0.0,
            forged: 0.0,
            forgeries: 0,
            cut: None,
            record: false,
            recorded: Vec::new(),
        }
    }

    pub(crate) fn now(&self) -> Now {
        Now {
            instant: self.began + self.time,
            unix: START + self.time.as_secs(),
        }
    }

    pub(crate) fn run_for(&mut self, time: Duration) {
        self.run_until(self.time + time, |_| false);
    }

    /// Runs until a time, or until `done` holds after an event.
    pub(crate) fn run_until(&mut self, end: Duration, done: impl Fn(&Self) -> bool) -> bool {
        loop {
            if done(self) {
                return true;
            }
            let (due, next) = self.next_timer();
            let arrival = self.flying.peek().map(|Reverse((at, ..))| *at);
            let at = arrival.map_or(due, |at| at.min(due));
            if at > end {
                self.time = end;
                return false;
            }
            self.time = self.time.max(at);
            let now = self.now();
            if arrival == Some(at) {
                let Reverse((_, frame, to)) = self.flying.pop().unwrap();
                let bytes = self.frames.remove(&frame).unwrap();
                let taken = self.nodes[to].receive(&bytes, now).is_ok();
                if self.record && taken && to == 0 {
                    self.recorded.push(bytes.to_vec());
                }
                self.drive(to);
            } else {
                self.drive(next);
            }
        }
    }

    fn next_timer(&self) -> (Duration, usize) {
        let timers = self.nodes.iter().enumerate();
        let timers = timers.map(|(number, node)| {
            (
                node.next_timeout().saturating_duration_since(self.began),
                number,
            )
        });
        timers.min().unwrap()
    }

    /// Sends the frames of a node that are due, and takes its events.
    pub(crate) fn drive(&mut self, number: usize) {
        let now = self.now();
        while let Some(transmit) = self.nodes[number].poll(now) {
            for to in transmit.to {
                let to = self.index[&to];
                if self.cut.is_some_and(|cut| (number < cut) != (to < cut)) {
                    continue;
                }
                if self.random.f64() < self.forged {
                    let mut forged = transmit.frame.clone();
                    // A counter that was not used yet, and another content.
                    forged[73] = 0x40;
                    let last = forged.len() - 1;
                    forged[last] ^= 1;
                    self.forgeries += 1;
                    self.fly(to, forged);
                }
                if self.random.f64() >= self.loss {
                    self.fly(to, transmit.frame.clone());
                }
            }
        }
        while let Some(event) = self.nodes[number].poll_event() {
            self.events[number].push((self.time, event));
        }
    }

    fn fly(&mut self, to: usize, frame: Vec<u8>) {
        let late = Duration::from_micros(self.random.u64(500..10_000));
        self.frames.insert(self.next_frame, Arc::new(frame));
        self.flying
            .push(Reverse((self.time + late, self.next_frame, to)));
        self.next_frame += 1;
    }

    /// Times at which the nodes learnt of a sighting with this subject.
    pub(crate) fn heard_of(&self, subject: &str) -> BTreeMap<usize, Vec<Duration>> {
        let mut heard: BTreeMap<usize, Vec<Duration>> = BTreeMap::new();
        for (number, events) in self.events.iter().enumerate() {
            for (at, event) in events {
                if matches!(event, Event::Sighted(sighting) if sighting.subject == subject) {
                    heard.entry(number).or_default().push(*at);
                }
            }
        }
        heard
    }
}
