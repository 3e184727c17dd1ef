use dcf::Version;
use mesh_proto::{Hello, ModelCard};

use super::release::BUSY_PAUSE;
use super::*;
use crate::fair::Origin;
use crate::length::Length;

const GRACE: Duration = Duration::from_secs(5);

#[test]
fn workers_that_would_ignore_fields_are_not_asked_and_named() {
    let mut placement = placement(4);
    let now = Instant::now();
    let hello = |name: &str, request_revision| {
        let card = ModelCard {
            name: "tiny".into(),
            slots: 4,
            ..Default::default()
        };
        Hello {
            node_name: name.into(),
            models: vec![card],
            request_revision,
            ..Default::default()
        }
    };
    let ask = |revision| Requirements {
        model: "tiny".into(),
        revision,
        ..Requirements::default()
    };
    let address = ([127, 0, 0, 1], 1).into();
    let (old, _) = placement.registry.join("aa", address, hello("old", 0), now);
    placement.registry.prove_all(old, now);
    let asked = placement.ask(Ticket(1), ask(1), false, now);
    let Decision::Refused(refusal @ Refusal::TooOld { .. }) = asked else {
        panic!("{asked:?}");
    };
    assert!(refusal.to_string().contains("min_tokens"), "{refusal}");
    let (new, _) = placement.registry.join("bb", address, hello("new", 1), now);
    placement.registry.prove_all(new, now);
    for ticket in 2..5 {
        match placement.ask(Ticket(ticket), ask(1), false, now) {
            Decision::Placed(placed) => assert_eq!(placed.name, "new"),
            other => panic!("{other:?}"),
        }
    }
}

fn placement(queue: usize) -> Placement {
    let capacity = Capacity { ahead: 0, plain: 4 };
    Placement::new(
        Registry::new(Duration::from_secs(10)),
        Limits {
            queue,
            rejoin_grace: GRACE,
            capacity,
        },
    )
}

fn join(placement: &mut Placement, node: &str, slots: u32, now: Instant) -> WorkerId {
    let card = ModelCard {
        name: "m".into(),
        slots,
        ..Default::default()
    };
    let hello = Hello {
        node_name: node.into(),
        models: vec![card],
        ..Default::default()
    };
    let address = ([127, 0, 0, 1], 1).into();
    let (id, _) = placement.registry.join(node, address, hello, now);
    placement.registry.prove_all(id, now);
    id
}

fn ask() -> Requirements {
    Requirements {
        model: "m".into(),
        prompt_tokens: 10,
        answer_tokens: 10,
        ..Default::default()
    }
}

#[test]
fn one_source_with_many_answers_leaves_slots_to_another_that_asks_now_and_then() {
    let now = Instant::now();
    let mut placement = placement(2048);
    join(&mut placement, "a", 8, now);
    let of = |number| Requirements {
        source: Source {
            ingress: Ingress::Http,
            origin: Origin::Key(number),
        },
        ..ask()
    };
    let placed = |asked| matches!(asked, Decision::Placed(_));
    assert!(placed(placement.ask(Ticket(0), of(2), false, now)));
    placement.release(Ticket(0), AttemptEnd::Complete, now);
    // 80 connections, 16 answers each.
    let greedy = (1..1281).filter(|&t| placed(placement.ask(Ticket(t), of(1), false, now)));
    assert_eq!(greedy.count(), 3);
    assert!(placement.pump(now).is_empty());
    assert!(
        placed(placement.ask(Ticket(9000), of(2), false, now)),
        "at once"
    );
    placement.release(Ticket(9000), AttemptEnd::Complete, now);
    assert!(
        placement.pump(now).is_empty(),
        "it stays free for the next one"
    );
    // Nobody else has asked for long: all of it.
    let later = now + Duration::from_secs(60);
    assert_eq!(placement.pump(later).len(), 5);
}

