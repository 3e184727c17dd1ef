//! The driver of a ring: runs an engine's steps through all stages, and brings the ring back after a loss.

use std::collections::VecDeque;
use std::sync::mpsc;
use std::time::Instant;

use mesh_engine::scheduler::Step;
use mesh_engine::{Outcome, RequestError, Runner, Segment, SlotId, StageError, StageInfo};
use mesh_proto::{Recovery, RingHeld, RingOutcome, RingResend, RingStep};

use crate::StepError;
use crate::driver_events::{DriverEvent, DriverGauges, DriverOut};
use crate::failure_detector::FailureDetector;
use crate::replay::{self, HeldRows, Replay};
use crate::replica::{Out, StageReplica};
use crate::token_log::TokenLog;
use crate::wire;

/// The driver: a [`Runner`] over a ring. It computes the last stage itself.
pub struct RingRunner {
    info: StageInfo,
    replica: StageReplica,
    events: mpsc::Receiver<DriverEvent>,
    out: Box<dyn FnMut(DriverOut) + Send>,
    stages: u32,
    phase: Phase,
    /// Contents of every slot once all planned steps are through.
    planned: TokenLog,
    /// Slots of requests in progress, as far as this driver has begun steps.
    busy: Option<Vec<SlotId>>,
    next_step: u64,
    under_way: VecDeque<UnderWay>,
    /// Steps whose rows have come all the way, in order.
    arrived: VecDeque<RingStep>,
    received: u64,
    detector: FailureDetector,
    /// The step whose logits are with the caller.
    current: Step,
    logits: Vec<f32>,
    outs: Vec<Out>,
    pump_due: bool,
    /// Time at which the running computation of the last stage began.
    computing: Option<Instant>,
    gauges: DriverGauges,
    ended: Option<RequestError>,
    loss: Option<Loss>,
    last_done: Option<Instant>,
}

#[derive(Debug)]
enum Phase {
    /// Waits for the members' reports of their rows; the last entry is the driver's own.
    Joining(Vec<Option<HeldRows>>),
    /// Waits until all replays have ended.
    Replaying(Replaying),
    Running,
}

#[derive(Debug)]
struct Replaying {
    held: Vec<HeldRows>,
    replays: Vec<ReplayUnderWay>,
}

#[derive(Debug)]
struct ReplayUnderWay {
    replay: Replay,
    tokens: Vec<u32>,
    /// Numbers of its steps.
    first: u64,
    last: u64,
    ended: Option<bool>,
}

#[derive(Debug)]
struct UnderWay {
    number: u64,
    step: Step,
    begun: Instant,
    failed: Option<String>,
}

/// The work that a change of epoch interrupted.
#[derive(Debug)]
struct Loss {
    /// Time at which the last step before it was through.
    since: Instant,
    requests: u32,
    rows: u64,
}

impl RingRunner {
    /// A driver with its replica of the last stage, of a model whose whole shape and limits are `info`.
    /// It waits for its first [`DriverEvent::Epoch`]. `out` must not block.
    pub fn new(
        info: StageInfo,
        replica: StageReplica,
        events: mpsc::Receiver<DriverEvent>,
        out: Box<dyn FnMut(DriverOut) + Send>,
    ) -> Self {
        RingRunner {
            planned: TokenLog::new(replica.token_log().slots()),
            info,
            replica,
            events,
            out,
            stages: 0,
            busy: None,
            phase: Phase::Joining(Vec::new()),
            next_step: 0,
            under_way: VecDeque::new(),
            arrived: VecDeque::new(),
            received: 0,
            detector: FailureDetector::new(0),
            current: Step::default(),
            logits: Vec::new(),
            outs: Vec::new(),
            pump_due: false,
            computing: None,
            gauges: DriverGauges::default(),
            ended: None,
            loss: None,
            last_done: None,
        }
    }

    /// State of the driver, for messages of failing tests.
    #[cfg(test)]
    pub(crate) fn describe(&self) -> String {
        let (epoch, phase, steps) = (self.replica.epoch(), &self.phase, &self.under_way);
        let arrived: Vec<u64> = self.arrived.iter().map(|step| step.step).collect();
        format!("epoch {epoch} {phase:?}, under way {steps:?}, arrived {arrived:?}")
    }

