//! Any datagrams from clients and heads at any time: the bridge stands, and a stranger gets no more than it sent.
#![no_main]

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use libfuzzer_sys::fuzz_target;
use mesh_shim::{
    Config,
    bridge::{Bridge, Destination, FromClient, FromHead, Reply, Secrets},
    config::Admit,
};

fuzz_target!(|data: Vec<(u8, u16, Vec<u8>)>| {
    let config = Config {
        heads: vec!["a:1".into(), "b:1".into()],
        admit: Admit::Verified,
        max_tasks: 8,
        retain_bytes: 8 << 10,
        ..Config::default()
    };
    let secrets = Secrets {
        cookie_key: [3; 32],
        first_generation: 0,
    };
    let stranger = SocketAddr::from(([203, 0, 113, 1], 1));
    let mut now = Instant::now();
    let mut bridge = Bridge::new(config, &secrets, Arc::default(), now);
    let (mut reply, mut buffer) = (Reply::empty(), vec![0; 1 << 16]);
    let (mut received, mut sent) = (0, 0);
    for (action, pause_ms, mut datagram) in data {
        now += Duration::from_millis(pause_ms.into());
        match action % 8 {
            0..=2 => {
                let trusted = SocketAddr::from(([127, 0, 0, 1], 1 + u16::from(action / 8)));
                if let FromClient::Forward { len, .. } =
                    bridge.on_client(now, trusted, &mut datagram, &mut reply)
                {
                    assert!(len <= datagram.len());
                }
            }
            3 | 4 => {
                received += datagram.len();
                if bridge.on_client(now, stranger, &mut datagram, &mut reply) == FromClient::Reply {
                    sent += reply.as_bytes().len();
                }
            }
            5 | 6 => {
                let head = usize::from(action / 8 % 2);
                if let FromHead::Deliver { len, .. } = bridge.on_head(now, head, &mut datagram) {
                    assert!(len <= datagram.len());
                }
            }
            _ => bridge.on_head_refused(now, usize::from(action / 8 % 2)),
        }
        while let Some(transmit) = bridge.poll_transmit(now, &mut buffer) {
            assert!(transmit.len <= buffer.len());
            if transmit.to == Destination::Client(stranger) {
                sent += transmit.len;
            }
        }
        // No input finds a cookie by chance, so the stranger stays one.
        assert!(sent <= received);
    }
});
