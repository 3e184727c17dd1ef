//! Heads that are lost, that drain and that challenge.

use super::*;

#[test]
fn tasks_of_a_silent_head_go_to_the_next() {
    let mut world = World::new(two_heads());
    let of_alice = world.task(ALICE, 7, "a?");
    let of_bob = world.task(BOB, 7, "b?");
    world.head(0, &answer_to(&of_bob, "b!")).unwrap();
    world.at(1_000);
    world.health(1);
    world.at(1_499);
    assert_eq!(world.transmits(), []);
    world.at(1_500);
    assert_eq!(
        world.transmits(),
        [(Destination::Head(1), of_alice.clone())],
        "only what is not answered yet"
    );
    assert_eq!(world.stats().traffic.failovers.get(), 1);
    let new = world.client(BOB, &message(MsgType::TASK, 8, "c?"));
    assert!(matches!(new, Sent::ToHead(1, _)));
    assert_eq!(
        world.head(0, &message(MsgType::PARTIAL, of_alice.sequence, "....old")),
        None
    );
    assert!(world.head(1, &answer_to(&of_alice, "a!")).is_some());
    assert_eq!(
        world.head(0, &answer_to(&of_alice, "a!")),
        None,
        "the first head is too late"
    );
}

#[test]
fn a_refusal_moves_tasks_at_once() {
    let mut world = World::new(two_heads());
    let task = world.task(ALICE, 7, "q");
    world.bridge.on_head_refused(world.now, 0);
    assert_eq!(world.transmits(), [(Destination::Head(1), task)]);
}

#[test]
fn a_single_head_that_restarts_gets_its_tasks_again() {
    let mut world = World::new(Config {
        heads: vec!["head:1".into()],
        ..two_heads()
    });
    let task = world.task(ALICE, 7, "q");
    world.bridge.on_head_refused(world.now, 0);
    assert_eq!(world.transmits(), []);
    let (code, sequence) = world.client(BOB, &message(MsgType::TASK, 3, "r")).error();
    assert_eq!((code, sequence), (ErrorCode::NO_WORKERS, 3));
    world.at(700);
    world.health(0);
    assert_eq!(world.transmits(), [(Destination::Head(0), task.clone())]);
    assert!(world.head(0, &answer_to(&task, "a")).is_some());
}

#[test]
fn a_draining_head_passes_new_tasks_on_and_finishes_old_ones() {
    let mut world = World::new(two_heads());
    let old = world.task(ALICE, 1, "old");
    let new = world.task(ALICE, 2, "new");
    assert_eq!(
        world.head(
            0,
            &Message::error(new.sequence, 0, ErrorCode::DRAINING, "bye")
        ),
        None
    );
    assert_eq!(
        world.transmits(),
        [(Destination::Head(1), new.clone())],
        "the old one stays where it runs"
    );
    assert!(world.head(0, &answer_to(&old, "a")).is_some());
    assert!(world.head(1, &answer_to(&new, "a")).is_some());
}

#[test]
fn a_draining_head_that_dies_gives_up_its_old_tasks_too() {
    let mut world = World::new(two_heads());
    let old = world.task(ALICE, 1, "old");
    let new = world.task(ALICE, 2, "new");
    world.head(
        0,
        &Message::error(new.sequence, 0, ErrorCode::DRAINING, "bye"),
    );
    world.transmits();
    world.bridge.on_head_refused(world.now, 0);
    assert_eq!(world.transmits(), [(Destination::Head(1), old)]);
}

#[test]
fn without_another_head_the_client_is_told_that_the_head_drains() {
    let mut world = World::new(Config {
        heads: vec!["head:1".into()],
        ..two_heads()
    });
    let task = world.task(ALICE, 1, "q");
    let (_, delivered) = world
        .head(
            0,
            &Message::error(task.sequence, 0, ErrorCode::DRAINING, "bye"),
        )
        .unwrap();
    assert_eq!(delivered.error_body().unwrap().code, ErrorCode::DRAINING);
}

