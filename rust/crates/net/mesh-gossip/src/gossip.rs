//! The node: frames, documents and the time in, frames and events out.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use foca::State;
use mesh_identity::{IdentityKey, NodeId, PublicKey};
use mesh_proto::{GossipBody, GossipRecord, GossipSwim, GossipSync};
use prost::Message as _;

use crate::clock::Now;
use crate::counts::{Counts, Refusal};
use crate::directory::Directory;
use crate::envelope::{self, Header};
use crate::memory::MemoryRecord;
use crate::pulse::Pulse;
use crate::store::{BUCKETS, Inserted, Key, Store, Topic};
use crate::swim::{Change, Id, Swim};
use crate::threats::Sighting;

mod publish;
mod view;

/// Settings of a node.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Interval between two frames of a node that has nothing urgent to say.
    pub interval: Duration,
    /// Peers that are remembered at most.
    pub most_peers: usize,
    /// Start of this process, in seconds since the Unix epoch; above that of every earlier start.
    pub epoch: u64,
    /// Seed of the choice of peers.
    pub seed: u64,
}

/// A frame to send. One signature serves all receivers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transmit {
    /// Receivers.
    pub to: Vec<NodeId>,
    /// The frame.
    pub frame: Vec<u8>,
}

/// News for the caller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A peer is a member and answers.
    Up(NodeId),
    /// A peer is taken for dead.
    Down(NodeId),
    /// A peer reports a sighting, for the first time.
    Sighted(Sighting),
    /// A peer's record is new or newer.
    Remembered(MemoryRecord),
}

/// State of a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum MemberState {
    /// It answers.
    Alive,
    /// It did not answer a probe, and can still contradict.
    Suspect,
    /// It is taken for dead.
    Down,
    /// Its identity document is known, and nothing was heard of it.
    Unheard,
}

/// A peer, as this node sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct Member {
    /// Its id.
    pub node: NodeId,
    /// Its name, from its identity document.
    pub name: String,
    /// Its role, from its identity document.
    pub role: String,
    /// Its state.
    pub state: MemberState,
    /// Its last pulse, if that is not too old.
    pub pulse: Option<Pulse>,
}

/// The gossip of one node.
///
/// Call [`poll`](Self::poll) until it returns `None` after every other call and at [`next_timeout`](Self::next_timeout);
/// then take the events.
#[derive(Debug)]
pub struct Gossip {
    config: Config,
    key: Arc<IdentityKey>,
    mesh: [u8; 32],
    counter: u64,
    directory: Directory,
    swim: Swim,
    store: Store,
    random: fastrand::Rng,
    /// Peers in the order of their turns.
    turns: Vec<NodeId>,
    pulse: Option<Pulse>,
    /// Reconciliation that waits for the next frame, by receiver.
    syncs: BTreeMap<NodeId, PeerSync>,
    next_tick: Instant,
    /// A frame is due before the next tick.
    hurry: Option<Instant>,
    last_frame: Option<Instant>,
    ticks: u64,
    events: VecDeque<Event>,
    counts: Counts,
}

#[derive(Debug, Default)]
struct PeerSync {
    /// Buckets whose list it is sent.
    buckets: BTreeSet<usize>,
    /// Records to ask it for.
    ask: BTreeSet<Key>,
    /// Records to send it.
    send: BTreeSet<Key>,
}

impl Gossip {
    /// A node of the mesh with this digest of its root's certificate, whose documents this root key signs.
    pub fn new(
        config: Config,
        key: Arc<IdentityKey>,
        (mesh, root): ([u8; 32], PublicKey),
        now: Now,
    ) -> Self {
        let config = Config {
            interval: config.interval.clamp(SHORTEST_INTERVAL, LONGEST_INTERVAL),
            ..config
        };
        let own = Id {
            node: key.node_id(),
            generation: config.epoch,
        };
        let mut random = fastrand::Rng::with_seed(config.seed);
        // Nodes that start together do not speak together.
        let first = config.interval.mul_f32(random.f32());
        Self {
            swim: Swim::new(own, config.interval, random.u64(..)),
            directory: Directory::new(mesh, root, config.most_peers, now.instant),
            key,
            mesh,
            counter: 0,
            store: Store::default(),
            random,
            turns: Vec::new(),
            pulse: None,
            syncs: BTreeMap::new(),
            next_tick: now.instant + first,
            hurry: None,
            last_frame: None,
            ticks: 0,
            events: VecDeque::new(),
            counts: Counts::default(),
            config,
        }
    }

