//! Membership and suspicion by `foca` (SWIM): its identities, encoding, timers and bounds.

use std::collections::BTreeMap;
use std::num::{NonZeroU8, NonZeroUsize};
use std::time::{Duration, Instant};

use bytes::{Buf, BufMut};
use foca::{
    Codec, Foca, Header, Member, Message, NoCustomBroadcast, Notification, PeriodicParams, State,
    Timer,
};
use mesh_identity::NodeId;

use crate::counts::Refusal;

/// A member: a node, and how often it began anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Id {
    pub(crate) node: NodeId,
    pub(crate) generation: u64,
}

impl foca::Identity for Id {
    type Addr = NodeId;

    fn renew(&self) -> Option<Self> {
        Some(Self {
            generation: self.generation.checked_add(1)?,
            ..*self
        })
    }

    fn addr(&self) -> NodeId {
        self.node
    }

    fn win_addr_conflict(&self, adversary: &Self) -> bool {
        self.generation > adversary.generation
    }
}

/// Changes of the membership.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    Up(NodeId),
    Down(NodeId),
}

/// The membership protocol of one node.
pub(crate) struct Swim {
    foca: Foca<Id, Wire, Random, NoCustomBroadcast>,
    effects: Effects,
    timers: BTreeMap<TimerKey, (Instant, Timer<Id>)>,
}

impl Swim {
    pub(crate) fn new(own: Id, interval: Duration, seed: u64) -> Self {
        let random = Random(fastrand::Rng::with_seed(seed));
        Self {
            foca: Foca::new(own, config(interval), random, Wire),
            effects: Effects::default(),
            timers: BTreeMap::new(),
        }
    }

    pub(crate) fn generation(&self) -> u64 {
        self.foca.identity().generation
    }

    /// Takes in a message of the membership protocol in a verified frame. Members that are not `known` are left out, so
    /// that no peer can fill this node's memory with made-up ones. `latest` is the greatest generation that a clock of
    /// this mesh can give.
    pub(crate) fn receive(
        &mut self,
        sender: NodeId,
        packet: &[u8],
        known: impl Fn(NodeId) -> bool,
        latest: u64,
        now: Instant,
    ) -> Result<(), Refusal> {
        let own = *self.foca.identity();
        let mut rest = packet;
        let header = Wire
            .decode_header(&mut rest)
            .map_err(|_| Refusal::Malformed)?;
        if header.src.node != sender || header.dst.node != own.node {
            return Err(Refusal::Malformed);
        }
        if header.src.generation > latest || header.message == Message::Broadcast {
            return Err(Refusal::Malformed);
        }
        if third_party(&header.message).is_some_and(|third| !known(third.node)) {
            return Ok(());
        }
        let mut members = Vec::new();
        let mut above = None;
        if rest.remaining() >= 2 {
            for _ in 0..rest.get_u16() {
                let member = Wire
                    .decode_member(&mut rest)
                    .map_err(|_| Refusal::Malformed)?;
                let id = *member.id();
                if id.node == own.node {
                    above = above.max(Some(id.generation).filter(|it| *it > own.generation));
                }
                if id.generation <= latest && (id.node == own.node || known(id.node)) {
                    members.push(member);
                }
            }
        }
        if rest.has_remaining() {
            return Err(Refusal::Malformed);
        }
        // Somebody speaks of a generation of this node that it never had: it goes on beyond it.
        if let Some(above) = above.filter(|above| *above < latest) {
            let beyond = Id {
                generation: above + 1,
                ..own
            };
            let changed = self.foca.change_identity(beyond, &mut self.effects);
            self.settle(changed, now);
        }
        let mut header = header;
        header.dst = *self.foca.identity();
        self.handle(&header, &members, now);
        Ok(())
    }

    /// A verified frame of this sender came.
    pub(crate) fn heard(&mut self, sender: NodeId, generation: u64, now: Instant) {
        let header = Header {
            src: Id {
                node: sender,
                generation,
            },
            src_incarnation: 0,
            dst: *self.foca.identity(),
            message: Message::Gossip,
        };
        self.handle(&header, &[], now);
    }