    fn handle(&mut self, event: DriverEvent, now: Instant) {
        match event {
            DriverEvent::Epoch {
                epoch,
                stages,
                half_rows,
            } => self.begin_epoch(epoch, stages, half_rows, now),
            DriverEvent::Held { stage, held } => {
                self.detector.heard(stage, None);
                self.take_held(stage, held);
            }
            DriverEvent::Rows(step) => {
                if step.epoch == self.replica.epoch() {
                    self.received += 1;
                    self.detector.arrived(self.received);
                    self.arrived.push_back(step);
                }
            }
            DriverEvent::Outcome { stage, outcome } => {
                self.detector.heard(stage, None);
                if outcome.epoch == self.replica.epoch() {
                    self.take_outcome(outcome);
                }
            }
            DriverEvent::Pong { stage, ping } => self.detector.heard(stage, Some(&ping)),
            DriverEvent::Echo(nonce) => self.detector.echo(nonce),
            DriverEvent::Standby(held) => {
                self.forget_replicated();
                self.replica.replicate_to(&held, &mut self.outs);
            }
            DriverEvent::NoStandby => {
                self.forget_replicated();
                self.replica.stop_replication();
            }
            DriverEvent::Acknowledged(count) => self.replica.acknowledged(count, &mut self.outs),
            DriverEvent::End(error) => self.ended = Some(error),
        }
    }

    fn begin_epoch(&mut self, epoch: u32, stages: u32, half_rows: bool, now: Instant) {
        if epoch <= self.replica.epoch() || stages == 0 {
            return;
        }
        if !self.under_way.is_empty() || self.loss.is_some() {
            let requests = self.under_way.iter().map(|u| u.step.segments.len());
            let requests = requests.sum::<usize>();
            let loss = self.loss.get_or_insert(Loss {
                since: self.last_done.unwrap_or(now),
                requests: 0,
                rows: 0,
            });
            loss.requests = loss.requests.max(requests as u32);
        }
        self.under_way.clear();
        self.arrived.clear();
        self.outs.clear();
        self.received = 0;
        self.next_step = 0;
        self.stages = stages;
        self.replica.begin_epoch(epoch, stages - 1, half_rows);
        self.detector.begin_epoch(stages - 1);
        self.phase = Phase::Joining((0..stages).map(|_| None).collect());
        let own = self.replica.held();
        self.take_held(stages - 1, own);
    }

    /// Drops messages to the former standby; they do not apply to the next one.
    fn forget_replicated(&mut self) {
        self.outs.retain(|out| !matches!(out, Out::Standby(_)));
    }

    fn take_held(&mut self, stage: u32, held: RingHeld) {
        let slots = self.info.slots;
        let Phase::Joining(all) = &mut self.phase else {
            return;
        };
        if held.epoch != self.replica.epoch() {
            return;
        }
        if let Some(entry) = all.get_mut(stage as usize) {
            *entry = Some(replay::read_held(slots, held));
        }
        if all.iter().all(Option::is_some) {
            let held = all.iter_mut().filter_map(Option::take).collect();
            self.begin_replays(held);
        }
    }

    fn begin_replays(&mut self, held: Vec<HeldRows>) {
        let mut replays = Vec::new();
        let busy = self.busy.as_deref();
        for replay in replay::plan(&self.planned, &held, self.info.slots, busy) {
            let wanted = replay::reference(&self.planned, &held, replay.slot);
            let tokens = wanted[..replay.to as usize].to_vec();
            let chunk = self.info.max_rows.max(1);
            let steps = u64::from((replay.to - replay.from).div_ceil(chunk));
            let first = self.next_step;
            self.next_step += steps;
            tracing::debug!(
                slot = replay.slot,
                from = replay.from,
                to = replay.to,
                source = replay.source,
                until = replay.until,
                "replays rows"
            );
            match replay.source {
                Some(stage) => (self.out)(DriverOut::Resend {
                    stage,
                    resend: RingResend {
                        epoch: self.replica.epoch(),
                        step: first,
                        slot: replay.slot,
                        from: replay.from,
                        to: replay.to,
                        chunk,
                        through: replay.until + 1,
                    },
                }),
                None => self.replay_tokens(&replay, &tokens, first, chunk),
            }
            replays.push(ReplayUnderWay {
                replay,
                tokens,
                first,
                last: self.next_step - 1,
                ended: None,
            });
        }
        self.phase = Phase::Replaying(Replaying { held, replays });
    }

    fn replay_tokens(&mut self, replay: &Replay, tokens: &[u32], first: u64, chunk: u32) {
        let starts = (replay.from..replay.to).step_by(chunk as usize);
        for (number, from) in (first..).zip(starts) {
            let to = (from + chunk).min(replay.to);
            let step = RingStep {
                epoch: self.replica.epoch(),
                step: number,
                segments: vec![wire::segment(replay.slot, from, to - from)],
                tokens: tokens[from as usize..to as usize].to_vec(),
                through: replay.until + 1,
                ..RingStep::default()
            };
            self.dispatch(step);
        }
    }

    /// To stage 0, which is the driver itself in a ring of one.
    fn dispatch(&mut self, step: RingStep) {
        if self.stages == 1 {
            self.arrived.push_back(step);
        } else {
            (self.out)(DriverOut::Step(step));
        }
    }

