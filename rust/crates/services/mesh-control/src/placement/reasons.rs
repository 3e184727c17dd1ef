//! Messages for requests that no worker takes.

use std::time::Instant;

use super::Placement;
use super::refusal::Refusal;
use crate::fair::{Full, Source};
use crate::registry::Worker;
use crate::rings::Prospect;
use crate::router::Requirements;

impl Placement {
    pub(super) fn full(&self, source: Source, full: Full) -> Refusal {
        Refusal::QueueFull {
            limit: self.limits.queue,
            whose: source,
            yours: full.yours,
            sources: full.sources,
        }
    }

    /// Reasons for which the workers that claim to serve a model do not answer; `None` if nothing is wrong
    /// with any of them.
    fn why_none_answers(&self, ask: &Requirements, now: Instant) -> Option<String> {
        let mut reasons = Vec::new();
        for worker in self.registry.iter().filter(|worker| !worker.draining) {
            let Some(model) = worker.model(&ask.model) else {
                continue;
            };
            if model.card.kind() != ask.kind {
                continue;
            }
            if let Some(why) = self.registry.why_not(worker, model, now) {
                reasons.push(format!("worker `{}`: {why}", worker.name));
            }
        }
        let more = reasons.len().saturating_sub(REASONS);
        reasons.truncate(REASONS);
        if more > 0 {
            reasons.push(format!("and {more} more"));
        }
        (!reasons.is_empty()).then(|| reasons.join("; "))
    }

    pub(super) fn nobody(&self, ask: &Requirements, now: Instant) -> Refusal {
        let model = ask.model.clone();
        let too_old = |worker: &Worker| {
            let meant = match worker.has_identity() {
                true => worker.model(&model).is_some(),
                false => ask.plain,
            };
            meant && worker.request_revision < ask.revision
        };
        if self.registry.iter().any(too_old) {
            return Refusal::TooOld { model };
        }
        if let Some(why) = self.why_none_answers(ask, now) {
            return Refusal::NoneAnswers { model, why };
        }
        if let Some(Prospect::Impossible(reason)) = self.prospects.get(&model) {
            let reason = reason.clone();
            return Refusal::NoRing { model, reason };
        }
        if self.registry.takes_only_plain() || model.is_empty() || self.registry.knows_model(&model)
        {
            Refusal::NoWorker { model }
        } else {
            Refusal::UnknownModel { model }
        }
    }
}

/// Reasons that a refusal names.
const REASONS: usize = 3;