    fn handle(&mut self, header: &Header<Id>, members: &[Member<Id>], now: Instant) {
        let mut packet = Vec::new();
        let encoded = Wire.encode_header(header, &mut packet);
        encoded.expect("a vector has room");
        if header.message != Message::Announce && header.message != Message::TurnUndead {
            packet.put_u16(u16::try_from(members.len()).expect("it was a u16 on the wire"));
            for member in members {
                let encoded = Wire.encode_member(member, &mut packet);
                encoded.expect("a vector has room");
            }
        }
        let handled = self.foca.handle_data(&packet, &mut self.effects);
        self.settle(handled, now);
    }

    /// Takes a node for down without telling others.
    pub(crate) fn drop_member(&mut self, node: NodeId, now: Instant) {
        let all = self.foca.iter_membership_state();
        let member = all.map(Member::id).find(|id| id.node == node).copied();
        if let Some(id) = member {
            let down = std::iter::once(Member::down(id));
            let applied = self.foca.apply_many(down, false, &mut self.effects);
            self.settle(applied, now);
        }
    }

    /// Fires the timers that are due, but not the periodic ones.
    pub(crate) fn run(&mut self, now: Instant) {
        self.fire(now, now, |key| !key.is_periodic());
    }

    /// Fires the periodic timers that are due until `limit`: their messages go into the frame that is signed
    /// now.
    pub(crate) fn run_periodic(&mut self, limit: Instant, now: Instant) {
        self.fire(limit, now, TimerKey::is_periodic);
    }

    fn fire(&mut self, limit: Instant, now: Instant, which: impl Fn(TimerKey) -> bool) {
        // One that is due again at once would never end.
        for _ in 0..MOST_TIMERS_AT_ONCE {
            let due = self.timers.iter();
            let due = due.filter(|(key, (at, _))| *at <= limit && which(**key));
            let due = due.min_by_key(|(_, (at, _))| *at).map(|(key, _)| *key);
            let Some((_, timer)) = due.and_then(|key| self.timers.remove(&key)) else {
                return;
            };
            let handled = self.foca.handle_timer(timer, &mut self.effects);
            self.settle(handled, now);
        }
    }

    /// The time of the next timer that is not periodic.
    pub(crate) fn next_timeout(&self) -> Option<Instant> {
        let timers = self.timers.iter().filter(|(key, _)| !key.is_periodic());
        timers.map(|(_, (at, _))| *at).min()
    }

    /// All members with their states.
    pub(crate) fn states(&self) -> BTreeMap<NodeId, State> {
        let all = self.foca.iter_membership_state();
        all.map(|member| (member.id().node, member.state()))
            .collect()
    }

    pub(crate) fn take_messages(&mut self) -> Vec<(NodeId, Vec<u8>)> {
        self.effects.is_urgent = false;
        std::mem::take(&mut self.effects.messages)
    }

    /// True if a message waits that somebody else waits for.
    pub(crate) fn has_urgent(&self) -> bool {
        self.effects.is_urgent
    }

    pub(crate) fn take_changes(&mut self) -> Vec<Change> {
        std::mem::take(&mut self.effects.changes)
    }

    fn settle(&mut self, result: Result<(), foca::Error>, now: Instant) {
        if let Err(error) = result {
            tracing::debug!(%error, "membership protocol");
        }
        for (timer, after) in std::mem::take(&mut self.effects.timers) {
            let key = TimerKey::of(&timer);
            // A node that is suspected already is not given more time.
            let same = self.timers.get(&key).is_some_and(|(_, old)| *old == timer);
            if !same || !matches!(key, TimerKey::Suspect(_)) {
                self.timers.insert(key, (now + after, timer));
            }
        }
    }
}

impl std::fmt::Debug for Swim {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Swim")
            .field("own", self.foca.identity())
            .field("active", &self.foca.num_members())
            .finish_non_exhaustive()
    }
}

/// One timer of each kind is pending, and one for each member: later ones supersede.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum TimerKey {
    Indirect,
    Probe,
    Announce,
    AnnounceDown,
    Gossip,
    Suspect(NodeId),
    Remove(NodeId),
}

impl TimerKey {
    fn is_periodic(self) -> bool {
        matches!(
            self,
            Self::Probe | Self::Announce | Self::AnnounceDown | Self::Gossip
        )
    }

