//! The bounds of chunk reassembly, with simulated time.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use bytes::Bytes;
use dcf::chunk::{Chunk, ChunkError, Limits, MAX_DATA, Reassembler, Share, split};

fn chunks_of(payload: impl Into<Bytes>) -> Vec<Chunk> {
    split(1, 0, payload.into())
        .unwrap()
        .map(|message| Chunk::parse(&message.payload).unwrap())
        .collect()
}

fn payload(seed: u8, len: usize) -> Bytes {
    (0..len)
        .map(|at| (at as u8).wrapping_mul(31).wrapping_add(seed))
        .collect()
}

#[test]
fn two_senders_with_the_same_sequence_do_not_mix() {
    let (a, b) = (payload(1, 3_000), payload(2, 3_000));
    let mut reassembler = Reassembler::new(Limits::default());
    let now = Instant::now();
    let (mut got_a, mut got_b) = (None, None);
    for (of_a, of_b) in chunks_of(a.clone()).iter().zip(&chunks_of(b.clone())) {
        got_a = reassembler.push(("10.0.0.1:5", 7), of_a, now).unwrap();
        got_b = reassembler.push(("10.0.0.2:5", 7), of_b, now).unwrap();
    }
    assert_eq!((got_a, got_b), (Some(a), Some(b)));
}

#[test]
fn a_payload_that_does_not_finish_in_time_is_dropped() {
    let limits = Limits {
        timeout: Duration::from_secs(5),
        ..Limits::default()
    };
    let mut reassembler = Reassembler::new(limits);
    let start = Instant::now();
    let chunks = chunks_of(payload(1, 3_000));
    reassembler.push(1, &chunks[0], start).unwrap();
    // A later Chunk does not buy more time.
    reassembler
        .push(1, &chunks[1], start + Duration::from_secs(4))
        .unwrap();
    assert_eq!(
        reassembler.next_deadline(),
        Some(start + Duration::from_secs(5))
    );
    assert_eq!(reassembler.expire(start + Duration::from_millis(4_999)), 0);
    assert_eq!(reassembler.expire(start + Duration::from_secs(5)), 1);
    assert_eq!(reassembler.bytes(), 0);
    assert_eq!(
        reassembler.push(1, &chunks[2], start + Duration::from_secs(5)),
        Ok(None)
    );
}

#[test]
fn one_hostile_chunk_that_announces_the_maximum_costs_what_it_weighs() {
    let mut reassembler = Reassembler::new(Limits::default());
    let chunk = Chunk {
        total: u16::MAX,
        index: 65_000,
        md5: [0; 16],
        data: Bytes::from_static(b"x"),
    };
    reassembler.push(1, &chunk, Instant::now()).unwrap();
    assert!(reassembler.bytes() < 100, "{} bytes", reassembler.bytes());
}

#[test]
fn a_payload_over_the_limit_is_refused_and_forgotten() {
    let limits = Limits {
        max_payload: 2 * MAX_DATA,
        ..Limits::default()
    };
    let mut reassembler = Reassembler::new(limits);
    let now = Instant::now();
    let chunks = chunks_of(payload(1, 3 * MAX_DATA));
    assert_eq!(reassembler.push(1, &chunks[0], now), Ok(None));
    assert_eq!(reassembler.push(1, &chunks[1], now), Ok(None));
    assert_eq!(
        reassembler.push(1, &chunks[2], now),
        Err(ChunkError::TooLarge {
            len: 3 * MAX_DATA,
            limit: 2 * MAX_DATA
        })
    );
    assert!(reassembler.is_empty());
}

#[test]
fn when_full_the_stalest_payload_makes_room() {
    let limits = Limits {
        max_messages: 2,
        ..Limits::default()
    };
    let mut reassembler = Reassembler::new(limits);
    let start = Instant::now();
    let at = |ms| start + Duration::from_millis(ms);
    let (moving, stalled) = (chunks_of(payload(1, 4_000)), chunks_of(payload(2, 4_000)));
    reassembler.push("moving", &moving[0], at(0)).unwrap();
    reassembler.push("stalled", &stalled[0], at(1)).unwrap();
    reassembler.push("moving", &moving[1], at(2)).unwrap();
    reassembler.push("new", &stalled[0], at(3)).unwrap();
    assert_eq!(reassembler.evicted(), 1);
    assert_eq!(
        reassembler.push("moving", &moving[2], at(4)),
        Ok(Some(payload(1, 4_000)))
    );
    assert!(!reassembler.remove(&"stalled"));
}

#[test]
fn when_bytes_run_out_the_stalest_payload_makes_room() {
    let limits = Limits {
        max_bytes: 4 * MAX_DATA,
        ..Limits::default()
    };
    let mut reassembler = Reassembler::new(limits);
    let start = Instant::now();
    for (key, chunk) in chunks_of(payload(1, 20 * MAX_DATA)).iter().enumerate() {
        reassembler
            .push(key, chunk, start + Duration::from_millis(key as u64))
            .unwrap();
        assert!(reassembler.bytes() <= limits.max_bytes);
    }
    assert_eq!(reassembler.len(), 3);
    assert!(reassembler.remove(&19), "the newest is still there");
}

#[test]
fn a_chunk_of_another_payload_does_not_disturb_the_first() {
    let mut reassembler = Reassembler::new(Limits::default());
    let now = Instant::now();
    let (first, other) = (chunks_of(payload(1, 2_000)), chunks_of(payload(2, 2_000)));
    reassembler.push(1, &first[0], now).unwrap();
    assert_eq!(
        reassembler.push(1, &other[1], now),
        Err(ChunkError::Conflict)
    );
    assert_eq!(
        reassembler.push(1, &first[1], now),
        Ok(Some(payload(1, 2_000)))
    );
}

