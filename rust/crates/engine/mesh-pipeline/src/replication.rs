//! The sending side of replication: the backlog of a standby, and the next rows to send.
//!
//! Messages of one stream are numbered; the standby says up to which number it has taken them in. Rows go
//! out in the order in which they were written, in pieces, and no more than [`WINDOW`] bytes are
//! unacknowledged: a standby that joined a moment ago catches up in the background, and one that is slow
//! holds nothing up.

use std::collections::VecDeque;

use mesh_engine::SlotId;
use mesh_engine::scheduler::SlotOp;
use mesh_proto::{HeldSlot, RingMirror};

use crate::token_log::{TokenLog, common_prefix};
use crate::wire;

/// The sending side of a replication stream.
#[derive(Debug, Default)]
pub(crate) struct Replication {
    count: u64,
    slots: Vec<ReplicatedSlot>,
    unacknowledged: VecDeque<Unacknowledged>,
    bytes: usize,
}

#[derive(Debug, Default, Clone)]
struct ReplicatedSlot {
    /// Rows that were sent.
    sent: u32,
    /// Rows of which the standby has said so.
    safe: u32,
}

#[derive(Debug)]
struct Unacknowledged {
    count: u64,
    slot: SlotId,
    /// One past the last row, while the slot still holds those rows.
    end: u32,
    bytes: usize,
}

/// Rows to send in one message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RowRange {
    pub(crate) slot: SlotId,
    pub(crate) position: u32,
    pub(crate) rows: u32,
}

impl Replication {
    /// A stream to a standby that holds `held`, for the rows in `log`.
    pub(crate) fn new(log: &TokenLog, held: &[HeldSlot]) -> Self {
        let slots = (0..log.slots()).map(|slot| {
            let theirs = held.iter().find(|held| held.slot == slot);
            let common = theirs.map_or(0, |held| common_prefix(log.tokens(slot), &held.tokens));
            ReplicatedSlot {
                sent: common,
                safe: common,
            }
        });
        Replication {
            slots: slots.collect(),
            ..Replication::default()
        }
    }

    /// Rows of `slot` that are safe.
    pub(crate) fn safe(&self, slot: SlotId) -> u32 {
        self.slots.get(slot as usize).map_or(0, |slot| slot.safe)
    }

    /// Rows that are not safe, over all slots.
    pub(crate) fn lag(&self, log: &TokenLog) -> u64 {
        let slots = (0..).zip(&self.slots);
        let lags = slots.map(|(slot, replicated)| log.len(slot).saturating_sub(replicated.safe));
        lags.map(u64::from).sum()
    }

    /// The rows of `slot` from `len` on are gone or about to be written again.
    pub(crate) fn cut(&mut self, slot: SlotId, len: u32) {
        if let Some(replicated) = self.slots.get_mut(slot as usize) {
            replicated.sent = replicated.sent.min(len);
            replicated.safe = replicated.safe.min(len);
        }
        for message in &mut self.unacknowledged {
            if message.slot == slot {
                message.end = message.end.min(len);
            }
        }
    }

    /// A change to a slot; the message to send, if the standby need know of it.
    pub(crate) fn apply(&mut self, op: &SlotOp) -> Option<RingMirror> {
        match *op {
            SlotOp::Truncate { slot, len } => {
                let sent = self.slots.get(slot as usize)?.sent;
                self.cut(slot, len);
                (sent > len).then(|| self.number(slot, len, 0))?;
            }
            SlotOp::CopyPrefix { from, to, len } => {
                let sent = self.slots.get(from as usize)?.sent;
                self.cut(to, 0);
                if sent < len {
                    // Rows at position 0 replace the standby's content.
                    return None;
                }
                self.slots.get_mut(to as usize)?.sent = len;
                self.number(to, len, 0);
            }
        }
        Some(RingMirror {
            count: self.count,
            slot_op: Some(wire::slot_op(op)),
            ..RingMirror::default()
        })
    }

    /// The next rows to send, if there is room for them on the way.
    pub(crate) fn next(&self, log: &TokenLog) -> Option<RowRange> {
        if self.bytes >= WINDOW {
            return None;
        }
        (0..log.slots()).find_map(|slot| {
            let position = self.slots.get(slot as usize)?.sent;
            let rows = log.len(slot).saturating_sub(position).min(MESSAGE_ROWS);
            (rows > 0).then_some(RowRange {
                slot,
                position,
                rows,
            })
        })
    }

    /// Notes that a range of `bytes` goes out. Returns its number.
    pub(crate) fn send(&mut self, range: RowRange, bytes: usize) -> u64 {
        let end = range.position + range.rows;
        if let Some(replicated) = self.slots.get_mut(range.slot as usize) {
            replicated.sent = end;
        }
        self.number(range.slot, end, bytes)
    }

    /// The standby has taken in all messages up to `count`. Returns the slots of which more is safe now.
    pub(crate) fn acknowledged(&mut self, count: u64) -> Vec<SlotId> {
        let mut changed = Vec::new();
        let is_through = |message: &mut Unacknowledged| message.count <= count;
        while let Some(message) = self.unacknowledged.pop_front_if(is_through) {
            self.bytes -= message.bytes;
            if let Some(replicated) = self.slots.get_mut(message.slot as usize)
                && message.end > replicated.safe
            {
                replicated.safe = message.end;
                if !changed.contains(&message.slot) {
                    changed.push(message.slot);
                }
            }
        }
        changed
    }

    fn number(&mut self, slot: SlotId, end: u32, bytes: usize) -> u64 {
        self.count += 1;
        self.bytes += bytes;
        self.unacknowledged.push_back(Unacknowledged {
            count: self.count,
            slot,
            end,
            bytes,
        });
        self.count
    }
}

/// Bytes on their way to a standby at once.
const WINDOW: usize = 8 << 20;

/// Rows of one message.
const MESSAGE_ROWS: u32 = 64;