    /// This node's id.
    pub fn own_id(&self) -> NodeId {
        self.key.node_id()
    }

    /// Takes in the identity document of a peer. Returns the peer.
    ///
    /// # Errors
    /// If the mesh root did not sign it, it is not valid now, or the bound on peers is reached.
    pub fn introduce(&mut self, document: &[u8], now: Now) -> Result<NodeId, Refusal> {
        let own = self.own_id();
        let introduced = self.directory.introduce(document, own, now);
        match introduced {
            Ok((node, _)) => Ok(node),
            // Everybody is shown their own document at times.
            Err(Refusal::Own) => Err(Refusal::Own),
            Err(refusal) => Err(self.refused(refusal)),
        }
    }

    /// Forgets a node: its frames are those of a stranger from now on, and its records are gone.
    pub fn dismiss(&mut self, node: NodeId, now: Now) {
        if self.directory.remove(node) {
            self.swim.drop_member(node, now.instant);
            self.store.forget(node);
            self.syncs.remove(&node);
            self.gather_changes();
        }
    }

    /// Takes in a frame. Nothing behind the envelope is read unless a known peer signed it for this mesh, with a counter
    /// that it did not use before.
    ///
    /// # Errors
    /// The reason for which the frame was refused; it is counted, too.
    pub fn receive(&mut self, frame: &[u8], now: Now) -> Result<(), Refusal> {
        match self.verify(frame, now) {
            Ok((sender, content)) => {
                self.counts.accepted += 1;
                match GossipBody::decode(content) {
                    Ok(body) => self.take(sender, body, now),
                    Err(_) => Err(self.refused(Refusal::Malformed)),
                }
            }
            Err(refusal) => Err(self.refused(refusal)),
        }
    }

