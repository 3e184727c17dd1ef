//! Datagrams and sources that are not served.

use super::*;

#[test]
fn every_bad_datagram_is_counted_for_its_reason() {
    let mut world = World::new(two_heads());
    let good = message(MsgType::TASK, 1, "hello").encode_datagram();
    let with_type = |kind: u8| [&[kind], &good[1..]].concat();
    let bad_chunk = message(MsgType::CHUNK, 1, vec![0; 30]).encode_datagram();
    for bytes in [
        &[][..],
        &good[..16],
        &good[..20],
        &with_type(0),
        &with_type(0x7E),
        &with_type(0x13),
        &with_type(3),
        &bad_chunk,
    ] {
        assert_eq!(world.client_bytes(ALICE, bytes), Sent::Nothing);
    }
    assert_eq!(world.client_bytes("127.0.0.1:0", &good), Sent::Nothing);
    let counted: Vec<(&str, u64)> = world
        .stats()
        .drops
        .iter()
        .map(|(name, counter)| (name, counter.get()))
        .filter(|(_, count)| *count > 0)
        .collect();
    let expected = [
        ("short_header", 2),
        ("truncated", 1),
        ("unknown_type", 2),
        ("unexpected_type", 2),
        ("bad_chunk", 1),
        ("bad_source", 1),
    ];
    assert_eq!(counted, expected);
    assert_eq!(world.stats().dropped(), 9);
}

#[test]
fn bytes_after_the_message_are_not_passed_on() {
    let mut world = World::new(two_heads());
    let mut bytes = message(MsgType::TASK, 1, "hello")
        .encode_datagram()
        .to_vec();
    bytes.extend_from_slice(b"padding");
    match world.client_bytes(ALICE, &bytes) {
        Sent::ToHead(_, task) => assert_eq!(task.payload, "hello"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_source_over_its_rate_is_told_once_and_then_ignored() {
    let limit = RateLimit {
        per_second: 1,
        burst: 2,
        sources: 16,
    };
    let mut world = World::new(Config {
        rate_limit: limit,
        ..two_heads()
    });
    world.task(ALICE, 1, "q");
    world.task(ALICE, 2, "q");
    assert_eq!(
        world.client(ALICE, &message(MsgType::TASK, 3, "q")).error(),
        (ErrorCode::RATE_LIMITED, 3)
    );
    assert_eq!(
        world.client(ALICE, &message(MsgType::TASK, 4, "q")),
        Sent::Nothing
    );
    world.at(1_000);
    world.health(0);
    world.task(ALICE, 3, "q");
    assert_eq!(world.stats().drops.rate_limited.get(), 2);
}

#[test]
fn an_untrusted_source_hears_nothing_by_default() {
    let mut world = World::new(two_heads());
    let task = message(MsgType::TASK, 1, vec![b'x'; 100]);
    assert_eq!(world.client(STRANGER, &task), Sent::Nothing);
    assert_eq!(world.stats().drops.untrusted.get(), 1);
    let networks = vec!["203.0.113.0/24".parse().unwrap()];
    let mut world = World::new(Config {
        trusted_networks: networks.clone(),
        unverified_networks: networks,
        ..two_heads()
    });
    assert!(matches!(world.client(STRANGER, &task), Sent::ToHead(0, _)));
}

#[test]
fn a_network_that_is_trusted_later_is_served_then() {
    let mut world = World::new(two_heads());
    let task = message(MsgType::TASK, 1, "q");
    assert_eq!(world.client(STRANGER, &task), Sent::Nothing);
    world.bridge.reconfigure(Config {
        trusted_networks: vec!["203.0.113.0/24".parse().unwrap()],
        unverified_networks: vec!["203.0.113.0/24".parse().unwrap()],
        heads: Vec::new(),
        ..two_heads()
    });
    assert!(matches!(world.client(STRANGER, &task), Sent::ToHead(0, _)));
}

#[test]
fn a_client_of_a_trusted_network_is_served_when_it_has_shown_that_it_is_there() {
    let mut world = World::new(Config {
        trusted_networks: vec!["203.0.113.0/24".parse().unwrap()],
        ..two_heads()
    });
    let task = message(MsgType::TASK, 1, vec![b'x'; 100]);
    let Sent::Back(challenge) = world.client(STRANGER, &task) else {
        panic!("no challenge")
    };
    assert_eq!(challenge.kind, MsgType::CHALLENGE);
    let short = message(MsgType::TASK, 2, "q");
    assert_eq!(world.client(STRANGER, &short), Sent::Nothing);
    let echo = message(MsgType::CHALLENGE_REPLY, 1, challenge.payload.clone());
    assert!(matches!(world.client(STRANGER, &echo), Sent::Back(ack) if ack.kind == MsgType::ACK));
    assert!(matches!(world.client(STRANGER, &task), Sent::ToHead(0, _)));
}

#[test]
fn a_source_that_echoes_its_challenge_is_served() {
    let mut world = World::new(Config {
        admit: Admit::Verified,
        ..two_heads()
    });
    let task = message(MsgType::TASK, 1, vec![b'x'; 100]);
    let Sent::Back(challenge) = world.client(STRANGER, &task) else {
        panic!("no challenge")
    };
    assert_eq!(
        (challenge.kind, challenge.sequence),
        (MsgType::CHALLENGE, 1)
    );
    let echo = message(MsgType::CHALLENGE_REPLY, 1, challenge.payload.clone());
    assert_eq!(
        world.client("203.0.113.6:4444", &echo),
        Sent::Nothing,
        "another address"
    );
    assert_eq!(world.stats().drops.bad_cookie.get(), 1);
    assert_eq!(
        world.client(STRANGER, &echo),
        Sent::Back(message(MsgType::ACK, 1, ""))
    );
    assert!(matches!(world.client(STRANGER, &task), Sent::ToHead(0, _)));
    world.at(600_000);
    assert!(
        matches!(world.client(STRANGER, &task), Sent::Back(again) if again.kind == MsgType::CHALLENGE)
    );
}

#[test]
fn a_datagram_shorter_than_a_challenge_is_not_answered() {
    let mut world = World::new(Config {
        admit: Admit::Verified,
        ..two_heads()
    });
    assert_eq!(
        world.client(
            STRANGER,
            &message(MsgType::TASK, 1, vec![b'x'; COOKIE_LEN - 1])
        ),
        Sent::Nothing
    );
    assert!(matches!(
        world.client(STRANGER, &message(MsgType::TASK, 1, vec![b'x'; COOKIE_LEN])),
        Sent::Back(_)
    ));
}