#[test]
fn only_slots_that_can_be_counted_on_are_shared() {
    let now = Instant::now();
    let mut placement = placement(2048);
    // One worker claims more than it was ever seen to use, another one is drained.
    join(&mut placement, "a", 256, now);
    let drained = join(&mut placement, "b", 256, now);
    let worker = placement.registry.get_mut(drained).unwrap();
    (worker.drained, worker.draining) = (true, true);
    let placed = |asked| matches!(asked, Decision::Placed(_));
    assert!(placed(placement.ask(
        Ticket(0),
        from(Ingress::Http, 2),
        false,
        now
    )));
    placement.release(Ticket(0), AttemptEnd::Complete, now);
    let greedy = (1..100).filter(|&ticket| {
        placed(placement.ask(Ticket(ticket), from(Ingress::Http, 1), false, now))
    });
    assert_eq!(greedy.count(), 3);
}

#[test]
fn a_source_alone_fills_its_worker_ahead_of_a_free_slot() {
    let now = Instant::now();
    let mut placement = placement(16);
    placement.router = Router::new(Capacity { ahead: 1, plain: 4 });
    join(&mut placement, "a", 4, now);
    let placed = |asked| matches!(asked, Decision::Placed(_));
    let all = (1..9).filter(|&ticket| placed(placement.ask(Ticket(ticket), ask(), false, now)));
    assert_eq!(all.count(), 5);
}

#[test]
fn names_of_models_that_nobody_serves_are_not_kept() {
    let now = Instant::now();
    let mut placement = placement(4);
    join(&mut placement, "a", 8, now);
    for number in 0..100 {
        let ask = Requirements {
            model: format!("no such model {number}"),
            ..ask()
        };
        let asked = placement.ask(Ticket(number), ask, false, now);
        assert!(matches!(
            asked,
            Decision::Refused(Refusal::UnknownModel { .. })
        ));
    }
    assert_eq!(placement.shares.models(), 0);
    placement.ask(Ticket(100), ask(), false, now);
    assert_eq!(placement.shares.models(), 1);
    placement.pump(now + Duration::from_secs(60));
    assert_eq!(placement.shares.models(), 0, "though nobody waits");
}

#[test]
fn a_suspect_is_alone_with_a_worker_until_its_first_token() {
    let now = Instant::now();
    let mut placement = placement(8);
    let only = join(&mut placement, "a", 4, now);
    let suspect = || Requirements {
        alone: true,
        ..ask()
    };
    // Another request waits for its first token there.
    assert!(matches!(
        placement.ask(Ticket(1), ask(), false, now),
        Decision::Placed(_)
    ));
    assert_eq!(
        placement.ask(Ticket(2), suspect(), true, now),
        Decision::Waiting
    );
    assert_eq!(
        placement.ask(Ticket(3), suspect(), true, now),
        Decision::Waiting
    );
    // Newcomers do not keep it waiting.
    assert_eq!(
        placement.ask(Ticket(4), ask(), false, now),
        Decision::Waiting
    );
    assert!(placement.pump(now).is_empty());
    let placed = |placement: &mut Placement| -> Vec<u64> {
        let decided = placement.pump(now).into_iter();
        decided
            .map(|(ticket, placed)| placed.map(|_| ticket.0).unwrap())
            .collect()
    };
    placement.first_token(Ticket(1), now);
    assert_eq!(placed(&mut placement), [3], "one of them, alone");
    assert!(placed(&mut placement).is_empty());
    placement.first_token(Ticket(3), now);
    assert_eq!(placed(&mut placement), [4], "now it is the others' turn");
    placement.first_token(Ticket(4), now);
    assert_eq!(placed(&mut placement), [2]);
    // The worker of one that gave up is everybody's again.
    placement.release(Ticket(2), AttemptEnd::Cancelled, now);
    assert!(matches!(
        placement.ask(Ticket(5), ask(), false, now),
        Decision::Placed(_)
    ));
    let worker = placement.registry.get(only).unwrap();
    assert_eq!(
        (worker.unstarted, worker.alone, worker.assigned),
        (1, None, 4)
    );
}