#[test]
fn a_task_in_chunks_is_sent_again_whole() {
    let mut world = World::new(two_heads());
    let chunks: Vec<Message> = chunk::split(7, 99, vec![5; 4_000].into())
        .unwrap()
        .collect();
    for chunk in &chunks {
        world.client(ALICE, chunk);
    }
    world.bridge.on_head_refused(world.now, 0);
    let again = world.transmits();
    assert_eq!(again.len(), 3);
    for ((to, again), chunk) in again.iter().zip(&chunks) {
        assert_eq!(
            (*to, &again.payload),
            (Destination::Head(1), &chunk.payload)
        );
    }
}

#[test]
fn a_task_too_large_to_keep_ends_in_an_error_when_its_head_is_lost() {
    let mut world = World::new(Config {
        retain_bytes: 1 << 10,
        ..two_heads()
    });
    world.task(ALICE, 7, &"long ".repeat(1_000));
    world.bridge.on_head_refused(world.now, 0);
    let sent = world.transmits();
    assert_eq!(sent.len(), 1);
    assert_eq!(sent[0].0, Destination::Client(ALICE.parse().unwrap()));
    let body = sent[0].1.error_body().unwrap();
    assert_eq!((sent[0].1.sequence, body.code), (7, ErrorCode::NO_WORKERS));
}

#[test]
fn health_is_answered_while_a_head_is_there() {
    let mut world = World::new(two_heads());
    let probe = message(MsgType::HEALTH, 5, "");
    assert_eq!(world.client(ALICE, &probe), Sent::Back(probe.clone()));
    world.bridge.on_head_refused(world.now, 0);
    world.bridge.on_head_refused(world.now, 1);
    assert_eq!(
        world.client(ALICE, &probe).error(),
        (ErrorCode::NO_WORKERS, 5)
    );
}

#[test]
fn a_heads_challenge_is_echoed_and_the_task_sent_again() {
    let mut world = World::new(two_heads());
    let Sent::ToHead(0, task) = world.client("127.0.0.1:5000", &message(MsgType::TASK, 1, "q"))
    else {
        panic!("no task")
    };
    let cookie = vec![7; COOKIE_LEN];
    let challenge = message(MsgType::CHALLENGE, task.sequence, cookie.clone());
    assert_eq!(world.head(0, &challenge), None);
    let sent = world.transmits();
    let to_head: Vec<_> = sent
        .iter()
        .map(|(to, message)| {
            assert_eq!(*to, Destination::Head(0));
            (message.kind, message.sequence, message.payload.to_vec())
        })
        .collect();
    assert_eq!(
        to_head,
        [
            (MsgType::CHALLENGE_REPLY, task.sequence, cookie),
            (MsgType::TASK, task.sequence, b"q".to_vec()),
        ]
    );
}

#[test]
fn a_head_that_only_challenges_does_not_set_the_pace() {
    let mut world = World::new(two_heads());
    let task = world.task(ALICE, 1, "q");
    let challenge = message(MsgType::CHALLENGE, task.sequence, vec![7; COOKIE_LEN]);
    let (mut echoes, mut tasks) = (0, 0);
    for ms in 0..1000 {
        world.at(ms);
        world.head(0, &challenge);
        for (_, message) in world.transmits() {
            match message.kind {
                MsgType::CHALLENGE_REPLY => echoes += 1,
                MsgType::TASK => tasks += 1,
                other => panic!("{other}"),
            }
        }
    }
    assert_eq!((echoes, tasks), (1000, 5));
    // Also when its last challenge came too soon: an echo may have been lost.
    assert!(world.bridge.next_wakeup() <= world.start + Duration::from_millis(1000));
    world.at(1000);
    let sent = world.transmits();
    assert!(matches!(&sent[..], [(Destination::Head(0), again)] if again.kind == MsgType::TASK));
}
