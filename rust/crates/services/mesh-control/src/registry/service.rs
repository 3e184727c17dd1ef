//! Decides which workers get requests for which models, and which weights a name stands for.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use mesh_proto::ModelKind;

use super::served::{ServedModel, Service};
use super::worker::{Worker, is_available};
use super::{KNOWN_MODELS, NAME_MEMORY, Registry};
use crate::spotcheck::CheckState;

impl Registry {
    /// Decides on requests of this worker's own model.
    pub fn service(&self, worker: &Worker, model: &ServedModel, now: Instant) -> Service {
        let another = || {
            self.iter().any(|other| {
                let named = other.model(&model.card.name);
                other.id != worker.id
                    && named.is_some_and(|m| {
                        is_available(other, m)
                            && self.has_name(m, now) == Service::Serves
                            && self.can_replace(other, m, now)
                    })
            })
        };
        self.service_beside(worker, model, now, another)
    }

    /// The same for a request that `another` worker takes, too, or none does.
    pub(crate) fn service_beside(
        &self,
        worker: &Worker,
        model: &ServedModel,
        now: Instant,
        another: impl FnOnce() -> bool,
    ) -> Service {
        let Some(node) = worker.node_id() else {
            return Service::Out;
        };
        if self.is_out(node, now) || model.check_state == CheckState::Held {
            return Service::Out;
        }
        let paused = self.paused(node, &model.card.name, now, another);
        paused.unwrap_or_else(|| self.unpaused(model, now))
    }

    /// Returns true if this worker answers for this model in place of one that is paused.
    pub(crate) fn can_replace(&self, worker: &Worker, model: &ServedModel, now: Instant) -> bool {
        let Some(node) = worker.node_id() else {
            return false;
        };
        let paused_until = self.reputation.paused_until(node, &model.card.name, now);
        paused_until.is_none()
            && !self.is_out(node, now)
            && model.check_state != CheckState::Held
            && match self.unpaused(model, now) {
                Service::Serves => true,
                // A newcomer may never answer; one that did is asked again at once.
                Service::Soon => model.last_success.is_some(),
                Service::Out => false,
            }
    }

    /// Decision on a paused worker; `None` if no pause counts. A long pause counts while `another` answers:
    /// without one it would keep requests from the only worker that may answer them.
    pub(super) fn paused(
        &self,
        key: &str,
        model: &str,
        now: Instant,
        another: impl FnOnce() -> bool,
    ) -> Option<Service> {
        let until = self.reputation.paused_until(key, model, now)?;
        if another() {
            return Some(match until - now <= SHORT_PAUSE {
                true => Service::Soon,
                false => Service::Out,
            });
        }
        let since = self.reputation.paused_since(key, model)?;
        (now.saturating_duration_since(since) < SHORT_PAUSE).then_some(Service::Soon)
    }

    pub(super) fn unpaused(&self, model: &ServedModel, now: Instant) -> Service {
        let on_trial = now.saturating_duration_since(model.trial_since) < self.trial;
        match (model.proven, model.check_state) {
            (true, CheckState::Cleared) => Service::Serves,
            (true, _) => Service::Soon,
            (false, _) if model.unanswered == 0 && on_trial => Service::Soon,
            (false, _) => Service::Out,
        }
    }

    /// Returns true if this node is in quarantine. It then gets no requests, holds no part of a ring and
    /// gives other workers no models.
    pub fn is_out(&self, node_id: &str, now: Instant) -> bool {
        self.reputation.quarantined(node_id, now).is_some()
    }

    /// Reason for which this node is in quarantine; `None` if it is not.
    pub fn why_out(&self, node_id: &str, now: Instant) -> Option<String> {
        let found = self.reputation.quarantined(node_id, now)?;
        let (left, reason) = ((found.until - now).as_secs(), found.reason);
        Some(format!("in quarantine for another {left} s: {reason}"))
    }

    /// Ends a node's quarantine and forgives its faults, so that it starts again as a new node. Returns true
    /// if it was in quarantine.
    pub fn readmit(&mut self, node_id: &str, now: Instant) -> bool {
        let was_out = self.is_out(node_id, now);
        self.reputation.readmit(node_id);
        self.checks.forget(node_id);
        self.disputes.remove(node_id);
        let entry = self.workers.values_mut();
        for worker in entry.filter(|worker| worker.node_id() == Some(node_id)) {
            for model in &mut worker.models {
                model.begins_anew(now);
            }
            worker.proven = false;
        }
        self.refresh_all(now);
        was_out
    }

    /// Decides whether a model's name stands for these weights. [`Service::Soon`] if they differ from those
    /// in use, which no worker has now.
    pub fn has_name(&self, model: &ServedModel, now: Instant) -> Service {
        let name = model.card.name.as_str();
        match self.weights_of(name) {
            None => Service::Serves,
            Some(used) if used == model.card.fingerprint => Service::Serves,
            Some(used) if self.holds(name, used, now) => Service::Out,
            Some(_) => Service::Soon,
        }
    }

