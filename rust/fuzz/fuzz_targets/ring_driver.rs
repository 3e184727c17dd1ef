//! Whatever the members of a ring answer to its driver: answers go on or end, and the driver holds nothing without bound.
#![no_main]

#[path = "../../crates/engine/mesh-pipeline/src/simulation/toy.rs"]
#[allow(dead_code)]
mod toy;

use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use libfuzzer_sys::fuzz_target;
use mesh_engine::scheduler::{Scheduler, SchedulerConfig, Step};
use mesh_engine::{Outcome, Request, Runner, Schedule, Stage};
use mesh_pipeline::{DriverEvent, DriverOut, RingRunner, StageReplica};
use mesh_proto::{HeldSlot, RingHeld, RingOutcome, RingPing, RingStep};
use toy::{CONTEXT, LAYERS, Letters, SLOTS, info, stage};

type Op = (u8, u32, u32, Vec<u8>);

const STAGES: u32 = 2;

fn near(number: u32) -> u32 {
    match number % 8 {
        0 => number,
        1 => (number >> 3) % (2 * CONTEXT),
        _ => (number >> 3) % (SLOTS + 2),
    }
}

fn held(bytes: &[u8], slots: u32) -> Vec<HeldSlot> {
    let tokens = bytes.iter().map(|&byte| u32::from(byte) % 40).collect();
    let held = HeldSlot {
        tokens,
        ..HeldSlot::default()
    };
    vec![held; slots as usize]
}

fuzz_target!(|ops: Vec<Op>| {
    let (sender, receiver) = mpsc::channel();
    let part = StageReplica::new(Box::new(stage(3..LAYERS)) as Box<dyn Stage>, 4096);
    let (steps, sent) = mpsc::channel();
    let out = Box::new(move |out| {
        if let DriverOut::Step(step) = out {
            let _ = steps.send(step);
        }
    });
    let whole = info(0..LAYERS);
    let mut runner = RingRunner::new(whole.clone(), part, receiver, out);
    let mut scheduler = Scheduler::new(&whole, Arc::new(Letters), SchedulerConfig::default());
    let mut now = Instant::now();
    for number in 0..3u64 {
        let request = Request::greedy(format!("{number}"), vec![1, 2, 3], 20);
        scheduler.submit(number, request.into(), now);
    }
    let (mut step, mut epoch): (Step, u32) = (Step::default(), 1);
    let epoch_begins = |epoch| DriverEvent::Epoch {
        epoch,
        stages: STAGES,
        half_rows: false,
    };
    let _ = sender.send(epoch_begins(epoch));
    for (kind, a, b, bytes) in ops.into_iter().take(200) {
        let event = match kind % 8 {
            // An honest member, so that the ring gets somewhere.
            0 => DriverEvent::Held {
                stage: 0,
                held: RingHeld {
                    epoch,
                    slots: held(&[], SLOTS),
                    ..RingHeld::default()
                },
            },
            1 => {
                let Ok(step) = sent.try_recv() else { continue };
                let rows: u32 = step.segments.iter().map(|segment| segment.rows).sum();
                DriverEvent::Rows(RingStep {
                    rows: [0; 8].repeat(rows as usize).into(),
                    ..step
                })
            }
            2 => DriverEvent::Held {
                stage: near(a),
                held: RingHeld {
                    epoch: if kind & 8 == 0 { epoch } else { near(b) },
                    slots: held(&bytes, near(b).min(100)),
                    ..RingHeld::default()
                },
            },
            3 => {
                let template = if kind & 8 == 0 {
                    sent.try_recv().ok()
                } else {
                    None
                };
                DriverEvent::Rows(RingStep {
                    epoch: if kind & 16 == 0 { epoch } else { near(a) },
                    step: near(b).into(),
                    rows: bytes.into(),
                    ..template.unwrap_or_default()
                })
            }
            4 => DriverEvent::Outcome {
                stage: near(a),
                outcome: RingOutcome {
                    epoch: if kind & 8 == 0 { epoch } else { near(a) },
                    step: near(b).into(),
                    error: String::from_utf8_lossy(&bytes).into_owned(),
                    ..RingOutcome::default()
                },
            },
            5 => DriverEvent::Pong {
                stage: near(a),
                ping: RingPing {
                    nonce: near(b).into(),
                    received: near(a).into(),
                    ..RingPing::default()
                },
            },
            6 if kind & 8 == 0 => DriverEvent::Standby(held(&bytes, near(a).min(100))),
            6 => DriverEvent::Acknowledged(near(a).into()),
            _ => {
                epoch += 1;
                epoch_begins(epoch)
            }
        };
        let _ = sender.send(event);
        now += Duration::from_millis(u64::from(a % 50));
        while runner.has_room() && scheduler.plan(&mut step, now) {
            runner.begin(&mut step, now);
        }
        for _ in 0..100 {
            let Some(outcome) = runner.poll(now) else {
                break;
            };
            match outcome {
                Outcome::Logits(step, logits) => scheduler.complete(step, logits, now),
                Outcome::Failed(step, error) => scheduler.fail(step, &error),
                Outcome::Resumed(held) => scheduler.resume(&held),
                Outcome::Ended(error) => scheduler.end_all(&error),
            }
        }
        while scheduler.next_event().is_some() {}
    }
});
