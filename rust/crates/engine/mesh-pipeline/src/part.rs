//! One stage of a ring on one worker: as a member it computes, keeps and mirrors; as a standby it takes in.

use mesh_engine::scheduler::SlotOp;
use mesh_engine::{Segment, SlotId, Stage, StageInfo, StageInput, StageOutput, apply};
use mesh_proto::{HeldSlot, RingHeld, RingMirror, RingMirrored, RingOutcome, RingResend, RingStep};

use crate::StepError;
use crate::book::Book;
use crate::kept::Kept;
use crate::mirror::Mirror;
use crate::wire;

/// A message of a part to others in its ring.
#[derive(Debug, Clone, PartialEq)]
pub enum Out {
    /// Rows for the next stage.
    Next(RingStep),
    /// The outcome of a step, for the driver.
    Driver(RingOutcome),
    /// Acknowledged rows, for the stage before.
    Previous(RingMirrored),
    /// Replicated rows, for the standby.
    Standby(RingMirror),
}

/// A loaded range of layers and everything that its place in a ring needs. No I/O: calls come in, [`Out`]s go out.
pub struct Part {
    stage: Box<dyn Stage>,
    book: Book,
    kept: Kept,
    mirror: Option<Mirror>,
    epoch: u32,
    /// Index of the stage.
    index: u32,
    half_rows: bool,
    /// One more than the number of the last step of this epoch.
    next_step: u64,
    /// For each slot, `next_step` when its kept rows were last cut off.
    cut_at: Vec<u64>,
    /// Steps computed so far, over all epochs, and for each slot how many there were when one last changed it.
    clock: u64,
    touched: Vec<u64>,
    input: Vec<f32>,
}

impl Part {
    /// A part that holds nothing yet and belongs to no epoch. At most `kept_bytes` are kept for replays.
    pub fn new(stage: Box<dyn Stage>, kept_bytes: usize) -> Self {
        let info = stage.info();
        let slots = info.slots;
        let kept = Kept::new(slots, info.shape.hidden, kept_bytes / size_of::<f32>());
        Part {
            book: Book::new(slots),
            kept,
            mirror: None,
            epoch: 0,
            index: 0,
            half_rows: false,
            next_step: 0,
            cut_at: vec![0; slots as usize],
            clock: 0,
            touched: vec![0; slots as usize],
            input: Vec::new(),
            stage,
        }
    }

    /// Shape and limits of the stage.
    pub fn info(&self) -> &StageInfo {
        self.stage.info()
    }

    /// The tokens behind its KV rows.
    pub fn book(&self) -> &Book {
        &self.book
    }

    /// Number of its current epoch; 0 before the first.
    pub fn epoch(&self) -> u32 {
        self.epoch
    }

    /// Rows that its standby does not have; 0 without one.
    pub fn lag(&self) -> u64 {
        self.mirror
            .as_ref()
            .map_or(0, |mirror| mirror.lag(&self.book))
    }

    /// Bytes of outputs kept for a replay.
    pub fn kept_bytes(&self) -> u64 {
        self.kept.bytes()
    }

    /// From now on it is stage `index` in `epoch`. Steps of earlier epochs are refused; its standby must be named again.
    pub fn begin_epoch(&mut self, epoch: u32, index: u32, half_rows: bool) {
        self.epoch = epoch;
        self.index = index;
        self.half_rows = half_rows;
        self.next_step = 0;
        self.cut_at.fill(0);
        self.mirror = None;
    }

    /// The rows it holds, for the driver or for the member that it stands by for.
    pub fn held(&self) -> RingHeld {
        RingHeld {
            epoch: self.epoch,
            slots: self.book.held(|slot| {
                let touched = self.touched.get(slot as usize).copied().unwrap_or(0);
                (self.kept.from(slot), self.clock - touched)
            }),
        }
    }

    /// Starts replication to a standby that holds `held`.
    pub fn mirror_to(&mut self, held: &[HeldSlot], out: &mut Vec<Out>) {
        let mirror = self.mirror.insert(Mirror::new(&self.book, held));
        let safe: Vec<SlotId> = (0..self.book.slots())
            .filter(|&slot| mirror.safe(slot) > 0)
            .collect();
        self.report_safe(&safe, out);
        self.pump(out);
    }

