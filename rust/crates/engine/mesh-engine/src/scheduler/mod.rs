//! Continuous batching: decides which rows of which requests a stage computes next.
//!
//! The scheduler is a state machine without I/O, threads or a clock. Its owner submits requests, asks for a [`Step`],
//! runs it on the stage, gives back the logits and collects the events:
//!
//! - **Decode rows go first.** Every answer in progress gets its row in every step. Prompts share the rows that are left,
//!   in chunks; while answers are in progress the chunks are kept so small that a step takes no longer than
//!   [`SchedulerConfig::decode_stall`].
//! - **Prefix reuse.** The KV rows of a finished request stay in its slot. A new request takes over the slot with the
//!   longest common prefix, or copies the rows if that saves enough. At least one token is always computed.
//! - **Several steps at once.** Rows count as cached when they are planned, so the next chunk of a prompt may be planned while
//!   the one before is still under way; steps come back in the order in which they were planned. Answers in progress are
//!   spread over [`SchedulerConfig::steps_under_way`] steps, so that all stages of a pipeline work.
//! - **Admission by expected use.** A request starts when there is KV memory for its prompt and an answer of the
//!   expected length. When memory runs out, unused rows give way first; then the youngest request in progress is
//!   *preempted* and waits at the front of the queue. Running requests are always older than waiting ones, so the
//!   oldest request is never preempted and every request ends.
//!
//! None of this changes an answer: a stage's rows are independent, and a draw depends on seed and index alone.

mod job;
mod lengths;
mod share;
mod slots;
mod speed;
mod step;

pub use step::{SlotOp, Step};

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use self::job::Job;
use self::lengths::AnswerLengths;
use self::share::share_rows;
use self::slots::{Placement, Slots};
use self::speed::Speeds;
use crate::request::{Event, GenerationRequest, RequestError};
use crate::sampler::Scratch;
use crate::workload::{Load, RequestKey, RequestStatus, Schedule, Totals};
use crate::{SlotId, StageError, StageInfo, Vocabulary};

/// Limits of a scheduler.
#[derive(Debug, Clone, PartialEq)]
pub struct SchedulerConfig {
    /// KV memory to use, in tokens; `None` is all that the stage's slots hold.
    pub kv_tokens: Option<u64>,
    /// Requests that may wait for a slot.
    pub queue_limit: usize,
    /// Most rows of a step; `None` is all that the stage takes.
    pub step_rows: Option<u32>,
    /// Longest wait for the next token that prompts may cause to answers in progress.
    pub decode_stall: Duration,
    /// Most rows of a step whose logits are all wanted, because such a row takes `vocab * 4` bytes.
    pub score_rows: u32,
    /// Steps that may be planned before the first of them is completed: the number of stages that work in turn.
    pub steps_under_way: u32,
    /// Tokens that an answer is expected to take before any has ended.
    pub answer_tokens: u32,
}

impl Default for SchedulerConfig {
    fn default() -> Self {
        SchedulerConfig {
            kv_tokens: None,
            queue_limit: 256,
            step_rows: None,
            decode_stall: Duration::from_millis(100),
            score_rows: 32,
            steps_under_way: 1,
            answer_tokens: 256,
        }
    }
}

/// The batching scheduler of one stage.
pub struct Scheduler {
    config: SchedulerConfig,
    context: u32,
    vocab: usize,
    max_rows: u32,
    kv_total: u64,
    vocabulary: Arc<dyn Vocabulary>,
    slots: Slots,
    /// Oldest first; preempted ones are older than all others.
    queue: VecDeque<Job>,
    /// Oldest first; all of them are older than the queued ones.
    running: Vec<Running>,
    lengths: AnswerLengths,
    /// Changes to slots that the next step begins with.
    slot_ops: Vec<SlotOp>,
    events: VecDeque<(RequestKey, Event)>,
    scratch: Scratch,
    speeds: Speeds,
    /// Time of the last completed step.
    completed: Option<Instant>,
    totals: Totals,
    draining: bool,
}

struct Running {
    job: Job,
    slot: SlotId,
    /// A token of its answer was chosen since it took the slot.
    decodes: bool,
}

