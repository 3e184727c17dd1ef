//! One part at work: computes its steps one after the other, in the order in which they come.
//!
//! It has a thread. A step that takes a few milliseconds at most is not worth being handed over to it,
//! because waking the thread and being woken by it costs a noticeable share of such a step: then the network
//! task that received the step computes it, if nothing else is waiting.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use dcf::{ErrorCode, Message, MsgType};
use mesh_net::quic::timestamp_us;
use mesh_pipeline::{Out, StageReplica};
use mesh_proto::{HeldSlot, RingHeld, RingMirror, RingMirrored, RingResend, RingStep};
use tokio::sync::{mpsc as async_mpsc, oneshot};

/// Outbox of a part's messages, each kind with a stream of its own. The receiver may be gone.
pub(super) type Outbox = async_mpsc::UnboundedSender<Message>;

/// The other end of an [`Outbox`].
pub(super) type Outflow = async_mpsc::UnboundedReceiver<Message>;

/// Outboxes of one epoch.
pub(super) struct Outboxes {
    pub(super) next: Outbox,
    pub(super) driver: Outbox,
    pub(super) previous: Outbox,
}

/// Commands to a part.
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
    /// Bytes of KV rows.
    pub(super) kv_bytes: AtomicU64,
    /// Bytes of outputs kept for replays.
    pub(super) kept_bytes: AtomicU64,
    /// Steps computed.
    pub(super) steps: AtomicU64,
    /// Microseconds per step of a few rows, smoothed.
    short_us: AtomicU64,
    /// Microseconds of all steps of more rows.
    pub(super) prefill_us: AtomicU64,
    /// A step panicked; the content of the part is unknown now.
    pub(super) broken: AtomicBool,
}

/// A running part. Dropping the last handle ends its thread.
#[derive(Clone)]
pub(super) struct PartHandle {
    shared: Arc<Shared>,
    /// Held by handles only: the thread ends when it is gone.
    _alive: Arc<Alive>,
    pub(super) gauges: Arc<Gauges>,
}

struct Shared {
    queue: Mutex<Queue>,
    filled: Condvar,
    /// `None` once the part was taken. A thread that takes a command from the queue holds this already, so
    /// that commands are obeyed in their order.
    worker: Mutex<Option<PartWorker>>,
}

#[derive(Default)]
struct Queue {
    commands: VecDeque<Command>,
    /// No handle is left, or the thread has ended.
    closed: bool,
}

struct Alive(Arc<Shared>);

impl Drop for Alive {
    fn drop(&mut self) {
        lock(&self.0.queue).closed = true;
        self.0.filled.notify_all();
    }
}

impl PartHandle {
    /// Starts a thread for `part`.
    pub(super) fn start(part: StageReplica) -> std::io::Result<Self> {
        let gauges = Arc::new(Gauges::default());
        let layers = part.info().layers.clone();
        let worker = PartWorker {
            part,
            gauges: gauges.clone(),
            outboxes: None,
            standby: None,
            counters: Arc::default(),
            outs: Vec::new(),
        };
        let shared = Arc::new(Shared {
            queue: Mutex::default(),
            filled: Condvar::new(),
            worker: Mutex::new(Some(worker)),
        });
        let at_work = shared.clone();
        std::thread::Builder::new()
            .name(format!("layers {}-{}", layers.start, layers.end))
            .spawn(move || at_work.work())?;
        Ok(PartHandle {
            _alive: Arc::new(Alive(shared.clone())),
            shared,
            gauges,
        })
    }

    /// Sends the part a command. A part that was taken, or whose thread panicked, does not get it: its
    /// streams end by themselves, and so does a wait for its answer.
    pub(super) fn tell(&self, command: Command) {
        let mut queue = lock(&self.shared.queue);
        if !queue.closed {
            queue.commands.push_back(command);
            self.shared.filled.notify_one();
        }
    }

