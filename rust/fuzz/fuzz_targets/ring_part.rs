//! Whatever the other members of a ring send to a part: it computes it or refuses it, holds no more rows than its context has, and goes on.
#![no_main]

#[path = "../../crates/engine/mesh-pipeline/src/simulation/toy.rs"]
#[allow(dead_code, unused_imports)]
mod toy;

use libfuzzer_sys::fuzz_target;
use mesh_engine::Stage;
use mesh_pipeline::{Out, StageReplica};
use mesh_proto::{
    HeldSlot, RingMirror, RingMirrored, RingResend, RingSegment, RingSlotOp, RingStep,
};
use toy::{CONTEXT, SLOTS, stage};

/// Kind, three numbers and bytes.
type Op = (u8, u32, u32, u32, Vec<u8>);

/// Numbers that mean something here, and any other now and then.
fn near(number: u32) -> u32 {
    match number % 8 {
        0 => number,
        1 => (number >> 3) % (2 * CONTEXT),
        _ => (number >> 3) % (SLOTS + 2),
    }
}

fn tokens(bytes: &[u8]) -> Vec<u32> {
    bytes.iter().map(|&byte| u32::from(byte) % 40).collect()
}

fn slot_op(a: u32, b: u32, c: u32) -> RingSlotOp {
    RingSlotOp {
        slot: near(a),
        len: near(b),
        from_plus_one: near(c),
    }
}

fuzz_target!(|data: (bool, Vec<Op>)| {
    let (first, ops) = data;
    let layers = if first { 0..2 } else { 2..4 };
    let mut part = StageReplica::new(Box::new(stage(layers)) as Box<dyn Stage>, 4096);
    part.begin_epoch(1, u32::from(!first), false);
    let (mut out, mut number): (Vec<Out>, u64) = (Vec::new(), 0);
    for (kind, a, b, c, bytes) in ops.into_iter().take(200) {
        match kind % 8 {
            0..=2 => {
                let rows = bytes.len() as u32;
                let step = RingStep {
                    epoch: if kind & 64 == 0 {
                        part.epoch()
                    } else {
                        near(a)
                    },
                    step: number,
                    segments: vec![RingSegment {
                        slot: near(a),
                        position: near(b),
                        rows: if kind & 32 == 0 { rows } else { near(c) },
                    }],
                    tokens: tokens(&bytes),
                    rows: if first {
                        Vec::new()
                    } else {
                        [0; 8].repeat(bytes.len())
                    }
                    .into(),
                    ..RingStep::default()
                };
                number += 1;
                part.step(step, &mut out);
            }
            3 => {
                let step = RingStep {
                    epoch: part.epoch(),
                    step: number,
                    slot_ops: vec![slot_op(a, b, c)],
                    ..RingStep::default()
                };
                number += 1;
                part.step(step, &mut out);
            }
            4 => {
                let mirror = RingMirror {
                    count: c.into(),
                    slot_op: (kind & 8 == 0).then(|| slot_op(a, b, c)),
                    slot: near(a),
                    position: near(b),
                    tokens: tokens(&bytes),
                    rows: if kind & 16 == 0 {
                        bytes.repeat(16)
                    } else {
                        bytes.clone()
                    }
                    .into(),
                    ..RingMirror::default()
                };
                let _ = part.apply_replicated(&mirror);
            }
            5 => {
                let held = HeldSlot {
                    tokens: tokens(&bytes),
                    ..HeldSlot::default()
                };
                part.replicate_to(&vec![held; near(a).min(100) as usize], &mut out);
            }
            6 => {
                part.acknowledged(near(a).into(), &mut out);
                part.next_acknowledged(&RingMirrored {
                    slot: near(a),
                    len: near(b),
                    count: near(c).into(),
                });
            }
            _ => {
                let resend = RingResend {
                    slot: near(a),
                    ..RingResend::default()
                };
                part.resend(&resend, &mut out);
                part.begin_epoch(near(b), near(c), kind & 8 == 0);
                number = 0;
            }
        }
        assert!(out.len() < 100_000);
        out.clear();
        assert!(part.replay_bytes() <= 4096 + 4096);
        for slot in &part.held().slots {
            assert!(slot.tokens.len() <= CONTEXT as usize);
        }
    }
});
