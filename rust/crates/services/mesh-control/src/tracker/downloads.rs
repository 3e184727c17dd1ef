//! Downloads: which worker gets a model from outside the mesh.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use mesh_share::PieceSet;
use tracing::{info, warn};

use super::{Download, FailedDownload, Key, Tracker, shorten};

impl Tracker {
    /// Takes in how far the downloads of a worker are, and which of them failed.
    pub(super) fn note_progress(&mut self, node: &str, now: Instant) {
        let Some(entry) = self.nodes.get(node) else {
            return;
        };
        let mut failed = Vec::new();
        for sought in &entry.sought {
            let key = self.key(&sought.model);
            if !sought.model.origin_error.is_empty() {
                let download = self.downloads.get(&key);
                if download.is_some_and(|download| download.node == node) {
                    failed.push((key, sought.model.origin_error.clone()));
                }
            } else if let Some(download) = self.downloads.get_mut(&key)
                && download.node == node
                && download.bytes != sought.model.origin_bytes
            {
                download.bytes = sought.model.origin_bytes;
                download.since = now;
            }
        }
        for (key, reason) in failed {
            self.fail(&key, &shorten(&reason), now);
        }
    }

    /// Takes a download away from the worker that failed on it.
    pub(super) fn fail(&mut self, key: &Key, reason: &str, now: Instant) {
        let Some(download) = self.downloads.remove(key) else {
            return;
        };
        let failure = self.failures.entry((key.clone(), download.node.clone()));
        let failure = failure.or_insert(FailedDownload {
            until: now,
            times: 0,
        });
        let pause = FIRST_PAUSE.saturating_mul(1 << failure.times.min(10));
        failure.until = now + pause.min(LONGEST_PAUSE);
        failure.times += 1;
        warn!(
            model = self.title(key),
            worker = self.name_of(&download.node),
            reason,
            "the worker could not get the model from outside the mesh"
        );
    }

    /// Gives every download to one worker.
    pub(super) fn settle_downloads(&mut self, now: Instant) {
        let stalls = |one: &Download| now.saturating_duration_since(one.since) >= STALL_LIMIT;
        let stalled = self.downloads.iter().filter(|(_, one)| stalls(one));
        let stalled: Vec<Key> = stalled.map(|(key, _)| key.clone()).collect();
        for key in stalled {
            let reason = format!("nothing came for {} s", STALL_LIMIT.as_secs());
            self.fail(&key, &reason, now);
        }
        let needed = self.needed();
        let mut downloads = std::mem::take(&mut self.downloads);
        for (key, willing) in &needed {
            let before = downloads.remove(key);
            let goes_on = before
                .as_ref()
                .filter(|download| willing.iter().any(|(node, _)| *node == download.node));
            if let Some(download) = goes_on {
                self.downloads.insert(key.clone(), download.clone());
                continue;
            }
            let rested = |node: &String| {
                let failure = self.failures.get(&(key.clone(), node.clone()));
                failure.is_none_or(|failure| failure.until <= now)
            };
            // The worker that has most already, then the first.
            let rested = willing.iter().filter(|(node, _)| rested(node));
            let Some((node, bytes)) =
                rested.max_by(|(a, x), (b, y)| x.cmp(y).then_with(|| b.cmp(a)))
            else {
                continue;
            };
            let gone = before.map(|download| match self.nodes.get(&download.node) {
                Some(known) => format!("{} no longer seeks it", known.name),
                None => "the worker that had begun is gone".to_owned(),
            });
            let (model, worker) = (self.title(key), self.name_of(node));
            match gone {
                None => info!(
                    model,
                    worker, "one worker gets the model from outside the mesh"
                ),
                Some(why) => warn!(
                    model,
                    worker, why, "another worker gets the model from outside the mesh"
                ),
            }
            let download = Download {
                node: node.clone(),
                bytes: *bytes,
                since: now,
            };
            self.downloads.insert(key.clone(), download);
        }
        self.failures
            .retain(|(key, _), failure| needed.contains_key(key) || now < failure.until);
        let stalls = self.downloads.values().map(|e| e.since + STALL_LIMIT);
        let rests = self.failures.values().map(|failure| failure.until);
        self.timer = stalls.chain(rests.filter(|until| *until > now)).min();
    }

    /// Models with sought pieces that no worker holds, each with the workers that would download it and the
    /// bytes that they have.
    pub(super) fn needed(&self) -> BTreeMap<Key, Vec<(String, u64)>> {
        let mut keys: BTreeMap<Key, Vec<(String, u64)>> = BTreeMap::new();
        for (node, entry) in &self.nodes {
            for sought in &entry.sought {
                let willing = keys.entry(self.key(&sought.model)).or_default();
                if sought.model.origin && sought.model.origin_error.is_empty() {
                    let bytes = sought.model.origin_bytes.max(sought.model.bytes);
                    willing.push((node.clone(), bytes));
                }
            }
        }
        keys.retain(|key, _| match key {
            Key::Name(_) => true,
            Key::Fingerprint(fingerprint) => !self.uncovered(fingerprint).is_empty(),
        });
        keys
    }

    /// Pieces that a worker seeks and no worker holds.
    pub(super) fn uncovered(&self, fingerprint: &str) -> PieceSet {
        let mut uncovered = PieceSet::none(0);
        for (_, missing) in self.missing(fingerprint) {
            if missing.pieces() > uncovered.pieces() {
                uncovered = PieceSet::none(missing.pieces());
            }
            uncovered.union(missing);
        }
        for (node, entry) in &self.nodes {
            if let Some(held) = entry.held.get(fingerprint)
                && entry.address.is_some()
                && !self.is_banned(fingerprint, node, None)
            {
                uncovered.subtract(&held.pieces);
            }
        }
        uncovered
    }

    pub(super) fn missing<'a>(
        &'a self,
        fingerprint: &'a str,
    ) -> impl Iterator<Item = (&'a str, &'a PieceSet)> {
        self.nodes.iter().flat_map(move |(node, entry)| {
            let of_model = entry.sought.iter().filter(move |sought| {
                self.key(&sought.model) == Key::Fingerprint(fingerprint.to_owned())
            });
            of_model.filter_map(move |s| Some((node.as_str(), s.missing.as_ref()?)))
        })
    }
}

/// A worker that brings nothing for this time loses the download.
const STALL_LIMIT: Duration = Duration::from_secs(30);

/// Time for which a worker is left alone after its first failed download; each repeat doubles it.
const FIRST_PAUSE: Duration = Duration::from_secs(10);

const LONGEST_PAUSE: Duration = Duration::from_secs(600);
