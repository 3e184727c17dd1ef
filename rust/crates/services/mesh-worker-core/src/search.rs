//! The search for a model by its name: in the store, at other workers, on the hub.
//!
//! A search runs in rounds. Each looks first whether this worker is to download the model from the hub, then
//! for a replica that another worker once called so, then for the manifest that the head names, at each of
//! its sources. A manifest whose name is refuted is not looked at again under that name.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use mesh_proto::{ModelSources, NodeAddr};
use mesh_store::Digest;

use crate::knowledge::Knowledge;
use crate::names::{is_hub_name, unknown};
use crate::report::Report;
use crate::vouch::Doubt;

/// What a search wants done next.
#[derive(Debug, Clone, PartialEq)]
pub enum SearchStep {
    /// Get the model from the hub, and break that off once the search does not want it any more.
    Download,
    /// Have it vouched for that this replica has the name.
    Vouch(Digest),
    /// Get the manifest from this worker, and have it vouched for that it has the name.
    FetchManifest(Digest, NodeAddr),
    /// Nothing before that time, or before something changes.
    Wait(Instant),
}

/// The search for one name.
#[derive(Debug, Default)]
pub(crate) struct Search {
    name: String,
    /// Names of models in the folders of this machine, for messages.
    nearby: Vec<String>,
    /// Manifests that claim this name and are another model, and the time of the first.
    others: BTreeMap<Digest, String>,
    since: Option<Instant>,
    /// Time until which the hub is left alone.
    rest: Option<Instant>,
    stage: Stage,
    seen: u64,
    /// The last reasons that were logged.
    refused: String,
    nowhere: String,
}

#[derive(Debug, Default)]
enum Stage {
    #[default]
    Begin,
    /// From the hub, on this worker's own account or because the head wants it to.
    Downloading {
        own: bool,
    },
    Stored,
    Vouching,
    Begun,
    /// Workers that have yet to be asked for a manifest, after the one that is asked.
    Asking(Digest, VecDeque<NodeAddr>),
    Waiting(Instant),
}

impl Search {
    pub(crate) fn new(name: &str, nearby: Vec<String>, known: &mut Knowledge) -> Self {
        tracing::info!(model = name, "the model is not here, looking for it");
        let signed_only = known.rules.policy.requires_signature();
        let hub = known.rules.hub;
        known.report.seeks(name, |sought| {
            // Nothing that comes from the hub is signed.
            sought.origin = hub && is_hub_name(name) && !signed_only;
            sought.signed_only = signed_only;
        });
        Search {
            name: name.to_owned(),
            nearby,
            ..Search::default()
        }
    }

    /// The next step. All but [`SearchStep::Wait`] are carried out before the next call. If one does not end the
    /// search, that is reported: [`Search::download_ended`], or [`Search::doubted`] for a manifest that came.
    pub(crate) fn poll(&mut self, now: Instant, known: &mut Knowledge) -> SearchStep {
        loop {
            match &mut self.stage {
                Stage::Begin => {
                    self.begin_round(now, known);
                    // A head that does not know refusals would name the refused one again and again.
                    let own = self.since.is_some_and(|since| now >= since + ON_ITS_OWN)
                        && known.report.may_download(&self.name);
                    let given = known.is_given(&self.name);
                    self.stage = Stage::Stored;
                    if self.rest.is_none() && (own || given) {
                        self.stage = Stage::Downloading { own };
                        return SearchStep::Download;
                    }
                }
                Stage::Stored => {
                    let said = known.replicas.values().find(|replica| {
                        let fingerprint = replica.fingerprint();
                        replica.listed
                            && replica.is_said_to_be(&self.name)
                            && !self.others.contains_key(&fingerprint)
                            && !known.false_manifests.contains(&fingerprint)
                    });
                    self.stage = Stage::Begun;
                    if let Some(replica) = said {
                        self.stage = Stage::Vouching;
                        return SearchStep::Vouch(replica.fingerprint());
                    }
                }
                Stage::Begun => self.look_at_sources(now, known),
                Stage::Asking(fingerprint, seats) => {
                    let fingerprint = *fingerprint;
                    match seats.pop_front() {
                        Some(seat) => return SearchStep::FetchManifest(fingerprint, seat),
                        None => self.end_round(now, known),
                    }
                }
                Stage::Waiting(until) if now >= *until || self.seen != known.told_version => {
                    self.stage = Stage::Begin;
                }
                Stage::Waiting(until) => return SearchStep::Wait(*until),
                // Their results have yet to come.
                Stage::Downloading { .. } | Stage::Vouching => {
                    return SearchStep::Wait(now + AGAIN);
                }
            }
        }
    }

    fn begin_round(&mut self, now: Instant, known: &mut Knowledge) {
        self.seen = known.told_version;
        if self.rest.is_some_and(|until| until <= now) {
            self.rest = None;
            known.report.seeks(&self.name, |s| s.origin_error.clear());
        }
        if let Some(pin) = known.told.get(&self.name).and_then(operators_pin)
            && !known.false_manifests.contains(&pin)
            && self.others.remove(&pin).is_some()
        {
            self.tell_others(known);
        }
    }

    fn look_at_sources(&mut self, now: Instant, known: &mut Knowledge) {
        let told = known.told.get(&self.name).filter(|_| known.own.is_some());
        let named = told.and_then(|told| {
            let fingerprint: Digest = told.fingerprint.parse().ok()?;
            Some((fingerprint, told.holders.iter().cloned().collect()))
        });
        match named.filter(|(fingerprint, _)| !self.others.contains_key(fingerprint)) {
            Some((fingerprint, _)) if known.false_manifests.contains(&fingerprint) => {
                let reason = "its files are not what its manifest says".to_owned();
                self.doubted(fingerprint, "", Doubt::Other(reason), now, known);
                self.end_round(now, known);
            }
            Some((fingerprint, seats)) => self.stage = Stage::Asking(fingerprint, seats),
            None => self.end_round(now, known),
        }
    }