    /// Tells the part to compute a step; a short one is computed here and now.
    pub(super) fn step(&self, step: RingStep) {
        let number = Arc::as_ptr(&self.shared).addr();
        if is_short(&step, self.gauges.short_us.load(Ordering::Relaxed), number) {
            let queue = lock(&self.shared.queue);
            if queue.commands.is_empty()
                && let Ok(mut worker) = self.shared.worker.try_lock()
                && let Some(worker) = worker.as_mut()
            {
                drop(queue);
                worker.obey(Command::Step(step));
                worker.send();
                return;
            }
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
    /// Body of the thread.
    fn work(&self) {
        let _end = End(self);
        loop {
            {
                let mut queue = lock(&self.queue);
                while queue.commands.is_empty() {
                    if queue.closed {
                        return;
                    }
                    queue = self
                        .filled
                        .wait(queue)
                        .unwrap_or_else(PoisonError::into_inner);
                }
            }
            // Poisoned by a step that panicked: this is the end of it.
            let Ok(mut worker) = self.worker.lock() else {
                return;
            };
            let Some(command) = lock(&self.queue).commands.pop_front() else {
                continue;
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
        }
    }
}

/// Lets go of all commands with the end of the thread, by a panic too.
struct End<'a>(&'a Shared);

impl Drop for End<'_> {
    fn drop(&mut self) {
        let mut queue = lock(&self.0.queue);
        queue.closed = true;
        let commands = std::mem::take(&mut queue.commands);
        drop(queue);
        drop(commands);
    }
}

/// Owner of the part.
struct PartWorker {
    part: StageReplica,
    gauges: Arc<Gauges>,
    outboxes: Option<Outboxes>,
    standby: Option<Outbox>,
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
                self.outboxes = Some(outboxes);
                self.standby = None;
                self.counters = counters;
            }
            Command::Held(asker) => {
                let _ = asker.send(self.part.held());
            }
            Command::Step(step) => self.step(step),
            Command::Resend(resend) => self.part.resend(&resend, &mut self.outs),
            Command::NextMirrored(mirrored) => self.part.next_acknowledged(&mirrored),
            Command::Standby(held, outbox) => {
                self.standby = Some(outbox);
                self.part.replicate_to(&held, &mut self.outs);
            }
            Command::NoStandby => {
                self.standby = None;
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
        let _watch = Watch(self.gauges.clone());
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

    /// Hands out the part's output.
    fn send(&mut self) {
        for out in self.outs.drain(..) {
            let outboxes = self.outboxes.as_ref();
            let (outbox, message) = match &out {
                Out::Next(step) => {
                    self.counters.sent.fetch_add(1, Ordering::Relaxed);
                    (outboxes.map(|o| &o.next), message(MsgType::RING_STEP, step))
                }
                Out::Driver(outcome) => (
                    outboxes.map(|o| &o.driver),
                    message(MsgType::RING_OUTCOME, outcome),
                ),
                Out::Previous(mirrored) => (
                    outboxes.map(|o| &o.previous),
                    message(MsgType::RING_MIRRORED, mirrored),
                ),
                Out::Standby(mirror) => {
                    (self.standby.as_ref(), message(MsgType::RING_MIRROR, mirror))
                }
            };
            if let Some(outbox) = outbox {
                // The task that serves a stream notices when it is gone.
                let _ = outbox.send(message);
            }
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

/// Marks the part as broken if the code in its scope panics.
struct Watch(Arc<Gauges>);

impl Drop for Watch {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.broken.store(true, Ordering::Relaxed);
        }
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

/// Values behind these mutexes are replaced as a whole, so a panic elsewhere leaves them sound.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
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

/// A message of a ring.
pub(super) fn message(kind: MsgType, body: &impl prost::Message) -> Message {
    Message::new(kind, 0, timestamp_us(), body.encode_to_vec())
}

#[cfg(test)]
mod tests {
    use std::ops::Range;
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
