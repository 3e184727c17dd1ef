//! A replica of a stage: as a member it computes steps and replicates its KV rows, as a standby it
//! receives them.

use mesh_engine::scheduler::SlotOp;
use mesh_engine::{Segment, SlotId, Stage, StageInfo, StageInput, StageOutput, apply};
use mesh_proto::{HeldSlot, RingHeld, RingMirror, RingMirrored, RingOutcome, RingResend, RingStep};

use crate::StepError;
use crate::replay_buffer::ReplayBuffer;
use crate::replication::Replication;
use crate::token_log::TokenLog;
use crate::wire;

/// A message of a replica to others in its ring.
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

/// A stage of a ring on one worker, as member or as standby. No I/O: calls come in, [`Out`]s go out.
pub struct StageReplica {
    stage: Box<dyn Stage>,
    token_log: TokenLog,
    replay_buffer: ReplayBuffer,
    replication: Option<Replication>,
    epoch: u32,
    /// Index of the stage.
    index: u32,
    half_rows: bool,
    /// One more than the number of the last step of this epoch.
    next_step: u64,
    /// For each slot, `next_step` when its replay buffer was last cut off.
    cut_at: Vec<u64>,
    /// Steps computed so far, over all epochs, and for each slot how many there were when one last
    /// changed it.
    clock: u64,
    touched: Vec<u64>,
    input: Vec<f32>,
}