impl Scheduler {
    /// A scheduler for a stage of shape `info` that holds a whole model with `vocabulary`.
    pub fn new(info: &StageInfo, vocabulary: Arc<dyn Vocabulary>, config: SchedulerConfig) -> Self {
        let max_rows = config.step_rows.unwrap_or(info.max_rows);
        let max_rows = max_rows.clamp(1, info.max_rows.max(1));
        // One row of every step is left for prompts, so that no request waits for ever.
        let slots = info.slots.min(max_rows.saturating_sub(1)).max(1);
        let held = u64::from(slots) * u64::from(info.context);
        let kv_total = config.kv_tokens.map_or(held, |n| n.min(held));
        Scheduler {
            // A sequence that exceeds the KV memory could never run.
            context: u32::try_from(kv_total).map_or(info.context, |n| n.min(info.context)),
            vocab: info.shape.vocab,
            max_rows,
            kv_total,
            lengths: AnswerLengths::new(config.answer_tokens),
            config,
            vocabulary,
            slots: Slots::new(slots),
            queue: VecDeque::new(),
            running: Vec::new(),
            slot_ops: Vec::new(),
            events: VecDeque::new(),
            scratch: Scratch::default(),
            speeds: Speeds::default(),
            completed: None,
            totals: Totals::default(),
            draining: false,
        }
    }

    /// Plans the next step into `step`; returns `false` if no row can be computed.
    ///
    /// Each planned step ends with [`complete`](Self::complete) or [`fail`](Self::fail), in the order of planning, unless
    /// [`resume`](Self::resume) makes it void. At most [`SchedulerConfig::steps_under_way`] should be under way at once.
    pub fn plan(&mut self, step: &mut Step, now: Instant) -> bool {
        self.expire(now);
        self.make_room();
        self.admit();
        step.clear(now);
        step.slot_ops.append(&mut self.slot_ops);
        step.busy.extend(self.running.iter().map(|r| r.slot));
        let decoding = self.decoding();
        self.plan_decode(step, decoding);
        self.plan_prefill(step, decoding);
        let mut tokens = step.tokens.as_slice();
        for segment in &step.segments {
            let (own, rest) = tokens.split_at(segment.rows as usize);
            tokens = rest;
            self.slots.extend(segment.slot, own);
        }
        !step.segments.is_empty()
    }

    /// Completes a step with its logits.
    pub fn complete(&mut self, step: &Step, logits: &[f32], now: Instant) {
        if logits.len() != step.logit_rows() * self.vocab {
            let got = logits.len();
            let wanted = step.logit_rows() * self.vocab;
            let message = format!("the stage gave {got} logits where the step has {wanted}");
            return self.fail(step, &StageError::Malformed(message));
        }
        self.record(step, now);
        let mut logits = logits.chunks_exact(self.vocab.max(1));
        for (segment, &owner) in step.segments.iter().zip(&step.owners) {
            let count = segment.logits.count(segment.rows);
            let first = segment.position + segment.rows - count;
            for (position, row) in (first..).zip(logits.by_ref().take(count as usize)) {
                self.take_logits(owner.key, position, row, now);
            }
        }
        self.finish(now);
    }

    /// Completes a step that failed: its requests fail, the others continue.
    pub fn fail(&mut self, step: &Step, error: &StageError) {
        for &owner in &step.owners {
            // One that was cancelled or preempted while the step ran is not affected.
            if self.running.iter().any(|r| r.job.owner() == owner) {
                self.end(owner.key, RequestError::Stage(error.clone()));
            }
        }
        // The contents of those slots are unknown now. A request that has one without being in the step
        // computes its rows again.
        let changed = step.slot_ops.iter().map(|op| match *op {
            SlotOp::Truncate { slot, .. } | SlotOp::CopyPrefix { to: slot, .. } => slot,
        });
        for slot in changed.chain(step.segments.iter().map(|segment| segment.slot)) {
            self.slots.clear(slot);
            self.slot_ops.push(SlotOp::Truncate { slot, len: 0 });
        }
    }

    /// Applies a recovery: every step under way is void, and each slot holds KV rows for the tokens in
    /// `held`. Requests continue behind the rows that match theirs; tokens already sent remain valid.
    pub fn resume(&mut self, held: &[Vec<u32>]) {
        self.slot_ops.clear();
        for slot in 0..self.slots.count() as SlotId {
            let held = held.get(slot as usize).map_or(&[][..], Vec::as_slice);
            let owner = self.running.iter().find(|r| r.slot == slot);
            let settled = owner.map_or(u32::MAX, |r| r.job.settled());
            let len = self.slots.resume(slot, held, settled);
            // Rows behind those are of steps that are void.
            self.slot_ops.push(SlotOp::Truncate { slot, len });
        }
        self.evict();
    }

