//! Tasks, their answers, and the table that joins them.

use super::*;

#[test]
fn two_clients_with_the_same_sequence_get_their_own_answers() {
    let mut world = World::new(two_heads());
    let of_alice = world.task(ALICE, 7, "a?");
    let of_bob = world.task(BOB, 7, "b?");
    assert_ne!(of_alice.sequence, of_bob.sequence);
    assert_eq!(
        (&of_alice.payload[..], of_alice.timestamp_us),
        (&b"a?"[..], 99)
    );
    let (to, answer) = world.head(0, &answer_to(&of_bob, "b!")).unwrap();
    assert_eq!(
        (to.as_str(), answer),
        (BOB, message(MsgType::RESULT, 7, "b!"))
    );
    let (to, answer) = world.head(0, &answer_to(&of_alice, "a!")).unwrap();
    assert_eq!(
        (to.as_str(), answer),
        (ALICE, message(MsgType::RESULT, 7, "a!"))
    );
    assert_eq!(world.stats().traffic.answers.get(), 2);
}

#[test]
fn a_repeated_task_keeps_its_sequence_before_and_after_the_answer() {
    let mut world = World::new(two_heads());
    let first = world.task(ALICE, 7, "q");
    assert_eq!(world.task(ALICE, 7, "q"), first);
    assert!(world.head(0, &answer_to(&first, "a")).is_some());
    assert_eq!(
        world.head(0, &answer_to(&first, "a")),
        None,
        "one answer is enough"
    );
    assert_eq!(world.stats().drops.duplicate_answer.get(), 1);
    assert_eq!(world.task(ALICE, 7, "q"), first);
    assert!(
        world.head(0, &answer_to(&first, "a")).is_some(),
        "who asks again is answered again"
    );
    assert_eq!(
        (
            world.stats().traffic.tasks.get(),
            world.stats().traffic.repeats.get()
        ),
        (1, 2)
    );
}

#[test]
fn an_answered_task_is_forgotten_in_time() {
    let mut world = World::new(two_heads());
    let first = world.task(ALICE, 7, "q");
    world.head(0, &answer_to(&first, "a")).unwrap();
    world.at(60_000);
    world.transmits();
    assert_eq!(world.head(0, &answer_to(&first, "a")), None);
    assert_eq!(world.stats().drops.stale_answer.get(), 1);
    assert_ne!(world.task(ALICE, 7, "q").sequence, first.sequence);
}

#[test]
fn partials_chunks_and_acks_find_their_way_both_ways() {
    let mut world = World::new(two_heads());
    let task = world.task(ALICE, 7, "q");
    for kind in [
        MsgType::ACK,
        MsgType::PARTIAL,
        MsgType::CHUNK_ACK,
        MsgType::NACK,
    ] {
        let (to, delivered) = world
            .head(0, &message(kind, task.sequence, "....x"))
            .unwrap();
        assert_eq!((to.as_str(), delivered), (ALICE, message(kind, 7, "....x")));
        if kind != MsgType::PARTIAL {
            let sent = world.client(ALICE, &message(kind, 7, "y"));
            assert_eq!(sent, Sent::ToHead(0, message(kind, task.sequence, "y")));
            assert_eq!(world.client(BOB, &message(kind, 7, "y")), Sent::Nothing);
        }
    }
    assert_eq!(world.stats().drops.no_task.get(), 3);
    let chunks: Vec<Message> = chunk::split(task.sequence, 99, vec![5; 4_000].into())
        .unwrap()
        .collect();
    // The last one overtakes another.
    for at in [0, 2, 1] {
        assert!(world.head(0, &chunks[at]).is_some(), "chunk {at}");
    }
    assert_eq!(world.bridge.open_tasks(), 0);
}