#[test]
fn suspects_keep_others_from_one_worker_only_and_not_for_long() {
    let now = Instant::now();
    let mut placement = placement(64);
    let suspect = || Requirements {
        alone: true,
        ..ask()
    };
    let is_placed = |asked| matches!(asked, Decision::Placed(_));
    let first = join(&mut placement, "a", 32, now);
    // A long prompt is computed there.
    assert!(is_placed(placement.ask(Ticket(1), ask(), false, now)));
    for ticket in 2..11 {
        let asked = placement.ask(Ticket(ticket), suspect(), true, now);
        assert_eq!(asked, Decision::Waiting);
    }
    assert_eq!(
        placement.ask(Ticket(20), ask(), false, now),
        Decision::Waiting
    );
    assert!(placement.pump(now).is_empty());
    // Another worker, where a prompt is computed, too, is for everybody else.
    let second = join(&mut placement, "b", 32, now);
    let decided = placement.pump(now);
    assert_eq!(decided.len(), 2, "a suspect is alone with it: {decided:?}");
    assert!(decided.iter().any(|(ticket, _)| *ticket == Ticket(20)));
    let of = |wanted: u64| {
        let found = decided.iter().find(|(ticket, _)| ticket.0 == wanted);
        found.map(|(_, placed)| placed.as_ref().unwrap().worker)
    };
    assert_eq!((of(10), of(20)), (Some(second), Some(first)));
}

#[test]
fn nine_suspects_on_one_worker_do_not_stop_its_model() {
    let start = Instant::now();
    let mut placement = placement(64);
    let suspect = || Requirements {
        alone: true,
        ..ask()
    };
    join(&mut placement, "a", 8, start);
    placement.ask(Ticket(1), ask(), false, start);
    for ticket in 2..11 {
        placement.ask(Ticket(ticket), suspect(), true, start);
    }
    // Each prompt takes 20 s, and somebody else asks every second.
    let mut begun: BTreeMap<Ticket, Instant> = BTreeMap::from([(Ticket(1), start)]);
    let (mut longest, mut waits) = (Duration::ZERO, BTreeMap::new());
    for second in 0..600 {
        let now = start + Duration::from_secs(second);
        let done: Vec<Ticket> = begun
            .iter()
            .filter(|(_, at)| now.saturating_duration_since(**at).as_secs() >= 20)
            .map(|(ticket, _)| *ticket)
            .collect();
        for ticket in done {
            begun.remove(&ticket);
            placement.first_token(ticket, now);
            placement.release(ticket, AttemptEnd::Complete, now);
        }
        if second % 5 == 0 && second < 300 {
            let ticket = Ticket(1000 + second);
            match placement.ask(ticket, ask(), false, now) {
                Decision::Placed(_) => drop(begun.insert(ticket, now)),
                _ => drop(waits.insert(ticket, now)),
            }
        }
        for (ticket, placed) in placement.pump(now) {
            placed.unwrap();
            begun.insert(ticket, now);
            if let Some(since) = waits.remove(&ticket) {
                longest = longest.max(now - since);
            }
        }
    }
    assert!(longest <= Duration::from_secs(20), "{longest:?}");
    assert_eq!(placement.queued(), 0, "all had their turn");
    assert!(!placement.has_suspects());
}

#[test]
fn a_prompt_that_is_too_long_for_all_is_refused_before_anybody_gets_it() {
    let now = Instant::now();
    let mut placement = placement(8);
    let card = ModelCard {
        name: "m".into(),
        slots: 4,
        context: 8192,
        byte_spans: vec![16; 256],
        keeps_text: true,
        ..Default::default()
    };
    let hello = |card: &ModelCard| Hello {
        models: vec![card.clone()],
        ..Default::default()
    };
    let address = ([127, 0, 0, 1], 1).into();
    placement.registry.join("a", address, hello(&card), now);
    let long = Requirements {
        length: Length::of(&mesh_proto::Prompt::Text("1".repeat(8 << 20))),
        ..ask()
    };
    let refused = Refusal::TooLong {
        context: 8192,
        least: (8 << 20) / 16,
    };
    assert_eq!(
        placement.ask(Ticket(1), long.clone(), false, now),
        Decision::Refused(refused)
    );
    // A worker that cannot tell how long it is may serve it.
    let unknown = ModelCard {
        byte_spans: Vec::new(),
        ..card
    };
    let (b, _) = placement.registry.join("b", address, hello(&unknown), now);
    placement.registry.prove_all(b, now);
    assert!(matches!(
        placement.ask(Ticket(2), long, false, now),
        Decision::Placed(_)
    ));
}