    fn enqueue(&mut self, key: RequestKey, job: Result<Job, RequestError>, now: Instant) {
        let mut job = match job {
            Ok(job) if !self.draining => job,
            Ok(_) => return self.refuse(key, RequestError::Draining),
            Err(error) => return self.refuse(key, error),
        };
        if let Some(event) = job.finished(now) {
            self.totals.finished += 1;
            self.events.push_back((key, event));
        } else if self.queue.len() >= self.queue_room() {
            let limit = self.config.queue_limit;
            self.refuse(key, RequestError::QueueFull { limit });
        } else {
            self.queue.push_back(job);
        }
    }

    /// Longest queue allowed: the configured limit, plus one request for each slot that the next plan can
    /// fill.
    fn queue_room(&self) -> usize {
        self.config.queue_limit + self.slots.count() - self.running.len()
    }

    fn refuse(&mut self, key: RequestKey, error: RequestError) {
        self.totals.failed += 1;
        self.events.push_back((key, Event::Failed(error)));
    }

    fn expire(&mut self, now: Instant) {
        let jobs = self.queue.iter().chain(self.running.iter().map(|r| &r.job));
        let late = jobs.filter(|job| job.deadline.is_some_and(|deadline| deadline <= now));
        let late: Vec<(RequestKey, u32)> = late.map(|job| (job.key, job.answered())).collect();
        for (key, tokens) in late {
            self.queue.retain(|job| job.key != key);
            self.end(key, RequestError::DeadlineExceeded { tokens });
        }
    }

    /// Preempts requests, the youngest first, until the rows of the others fit, and drops unused rows.
    fn make_room(&mut self) {
        // One alone always fits: it was checked against the context.
        while self.used() > self.kv_total && self.running.len() > 1 {
            let Some(Running { mut job, slot, .. }) = self.running.pop() else {
                break;
            };
            tracing::debug!(
                request = job.id,
                tokens = job.tokens.len(),
                running = self.running.len(),
                "request gives its KV memory to older ones"
            );
            job.preempted = true;
            self.totals.preempted += 1;
            self.slots.release(slot);
            self.queue.push_front(job);
        }
        self.evict();
    }

    /// Gives slots to queued requests, in order, as far as slots and KV memory go.
    fn admit(&mut self) {
        while let Some(job) = self.queue.front() {
            if self.reserved() + job.expects(self.lengths.expected()) > self.kv_total {
                return;
            }
            let placement = if job.is_score() {
                self.slots.place_afresh()
            } else {
                self.slots.place(&job.tokens, job.salt)
            };
            let Some(placement) = placement else {
                return;
            };
            if let Some(job) = self.queue.pop_front() {
                self.start(job, placement);
            }
        }
    }

    fn start(&mut self, mut job: Job, placement: Placement) {
        tracing::debug!(
            request = job.id,
            slot = placement.slot,
            tokens = job.tokens.len(),
            reused = placement.reused,
            "request starts"
        );
        if !std::mem::take(&mut job.preempted) {
            job.reused = placement.reused;
        }
        job.run += 1;
        self.totals.reused_tokens += u64::from(placement.reused);
        let (slot, len) = (placement.slot, placement.reused);
        if let Some(from) = placement.copy_from {
            self.slot_ops.push(SlotOp::CopyPrefix {
                from,
                to: slot,
                len,
            });
        } else if self.slots.cached_len(slot) > len {
            self.slot_ops.push(SlotOp::Truncate { slot, len });
        }
        self.slots.claim(placement, &job.tokens, job.salt, job.key);
        self.running.push(Running {
            job,
            slot,
            decodes: false,
        });
        self.evict();
    }

    /// Drops unused rows until those in use fit. The end of a slot goes first: more requests share its
    /// beginning.
    fn evict(&mut self) {
        loop {
            let held = self.used() + self.slots.idle_tokens();
            let excess = held.saturating_sub(self.kv_total);
            let victim = self.slots.least_recently_used();
            let Some(slot) = victim.filter(|_| excess > 0) else {
                return;
            };
            // A few more than needed, because the next step needs some, too.
            let drop = u32::try_from(excess).unwrap_or(u32::MAX);
            let drop = drop.max(EVICTED_AT_ONCE);
            let len = self.slots.cached_len(slot).saturating_sub(drop);
            self.slots.truncate(slot, len);
            self.slot_ops.push(SlotOp::Truncate { slot, len });
        }
    }

