//! Records which worker has and seeks which pieces of which model, and which worker downloads a model from
//! outside the mesh.
//!
//! Workers report what they hold and seek ([`Tracker::said`]). [`Tracker::poll`] compares the sources that
//! each should know with those that it was told, so that an event which comes late or twice changes nothing.
//!
//! If pieces are sought that no worker holds, one of the workers that could get the model from outside the
//! mesh has its *download*. It keeps it while it makes progress; when it is gone, fails or stands still,
//! another one gets it. All others wait and take the pieces from it as they come.
//!
//! The meaning of a name does not depend on the last or loudest claim: see `pins`.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use mesh_proto::{HeldModel, ModelSources, Models, NodeAddr, SoughtModel, Sources};
use mesh_share::PieceSet;
use tracing::warn;

mod conflicts;
mod downloads;
mod names;
mod pins;
mod show;

#[cfg(test)]
mod tests;

use pins::{Conflicts, is_fingerprint, is_name};
pub use pins::{PinError, Pins, advice};

/// See the module's page.
#[derive(Debug, Clone, Default)]
pub struct Tracker {
    nodes: BTreeMap<String, TrackedWorker>,
    downloads: BTreeMap<Key, Download>,
    /// Workers whose download failed, each with the time from which it may try again.
    failures: BTreeMap<(Key, String), FailedDownload>,
    /// By model and accused: the workers that report bad pieces from it.
    accused: BTreeMap<(String, String), BTreeSet<String>>,
    pins: Pins,
    conflicts: Conflicts,
    changed: bool,
    /// Time at which a decision may be due without an event.
    timer: Option<Instant>,
    counts: TrackerCounts,
    actions: Vec<Action>,
}

/// An action for the shell to carry out.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Tell this worker the sources of the models that it seeks.
    Tell {
        /// Node id.
        node: String,
        /// The sources to send.
        sources: Sources,
    },
    /// Keep the pins, see [`Tracker::pins`].
    KeepPins,
}

/// Counts since the last [`Tracker::take_counts`], for the metrics.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TrackerCounts {
    /// Reports that a worker sent something else than a manifest says, by the name of that worker.
    pub bad_sources: BTreeMap<String, u64>,
    /// Reported conflicts of names.
    pub conflicts: u64,
}

/// A worker.
#[derive(Debug, Clone, Default)]
struct TrackedWorker {
    name: String,
    /// Address for other workers; `None` if they do not reach it.
    address: Option<SocketAddr>,
    /// Other addresses of its machine, as it says.
    others: Vec<IpAddr>,
    /// The head's own address on the way to it.
    head_ip: Option<IpAddr>,
    held: BTreeMap<String, HeldCopy>,
    sought: Vec<Sought>,
    told: Option<Sources>,
}

#[derive(Debug, Clone)]
struct HeldCopy {
    names: Vec<String>,
    bytes: u64,
    pieces: PieceSet,
    signed: bool,
}

impl HeldCopy {
    /// Returns true if some pieces are here under this name: of a model that was replaced, only the manifest
    /// may be left.
    fn is_called(&self, name: &str) -> bool {
        !self.pieces.is_empty() && self.names.iter().any(|own| own.eq_ignore_ascii_case(name))
    }
}

#[derive(Debug, Clone)]
struct Sought {
    model: SoughtModel,
    /// Pieces that it lacks; `None` while the manifest is unknown to it.
    missing: Option<PieceSet>,
}

/// Returns true if the seeker does not accept this fingerprint under any name.
fn rejects(sought: &SoughtModel, fingerprint: &str) -> bool {
    let mut rejected = sought.refused.iter().chain(&sought.unusable);
    rejected.any(|rejected| rejected == fingerprint)
}

/// A model that is sought: by its fingerprint where that is known, by its name otherwise.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Key {
    Fingerprint(String),
    Name(String),
}

#[derive(Debug, Clone)]
struct Download {
    node: String,
    /// Bytes at its last report, and since when they are so many.
    bytes: u64,
    since: Instant,
}