    fn take_outcome(&mut self, outcome: RingOutcome) {
        let failed = !outcome.error.is_empty();
        if let Phase::Replaying(replaying) = &mut self.phase {
            let under_way = replaying.replays.iter_mut().find(|replay| {
                (replay.first..=replay.last).contains(&outcome.step) && replay.ended.is_none()
            });
            if let Some(replay) = under_way {
                if failed {
                    tracing::warn!(error = outcome.error, "a replay failed");
                }
                if failed || outcome.step == replay.last {
                    replay.ended = Some(!failed);
                }
            }
            return;
        }
        let mut under_way = self.under_way.iter_mut();
        if failed && let Some(step) = under_way.find(|step| step.number == outcome.step) {
            step.failed = Some(outcome.error);
        }
    }

    /// Contents of the slots, once all replays have ended.
    fn replayed(&mut self) -> Option<Vec<Vec<u32>>> {
        let Phase::Replaying(replaying) = &mut self.phase else {
            return None;
        };
        let Replaying { held, replays } = replaying;
        if replays.iter().any(|replay| replay.ended.is_none()) {
            return None;
        }
        let mut rows = 0;
        for under_way in replays.iter() {
            let replay = &under_way.replay;
            rows += u64::from(replay.to - replay.from);
            let first = replay.source.map_or(0, |source| source + 1);
            let now_held: &[u32] = match under_way.ended {
                Some(true) => &under_way.tokens,
                // An unknown part of the rows may be there.
                _ => &[],
            };
            for stage in first..=replay.until {
                if let Some(held) = held.get_mut(stage as usize) {
                    held[replay.slot as usize].tokens = now_held.to_vec();
                }
            }
        }
        let slots = 0..self.info.slots;
        let common = slots.map(|slot| replay::common(&self.planned, held, slot));
        let common: Vec<Vec<u32>> = common.collect();
        if let Some(loss) = &mut self.loss {
            loss.rows += rows;
            // Rows of unused slots are computed again only when a request needs them.
            let busy = self.busy.iter().flatten();
            let again = busy.map(|&slot| {
                let wanted = replay::reference(&self.planned, held, slot);
                let there = common.get(slot as usize).map_or(0, Vec::len);
                wanted.len().saturating_sub(there) as u64
            });
            loss.rows += again.sum::<u64>();
        }
        let mut planned = TokenLog::new(self.info.slots);
        for (slot, tokens) in common.iter().enumerate() {
            // Of as many slots as it was made for.
            let _ = planned.write(slot as u32, 0, tokens);
        }
        self.planned = planned;
        self.phase = Phase::Running;
        Some(common)
    }

    /// Sends due pings and checks for members that do not answer.
    fn watch(&mut self, now: Instant) {
        let since = match &self.phase {
            // Loading may take long; the head handles members that are missing.
            Phase::Joining(_) => None,
            Phase::Replaying(_) => self.detector.due_since().or(Some(now)),
            Phase::Running => self.under_way.front().map(|under_way| under_way.begun),
        };
        self.detector.look(since, now);
        if let Some(ping) = self.detector.ping(now) {
            (self.out)(DriverOut::Ping(ping));
        }
        for stage in self.detector.cleared() {
            (self.out)(DriverOut::Trust { stage });
        }
        for suspicion in self.detector.silent() {
            (self.out)(DriverOut::Suspect(suspicion));
        }
    }

    /// Passes on the replica's messages.
    fn flush(&mut self) {
        if std::mem::take(&mut self.pump_due) {
            self.replica.pump(&mut self.outs);
        }
        self.outs
            .drain(..)
            .map(DriverOut::Replica)
            .for_each(&mut self.out);
    }

    /// Reports the gauges of the last stage if they have changed.
    fn gauge(&mut self, now: Instant) {
        let mut gauges = DriverGauges {
            lag: self.replica.lag(),
            kv_bytes: self.replica.token_log().rows() * self.replica.info().kv_bytes_per_token,
            ..self.gauges
        };
        if let Some(begun) = self.computing.take() {
            let took = now.saturating_duration_since(begun).as_secs_f32() * 1e6;
            smooth(&mut gauges.step_us, took);
            if self.current.tokens.len() <= FEW_ROWS {
                smooth(&mut gauges.short_us, took);
            } else {
                gauges.prefill_us += took as u64;
            }
        }
        if gauges != self.gauges {
            self.gauges = gauges;
            (self.out)(DriverOut::Gauges(gauges));
        }
    }

    /// Computes a replay's rows whose last stage is this one.
    fn finish_replay(&mut self, step: &RingStep) {
        let segments: Vec<Segment> = step.segments.iter().map(wire::read_segment).collect();
        let (logits, outs) = (&mut self.logits, &mut self.outs);
        let done = self.replica.finish_step(step, &segments, logits, outs);
        self.pump_due = true;
        self.take_outcome(wire::outcome(step.epoch, step.step, done.err()));
    }

