//! One part at work: computes its steps one after the other, in the order in which they come.
//!
//! It has a thread. A step that takes a few milliseconds at most is not worth being handed over to it,
//! because waking the thread and being woken by it costs a noticeable share of such a step: then the network
//! task that received the step computes it, if nothing else is waiting.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex, mpsc};
use std::time::Instant;

use dcf::{ErrorCode, Message, MsgType};
use mesh_net::quic::timestamp_us;
use mesh_pipeline::{Out, StageReplica};
use mesh_proto::{HeldSlot, RingHeld, RingMirror, RingMirrored, RingResend, RingStep};
use tokio::sync::{mpsc as async_mpsc, oneshot};

use crate::codec::message;

/// Outbox of a part's messages, each kind with a stream of its own. The receiver may be gone.
pub(super) type Outbox = async_mpsc::UnboundedSender<Message>;

/// The other end of an [`Outbox`].
pub(super) type Outflow = async_mpsc::UnboundedReceiver<Message>;

/// Outboxes of one epoch, for the messages of a replica.
#[derive(Default)]
pub(super) struct Outboxes {
    pub(super) next: Option<Outbox>,
    pub(super) driver: Option<Outbox>,
    pub(super) previous: Option<Outbox>,
    pub(super) standby: Option<Outbox>,
}

impl Outboxes {
    pub(super) fn send(&self, out: &Out) {
        let (outbox, message) = match out {
            Out::Next(step) => (&self.next, message(MsgType::RING_STEP, step)),
            Out::Driver(outcome) => (&self.driver, message(MsgType::RING_OUTCOME, outcome)),
            Out::Previous(mirrored) => (&self.previous, message(MsgType::RING_MIRRORED, mirrored)),
            Out::Standby(mirror) => (&self.standby, message(MsgType::RING_MIRROR, mirror)),
        };
        if let Some(outbox) = outbox {
            // The task that serves a stream notices when it is gone.
            let _ = outbox.send(message);
        }
    }
}

pub(super) enum Command {
    /// A new epoch, in which it is this stage.
    Begin {
        epoch: u32,
        stage: u32,
        half_rows: bool,
        outboxes: Outboxes,
        counters: Arc<Counters>,
    },
    /// Report the rows that the part holds.
    Held(oneshot::Sender<RingHeld>),
    Step(RingStep),
    Resend(RingResend),
    NextMirrored(RingMirrored),
    /// A standby that holds this much is there now.
    Standby(Vec<HeldSlot>, Outbox),
    NoStandby,
    Mirrored(u64),
    /// As a standby: take this in and answer, with an Error if that is impossible.
    TakeMirrored(RingMirror, Outbox),
    /// Give the part away; the thread ends.
    Take(oneshot::Sender<StageReplica>),
}

/// Steps of an epoch that came and went.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) received: AtomicU64,
    pub(super) sent: AtomicU64,
}

/// State of a part as seen from outside.
#[derive(Debug, Default)]
pub(super) struct Gauges {
    /// Rows that its standby lacks.
    pub(super) lag: AtomicU64,
    /// Microseconds per step, smoothed.
    pub(super) step_us: AtomicU64,
    pub(super) kv_bytes: AtomicU64,
    /// Bytes of outputs kept for replays.
    pub(super) kept_bytes: AtomicU64,
    pub(super) steps: AtomicU64,
    /// Microseconds per step of a few rows, smoothed.
    short_us: AtomicU64,
    /// Microseconds of all steps of more rows.
    pub(super) prefill_us: AtomicU64,
}

/// A running part. Dropping the last handle ends its thread.
#[derive(Clone)]
pub(super) struct PartHandle {
    commands: mpsc::Sender<Command>,
    shared: Arc<Shared>,
    pub(super) gauges: Arc<Gauges>,
}

struct Shared {
    /// Commands that were sent and have not been obeyed yet.
    pending: AtomicUsize,
    /// `None` once the part was taken.
    worker: Mutex<Option<PartWorker>>,
}

impl PartHandle {
    pub(super) fn start(part: StageReplica) -> std::io::Result<Self> {
        let gauges = Arc::new(Gauges::default());
        let layers = part.info().layers.clone();
        let worker = PartWorker {
            part,
            gauges: gauges.clone(),
            outboxes: Outboxes::default(),
            counters: Arc::default(),
            outs: Vec::new(),
        };
        let shared = Arc::new(Shared {
            pending: AtomicUsize::new(0),
            worker: Mutex::new(Some(worker)),
        });
        let (commands, received) = mpsc::channel();
        let at_work = shared.clone();
        std::thread::Builder::new()
            .name(format!("layers {}-{}", layers.start, layers.end))
            .spawn(move || at_work.work(received))?;
        Ok(PartHandle {
            commands,
            shared,
            gauges,
        })
    }

    /// True once a command panicked: the content of the part is unknown then.
    pub(super) fn is_broken(&self) -> bool {
        self.shared.worker.is_poisoned()
    }

