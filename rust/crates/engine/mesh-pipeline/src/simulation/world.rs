//! Workers, a network and a head in simulated time.
//!
//! The network delivers the messages of one stream in order, as QUIC does, each message after a delay of its
//! own, so streams overtake each other. Workers are killed, which loses everything that was on its way from
//! them; or stopped, which the head learns only from the driver's suspicion or from an answer that does not
//! go on. The head promotes standbys, uses empty workers for stages without a standby, and chooses new
//! standbys.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use mesh_engine::scheduler::{Scheduler, SchedulerConfig, Step};
use mesh_engine::{Event, GenerationRequest, Outcome, Request, RequestError, Runner, Schedule};
use mesh_proto::{
    HeldSlot, RingHeld, RingMirror, RingMirrored, RingOutcome, RingPing, RingResend, RingStep,
};

use super::toy::{self, Letters};
use crate::{DriverEvent, DriverOut, Out, RingRunner, StageReplica};

pub(super) type Node = usize;

/// Random numbers that a seed decides.
pub(super) struct Dice(u64);

impl Dice {
    pub(super) fn new(seed: u64) -> Self {
        Dice(seed.wrapping_mul(0x2545_f491_4f6c_dd1d) | 1)
    }

    pub(super) fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % n.max(1)
    }
}

#[derive(Debug, Clone)]
struct Ring {
    epoch: u32,
    /// Members in order.
    members: Vec<Node>,
    standbys: Vec<Option<Node>>,
}

/// A message; the first number is a stage where there are two values.
#[derive(Debug)]
enum Message {
    Configure(Ring),
    DriveHello(u32),
    Held(u32, RingHeld),
    Step(RingStep),
    Ping(RingPing),
    Pong(u32, RingPing),
    Echo(u64),
    Resend(RingResend),
    Outcome(u32, RingOutcome),
    MirrorHello(u32),
    StandbyHeld(Vec<HeldSlot>),
    Mirror(u32, RingMirror),
    Mirrored(RingMirrored),
    NextMirrored(RingMirrored),
    Suspect(Node),
    Lost(Node),
    Look,
}

/// A message on its way.
struct Sent {
    from: Node,
    to: Node,
    /// The receiver's life for which it is meant.
    life: u32,
    /// The sender's epoch, in which alone it counts; `None` if it always does.
    epoch: Option<u32>,
    message: Message,
}

struct Worker {
    alive: bool,
    /// Nothing is handled until then.
    stopped: bool,
    /// Counts its lives, so that nothing of an earlier one arrives.
    life: u32,
    ring: Option<Ring>,
    replicas: BTreeMap<u32, StageReplica>,
    driver: Option<Driver>,
    received: u64,
    /// Rows of the steps among that.
    rows: u64,
    sent: u64,
    /// Messages of an epoch that has not reached this worker.
    early: Vec<Sent>,
}

struct Driver {
    runner: RingRunner,
    scheduler: Scheduler,
    events: mpsc::Sender<DriverEvent>,
    outs: Arc<Mutex<Vec<DriverOut>>>,
    step: Step,
}

type Queued = Reverse<(u64, u64)>;

pub(super) struct World {
    pub(super) dice: Dice,
    start: Instant,
    pub(super) now: u64,
    order: u64,
    queue: BinaryHeap<Queued>,
    messages: BTreeMap<u64, Sent>,
    /// Last delivery on each stream.
    streams: BTreeMap<(Node, Node, u8), u64>,
    workers: Vec<Worker>,
    splits: Vec<u32>,
    ring: Ring,
    pub(super) spares: bool,
    /// KV memory of drivers that are still to be made.
    pub(super) kv_tokens: Option<u64>,
    /// Requests with the tokens that have reached the client.
    pub(super) answers: Vec<Answer>,
    pub(super) epochs: u32,
}

pub(super) struct Answer {
    pub(super) request: Request,
    pub(super) tokens: Vec<u32>,
    pub(super) done: bool,
    pub(super) failed: Option<RequestError>,
}

impl Answer {
    /// The request for the rest of it.
    fn request_so_far(&self) -> GenerationRequest {
        let request = Request {
            generated: self.tokens.clone(),
            ..self.request.clone()
        };
        request.into()
    }
}