    /// Ends replication: the standby is gone.
    pub fn stop_mirroring(&mut self) {
        self.mirror = None;
    }

    /// The standby has taken in the messages up to `count`.
    pub fn mirrored(&mut self, count: u64, out: &mut Vec<Out>) {
        let Some(mirror) = &mut self.mirror else {
            return;
        };
        let changed = mirror.answered(count);
        self.report_safe(&changed, out);
        self.pump(out);
    }

    /// The next stage's standby has the rows that follow from the first `len` of `slot`.
    pub fn next_mirrored(&mut self, mirrored: &RingMirrored) {
        // Acknowledgements from before the slot was cut off refer to other rows.
        let cut_at = self.cut_at.get(mirrored.slot as usize);
        if cut_at.is_some_and(|&cut_at| mirrored.count >= cut_at) {
            self.kept.release(mirrored.slot, mirrored.len);
        }
    }

    /// Computes a step that came from the stage before or, at stage 0, from the driver. A failure goes to the driver.
    pub fn step(&mut self, step: RingStep, out: &mut Vec<Out>) {
        if step.epoch != self.epoch {
            return;
        }
        let (number, through) = (step.step, step.through);
        match self.forward(step, out) {
            Ok(next) if through == self.index + 1 => {
                drop(next);
                out.push(Out::Driver(RingOutcome {
                    epoch: self.epoch,
                    step: number,
                    error: String::new(),
                }));
            }
            Ok(next) => out.push(Out::Next(next)),
            Err(error) => out.push(Out::Driver(RingOutcome {
                epoch: self.epoch,
                step: number,
                error: error.to_string(),
            })),
        }
        self.pump(out);
    }

    /// Sends kept rows to the next stage again.
    pub fn resend(&mut self, resend: &RingResend, out: &mut Vec<Out>) {
        if resend.epoch != self.epoch {
            return;
        }
        let tokens = self.book.tokens(resend.slot);
        let range = resend.from..resend.to;
        let rows = self.kept.rows(resend.slot, range.clone());
        let (Some(rows), true) = (rows, range.end as usize <= tokens.len()) else {
            // The driver's request was based on an older report; it will compute the rows again from further
            // up.
            out.push(Out::Driver(RingOutcome {
                epoch: self.epoch,
                step: resend.step,
                error: format!(
                    "rows {}..{} of slot {} are not kept",
                    resend.from, resend.to, resend.slot
                ),
            }));
            return;
        };
        let width = self.stage.info().shape.hidden;
        let chunk = resend.chunk.max(1);
        let starts = range.clone().step_by(chunk as usize);
        for (number, from) in (resend.step..).zip(starts) {
            let to = (from + chunk).min(resend.to);
            let first = (from - resend.from) as usize * width;
            let last = (to - resend.from) as usize * width;
            out.push(Out::Next(RingStep {
                epoch: self.epoch,
                step: number,
                slot_ops: Vec::new(),
                segments: vec![mesh_proto::RingSegment {
                    slot: resend.slot,
                    position: from,
                    rows: to - from,
                }],
                tokens: tokens[from as usize..to as usize].to_vec(),
                rows: wire::rows(&rows[first..last], self.half_rows),
                through: resend.through,
            }));
        }
    }

    /// As a standby: takes in mirrored rows of the member. An error means that the two have diverged; the
    /// member must begin again from [`held`](Self::held).
    pub fn take_mirrored(&mut self, mirror: &RingMirror) -> Result<RingMirrored, StepError> {
        if let Some(op) = &mirror.slot_op {
            let op = wire::read_slot_op(op);
            self.book.apply(&op)?;
            apply(&[op], &mut *self.stage)?;
        } else {
            self.book.check(mirror.slot, mirror.position)?;
            let info = self.stage.info();
            let per_row = info.kv_bytes_per_token as usize;
            let end = mirror.position as usize + mirror.tokens.len();
            if end > info.context as usize {
                return Err(StepError::Malformed(format!(
                    "{end} rows in a slot, whose context is {}",
                    info.context
                )));
            }
            if mirror.rows.len() != mirror.tokens.len() * per_row {
                return Err(StepError::Malformed(format!(
                    "{} bytes for {} KV rows of {per_row}",
                    mirror.rows.len(),
                    mirror.tokens.len()
                )));
            }
            self.clock += 1;
            if let Some(touched) = self.touched.get_mut(mirror.slot as usize) {
                *touched = self.clock;
            }
            self.stage
                .kv_import(mirror.slot, mirror.position, &mirror.rows)?;
            self.book
                .write(mirror.slot, mirror.position, &mirror.tokens)?;
        }
        Ok(RingMirrored {
            count: mirror.count,
            ..RingMirrored::default()
        })
    }