    /// The cheap checks first: a stranger's frame costs a look into a map.
    fn verify<'a>(&mut self, frame: &'a [u8], now: Now) -> Result<(NodeId, &'a [u8]), Refusal> {
        let header = Header::read(frame)?;
        if header.mesh != self.mesh {
            return Err(Refusal::Mesh);
        }
        if header.sender == self.own_id() {
            return Err(Refusal::Own);
        }
        let peer = self.directory.get_mut(header.sender);
        let peer = peer.ok_or(Refusal::Stranger)?;
        if !peer.is_valid_at(now.unix) {
            return Err(Refusal::Expired);
        }
        let latest = now.unix.saturating_add(CLOCK_TOLERANCE);
        if header.epoch > latest || !peer.window.is_fresh(header.epoch, header.counter) {
            return Err(Refusal::Replay);
        }
        if !peer.may_cost(now.instant) {
            return Err(Refusal::Rate);
        }
        let key = self.directory.key(header.sender).expect("it is a peer");
        let content = envelope::open(frame, &key)?;
        let peer = self.directory.get_mut(header.sender);
        let peer = peer.expect("it is a peer");
        peer.window.note(header.epoch, header.counter);
        peer.heard = Some(now.instant);
        Ok((header.sender, content))
    }

    fn take(&mut self, sender: NodeId, body: GossipBody, now: Now) -> Result<(), Refusal> {
        let parts = body.swim.len() + body.records.len() + body.sync.len();
        let latest = now.unix.saturating_add(CLOCK_TOLERANCE);
        if parts > MOST_PARTS || body.generation > latest {
            return Err(self.refused(Refusal::Malformed));
        }
        if let (Some(peer), Some(pulse)) = (self.directory.get_mut(sender), &body.pulse) {
            peer.pulse = Some((Pulse::from_wire(pulse), now.instant));
        }
        let own = self.own_id();
        let mut result = Ok(());
        let mut addressed = false;
        for swim in body.swim.iter().filter(|swim| swim.to == own.as_bytes()) {
            addressed = true;
            let known = |node| self.directory.get(node).is_some();
            let received = self
                .swim
                .receive(sender, &swim.packet, known, latest, now.instant);
            result = result.and(received.map_err(|refusal| self.refused(refusal)));
        }
        if !addressed {
            self.swim.heard(sender, body.generation, now.instant);
        }
        self.gather_changes();
        for record in body.records {
            // Refused ones are counted; the others of the frame may be good.
            let _ = self.take_record(sender, record, now);
        }
        // While a rumour spreads, digests differ by themselves; a comparison now and then is enough.
        let is_calm = !self.store.has_rumours() || self.random.u8(..4) == 0;
        if body.digests.len() == BUCKETS * 8 && is_calm {
            let differing = self.store.differing(&body.digests);
            // Not always the same ones first, for one that cannot be made equal.
            let from = self.random.usize(..BUCKETS);
            let (before, after): (Vec<_>, Vec<_>) =
                differing.into_iter().partition(|bucket| *bucket < from);
            let mut chosen = after
                .into_iter()
                .chain(before)
                .take(MOST_BUCKETS)
                .peekable();
            if chosen.peek().is_some()
                && let Some(sync) = self.sync_with(sender)
            {
                sync.buckets.extend(chosen);
            }
        }
        for sync in body.sync.iter().filter(|sync| sync.to == own.as_bytes()) {
            self.reconcile(sender, sync);
        }
        if self.swim.has_urgent() || !self.syncs.is_empty() {
            self.hasten(now.instant + self.config.interval / 5);
        }
        result
    }

    fn take_record(
        &mut self,
        sender: NodeId,
        record: GossipRecord,
        now: Now,
    ) -> Result<(), Refusal> {
        if self.store.hears_again(&record) {
            return Ok(());
        }
        let origin = <[u8; 32]>::try_from(&record.origin[..]);
        let origin = NodeId::from(origin.map_err(|_| self.refused(Refusal::Malformed))?);
        let may = self.directory.get_mut(sender);
        if !may.is_some_and(|peer| peer.may_cost_record(now.instant)) {
            return Err(self.refused(Refusal::Rate));
        }
        let key = match self.directory.key(origin) {
            Some(key) => key,
            // One that this process's predecessor published.
            None if origin == self.own_id() => Arc::new(self.key.public().expand()),
            None => return Err(self.refused(Refusal::Stranger)),
        };
        let pushes = self.pushes();
        let inserted = self
            .store
            .insert(&self.mesh, (origin, &key), record, pushes, now.unix);
        let inserted = inserted.map_err(|refusal| self.refused(refusal))?;
        self.counts.records += 1;
        if let Inserted::New(key) | Inserted::Newer(key) = inserted {
            self.announce(key, inserted);
            self.hasten(now.instant);
        }
        Ok(())
    }

    fn announce(&mut self, key: Key, inserted: Inserted) {
        let own = self.own_id();
        let Some(entry) = self.store.get(key).filter(|entry| entry.origin != own) else {
            return;
        };
        let event = match entry.topic {
            Topic::Threats if matches!(inserted, Inserted::New(_)) => {
                Sighting::read(entry).map(Event::Sighted)
            }
            // A newer version of a sighting is the same sighting, seen again or withdrawn.
            Topic::Threats => None,
            Topic::Memory => Some(Event::Remembered(entry.into())),
        };
        if let Some(event) = event {
            self.push(event);
        }
    }

    fn reconcile(&mut self, sender: NodeId, sync: &GossipSync) {
        let bucket = usize::try_from(sync.bucket).unwrap_or(usize::MAX);
        let (wanted, _) = sync.want.as_chunks::<16>();
        let mut send: Vec<Key> = wanted.iter().map(|key| Key(*key)).collect();
        let mut ask = Vec::new();
        if sync.lists && bucket < BUCKETS {
            let compared = self.store.compare(bucket, &sync.have);
            send.extend(compared.0);
            ask = compared.1;
        }
        send.retain(|key| self.store.get(*key).is_some());
        if send.is_empty() && ask.is_empty() {
            return;
        }
        if let Some(waiting) = self.sync_with(sender) {
            let room = MOST_WAITING.saturating_sub(waiting.send.len());
            waiting.send.extend(send.into_iter().take(room));
            let room = MOST_WAITING.saturating_sub(waiting.ask.len());
            waiting.ask.extend(ask.into_iter().take(room));
        }
    }

    /// The reconciliation with a peer, if there is room for one.
    fn sync_with(&mut self, peer: NodeId) -> Option<&mut PeerSync> {
        let room = self.syncs.len() < MOST_SYNCS;
        (room || self.syncs.contains_key(&peer)).then(|| self.syncs.entry(peer).or_default())
    }

    /// Sets the condition of this machine, which goes into its frames.
    pub fn set_pulse(&mut self, pulse: Pulse) {
        self.pulse = Some(pulse);
    }

    /// Does the work that is due, and returns the next frame to send.
    pub fn poll(&mut self, now: Now) -> Option<Transmit> {
        self.swim.run(now.instant);
        self.gather_changes();
        if self.swim.has_urgent() {
            self.hasten(now.instant + self.config.interval / 5);
        }
        let is_due = self.hurry.is_some_and(|due| now.instant >= due);
        // A frame that is due shortly before the next tick takes its place: signatures are the greatest cost.
        let early = if is_due {
            self.config.interval * 2 / 5
        } else {
            Duration::ZERO
        };
        let is_tick = now.instant + early >= self.next_tick;
        if !is_tick && !is_due {
            return None;
        }
        self.hurry = None;
        if is_tick {
            self.ticks += 1;
            let jitter = 0.9 + 0.2 * self.random.f32();
            self.next_tick = now.instant + self.config.interval.mul_f32(jitter);
            self.store.expire(now.unix);
            let limit = now.instant + self.config.interval / 2;
            self.swim.run_periodic(limit, now.instant);
            self.gather_changes();
        }
        let transmit = self.frame(is_tick);
        if transmit.is_some() {
            self.last_frame = Some(now.instant);
        }
        if self.store.has_rumours() || !self.syncs.is_empty() {
            self.hasten(now.instant + FRAME_GAP);
        }
        transmit
    }

    /// Everything that is due, for everyone whom it concerns, in one frame.
    fn frame(&mut self, is_tick: bool) -> Option<Transmit> {
        let mut to = BTreeSet::new();
        let mut body = GossipBody {
            generation: self.swim.generation(),
            pulse: self.pulse.map(Pulse::to_wire),
            ..GossipBody::default()
        };
        for (peer, packet) in self.swim.take_messages() {
            if self.directory.get(peer).is_some() && body.swim.len() < MOST_SWIM {
                to.insert(peer);
                let peer = peer.as_bytes().to_vec();
                body.swim.push(GossipSwim { to: peer, packet });
            }
        }
        // A node that is alone keeps its rumours.
        let mut records = BTreeSet::new();
        if self.directory.len() > 0 {
            records.extend(self.store.take_rumours(MOST_RECORDS));
        }
        let fanout = match records.is_empty() {
            false => RUMOUR_FANOUT,
            true if is_tick => TICK_FANOUT,
            true => 0,
        };
        self.add_syncs(&mut body, &mut records, &mut to);
        body.records = records
            .iter()
            .filter_map(|key| self.store.record(*key))
            .collect();
        if is_tick && (!self.store.has_rumours() || self.ticks.is_multiple_of(4)) {
            body.digests = self.store.digests();
        }
        self.add_turns(&mut to, fanout, is_tick);
        if to.is_empty() {
            return None;
        }
        self.counts.sent += 1;
        Some(Transmit {
            to: to.into_iter().collect(),
            frame: self.sign_content(&body.encode_to_vec()),
        })
    }

    /// A frame of this node with this content. [`poll`](Self::poll) makes its own; this is for tests of receivers.
    pub fn sign_content(&mut self, content: &[u8]) -> Vec<u8> {
        self.counter += 1;
        let header = Header {
            mesh: self.mesh,
            sender: self.own_id(),
            epoch: self.config.epoch,
            counter: self.counter,
        };
        header.seal(&self.key, content)
    }

    fn add_syncs(
        &mut self,
        body: &mut GossipBody,
        records: &mut BTreeSet<Key>,
        to: &mut BTreeSet<NodeId>,
    ) {
        let mut waiting = std::mem::take(&mut self.syncs);
        while let Some((peer, mut sync)) = waiting.pop_first() {
            if self.directory.get(peer).is_none() {
                continue;
            }
            let id = peer.as_bytes().to_vec();
            for bucket in &sync.buckets {
                body.sync.push(GossipSync {
                    to: id.clone(),
                    bucket: u32::try_from(*bucket).expect("a few"),
                    have: self.store.list(*bucket),
                    want: Vec::new(),
                    lists: true,
                });
            }
            if !sync.ask.is_empty() {
                body.sync.push(GossipSync {
                    to: id,
                    want: sync.ask.iter().flat_map(|key| key.0).collect(),
                    ..GossipSync::default()
                });
            }
            let mut later = PeerSync::default();
            while let Some(key) = sync.send.pop_first() {
                if records.len() < MOST_RECORDS || records.contains(&key) {
                    records.insert(key);
                } else {
                    later.send.insert(key);
                }
            }
            to.insert(peer);
            if !later.send.is_empty() {
                self.syncs.insert(peer, later);
            }
            if body.sync.len() >= MOST_SYNC_PARTS {
                self.syncs.append(&mut waiting);
            }
        }
    }

    /// Adds the peers whose turn it is. Those that are taken for dead get a frame now and then: both sides of a partition
    /// find each other again.
    fn add_turns(&mut self, to: &mut BTreeSet<NodeId>, fanout: usize, is_tick: bool) {
        let states = self.swim.states();
        let is_down = |peer: &NodeId| states.get(peer) == Some(&State::Down);
        let mut to_down = usize::from(is_tick && self.ticks.is_multiple_of(2));
        let mut to_others = fanout.saturating_sub(to.len());
        for _ in 0..self.directory.len() {
            if to_down + to_others == 0 {
                return;
            }
            let Some(peer) = self.next_turn() else { return };
            let room = match is_down(&peer) {
                true => &mut to_down,
                false => &mut to_others,
            };
            if *room > 0 && to.insert(peer) {
                *room -= 1;
            }
        }
    }

    /// The next peer in turn. All have theirs before any has another.
    fn next_turn(&mut self) -> Option<NodeId> {
        if self.turns.is_empty() {
            self.turns = self.directory.iter().map(|(node, _)| node).collect();
            self.random.shuffle(&mut self.turns);
        }
        self.turns.pop()
    }

    /// The time of the next [`poll`](Self::poll).
    pub fn next_timeout(&self) -> Instant {
        let timers = self.swim.next_timeout().into_iter().chain(self.hurry);
        timers.fold(self.next_tick, Instant::min)
    }

    /// The next event.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    fn refused(&mut self, refusal: Refusal) -> Refusal {
        self.counts.refuse(refusal);
        refusal
    }

    fn push(&mut self, event: Event) {
        // A caller that takes none loses the oldest.
        if self.events.len() >= MOST_EVENTS {
            self.events.pop_front();
        }
        self.events.push_back(event);
    }

    fn gather_changes(&mut self) {
        for change in self.swim.take_changes() {
            self.push(match change {
                Change::Up(node) => Event::Up(node),
                Change::Down(node) => Event::Down(node),
            });
        }
    }

    /// Frames that a rumour goes into, at each node: every node is then told about 12 times in a mesh of 64.
    fn pushes(&self) -> u8 {
        let peers = u8::try_from(self.directory.len().max(1).ilog2()).expect("at most 64");
        1 + peers.div_ceil(3)
    }

    /// Makes a frame due at this time, but not too soon after the last one.
    fn hasten(&mut self, at: Instant) {
        let earliest = self.last_frame.map_or(at, |last| last + FRAME_GAP);
        let at = at.max(earliest);
        self.hurry = Some(self.hurry.map_or(at, |due| due.min(at)));
    }
}

/// Bounds of [`Config::interval`].
const SHORTEST_INTERVAL: Duration = Duration::from_millis(200);
const LONGEST_INTERVAL: Duration = Duration::from_secs(60);
/// Shortest time between two frames of a node.
const FRAME_GAP: Duration = Duration::from_millis(100);
/// Receivers of a frame with rumours, and of one without.
const RUMOUR_FANOUT: usize = 6;
const TICK_FANOUT: usize = 2;
/// Parts of a frame that is received; more are not read.
const MOST_PARTS: usize = 128;
/// Parts of a frame that is sent. All of them fit the longest frame.
const MOST_SWIM: usize = 8;
const MOST_RECORDS: usize = 6;
const MOST_SYNC_PARTS: usize = 3;
/// Buckets that are reconciled with one peer at a time.
const MOST_BUCKETS: usize = 2;
const MOST_SYNCS: usize = 64;
const MOST_WAITING: usize = 64;
const MOST_EVENTS: usize = 1024;
/// Seconds by which a peer's epoch may be ahead of this node's time.
const CLOCK_TOLERANCE: u64 = 2 * 24 * 3600;
