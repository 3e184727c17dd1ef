//! Whole rings in simulated time, with faults.

mod toy;
mod world;

use mesh_engine::scheduler::{Scheduler, SchedulerConfig, Step};
use mesh_engine::{Event, Request, Schedule, Stage, StageInput, StageOutput, apply};
use mesh_proto::{RingMirror, RingMirrored, RingResend, RingSegment, RingSlotOp, RingStep};
use proptest::prelude::*;

use self::toy::{LAYERS, Letters};
use self::world::{Dice, World};
use crate::StageReplica;

fn request(seed: u64) -> Request {
    let mut dice = Dice::new(seed + 77);
    let prompt: Vec<u32> = (0..1 + dice.below(60))
        .map(|_| dice.below(40) as u32)
        .collect();
    let id = format!("request {seed}");
    seeded(
        Request::greedy(id, prompt, 10 + dice.below(60) as u32),
        seed,
    )
}

fn seeded(mut request: Request, seed: u64) -> Request {
    request.params.temperature = 0.8;
    request.params.seed = seed;
    request.ignore_eos = true;
    request
}

/// The answer of one worker with the whole model.
fn expected(request: &Request) -> Vec<u32> {
    let mut stage = toy::stage(0..LAYERS);
    let info = stage.info().clone();
    let config = SchedulerConfig::default();
    let mut scheduler = Scheduler::new(&info, std::sync::Arc::new(Letters), config);
    let now = std::time::Instant::now();
    scheduler.submit(0, request.clone().into(), now);
    let (mut step, mut tokens) = (Step::default(), Vec::new());
    while scheduler.plan(&mut step, now) {
        apply(&step.slot_ops, &mut stage).unwrap();
        let output = stage.forward(&step.segments, StageInput::Tokens(&step.tokens));
        let StageOutput::Logits(logits) = output.unwrap() else {
            panic!("not logits")
        };
        let logits = logits.to_vec();
        scheduler.complete(&step, &logits, now);
    }
    while let Some((_, event)) = scheduler.next_event() {
        match event {
            Event::Tokens(new) => tokens.extend(new.tokens),
            Event::Done(_) => {}
            other => panic!("{other:?}"),
        }
    }
    tokens
}

fn finish(world: &mut World) {
    let mut last = Vec::new();
    for _ in 0..2000 {
        if world.all_done() {
            return;
        }
        world.run(world.now + 100_000);
        let tokens = world.answers.iter().map(|answer| answer.tokens.len());
        let tokens: Vec<usize> = tokens.collect();
        if tokens == last {
            world.nothing_goes_on();
        }
        last = tokens;
    }
    panic!("it does not end\n{}", world.describe());
}

fn check(world: &World) {
    for answer in &world.answers {
        let request = &answer.request;
        assert_eq!(answer.failed, None);
        assert_eq!(answer.tokens, expected(request), "{}", request.id);
    }
}

#[test]
fn a_ring_answers_as_one_worker_does() {
    for splits in [
        &[6][..],
        &[3, 6],
        &[1, 2, 6],
        &[1, 3, 4, 6],
        &[1, 2, 3, 4, 6],
    ] {
        for standbys in [false, true] {
            let mut world = World::new(1, splits, 10, standbys);
            for seed in 0..7 {
                world.submit(request(seed));
            }
            finish(&mut world);
            check(&world);
        }
    }
}

#[test]
fn requests_that_outgrow_the_memory_of_a_ring_take_turns_and_losses_change_nothing() {
    for standbys in [false, true] {
        for at in [0, 7_000, 19_000, 31_000] {
            let mut world = World::new(at + 3, &[2, 4, 6], 7, standbys);
            world.kv_tokens = Some(u64::from(toy::CONTEXT) + 20);
            for seed in 0..4 {
                let request = Request::greedy("long".to_owned(), vec![seed as u32; 10], 100);
                world.submit(seeded(request, seed));
            }
            if at > 0 {
                world.run(at);
                let node = world.members()[(at % 3) as usize];
                world.kill(node);
            }
            finish(&mut world);
            check(&world);
            assert!(world.preempted() > 0, "memory did not run out");
        }
    }
}

/// Rows that other stages hold are not computed again, whichever stage is lost.
#[test]
fn a_replay_goes_no_further_than_the_stage_that_needs_it() {
    for victim in 0..2 {
        let mut world = World::new(5, &[2, 4, 6], 4, false);
        let mut request = Request::greedy("long".to_owned(), vec![7; 60], 60);
        request.ignore_eos = true;
        world.submit(request);
        while world.answers[0].tokens.len() < 40 {
            world.run(world.now + 1_000);
        }
        let [lost, other] = [victim, 1 - victim].map(|stage| world.members()[stage]);
        world.kill(lost);
        finish(&mut world);
        check(&world);
        assert_eq!(world.members()[1 - victim], other);
        // Its own 120, and the rows computed again together with the next step.
        let rows = world.rows(other);
        assert!(
            (119..160).contains(&rows),
            "stage {victim} lost: {rows} rows"
        );
    }
}

#[test]
fn any_single_loss_at_any_time_is_survived() {
    for standbys in [false, true] {
        for victim in 0..3 {
            for at in (0..60_000).step_by(1500) {
                let mut world = World::new(at, &[2, 4, 6], 7, standbys);
                world.submit(request(3));
                world.submit(request(4));
                world.run(at);
                let node = world.members()[victim];
                if at % 1000 == 0 {
                    world.kill(node);
                } else {
                    world.stop(node);
                }
                finish(&mut world);
                check(&world);
            }
        }
    }
}