#[test]
fn without_a_worker_a_request_is_refused_and_an_unknown_model_is_named() {
    let now = Instant::now();
    let mut placement = placement(4);
    assert!(matches!(
        placement.ask(Ticket(1), ask(), false, now),
        Decision::Refused(Refusal::NoWorker { .. })
    ));
    join(&mut placement, "w", 1, now);
    let unknown = Requirements {
        model: "gpt-9".into(),
        ..ask()
    };
    let refused = placement.ask(Ticket(2), unknown, false, now);
    assert_eq!(
        refused,
        Decision::Refused(Refusal::UnknownModel {
            model: "gpt-9".into()
        })
    );
}

#[test]
fn the_queue_is_first_come_first_served_and_bounded() {
    let now = Instant::now();
    let mut placement = placement(2);
    join(&mut placement, "w", 1, now);
    assert!(matches!(
        placement.ask(Ticket(1), ask(), false, now),
        Decision::Placed(_)
    ));
    assert_eq!(
        placement.ask(Ticket(2), ask(), false, now),
        Decision::Waiting
    );
    assert_eq!(
        placement.ask(Ticket(3), ask(), false, now),
        Decision::Waiting
    );
    let Decision::Refused(refusal) = placement.ask(Ticket(4), ask(), false, now) else {
        panic!("it waits");
    };
    assert_eq!(
        refusal.to_string(),
        "all workers are busy and 2 requests of this source wait already: that is its share of the 2 places in the queue among \
         1 source; wait for one of them to end, or add workers"
    );
    assert!(placement.pump(now).is_empty());
    placement.release(Ticket(1), AttemptEnd::Complete, now);
    let decided = placement.pump(now);
    assert_eq!(decided.len(), 1);
    assert_eq!(decided[0].0, Ticket(2));
}

#[test]
fn complete_answers_shorten_the_pauses_of_a_worker_without_an_identity() {
    let now = Instant::now();
    let mut placement = placement(4);
    let address = ([127, 0, 0, 1], 4000).into();
    let heartbeat = placement
        .registry
        .plain_heartbeat(address, Version::V5_1, now);
    let (worker, _) = heartbeat.unwrap();
    let key = placement.registry.get(worker).unwrap().key();
    let first = placement.at_fault(&key, "", now, now);
    assert_eq!(first, Some(Duration::ZERO));
    let plain = Requirements {
        plain: true,
        ..ask()
    };
    let asked = placement.ask(Ticket(1), plain, false, now);
    assert!(matches!(asked, Decision::Placed(_)), "{asked:?}");
    placement.release(Ticket(1), AttemptEnd::Complete, now);
    let later = now + Duration::from_secs(1);
    let next = placement.at_fault(&key, "", later, later);
    assert_eq!(next, Some(Duration::ZERO), "the first fault is made good");
}

#[test]
fn a_rerun_goes_before_those_who_wait() {
    let now = Instant::now();
    let mut placement = placement(1);
    let worker = join(&mut placement, "w", 1, now);
    placement.ask(Ticket(1), ask(), false, now);
    placement.ask(Ticket(2), ask(), false, now);
    assert_eq!(
        placement.ask(Ticket(3), ask(), true, now),
        Decision::Waiting
    );
    placement.release(Ticket(1), AttemptEnd::Failed, now);
    assert!(
        placement.pump(now).is_empty(),
        "it has to prove itself first"
    );
    placement.registry.prove_all(worker, now);
    assert_eq!(placement.pump(now)[0].0, Ticket(3));
}

