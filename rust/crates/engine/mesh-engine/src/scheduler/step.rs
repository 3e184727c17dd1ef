//! A step: the rows of several requests that a stage computes at once.

use std::time::Instant;

use super::job::Job;
use crate::workload::RequestKey;
use crate::{Segment, SlotId};

/// Work for the stage: first the slot operations in order, then the segments.
#[derive(Debug, Default)]
pub struct Step {
    /// Changes to the slots.
    pub slot_ops: Vec<SlotOp>,
    /// The segments of the forward call.
    pub segments: Vec<Segment>,
    /// Their tokens, back to back.
    pub tokens: Vec<u32>,
    /// Slots of all requests in progress, in this step or not.
    pub busy: Vec<SlotId>,
    /// The request of each segment.
    pub(super) owners: Vec<Owner>,
    pub(super) decode_rows: u32,
    pub(super) planned: Option<Instant>,
}

/// A request in one of its runs: after a preemption it runs again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Owner {
    pub(super) key: RequestKey,
    pub(super) run: u32,
}

/// A change to a KV slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the variants' comments name the fields")]
pub enum SlotOp {
    /// Shortens a slot to `len` KV rows, see [`Stage::truncate`](crate::Stage::truncate).
    Truncate { slot: SlotId, len: u32 },
    /// Copies the first `len` KV rows of a slot, see [`Stage::copy_prefix`](crate::Stage::copy_prefix).
    CopyPrefix { from: SlotId, to: SlotId, len: u32 },
}

impl Step {
    /// Empties it for a plan at `now`.
    pub(super) fn clear(&mut self, now: Instant) {
        self.slot_ops.clear();
        self.segments.clear();
        self.tokens.clear();
        self.busy.clear();
        self.owners.clear();
        self.decode_rows = 0;
        self.planned = Some(now);
    }

    /// Adds rows of a job behind its `cached` ones.
    pub(super) fn push(&mut self, job: &Job, slot: SlotId, cached: u32, rows: u32) {
        self.segments.push(Segment {
            slot,
            position: cached,
            rows,
            logits: job.logit_rows(cached, rows),
        });
        self.tokens
            .extend_from_slice(&job.pending(cached)[..rows as usize]);
        self.owners.push(job.owner());
    }

    /// Rows that become logits.
    pub fn logit_rows(&self) -> usize {
        let rows = self.segments.iter().map(|s| s.logits.count(s.rows));
        rows.map(|rows| rows as usize).sum()
    }
}