    fn end_round(&mut self, now: Instant, known: &mut Knowledge) {
        let told = known.told.get(&self.name);
        if let Some(told) = told.filter(|told| told.fingerprint.is_empty())
            && let Some(text) = self.why_nowhere(told, known)
            && text != self.nowhere
        {
            tracing::warn!(model = self.name, reason = text, "the model is nowhere yet");
            let report = &mut known.report;
            report.seeks(&self.name, |s| s.origin_error.clone_from(&text));
            self.nowhere = text;
        }
        // Others may come, and a link that could not be made may be made in a moment.
        self.stage = Stage::Waiting(now + AGAIN);
    }

    /// True if the download from the hub that is under way is still this worker's.
    pub(crate) fn wants_download(&self, known: &Knowledge) -> bool {
        match self.stage {
            Stage::Downloading { own: true } => true,
            _ => known.is_given(&self.name),
        }
    }

    /// The download from the hub failed, and the hub is left alone for `pause`; `None` if it was broken off.
    pub(crate) fn download_ended(
        &mut self,
        failure: Option<(String, Duration)>,
        now: Instant,
        report: &mut Report,
    ) {
        self.stage = Stage::Begin;
        match failure {
            Some((error, pause)) => {
                tracing::error!(model = self.name, error, "the hub does not give the model");
                report.seeks(&self.name, |sought| sought.origin_error = error);
                self.rest = Some(now + pause);
            }
            None => {
                tracing::info!(
                    model = self.name,
                    "another worker gets the model from the hub"
                );
            }
        }
    }

    /// The model with this manifest, which `worker` offered, is not taken under this name.
    pub(crate) fn doubted(
        &mut self,
        fingerprint: Digest,
        worker: &str,
        doubt: Doubt,
        now: Instant,
        known: &mut Knowledge,
    ) {
        self.stage = match self.stage {
            Stage::Vouching => Stage::Begun,
            // Others have the same one.
            _ => Stage::Asking(fingerprint, VecDeque::new()),
        };
        let (Doubt::Other(reason) | Doubt::Nobody(reason)) = &doubt;
        if *reason != self.refused {
            tracing::error!(model = self.name, worker, %fingerprint, reason, "manifest refused");
            self.refused.clone_from(reason);
        }
        match doubt {
            Doubt::Other(reason) => {
                if self.others.len() < MOST_OTHERS {
                    self.others.insert(fingerprint, reason);
                }
                self.since.get_or_insert(now);
                self.tell_others(known);
                // The hub answers, so a worker has to download from it.
                known.report.seeks(&self.name, |s| s.origin_error.clear());
            }
            Doubt::Nobody(reason) => {
                known.report.seeks(&self.name, |s| s.origin_error = reason);
            }
        }
    }

    /// Reports to the head the manifests that are not taken under the name. This worker's findings about
    /// files count for itself only; the hub's word about the name counts for all.
    fn tell_others(&self, known: &mut Knowledge) {
        let is_false = |other: &&Digest| known.false_manifests.contains(other);
        let (unusable, refused): (Vec<&Digest>, Vec<&Digest>) =
            self.others.keys().partition(is_false);
        let texts = |list: Vec<&Digest>| list.into_iter().map(Digest::to_string).collect();
        known.report.seeks(&self.name, |sought| {
            (sought.unusable, sought.refused) = (texts(unusable), texts(refused));
        });
    }

    /// Reason for which a model that no worker has does not come from the hub either; `None` if it may.
    fn why_nowhere(&self, told: &ModelSources, known: &Knowledge) -> Option<String> {
        let (name, rules) = (&self.name, &known.rules);
        if rules.policy.requires_signature() {
            return Some(format!(
                "no worker has a manifest of {name} that is signed, which `store.require_signature` asks for: sign it with `hydramesh \
                 models sign` where it is"
            ));
        }
        let from_hub = is_hub_name(name) && rules.hub;
        let pin = told.pin.parse::<Digest>().ok();
        if let Some(pin) = pin.filter(|pin| !from_hub && !self.others.contains_key(pin)) {
            return Some(format!(
                "the head pins {name} to {}, which no worker has: start a worker that has it, or let another model have the name (`hydramesh \
                 models pins release {name}`)",
                pin.short()
            ));
        }
        if !is_hub_name(name) {
            let here = known.replicas.values().filter(|replica| replica.listed);
            let here = here.map(|replica| replica.map().manifest().name.as_str());
            let known = self.nearby.iter().map(String::as_str).chain(here);
            return Some(format!("no worker has it yet, {}", unknown(name, known)));
        }
        (!rules.hub)
            .then(|| "no worker has it yet, and `store.hub` forbids to ask the hub".to_owned())
    }
}

/// Fingerprint to which an operator pinned the name, if one did.
fn operators_pin(told: &ModelSources) -> Option<Digest> {
    let pin = told.pinned_by_operator.then_some(&told.pin)?;
    pin.parse().ok()
}

/// Interval between rounds.
const AGAIN: Duration = Duration::from_secs(2);

/// Time for the head to give the download to another worker after a refusal.
const ON_ITS_OWN: Duration = Duration::from_secs(10);

/// Manifests that are refused under one name.
const MOST_OTHERS: usize = 16;

#[cfg(test)]
mod tests;