    /// The oldest step under way, if it has failed or its rows are here.
    fn next_step_through(&mut self) -> Option<(Step, Instant, Result<RingStep, String>)> {
        let number = self.under_way.front()?.number;
        while self.arrived.front().is_some_and(|step| step.step < number) {
            self.arrived.pop_front();
        }
        let failed = self.under_way.front_mut()?.failed.take();
        let result = match failed {
            Some(error) => Err(error),
            None => Ok(self.arrived.pop_front_if(|step| step.step == number)?),
        };
        let UnderWay { step, begun, .. } = self.under_way.pop_front()?;
        Some((step, begun, result))
    }

    fn step_done(&mut self, begun: Instant, now: Instant) {
        // Prompts take long and say nothing about how long an answer's next token may.
        let few_rows = self.current.tokens.len() <= FEW_ROWS;
        self.detector
            .step(now.saturating_duration_since(begun), few_rows);
        self.last_done = Some(now);
        if let Some(loss) = self.loss.take() {
            let gap = now.saturating_duration_since(loss.since);
            (self.out)(DriverOut::Recovered(Recovery {
                gap_us: u64::try_from(gap.as_micros()).unwrap_or(u64::MAX),
                rows: loss.rows,
                requests: loss.requests,
            }));
        }
    }
}

impl Runner for RingRunner {
    fn info(&self) -> &StageInfo {
        &self.info
    }

    fn has_room(&self) -> bool {
        matches!(self.phase, Phase::Running) && self.under_way.len() < self.stages as usize
    }

    fn begin(&mut self, step: &mut Step, now: Instant) {
        let step = std::mem::take(step);
        self.busy = Some(step.busy.clone());
        let number = self.next_step;
        self.next_step += 1;
        let mut tokens = step.tokens.as_slice();
        for op in &step.slot_ops {
            // The scheduler knows the slots, so its plans fit them.
            let _ = self.planned.apply(op);
        }
        for segment in &step.segments {
            let (own, rest) = tokens.split_at(segment.rows as usize);
            tokens = rest;
            let _ = self.planned.write(segment.slot, segment.position, own);
        }
        let segments = step.segments.iter();
        self.dispatch(RingStep {
            epoch: self.replica.epoch(),
            step: number,
            slot_ops: step.slot_ops.iter().map(wire::slot_op).collect(),
            segments: segments
                .map(|s| wire::segment(s.slot, s.position, s.rows))
                .collect(),
            tokens: step.tokens.clone(),
            ..RingStep::default()
        });
        self.under_way.push_back(UnderWay {
            number,
            step,
            begun: now,
            failed: None,
        });
    }

    fn poll(&mut self, now: Instant) -> Option<Outcome<'_>> {
        // Messages that arrive below were not yet here in the time that has passed since the last look.
        self.detector.look(self.detector.due_since(), now);
        // Before anything goes out: where it goes may have changed.
        while let Ok(event) = self.events.try_recv() {
            self.handle(event, now);
        }
        self.flush();
        self.gauge(now);
        if let Some(error) = self.ended.take() {
            return Some(Outcome::Ended(error));
        }
        if let Phase::Replaying(_) = self.phase {
            while let Some(step) = self.arrived.pop_front() {
                self.finish_replay(&step);
            }
            if let Some(held) = self.replayed() {
                let epoch = self.replica.epoch();
                (self.out)(DriverOut::Running { epoch });
                return Some(Outcome::Resumed(held));
            }
        }
        self.watch(now);
        let (step, begun, result) = self.next_step_through()?;
        self.current = step;
        self.pump_due = true;
        self.computing = Some(now);
        let result = match result {
            Err(error) => Err(StageError::Backend {
                backend: "another stage",
                message: error,
            }),
            Ok(arrived) => {
                let (segments, logits) = (&self.current.segments, &mut self.logits);
                let outs = &mut self.outs;
                let done = self.replica.finish_step(&arrived, segments, logits, outs);
                done.map_err(stage_error)
            }
        };
        Some(match result {
            Ok(()) => {
                self.step_done(begun, now);
                Outcome::Logits(&self.current, &self.logits)
            }
            Err(error) => Outcome::Failed(&self.current, error),
        })
    }

    fn next_timer(&self) -> Option<Instant> {
        self.detector.next_timer()
    }
}

/// Rows of a step that continues answers.
const FEW_ROWS: usize = 16;

fn smooth(gauge: &mut f32, took: f32) {
    *gauge = if *gauge > 0.0 {
        *gauge * 0.875 + took * 0.125
    } else {
        took
    };
}

fn stage_error(error: StepError) -> StageError {
    match error {
        StepError::Stage(error) => error,
        other => StageError::Malformed(other.to_string()),
    }
}
