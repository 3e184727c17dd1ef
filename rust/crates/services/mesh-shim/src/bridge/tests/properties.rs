//! Properties that hold whatever clients and heads send.

use dcf::Header;
use proptest::prelude::*;

use super::*;

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