#[test]
fn a_task_in_chunks_has_one_sequence() {
    let mut world = World::new(two_heads());
    let mut sequences = Vec::new();
    for chunk in chunk::split(7, 99, vec![5; 4_000].into()).unwrap() {
        match world.client(ALICE, &chunk) {
            Sent::ToHead(0, forwarded) => sequences.push(forwarded.sequence),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(sequences.len(), 3);
    assert!(sequences.iter().all(|sequence| *sequence == sequences[0]));
    assert_eq!(world.bridge.open_tasks(), 1);
}

#[test]
fn a_task_that_nobody_answers_ends_in_an_error() {
    let mut world = World::new(Config {
        request_timeout: Duration::from_secs(5),
        ..two_heads()
    });
    let task = world.task(ALICE, 7, "q");
    world.at(2_499);
    assert_eq!(world.transmits(), []);
    world.at(2_500);
    let asked = world.transmits();
    assert_eq!(asked.len(), 1);
    let (to, question) = &asked[0];
    assert_eq!(*to, Destination::Head(0));
    assert_eq!(
        (question.kind, question.sequence, &question.payload[..]),
        (MsgType::HEALTH, task.sequence, &b"task"[..])
    );
    world.at(4_999);
    assert_eq!(world.transmits(), []);
    world.at(5_000);
    let sent = world.transmits();
    assert_eq!(sent.len(), 1);
    assert_eq!(sent[0].1.error_body().unwrap().code, ErrorCode::TIMEOUT);
    assert_eq!(world.bridge.open_tasks(), 0);
    assert_eq!(world.transmits(), []);
}

#[test]
fn a_task_is_waited_for_as_long_as_its_head_says_that_it_works_on_it() {
    let mut world = World::new(Config {
        request_timeout: Duration::from_secs(5),
        ..two_heads()
    });
    let task = world.task(ALICE, 7, "q");
    let ack = message(MsgType::ACK, task.sequence, "");
    for round in 1..100 {
        world.at(round * 2_500);
        assert_eq!(world.transmits().len(), 1, "round {round}");
        // A client that did not ask for it gets none: a v5.0.0 client reads one datagram.
        assert_eq!(world.head(0, &ack), None, "round {round}");
    }
    assert!(world.head(0, &answer_to(&task, "late")).is_some());
}

#[test]
fn pieces_of_an_answer_and_acks_that_a_client_asked_for_are_signs_of_life() {
    let mut world = World::new(Config {
        request_timeout: Duration::from_secs(5),
        ..two_heads()
    });
    let task = world.task(ALICE, 7, "q");
    for round in 1..20 {
        world.at(round * 2_000);
        assert_eq!(world.transmits(), [], "round {round}");
        let ack = message(MsgType::ACK, task.sequence, "for a slot");
        assert!(world.head(0, &ack).is_some());
    }
    assert_eq!(world.bridge.open_tasks(), 1);
}

#[test]
fn a_full_table_refuses_new_tasks_and_keeps_the_old() {
    let mut world = World::new(two_heads());
    let tasks: Vec<Message> = (0..8)
        .map(|sequence| world.task(ALICE, sequence, "q"))
        .collect();
    let (code, sequence) = world.client(ALICE, &message(MsgType::TASK, 8, "q")).error();
    assert_eq!((code, sequence), (ErrorCode::WORKER_BUSY, 8));
    world.head(0, &answer_to(&tasks[3], "a")).unwrap();
    world.task(ALICE, 8, "q");
    assert_eq!(
        world.head(0, &answer_to(&tasks[3], "a")),
        None,
        "its slot has another task now"
    );
    for task in tasks
        .iter()
        .filter(|task| task.sequence != tasks[3].sequence)
    {
        assert!(world.head(0, &answer_to(task, "a")).is_some());
    }
}

#[test]
fn a_drain_refuses_new_tasks_and_ends_with_the_last_answer() {
    let mut world = World::new(two_heads());
    let task = world.task(ALICE, 7, "q");
    world.bridge.begin_drain();
    let (code, _) = world.client(BOB, &message(MsgType::TASK, 1, "r")).error();
    assert_eq!(code, ErrorCode::DRAINING);
    assert_eq!(world.task(ALICE, 7, "q"), task, "a repeat is no new task");
    assert!(world.head(0, &answer_to(&task, "a")).is_some());
    assert_eq!(world.bridge.open_tasks(), 0);
}

#[test]
fn tasks_that_outlast_a_drain_end_in_an_error() {
    let mut world = World::new(two_heads());
    world.task(ALICE, 7, "q");
    world.task(BOB, 7, "q");
    world.bridge.begin_drain();
    world.bridge.abandon();
    let codes: Vec<ErrorCode> = world
        .transmits()
        .iter()
        .map(|(_, sent)| sent.error_body().unwrap().code)
        .collect();
    assert_eq!(codes, [ErrorCode::DRAINING; 2]);
}
