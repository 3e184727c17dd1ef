//! Whatever Chunks come from whomever, in whatever version, order and time, a reassembler stays within its limits, and a
//! payload is only ever made of Chunks of one source, version and sequence.
#![no_main]

use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use bytes::Bytes;
use dcf::chunk::{self, Chunk, Limits, Reassembler};
use dcf::{Message, Version};
use libfuzzer_sys::fuzz_target;

type Key = (Ipv4Addr, Version, u32);

fuzz_target!(|data: Vec<(u8, u8, Vec<u8>)>| {
    let limits = Limits {
        max_messages: 6,
        max_payload: 2_000,
        max_bytes: 8_000,
        timeout: Duration::from_millis(100),
    };
    let share = limits.half();
    let mut reassembler = Reassembler::by_source(limits, share, |key: &Key| IpAddr::V4(key.0));
    let mut now = Instant::now();
    for (who, pause_ms, bytes) in data {
        now += Duration::from_millis(pause_ms.into());
        let source = Ipv4Addr::new(192, 0, 2, who % 3);
        // Either the bytes are a datagram, or a well-made Chunk of a payload that is named by them.
        let datagram = if who & 0x80 != 0 {
            let version = [Version::V5_0, Version::V5_1][usize::from(who >> 6 & 1)];
            let payload = Bytes::from(bytes.repeat(40));
            let pieces = chunk::split(u32::from(who >> 4 & 3), 0, payload).expect("short");
            let at = usize::from(pause_ms) % pieces.len();
            pieces.clone().nth(at).expect("in range").encode_as(version)
        } else {
            Bytes::from(bytes)
        };
        if let Ok((version, message)) = Message::decode_versioned(datagram)
            && let Ok(chunk) = Chunk::parse(&message.payload)
            && let Ok(Some(whole)) =
                reassembler.push((source, version, message.sequence), &chunk, now)
        {
            assert!(whole.len() <= limits.max_payload);
        }
        assert!(reassembler.len() <= limits.max_messages);
        assert!(reassembler.bytes() <= limits.max_bytes);
    }
    reassembler.expire(now + limits.timeout);
    assert_eq!((reassembler.len(), reassembler.bytes()), (0, 0));
});
