//! What workers offer to rings and say of their parts in them, in any bytes: the head plans with it or leaves it out, and its work is bounded.
#![no_main]

use std::time::{Duration, Instant};

use libfuzzer_sys::fuzz_target;
use mesh_control::rings::{Action, Arrival, Rings, Settings};
use mesh_proto::{Offer, RingState};
use prost::Message;

const NODES: [&str; 4] = ["a", "b", "c", "d"];

fuzz_target!(|parts: Vec<(u8, Vec<u8>)>| {
    let mut rings = Rings::new(Settings::default(), 1);
    let mut now = Instant::now();
    for node in NODES {
        let arrival = Arrival {
            name: node.to_owned(),
            whole: Vec::new(),
            head_ip: None,
        };
        rings.joined(node, arrival, now);
    }
    for (kind, body) in parts.into_iter().take(64) {
        let node = NODES[usize::from(kind) % NODES.len()];
        match kind / 4 % 4 {
            0 | 1 => {
                if let Ok(offer) = Offer::decode(body.as_slice()) {
                    let address = ([10, 0, 0, kind % 4], 7781).into();
                    rings.offered(node, address, offer, now);
                }
            }
            2 => {
                if let Ok(state) = RingState::decode(body.as_slice()) {
                    rings.state(node, state, now);
                }
            }
            _ => {
                rings.left(node, "it is tired", now);
                let arrival = Arrival {
                    name: node.to_owned(),
                    whole: vec![String::from_utf8_lossy(&body).into_owned()],
                    head_ip: None,
                };
                rings.joined(node, arrival, now);
            }
        }
        now += Duration::from_millis(700);
        let actions: Vec<Action> = rings.poll(now);
        assert!(actions.len() < 1000);
        let _ = (rings.view(now), rings.unformed(), rings.not_serving());
        let _ = rings.next_timer();
    }
});