#[derive(Debug, Clone)]
struct FailedDownload {
    until: Instant,
    times: u32,
}

impl Tracker {
    /// An empty tracker.
    pub fn new() -> Self {
        Tracker::default()
    }

    /// The same with the pins of an earlier run.
    #[must_use]
    pub fn with_pins(mut self, pins: Pins) -> Self {
        self.pins = pins;
        self
    }

    /// A worker's link is up. `head_ip` is the head's own address on the way to it.
    pub fn joined(&mut self, node: &str, name: &str, head_ip: Option<IpAddr>) {
        let entry = TrackedWorker {
            name: name.to_owned(),
            head_ip,
            ..TrackedWorker::default()
        };
        self.nodes.insert(node.to_owned(), entry);
        self.changed = true;
    }

    /// A worker that has just joined says that its machine has these addresses.
    pub fn has_addresses(&mut self, node: &str, others: Vec<IpAddr>) {
        if let Some(entry) = self.nodes.get_mut(node) {
            entry.others = others;
        }
    }

    /// A worker is reached at this address from now on.
    pub fn moved(&mut self, node: &str, ip: IpAddr) {
        let node = self.nodes.get_mut(node);
        if let Some(address) = node.and_then(|node| node.address.as_mut()) {
            address.set_ip(ip);
            self.changed = true;
        }
    }

    /// A worker's link is closed.
    pub fn left(&mut self, node: &str) {
        if self.nodes.remove(node).is_none() {
            return;
        }
        // A worker that comes back may have been mended.
        self.accused.retain(|(_, accused), _| accused != node);
        for accusers in self.accused.values_mut() {
            accusers.remove(node);
        }
        self.changed = true;
    }

    /// A worker, which others reach at `address`, reports the models that it holds and seeks.
    pub fn said(&mut self, node: &str, address: Option<SocketAddr>, models: Models, now: Instant) {
        let Some(entry) = self.nodes.get_mut(node) else {
            return;
        };
        entry.address = address.filter(|_| models.port != 0);
        let all_held = models.held.into_iter().take(MOST_MODELS);
        entry.held = all_held.filter_map(held).collect();
        let all_sought = models.sought.into_iter().take(MOST_MODELS);
        entry.sought = all_sought.filter_map(sought).collect();
        let accuser = entry.name.clone();
        for bad in models.bad.into_iter().take(MOST_MODELS) {
            // An accusation counts only if the accused claims to hold the model, so there are at most as many
            // as holders.
            let accused = self.nodes.get(&bad.node_id).filter(|accused| {
                bad.node_id != node && accused.held.contains_key(&bad.fingerprint)
            });
            let Some(accused) = accused else {
                continue;
            };
            let key = (bad.fingerprint.clone(), bad.node_id);
            if self.accused.entry(key).or_default().insert(node.to_owned()) {
                warn!(
                    model = bad.fingerprint,
                    worker = accused.name,
                    accuser,
                    reason = shorten(&bad.reason),
                    "worker reported: it sent something else than the model's manifest says"
                );
                let count = self.counts.bad_sources.entry(accused.name.clone());
                *count.or_default() += 1;
            }
        }
        self.pin_downloads(node);
        self.note_progress(node, now);
        self.changed = true;
    }

    /// Returns the actions that are due; to be called after events and now and then.
    pub fn poll(&mut self, now: Instant) -> Vec<Action> {
        if self.changed || self.timer.is_some_and(|timer| timer <= now) {
            self.changed = false;
            self.settle_pins();
            self.find_conflicts(now);
            self.settle_downloads(now);
            self.tell();
        }
        std::mem::take(&mut self.actions)
    }

    /// Counts since the last call.
    pub fn take_counts(&mut self) -> TrackerCounts {
        std::mem::take(&mut self.counts)
    }