#[test]
fn neighbours_a_stage_with_its_standby_and_a_standby_under_promotion_may_be_lost_together() {
    for at in (500..40_000).step_by(1300) {
        for case in 0..4 {
            let mut world = World::new(at, &[2, 4, 6], 12, true);
            for seed in 0..3 {
                world.submit(request(seed));
            }
            world.run(at);
            let (members, standbys) = (world.members().to_vec(), world.standbys());
            let (first, pause, second) = match case {
                0 => (members[0], 0, members[1]),
                1 => (members[1], 0, members[2]),
                2 => (members[1], 0, standbys[1]),
                _ => (members[2], 700, standbys[2]),
            };
            world.kill(first);
            if pause > 0 {
                world.run(at + pause);
            }
            world.kill(second);
            finish(&mut world);
            check(&world);
        }
    }
}

#[test]
fn without_room_every_request_ends_with_a_clear_error() {
    let mut world = World::new(5, &[2, 4, 6], 3, false);
    world.submit(request(1));
    world.run(3000);
    world.kill(1);
    finish(&mut world);
    assert!(world.answers[0].failed.is_some());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn any_series_of_losses_that_leaves_enough_workers_is_survived(
        seed in 0u64..1_000_000,
        split in 0usize..4,
        standbys in any::<bool>(),
        kv_tokens in prop::option::weighted(0.3, 160u64..400),
        faults in prop::collection::vec((0u64..20_000, 0usize..20, any::<bool>(), any::<bool>()), 0..8),
    ) {
        let splits = [&[3, 6][..], &[2, 4, 6], &[1, 5, 6], &[1, 2, 4, 6]][split];
        let mut world = World::new(seed, splits, 2 * splits.len() + 3, standbys);
        world.kv_tokens = kv_tokens;
        for i in 0..1 + seed % 6 {
            world.submit(request(seed + i));
        }
        for (pause, who, stops, revives) in faults {
            world.run(world.now + pause);
            if revives {
                world.revive();
            }
            let mut targets = world.members().to_vec();
            targets.extend(world.standbys());
            if world.workers_alive() <= splits.len() + 1 {
                continue;
            }
            let target = targets[who % targets.len()];
            if stops {
                world.stop(target);
            } else {
                world.kill(target);
            }
        }
        finish(&mut world);
        check(&world);
    }
}

/// Mostly invalid messages, with numbers near the valid ones.
fn any_message() -> impl Strategy<Value = Nonsense> {
    let number = prop_oneof![0u32..24, Just(u32::MAX), Just(toy::CONTEXT)];
    let op = (
        0u32..6,
        number.clone(),
        prop_oneof![0u32..6, Just(u32::MAX)],
    );
    let op = op.prop_map(|(slot, len, from_plus_one)| RingSlotOp {
        slot,
        len,
        from_plus_one,
    });
    let segment = (0u32..6, number.clone(), number.clone());
    let segment = segment.prop_map(|(slot, position, rows)| RingSegment {
        slot,
        position,
        rows,
    });
    let step = (
        0u64..100,
        prop::collection::vec(op.clone(), 0..3),
        prop::collection::vec(segment, 0..3),
        prop::collection::vec(0u32..40, 0..24),
        0usize..200,
        0u32..3,
    );
    let step = step.prop_map(|(step, slot_ops, segments, tokens, bytes, through)| {
        Nonsense::Step(RingStep {
            epoch: 1,
            step,
            slot_ops,
            segments,
            tokens,
            rows: vec![0u8; bytes].into(),
            through,
        })
    });
    let mirror = (
        prop::option::of(op),
        0u32..6,
        number.clone(),
        prop::collection::vec(0u32..40, 0..24),
        0usize..800,
    );
    let mirror = mirror.prop_map(|(slot_op, slot, position, tokens, bytes)| {
        Nonsense::Mirror(RingMirror {
            count: 1,
            slot_op,
            slot,
            position,
            tokens,
            rows: vec![0u8; bytes].into(),
        })
    });
    let resend = (0u32..6, number.clone(), number.clone(), number.clone());
    let resend = resend.prop_map(|(slot, from, to, chunk)| {
        Nonsense::Resend(RingResend {
            epoch: 1,
            step: 7,
            slot,
            from,
            to,
            chunk,
            through: 2,
        })
    });
    let mirrored = (any::<u64>(), 0u32..6, number)
        .prop_map(|(count, slot, len)| Nonsense::Mirrored(RingMirrored { count, slot, len }));
    prop_oneof![4 => step, 2 => mirror, 1 => resend, 1 => mirrored]
}

#[derive(Debug, Clone)]
enum Nonsense {
    Step(RingStep),
    Mirror(RingMirror),
    Resend(RingResend),
    Mirrored(RingMirrored),
}

proptest! {
    #[test]
    fn no_message_of_another_node_panics_a_part(
        first in any::<bool>(),
        messages in prop::collection::vec(any_message(), 1..40),
    ) {
        let layers = if first { 0..2 } else { 2..4 };
        let mut replica = StageReplica::new(Box::new(toy::stage(layers)), 1000);
        replica.begin_epoch(1, u32::from(!first), false);
        let mut out = Vec::new();
        replica.replicate_to(&[], &mut out);
        for message in messages {
            match message {
                Nonsense::Step(step) => replica.step(step, &mut out),
                Nonsense::Mirror(mirror) => drop(replica.apply_replicated(&mirror)),
                Nonsense::Resend(resend) => replica.resend(&resend, &mut out),
                Nonsense::Mirrored(mirrored) => {
                    replica.acknowledged(mirrored.count, &mut out);
                    replica.next_acknowledged(&mirrored);
                }
            }
            for slot in replica.held().slots {
                prop_assert!(slot.tokens.len() <= toy::CONTEXT as usize);
            }
        }
    }
}
