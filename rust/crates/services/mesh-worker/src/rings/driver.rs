//! The driver of a ring on this worker: an engine whose steps go around the ring.

use std::sync::{Arc, Mutex, mpsc};

use dcf::{Message, MsgType};
use mesh_engine::{
    Engine, EngineHandle, RequestError, SchedulerConfig, StageInfo, StartError, Waker,
};
use mesh_model::Model;
use mesh_pipeline::{DriverEvent, DriverGauges, DriverOut, RingRunner, StageReplica};
use mesh_proto::{HeldSlot, Ring, RingStep};
use tokio::sync::mpsc as async_mpsc;

use super::part::{Outbox, Outboxes, is_short};
use crate::codec::message;
use crate::lock::lock;

/// A running driver. Dropping the last handle ends its engine.
#[derive(Clone)]
pub(super) struct DriverHandle {
    inner: Arc<Inner>,
}

struct Inner {
    events: Mutex<mpsc::Sender<DriverEvent>>,
    waker: Waker,
    boxes: Arc<Mutex<Boxes>>,
    engine: EngineHandle,
    running: Option<Engine>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        // An engine ends with the step that it is at, which is too long to wait for in an async task.
        if let Some(engine) = self.running.take() {
            std::thread::spawn(move || drop(engine));
        }
    }
}

#[derive(Default)]
struct Boxes {
    members: Vec<Outbox>,
    /// Gives pings back from the network thread.
    echo: Option<async_mpsc::UnboundedSender<u64>>,
    replica: Outboxes,
    gauges: DriverGauges,
}

#[derive(Debug)]
pub(super) enum Notice {
    Driver(DriverOut),
    /// It has answered once.
    Warm {
        epoch: u32,
    },
}

impl DriverHandle {
    /// Makes the last stage's part a driver.
    pub(super) fn start(
        part: StageReplica,
        ring: &Ring,
        model: &Model,
        config: SchedulerConfig,
        notices: async_mpsc::UnboundedSender<Notice>,
    ) -> Result<Self, StartError> {
        let (events, inbox) = mpsc::channel();
        let boxes = Arc::new(Mutex::new(Boxes::default()));
        let info = whole(part.info());
        let mut waker = None;
        let make = |wake: Waker| {
            waker = Some(wake);
            let boxes = boxes.clone();
            let out = Box::new(move |out| post(&boxes, &notices, out));
            let runner = RingRunner::new(info, part, inbox, out);
            Box::new(runner) as Box<_>
        };
        let config = SchedulerConfig {
            kv_tokens: (ring.kv_tokens > 0).then_some(ring.kv_tokens),
            steps_under_way: ring.stages.len() as u32,
            ..config
        };
        let engine = Engine::start_runner(&ring.model, Arc::new(model.clone()), config, make)?;
        let Some(waker) = waker else {
            return Err(StartError::Thread("it made no runner".to_owned()));
        };
        Ok(DriverHandle {
            inner: Arc::new(Inner {
                events: Mutex::new(events),
                waker,
                boxes,
                engine: engine.handle(),
                running: Some(engine),
            }),
        })
    }

    pub(super) fn engine(&self) -> EngineHandle {
        self.inner.engine.clone()
    }

    pub(super) fn tell(&self, event: DriverEvent) {
        // An engine that has ended hears nothing; its requests have ended with it.
        let _ = lock(&self.inner.events).send(event);
        self.inner.waker.wake();
    }

    /// Rows have come all the way; a short step is finished here and now.
    pub(super) fn rows(&self, step: RingStep) {
        let number = Arc::as_ptr(&self.inner).addr();
        let short = is_short(&step, self.gauges().short_us as u64, number);
        let _ = lock(&self.inner.events).send(DriverEvent::Rows(step));
        if short {
            self.inner.waker.wake_here();
        } else {
            self.inner.waker.wake();
        }
    }

    /// A new epoch, with a way to each member and one back to the stage before the last.
    pub(super) fn begin_epoch(
        &self,
        epoch: u32,
        half_rows: bool,
        members: Vec<Outbox>,
        previous: Outbox,
        echo: async_mpsc::UnboundedSender<u64>,
    ) {
        let stages = members.len() as u32 + 1;
        let mut boxes = lock(&self.inner.boxes);
        *boxes = Boxes {
            members,
            echo: Some(echo),
            replica: Outboxes {
                previous: Some(previous),
                ..Outboxes::default()
            },
            gauges: boxes.gauges,
        };
        drop(boxes);
        self.tell(DriverEvent::Epoch {
            epoch,
            stages,
            half_rows,
        });
    }

    /// A standby of the last stage that holds this much is there now.
    pub(super) fn standby(&self, held: Vec<HeldSlot>, outbox: Outbox) {
        lock(&self.inner.boxes).replica.standby = Some(outbox);
        self.tell(DriverEvent::Standby(held));
    }

    pub(super) fn no_standby(&self) {
        lock(&self.inner.boxes).replica.standby = None;
        self.tell(DriverEvent::NoStandby);
    }

    pub(super) fn gauges(&self) -> DriverGauges {
        lock(&self.inner.boxes).gauges
    }

    /// Ends every request with `error`, and the engine.
    pub(super) fn end(&self, error: RequestError) {
        self.tell(DriverEvent::End(error));
    }
}

/// Hands on the driver's output. Runs on the engine's thread.
fn post(boxes: &Mutex<Boxes>, notices: &async_mpsc::UnboundedSender<Notice>, out: DriverOut) {
    let mut boxes = lock(boxes);
    // The task that serves a stream notices when it is gone.
    match out {
        DriverOut::Step(step) => send(boxes.members.first(), message(MsgType::RING_STEP, &step)),
        DriverOut::Ping(ping) => {
            if let Some(echo) = &boxes.echo {
                let _ = echo.send(ping.nonce);
            }
            for member in &boxes.members {
                send(Some(member), message(MsgType::RING_PING, &ping));
            }
        }
        DriverOut::Resend { stage, resend } => {
            let member = boxes.members.get(stage as usize);
            send(member, message(MsgType::RING_RESEND, &resend));
        }
        DriverOut::Replica(out) => boxes.replica.send(&out),
        DriverOut::Gauges(gauges) => boxes.gauges = gauges,
        out @ (DriverOut::Suspect(_)
        | DriverOut::Trust { .. }
        | DriverOut::Running { .. }
        | DriverOut::Recovered(_)) => {
            let _ = notices.send(Notice::Driver(out));
        }
    }
}

fn send(outbox: Option<&Outbox>, message: Message) {
    if let Some(outbox) = outbox {
        let _ = outbox.send(message);
    }
}

/// The whole model, as its last stage sees it.
fn whole(last: &StageInfo) -> StageInfo {
    let layers = last.layers.end - last.layers.start;
    StageInfo {
        layers: 0..last.shape.layers,
        kv_bytes_per_token: last.kv_bytes_per_token / u64::from(layers.max(1))
            * u64::from(last.shape.layers),
        ..last.clone()
    }
}
