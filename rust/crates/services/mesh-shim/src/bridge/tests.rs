//! The bridge with simulated time: every datagram in, every datagram out.

use std::time::Duration;

use bytes::Bytes;
use dcf::{Header, Message, chunk};
use proptest::prelude::*;

use super::*;
use crate::config::RateLimit;

const ALICE: &str = "127.0.0.1:1001";
const BOB: &str = "127.0.0.1:1002";
const STRANGER: &str = "203.0.113.5:4444";

/// A bridge with its clock.
struct World {
    bridge: Bridge,
    start: Instant,
    now: Instant,
}

fn two_heads() -> Config {
    Config {
        heads: vec!["head-a:7777".into(), "head-b:7777".into()],
        max_tasks: 8,
        retain_bytes: 64 << 10,
        rate_limit: RateLimit {
            per_second: 0,
            ..RateLimit::default()
        },
        ..Config::default()
    }
}

impl World {
    /// Both heads have been heard at 0 ms, if there are two.
    fn new(config: Config) -> Self {
        let heads = config.heads.len();
        let secrets = Secrets {
            cookie_key: [7; 32],
            first_generation: 40,
        };
        let start = Instant::now();
        let mut world = Self {
            bridge: Bridge::new(config, &secrets, Arc::default(), start),
            start,
            now: start,
        };
        world.transmits();
        for head in 0..heads {
            world.health(head);
        }
        world
    }

    fn at(&mut self, ms: u64) {
        self.now = self.start + Duration::from_millis(ms);
    }

    fn health(&mut self, head: usize) {
        assert_eq!(self.head(head, &message(MsgType::HEALTH, 1, "")), None);
    }

    /// Destination and content of what a client's message becomes.
    fn client(&mut self, client: &str, message: &Message) -> Sent {
        self.client_bytes(client, &message.encode_datagram())
    }

    /// As [`World::client`], with what is sent as it stands on the wire: in which version, and what.
    fn client_of(&mut self, version: Version, client: &str, message: &Message) -> (Version, Sent) {
        let mut seen = version;
        let sent = self.client_frames(client, &message.encode_as(version), &mut seen);
        (seen, sent)
    }

    fn client_bytes(&mut self, client: &str, bytes: &[u8]) -> Sent {
        self.client_frames(client, bytes, &mut Version::V5_0)
    }

    fn client_frames(&mut self, client: &str, bytes: &[u8], seen: &mut Version) -> Sent {
        let mut datagram = bytes.to_vec();
        let mut reply = Reply::empty();
        match self
            .bridge
            .on_client(self.now, client.parse().unwrap(), &mut datagram, &mut reply)
        {
            FromClient::Drop => Sent::Nothing,
            FromClient::Forward { head, len, version } => {
                *seen = version;
                Sent::ToHead(head, framed(&datagram[..len], version))
            }
            FromClient::Reply => {
                *seen = Version::of(reply.as_bytes());
                Sent::Back(decode(reply.as_bytes()))
            }
        }
    }

    /// A task that goes to a head, as the head gets it.
    fn task(&mut self, client: &str, sequence: u32, text: &str) -> Message {
        match self.client(client, &message(MsgType::TASK, sequence, text.to_owned())) {
            Sent::ToHead(_, task) => task,
            other => panic!("not forwarded: {other:?}"),
        }
    }

    /// Receiver and content of what a head's message becomes.
    fn head(&mut self, head: usize, message: &Message) -> Option<(String, Message)> {
        let (_, client, message) = self.head_of(Version::V5_0, head, message)?;
        Some((client, message))
    }

    /// As [`World::head`], with the versions on both sides.
    fn head_of(
        &mut self,
        version: Version,
        head: usize,
        message: &Message,
    ) -> Option<(Version, String, Message)> {
        let mut datagram = message.encode_as(version).to_vec();
        match self.bridge.on_head(self.now, head, &mut datagram) {
            FromHead::Drop => None,
            FromHead::Deliver {
                client,
                len,
                version,
            } => Some((
                version,
                client.to_string(),
                framed(&datagram[..len], version),
            )),
        }
    }

    /// Messages that the bridge sends by itself now, probes left out.
    fn transmits(&mut self) -> Vec<(Destination, Message)> {
        let sent = self.transmits_of();
        sent.into_iter()
            .map(|(to, _, message)| (to, message))
            .collect()
    }

    /// As [`World::transmits`], with their versions.
    fn transmits_of(&mut self) -> Vec<(Destination, Version, Message)> {
        let mut buffer = vec![0; 1 << 16];
        let mut sent = Vec::new();
        while let Some(Transmit { to, len }) = self.bridge.poll_transmit(self.now, &mut buffer) {
            let message = decode(&buffer[..len]);
            if message.kind != MsgType::HEALTH || !message.payload.is_empty() {
                sent.push((to, Version::of(&buffer[..len]), message));
            }
        }
        sent
    }

