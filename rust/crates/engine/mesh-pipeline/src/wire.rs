//! Between the engine's types and the messages of a ring.

use bytes::Bytes;
use half::f16;
use mesh_engine::scheduler::SlotOp;
use mesh_engine::{LogitRows, Segment, SlotId};
use mesh_proto::{RingOutcome, RingSegment, RingSlotOp};

use crate::StepError;

/// A change to a slot, for the wire.
pub(crate) fn slot_op(op: &SlotOp) -> RingSlotOp {
    match *op {
        SlotOp::Truncate { slot, len } => RingSlotOp {
            slot,
            len,
            from_plus_one: 0,
        },
        SlotOp::CopyPrefix { from, to, len } => RingSlotOp {
            slot: to,
            len,
            from_plus_one: from + 1,
        },
    }
}

/// A change to a slot, from the wire.
pub(crate) fn read_slot_op(op: &RingSlotOp) -> SlotOp {
    match op.from_plus_one.checked_sub(1) {
        None => SlotOp::Truncate {
            slot: op.slot,
            len: op.len,
        },
        Some(from) => SlotOp::CopyPrefix {
            from,
            to: op.slot,
            len: op.len,
        },
    }
}

pub(crate) fn segment(slot: SlotId, position: u32, rows: u32) -> RingSegment {
    RingSegment {
        slot,
        position,
        rows,
    }
}

/// The outcome of a step, with its error if it failed.
pub(crate) fn outcome(epoch: u32, step: u64, error: Option<impl ToString>) -> RingOutcome {
    RingOutcome {
        epoch,
        step,
        error: error.map_or_else(String::new, |error| error.to_string()),
    }
}

/// A segment, from the wire: no logits.
pub(crate) fn read_segment(segment: &RingSegment) -> Segment {
    Segment {
        slot: segment.slot,
        position: segment.position,
        rows: segment.rows,
        logits: LogitRows::None,
    }
}

/// Hidden rows as bytes. A number beyond the range of f16 becomes its largest number rather than infinity,
/// which would spoil all later rows.
pub(crate) fn rows(numbers: &[f32], half: bool) -> Bytes {
    if half {
        let (least, most) = (f16::MIN.to_f32(), f16::MAX.to_f32());
        let clamped = numbers.iter().map(|number| number.clamp(least, most));
        let bytes = clamped.flat_map(|number| f16::from_f32(number).to_le_bytes());
        bytes.collect::<Vec<u8>>().into()
    } else {
        let mut bytes = Vec::with_capacity(numbers.len() * 4);
        for number in numbers {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        bytes.into()
    }
}

/// Hidden rows from bytes, into `out`.
pub(crate) fn read_rows(
    bytes: &[u8],
    numbers: usize,
    half: bool,
    out: &mut Vec<f32>,
) -> Result<(), StepError> {
    let size = if half { 2 } else { 4 };
    if bytes.len() != numbers * size {
        return Err(StepError::Malformed(format!(
            "{} bytes where {numbers} numbers of {size} bytes belong",
            bytes.len()
        )));
    }
    out.clear();
    if half {
        let halves = bytes.as_chunks().0.iter();
        out.extend(halves.map(|&half| f16::from_le_bytes(half).to_f32()));
    } else {
        out.extend(bytes.as_chunks().0.iter().copied().map(f32::from_le_bytes));
    }
    Ok(())
}
