//! The worker's part in the gossip, over its link to the head.

mod lookout;

use std::collections::VecDeque;
use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use dcf::{Message, MsgType};
use mesh_audit::kept::{Contradiction, Keeper};
use mesh_base::clock;
use mesh_gossip::{Config, Counts, Event, Gossip, MemoryRecord, Now, Pulse, REFUSALS};
use mesh_net::quic::Refused;
use mesh_net::trust::NodeIdentity;
use mesh_proto::{BadSource, GossipFrame, GossipIdentities};
use mesh_service::config::GossipConfig;
use mesh_service::metrics::prometheus_client::collector::Collector;
use mesh_service::metrics::prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use mesh_service::metrics::prometheus_client::metrics::counter::ConstCounter;
use tokio::sync::Notify;

use crate::codec::message;
use crate::lock::lock;

use self::lookout::Lookout;

/// Gossip over whichever link to the head there is.
pub(crate) struct WorkerGossip {
    config: GossipConfig,
    state_dir: PathBuf,
    inner: Mutex<Option<Inner>>,
    changed: Notify,
}

struct Inner {
    core: Gossip,
    identity: NodeIdentity,
    /// SHA-256 of the mesh root that frames are bound to.
    root: [u8; 32],
    /// The document that the head was shown on this link.
    shown: Option<Vec<u8>>,
    /// Epochs of heads' audit trails.
    keeper: Keeper,
    lookout: Lookout,
    outbox: VecDeque<Message>,
    refreshed: Option<Instant>,
}

fn now(identity: &NodeIdentity) -> Now {
    Now {
        instant: Instant::now(),
        unix: clock::unix_seconds(identity.clock().now()),
    }
}

impl WorkerGossip {
    pub(crate) fn new(config: GossipConfig, state_dir: PathBuf) -> Self {
        Self {
            config,
            state_dir,
            inner: Mutex::new(None),
            changed: Notify::new(),
        }
    }

    /// The head shows documents of nodes; the first ones on a link invite this worker.
    pub(crate) fn introduced(&self, identity: &NodeIdentity, told: &GossipIdentities) {
        if !self.config.enabled {
            return;
        }
        let mut guard = lock(&self.inner);
        if guard.is_none() {
            *guard = self.begin(identity);
        }
        if let Some(inner) = guard.as_mut() {
            let now = now(identity);
            for document in &told.documents {
                if let Err(refusal) = inner.core.introduce(document, now) {
                    tracing::debug!(%refusal, "an identity document is not taken");
                }
            }
            inner.show(false);
        }
        drop(guard);
        self.changed.notify_one();
    }

    fn begin(&self, identity: &NodeIdentity) -> Option<Inner> {
        let signer = identity.signer()?;
        let now = now(identity);
        let epoch = mesh_gossip::next_epoch(&self.state_dir, now.unix);
        let epoch = epoch
            .inspect_err(
                |error| tracing::warn!(%error, "no gossip: the state directory cannot be written"),
            )
            .ok()?;
        let config = Config {
            interval: self.config.interval,
            most_peers: MOST_PEERS,
            epoch,
            seed: mesh_base::random::number(),
        };
        let root = identity.root_sha256();
        Some(Inner {
            core: Gossip::new(config, signer.key, (root, signer.root), now),
            root,
            identity: identity.clone(),
            shown: None,
            keeper: Keeper::open(&self.state_dir),
            lookout: Lookout::default(),
            outbox: VecDeque::new(),
            refreshed: None,
        })
    }

    /// A frame came over the link.
    pub(crate) fn receive(&self, sent: &GossipFrame) {
        if let Some(inner) = lock(&self.inner).as_mut() {
            let now = now(&inner.identity);
            if let Err(refusal) = inner.core.receive(&sent.frame, now) {
                tracing::debug!(%refusal, "a frame of gossip is not taken");
            }
        }
        self.changed.notify_one();
    }

    /// These nodes are expelled.
    pub(crate) fn dismiss<'a>(&self, nodes: impl Iterator<Item = &'a str>) {
        if let Some(inner) = lock(&self.inner).as_mut() {
            let now = now(&inner.identity);
            for node in nodes.filter_map(|node| node.parse().ok()) {
                inner.core.dismiss(node, now);
            }
        }
    }

    /// This worker turned peers away, or was sent pieces that are not the manifest's.
    pub(crate) fn report(&self, refused: &[Refused], accused: &[BadSource]) {
        if let Some(inner) = lock(&self.inner).as_mut() {
            let now = now(&inner.identity);
            let (lookout, at) = (&mut inner.lookout, now.instant);
            let mut seen: Vec<_> = refused
                .iter()
                .filter_map(|refused| lookout.refused(refused, at))
                .collect();
            seen.extend(accused.iter().filter_map(|bad| lookout.accused(bad, at)));
            for (kind, subject, detail) in seen {
                tracing::warn!(kind, subject, detail, "an attack: all nodes are told");
                inner.sight(kind, &subject, &detail, now);
            }
        }
        self.changed.notify_one();
    }

    /// The link is gone: what waited for it is void.
    pub(crate) fn unlinked(&self) {
        if let Some(inner) = lock(&self.inner).as_mut() {
            inner.shown = None;
            inner.outbox.clear();
        }
    }

    pub(crate) fn counts(&self) -> Counts {
        let inner = lock(&self.inner);
        inner
            .as_ref()
            .map(|inner| inner.core.counts())
            .unwrap_or_default()
    }

    /// The next message to the head, once one is due. Nothing is lost if the future is dropped.
    pub(crate) async fn next(&self) -> Message {
        loop {
            let wait = match self.poll() {
                Ok(message) => return message,
                Err(wait) => wait,
            };
            let changed = self.changed.notified();
            match wait {
                Some(next) => {
                    let _ = tokio::time::timeout_at(next.into(), changed).await;
                }
                None => changed.await,
            }
        }
    }

    /// A message that is due, or the time at which one may be, if there is one.
    fn poll(&self) -> Result<Message, Option<Instant>> {
        let mut guard = lock(&self.inner);
        let outdated = guard.as_ref().filter(|inner| inner.is_outdated());
        if let Some(begun) = outdated.and_then(|inner| self.begin(&inner.identity)) {
            guard.insert(begun).show(true);
        }
        match guard.as_mut().filter(|inner| inner.shown.is_some()) {
            Some(inner) => inner.step(&self.state_dir).map_err(Some),
            None => Err(None),
        }
    }
}