    /// One head, which has spoken in these versions.
    fn with_head_of(versions: &[Version]) -> Self {
        let config = Config {
            heads: vec!["head:1".into()],
            ..two_heads()
        };
        let secrets = Secrets {
            cookie_key: [7; 32],
            first_generation: 0,
        };
        let start = Instant::now();
        let mut world = Self {
            bridge: Bridge::new(config, &secrets, Arc::default(), start),
            start,
            now: start,
        };
        world.transmits();
        for version in versions {
            let health = message(MsgType::HEALTH, 1, "");
            assert_eq!(world.head_of(*version, 0, &health), None);
        }
        world
    }

    fn stats(&self) -> &Stats {
        &self.bridge.stats
    }
}

#[derive(Debug, PartialEq)]
enum Sent {
    Nothing,
    ToHead(usize, Message),
    Back(Message),
}

impl Sent {
    fn error(self) -> (ErrorCode, u32) {
        match self {
            Sent::Back(message) => (
                message.error_body().expect("an Error").code,
                message.sequence,
            ),
            other => panic!("no Error: {other:?}"),
        }
    }
}

fn message(kind: MsgType, sequence: u32, payload: impl Into<Bytes>) -> Message {
    Message::new(kind, sequence, 99, payload)
}

fn decode(bytes: &[u8]) -> Message {
    Message::decode_datagram(Bytes::copy_from_slice(bytes)).expect("the bridge sends messages")
}

/// The message that the receiver decodes from a datagram that is sent on in `version`.
fn framed(datagram: &[u8], version: Version) -> Message {
    let bytes = match reframed(datagram, version) {
        -1 => [version.prefix(), datagram].concat(),
        shift => datagram[shift as usize..].to_vec(),
    };
    let (seen, message) =
        Message::decode_versioned(bytes.into()).expect("the bridge sends messages");
    assert_eq!(seen, version);
    message
}

