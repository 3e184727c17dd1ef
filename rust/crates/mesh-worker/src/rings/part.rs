//! The thread of one part: computes its steps one after the other, in the order in which they come.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Instant;

use dcf::{ErrorCode, Message, MsgType};
use mesh_net::quic::timestamp_us;
use mesh_pipeline::{Out, Part};
use mesh_proto::{HeldSlot, RingHeld, RingMirror, RingMirrored, RingResend, RingStep};
use tokio::sync::{mpsc as async_mpsc, oneshot};

/// Where a part's messages go, each onto a stream of its own. Nobody may be there to take them.
pub(super) type Outbox = async_mpsc::UnboundedSender<Message>;

/// The other end of an [`Outbox`].
pub(super) type Outflow = async_mpsc::UnboundedReceiver<Message>;

/// Where the messages of one epoch go.
pub(super) struct Outboxes {
    pub(super) next: Outbox,
    pub(super) driver: Outbox,
    pub(super) previous: Outbox,
}

/// What a part is told.
pub(super) enum Command {
    /// A new epoch, in which it is this stage.
    Begin {
        epoch: u32,
        stage: u32,
        half_rows: bool,
        outboxes: Outboxes,
        counters: Arc<Counters>,
    },
    /// Say what you hold.
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
    Take(oneshot::Sender<Part>),
}

/// Steps of an epoch that came and went.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) received: AtomicU64,
    pub(super) sent: AtomicU64,
}

/// What is to be seen of a part from outside.
#[derive(Debug, Default)]
pub(super) struct Gauges {
    /// Rows that its standby lacks.
    pub(super) lag: AtomicU64,
    /// Microseconds per step, smoothed.
    pub(super) step_us: AtomicU64,
    /// Bytes of KV rows.
    pub(super) kv_bytes: AtomicU64,
}

/// A running part. Dropping the last handle ends its thread.
#[derive(Clone)]
pub(super) struct PartHandle {
    commands: mpsc::Sender<Command>,
    pub(super) gauges: Arc<Gauges>,
}

impl PartHandle {
    /// Starts a thread for `part`.
    pub(super) fn start(part: Part) -> std::io::Result<Self> {
        let (commands, inbox) = mpsc::channel();
        let gauges = Arc::new(Gauges::default());
        let layers = part.info().layers.clone();
        let thread = Thread {
            part,
            gauges: gauges.clone(),
            outboxes: None,
            standby: None,
            counters: Arc::default(),
            outs: Vec::new(),
        };
        std::thread::Builder::new()
            .name(format!("layers {}-{}", layers.start, layers.end))
            .spawn(move || thread.run(&inbox))?;
        Ok(PartHandle { commands, gauges })
    }

    /// Tells the part something. A thread that has ended does not hear it; its streams end by themselves.
    pub(super) fn tell(&self, command: Command) {
        let _ = self.commands.send(command);
    }

    /// What the part holds, after all that it was told before.
    pub(super) async fn held(&self) -> Option<RingHeld> {
        let (sender, held) = oneshot::channel();
        self.tell(Command::Held(sender));
        held.await.ok()
    }

    /// The part itself, after all that it was told before.
    pub(super) async fn take(&self) -> Option<Part> {
        let (sender, part) = oneshot::channel();
        self.tell(Command::Take(sender));
        part.await.ok()
    }
}

struct Thread {
    part: Part,
    gauges: Arc<Gauges>,
    outboxes: Option<Outboxes>,
    standby: Option<Outbox>,
    counters: Arc<Counters>,
    outs: Vec<Out>,
}

impl Thread {
    fn run(mut self, inbox: &mpsc::Receiver<Command>) {
        while let Ok(command) = inbox.recv() {
            if let Command::Take(taker) = command {
                // Whoever wanted it may be gone; then nobody needs it any more.
                let _ = taker.send(self.part);
                return;
            }
            self.obey(command);
            self.send();
        }
    }

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
            Command::NextMirrored(mirrored) => self.part.next_mirrored(&mirrored),
            Command::Standby(held, outbox) => {
                self.standby = Some(outbox);
                self.part.mirror_to(&held, &mut self.outs);
            }
            Command::NoStandby => {
                self.standby = None;
                self.part.stop_mirroring();
            }
            Command::Mirrored(count) => self.part.mirrored(count, &mut self.outs),
            Command::TakeMirrored(mirror, answers) => self.take_mirrored(&mirror, &answers),
            Command::Take(_) => {}
        }
        self.gauge();
    }

    fn step(&mut self, step: RingStep) {
        let started = Instant::now();
        self.part.step(step, &mut self.outs);
        let took = started.elapsed().as_micros() as u64;
        let before = self.gauges.step_us.load(Ordering::Relaxed);
        let smoothed = if before == 0 {
            took
        } else {
            (before * 7 + took) / 8
        };
        self.gauges.step_us.store(smoothed, Ordering::Relaxed);
    }

    fn take_mirrored(&mut self, mirror: &RingMirror, answers: &Outbox) {
        match self.part.take_mirrored(mirror) {
            Ok(mirrored) => {
                let _ = answers.send(message(MsgType::RING_MIRRORED, &mirrored));
            }
            Err(error) => {
                tracing::warn!(%error, "this standby has lost step with its member");
                let text = error.to_string();
                let error = Message::error(0, timestamp_us(), ErrorCode::INVALID_PAYLOAD, &text);
                let _ = answers.send(error);
            }
        }
    }

    /// Hands out what the part has to say.
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
                // A stream that is gone is noticed by whoever served it.
                let _ = outbox.send(message);
            }
        }
    }

    fn gauge(&self) {
        let rows = self.part.book().rows();
        let bytes = rows * self.part.info().kv_bytes_per_token;
        self.gauges.kv_bytes.store(bytes, Ordering::Relaxed);
        self.gauges.lag.store(self.part.lag(), Ordering::Relaxed);
    }
}

/// A message of a ring.
pub(super) fn message(kind: MsgType, body: &impl prost::Message) -> Message {
    Message::new(kind, 0, timestamp_us(), body.encode_to_vec())
}
