//! Clients and heads of different versions.

use super::*;

const OLD: Version = Version::V5_0;
const NEW: Version = Version::V5_1;

#[test]
fn a_v5_head_that_answers_no_probe_still_gets_tasks() {
    let mut world = World::with_head_of(&[]);
    world.at(60_000);
    world.transmits();
    let task = world.task(ALICE, 7, "q");
    // It forwards a worker's Result with the type of a Task.
    let answer = message(MsgType::TASK, task.sequence, "a");
    let delivered = message(MsgType::RESULT, 7, "a");
    assert_eq!(world.head(0, &answer), Some((ALICE.to_owned(), delivered)));
    assert_eq!(world.bridge.open_tasks(), 0);
}

#[test]
fn a_head_that_speaks_both_versions_is_asked_in_the_clients() {
    let mut world = World::with_head_of(&[NEW, OLD]);
    for version in [OLD, NEW] {
        let (upstream, task) = world.task_of(version, ALICE, 7);
        assert_eq!(upstream, version);
        // As long as one of ours: it goes as the datagram that it is.
        let answer = answer_to(&task, "a");
        let expected = (version, ALICE.to_owned(), message(MsgType::RESULT, 7, "a"));
        assert_eq!(world.head_of(version, 0, &answer), Some(expected));
    }
    assert_eq!(
        world.stats().traffic.tasks.get(),
        2,
        "the same sequence, two tasks"
    );
}

#[test]
fn a_v5_1_client_is_served_by_a_v5_0_head() {
    let mut world = World::with_head_of(&[OLD]);
    let (upstream, task) = world.task_of(NEW, ALICE, 7);
    assert_eq!((upstream, &task.payload[..]), (OLD, &b"q"[..]));
    // A short answer only gets the version byte, and the head's type of a Task becomes that of a Result.
    let short = message(MsgType::TASK, task.sequence, vec![b's'; 1_454]);
    let delivered = world.head_of(OLD, 0, &short);
    let expected = message(MsgType::RESULT, 7, vec![b's'; 1_454]);
    assert_eq!(delivered, Some((NEW, ALICE.to_owned(), expected)));
    // A long one goes in Chunks.
    let (_, task) = world.task_of(NEW, BOB, 9);
    let long: Vec<u8> = (0..65_490u32).map(|n| n as u8).collect();
    let answer = message(MsgType::RESULT, task.sequence, long.clone());
    assert_eq!(world.head_of(OLD, 0, &answer), None);
    let sent = world.transmits_of();
    assert_eq!(sent.len(), 47);
    let mut whole = None;
    let mut pieces = chunk::Reassembler::new(chunk::Limits::default());
    for (to, version, piece) in sent.iter().rev() {
        assert_eq!(
            (*to, *version),
            (Destination::Client(BOB.parse().unwrap()), NEW)
        );
        assert_eq!((piece.kind, piece.sequence), (MsgType::CHUNK, 9));
        let piece = chunk::Chunk::parse(&piece.payload).unwrap();
        whole = pieces.push((), &piece, world.now).unwrap();
    }
    assert_eq!(whole.unwrap(), long);
    assert_eq!(world.bridge.open_tasks(), 0);
    assert_eq!(world.head_of(OLD, 0, &answer), None, "one answer is enough");
    assert_eq!(world.transmits_of(), []);
}

#[test]
fn a_v5_0_client_is_served_by_a_v5_1_head_and_gets_one_datagram() {
    let mut world = World::with_head_of(&[NEW]);
    let (upstream, task) = world.task_of(OLD, ALICE, 7);
    assert_eq!(upstream, NEW);
    let long: Vec<u8> = (0..65_490u32).map(|n| n as u8).collect();
    let pieces = chunk::split(task.sequence, 99, long.clone().into()).unwrap();
    let pieces: Vec<Message> = pieces.collect();
    for piece in pieces.iter().rev().chain(&pieces[..3]) {
        assert_eq!(
            world.head_of(NEW, 0, piece),
            None,
            "no Chunk reaches a v5.0.0 client"
        );
    }
    let expected = message(MsgType::RESULT, 7, long);
    let client = Destination::Client(ALICE.parse().unwrap());
    assert_eq!(world.transmits_of(), [(client, OLD, expected)]);
    assert_eq!(world.bridge.open_tasks(), 0);
}

#[test]
fn an_answer_that_fits_no_datagram_reaches_a_v5_0_client_in_chunks() {
    let mut world = World::with_head_of(&[NEW]);
    for (sequence, len) in [(1, 65_491), (2, 66_000), (3, 200_000)] {
        let (_, task) = world.task_of(OLD, ALICE, sequence);
        let long = Bytes::from(vec![b'x'; len]);
        let mut delivered = Vec::new();
        for piece in chunk::split(task.sequence, 99, long.clone()).unwrap() {
            let sent = world.head_of(NEW, 0, &piece);
            delivered.extend(sent.map(|(version, _, piece)| (version, piece)));
        }
        let own = world.transmits_of();
        delivered.extend(own.into_iter().map(|(_, version, piece)| (version, piece)));
        let mut pieces = chunk::Reassembler::new(chunk::Limits::default());
        let mut whole = None;
        for (version, piece) in delivered {
            assert_eq!((version, piece.sequence), (OLD, sequence));
            let piece = chunk::Chunk::parse(&piece.payload).unwrap();
            whole = pieces.push((), &piece, world.now).unwrap();
        }
        assert_eq!(whole, Some(long), "{len} bytes");
    }
}