const HEAD: Node = usize::MAX;

impl World {
    /// `splits` are the ends of the stages' layers; workers 0.. are its members, then come its standbys,
    /// then the rest.
    pub(super) fn new(seed: u64, splits: &[u32], workers: usize, standbys: bool) -> Self {
        let stages = splits.len();
        let ring = Ring {
            epoch: 1,
            members: (0..stages).collect(),
            standbys: (stages..2 * stages)
                .map(|node| (standbys && node < workers).then_some(node))
                .collect(),
        };
        let mut world = World {
            dice: Dice::new(seed),
            start: Instant::now(),
            now: 0,
            order: 0,
            queue: BinaryHeap::new(),
            messages: BTreeMap::new(),
            streams: BTreeMap::new(),
            workers: (0..workers).map(|_| Worker::new(0)).collect(),
            splits: splits.to_vec(),
            ring,
            spares: standbys,
            kv_tokens: None,
            answers: Vec::new(),
            epochs: 1,
        };
        world.configure();
        world
    }

    pub(super) fn submit(&mut self, request: Request) {
        self.answers.push(Answer {
            request,
            tokens: Vec::new(),
            done: false,
            failed: None,
        });
        let key = self.answers.len() - 1;
        self.send_request(key);
    }

    /// Rows that a member was given to compute.
    pub(super) fn rows(&self, node: Node) -> u64 {
        self.workers[node].rows
    }

    /// Number of times that the present driver has preempted a request.
    pub(super) fn preempted(&self) -> u64 {
        let driver = self.ring.members.last().map(|&node| &self.workers[node]);
        let driver = driver.and_then(|worker| worker.driver.as_ref());
        driver.map_or(0, |driver| driver.scheduler.load().totals.preempted)
    }

    pub(super) fn members(&self) -> &[Node] {
        &self.ring.members
    }

    pub(super) fn standbys(&self) -> Vec<Node> {
        self.ring.standbys.iter().flatten().copied().collect()
    }

    pub(super) fn workers_alive(&self) -> usize {
        self.workers.iter().filter(|worker| worker.is_up()).count()
    }

    /// Ends a worker's process; the head and its neighbours see the closed connection.
    pub(super) fn kill(&mut self, node: Node) {
        let worker = &mut self.workers[node];
        worker.alive = false;
        worker.replicas.clear();
        worker.driver = None;
        self.send(node, HEAD, 9, Message::Lost(node));
    }

    /// A worker falls silent with its connections open.
    pub(super) fn stop(&mut self, node: Node) {
        self.workers[node].stopped = true;
    }

    /// A worker that was lost starts afresh; if the head has not noticed the loss before, it does now.
    pub(super) fn revive(&mut self) {
        if let Some(node) = (0..self.workers.len()).find(|&node| !self.workers[node].is_up()) {
            self.lost(node);
            self.workers[node] = Worker::new(self.workers[node].life + 1);
        }
    }

    /// Runs until `until` microseconds, or until nothing is left to happen.
    pub(super) fn run(&mut self, until: u64) {
        while let Some(&Reverse((at, order))) = self.queue.peek() {
            if at > until {
                break;
            }
            self.queue.pop();
            self.now = at;
            let Some(sent) = self.messages.remove(&order) else {
                continue;
            };
            if sent.to == HEAD {
                self.head(sent.message);
            } else if self.workers[sent.to].is_up() && self.workers[sent.to].life == sent.life {
                self.worker(sent);
            }
        }
        self.now = until;
    }

    pub(super) fn all_done(&self) -> bool {
        self.answers
            .iter()
            .all(|answer| answer.done || answer.failed.is_some())
    }

    pub(super) fn describe(&self) -> String {
        let mut text = format!("ring {:?}\n", self.ring);
        for (node, worker) in self.workers.iter().enumerate() {
            let epoch = worker.ring.as_ref().map(|ring| ring.epoch);
            let stages: Vec<&u32> = worker.replicas.keys().collect();
            let driver = worker
                .driver
                .as_ref()
                .map(|driver| driver.runner.describe());
            let up = worker.is_up();
            text +=
                &format!("{node}: {up} epoch {epoch:?} replicas {stages:?} driver {driver:?}\n");
        }
        for answer in &self.answers {
            let (tokens, of) = (answer.tokens.len(), answer.request.max_tokens);
            text += &format!("{tokens} of {of:?}\n");
        }
        text
    }

