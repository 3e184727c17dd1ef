//! Stages of consecutive layers as one.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use mesh_engine::{Segment, SlotId, Stage, StageError, StageInfo, StageInput, StageOutput};

use crate::check;

/// A stage whose layers several stages compute one after the other: the pipeline of a ring within one process.
///
/// The KV rows of a token are those of the first part, then those of the next, as a single stage has them:
/// exported rows have the same format.
pub struct SplitStage {
    info: StageInfo,
    parts: Vec<Box<dyn Stage>>,
    /// The step's segments without logits, for all parts but the last.
    segments: Vec<Segment>,
    /// Bytes of hidden rows that left the first part.
    moved: Arc<AtomicU64>,
}

impl SplitStage {
    /// Joins stages of one model.
    ///
    /// # Errors
    /// [`StageError::Malformed`] if there are none, or one does not begin where the one before ends, or they differ
    /// in slots, context or rows of a step.
    pub fn chain(parts: Vec<Box<dyn Stage>>) -> Result<SplitStage, StageError> {
        let Some((first, others)) = parts.split_first() else {
            return Err(StageError::Malformed("a stage of no parts".into()));
        };
        let mut info = first.info().clone();
        let limits = |info: &StageInfo| (info.slots, info.context, info.max_rows);
        for other in others {
            let next = other.info();
            if info.shape != next.shape
                || info.layers.end != next.layers.start
                || limits(&info) != limits(next)
            {
                return Err(StageError::Malformed(format!(
                    "layers {:?} with (slots, context, rows) = {:?} and layers {:?} with {:?} are no two parts of \
                     one stage",
                    info.layers,
                    limits(&info),
                    next.layers,
                    limits(next)
                )));
            }
            info.layers.end = next.layers.end;
            info.kv_bytes_per_token += next.kv_bytes_per_token;
            info.weight_bytes += next.weight_bytes;
        }
        Ok(SplitStage {
            info,
            parts,
            segments: Vec::new(),
            moved: Arc::default(),
        })
    }

    /// The same stage; `moved` counts the bytes of hidden rows that leave its first part.
    pub fn counting(self, moved: &Arc<AtomicU64>) -> SplitStage {
        SplitStage {
            moved: Arc::clone(moved),
            ..self
        }
    }

    /// Bytes of one token's KV rows in each part.
    fn widths(&self) -> impl Iterator<Item = usize> {
        let parts = self.parts.iter();
        parts.map(|stage| stage.info().kv_bytes_per_token as usize)
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
        check::without_logits(segments, &mut self.segments);
        let no_parts = || StageError::Malformed("a stage of no parts".into());
        let mut input = input;
        let (last, before) = self.parts.split_last_mut().ok_or_else(no_parts)?;
        for (at, part) in before.iter_mut().enumerate() {
            input = match part.forward(&self.segments, input)? {
                StageOutput::Hidden(hidden) => {
                    if at == 0 {
                        let bytes = size_of_val(hidden) as u64;
                        self.moved.fetch_add(bytes, Ordering::Relaxed);
                    }
                    StageInput::Hidden(hidden)
                }
                StageOutput::Logits(_) => {
                    let text = "a part that is not the last one gave logits";
                    return Err(StageError::Malformed(text.into()));
                }
            };
        }
        last.forward(segments, input)
    }

    /// The rows that all parts hold: a step that failed in one of them may have left more in those before, which
    /// the next step overwrites.
    fn kv_len(&self, slot: SlotId) -> u32 {
        let held = self.parts.iter().map(|part| part.kv_len(slot));
        held.min().unwrap_or(0)
    }

    fn truncate(&mut self, slot: SlotId, len: u32) {
        for part in &mut self.parts {
            part.truncate(slot, len);
        }
    }

    fn copy_prefix(&mut self, from: SlotId, to: SlotId, len: u32) -> Result<(), StageError> {
        check::slot(&self.info, from)?;
        check::slot(&self.info, to)?;
        check::held(from, self.kv_len(from), len)?;
        let mut parts = self.parts.iter_mut();
        let copied = parts.try_for_each(|part| part.copy_prefix(from, to, len));
        if copied.is_err() {
            // Some of the parts may hold rows of another sequence.
            self.truncate(to, 0);
        }
        copied
    }

    fn kv_export(&self, slot: SlotId, rows: Range<u32>) -> Result<Vec<u8>, StageError> {
        check::slot(&self.info, slot)?;
        check::held(slot, self.kv_len(slot), rows.end)?;
        let width = self.widths().sum::<usize>();
        let mut out = vec![0; rows.len() * width];
        let mut at = 0;
        for (part, own) in self.parts.iter().zip(self.widths()) {
            let exported = part.kv_export(slot, rows.clone())?;
            for (row, exported) in out.chunks_exact_mut(width).zip(exported.chunks_exact(own)) {
                row[at..at + own].copy_from_slice(exported);
            }
            at += own;
        }
        Ok(out)
    }

    fn kv_import(&mut self, slot: SlotId, position: u32, bytes: &[u8]) -> Result<(), StageError> {
        check::import(&self.info, slot, self.kv_len(slot), position, bytes)?;
        let widths: Vec<usize> = self.widths().collect();
        let width = widths.iter().sum::<usize>();
        let mut at = 0;
        for (part, own) in self.parts.iter_mut().zip(widths) {
            let rows = bytes.chunks_exact(width);
            let rows: Vec<u8> = rows.flat_map(|row| &row[at..at + own]).copied().collect();
            if let Err(error) = part.kv_import(slot, position, &rows) {
                self.truncate(slot, position);
                return Err(error);
            }
            at += own;
        }
        Ok(())
    }
}