    /// KV rows that requests in progress have or are about to have.
    fn used(&self) -> u64 {
        self.running.iter().map(|r| r.job.tokens.len() as u64).sum()
    }

    /// KV rows that they are expected to have at their end.
    fn reserved(&self) -> u64 {
        let expected = self.lengths.expected();
        self.running.iter().map(|r| r.job.expects(expected)).sum()
    }

    /// Answers in progress, those included whose next row is under way.
    fn decoding(&self) -> u32 {
        let decoding = self.running.iter().filter(|r| {
            !r.job.is_score() && r.job.pending(self.slots.cached_len(r.slot)).len() <= 1
        });
        decoding.count() as u32
    }

    fn plan_decode(&self, step: &mut Step, decoding: u32) {
        let share = decoding.div_ceil(self.config.steps_under_way.max(1));
        for Running { job, slot, .. } in &self.running {
            if step.segments.len() as u32 >= share {
                break;
            }
            let cached = self.slots.cached_len(*slot);
            if !job.is_score() && job.pending(cached).len() == 1 {
                step.push(job, *slot, cached, 1);
            }
        }
        step.decode_rows = step.segments.len() as u32;
    }

    fn plan_prefill(&self, step: &mut Step, decoding: u32) {
        let mut score_rows = self.config.score_rows.max(1);
        let backlogs = self.running.iter().map(|Running { job, slot, .. }| {
            let pending = job.pending(self.slots.cached_len(*slot)).len() as u32;
            match pending {
                // One at a time: their logits take memory.
                _ if job.is_score() => std::mem::take(&mut score_rows).min(pending),
                0 | 1 => 0,
                _ => pending,
            }
        });
        let backlogs: Vec<u32> = backlogs.collect();
        let shares = share_rows(&backlogs, self.prefill_budget(step.decode_rows, decoding));
        for (Running { job, slot, .. }, &rows) in self.running.iter().zip(&shares) {
            if rows > 0 {
                step.push(job, *slot, self.slots.cached_len(*slot), rows);
            }
        }
    }

    /// Rows that prompts may have beside `decode_rows` rows of the `decoding` answers in progress.
    fn prefill_budget(&self, decode_rows: u32, decoding: u32) -> u32 {
        let room = self.max_rows - decode_rows;
        if decoding == 0 {
            return room;
        }
        let rows = match self.speeds.prefill() {
            Some(per_second) => (per_second * self.config.decode_stall.as_secs_f64()) as u32,
            None => FIRST_CHUNK,
        };
        rows.max(LEAST_CHUNK).min(room)
    }

    fn record(&mut self, step: &Step, now: Instant) {
        let prefill_rows = step.tokens.len() as u32 - step.decode_rows;
        self.totals.steps += 1;
        self.totals.decode_rows += u64::from(step.decode_rows);
        self.totals.prefill_rows += u64::from(prefill_rows);
        if let Some(planned) = step.planned {
            // While several steps are under way, a step costs only the time after the one before it.
            let begun = self.completed.map_or(planned, |at| at.max(planned));
            let elapsed = now.saturating_duration_since(begun);
            self.speeds.record(step.decode_rows, prefill_rows, elapsed);
        }
        self.completed = Some(now);
    }

    fn take_logits(&mut self, owner: RequestKey, position: u32, row: &[f32], now: Instant) {
        // A request cancelled while the step ran is no longer there.
        let Some(running) = self.running.iter_mut().find(|r| r.job.key == owner) else {
            return;
        };
        // Some models pad their output beyond the vocabulary.
        let row = &row[..row.len().min(self.vocabulary.size())];
        let scratch = &mut self.scratch;
        let (job, vocabulary) = (&mut running.job, &*self.vocabulary);
        match job.take_logits(position, row, vocabulary, scratch, now) {
            Ok(Some(tokens)) => {
                running.decodes = true;
                self.events.push_back((owner, Event::Tokens(tokens)));
            }
            Ok(None) => {}
            Err(error) => self.end(owner, error),
        }
    }

    fn finish(&mut self, now: Instant) {
        let (events, slots, totals) = (&mut self.events, &mut self.slots, &mut self.totals);
        let lengths = &mut self.lengths;
        self.running.retain_mut(|running| {
            let Some(event) = running.job.finished(now) else {
                return true;
            };
            tracing::debug!(
                request = running.job.id,
                tokens = running.job.answered(),
                "done"
            );
            if let Event::Done(done) = &event {
                lengths.record(done.completion_tokens, Some(done.finish));
            }
            events.push_back((running.job.key, event));
            slots.release(running.slot);
            totals.finished += 1;
            false
        });
    }

