//! The state of a node, for its caller.

use std::time::{Duration, Instant};

use foca::State;
use mesh_identity::NodeId;

use super::{Gossip, Member, MemberState, TICK_FANOUT};
use crate::clock::Now;
use crate::counts::Counts;
use crate::memory::MemoryRecord;
use crate::pulse::{FleetPulse, Pulse};
use crate::store::Topic;
use crate::threats::Sighting;

impl Gossip {
    /// All peers.
    pub fn members(&self, now: Now) -> Vec<Member> {
        let states = self.swim.states();
        let peers = self.directory.iter().map(|(node, peer)| Member {
            node,
            name: peer.name.clone(),
            role: peer.role.clone(),
            state: match states.get(&node) {
                Some(State::Alive) => MemberState::Alive,
                Some(State::Suspect) => MemberState::Suspect,
                Some(State::Down) => MemberState::Down,
                None => MemberState::Unheard,
            },
            pulse: self.fresh(peer.pulse, now),
        });
        peers.collect()
    }

    /// Condition of the machines that this node heard, with its own.
    pub fn fleet(&self, now: Now) -> FleetPulse {
        let peers = self
            .directory
            .iter()
            .filter_map(|(_, peer)| self.fresh(peer.pulse, now));
        FleetPulse::of(&peers.chain(self.pulse).collect::<Vec<_>>())
    }

    /// A pulse, until the peer has missed two of its turns to tell this node.
    fn fresh(&self, pulse: Option<(Pulse, Instant)>, now: Now) -> Option<Pulse> {
        let turns = u32::try_from(self.directory.len() / TICK_FANOUT + 5).unwrap_or(u32::MAX);
        let life = self.config.interval.saturating_mul(2 * turns);
        let (pulse, at) = pulse?;
        (now.instant.saturating_duration_since(at) <= life).then_some(pulse)
    }

    /// The sightings that are known.
    pub fn sightings(&self) -> Vec<Sighting> {
        let all = self.store.of_topic(Topic::Threats);
        all.filter_map(Sighting::read).collect()
    }

    /// The records of the topic `memory`.
    pub fn memory(&self) -> Vec<MemoryRecord> {
        let all = self.store.of_topic(Topic::Memory);
        all.map(MemoryRecord::from).collect()
    }

    /// A digest of all records: nodes with the same one have the same records.
    pub fn digest(&self) -> u64 {
        self.store.digest()
    }

    /// Number of records.
    pub fn records(&self) -> usize {
        self.store.len()
    }

    /// Counters since the start.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// Role of a peer, from its identity document.
    pub fn role_of(&self, peer: NodeId) -> Option<&str> {
        let peer = self.directory.get(peer)?;
        Some(&peer.role)
    }

    /// Time since a frame of this peer was taken; `None` if none was.
    pub fn silence_of(&self, peer: NodeId, now: Now) -> Option<Duration> {
        let heard = self.directory.get(peer)?.heard?;
        Some(now.instant.saturating_duration_since(heard))
    }
}