    fn clock(&self) -> Instant {
        self.start + Duration::from_micros(self.now)
    }

    fn send(&mut self, from: Node, to: Node, stream: u8, message: Message) {
        let delay = 50 + self.dice.below(400);
        let slot = self.streams.entry((from, to, stream)).or_default();
        let at = (*slot + 1).max(self.now + delay);
        *slot = at;
        let ring = self
            .workers
            .get(from)
            .and_then(|worker| worker.ring.as_ref());
        let epoch = ring.map(|ring| ring.epoch);
        self.schedule(at, from, to, epoch, message);
    }

    fn schedule(&mut self, at: u64, from: Node, to: Node, epoch: Option<u32>, message: Message) {
        self.order += 1;
        self.queue.push(Reverse((at, self.order)));
        let sent = Sent {
            from,
            to,
            life: self.workers.get(to).map_or(0, |worker| worker.life),
            epoch,
            message,
        };
        self.messages.insert(self.order, sent);
    }

    // The head.

    fn head(&mut self, message: Message) {
        match message {
            Message::Lost(node) => self.lost(node),
            Message::Suspect(node) => {
                if self.workers[node].stopped {
                    self.lost(node);
                }
            }
            other => panic!("the head does not expect {other:?}"),
        }
    }

    /// Nothing goes on: the head hears of it from an answer whose driver is silent, or from a driver that
    /// cannot reach a member.
    pub(super) fn nothing_goes_on(&mut self) {
        let members = self.ring.members.iter().copied();
        if let Some(node) = members.rev().find(|&node| !self.workers[node].is_up()) {
            self.lost(node);
        }
    }

    fn lost(&mut self, node: Node) {
        let gone = |node: &Node| !self.workers[*node].is_up();
        let mut ring = self.ring.clone();
        let was_driver = ring.members.last() == Some(&node);
        for standby in &mut ring.standbys {
            if standby.as_ref().is_some_and(gone) {
                *standby = None;
            }
        }
        for stage in 0..ring.members.len() {
            if !gone(&ring.members[stage]) {
                continue;
            }
            ring.members[stage] = match ring.standbys[stage].take() {
                Some(standby) => standby,
                None => match self.unused(&ring).or_else(|| spared(&mut ring.standbys)) {
                    Some(node) => node,
                    None => return self.dissolve(),
                },
            };
        }
        if self.spares {
            for stage in 0..ring.members.len() {
                if ring.standbys[stage].is_none() {
                    ring.standbys[stage] = self.unused(&ring);
                }
            }
        }
        if ring.members == self.ring.members && ring.standbys == self.ring.standbys {
            return;
        }
        // The simulation gives every change an epoch of its own, also that of a standby, which is the
        // harder case.
        ring.epoch += 1;
        self.ring = ring;
        self.epochs += 1;
        self.configure();
        for key in 0..self.answers.len() {
            if was_driver && !self.answers[key].done {
                self.send_request(key);
            }
        }
    }

    fn unused(&self, ring: &Ring) -> Option<Node> {
        let used = |node: &Node| {
            ring.members.contains(node) || ring.standbys.iter().flatten().any(|s| s == node)
        };
        (0..self.workers.len()).find(|node| self.workers[*node].is_up() && !used(node))
    }

    fn dissolve(&mut self) {
        for answer in &mut self.answers {
            if !answer.done {
                answer.failed = Some(RequestError::RingLost {
                    reason: "too few workers".to_owned(),
                });
            }
        }
    }

    fn configure(&mut self) {
        let ring = self.ring.clone();
        for node in ring.members.iter().chain(ring.standbys.iter().flatten()) {
            self.send(HEAD, *node, 0, Message::Configure(ring.clone()));
        }
    }

    fn send_request(&mut self, key: usize) {
        let now = self.clock();
        let driver = *self.ring.members.last().expect("a driver");
        // It waits at the worker until that one serves.
        if let Some(driver) = &mut self.workers[driver].driver {
            let request = self.answers[key].request_so_far();
            driver.scheduler.submit(key as u64, request, now);
        }
        self.schedule(self.now + 1, HEAD, driver, None, Message::Look);
    }

