//! The head's node in the gossip: the core, the documents of the workers that take part, and the bounds of relaying.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::{Duration, Instant, SystemTime};

use dcf::{Message, MsgType};
use mesh_audit::kept::{Contradiction, Keeper, ShownEpochs, Unsaved};
use mesh_base::clock;
use mesh_gossip::{Config, Counts, FleetPulse, Gossip, Member, MemoryRecord, Now, Pulse, Sighting};
use mesh_net::trust::NodeIdentity;
use mesh_proto::{GossipFrame, GossipIdentities};
use tokio::sync::Notify;
use tracing::{debug, error, warn};

use crate::locks::lock;

/// The head's part in the gossip; without an identity or when it is switched off, nothing.
#[derive(Debug, Default)]
pub(crate) struct HeadGossip {
    inner: Mutex<Option<Inner>>,
    pub(super) changed: Notify,
}

#[derive(Debug)]
pub(super) struct Inner {
    pub(super) core: Gossip,
    identity: NodeIdentity,
    /// SHA-256 of the mesh root that frames are bound to.
    root: [u8; 32],
    state_dir: PathBuf,
    /// The head's own document.
    pub(super) document: Vec<u8>,
    /// Documents of the connected workers that gossip.
    pub(super) documents: BTreeMap<String, Vec<u8>>,
    pub(super) relays: Relays,
    /// Epochs of other heads' audit trails.
    keeper: Keeper,
    refreshed: Option<Instant>,
}

/// What the head shows of the gossip.
#[derive(Debug)]
pub(crate) struct GossipView {
    pub(crate) fleet: FleetPulse,
    pub(crate) members: Vec<Member>,
    pub(crate) threats: usize,
    /// The latest of them.
    pub(crate) sightings: Vec<Sighting>,
    pub(crate) records: usize,
    pub(crate) counts: Counts,
    pub(crate) relayed: u64,
    pub(crate) not_relayed: u64,
}

/// Frames that were carried, with a bound for each worker and second.
#[derive(Debug, Default)]
pub(super) struct Relays {
    since: Option<Instant>,
    carried: BTreeMap<String, usize>,
    relayed: u64,
    refused: u64,
}

impl Relays {
    /// The number of receivers that a worker's frame may still have.
    pub(super) fn allow(&mut self, node: &str, receivers: usize, now: Instant) -> usize {
        let over = |since: Instant| now.saturating_duration_since(since) >= Duration::from_secs(1);
        if self.since.is_none_or(over) {
            (self.since, self.carried) = (Some(now), BTreeMap::new());
        }
        let carried = self.carried.entry(node.to_owned()).or_default();
        let allowed = receivers.min(MOST_CARRIED.saturating_sub(*carried));
        *carried += allowed;
        self.relayed += allowed as u64;
        self.refused += (receivers - allowed) as u64;
        allowed
    }
}

fn now() -> Now {
    Now {
        instant: Instant::now(),
        unix: clock::unix_seconds(SystemTime::now()),
    }
}

impl HeadGossip {
    /// Takes part from now on.
    pub(super) fn start(&self, identity: NodeIdentity, interval: Duration, state_dir: PathBuf) {
        let Some(signer) = identity.signer() else {
            warn!("no gossip: this head's identity has no document of its mesh root");
            return;
        };
        let now = now();
        let epoch = match mesh_gossip::next_epoch(&state_dir, now.unix) {
            Ok(epoch) => epoch,
            Err(error) => {
                warn!(%error, "no gossip: the state directory cannot be written");
                return;
            }
        };
        let config = Config {
            interval,
            most_peers: MOST_PEERS,
            epoch,
            seed: mesh_base::random::number(),
        };
        let root = identity.root_sha256();
        *lock(&self.inner) = Some(Inner {
            core: Gossip::new(config, signer.key, (root, signer.root), now),
            identity,
            root,
            keeper: Keeper::open(&state_dir),
            state_dir,
            document: signer.document,
            documents: BTreeMap::new(),
            relays: Relays::default(),
            refreshed: None,
        });
    }

    /// Begins anew if the mesh root was replaced and the head has papers of the new one.
    pub(super) fn follow_root(&self, interval: Duration) {
        let outdated = lock(&self.inner).as_ref().and_then(|inner| {
            let is =
                inner.root != inner.identity.root_sha256() && inner.identity.signer().is_some();
            is.then(|| (inner.identity.clone(), inner.state_dir.clone()))
        });
        if let Some((identity, state_dir)) = outdated {
            self.start(identity, interval, state_dir);
        }
    }

    /// The message that invites a worker to gossip; workers of earlier versions ignore it.
    pub(super) fn invitation(&self) -> Option<Message> {
        let inner = lock(&self.inner);
        let document = inner.as_ref()?.document.clone();
        Some(identities(vec![document]))
    }