    /// Returns true if a worker that may get requests has these weights under this name.
    pub fn holds(&self, name: &str, weights: &str, now: Instant) -> bool {
        self.iter().any(|worker| {
            let models = worker.models.iter();
            let mut same = models.filter(|m| m.card.name == name && m.card.fingerprint == weights);
            same.any(|model| is_available(worker, model))
                && worker.node_id().is_some_and(|node| !self.is_out(node, now))
        })
    }

    /// Reason for which a worker gets no requests for one of its models now, for people; `None` if it gets
    /// them.
    pub fn why_not(&self, worker: &Worker, model: &ServedModel, now: Instant) -> Option<String> {
        if self.service(worker, model, now) == Service::Serves {
            let why = match self.has_name(model, now) {
                Service::Serves => return None,
                Service::Soon => {
                    "it serves other weights than those in use until a moment ago, and is asked soon"
                }
                Service::Out => "it serves other weights than those in use under this name",
            };
            return Some(why.to_owned());
        }
        let node = worker.node_id().unwrap_or_default();
        if let Some(out) = self.why_out(node, now) {
            return Some(out);
        }
        let paused = self.reputation.paused_until(node, &model.card.name, now);
        Some(match (model.check_state, paused) {
            (CheckState::Held, _) => "its answers differ from those of other workers".to_owned(),
            (_, Some(until)) => format!(
                "paused for {} s after it failed requests",
                (until - now).as_secs() + 1
            ),
            _ if model.proven => "its answers are being compared".to_owned(),
            _ if model.unanswered > 0 => "it does not answer".to_owned(),
            _ => "it has yet to answer".to_owned(),
        })
    }

    /// The fingerprint of the weights that this name stands for. Other weights under the name get no requests
    /// while they are served.
    pub(crate) fn weights_of(&self, name: &str) -> Option<&str> {
        self.names.get(name).map(|(weights, _)| weights.as_str())
    }

    /// The largest context of a model that answers, or of any worker where none does: no answer is longer.
    pub fn context_of(&self, name: &str) -> Option<u32> {
        let models = || {
            let all = self.iter().flat_map(|worker| &worker.models);
            all.filter(|model| model.card.name == name && model.card.context > 0)
        };
        let answering = models().filter(|model| model.is_cleared());
        let context = |model: &ServedModel| model.card.context;
        let largest = answering.map(context).max();
        largest.or_else(|| models().map(context).max())
    }

    /// The model of requests that name none: the first by name, and from then on the same one as long as it
    /// is served.
    pub fn default_model(&mut self, kind: ModelKind, now: Instant) -> Option<String> {
        let this = &*self;
        let served = |wanted: Service| {
            let mut names = BTreeSet::new();
            for worker in this.iter() {
                let of_kind = worker.models.iter().filter(|m| m.card.kind() == kind);
                let these = of_kind.filter(|m| this.service(worker, m, now) == wanted);
                names.extend(these.map(|model| model.card.name.as_str()));
            }
            names
        };
        let serving = served(Service::Serves);
        let chosen = self.defaults.get(&(kind as i32)).map(String::as_str);
        if let Some(name) = chosen.filter(|name| serving.contains(name)) {
            return Some(name.to_owned());
        }
        let Some(first) = serving.first() else {
            let soon = served(Service::Soon);
            let chosen = chosen.filter(|name| soon.contains(name));
            return chosen.or(soon.first().copied()).map(str::to_owned);
        };
        let first = (*first).to_owned();
        self.defaults.insert(kind as i32, first.clone());
        Some(first)
    }

    /// Settles which weights names stand for.
    pub(super) fn settle_names(&mut self, now: Instant) {
        let mut serving = Vec::new();
        for worker in self.workers.values() {
            for model in &worker.models {
                let (name, weights) = (&model.card.name, &model.card.fingerprint);
                // A worker that gets no requests must not keep a name from those that would, and weights
                // without a fingerprint do not count.
                if !weights.is_empty()
                    && is_available(worker, model)
                    && self.service(worker, model, now) == Service::Serves
                {
                    serving.push((name.clone(), weights.clone()));
                }
            }
        }
        for (name, weights) in &serving {
            if let Some((used, seen)) = self.names.get_mut(name)
                && used == weights
            {
                *seen = now;
            }
        }
        let mut names = std::mem::take(&mut self.names);
        names.retain(|name, (used, seen)| {
            let memory = match self.holds(name, used, now) {
                true => NAME_MEMORY,
                false => self.handover,
            };
            now.saturating_duration_since(*seen) < memory
        });
        self.names = names;
        for (name, weights) in serving {
            if self.names.contains_key(&name) || self.names.len() < KNOWN_MODELS {
                self.names.entry(name).or_insert((weights, now));
            }
        }
    }
}

/// Requests wait for the end of a pause that is no longer.
const SHORT_PAUSE: Duration = Duration::from_secs(5);