    // Workers.

    fn worker(&mut self, sent: Sent) {
        let (node, from) = (sent.to, sent.from);
        let ring = self.workers[node].ring.as_ref();
        let epoch = ring.map_or(0, |ring| ring.epoch);
        match sent.epoch {
            Some(its) if its > epoch => return self.workers[node].early.push(sent),
            Some(its) if its < epoch => return,
            _ => {}
        }
        match sent.message {
            Message::Configure(ring) => self.take_ring(node, ring),
            Message::DriveHello(stage) => {
                if let Some(replica) = self.workers[node].replicas.get(&stage) {
                    let held = replica.held();
                    self.send(node, from, 1, Message::Held(stage, held));
                }
            }
            Message::Held(stage, held) => {
                self.tell_driver(node, DriverEvent::Held { stage, held });
            }
            Message::Step(step) => {
                if self.is_driver(node) {
                    return self.tell_driver(node, DriverEvent::Rows(step));
                }
                self.workers[node].received += 1;
                self.workers[node].rows += step.tokens.len() as u64;
                self.with_replica(node, |replica, out| replica.step(step, out));
            }
            Message::Ping(mut ping) => {
                let worker = &self.workers[node];
                (ping.received, ping.sent) = (worker.received, worker.sent);
                let stage = self.stage_of(node);
                self.send(node, from, 1, Message::Pong(stage, ping));
            }
            Message::Pong(stage, ping) => {
                self.tell_driver(node, DriverEvent::Pong { stage, ping });
            }
            Message::Echo(nonce) => self.tell_driver(node, DriverEvent::Echo(nonce)),
            Message::Resend(resend) => {
                self.with_replica(node, |replica, out| replica.resend(&resend, out));
            }
            Message::Outcome(stage, outcome) => {
                self.tell_driver(node, DriverEvent::Outcome { stage, outcome });
            }
            Message::MirrorHello(stage) => {
                let Some(replica) = self.workers[node].replicas.get(&stage) else {
                    return;
                };
                let held = replica.held().slots;
                self.send(node, from, 3, Message::StandbyHeld(held));
            }
            Message::StandbyHeld(held) => {
                if self.is_driver(node) {
                    return self.tell_driver(node, DriverEvent::Standby(held));
                }
                self.with_replica(node, |replica, out| replica.replicate_to(&held, out));
            }
            Message::Mirror(stage, mirror) => {
                let Some(replica) = self.workers[node].replicas.get_mut(&stage) else {
                    return;
                };
                let mirrored = replica.apply_replicated(&mirror).expect("in step");
                self.send(node, from, 3, Message::Mirrored(mirrored));
            }
            Message::Mirrored(mirrored) => {
                if self.is_driver(node) {
                    return self.tell_driver(node, DriverEvent::Acknowledged(mirrored.count));
                }
                self.with_replica(node, |replica, out| {
                    replica.acknowledged(mirrored.count, out)
                });
            }
            Message::NextMirrored(mirrored) => {
                self.with_replica(node, |replica, _| replica.next_acknowledged(&mirrored));
            }
            Message::Look => self.drive(node),
            Message::Suspect(_) | Message::Lost(_) => panic!("for the head"),
        }
    }

