//! In the steady state the bridge allocates nothing: a counting allocator watches it.
#![allow(unsafe_code)]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use dcf::{Header, Message, MsgType, Version};
use mesh_shim::{
    Config,
    bridge::{Bridge, FromClient, FromHead, Reply, Secrets},
    config::RateLimit,
};

struct Counting;

thread_local! {
    /// Of this thread alone: the test harness allocates on its own.
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: everything is passed on to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller keeps the contract of `alloc`, which is the system's too.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the pointer came from the system's allocator.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Many clients, tasks and answers, repeats, refusals, lost heads and tasks sent again, over a table that is
/// full.
#[test]
fn a_hundred_and_fifty_thousand_tasks_cost_no_allocation() {
    let config = Config {
        heads: vec!["a:1".into(), "b:1".into()],
        max_tasks: 1_024,
        retain_bytes: 256 << 10,
        request_timeout: Duration::from_millis(40),
        rate_limit: RateLimit {
            per_second: 50_000,
            burst: 1_000,
            sources: 64,
        },
        ..Config::default()
    };
    let secrets = Secrets {
        cookie_key: [1; 32],
        first_generation: 0,
    };
    let start = Instant::now();
    let mut bridge = Bridge::new(config, &secrets, Arc::default(), start);
    let versions = [Version::V5_0, Version::V5_1];
    let task = Message::new(MsgType::TASK, 0, 0, vec![b'q'; 300]);
    let tasks = versions.map(|version| task.encode_as(version));
    let health = Message::new(MsgType::HEALTH, 0, 0, "");
    let healths = versions.map(|version| health.encode_as(version));
    let mut buffer = vec![0; 1 << 16];
    let mut datagrams = [vec![0; tasks[0].len()], vec![0; tasks[1].len()]];
    let mut reply = Reply::empty();
    let mut delivered = 0;

    let before = ALLOCATIONS.get();
    for round in 0..150_000u32 {
        let now = start + Duration::from_micros(20) * round;
        // Every question is asked three times.
        let question = round / 3;
        let client = SocketAddr::from(([127, 0, (question % 200) as u8, 1], 5_000));
        // Every second one in v5.1.
        let of = question as usize % 2;
        let (datagram, header) = (&mut datagrams[of], versions[of].prefix().len());
        datagram.copy_from_slice(&tasks[of]);
        datagram[header + 1..header + 5].copy_from_slice(&question.to_be_bytes());
        if let FromClient::Forward { head, version, .. } =
            bridge.on_client(now, client, datagram, &mut reply)
        {
            // Four of five are answered, by a Result with the very bytes. A head that just came back may be
            // asked in v5.0.0.
            if !round.is_multiple_of(5) {
                datagram[header] = MsgType::RESULT.0;
                let start = header - version.prefix().len();
                let answer = bridge.on_head(now, head, &mut datagram[start..]);
                delivered += u32::from(matches!(answer, FromHead::Deliver { .. }));
            }
        }
        if round.is_multiple_of(1_000) {
            for head in 0..2 {
                for health in &healths {
                    buffer[..health.len()].copy_from_slice(health);
                    bridge.on_head(now, head, &mut buffer[..health.len()]);
                }
            }
        }
        if round % 25_000 == 24_999 {
            bridge.on_head_refused(now, bridge.current_head());
        }
        while let Some(transmit) = bridge.poll_transmit(now, &mut buffer) {
            assert!(Header::decode_datagram(&buffer[..transmit.len]).is_ok());
        }
    }
    let allocations = ALLOCATIONS.get() - before;
    assert!(
        delivered > 50_000,
        "{delivered} answers: the bridge did not work"
    );
    assert_eq!(allocations, 0);
}