    fn of(timer: &Timer<Id>) -> Self {
        match timer {
            Timer::ProbeRandomMember(_) => Self::Probe,
            Timer::SendIndirectProbe { .. } => Self::Indirect,
            Timer::ChangeSuspectToDown { member_id, .. } => Self::Suspect(member_id.node),
            Timer::PeriodicAnnounce(_) => Self::Announce,
            Timer::PeriodicAnnounceDown(_) => Self::AnnounceDown,
            Timer::PeriodicGossip(_) => Self::Gossip,
            Timer::RemoveDown(id) => Self::Remove(id.node),
        }
    }
}

#[derive(Debug, Default)]
struct Effects {
    messages: Vec<(NodeId, Vec<u8>)>,
    is_urgent: bool,
    timers: Vec<(Timer<Id>, Duration)>,
    changes: Vec<Change>,
}

impl foca::Runtime<Id> for Effects {
    fn notify(&mut self, notification: Notification<'_, Id>) {
        match notification {
            Notification::MemberUp(id) => self.changes.push(Change::Up(id.node)),
            Notification::MemberDown(id) => self.changes.push(Change::Down(id.node)),
            _ => {}
        }
    }

    fn send_to(&mut self, to: Id, data: &[u8]) {
        // Its periodic gossip waits for the next frame.
        self.is_urgent |= data.get(KIND_AT) != Some(&GOSSIP);
        if self.messages.len() < MOST_MESSAGES {
            self.messages.push((to.node, data.to_vec()));
        }
    }

    fn submit_after(&mut self, event: Timer<Id>, after: Duration) {
        self.timers.push((event, after));
    }
}

/// Random numbers for foca. They choose peers; nothing secret depends on them.
struct Random(fastrand::Rng);

impl rand::TryRng for Random {
    type Error = std::convert::Infallible;

    fn try_next_u32(&mut self) -> Result<u32, Self::Error> {
        Ok(self.0.u32(..))
    }

    fn try_next_u64(&mut self) -> Result<u64, Self::Error> {
        Ok(self.0.u64(..))
    }

    fn try_fill_bytes(&mut self, target: &mut [u8]) -> Result<(), Self::Error> {
        self.0.fill(target);
        Ok(())
    }
}

/// The node that a message is about, besides its sender and receiver.
fn third_party(message: &Message<Id>) -> Option<Id> {
    match message {
        Message::PingReq { target, .. } | Message::IndirectAck { target, .. } => Some(*target),
        Message::IndirectPing { origin, .. } | Message::ForwardedAck { origin, .. } => {
            Some(*origin)
        }
        _ => None,
    }
}

/// The encoding of foca's messages: fixed lengths, big-endian.
struct Wire;

#[derive(Debug, thiserror::Error)]
#[error("a message of the membership protocol is malformed or does not fit")]
struct WireError;

impl Codec<Id> for Wire {
    type Error = WireError;

    fn encode_header(
        &mut self,
        header: &Header<Id>,
        mut buf: impl BufMut,
    ) -> Result<(), WireError> {
        let (kind, probe, third) = match &header.message {
            Message::Ping(probe) => (1, *probe, None),
            Message::Ack(probe) => (2, *probe, None),
            Message::PingReq {
                target,
                probe_number,
            } => (3, *probe_number, Some(target)),
            Message::IndirectPing {
                origin,
                probe_number,
            } => (4, *probe_number, Some(origin)),
            Message::IndirectAck {
                target,
                probe_number,
            } => (5, *probe_number, Some(target)),
            Message::ForwardedAck {
                origin,
                probe_number,
            } => (6, *probe_number, Some(origin)),
            Message::Announce => (7, 0, None),
            Message::Feed => (8, 0, None),
            Message::Gossip => (GOSSIP, 0, None),
            Message::Broadcast => (10, 0, None),
            Message::TurnUndead => (11, 0, None),
        };
        let length = 2 * ID_BYTES + 4 + if third.is_some() { ID_BYTES } else { 0 };
        if buf.remaining_mut() < length {
            return Err(WireError);
        }
        put_id(&header.src, &mut buf);
        buf.put_u16(header.src_incarnation);
        put_id(&header.dst, &mut buf);
        buf.put_u8(kind);
        buf.put_u8(probe);
        if let Some(third) = third {
            put_id(third, &mut buf);
        }
        Ok(())
    }