    /// Sends every worker the sources that it should know and was not told.
    fn tell(&mut self) {
        let mut news = Vec::new();
        for (node, entry) in &self.nodes {
            if entry.sought.is_empty() && entry.told.is_none() {
                continue;
            }
            let sought = entry.sought.iter();
            let models = sought.map(|sought| self.sources_of(node, entry, sought));
            let models = models.collect();
            let sources = Sources { models };
            if entry.told.as_ref() != Some(&sources) {
                news.push((node.clone(), sources));
            }
        }
        for (node, sources) in news {
            if let Some(entry) = self.nodes.get_mut(&node) {
                entry.told = Some(sources.clone());
            }
            self.actions.push(Action::Tell { node, sources });
        }
    }

    fn sources_of(&self, node: &str, entry: &TrackedWorker, sought: &Sought) -> ModelSources {
        let key = self.key(&sought.model);
        let fingerprint = match &key {
            Key::Fingerprint(fingerprint) => fingerprint.clone(),
            Key::Name(_) => String::new(),
        };
        let others = self.nodes.iter().filter(|(other, _)| {
            *other != node && !self.is_banned(&fingerprint, other, Some(node))
        });
        let holders = others.filter_map(|(other, holder)| {
            let pieces = holder.held.get(&fingerprint)?.pieces.len();
            Some((pieces, other, holder.address?, holder))
        });
        let mut holders: Vec<(u32, &String, SocketAddr, &TrackedWorker)> = holders.collect();
        // Those with most first, should there be more than are told.
        holders.sort_by(|a, b| b.0.cmp(&a.0).then_with(|| a.1.cmp(b.1)));
        holders.truncate(MOST_HOLDERS);
        // In an order that does not change with every piece that comes.
        holders.sort_by(|a, b| a.1.cmp(b.1));
        let addrs = holders.into_iter().map(|(_, other, address, holder)| {
            let others = holder.others.iter();
            let others = others.map(|ip| SocketAddr::new(*ip, address.port()).to_string());
            NodeAddr {
                addresses: others.collect(),
                node_id: other.clone(),
                name: holder.name.clone(),
                address: self.reach(entry, address).to_string(),
            }
        });
        let download = self.downloads.get(&key);
        let origin = download.is_some_and(|download| download.node == node);
        let for_others = origin.then(|| {
            let mut others = self.uncovered(&fingerprint);
            if let Some(own) = &sought.missing {
                others.subtract(own);
            }
            others
        });
        let for_others = for_others.filter(|others| !others.is_empty());
        let pin = self.pins.get(&sought.model.name);
        ModelSources {
            name: sought.model.name.clone(),
            fingerprint,
            holders: addrs.collect(),
            origin,
            origin_worker: download.map_or_else(String::new, |one| self.name_of(&one.node)),
            for_others: for_others.map(|others| others.to_proto()),
            pin: pin.map_or_else(String::new, |pin| pin.fingerprint.clone()),
            disputed: self.is_disputed(&sought.model.name),
            pinned_by_operator: pin.is_some_and(|pin| pin.operator),
        }
    }

    /// Address at which `from` reaches a worker that the head sees at `address`: a worker on the head's own
    /// machine is reached at the head's address.
    fn reach(&self, from: &TrackedWorker, address: SocketAddr) -> SocketAddr {
        let own = from.address.is_none_or(|own| own.ip().is_loopback());
        match from.head_ip {
            Some(ip) if address.ip().is_loopback() && !own => SocketAddr::new(ip, address.port()),
            _ => address,
        }
    }

    /// Returns true if this worker's pieces of a model do not count: for a worker that accuses it, or for
    /// all, if two do.
    fn is_banned(&self, fingerprint: &str, node: &str, asker: Option<&str>) -> bool {
        let key = (fingerprint.to_owned(), node.to_owned());
        self.accused.get(&key).is_some_and(|accusers| {
            accusers.len() >= ACCUSERS || asker.is_some_and(|asker| accusers.contains(asker))
        })
    }

    fn key(&self, model: &SoughtModel) -> Key {
        if !model.fingerprint.is_empty() {
            return Key::Fingerprint(model.fingerprint.clone());
        }
        match self.resolve(model) {
            Some(fingerprint) => Key::Fingerprint(fingerprint),
            None => Key::Name(model.name.clone()),
        }
    }

