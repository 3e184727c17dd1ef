//! Releases workers after first tokens and ends of attempts, and learns speed and faults from them.

use std::time::{Duration, Instant};

use super::{AttemptEnd, Placement, ReceivedTokens, RunningRequest};
use crate::fair::Ticket;

impl Placement {
    /// The first token of a request came: its prompt is prefilled, and its worker has proven that it answers.
    pub fn first_token(&mut self, ticket: Ticket, now: Instant) {
        let Some(running) = self.running.get_mut(&ticket) else {
            return;
        };
        let started = !std::mem::replace(&mut running.streams, true);
        if std::mem::take(&mut running.alone) {
            self.suspects.began(&running.asked, ticket, now);
            if let Some(worker) = self.registry.get_mut(running.worker) {
                worker.alone = None;
            }
        }
        running.first_token.get_or_insert(now);
        let prefilled = std::mem::take(&mut running.prefilling);
        let (on, model) = (running.worker, running.model.clone());
        let same =
            |other: &&RunningRequest| other.streams && other.worker == on && other.model == model;
        let streams = self.running.values().filter(same).count();
        let Some(running) = self.running.get_mut(&ticket) else {
            return;
        };
        let Some(worker) = self.registry.get_mut(on) else {
            return;
        };
        running.batch = worker.assigned;
        worker.unstarted = worker.unstarted.saturating_sub(u32::from(started));
        worker.prefilling = worker.prefilling.saturating_sub(prefilled);
        worker.last_success = Some(now);
        if let Some(model) = worker.model_mut(&running.model) {
            model.succeeded(now);
            let streams = u32::try_from(streams).unwrap_or(u32::MAX);
            model.streams = model.streams.max(streams);
            let took = now.saturating_duration_since(running.started);
            if running.backlog >= LEAST_PREFILL {
                model.prefilled(running.backlog, took);
            } else if running.backlog > 0 {
                model.waited(running.backlog, took, now);
            }
        }
        worker.proven = worker.models.iter().all(|model| model.proven);
    }

    /// A request no longer runs on its worker.
    pub fn release(&mut self, ticket: Ticket, ended: AttemptEnd, now: Instant) {
        self.release_after(ticket, ended, ReceivedTokens::default(), now);
    }

    /// The same, with the part of its answer that was received: it gives the worker's speed.
    pub fn release_after(
        &mut self,
        ticket: Ticket,
        ended: AttemptEnd,
        received: ReceivedTokens,
        now: Instant,
    ) {
        let Some(running) = self.running.remove(&ticket) else {
            return;
        };
        self.queue.ended(running.source);
        if running.alone {
            self.suspects.began(&running.asked, ticket, now);
            if let Some(worker) = self.registry.get_mut(running.worker) {
                worker.alone = None;
            }
        }
        let same = |other: &&RunningRequest| {
            other.streams && other.worker == running.worker && other.model == running.model
        };
        let streams = self.running.values().any(|other| same(&other));
        let Some(worker) = self.registry.get_mut(running.worker) else {
            return;
        };
        let batch = (running.batch.max(1) + worker.assigned.max(1)).div_ceil(2);
        if let Some(model) = worker.model_mut(&running.model) {
            if let (Some(first), Some(last)) = (running.first_token, received.last)
                && received.tokens >= LEAST_DECODE
            {
                let took = last.saturating_duration_since(first);
                model.decoded(received.tokens, took, batch.min(model.card.slots.max(1)));
            }
            match ended {
                AttemptEnd::Complete => model.succeeded(now),
                // While it answers others, it answers.
                AttemptEnd::Failed if !streams => model.failed(now),
                AttemptEnd::Failed | AttemptEnd::Busy | AttemptEnd::Cancelled => {}
            }
        }
        worker.assigned = worker.assigned.saturating_sub(1);
        worker.unstarted = worker.unstarted.saturating_sub(u32::from(!running.streams));
        worker.prefilling = worker.prefilling.saturating_sub(running.prefilling);
        match ended {
            AttemptEnd::Complete => {
                worker.completed += 1;
                worker.last_success = Some(now);
                worker.proven = worker.models.iter().all(|model| model.proven);
                worker.took(now.saturating_duration_since(running.started));
            }
            AttemptEnd::Failed => {
                worker.failed += 1;
                worker.proven &= streams;
            }
            AttemptEnd::Busy => worker.busy_until = Some(now + BUSY_PAUSE),
            AttemptEnd::Cancelled => {}
        }
        if ended == AttemptEnd::Complete {
            let key = worker.key();
            // The name that its faults are kept under: a worker without an identity reports no models.
            let model = match worker.has_identity() {
                true => running.model.as_str(),
                false => "",
            };
            self.registry.reputation.answered(&key, model);
        }
    }

    /// An attempt that began at `began` failed through the worker's own fault: it was silent, or sent invalid
    /// data, or another worker could do what it could not. Returns the time for which it is left alone.
    pub fn at_fault(
        &mut self,
        key: &str,
        model: &str,
        began: Instant,
        now: Instant,
    ) -> Option<Duration> {
        let reputation = &mut self.registry.reputation;
        reputation.at_fault(key, model, began, now)
    }
}

/// Least tokens of a prompt, estimated, whose time shows prefill speed and not only round trips.
const LEAST_PREFILL: u64 = 64;

/// Least tokens whose time shows decode speed.
const LEAST_DECODE: u32 = 4;

/// Time for which a worker that reported busy gets no requests.
pub(super) const BUSY_PAUSE: Duration = Duration::from_millis(100);