    /// As the last stage: computes a step whose rows have come all the way, and the logits that `segments`
    /// select.
    ///
    /// The logits are left in `logits`, whose memory is used again.
    pub(crate) fn finish_step(
        &mut self,
        step: &RingStep,
        segments: &[Segment],
        logits: &mut Vec<f32>,
        out: &mut Vec<Out>,
    ) -> Result<(), StepError> {
        self.prepare(step, segments, out)?;
        logits.clear();
        let input = if self.stage.info().is_first() {
            StageInput::Tokens(&step.tokens)
        } else {
            StageInput::Hidden(&self.input)
        };
        let result = match self.stage.forward(segments, input) {
            Ok(StageOutput::Logits(rows)) => {
                logits.extend_from_slice(rows);
                Ok(())
            }
            Ok(StageOutput::Hidden(_)) => Err(StepError::Malformed(
                "the last stage gave hidden rows instead of logits".to_owned(),
            )),
            Err(error) => Err(error.into()),
        };
        self.book_in(step, segments, result.is_ok());
        result
    }

    /// Sends the standby the rows it lacks, within the limit of unanswered bytes.
    pub(crate) fn pump(&mut self, out: &mut Vec<Out>) {
        let Some(mirror) = &mut self.mirror else {
            return;
        };
        while let Some(piece) = mirror.next(&self.book) {
            let range = piece.position..piece.position + piece.rows;
            let rows = match self.stage.kv_export(piece.slot, range.clone()) {
                Ok(rows) => rows,
                Err(error) => {
                    // Without a copy there is still the replay.
                    tracing::warn!(%error, slot = piece.slot, "KV rows cannot be mirrored");
                    self.mirror = None;
                    return;
                }
            };
            let tokens = &self.book.tokens(piece.slot)[range.start as usize..range.end as usize];
            out.push(Out::Standby(RingMirror {
                count: mirror.send(piece, rows.len()),
                slot_op: None,
                slot: piece.slot,
                position: piece.position,
                tokens: tokens.to_vec(),
                rows: rows.into(),
            }));
        }
    }

    /// Runs a step's slot operations and rows; the step with this stage's outputs.
    fn forward(&mut self, mut step: RingStep, out: &mut Vec<Out>) -> Result<RingStep, StepError> {
        let segments: Vec<Segment> = step.segments.iter().map(wire::read_segment).collect();
        self.prepare(&step, &segments, out)?;
        let input = if self.stage.info().is_first() {
            StageInput::Tokens(&step.tokens)
        } else {
            StageInput::Hidden(&self.input)
        };
        let width = self.stage.info().shape.hidden;
        let result = match self.stage.forward(&segments, input) {
            Ok(StageOutput::Hidden(rows)) => {
                step.rows = wire::rows(rows, self.half_rows);
                let mut rows = rows;
                for segment in &segments {
                    let (own, rest) = rows.split_at(segment.rows as usize * width);
                    rows = rest;
                    self.kept.write(segment.slot, segment.position, own);
                }
                Ok(())
            }
            Ok(StageOutput::Logits(_)) => Err(StepError::Malformed(
                "the last stage is driven, not stepped".to_owned(),
            )),
            Err(error) => Err(error.into()),
        };
        self.book_in(&step, &segments, result.is_ok());
        result.map(|()| step)
    }

