//! Two stages of consecutive layers as one.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use mesh_engine::{
    LogitRows, Segment, SlotId, Stage, StageError, StageInfo, StageInput, StageOutput,
};

use crate::check;

/// A stage whose first layers one stage computes, and the rest another: the pipeline of a ring within one
/// process.
///
/// The KV rows of a token are those of the first part, then those of the second, as a single stage has them:
/// exported rows have the same format.
pub struct SplitStage {
    info: StageInfo,
    first: Box<dyn Stage>,
    second: Box<dyn Stage>,
    /// The step's segments without logits, for the first part.
    segments: Vec<Segment>,
    moved: Arc<AtomicU64>,
}

impl SplitStage {
    /// Joins two stages of one model. `moved` counts the bytes of hidden rows that go from the first to the
    /// second.
    ///
    /// # Errors
    /// [`StageError::Malformed`] if the second does not begin where the first ends, or they differ in slots,
    /// context or rows of a step.
    pub fn new(
        first: Box<dyn Stage>,
        second: Box<dyn Stage>,
        moved: Arc<AtomicU64>,
    ) -> Result<SplitStage, StageError> {
        let (a, b) = (first.info(), second.info());
        let limits = |info: &StageInfo| (info.slots, info.context, info.max_rows);
        if a.shape != b.shape || a.layers.end != b.layers.start || limits(a) != limits(b) {
            return Err(StageError::Malformed(format!(
                "layers {:?} with (slots, context, rows) = {:?} and layers {:?} with {:?} are no two parts of one \
                 stage",
                a.layers,
                limits(a),
                b.layers,
                limits(b)
            )));
        }
        let info = StageInfo {
            layers: a.layers.start..b.layers.end,
            kv_bytes_per_token: a.kv_bytes_per_token + b.kv_bytes_per_token,
            weight_bytes: a.weight_bytes + b.weight_bytes,
            ..a.clone()
        };
        Ok(SplitStage {
            info,
            first,
            second,
            segments: Vec::new(),
            moved,
        })
    }

    /// Bytes of one token's KV rows in both parts.
    fn widths(&self) -> [usize; 2] {
        [&self.first, &self.second].map(|stage| stage.info().kv_bytes_per_token as usize)
    }
}

impl Stage for SplitStage {
    fn info(&self) -> &StageInfo {
        &self.info
    }

    fn forward(
        &mut self,
        segments: &[Segment],
        input: StageInput<'_>,
    ) -> Result<StageOutput<'_>, StageError> {
        check::step(&self.info, segments, &input, |slot| self.kv_len(slot))?;
        self.segments.clear();
        self.segments.extend(segments.iter().map(|segment| Segment {
            logits: LogitRows::None,
            ..*segment
        }));
        let StageOutput::Hidden(hidden) = self.first.forward(&self.segments, input)? else {
            return Err(StageError::Malformed(
                "the first part of a split stage gave logits".into(),
            ));
        };
        let bytes = size_of_val(hidden) as u64;
        self.moved.fetch_add(bytes, Ordering::Relaxed);
        self.second.forward(segments, StageInput::Hidden(hidden))
    }

    /// The rows that both parts hold: a step that failed in one of them may have left more in the other, which
    /// the next step overwrites.
    fn kv_len(&self, slot: SlotId) -> u32 {
        self.first.kv_len(slot).min(self.second.kv_len(slot))
    }

    fn truncate(&mut self, slot: SlotId, len: u32) {
        self.first.truncate(slot, len);
        self.second.truncate(slot, len);
    }

    fn copy_prefix(&mut self, from: SlotId, to: SlotId, len: u32) -> Result<(), StageError> {
        check::slot(&self.info, from)?;
        check::slot(&self.info, to)?;
        check::held(from, self.kv_len(from), len)?;
        let first = self.first.copy_prefix(from, to, len);
        let copied = first.and_then(|()| self.second.copy_prefix(from, to, len));
        if copied.is_err() {
            // One of the parts may hold rows of another sequence.
            self.truncate(to, 0);
        }
        copied
    }

    fn kv_export(&self, slot: SlotId, rows: Range<u32>) -> Result<Vec<u8>, StageError> {
        check::slot(&self.info, slot)?;
        check::held(slot, self.kv_len(slot), rows.end)?;
        let first = self.first.kv_export(slot, rows.clone())?;
        let second = self.second.kv_export(slot, rows)?;
        let [a, b] = self.widths();
        let mut out = Vec::with_capacity(first.len() + second.len());
        for (first, second) in first.chunks_exact(a).zip(second.chunks_exact(b)) {
            out.extend_from_slice(first);
            out.extend_from_slice(second);
        }
        Ok(out)
    }

    fn kv_import(&mut self, slot: SlotId, position: u32, bytes: &[u8]) -> Result<(), StageError> {
        check::import(&self.info, slot, self.kv_len(slot), position, bytes)?;
        let [a, b] = self.widths();
        let mut parts = [a, b].map(|width| Vec::with_capacity(bytes.len() / (a + b) * width));
        for row in bytes.chunks_exact(a + b) {
            let (first, second) = row.split_at(a);
            parts[0].extend_from_slice(first);
            parts[1].extend_from_slice(second);
        }
        let first = self.first.kv_import(slot, position, &parts[0]);
        let imported = first.and_then(|()| self.second.kv_import(slot, position, &parts[1]));
        if imported.is_err() {
            self.truncate(slot, position);
        }
        imported
    }
}