    fn take_ring(&mut self, node: Node, ring: Ring) {
        let now = self.clock();
        let worker = &mut self.workers[node];
        let known = worker.ring.as_ref();
        if known.is_some_and(|old| old.epoch >= ring.epoch) {
            return;
        }
        let stages = ring.members.len();
        let mut own = ring
            .members
            .iter()
            .position(|&n| n == node)
            .map(|i| i as u32);
        let stood_by = (0..)
            .zip(&ring.standbys)
            .filter(|(_, standby)| **standby == Some(node));
        let stood_by: Vec<u32> = stood_by.map(|(stage, _)| stage).collect();
        let stays = |stage: &u32| own == Some(*stage) || stood_by.contains(stage);
        worker.replicas.retain(|stage, _| stays(stage));
        (worker.received, worker.sent) = (0, 0);
        for stage in own.iter().chain(&stood_by) {
            let layers = layers(&self.splits, *stage);
            let drives = worker.driver.is_some() && own == Some(*stage);
            if !drives && !worker.replicas.contains_key(stage) {
                let replica = StageReplica::new(Box::new(toy::stage(layers)), 1 << 20);
                worker.replicas.insert(*stage, replica);
            }
        }
        let epoch = ring.epoch;
        for stage in &stood_by {
            let replica = worker.replicas.get_mut(stage).expect("just made");
            replica.begin_epoch(epoch, *stage, false);
        }
        let last = stages as u32 - 1;
        if own == Some(last) {
            if worker.driver.is_none() {
                let replica = worker.replicas.remove(&last).expect("just made");
                worker.driver = Some(Driver::new(replica, stages, self.kv_tokens));
                let driver = worker.driver.as_mut().expect("just made");
                for (key, answer) in (0..).zip(&self.answers).filter(|(_, answer)| !answer.done) {
                    driver.scheduler.submit(key, answer.request_so_far(), now);
                }
            }
            let event = DriverEvent::Epoch {
                epoch,
                stages: stages as u32,
                half_rows: false,
            };
            let driver = worker.driver.as_mut().expect("just made");
            driver.events.send(event).expect("lives");
            own = None;
        } else {
            worker.driver = None;
        }
        if let Some(stage) = own {
            let replica = worker.replicas.get_mut(&stage).expect("just made");
            replica.begin_epoch(epoch, stage, false);
        }
        worker.ring = Some(ring.clone());
        let early = std::mem::take(&mut worker.early);
        if self.is_driver(node) {
            for (stage, member) in ring.members[..stages - 1].iter().enumerate() {
                self.send(node, *member, 2, Message::DriveHello(stage as u32));
            }
        }
        if let Some(stage) = ring.members.iter().position(|&n| n == node)
            && let Some(standby) = ring.standbys[stage]
        {
            self.send(node, standby, 4, Message::MirrorHello(stage as u32));
        }
        for sent in early {
            self.worker(sent);
        }
        self.drive(node);
    }

    fn is_driver(&self, node: Node) -> bool {
        self.workers[node].driver.is_some()
    }

    fn stage_of(&self, node: Node) -> u32 {
        let ring = self.workers[node].ring.as_ref().expect("configured");
        ring.members.iter().position(|&n| n == node).unwrap_or(0) as u32
    }

    fn with_replica(&mut self, node: Node, act: impl FnOnce(&mut StageReplica, &mut Vec<Out>)) {
        let stage = self.stage_of(node);
        let Some(ring) = self.workers[node].ring.clone() else {
            return;
        };
        let mut out = Vec::new();
        if let Some(replica) = self.workers[node].replicas.get_mut(&stage) {
            act(replica, &mut out);
        }
        self.send_outs(node, stage, &ring, out);
    }

    fn send_outs(&mut self, node: Node, stage: u32, ring: &Ring, out: Vec<Out>) {
        let s = stage as usize;
        let driver = *ring.members.last().expect("a driver");
        for out in out {
            match out {
                Out::Next(step) => {
                    self.workers[node].sent += 1;
                    self.send(node, ring.members[s + 1], 5, Message::Step(step));
                }
                Out::Driver(outcome) => {
                    self.send(node, driver, 1, Message::Outcome(stage, outcome));
                }
                Out::Previous(mirrored) => {
                    let previous = ring.members[s - 1];
                    self.send(node, previous, 6, Message::NextMirrored(mirrored));
                }
                Out::Standby(mirror) => {
                    if let Some(standby) = ring.standbys[s] {
                        self.send(node, standby, 4, Message::Mirror(stage, mirror));
                    }
                }
            }
        }
    }

    fn tell_driver(&mut self, node: Node, event: DriverEvent) {
        if let Some(driver) = &self.workers[node].driver {
            driver.events.send(event).expect("lives");
        }
        self.drive(node);
    }