#[test]
fn a_rerun_outlasts_the_grace_when_a_worker_rejoins_and_fails_when_none_does() {
    let start = Instant::now();
    let mut placement = placement(1);
    placement
        .registry
        .report(WorkerId(1), Default::default(), start);
    assert_eq!(
        placement.ask(Ticket(1), ask(), true, start),
        Decision::Waiting
    );
    assert!(placement.pump(start + GRACE / 2).is_empty());
    let decided = placement.pump(start + GRACE);
    assert!(matches!(
        decided[..],
        [(Ticket(1), Err(Refusal::NoWorker { .. }))]
    ));

    assert_eq!(
        placement.ask(Ticket(2), ask(), true, start),
        Decision::Waiting
    );
    join(&mut placement, "w", 1, start);
    assert!(matches!(
        placement.pump(start + GRACE)[..],
        [(Ticket(2), Ok(_))]
    ));
}

#[test]
fn waiting_requests_whose_workers_all_left_get_the_grace_too() {
    let start = Instant::now();
    let mut placement = placement(4);
    let worker = join(&mut placement, "w", 1, start);
    placement.ask(Ticket(1), ask(), false, start);
    placement.ask(Ticket(2), ask(), false, start);
    placement.leave(worker, start);
    placement.release(Ticket(1), AttemptEnd::Failed, start);
    assert!(placement.pump(start).is_empty());
    assert_eq!(placement.pump(start + GRACE).len(), 1);
    assert_eq!(placement.queued(), 0);
}

#[test]
fn requests_wait_for_a_ring_that_is_being_formed_and_hear_why_there_is_none() {
    let start = Instant::now();
    let mut placement = placement(2);
    let prospect = |prospect| BTreeMap::from([("m".to_owned(), prospect)]);
    placement.set_prospects(prospect(Prospect::Coming));
    assert_eq!(
        placement.ask(Ticket(1), ask(), false, start),
        Decision::Waiting
    );
    assert_eq!(
        placement.ask(Ticket(2), ask(), true, start),
        Decision::Waiting
    );
    assert!(matches!(
        placement.ask(Ticket(3), ask(), false, start),
        Decision::Refused(Refusal::QueueFull { limit: 2, .. })
    ));
    assert!(
        placement.pump(start + 10 * GRACE).is_empty(),
        "only their own deadlines end the wait"
    );
    placement.set_prospects(prospect(Prospect::Impossible("a node is missing".into())));
    let late = start + 10 * GRACE;
    assert!(
        placement.pump(late).is_empty(),
        "from now on the grace counts"
    );
    let decided = placement.pump(late + GRACE);
    assert_eq!(decided.len(), 2);
    let refused = |refusal: &Refusal| refusal.to_string().contains("a node is missing");
    assert!(
        decided
            .iter()
            .all(|(_, decided)| decided.as_ref().is_err_and(refused))
    );
    assert!(matches!(
        placement.ask(Ticket(4), ask(), false, late),
        Decision::Refused(Refusal::NoRing { .. })
    ));
}

#[test]
fn the_driver_of_a_ring_is_asked_until_the_ring_has_moved() {
    let now = Instant::now();
    let mut placement = placement(4);
    let worker = join(&mut placement, "w", 1, now);
    placement.registry.get_mut(worker).unwrap().models.clear();
    let card = ModelCard {
        name: "m".into(),
        slots: 4,
        ..Default::default()
    };
    placement.registry.serve(worker, 7, card, now);
    placement.registry.prove_all(worker, now);
    placement.registry.get_mut(worker).unwrap().draining = true;
    let Decision::Placed(placed) = placement.ask(Ticket(1), ask(), false, now) else {
        panic!("refused");
    };
    assert_eq!(
        (
            placed.ring,
            placement.running_on(7),
            placement.running_on(8)
        ),
        (Some(7), 1, 0)
    );
    placement.registry.withdraw(worker, 7, now);
    assert!(matches!(
        placement.ask(Ticket(2), ask(), false, now),
        Decision::Refused(_)
    ));
    placement.release(Ticket(1), AttemptEnd::Complete, now);
    assert_eq!(placement.running_on(7), 0);
}

