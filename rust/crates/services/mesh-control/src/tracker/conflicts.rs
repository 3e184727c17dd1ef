//! Names that several models claim.
//!
//! One worker alone cannot make a conflict: its own claims differ only while it replaces a model, and its
//! inventions do not count for others. Nor can a few workers hide a conflict, or fill the log: each node has
//! a bounded share of the reports.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use mesh_api::NameConflict;
use tracing::{error, warn};

use super::pins::{advice, key};
use super::{Action, Tracker};

/// A name with the workers that claim it.
#[derive(Default)]
struct ClaimedName {
    conflict: NameConflict,
    /// Ids of the nodes that hold something under it.
    holders: BTreeSet<String>,
    /// These, those that refuse the pinned model, and those that made the pin.
    involved: BTreeSet<String>,
    is_sought: bool,
}

impl ClaimedName {
    fn new(name: &str) -> Self {
        ClaimedName {
            conflict: NameConflict {
                name: name.to_owned(),
                ..NameConflict::default()
            },
            ..ClaimedName::default()
        }
    }

    fn is_conflict(&self) -> bool {
        let NameConflict {
            claims,
            pinned,
            decided,
            refused_by,
            ..
        } = &self.conflict;
        let of_pin = pinned.as_ref().and_then(|pin| claims.get(pin));
        let is_gone = of_pin.is_some_and(Vec::is_empty);
        let differ = claims.len() > 1 && (self.holders.len() > 1 || is_gone || *decided);
        (differ || !refused_by.is_empty()) && (*decided || self.involved.len() > 1)
    }
}

impl Tracker {
    /// Reported conflicts, by name: names that several models claim, so that no worker should take either
    /// model unseen.
    pub fn conflicts(&self) -> Vec<NameConflict> {
        self.conflicts.told.values().cloned().collect()
    }

    /// Returns true if a name is claimed for several models and no operator has decided.
    pub(super) fn is_disputed(&self, name: &str) -> bool {
        self.conflicts.disputed.contains(&key(name))
    }

    /// Finds names that several models claim, and reports those that are new.
    pub(super) fn find_conflicts(&mut self, now: Instant) {
        let mut names = self.claimed();
        self.move_pins(&names, now);
        for pin in self.pins.list() {
            let Some(claimed) = names.get_mut(&key(&pin.name)) else {
                continue;
            };
            let conflict = &mut claimed.conflict;
            conflict.name.clone_from(&pin.name);
            conflict.pinned = Some(pin.fingerprint.clone());
            conflict.decided = pin.operator;
            conflict.claims.entry(pin.fingerprint.clone()).or_default();
            let made_by = [&pin.node, &pin.holder];
            claimed.involved.extend(made_by.into_iter().cloned());
        }
        for (id, node) in &self.nodes {
            for sought in &node.sought {
                let Some(claimed) = names.get_mut(&key(&sought.model.name)) else {
                    continue;
                };
                claimed.is_sought = true;
                let pinned = claimed.conflict.pinned.as_ref();
                if pinned.is_some_and(|pin| sought.model.refused.contains(pin)) {
                    claimed.conflict.refused_by.push(node.name.clone());
                    claimed.involved.insert(id.clone());
                }
            }
        }
        names.retain(|_, claimed| claimed.is_conflict());
        let disputed = names.iter().filter(|(_, one)| !one.conflict.decided);
        self.conflicts.disputed = disputed.map(|(name, _)| name.clone()).collect();
        let told = select(names);
        for (name, claimed) in &told {
            if !self.conflicts.told.contains_key(name) && self.is_news(name, &claimed.involved, now)
            {
                let conflict = &claimed.conflict;
                error!(model = conflict.name, "{}", advice(conflict));
                self.counts.conflicts += 1;
            }
        }
        let told = told.into_iter();
        self.conflicts.told = told.map(|(name, one)| (name, one.conflict)).collect();
    }

