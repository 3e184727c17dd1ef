//! The replay buffer: outputs of a stage that the next one may need again.

use std::ops::Range;

use mesh_engine::SlotId;

/// Hidden rows by slot and position, the newest of each slot without a gap.
///
/// A row is kept until the next stage's standby has the KV rows computed from it. Without a standby all rows
/// are kept, as far as the limit goes; beyond it the oldest are dropped, and a recovery computes them again
/// from further up.
#[derive(Debug)]
pub(crate) struct ReplayBuffer {
    width: usize,
    limit: usize,
    slots: Vec<SlotOutputs>,
}

#[derive(Debug, Default, Clone)]
struct SlotOutputs {
    /// Position of the first row.
    from: u32,
    rows: Vec<f32>,
}

impl ReplayBuffer {
    /// An empty buffer for rows of `width` numbers, at most about `limit` numbers altogether.
    pub(crate) fn new(slots: u32, width: usize, limit: usize) -> Self {
        ReplayBuffer {
            width: width.max(1),
            limit,
            slots: vec![SlotOutputs::default(); slots as usize],
        }
    }

    /// Bytes of memory that the rows take.
    pub(crate) fn bytes(&self) -> u64 {
        let numbers: usize = self.slots.iter().map(|slot| slot.rows.capacity()).sum();
        (numbers * size_of::<f32>()) as u64
    }

    /// Position of the first row kept of `slot`.
    pub(crate) fn from(&self, slot: SlotId) -> u32 {
        self.slots.get(slot as usize).map_or(0, |slot| slot.from)
    }

    /// Takes in the rows at `position`; those behind it are gone.
    pub(crate) fn write(&mut self, slot: SlotId, position: u32, rows: &[f32]) {
        self.truncate(slot, position);
        let width = self.width;
        let Some(kept) = self.slots.get_mut(slot as usize) else {
            return;
        };
        if kept.end(width) != position {
            kept.from = position;
            kept.rows.clear();
        }
        kept.rows.extend_from_slice(rows);
        self.shrink();
    }

    /// Forgets the rows from `len` on.
    pub(crate) fn truncate(&mut self, slot: SlotId, len: u32) {
        let width = self.width;
        if let Some(kept) = self.slots.get_mut(slot as usize) {
            let rows = len.saturating_sub(kept.from) as usize;
            kept.rows.truncate(rows * width);
            kept.from = kept.from.min(len);
            kept.give_back(width);
        }
    }

    /// Forgets the rows before `position`.
    pub(crate) fn release(&mut self, slot: SlotId, position: u32) {
        let width = self.width;
        if let Some(kept) = self.slots.get_mut(slot as usize) {
            kept.release(position, width);
        }
    }

    /// `to` is a copy of the first `len` rows of `from`.
    pub(crate) fn copy(&mut self, from: SlotId, to: SlotId, len: u32) {
        let Some(source) = self.slots.get(from as usize) else {
            return;
        };
        let rows = len.saturating_sub(source.from) as usize * self.width;
        let copy = SlotOutputs {
            from: source.from.min(len),
            rows: source.rows[..rows.min(source.rows.len())].to_vec(),
        };
        if let Some(target) = self.slots.get_mut(to as usize) {
            *target = copy;
        }
        self.shrink();
    }

    /// The rows of a range, if all of them are kept.
    pub(crate) fn rows(&self, slot: SlotId, range: Range<u32>) -> Option<&[f32]> {
        let kept = self.slots.get(slot as usize)?;
        if range.start < kept.from || range.end > kept.end(self.width) || range.start > range.end {
            return None;
        }
        let first = (range.start - kept.from) as usize * self.width;
        Some(&kept.rows[first..first + range.len() * self.width])
    }

    /// Drops the older half of the largest slot until the limit is kept.
    fn shrink(&mut self) {
        while self.slots.iter().map(|slot| slot.rows.len()).sum::<usize>() > self.limit {
            let width = self.width;
            let Some(largest) = self.slots.iter_mut().max_by_key(|slot| slot.rows.len()) else {
                return;
            };
            let rows = (largest.rows.len() / width).div_ceil(2) as u32;
            largest.release(largest.from + rows.max(1), width);
        }
    }
}

/// Rows for which a slot may keep memory though it holds fewer.
const SPARE_ROWS: usize = 16;

impl SlotOutputs {
    fn end(&self, width: usize) -> u32 {
        self.from + (self.rows.len() / width) as u32
    }

    fn release(&mut self, position: u32, width: usize) {
        let position = position.min(self.end(width));
        if position > self.from {
            let rows = (position - self.from) as usize;
            self.rows.drain(..rows * width);
            self.from = position;
            self.give_back(width);
        }
    }

    /// Frees the memory of a long prompt once its rows are gone.
    fn give_back(&mut self, width: usize) {
        if self.rows.capacity() > 4 * self.rows.len().max(SPARE_ROWS * width) {
            self.rows.shrink_to(2 * self.rows.len());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_found_until_they_are_released_or_cut_off() {
        let mut kept = ReplayBuffer::new(2, 2, 1000);
        kept.write(0, 0, &[0.0, 0.5, 1.0, 1.5, 2.0, 2.5]);
        kept.write(0, 3, &[3.0, 3.5]);
        assert_eq!(kept.rows(0, 1..3), Some(&[1.0, 1.5, 2.0, 2.5][..]));
        kept.release(0, 2);
        assert_eq!((kept.from(0), kept.rows(0, 1..3)), (2, None));
        kept.write(0, 3, &[9.0, 9.5]);
        assert_eq!(kept.rows(0, 2..4), Some(&[2.0, 2.5, 9.0, 9.5][..]));
        kept.truncate(0, 1);
        assert_eq!((kept.from(0), kept.rows(0, 0..1)), (1, None));
        kept.write(0, 1, &[7.0, 7.5]);
        kept.copy(0, 1, 2);
        assert_eq!(kept.rows(1, 1..2), Some(&[7.0, 7.5][..]));
        assert_eq!(kept.rows(9, 0..1), None);
    }

    #[test]
    fn memory_goes_with_the_rows() {
        let mut kept = ReplayBuffer::new(2, 8, 1 << 20);
        for slot in 0..2 {
            kept.write(slot, 0, &[1.0; 8 * 1000]);
        }
        assert!(kept.bytes() >= 2 * 8 * 1000 * 4);
        kept.truncate(0, 0);
        kept.release(1, 990);
        assert!(kept.bytes() <= 2 * 8 * 16 * 4 * 4, "{}", kept.bytes());
        assert_eq!(kept.rows(1, 990..1000), Some(&[1.0; 80][..]));
    }

    #[test]
    fn the_oldest_rows_go_when_the_limit_is_reached() {
        let mut kept = ReplayBuffer::new(2, 1, 100);
        for position in 0..1000 {
            kept.write(0, position, &[position as f32]);
        }
        let from = kept.from(0);
        assert!((900..1000).contains(&from), "{from}");
        assert_eq!(
            kept.rows(0, from..1000).map(<[f32]>::len),
            Some((1000 - from) as usize)
        );
    }
}