impl Inner {
    /// True if the mesh root was replaced and the node has papers of the new one. Frames are bound to the root.
    fn is_outdated(&self) -> bool {
        self.root != self.identity.root_sha256() && self.identity.signer().is_some()
    }

    /// Shows the head this worker's document, if it was not shown on this link, or was renewed, or `again`.
    fn show(&mut self, again: bool) {
        let Some(signer) = self.identity.signer() else {
            return;
        };
        if again || self.shown.as_ref() != Some(&signer.document) {
            let documents = vec![signer.document.clone()];
            let shown = GossipIdentities { documents };
            self.outbox
                .push_back(message(MsgType::GOSSIP_IDENTITIES, &shown));
            self.shown = Some(signer.document);
        }
    }

    /// A message that is due, or the time at which one may be.
    fn step(&mut self, state_dir: &std::path::Path) -> Result<Message, Instant> {
        let now = now(&self.identity);
        let due = |at: Instant| now.instant.saturating_duration_since(at) >= REFRESH;
        if self.refreshed.is_none_or(due) {
            self.refreshed = Some(now.instant);
            self.core.set_pulse(Pulse::read("/".as_ref(), state_dir));
            // The head may follow a rotation of the root later than this worker: until then it takes no document.
            let mut members = self.core.members(now).into_iter();
            let headless = !members.any(|member| member.role == "head");
            self.show(headless);
            if let Some(unsaved) = self.keeper.unsaved() {
                tokio::task::spawn_blocking(move || unsaved.write());
            }
        }
        if let Some(message) = self.outbox.pop_front() {
            return Ok(message);
        }
        let transmit = self.core.poll(now);
        while let Some(event) = self.core.poll_event() {
            self.follow(event, now);
        }
        match transmit {
            Some(transmit) => {
                let to = transmit.to.iter().map(|node| node.as_bytes().to_vec());
                let sent = GossipFrame {
                    to: to.collect(),
                    frame: transmit.frame,
                };
                Ok(message(MsgType::GOSSIP, &sent))
            }
            None => Err(self.core.next_timeout()),
        }
    }

    fn follow(&mut self, event: Event, now: Now) {
        let sighting = match event {
            Event::Sighted(sighting) => sighting,
            Event::Remembered(record) => return self.remember(&record, now),
            event => {
                tracing::debug!(?event, "gossip");
                return;
            }
        };
        tracing::warn!(
            kind = sighting.kind,
            subject = sighting.subject,
            detail = sighting.detail,
            reporter = %sighting.origin,
            "a node reports a threat"
        );
        // Only the head expels; links end by the list that it sends.
        let from_head = self.core.role_of(sighting.origin) == Some("head");
        if from_head
            && sighting.kind == "expelled"
            && let Ok(node) = sighting.subject.parse()
        {
            self.core.dismiss(node, now);
        }
    }

    /// Compares what a head shows of its audit trail with what it showed before.
    fn remember(&mut self, record: &MemoryRecord, now: Now) {
        if self.core.role_of(record.origin) != Some("head") {
            return;
        }
        let head = record.origin.to_string();
        let about = (&record.name[..], &record.value[..]);
        for contradiction in self.keeper.take(&head, record.version, about) {
            tracing::error!(head, %contradiction, "a head shows another past of its audit trail than before");
            self.sight(Contradiction::KIND, &head, &contradiction.to_string(), now);
        }
    }

    fn sight(&mut self, kind: &str, subject: &str, detail: &str, now: Now) {
        if let Err(error) = self.core.sight((kind, subject, detail), now) {
            tracing::debug!(%error, "the sighting is not told by gossip");
        }
    }
}

/// The counters of the gossip, read when they are asked for.
pub(crate) struct GossipCollector(pub(crate) Arc<WorkerGossip>);

impl std::fmt::Debug for GossipCollector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("GossipCollector")
    }
}

impl Collector for GossipCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let counts = self.0.counts();
        let kind = ConstCounter::new(0_u64).metric_type();
        let help = "Frames of gossip that were accepted or signed, and records that were verified";
        let mut family = encoder.encode_descriptor("gossip_events", help, None, kind)?;
        for (event, count) in [
            ("accepted", counts.accepted),
            ("signed", counts.sent),
            ("records", counts.records),
        ] {
            ConstCounter::new(count).encode(family.encode_family(&[("event", event)])?)?;
        }
        let help = "Frames, documents and records of gossip that were refused";
        let mut family = encoder.encode_descriptor("gossip_refused", help, None, kind)?;
        for ((_, reason), count) in REFUSALS.iter().zip(counts.refused) {
            ConstCounter::new(count).encode(family.encode_family(&[("reason", *reason)])?)?;
        }
        Ok(())
    }
}

const MOST_PEERS: usize = 1024;
const REFRESH: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests;