    /// Ends a request with an error and frees its slot, if it has one.
    fn end(&mut self, key: RequestKey, error: RequestError) {
        if let Some(i) = self.running.iter().position(|r| r.job.key == key) {
            let running = self.running.remove(i);
            self.slots.release(running.slot);
            tracing::debug!(request = running.job.id, %error, "request fails");
        }
        self.refuse(key, error);
    }
}

impl Schedule for Scheduler {
    type Request = GenerationRequest;
    type Event = Event;

    fn submit(&mut self, key: RequestKey, request: GenerationRequest, now: Instant) {
        let (context, vocabulary) = (self.context, &*self.vocabulary);
        let job = match request {
            GenerationRequest::Text(request) => {
                Job::generate(key, *request, context, vocabulary, now)
            }
            GenerationRequest::Scores { id, tokens } => {
                Job::score(key, id, tokens, context, vocabulary, now)
            }
        };
        self.enqueue(key, job, now);
    }

    fn cancel(&mut self, key: RequestKey) {
        self.events.retain(|&(owner, _)| owner != key);
        let known = match self.running.iter().position(|r| r.job.key == key) {
            Some(i) => {
                let running = self.running.remove(i);
                self.slots.release(running.slot);
                self.lengths.record(running.job.answered(), None);
                true
            }
            None => {
                let before = self.queue.len();
                self.queue.retain(|job| job.key != key);
                self.queue.len() < before
            }
        };
        self.totals.cancelled += u64::from(known);
    }

    fn drain(&mut self) {
        self.draining = true;
    }

    fn end_all(&mut self, error: &RequestError) {
        let running = self.running.iter().map(|r| r.job.key);
        let queued = self.queue.iter().map(|job| job.key);
        let keys: Vec<RequestKey> = running.chain(queued).collect();
        self.queue.clear();
        for key in keys {
            self.end(key, error.clone());
        }
    }

    fn is_idle(&self) -> bool {
        self.queue.is_empty() && self.running.is_empty()
    }

    fn next_event(&mut self) -> Option<(RequestKey, Event)> {
        self.events.pop_front()
    }

    fn status(&self, key: RequestKey) -> Option<RequestStatus> {
        if let Some(running) = self.running.iter().find(|r| r.job.key == key) {
            let total = running.job.tokens.len() as u32;
            return Some(if running.decodes {
                RequestStatus::Decoding
            } else {
                let done = self.slots.cached_len(running.slot).min(total);
                RequestStatus::Prefilling { done, total }
            });
        }
        let ahead = self.queue.iter().position(|job| job.key == key)?;
        let preempted = self.queue[ahead].preempted;
        let ahead = u32::try_from(ahead).unwrap_or(u32::MAX);
        Some(if preempted {
            RequestStatus::Preempted { ahead }
        } else {
            RequestStatus::Queued { ahead }
        })
    }

    fn load(&self) -> Load {
        let running = self.running.iter();
        let running = running.map(|r| r.job.pending(self.slots.cached_len(r.slot)).len());
        let waiting = self.queue.iter().map(|job| job.pending(0).len());
        let backlog = running.chain(waiting).map(|n| n as u64);
        Load {
            running: self.running.len() as u32,
            queued: self.queue.len() as u32,
            // A token that was just chosen has no row yet.
            kv_tokens_used: self.used().min(self.kv_total),
            kv_tokens_reserved: self.reserved().min(self.kv_total),
            kv_tokens_total: self.kv_total,
            decode_tps: self.speeds.decode(self.running.len() as u32).unwrap_or(0.0) as f32,
            prefill_tps: self.speeds.prefill().unwrap_or(0.0) as f32,
            // A single pending token is an answer's next row, not a prompt.
            prefill_backlog: backlog.filter(|&n| n > 1).sum(),
            draining: self.draining,
            totals: self.totals,
        }
    }
}

/// Rows of a prompt chunk beside answers in progress, before any speed is known.
const FIRST_CHUNK: u32 = 64;

const EVICTED_AT_ONCE: u32 = 64;

/// Rows that prompts get at least, or they would never end on a slow machine.
const LEAST_CHUNK: u32 = 8;

#[cfg(test)]
mod tests;