    fn decode_header(&mut self, mut buf: impl Buf) -> Result<Header<Id>, WireError> {
        let src = get_id(&mut buf)?;
        let src_incarnation = buf.try_get_u16().map_err(|_| WireError)?;
        let dst = get_id(&mut buf)?;
        let kind = buf.try_get_u8().map_err(|_| WireError)?;
        let probe_number = buf.try_get_u8().map_err(|_| WireError)?;
        let message = match kind {
            1 => Message::Ping(probe_number),
            2 => Message::Ack(probe_number),
            3 => Message::PingReq {
                target: get_id(&mut buf)?,
                probe_number,
            },
            4 => Message::IndirectPing {
                origin: get_id(&mut buf)?,
                probe_number,
            },
            5 => Message::IndirectAck {
                target: get_id(&mut buf)?,
                probe_number,
            },
            6 => Message::ForwardedAck {
                origin: get_id(&mut buf)?,
                probe_number,
            },
            7 => Message::Announce,
            8 => Message::Feed,
            GOSSIP => Message::Gossip,
            10 => Message::Broadcast,
            11 => Message::TurnUndead,
            _ => return Err(WireError),
        };
        Ok(Header {
            src,
            src_incarnation,
            dst,
            message,
        })
    }

    fn encode_member(
        &mut self,
        member: &Member<Id>,
        mut buf: impl BufMut,
    ) -> Result<(), WireError> {
        if buf.remaining_mut() < ID_BYTES + 3 {
            return Err(WireError);
        }
        put_id(member.id(), &mut buf);
        buf.put_u16(member.incarnation());
        buf.put_u8(match member.state() {
            State::Alive => 1,
            State::Suspect => 2,
            State::Down => 3,
        });
        Ok(())
    }

    fn decode_member(&mut self, mut buf: impl Buf) -> Result<Member<Id>, WireError> {
        let id = get_id(&mut buf)?;
        let incarnation = buf.try_get_u16().map_err(|_| WireError)?;
        let state = match buf.try_get_u8().map_err(|_| WireError)? {
            1 => State::Alive,
            2 => State::Suspect,
            3 => State::Down,
            _ => return Err(WireError),
        };
        Ok(Member::new(id, incarnation, state))
    }
}

fn put_id(id: &Id, buf: &mut impl BufMut) {
    buf.put_slice(id.node.as_bytes());
    buf.put_u64(id.generation);
}

fn get_id(buf: &mut impl Buf) -> Result<Id, WireError> {
    let mut node = [0; 32];
    buf.try_copy_to_slice(&mut node).map_err(|_| WireError)?;
    Ok(Id {
        node: node.into(),
        generation: buf.try_get_u64().map_err(|_| WireError)?,
    })
}

/// All times follow from the interval between two frames: an answer takes up to a fifth of it at each end.
fn config(interval: Duration) -> foca::Config {
    let number = |number| NonZeroUsize::new(number).expect("not zero");
    foca::Config {
        probe_period: 2 * interval,
        probe_rtt: interval * 7 / 10,
        num_indirect_probes: number(3),
        max_transmissions: NonZeroU8::new(8).expect("not zero"),
        suspect_to_down_after: 5 * interval,
        remove_down_after: Some(Duration::from_secs(3600)),
        max_packet_size: number(1400),
        notify_down_members: true,
        periodic_announce: Some(PeriodicParams {
            frequency: 30 * interval,
            num_members: number(1),
        }),
        periodic_announce_to_down_members: Some(PeriodicParams {
            frequency: 10 * interval,
            num_members: number(2),
        }),
        periodic_gossip: Some(PeriodicParams {
            frequency: interval,
            num_members: number(2),
        }),
    }
}

const ID_BYTES: usize = 40;
/// Place of the kind in a message, and the number of one kind.
const KIND_AT: usize = 2 * ID_BYTES + 2;
const GOSSIP: u8 = 9;
const MOST_MESSAGES: usize = 256;
const MOST_TIMERS_AT_ONCE: usize = 4096;
