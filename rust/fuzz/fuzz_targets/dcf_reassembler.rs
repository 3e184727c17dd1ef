//! Whatever Chunks come in whatever order and time, a reassembler stays within its limits.
#![no_main]

use std::time::{Duration, Instant};

use bytes::Bytes;
use dcf::chunk::{Chunk, Limits, Reassembler};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: Vec<(u8, u8, Vec<u8>)>| {
    let limits = Limits {
        max_messages: 4,
        max_payload: 2_000,
        max_bytes: 5_000,
        timeout: Duration::from_millis(100),
    };
    let mut reassembler = Reassembler::new(limits);
    let mut now = Instant::now();
    for (key, pause_ms, payload) in data {
        now += Duration::from_millis(pause_ms.into());
        if let Ok(chunk) = Chunk::parse(&Bytes::from(payload))
            && let Ok(Some(whole)) = reassembler.push(key % 8, &chunk, now)
        {
            assert!(whole.len() <= limits.max_payload);
        }
        assert!(reassembler.len() <= limits.max_messages);
        assert!(reassembler.bytes() <= limits.max_bytes);
    }
    reassembler.expire(now + limits.timeout);
    assert_eq!((reassembler.len(), reassembler.bytes()), (0, 0));
});