#[test]
fn counts_return_to_zero_whatever_the_end() {
    let now = Instant::now();
    let mut placement = placement(4);
    let worker = join(&mut placement, "w", 8, now);
    for (index, ended) in [
        AttemptEnd::Complete,
        AttemptEnd::Failed,
        AttemptEnd::Busy,
        AttemptEnd::Cancelled,
    ]
    .into_iter()
    .enumerate()
    {
        let later = now + Duration::from_secs(index as u64);
        assert!(matches!(
            placement.ask(Ticket(index as u64), ask(), false, later),
            Decision::Placed(_)
        ));
        if index % 2 == 0 {
            placement.first_token(Ticket(index as u64), later);
        }
        placement.release(Ticket(index as u64), ended, later);
        placement.release(Ticket(index as u64), ended, later);
        placement.registry.prove_all(worker, later);
    }
    let worker = placement.registry.get(worker).unwrap();
    assert_eq!((worker.assigned, worker.prefilling), (0, 0));
    assert_eq!((worker.completed, worker.failed), (1, 1));
    assert_eq!(placement.running(), 0);
}

#[test]
fn a_worker_that_said_busy_is_left_alone_for_a_moment() {
    let now = Instant::now();
    let mut placement = placement(4);
    join(&mut placement, "w", 8, now);
    placement.ask(Ticket(1), ask(), false, now);
    placement.release(Ticket(1), AttemptEnd::Busy, now);
    assert_eq!(
        placement.ask(Ticket(2), ask(), false, now),
        Decision::Waiting
    );
    assert_eq!(placement.pump(now + BUSY_PAUSE).len(), 1);
}

fn unproven(placement: &mut Placement, node: &str, now: Instant) -> WorkerId {
    let card = ModelCard {
        name: "m".into(),
        slots: 4,
        decode_tps: 1e6,
        ..Default::default()
    };
    let hello = Hello {
        node_name: node.into(),
        models: vec![card],
        ..Default::default()
    };
    let address = ([127, 0, 0, 1], 1).into();
    placement.registry.join(node, address, hello, now).0
}