    /// Sends the part a command. A part that was taken, or whose thread panicked, does not get it: its
    /// streams end by themselves, and so does a wait for its answer.
    pub(super) fn tell(&self, command: Command) {
        self.shared.pending.fetch_add(1, Ordering::SeqCst);
        let _ = self.commands.send(command);
    }

    /// Tells the part to compute a step; a short one is computed here and now.
    pub(super) fn step(&self, step: RingStep) {
        let number = Arc::as_ptr(&self.shared).addr();
        if is_short(&step, self.gauges.short_us.load(Ordering::Relaxed), number)
            && let Ok(mut worker) = self.shared.worker.try_lock()
            && self.shared.pending.load(Ordering::SeqCst) == 0
            && let Some(worker) = worker.as_mut()
        {
            worker.obey(Command::Step(step));
            return worker.send();
        }
        self.tell(Command::Step(step));
    }

    /// Rows that the part holds, after all earlier commands; `None` if it is gone.
    pub(super) async fn held(&self) -> Option<RingHeld> {
        let (sender, held) = oneshot::channel();
        self.tell(Command::Held(sender));
        held.await.ok()
    }

    /// The part itself, after all that it was told before; `None` if it is gone.
    pub(super) async fn take(&self) -> Option<StageReplica> {
        let (sender, part) = oneshot::channel();
        self.tell(Command::Take(sender));
        part.await.ok()
    }
}