    /// Holders of models by name, in lower case.
    fn claimed(&self) -> BTreeMap<String, ClaimedName> {
        let mut names: BTreeMap<String, ClaimedName> = BTreeMap::new();
        let reached = self.nodes.iter();
        for (id, node) in reached.filter(|(_, node)| node.address.is_some()) {
            let held = node.held.iter();
            for (fingerprint, held) in held.filter(|(_, held)| !held.pieces.is_empty()) {
                let keys: BTreeSet<String> = held.names.iter().map(|name| key(name)).collect();
                for name in keys {
                    let new = || ClaimedName::new(&name);
                    let claimed = names.entry(name.clone()).or_insert_with(new);
                    let claims = &mut claimed.conflict.claims;
                    let workers = claims.entry(fingerprint.clone()).or_default();
                    workers.push(node.name.clone());
                    claimed.holders.insert(id.clone());
                    claimed.involved.insert(id.clone());
                }
            }
        }
        names
    }

    /// Moves a pin to the new model where the worker that had the name first replaced its model: while no
    /// other worker has the old one, or claims the name for a third, the pin protects nothing.
    fn move_pins(&mut self, names: &BTreeMap<String, ClaimedName>, now: Instant) {
        let mut moved = Vec::new();
        for (name, pin) in &mut self.pins.0 {
            let Some(claimed) = names.get(name).filter(|_| !pin.operator) else {
                continue;
            };
            let mut claims = claimed.conflict.claims.keys();
            if let (Some(only), None) = (claims.next(), claims.next())
                && *only != pin.fingerprint
                && claimed.holders.contains(&pin.holder)
            {
                let before = std::mem::replace(&mut pin.fingerprint, only.clone());
                moved.push((name.clone(), pin.clone(), before));
            }
        }
        for (name, pin, before) in moved {
            self.actions.push(Action::KeepPins);
            if self.is_news(&name, &[pin.holder].into(), now) {
                warn!(
                    model = pin.name,
                    worker = pin.worker,
                    before,
                    now = pin.fingerprint,
                    "the worker that had this model first replaced it, and no worker has the old one: the name means the new one"
                );
            }
        }
    }

    /// Returns true if this is new for the log: at most once in a while, and not again and again for the same
    /// nodes.
    fn is_news(&mut self, name: &str, involved: &BTreeSet<String>, now: Instant) -> bool {
        let noted = &mut self.conflicts.noted;
        noted.retain(|_, (at, _)| now.saturating_duration_since(*at) < NOTED_FOR);
        let notes_of = |node: &String| {
            let of_node = noted.values().filter(|(_, nodes)| nodes.contains(node));
            of_node.count()
        };
        let is_news =
            !noted.contains_key(name) && involved.iter().any(|node| notes_of(node) < MOST_NOTES);
        if is_news {
            noted.insert(name.to_owned(), (now, involved.clone()));
        }
        is_news
    }
}

/// Selects the conflicts to report: first those that an operator decided about or a worker waits for, and
/// some of each node's.
fn select(names: BTreeMap<String, ClaimedName>) -> BTreeMap<String, ClaimedName> {
    let mut ranked: Vec<(String, ClaimedName)> = names.into_iter().collect();
    ranked.sort_by_key(|(_, one)| {
        let several = one.holders.len() > 1;
        Reverse((one.conflict.decided, one.is_sought, several))
    });
    let mut shares: BTreeMap<String, usize> = BTreeMap::new();
    let (mut first, mut rest) = (Vec::new(), Vec::new());
    for (name, claimed) in ranked {
        let share = |node: &String| shares.get(node).copied().unwrap_or(0);
        let mut involved = claimed.involved.iter();
        if involved.any(|node| share(node) < MOST_OF_NODE) {
            for node in &claimed.involved {
                *shares.entry(node.clone()).or_default() += 1;
            }
            first.push((name, claimed));
        } else {
            rest.push((name, claimed));
        }
    }
    first.extend(rest);
    first.truncate(MOST_CONFLICTS);
    first.into_iter().collect()
}

/// Conflicts that are told of, and those among them that are about the same nodes while there are others.
const MOST_CONFLICTS: usize = 64;
const MOST_OF_NODE: usize = 8;
/// Time for which a logged name is not logged again, and over which the names of one node are counted.
const NOTED_FOR: Duration = Duration::from_secs(600);
const MOST_NOTES: usize = 32;