#[test]
fn requests_wait_for_a_newcomers_first_answer_and_not_for_one_that_gives_none() {
    let start = Instant::now();
    let mut placement = placement(4);
    let mute = unproven(&mut placement, "mute", start);
    assert_eq!(
        placement.ask(Ticket(1), ask(), false, start),
        Decision::Waiting
    );
    assert!(placement.pump(start).is_empty());
    let [proof] = &placement
        .registry
        .proofs_due(mute, &Default::default(), 1, start)[..]
    else {
        panic!("it is not asked");
    };
    let late = start + Duration::from_secs(30);
    placement.registry.proved(mute, proof, None, start, 2, late);
    let asked = placement.ask(Ticket(2), ask(), false, late);
    let Decision::Refused(refusal @ Refusal::NoneAnswers { .. }) = asked else {
        panic!("{asked:?}");
    };
    assert!(
        refusal.to_string().contains("`mute`: it does not answer"),
        "{refusal}"
    );
    // The worker that answers gets all requests, whatever the other claims.
    let good = join(&mut placement, "good", 8, late);
    let decided = placement.pump(late);
    assert!(matches!(&decided[..], [(Ticket(1), Ok(placed))] if placed.worker == good));
    for ticket in 3..8 {
        match placement.ask(Ticket(ticket), ask(), false, late) {
            Decision::Placed(placed) => assert_eq!(placed.worker, good),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn one_that_does_not_answer_is_asked_less_and_less_often() {
    let start = Instant::now();
    let mut placement = placement(4);
    let mute = unproven(&mut placement, "mute", start);
    let mut asked = Vec::new();
    for second in 0..300 {
        let now = start + Duration::from_secs(second);
        let due = placement
            .registry
            .proofs_due(mute, &Default::default(), second, now);
        for proof in due {
            asked.push(second);
            placement
                .registry
                .proved(mute, &proof, None, now, second, now);
        }
    }
    assert_eq!(asked[..6], [0, 1, 3, 7, 15, 31]);
    assert!(asked.len() <= 15, "{asked:?}");
}

#[test]
fn slots_are_believed_as_they_are_seen_in_use() {
    let now = Instant::now();
    let mut placement = placement(400);
    let id = join(&mut placement, "w", u32::MAX, now);
    let placed = |placement: &Placement| placement.registry.get(id).unwrap().assigned;
    for ticket in 0..300 {
        placement.ask(Ticket(ticket), ask(), false, now);
    }
    assert_eq!(placed(&placement), 8, "as many as anybody might have");
    for expected in [16, 32, 64, 128, 256, 256] {
        for ticket in 0..u64::from(placed(&placement)) {
            placement.first_token(Ticket(ticket), now);
        }
        placement.pump(now);
        assert_eq!(placed(&placement), expected);
    }
}

#[test]
fn speed_is_what_came_in_what_time() {
    let start = Instant::now();
    let mut placement = placement(4);
    let id = join(&mut placement, "w", 4, start);
    let long = Requirements {
        prompt_tokens: 400,
        ..ask()
    };
    placement.ask(Ticket(1), long, false, start);
    let first = start + Duration::from_secs(2);
    placement.first_token(Ticket(1), first);
    let received = ReceivedTokens {
        tokens: 50,
        last: Some(first + Duration::from_secs(5)),
    };
    let end = first + Duration::from_secs(60);
    placement.release_after(Ticket(1), AttemptEnd::Complete, received, end);
    let model = &placement.registry.get(id).unwrap().models[0];
    assert!((model.decode_tps - 10.0).abs() < 0.01, "{model:?}");
    assert!((model.prefill_tps - 200.0).abs() < 0.01, "{model:?}");
    // From then on the worker's own word is nothing.
    let speeds = vec![mesh_proto::ModelSpeed {
        name: "m".into(),
        decode_tps: 1e6,
        prefill_tps: 1e6,
        queued: None,
    }];
    let load = mesh_proto::Load {
        speeds,
        ..Default::default()
    };
    placement.registry.report(id, load, end);
    let model = &placement.registry.get(id).unwrap().models[0];
    assert!(model.decode_tps < 11.0 && model.prefill_tps < 201.0);
}

fn from(ingress: Ingress, last: u8) -> Requirements {
    let origin = Origin::of([10, 0, 0, last].into());
    Requirements {
        source: Source { ingress, origin },
        ..ask()
    }
}

#[test]
fn a_flood_of_datagrams_delays_a_chat_by_what_runs_already_and_no_more() {
    let now = Instant::now();
    let mut placement = placement(1024);
    join(&mut placement, "w", 8, now);
    for number in 0..1024 {
        placement.ask(Ticket(number), from(Ingress::Dcf, 1), false, now);
    }
    assert_eq!(placement.of_ingress(Ingress::Dcf), (1016, 8));
    let chat = Ticket(5000);
    assert_eq!(
        placement.ask(chat, from(Ingress::Http, 2), false, now),
        Decision::Waiting
    );
    placement.release(Ticket(0), AttemptEnd::Complete, now);
    let decided = placement.pump(now);
    assert!(
        matches!(&decided[..], [(ticket, Ok(_))] if *ticket == chat),
        "{decided:?}"
    );
    assert_eq!(placement.of_ingress(Ingress::Http), (0, 1));
}

#[test]
fn a_newcomer_finds_room_in_a_full_queue_and_the_one_displaced_hears_so() {
    let now = Instant::now();
    let mut placement = placement(3);
    join(&mut placement, "w", 1, now);
    for number in 0..4 {
        placement.ask(Ticket(number), from(Ingress::Dcf, 1), false, now);
    }
    assert!(matches!(
        placement.ask(Ticket(4), from(Ingress::Dcf, 1), false, now),
        Decision::Refused(Refusal::QueueFull { yours: 3, .. })
    ));
    assert_eq!(
        placement.ask(Ticket(5), from(Ingress::Http, 2), false, now),
        Decision::Waiting
    );
    assert!(placement.has_displaced());
    let decided = placement.pump(now);
    let [(Ticket(3), Err(refusal))] = &decided[..] else {
        panic!("{decided:?}");
    };
    assert!(refusal.to_string().contains("10.0.0.1"), "{refusal}");
    assert_eq!(placement.queued(), 3);
}

#[test]
fn a_model_without_room_does_not_hold_up_another() {
    let now = Instant::now();
    let mut placement = placement(10);
    join(&mut placement, "w", 1, now);
    let other = join(&mut placement, "x", 1, now);
    let worker = placement.registry.get_mut(other).unwrap();
    worker.models[0].card.name = "n".into();
    let n = || Requirements {
        model: "n".into(),
        ..ask()
    };
    placement.ask(Ticket(1), ask(), false, now);
    placement.ask(Ticket(2), n(), false, now);
    placement.ask(Ticket(3), ask(), false, now);
    placement.ask(Ticket(4), n(), false, now);
    placement.release(Ticket(2), AttemptEnd::Complete, now);
    assert_eq!(placement.pump(now)[0].0, Ticket(4));
    placement.release(Ticket(1), AttemptEnd::Complete, now);
    assert_eq!(placement.pump(now)[0].0, Ticket(3));
}

#[test]
fn the_first_token_is_a_proof_and_one_failure_beside_a_stream_is_no_disproof() {
    let now = Instant::now();
    let mut placement = placement(4);
    let id = join(&mut placement, "w", 8, now);
    let answers =
        |placement: &Placement, now| placement.registry.get(id).unwrap().models[0].answers(now);
    placement.ask(Ticket(1), ask(), false, now);
    placement.ask(Ticket(2), ask(), false, now);
    placement.registry.get_mut(id).unwrap().models[0].failed(now);
    assert!(!answers(&placement, now));
    placement.first_token(Ticket(1), now);
    assert!(answers(&placement, now));
    placement.release(Ticket(2), AttemptEnd::Failed, now);
    assert!(answers(&placement, now), "the other one streams");
    placement.release(Ticket(1), AttemptEnd::Failed, now);
    assert!(!answers(&placement, now));
    // Signs of life prove nothing after a failure, but they do before one.
    let worker = placement.registry.get_mut(id).unwrap();
    worker.gave_sign("m", now);
    assert!(!answers(&placement, now));
    let card = ModelCard {
        name: "m".into(),
        ..Default::default()
    };
    let hello = Hello {
        models: vec![card],
        ..Default::default()
    };
    let address = ([127, 0, 0, 1], 1).into();
    let (fresh, _) = placement.registry.join("x", address, hello, now);
    let worker = placement.registry.get_mut(fresh).unwrap();
    worker.gave_sign("m", now);
    let model = &worker.models[0];
    assert!(model.answers(now) && !model.answers(now + Duration::from_secs(60)));
}

#[test]
fn a_worker_where_requests_wait_for_memory_gets_no_more_of_them() {
    let start = Instant::now();
    let mut placement = placement(4);
    let id = join(&mut placement, "w", 8, start);
    let load = |queued| mesh_proto::Load {
        running: 2,
        queued,
        ..Default::default()
    };
    placement.registry.report(id, load(3), start);
    let later = start + Duration::from_secs(1);
    placement.registry.report(id, load(3), later);
    assert_eq!(
        placement.ask(Ticket(1), ask(), false, later),
        Decision::Waiting
    );
    let busy = |placement: &Placement, now| {
        let worker = placement.registry.get(id).unwrap();
        worker.is_busy(GRACE, GRACE * 2, now)
    };
    assert!(!busy(&placement, later), "no token bears its words out");
    placement.registry.get(id).unwrap().tokens_seen.note(later);
    assert!(busy(&placement, later));
    assert!(!busy(&placement, later + GRACE));
    placement.registry.report(id, load(0), later);
    assert_eq!(placement.pump(later).len(), 1);
}
