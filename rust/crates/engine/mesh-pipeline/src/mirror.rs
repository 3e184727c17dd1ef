//! The sending side of replication: the backlog of a standby, and the next rows to send.
//!
//! Messages of one stream are numbered; the standby says up to which number it has taken them in. Rows go out in the order in
//! which they were written, in pieces, and no more than [`WINDOW`] bytes without an answer: a standby that joined a moment ago
//! catches up in the background, and one that is slow holds nothing up.

use std::collections::VecDeque;

use mesh_engine::SlotId;
use mesh_engine::scheduler::SlotOp;
use mesh_proto::{HeldSlot, RingMirror};

use crate::book::{Book, common_prefix};
use crate::wire;

/// The sending side of a mirror stream.
#[derive(Debug)]
pub(crate) struct Mirror {
    count: u64,
    slots: Vec<MirroredSlot>,
    unanswered: VecDeque<Unanswered>,
    bytes: usize,
}

#[derive(Debug, Default, Clone)]
struct MirroredSlot {
    /// Rows that were sent.
    sent: u32,
    /// Rows of which the standby has said so.
    safe: u32,
}

#[derive(Debug)]
struct Unanswered {
    count: u64,
    slot: SlotId,
    /// One past the last row, while the slot still holds those rows.
    end: u32,
    bytes: usize,
}

/// Rows to send in one message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) slot: SlotId,
    pub(crate) position: u32,
    pub(crate) rows: u32,
}

impl Mirror {
    /// A stream to a standby that holds `held`, for the rows in `book`.
    pub(crate) fn new(book: &Book, held: &[HeldSlot]) -> Self {
        let slots = (0..book.slots()).map(|slot| {
            let theirs = held.iter().find(|held| held.slot == slot);
            let common = theirs.map_or(0, |held| common_prefix(book.tokens(slot), &held.tokens));
            MirroredSlot {
                sent: common,
                safe: common,
            }
        });
        Mirror {
            count: 0,
            slots: slots.collect(),
            unanswered: VecDeque::new(),
            bytes: 0,
        }
    }

    /// Rows of `slot` that are safe.
    pub(crate) fn safe(&self, slot: SlotId) -> u32 {
        self.slots.get(slot as usize).map_or(0, |slot| slot.safe)
    }

    /// Rows that are not safe, over all slots.
    pub(crate) fn lag(&self, book: &Book) -> u64 {
        let slots = self.slots.iter().enumerate();
        slots
            .map(|(slot, mirrored)| u64::from(book.len(slot as u32).saturating_sub(mirrored.safe)))
            .sum()
    }

    /// The rows of `slot` from `len` on are gone or about to be written again.
    pub(crate) fn cut(&mut self, slot: SlotId, len: u32) {
        if let Some(mirrored) = self.slots.get_mut(slot as usize) {
            mirrored.sent = mirrored.sent.min(len);
            mirrored.safe = mirrored.safe.min(len);
        }
        for message in &mut self.unanswered {
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
    pub(crate) fn next(&self, book: &Book) -> Option<Piece> {
        if self.bytes >= WINDOW {
            return None;
        }
        (0..book.slots()).find_map(|slot| {
            let position = self.slots.get(slot as usize)?.sent;
            let rows = book.len(slot).saturating_sub(position).min(PIECE);
            (rows > 0).then_some(Piece {
                slot,
                position,
                rows,
            })
        })
    }

    /// Notes that a piece of `bytes` goes out; its number.
    pub(crate) fn send(&mut self, piece: Piece, bytes: usize) -> u64 {
        let end = piece.position + piece.rows;
        if let Some(mirrored) = self.slots.get_mut(piece.slot as usize) {
            mirrored.sent = end;
        }
        self.number(piece.slot, end, bytes)
    }

    /// The standby has taken in all messages up to `count`. Returns the slots of which more is safe now.
    pub(crate) fn answered(&mut self, count: u64) -> Vec<SlotId> {
        let mut changed = Vec::new();
        while let Some(message) = self
            .unanswered
            .pop_front_if(|message| message.count <= count)
        {
            self.bytes -= message.bytes;
            let Some(mirrored) = self.slots.get_mut(message.slot as usize) else {
                continue;
            };
            if message.end > mirrored.safe {
                mirrored.safe = message.end;
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
        self.unanswered.push_back(Unanswered {
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
const PIECE: u32 = 64;