#[test]
fn a_payload_with_the_wrong_md5_is_reported_and_can_be_sent_again() {
    let mut reassembler = Reassembler::new(Limits::default());
    let now = Instant::now();
    let chunks = chunks_of(payload(1, 2_000));
    let corrupt = Chunk {
        data: payload(9, MAX_DATA),
        ..chunks[0].clone()
    };
    reassembler.push(1, &corrupt, now).unwrap();
    assert_eq!(
        reassembler.push(1, &chunks[1], now),
        Err(ChunkError::Corrupt { total: 2 })
    );
    assert!(reassembler.is_empty());
    reassembler.push(1, &chunks[0], now).unwrap();
    assert_eq!(
        reassembler.push(1, &chunks[1], now),
        Ok(Some(payload(1, 2_000)))
    );
}

type Key = (SocketAddr, u32);

fn source(key: &Key) -> IpAddr {
    key.0.ip()
}

fn key(address: &str, sequence: u32) -> Key {
    (address.parse().unwrap(), sequence)
}

#[test]
fn a_flood_of_one_source_does_not_touch_the_payloads_of_others() {
    let limits = Limits {
        max_messages: 8,
        max_bytes: 40 * MAX_DATA,
        ..Limits::default()
    };
    let mut reassembler = Reassembler::by_source(limits, limits.half(), source);
    let now = Instant::now();
    let honest = chunks_of(payload(1, 3_000));
    let first = key("192.0.2.7:1", 1);
    reassembler.push(first, &honest[0], now).unwrap();
    // Each from another port, and of one IPv6 network from many addresses: totals that are never reached.
    for round in 0..500_u32 {
        let hostile = Chunk {
            total: u16::MAX,
            index: round as u16,
            md5: [0; 16],
            data: payload(2, MAX_DATA),
        };
        let later = now + Duration::from_millis(round.into());
        for address in [
            format!("192.0.2.66:{}", 1_000 + round),
            format!("[2001:db8::{round:x}]:9"),
        ] {
            reassembler
                .push(key(&address, round), &hostile, later)
                .unwrap();
        }
        assert!(reassembler.len() <= limits.max_messages);
        assert!(reassembler.bytes() <= limits.max_bytes);
    }
    let later = now + Duration::from_millis(501);
    reassembler.push(first, &honest[2], later).unwrap();
    assert_eq!(
        reassembler.push(first, &honest[1], later),
        Ok(Some(payload(1, 3_000)))
    );
}

#[test]
fn a_payload_over_its_sources_share_is_refused() {
    let limits = Limits {
        max_bytes: 8 * MAX_DATA,
        ..Limits::default()
    };
    let mut reassembler = Reassembler::by_source(limits, limits.half(), source);
    let now = Instant::now();
    let refused = chunks_of(payload(1, 6 * MAX_DATA))
        .iter()
        .find_map(|chunk| reassembler.push(key("192.0.2.7:1", 1), chunk, now).err());
    assert!(
        matches!(refused, Some(ChunkError::TooLarge { .. })),
        "{refused:?}"
    );
    assert!(reassembler.is_empty());
}

#[test]
fn where_room_is_short_whoever_holds_the_most_gives_way() {
    let limits = Limits {
        max_bytes: 40 * MAX_DATA,
        ..Limits::default()
    };
    let share = Share {
        bytes: limits.max_bytes,
        ..limits.half()
    };
    let mut reassembler = Reassembler::by_source(limits, share, source);
    let now = Instant::now();
    let (honest, large) = (key("192.0.2.7:1", 1), key("192.0.2.66:1", 1));
    let (few, many) = (
        chunks_of(payload(1, 3 * MAX_DATA)),
        chunks_of(payload(2, 30 * MAX_DATA)),
    );
    reassembler.push(honest, &few[0], now).unwrap();
    for chunk in &many[..20] {
        reassembler.push(large, chunk, now).unwrap();
    }
    reassembler.set_room(10 * MAX_DATA);
    assert_eq!(reassembler.len(), 1);
    reassembler.push(honest, &few[1], now).unwrap();
    let refused = many
        .iter()
        .find_map(|chunk| reassembler.push(large, chunk, now).err());
    assert_eq!(refused, Some(ChunkError::NoRoom));
    reassembler.set_room(usize::MAX);
    for chunk in &many[..29] {
        reassembler.push(large, chunk, now).unwrap();
    }
    assert_eq!(
        reassembler.push(large, &many[29], now),
        Ok(Some(payload(2, 30 * MAX_DATA)))
    );
    assert!(reassembler.bytes() <= limits.max_bytes);
    reassembler.set_room(0);
    assert!(reassembler.is_empty() && reassembler.bytes() == 0);
}

#[test]
fn whoever_holds_less_keeps_it_while_a_larger_payload_grows() {
    let limits = Limits {
        max_bytes: 20 * MAX_DATA,
        ..Limits::default()
    };
    let share = Share {
        bytes: limits.max_bytes,
        ..limits.half()
    };
    let mut reassembler = Reassembler::by_source(limits, share, source);
    let now = Instant::now();
    let (honest, large) = (key("192.0.2.7:1", 1), key("192.0.2.66:1", 1));
    let few = chunks_of(payload(1, 5 * MAX_DATA));
    for chunk in &few[..4] {
        reassembler.push(honest, chunk, now).unwrap();
    }
    let refused = chunks_of(payload(2, 18 * MAX_DATA))
        .iter()
        .find_map(|chunk| reassembler.push(large, chunk, now).err());
    assert_eq!(refused, Some(ChunkError::NoRoom));
    let whole = reassembler.push(honest, &few[4], now);
    assert_eq!(whole, Ok(Some(payload(1, 5 * MAX_DATA))));
}