impl Shared {
    /// Obeys commands in their order: while one waits, none is carried out elsewhere.
    fn work(&self, commands: mpsc::Receiver<Command>) {
        for command in commands {
            // Poisoned by a step that panicked: this is the end of it.
            let Ok(mut worker) = self.worker.lock() else {
                return;
            };
            if let Command::Take(taker) = command {
                if let Some(worker) = worker.take() {
                    // The requester may be gone; then the part is not needed any more.
                    let _ = taker.send(worker.part);
                }
                return;
            }
            if let Some(worker) = worker.as_mut() {
                worker.obey(command);
                worker.send();
            }
            self.pending.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

struct PartWorker {
    part: StageReplica,
    gauges: Arc<Gauges>,
    outboxes: Outboxes,
    counters: Arc<Counters>,
    outs: Vec<Out>,
}

impl PartWorker {
    fn obey(&mut self, command: Command) {
        match command {
            Command::Begin {
                epoch,
                stage,
                half_rows,
                outboxes,
                counters,
            } => {
                self.part.begin_epoch(epoch, stage, half_rows);
                self.outboxes = outboxes;
                self.counters = counters;
            }
            Command::Held(asker) => {
                let _ = asker.send(self.part.held());
            }
            Command::Step(step) => self.step(step),
            Command::Resend(resend) => self.part.resend(&resend, &mut self.outs),
            Command::NextMirrored(mirrored) => self.part.next_acknowledged(&mirrored),
            Command::Standby(held, outbox) => {
                self.outboxes.standby = Some(outbox);
                self.part.replicate_to(&held, &mut self.outs);
            }
            Command::NoStandby => {
                self.outboxes.standby = None;
                self.part.stop_replication();
            }
            Command::Mirrored(count) => self.part.acknowledged(count, &mut self.outs),
            Command::TakeMirrored(mirror, answers) => self.take_mirrored(&mirror, &answers),
            Command::Take(_) => {}
        }
        self.gauge();
    }

    fn step(&mut self, step: RingStep) {
        let started = Instant::now();
        let rows = step.tokens.len();
        self.part.step(step, &mut self.outs);
        let took = started.elapsed().as_micros() as u64;
        self.gauges.steps.fetch_add(1, Ordering::Relaxed);
        smooth(&self.gauges.step_us, took);
        if rows <= SHORT_ROWS {
            smooth(&self.gauges.short_us, took);
        } else {
            self.gauges.prefill_us.fetch_add(took, Ordering::Relaxed);
        }
    }

    fn take_mirrored(&mut self, mirror: &RingMirror, answers: &Outbox) {
        match self.part.apply_replicated(mirror) {
            Ok(mirrored) => {
                let _ = answers.send(message(MsgType::RING_MIRRORED, &mirrored));
            }
            Err(error) => {
                // The member begins again from the rows that this standby holds.
                tracing::info!(%error, "this standby has lost step with its member");
                let text = error.to_string();
                let error = Message::error(0, timestamp_us(), ErrorCode::INVALID_PAYLOAD, &text);
                let _ = answers.send(error);
            }
        }
    }

    fn send(&mut self) {
        for out in self.outs.drain(..) {
            if let Out::Next(_) = out {
                self.counters.sent.fetch_add(1, Ordering::Relaxed);
            }
            self.outboxes.send(&out);
        }
    }

    fn gauge(&self) {
        let rows = self.part.token_log().rows();
        let bytes = rows * self.part.info().kv_bytes_per_token;
        self.gauges.kv_bytes.store(bytes, Ordering::Relaxed);
        let kept = self.part.replay_bytes();
        self.gauges.kept_bytes.store(kept, Ordering::Relaxed);
        self.gauges.lag.store(self.part.lag(), Ordering::Relaxed);
    }
}

fn smooth(gauge: &AtomicU64, took: u64) {
    let before = gauge.load(Ordering::Relaxed);
    let smoothed = if before == 0 {
        took
    } else {
        (before * 7 + took) / 8
    };
    gauge.store(smoothed, Ordering::Relaxed);
}

/// Returns true if a step may be computed by the task that received it, where steps of a few rows take
/// `short_us` microseconds. `part` is a number that identifies the caller.
pub(super) fn is_short(step: &RingStep, short_us: u64, part: usize) -> bool {
    let limit = || match is_alone(part) {
        true => ALONE_US,
        false => SHORT_US,
    };
    step.tokens.len() <= SHORT_ROWS && (1..limit()).contains(&short_us)
}

/// Notes that `part` has a step of a few rows; whether no other part of this worker had one a moment ago.
fn is_alone(part: usize) -> bool {
    static BEGUN: LazyLock<Instant> = LazyLock::new(Instant::now);
    static LAST: AtomicUsize = AtomicUsize::new(0);
    static CHANGED: AtomicU64 = AtomicU64::new(0);
    let now = BEGUN.elapsed().as_millis() as u64;
    if LAST.swap(part, Ordering::Relaxed) != part {
        CHANGED.store(now, Ordering::Relaxed);
    }
    now.saturating_sub(CHANGED.load(Ordering::Relaxed)) >= MOMENT_MS
}

/// Rows of a step that may be computed by the task that received it.
const SHORT_ROWS: usize = 8;

/// Microseconds that steps take on average if they may be: the other parts' tasks wait for as long.
const SHORT_US: u64 = 4_000;

/// The same where no other part has steps.
const ALONE_US: u64 = 20_000;

/// Milliseconds after which another part's step is forgotten.
const MOMENT_MS: u64 = 1_000;

#[cfg(test)]
mod tests {
    use std::ops::Range;
    use std::sync::atomic::AtomicBool;
    use std::time::Duration;

    use mesh_engine::{
        ModelShape, Segment, SlotId, Stage, StageError, StageInfo, StageInput, StageOutput,
    };

    use super::*;

    /// A stage that panics from the time on that the flag is set.
    struct Doomed(StageInfo, Arc<AtomicBool>);

    impl Stage for Doomed {
        fn info(&self) -> &StageInfo {
            assert!(!self.1.load(Ordering::SeqCst), "as the test wants it");
            &self.0
        }

        fn forward(
            &mut self,
            _: &[Segment],
            _: StageInput<'_>,
        ) -> Result<StageOutput<'_>, StageError> {
            Err(StageError::Malformed("the test has no steps".to_owned()))
        }

        fn kv_len(&self, _: SlotId) -> u32 {
            0
        }

        fn truncate(&mut self, _: SlotId, _: u32) {}

        fn copy_prefix(&mut self, _: SlotId, _: SlotId, _: u32) -> Result<(), StageError> {
            Ok(())
        }

        fn kv_export(&self, _: SlotId, _: Range<u32>) -> Result<Vec<u8>, StageError> {
            Ok(Vec::new())
        }

        fn kv_import(&mut self, _: SlotId, _: u32, _: &[u8]) -> Result<(), StageError> {
            Ok(())
        }
    }

    fn start(doomed: &Arc<AtomicBool>) -> PartHandle {
        let info = StageInfo {
            shape: ModelShape {
                layers: 1,
                hidden: 1,
                vocab: 1,
                kv_heads: 1,
                head_dim: 1,
            },
            layers: 0..1,
            slots: 1,
            context: 8,
            max_rows: 8,
            kv_bytes_per_token: 8,
            weight_bytes: 0,
        };
        let stage = Box::new(Doomed(info, doomed.clone()));
        PartHandle::start(StageReplica::new(stage, 1024)).unwrap()
    }

    async fn in_time<T>(answer: impl Future<Output = T>) -> T {
        let answer = tokio::time::timeout(Duration::from_secs(30), answer);
        answer.await.expect("the wait ends")
    }

    #[tokio::test]
    async fn nobody_waits_for_a_part_that_panicked_or_was_taken() {
        for panics in [true, false] {
            let doomed = Arc::new(AtomicBool::new(false));
            let part = start(&doomed);
            assert!(in_time(part.held()).await.is_some());
            if panics {
                doomed.store(true, Ordering::SeqCst);
                part.tell(Command::NoStandby);
            } else {
                assert!(in_time(part.take()).await.is_some());
            }
            assert!(in_time(part.held()).await.is_none());
            assert!(in_time(part.take()).await.is_none());
        }
    }
}