    /// The model that goes by the name that is sought: the pinned one; without a pin, or where the seeker
    /// will not take that, the one that most workers hold whole, then the one that most have anything of.
    fn resolve(&self, sought: &SoughtModel) -> Option<String> {
        let name = &sought.name;
        let pin = self.pins.get(name);
        // An operator's pin counts more than the hub.
        let rejects = |fingerprint: &str| match pin {
            Some(pin) if pin.operator && pin.fingerprint == fingerprint => {
                sought.unusable.contains(&pin.fingerprint)
            }
            _ => rejects(sought, fingerprint),
        };
        let mut found: BTreeMap<&str, (usize, usize)> = BTreeMap::new();
        for entry in self.nodes.values().filter(|node| node.address.is_some()) {
            for (fingerprint, held) in &entry.held {
                let taken = held.is_called(name) && !rejects(fingerprint);
                if taken && (held.signed || !sought.signed_only) {
                    let count = found.entry(fingerprint).or_default();
                    count.0 += usize::from(held.pieces.is_all());
                    count.1 += 1;
                }
            }
        }
        let pin = pin.map(|pin| &pin.fingerprint);
        if let Some(pin) = pin.filter(|pin| !rejects(pin)) {
            if found.contains_key(pin.as_str()) {
                return Some(pin.clone());
            }
            if !sought.signed_only {
                return None;
            }
        }
        let best = found
            .into_iter()
            .max_by(|(a, x), (b, y)| x.cmp(y).then_with(|| b.cmp(a)));
        best.map(|(fingerprint, _)| fingerprint.to_owned())
    }

    /// Name of a sought model, for people.
    fn title(&self, key: &Key) -> String {
        match key {
            Key::Name(name) => name.clone(),
            Key::Fingerprint(fingerprint) => {
                let mut sought = self.nodes.values().flat_map(|node| &node.sought);
                let named = sought.find(|sought| self.key(&sought.model) == *key);
                named
                    .map_or(fingerprint, |sought| &sought.model.name)
                    .clone()
            }
        }
    }

    fn name_of(&self, node: &str) -> String {
        let known = self.nodes.get(node).map(|node| node.name.clone());
        known.unwrap_or_else(|| node.to_owned())
    }
}

/// Checks a worker's report of a held model; `None` if it is invalid.
fn held(model: HeldModel) -> Option<(String, HeldCopy)> {
    let pieces = PieceSet::from_proto(model.pieces.as_ref()?).ok()?;
    is_fingerprint(&model.fingerprint).then(|| {
        let names = model.names.into_iter().filter(|name| is_name(name));
        let held = HeldCopy {
            names: names.take(MOST_NAMES).collect(),
            bytes: model.bytes,
            pieces,
            signed: model.signed,
        };
        (model.fingerprint, held)
    })
}

/// Checks a worker's report of a sought model; `None` if it is invalid.
fn sought(mut model: SoughtModel) -> Option<Sought> {
    for rejected in [&mut model.refused, &mut model.unusable] {
        rejected.truncate(MOST_REFUSED);
        rejected.retain(|fingerprint| is_fingerprint(fingerprint));
    }
    let missing = match &model.missing {
        Some(pieces) => Some(PieceSet::from_proto(pieces).ok()?),
        None => None,
    };
    let known = model.fingerprint.is_empty() || is_fingerprint(&model.fingerprint);
    (known && is_name(&model.name)).then_some(Sought { model, missing })
}

/// Shortens text from other nodes for the log.
fn shorten(text: &str) -> String {
    let clean = text.chars().filter(|c| !c.is_control());
    clean.take(REASON_CHARS).collect()
}
/// Workers that must accuse another one before it is named to no worker any more: one alone may be wrong, or
/// lie.
const ACCUSERS: usize = 2;
/// Most sources of a model that a worker is given.
const MOST_HOLDERS: usize = 32;
/// Models that a worker may hold, and seek.
const MOST_MODELS: usize = 256;
const MOST_NAMES: usize = 16;
/// Manifests that a worker may refuse under one name.
const MOST_REFUSED: usize = 16;
const REASON_CHARS: usize = 300;