#[test]
fn a_repeated_task_stays_in_the_version_that_the_head_has_it_in() {
    let mut world = World::with_head_of(&[]);
    let task = message(MsgType::TASK, 7, "q");
    // Of a head that has said nothing yet nothing is known; it then turns out to speak both.
    let (first, sent) = world.client_of(NEW, ALICE, &task);
    assert_eq!(first, OLD);
    for version in [OLD, NEW] {
        world.head_of(version, 0, &message(MsgType::HEALTH, 1, ""));
    }
    let (again, repeat) = world.client_of(NEW, ALICE, &task);
    assert_eq!(
        (again, repeat),
        (OLD, sent),
        "the head knows it as a repeat"
    );
    let (later, _) = world.client_of(NEW, ALICE, &message(MsgType::TASK, 8, "q"));
    assert_eq!(later, NEW);
}

#[test]
fn a_task_that_a_v5_1_head_could_not_read_is_repeated_in_its_version() {
    let mut world = World::with_head_of(&[]);
    let task = message(MsgType::TASK, 7, "q");
    assert_eq!(world.client_of(OLD, ALICE, &task).0, OLD);
    world.head_of(NEW, 0, &message(MsgType::HEALTH, 1, ""));
    assert_eq!(world.client_of(OLD, ALICE, &task).0, NEW);
}

#[test]
fn tasks_are_sent_again_in_the_version_of_the_next_head() {
    let mut world = World::new(two_heads());
    world.head_of(NEW, 1, &message(MsgType::HEALTH, 1, ""));
    let (_, task) = world.task_of(NEW, ALICE, 7);
    world.bridge.on_head_refused(world.now, 0);
    assert_eq!(world.transmits_of(), [(Destination::Head(1), NEW, task)]);
}

#[test]
fn the_shims_own_answers_are_in_the_clients_version() {
    let mut world = World::with_head_of(&[NEW]);
    let probe = message(MsgType::HEALTH, 5, "");
    assert_eq!(
        world.client_of(NEW, ALICE, &probe),
        (NEW, Sent::Back(probe.clone()))
    );
    world.bridge.on_head_refused(world.now, 0);
    let (version, sent) = world.client_of(NEW, ALICE, &message(MsgType::TASK, 6, "q"));
    assert_eq!((version, sent.error()), (NEW, (ErrorCode::NO_WORKERS, 6)));
}

#[test]
fn an_error_that_is_too_long_for_a_v5_1_client_is_cut_between_characters() {
    let mut world = World::with_head_of(&[OLD]);
    let (_, task) = world.task_of(NEW, ALICE, 7);
    let error = Message::error(task.sequence, 0, ErrorCode::INTERNAL, &"é".repeat(2_000));
    let (version, _, error) = world.head_of(OLD, 0, &error).unwrap();
    let body = error.error_body().unwrap();
    assert_eq!(
        (version, body.code, error.sequence),
        (NEW, ErrorCode::INTERNAL, 7)
    );
    assert_eq!(*body.text, "é".repeat(726));
}

#[test]
fn a_lying_total_costs_a_bounded_amount_and_is_forgotten_after_a_minute() {
    let mut world = World::with_head_of(&[NEW]);
    let (_, task) = world.task_of(OLD, ALICE, 7);
    let honest: Vec<Message> = chunk::split(task.sequence, 9, vec![b'x'; 3_000].into())
        .unwrap()
        .collect();
    let lie = |total: u16, index: u16| {
        let chunk = chunk::Chunk {
            total,
            index,
            md5: [1; 16],
            data: vec![b'y'; 1_400].into(),
        };
        message(MsgType::CHUNK, task.sequence, chunk.encode())
    };
    for (total, index) in (2..40).flat_map(|total| [(total, 0), (total, total - 1)]) {
        assert_eq!(world.head_of(NEW, 0, &lie(total, index)), None);
    }
    assert_eq!(world.transmits_of(), []);
    for piece in &honest {
        assert_eq!(world.head_of(NEW, 0, piece), None);
    }
    assert_eq!(
        world.transmits_of().len(),
        1,
        "the answer, once all of it is there"
    );
}

#[test]
fn another_version_is_dropped_and_counted() {
    let mut world = World::new(two_heads());
    let mut datagram = message(MsgType::TASK, 1, "a").encode_as(NEW).to_vec();
    datagram[0] = 0x52;
    assert_eq!(world.client_bytes(ALICE, &datagram), Sent::Nothing);
    assert_eq!(world.stats().drops.other_version.get(), 1);
}
