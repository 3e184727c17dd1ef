//! Limits the time for which suspects keep other requests away from workers.
//!
//! A request that may have killed a worker is a suspect: it gets a worker where nobody else waits for a first
//! token. One suspect of a model at a time keeps newcomers away from one worker until it is placed, for a few
//! seconds at most, and while it waits there for its first token, for a few seconds more. Then other requests
//! for the model go first for as long as they were kept away.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::fair::Ticket;
use super::registry::WorkerId;

/// The turns of suspects and others, by model. Models without suspects are not in it.
#[derive(Debug, Default)]
pub(crate) struct Suspects {
    turns: BTreeMap<String, Turn>,
}

#[derive(Debug, Clone, Copy)]
enum Turn {
    /// A suspect waits, and this worker gets no newcomers.
    Keeps { worker: WorkerId, since: Instant },
    /// A suspect is alone with a worker; others were kept away since then.
    Alone {
        ticket: Ticket,
        since: Instant,
        placed: Instant,
    },
    /// Other requests go first.
    Others { until: Instant },
}

impl Suspects {
    /// True if there are suspects, or were recently.
    pub(crate) fn are_there(&self) -> bool {
        !self.turns.is_empty()
    }

    /// Returns true if a suspect of this model may keep newcomers away from a worker.
    pub(crate) fn may_keep(&self, model: &str) -> bool {
        !self.turns.contains_key(model)
    }

    /// A suspect keeps newcomers away from a worker; returns until when.
    pub(crate) fn keeps(&mut self, model: &str, worker: WorkerId, now: Instant) -> Instant {
        let turn = Turn::Keeps { worker, since: now };
        self.turns.insert(model.to_owned(), turn);
        now + KEPT_FOR
    }

    /// A suspect got a worker. Returns the time until which it is alone there, and the worker that is no
    /// longer kept free: not two at a time.
    pub(crate) fn placed(
        &mut self,
        model: &str,
        ticket: Ticket,
        now: Instant,
    ) -> (Instant, Option<WorkerId>) {
        let (since, kept) = match self.turns.get(model) {
            None => (Some(now), None),
            Some(Turn::Keeps { worker, since }) => (Some(*since), Some(*worker)),
            Some(Turn::Alone { .. } | Turn::Others { .. }) => (None, None),
        };
        if let Some(since) = since {
            let turn = Turn::Alone {
                ticket,
                since,
                placed: now,
            };
            self.turns.insert(model.to_owned(), turn);
        }
        (now + ALONE_FOR, kept)
    }

    /// A suspect's first token came, or it has ended.
    pub(crate) fn began(&mut self, model: &str, ticket: Ticket, now: Instant) {
        if let Some(turn) = self.turns.get_mut(model)
            && let Turn::Alone {
                ticket: alone,
                since,
                ..
            } = *turn
            && alone == ticket
        {
            *turn = Turn::others(since, now);
        }
    }

    /// Returns true if other requests for this model go before suspects.
    pub(crate) fn yield_for(&self, model: &str) -> bool {
        matches!(self.turns.get(model), Some(Turn::Others { .. }))
    }

    /// Ends turns that have lasted too long.
    pub(crate) fn expire(&mut self, now: Instant) {
        self.turns.retain(|_, turn| {
            match *turn {
                Turn::Keeps { since, .. } if now >= since + KEPT_FOR => {
                    *turn = Turn::others(since, since + KEPT_FOR);
                }
                Turn::Alone { since, placed, .. } if now >= placed + ALONE_FOR => {
                    *turn = Turn::others(since, placed + ALONE_FOR);
                }
                _ => {}
            }
            !matches!(*turn, Turn::Others { until } if now >= until)
        });
    }
}

impl Turn {
    /// Others were kept away from `since` to `end`.
    fn others(since: Instant, end: Instant) -> Self {
        let kept = end.saturating_duration_since(since).max(LEAST_TURN);
        Self::Others { until: end + kept }
    }
}

/// Time for which a suspect that waits keeps newcomers away from a worker.
pub(crate) const KEPT_FOR: Duration = Duration::from_secs(5);
/// Time for which a suspect is alone with its worker. What kills a worker does so early.
pub(crate) const ALONE_FOR: Duration = Duration::from_secs(10);
/// Least time for which others go first.
const LEAST_TURN: Duration = Duration::from_secs(1);