    /// Checks a step, applies its slot operations, and brings its rows into `self.input`.
    fn prepare(
        &mut self,
        step: &RingStep,
        segments: &[Segment],
        out: &mut Vec<Out>,
    ) -> Result<(), StepError> {
        if step.step < self.next_step {
            return Err(StepError::Malformed(format!(
                "step {} comes after step {}",
                step.step, self.next_step
            )));
        }
        self.next_step = step.step + 1;
        self.clock += 1;
        for op in step.slot_ops.iter().map(wire::read_slot_op) {
            self.book.apply(&op)?;
            apply(&[op], &mut *self.stage)?;
            match op {
                SlotOp::Truncate { slot, len } => self.kept.truncate(slot, len),
                SlotOp::CopyPrefix { from, to, len } => self.kept.copy(from, to, len),
            }
            self.cut(op_slot(&op));
            let message = self.mirror.as_mut().and_then(|mirror| mirror.apply(&op));
            out.extend(message.map(Out::Standby));
        }
        let mut rows = 0u64;
        let info = self.stage.info();
        for (i, segment) in segments.iter().enumerate() {
            self.book.check(segment.slot, segment.position)?;
            rows += u64::from(segment.rows);
            let end = u64::from(segment.position) + u64::from(segment.rows);
            if end > u64::from(info.context) {
                return Err(StepError::Malformed(format!(
                    "{end} rows in a slot, whose context is {}",
                    info.context
                )));
            }
            if segments[..i].iter().any(|other| other.slot == segment.slot) {
                return Err(StepError::Malformed(format!(
                    "slot {} appears twice",
                    segment.slot
                )));
            }
        }
        if rows != step.tokens.len() as u64 || rows > u64::from(info.max_rows) {
            return Err(StepError::Malformed(format!(
                "{rows} rows with {} tokens in a step, which has at most {}",
                step.tokens.len(),
                info.max_rows
            )));
        }
        if !info.is_first() {
            let numbers = rows as usize * info.shape.hidden;
            wire::read_rows(&step.rows, numbers, self.half_rows, &mut self.input)?;
        }
        for segment in segments {
            if let Some(touched) = self.touched.get_mut(segment.slot as usize) {
                *touched = self.clock;
            }
            if segment.position < self.book.len(segment.slot) {
                self.cut(segment.slot);
                if let Some(mirror) = &mut self.mirror {
                    mirror.cut(segment.slot, segment.position);
                }
            }
        }
        Ok(())
    }

    /// Notes the rows that a step wrote. After a failure the contents of its slots are unknown, so they count
    /// as empty.
    fn book_in(&mut self, step: &RingStep, segments: &[Segment], done: bool) {
        let mut tokens = step.tokens.as_slice();
        for segment in segments {
            let (own, rest) = tokens.split_at(segment.rows as usize);
            tokens = rest;
            // Checked before the step ran.
            let written = self.book.write(segment.slot, segment.position, own);
            if !done || written.is_err() {
                self.forget(segment.slot);
            }
        }
    }

    fn forget(&mut self, slot: SlotId) {
        self.stage.truncate(slot, 0);
        // A slot that does not exist holds nothing anyway.
        let _ = self.book.apply(&SlotOp::Truncate { slot, len: 0 });
        self.kept.truncate(slot, 0);
        self.cut(slot);
        if let Some(mirror) = &mut self.mirror {
            mirror.cut(slot, 0);
        }
    }

    /// The kept rows of `slot` are others from this step on.
    fn cut(&mut self, slot: SlotId) {
        if let Some(cut_at) = self.cut_at.get_mut(slot as usize) {
            *cut_at = self.next_step;
        }
    }

    /// Tells the stage before which of its outputs it need not keep.
    fn report_safe(&self, slots: &[SlotId], out: &mut Vec<Out>) {
        // Stage 0 reads tokens, which the driver has anyway.
        let Some(mirror) = self.mirror.as_ref().filter(|_| self.index > 0) else {
            return;
        };
        out.extend(slots.iter().map(|&slot| {
            Out::Previous(RingMirrored {
                count: self.next_step,
                slot,
                len: mirror.safe(slot),
            })
        }));
    }
}

fn op_slot(op: &SlotOp) -> SlotId {
    match *op {
        SlotOp::Truncate { slot, .. } => slot,
        SlotOp::CopyPrefix { to, .. } => to,
    }
}
