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
        let replication = self.replication.as_ref();
        replication.map_or(0, |replication| replication.lag(&self.token_log))
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
        let replication = Replication::new(&self.token_log, held);
        let replication = self.replication.insert(replication);
        let slots = 0..self.token_log.slots();
        let safe: Vec<SlotId> = slots.filter(|&slot| replication.safe(slot) > 0).collect();
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
        let result = match self.forward(step, out) {
            Ok(next) if through != self.index + 1 => Out::Next(next),
            done => Out::Driver(wire::outcome(self.epoch, number, done.err())),
        };
        out.push(result);
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
            let (from, to, slot) = (resend.from, resend.to, resend.slot);
            let error = format!("rows {from}..{to} of slot {slot} are not kept");
            return out.push(Out::Driver(wire::outcome(
                self.epoch,
                resend.step,
                Some(error),
            )));
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
                segments: vec![wire::segment(resend.slot, from, to - from)],
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
            let per_row = self.stage.info().kv_bytes_per_token as usize;
            self.check_end(mirror.position, mirror.tokens.len() as u64)?;
            if mirror.rows.len() != mirror.tokens.len() * per_row {
                return Err(StepError::Malformed(format!(
                    "{} bytes for {} KV rows of {per_row}",
                    mirror.rows.len(),
                    mirror.tokens.len()
                )));
            }
            self.clock += 1;
            self.touch(mirror.slot);
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
        logits.clear();
        self.compute(step, segments, out, |output, _| match output {
            StageOutput::Logits(rows) => {
                logits.extend_from_slice(rows);
                Ok(())
            }
            StageOutput::Hidden(_) => Err(StepError::Malformed(
                "the last stage gave hidden rows instead of logits".to_owned(),
            )),
        })
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

    /// Computes a step; returns it with this stage's outputs.
    fn forward(&mut self, mut step: RingStep, out: &mut Vec<Out>) -> Result<RingStep, StepError> {
        let segments: Vec<Segment> = step.segments.iter().map(wire::read_segment).collect();
        let (width, half_rows) = (self.stage.info().shape.hidden, self.half_rows);
        step.rows = self.compute(&step, &segments, out, |output, replay_buffer| {
            let StageOutput::Hidden(mut rows) = output else {
                let fault = "the last stage is driven, not stepped".to_owned();
                return Err(StepError::Malformed(fault));
            };
            let bytes = wire::rows(rows, half_rows);
            for segment in &segments {
                let (own, rest) = rows.split_at(segment.rows as usize * width);
                rows = rest;
                replay_buffer.write(segment.slot, segment.position, own);
            }
            Ok(bytes)
        })?;
        Ok(step)
    }

    /// Runs a step's slot operations and rows; `take` gets the stage's output.
    fn compute<T>(
        &mut self,
        step: &RingStep,
        segments: &[Segment],
        out: &mut Vec<Out>,
        take: impl FnOnce(StageOutput<'_>, &mut ReplayBuffer) -> Result<T, StepError>,
    ) -> Result<T, StepError> {
        self.prepare(step, segments, out)?;
        let input = match self.stage.info().is_first() {
            true => StageInput::Tokens(&step.tokens),
            false => StageInput::Hidden(&self.input),
        };
        let output = self.stage.forward(segments, input).map_err(StepError::from);
        let result = output.and_then(|output| take(output, &mut self.replay_buffer));
        self.log_rows(step, segments, result.is_ok());
        result
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
            let replication = self.replication.as_mut();
            let message = replication.and_then(|replication| replication.apply(&op));
            out.extend(message.map(Out::Standby));
        }
        let mut rows = 0u64;
        let info = self.stage.info();
        for (i, segment) in segments.iter().enumerate() {
            self.token_log.check(segment.slot, segment.position)?;
            rows += u64::from(segment.rows);
            self.check_end(segment.position, segment.rows.into())?;
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
            self.touch(segment.slot);
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

    /// Fails if a slot has no room for `rows` rows at `position`.
    fn check_end(&self, position: u32, rows: u64) -> Result<(), StepError> {
        let (end, context) = (u64::from(position) + rows, self.stage.info().context);
        if end > u64::from(context) {
            let fault = format!("{end} rows in a slot, whose context is {context}");
            return Err(StepError::Malformed(fault));
        }
        Ok(())
    }

    /// Rows of `slot` change.
    fn touch(&mut self, slot: SlotId) {
        if let Some(touched) = self.touched.get_mut(slot as usize) {
            *touched = self.clock;
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