    /// Runs the loop of an engine's thread until there is nothing to do.
    fn drive(&mut self, node: Node) {
        let now = self.clock();
        let Some(driver) = &mut self.workers[node].driver else {
            return;
        };
        let mut events = Vec::new();
        loop {
            let mut busy = false;
            while driver.runner.has_room() && driver.scheduler.plan(&mut driver.step, now) {
                driver.runner.begin(&mut driver.step, now);
                busy = true;
            }
            if let Some(outcome) = driver.runner.poll(now) {
                busy = true;
                match outcome {
                    Outcome::Logits(step, logits) => driver.scheduler.complete(step, logits, now),
                    Outcome::Failed(step, error) => driver.scheduler.fail(step, &error),
                    Outcome::Resumed(held) => driver.scheduler.resume(&held),
                    Outcome::Ended(error) => driver.scheduler.end_all(&error),
                }
            }
            while let Some(event) = driver.scheduler.next_event() {
                events.push(event);
            }
            if !busy {
                break;
            }
        }
        let timer = driver.runner.next_timer();
        let outs: Vec<DriverOut> = driver.outs.lock().expect("sound").drain(..).collect();
        for (key, event) in events {
            let answer = &mut self.answers[key as usize];
            match event {
                Event::Tokens(tokens) => {
                    assert_eq!(
                        tokens.index as usize,
                        answer.tokens.len(),
                        "a token lost or doubled"
                    );
                    answer.tokens.extend(tokens.tokens);
                }
                Event::Done(_) => answer.done = true,
                Event::Failed(error) => answer.failed = Some(error),
                Event::Scored(_) => {}
            }
        }
        let Some(ring) = self.workers[node].ring.clone() else {
            return;
        };
        let stage = ring.members.len() as u32 - 1;
        for out in outs {
            match out {
                DriverOut::Step(step) => self.send(node, ring.members[0], 2, Message::Step(step)),
                DriverOut::Ping(ping) => {
                    self.send(node, node, 8, Message::Echo(ping.nonce));
                    for member in &ring.members[..stage as usize] {
                        self.send(node, *member, 2, Message::Ping(ping.clone()));
                    }
                }
                DriverOut::Resend { stage, resend } => {
                    let member = ring.members[stage as usize];
                    self.send(node, member, 2, Message::Resend(resend));
                }
                DriverOut::Replica(out) => self.send_outs(node, stage, &ring, vec![out]),
                DriverOut::Suspect(suspicion) => {
                    let member = ring.members[suspicion.stage as usize];
                    self.send(node, HEAD, 9, Message::Suspect(member));
                }
                DriverOut::Trust { .. }
                | DriverOut::Running { .. }
                | DriverOut::Recovered(_)
                | DriverOut::Gauges(_) => {}
            }
        }
        if let Some(at) = timer {
            let at = at.saturating_duration_since(self.start).as_micros() as u64;
            self.schedule(at.max(self.now + 1000), node, node, None, Message::Look);
        }
    }
}

impl Worker {
    fn new(life: u32) -> Self {
        Worker {
            alive: true,
            stopped: false,
            life,
            ring: None,
            replicas: BTreeMap::new(),
            driver: None,
            received: 0,
            rows: 0,
            sent: 0,
            early: Vec::new(),
        }
    }

    fn is_up(&self) -> bool {
        self.alive && !self.stopped
    }
}

impl Driver {
    fn new(replica: StageReplica, stages: usize, kv_tokens: Option<u64>) -> Self {
        let (sender, receiver) = mpsc::channel();
        let outs = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&outs);
        let info = toy::info(0..toy::LAYERS);
        let out = Box::new(move |out| sink.lock().expect("sound").push(out));
        let config = SchedulerConfig {
            steps_under_way: stages as u32,
            kv_tokens,
            // Less than most answers take, so that memory runs out.
            answer_tokens: 5,
            ..SchedulerConfig::default()
        };
        Driver {
            scheduler: Scheduler::new(&info, Arc::new(Letters), config),
            runner: RingRunner::new(info, replica, receiver, out),
            events: sender,
            outs,
            step: Step::default(),
        }
    }
}

/// A standby of another stage is better used as a member.
fn spared(standbys: &mut [Option<Node>]) -> Option<Node> {
    standbys.iter_mut().find_map(Option::take)
}

fn layers(splits: &[u32], stage: u32) -> std::ops::Range<u32> {
    let stage = stage as usize;
    let start = if stage == 0 { 0 } else { splits[stage - 1] };
    start..splits[stage]
}