fn answer_to(task: &Message, text: &str) -> Message {
    message(MsgType::RESULT, task.sequence, text.to_owned())
}

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
fn a_v5_head_that_answers_no_probe_still_gets_tasks() {
    let config = Config {
        heads: vec!["head:1".into()],
        ..two_heads()
    };
    let secrets = Secrets {
        cookie_key: [7; 32],
        first_generation: 0,
    };
    let start = Instant::now();
    let mut world = World {
        bridge: Bridge::new(config, &secrets, Arc::default(), start),
        start,
        now: start,
    };
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

const OLD: Version = Version::V5_0;
const NEW: Version = Version::V5_1;

#[test]
fn a_head_that_speaks_both_versions_is_asked_in_the_clients() {
    let mut world = World::with_head_of(&[NEW, OLD]);
    for version in [OLD, NEW] {
        let (upstream, sent) = world.client_of(version, ALICE, &message(MsgType::TASK, 7, "q"));
        let Sent::ToHead(0, task) = sent else {
            panic!("{sent:?}")
        };
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
    let (upstream, sent) = world.client_of(NEW, ALICE, &message(MsgType::TASK, 7, "q"));
    let Sent::ToHead(0, task) = sent else {
        panic!("{sent:?}")
    };
    assert_eq!((upstream, &task.payload[..]), (OLD, &b"q"[..]));
    // A short answer only gets the version byte, and the head's type of a Task becomes that of a Result.
    let short = message(MsgType::TASK, task.sequence, vec![b's'; 1_454]);
    let delivered = world.head_of(OLD, 0, &short);
    let expected = message(MsgType::RESULT, 7, vec![b's'; 1_454]);
    assert_eq!(delivered, Some((NEW, ALICE.to_owned(), expected)));
    // A long one goes in Chunks.
    let (_, sent) = world.client_of(NEW, BOB, &message(MsgType::TASK, 9, "q"));
    let Sent::ToHead(0, task) = sent else {
        panic!("{sent:?}")
    };
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
    let (upstream, sent) = world.client_of(OLD, ALICE, &message(MsgType::TASK, 7, "q"));
    let Sent::ToHead(0, task) = sent else {
        panic!("{sent:?}")
    };
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
        let (_, sent) = world.client_of(OLD, ALICE, &message(MsgType::TASK, sequence, "q"));
        let Sent::ToHead(0, task) = sent else {
            panic!("{sent:?}")
        };
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
    let (_, sent) = world.client_of(NEW, ALICE, &message(MsgType::TASK, 7, "q"));
    let Sent::ToHead(0, task) = sent else {
        panic!("{sent:?}")
    };
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
    let (_, sent) = world.client_of(NEW, ALICE, &message(MsgType::TASK, 7, "q"));
    let Sent::ToHead(0, task) = sent else {
        panic!("{sent:?}")
    };
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
    let (_, sent) = world.client_of(OLD, ALICE, &message(MsgType::TASK, 7, "q"));
    let Sent::ToHead(0, task) = sent else {
        panic!("{sent:?}")
    };
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

fn any_datagram() -> impl Strategy<Value = Vec<u8>> {
    let kind = prop_oneof![4 => prop::sample::select(MsgType::ASSIGNED).prop_map(|kind| kind.0), 1 => any::<u8>()];
    let version = prop::sample::select(vec![Version::V5_0, Version::V5_1]);
    let parts = (
        version,
        kind,
        0u32..12,
        prop::collection::vec(any::<u8>(), 0..80),
        -3i32..4,
    );
    parts.prop_map(|(version, kind, sequence, payload, lie)| {
        let payload_len = payload.len().saturating_add_signed(lie as isize) as u32;
        let header = Header {
            msg_type: kind,
            sequence,
            timestamp_us: 1,
            payload_len,
        };
        [version.prefix(), &header.encode(), &payload].concat()
    })
}

proptest! {
    #[test]
    fn an_unverified_source_never_gets_more_bytes_than_it_sent(
        datagrams in prop::collection::vec((any_datagram(), 0u64..2_000), 0..60),
        verified in any::<bool>(),
        heads_gone in any::<bool>(),
    ) {
        let admit = if verified { Admit::Verified } else { Admit::Trusted };
        let rate_limit = RateLimit { per_second: 5, burst: 5, sources: 4 };
        let mut world = World::new(Config { admit, rate_limit, ..two_heads() });
        if heads_gone {
            world.bridge.on_head_refused(world.now, 0);
            world.bridge.on_head_refused(world.now, 1);
        }
        let (mut bytes_in, mut bytes_out, mut ms) = (0, 0, 0);
        for (datagram, pause) in datagrams {
            ms += pause;
            world.at(ms);
            bytes_in += datagram.len();
            let mut version = Version::V5_0;
            match world.client_frames(STRANGER, &datagram, &mut version) {
                Sent::Nothing => {}
                Sent::Back(reply) => bytes_out += version.prefix().len() + reply.encoded_len(),
                Sent::ToHead(..) => prop_assert!(false, "an unverified task was forwarded"),
            }
            for (to, message) in world.transmits() {
                if to == Destination::Client(STRANGER.parse().unwrap()) {
                    bytes_out += message.encoded_len();
                }
            }
            prop_assert!(bytes_out <= bytes_in);
        }
    }

    /// Whatever clients and heads send and whenever they fall silent: a client gets at most one answer for
    /// each time it asked, always under its own sequence, and an answer to what it asked.
    #[test]
    fn answers_reach_who_asked_and_nobody_else(
        steps in prop::collection::vec((0u8..9, 0u16..3, 0u32..5, 0usize..2, 0u64..900), 0..120),
    ) {
        let mut world = World::new(Config { request_timeout: Duration::from_secs(4), ..two_heads() });
        let mut asked = std::collections::HashMap::<(String, u32), i32>::new();
        let mut at_heads: [Vec<Message>; 2] = Default::default();
        let mut ms = 0;
        for (action, client, sequence, head, pause) in steps {
            ms += pause;
            world.at(ms);
            let name = format!("127.0.0.1:{}", 1_000 + client);
            let mut answers = Vec::new();
            match action {
                0..=3 => {
                    *asked.entry((name.clone(), sequence)).or_default() += 1;
                    match world.client(&name, &message(MsgType::TASK, sequence, format!("{name}/{sequence}"))) {
                        Sent::ToHead(head, task) => at_heads[head].push(task),
                        Sent::Back(error) => answers.push((name, error)),
                        Sent::Nothing => prop_assert!(false, "a task was dropped"),
                    }
                }
                4 | 5 => {
                    if let Some(task) = at_heads[head].pop() {
                        let answer = message(MsgType::RESULT, task.sequence, task.payload.clone());
                        answers.extend(world.head(head, &answer));
                    }
                }
                6 => world.health(head),
                7 => world.bridge.on_head_refused(world.now, head),
                _ => {
                    let noise = message(MsgType::RESULT, sequence.wrapping_mul(0x9E37_79B9), "noise");
                    answers.extend(world.head(head, &noise));
                }
            }
            for (to, sent) in world.transmits() {
                match to {
                    Destination::Head(_) if sent.kind == MsgType::HEALTH => {}
                    Destination::Head(head) => at_heads[head].push(sent),
                    Destination::Client(client) => answers.push((client.to_string(), sent)),
                }
            }
            for (to, answer) in answers {
                if answer.kind == MsgType::RESULT {
                    let expected = format!("{to}/{}", answer.sequence);
                    prop_assert_eq!(&answer.payload, &expected);
                }
                let left = asked.entry((to, answer.sequence)).or_default();
                *left -= 1;
                prop_assert!(*left >= 0, "more answers than questions");
            }
        }
    }
}