    pub(crate) fn view(&self) -> Option<GossipView> {
        let guard = lock(&self.inner);
        let (inner, now) = (guard.as_ref()?, now());
        let mut sightings = inner.core.sightings();
        let threats = sightings.len();
        sightings.sort_by_key(|sighting| std::cmp::Reverse(sighting.seen));
        sightings.truncate(MOST_SHOWN);
        Some(GossipView {
            fleet: inner.core.fleet(now),
            members: inner.core.members(now),
            threats,
            sightings,
            records: inner.core.records(),
            counts: inner.core.counts(),
            relayed: inner.relays.relayed,
            not_relayed: inner.relays.refused,
        })
    }

    pub(super) fn with<T>(&self, work: impl FnOnce(&mut Inner, Now) -> T) -> Option<T> {
        lock(&self.inner).as_mut().map(|inner| work(inner, now()))
    }

    /// The same for changes after which a frame may be due.
    pub(super) fn change<T>(&self, work: impl FnOnce(&mut Inner, Now) -> T) -> Option<T> {
        let done = self.with(work);
        self.changed.notify_one();
        done
    }
}

impl Inner {
    /// True once in a while: then the parts of this node's frames are to be made anew.
    fn is_due(&mut self, now: Now) -> bool {
        let due = |at: Instant| now.instant.saturating_duration_since(at) >= REFRESH;
        let is_due = self.refreshed.is_none_or(due);
        if is_due {
            self.refreshed = Some(now.instant);
        }
        is_due
    }

    /// Reads this machine's condition, publishes the last epochs of the audit trail, and reads the document
    /// if the certificate was renewed.
    pub(super) fn refresh(
        &mut self,
        epochs: impl FnOnce() -> Vec<ShownEpochs>,
        now: Now,
    ) -> Refreshed {
        if !self.is_due(now) {
            return Refreshed::default();
        }
        self.core
            .set_pulse(Pulse::read("/".as_ref(), &self.state_dir));
        for shown in epochs() {
            let (name, value) = (shown.record_name(), shown.to_value());
            let remembered = self
                .core
                .remember(name.as_bytes(), &value, EPOCHS_LIFE, now);
            if let Err(error) = remembered {
                debug!(%error, name, "epochs of the audit trail are not told by gossip");
            }
        }
        Refreshed {
            document: self.renewed_document(),
            unsaved: self.keeper.unsaved(),
        }
    }

    /// Compares what another head shows of its audit trail with what it showed before.
    pub(super) fn remember(&mut self, record: &MemoryRecord, now: Now) {
        if self.core.role_of(record.origin) != Some("head") {
            return;
        }
        let head = record.origin.to_string();
        let about = (&record.name[..], &record.value[..]);
        for contradiction in self.keeper.take(&head, record.version, about) {
            error!(head, %contradiction, "a head shows another past of its audit trail than before");
            let detail = contradiction.to_string();
            let told = self.core.sight((Contradiction::KIND, &head, &detail), now);
            if let Err(error) = told {
                debug!(%error, "the sighting is not told by gossip");
            }
        }
    }

    fn renewed_document(&mut self) -> Option<Message> {
        let signer = self.identity.signer()?;
        (signer.document != self.document).then(|| {
            self.document.clone_from(&signer.document);
            identities(vec![signer.document])
        })
    }
}

/// What is to be done after [`Inner::refresh`].
#[derive(Debug, Default)]
pub(super) struct Refreshed {
    /// The head's own document, if it is another one.
    pub(super) document: Option<Message>,
    /// Epochs to write.
    pub(super) unsaved: Option<Unsaved>,
}

pub(super) fn frame(frame: Vec<u8>) -> Message {
    let to = Vec::new();
    message(MsgType::GOSSIP, &GossipFrame { to, frame })
}

pub(super) fn identities(documents: Vec<Vec<u8>>) -> Message {
    message(MsgType::GOSSIP_IDENTITIES, &GossipIdentities { documents })
}

fn message(kind: MsgType, body: &impl prost::Message) -> Message {
    Message::new(kind, 0, clock::timestamp_us(), body.encode_to_vec())
}

const MOST_PEERS: usize = 1024;
/// Frames that the head carries for one worker in a second, one for each receiver. At rest a worker sends about three.
const MOST_CARRIED: usize = 120;
const REFRESH: Duration = Duration::from_secs(5);
/// Life of the records with the epochs of the audit trail.
const EPOCHS_LIFE: Duration = Duration::from_secs(30 * 24 * 3600);
/// Sightings that are shown.
const MOST_SHOWN: usize = 32;