impl StageReplica {
    /// A replica without rows that belongs to no epoch. Its replay buffer takes at most `replay_bytes`.
    pub fn new(stage: Box<dyn Stage>, replay_bytes: usize) -> Self {
        let info = stage.info();
        let slots = info.slots;
        let replay_buffer =
            ReplayBuffer::new(slots, info.shape.hidden, replay_bytes / size_of::<f32>());
        StageReplica {
            token_log: TokenLog::new(slots),
            replay_buffer,
            replication: None,
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
    pub fn token_log(&self) -> &TokenLog {
        &self.token_log
    }

    /// Number of its current epoch; 0 before the first.
    pub fn epoch(&self) -> u32 {
        self.epoch
    }

    /// Rows that its standby does not have; 0 without one.
    pub fn lag(&self) -> u64 {
        self.replication
            .as_ref()
            .map_or(0, |replication| replication.lag(&self.token_log))
    }

    /// Bytes in the replay buffer.
    pub fn replay_bytes(&self) -> u64 {
        self.replay_buffer.bytes()
    }

    /// From now on it is stage `index` in `epoch`. Steps of earlier epochs are refused; its standby must
    /// be named again.
    pub fn begin_epoch(&mut self, epoch: u32, index: u32, half_rows: bool) {
        self.epoch = epoch;
        self.index = index;
        self.half_rows = half_rows;
        self.next_step = 0;
        self.cut_at.fill(0);
        self.replication = None;
    }

    /// The rows it holds, for the driver or for the member that it stands by for.
    pub fn held(&self) -> RingHeld {
        RingHeld {
            epoch: self.epoch,
            slots: self.token_log.held(|slot| {
                let touched = self.touched.get(slot as usize).copied().unwrap_or(0);
                (self.replay_buffer.from(slot), self.clock - touched)
            }),
        }
    }

    /// Starts replication to a standby that holds `held`.
    pub fn replicate_to(&mut self, held: &[HeldSlot], out: &mut Vec<Out>) {
        let replication = self
            .replication
            .insert(Replication::new(&self.token_log, held));
        let safe: Vec<SlotId> = (0..self.token_log.slots())
            .filter(|&slot| replication.safe(slot) > 0)
            .collect();
        self.report_safe(&safe, out);
        self.pump(out);
    }

    /// Ends replication: the standby is gone.
    pub fn stop_replication(&mut self) {
        self.replication = None;
    }

    /// The standby has taken in the messages up to `count`.
    pub fn acknowledged(&mut self, count: u64, out: &mut Vec<Out>) {
        let Some(replication) = &mut self.replication else {
            return;
        };
        let changed = replication.acknowledged(count);
        self.report_safe(&changed, out);
        self.pump(out);
    }

    /// The next stage's standby has the rows that follow from the first `len` of `slot`.
    pub fn next_acknowledged(&mut self, mirrored: &RingMirrored) {
        // Acknowledgements from before the slot was cut off refer to other rows.
        let cut_at = self.cut_at.get(mirrored.slot as usize);
        if cut_at.is_some_and(|&cut_at| mirrored.count >= cut_at) {
            self.replay_buffer.release(mirrored.slot, mirrored.len);
        }
    }

    /// Computes a step that came from the stage before or, at stage 0, from the driver. A failure goes to
    /// the driver.
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

    /// Sends rows of the replay buffer to the next stage again.
    pub fn resend(&mut self, resend: &RingResend, out: &mut Vec<Out>) {
        if resend.epoch != self.epoch {
            return;
        }
        let tokens = self.token_log.tokens(resend.slot);
        let range = resend.from..resend.to;
        let rows = self.replay_buffer.rows(resend.slot, range.clone());
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

    /// As a standby: takes in replicated rows of the member. An error means that the two have diverged; the
    /// member must begin again from [`held`](Self::held).
    pub fn apply_replicated(&mut self, mirror: &RingMirror) -> Result<RingMirrored, StepError> {
        if let Some(op) = &mirror.slot_op {
            let op = wire::read_slot_op(op);
            self.token_log.apply(&op)?;
            apply(&[op], &mut *self.stage)?;
        } else {
            self.token_log.check(mirror.slot, mirror.position)?;
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
            self.token_log
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
        self.log_rows(step, segments, result.is_ok());
        result
    }

    /// Sends the standby the rows it lacks, within the limit of unanswered bytes.
    pub(crate) fn pump(&mut self, out: &mut Vec<Out>) {
        let Some(replication) = &mut self.replication else {
            return;
        };
        while let Some(chunk) = replication.next(&self.token_log) {
            let range = chunk.position..chunk.position + chunk.rows;
            let rows = match self.stage.kv_export(chunk.slot, range.clone()) {
                Ok(rows) => rows,
                Err(error) => {
                    // Without a copy there is still the replay.
                    tracing::warn!(%error, slot = chunk.slot, "KV rows cannot be mirrored");
                    self.replication = None;
                    return;
                }
            };
            let tokens =
                &self.token_log.tokens(chunk.slot)[range.start as usize..range.end as usize];
            out.push(Out::Standby(RingMirror {
                count: replication.send(chunk, rows.len()),
                slot_op: None,
                slot: chunk.slot,
                position: chunk.position,
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
                    self.replay_buffer
                        .write(segment.slot, segment.position, own);
                }
                Ok(())
            }
            Ok(StageOutput::Logits(_)) => Err(StepError::Malformed(
                "the last stage is driven, not stepped".to_owned(),
            )),
            Err(error) => Err(error.into()),
        };
        self.log_rows(&step, &segments, result.is_ok());
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
            self.token_log.apply(&op)?;
            apply(&[op], &mut *self.stage)?;
            match op {
                SlotOp::Truncate { slot, len } => self.replay_buffer.truncate(slot, len),
                SlotOp::CopyPrefix { from, to, len } => self.replay_buffer.copy(from, to, len),
            }
            self.cut(op_slot(&op));
            let message = self
                .replication
                .as_mut()
                .and_then(|replication| replication.apply(&op));
            out.extend(message.map(Out::Standby));
        }
        let mut rows = 0u64;
        let info = self.stage.info();
        for (i, segment) in segments.iter().enumerate() {
            self.token_log.check(segment.slot, segment.position)?;
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
            if segment.position < self.token_log.len(segment.slot) {
                self.cut(segment.slot);
                if let Some(replication) = &mut self.replication {
                    replication.cut(segment.slot, segment.position);
                }
            }
        }
        Ok(())
    }

    /// Notes the rows that a step wrote. After a failure the contents of its slots are unknown, so they count
    /// as empty.
    fn log_rows(&mut self, step: &RingStep, segments: &[Segment], done: bool) {
        let mut tokens = step.tokens.as_slice();
        for segment in segments {
            let (own, rest) = tokens.split_at(segment.rows as usize);
            tokens = rest;
            // Checked before the step ran.
            let written = self.token_log.write(segment.slot, segment.position, own);
            if !done || written.is_err() {
                self.forget(segment.slot);
            }
        }
    }

    fn forget(&mut self, slot: SlotId) {
        self.stage.truncate(slot, 0);
        // A slot that does not exist holds nothing anyway.
        let _ = self.token_log.apply(&SlotOp::Truncate { slot, len: 0 });
        self.replay_buffer.truncate(slot, 0);
        self.cut(slot);
        if let Some(replication) = &mut self.replication {
            replication.cut(slot, 0);
        }
    }

    /// The buffered rows of `slot` are others from this step on.
    fn cut(&mut self, slot: SlotId) {
        if let Some(cut_at) = self.cut_at.get_mut(slot as usize) {
            *cut_at = self.next_step;
        }
    }

    /// Tells the stage before which of its outputs it need not keep.
    fn report_safe(&self, slots: &[SlotId], out: &mut Vec<Out>) {
        // Stage 0 reads tokens, which the driver has anyway.
        let Some(replication) = self.replication.as_ref().filter(|_| self.index > 0) else {
            return;
        };
        out.extend(slots.iter().map(|&slot| {
            Out::Previous(RingMirrored {
                count: self.next_step,
                slot,
                len: replication.safe(slot),
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
