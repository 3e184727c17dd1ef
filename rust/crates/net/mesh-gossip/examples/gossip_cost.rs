//! Cost of gossip in a mesh of 64 nodes: the part of one core that a node takes, with real signatures and without sleeping.
//!
//!     cargo run --release -p mesh-gossip --example gossip_cost [NODES] [SECONDS]
//!
//! All nodes run in this process in simulated time, as in the tests. The time that their work takes, divided by the
//! simulated time and the number of nodes, is the figure.

#[path = "../tests/common/mod.rs"]
mod common;

use std::time::{Duration, Instant};

use mesh_gossip::Pulse;
use mesh_identity::IdentityKey;

fn main() {
    let argument = |at: usize| std::env::args().nth(at).and_then(|text| text.parse().ok());
    let nodes = argument(1).unwrap_or(64);
    let seconds = argument(2).unwrap_or(20);
    let key = IdentityKey::from_seed(&[1; 32]);
    let repeat = 50;
    let began = Instant::now();
    let mut signature = Vec::new();
    for _ in 0..repeat {
        signature = key.sign(b"cost", &[0; 1024]);
    }
    let sign = began.elapsed() / repeat;
    let began = Instant::now();
    for _ in 0..repeat {
        assert!(key.public().verifies(b"cost", &[0; 1024], &signature));
    }
    let verify = began.elapsed() / repeat;

    let interval = Duration::from_secs(1);
    let mut net = common::Net::new(nodes, interval, 1);
    for node in &mut net.nodes {
        node.set_pulse(Pulse {
            load_percent: Some(10),
            memory_total: Some(1 << 33),
            ..Pulse::default()
        });
    }
    net.run_for(Duration::from_secs(5));
    let sum = |net: &common::Net| {
        let counts = net.nodes.iter().map(|node| node.counts());
        counts.fold((0, 0), |sum, count| {
            (sum.0 + count.sent, sum.1 + count.accepted)
        })
    };
    let at_rest = sum(&net);
    let began = Instant::now();
    net.run_for(Duration::from_secs(seconds as u64));
    let idle = began.elapsed();
    let middle = sum(&net);
    let began = Instant::now();
    for second in 0..seconds {
        let now = net.now();
        let origin = (second * 7) % nodes;
        let subject = format!("subject {}", second % 16);
        net.nodes[origin]
            .sight(("test", &subject, ""), now)
            .expect("few");
        net.drive(origin);
        net.run_for(Duration::from_secs(1));
    }
    let busy = began.elapsed();
    let end = sum(&net);

    let share = |time: Duration| 100.0 * time.as_secs_f64() / (seconds as f64 * nodes as f64);
    let rate = |count: u64| count as f64 / (seconds as f64 * nodes as f64);
    println!("sign {sign:?}, verify {verify:?}");
    println!("{nodes} nodes, interval {interval:?}; frames per node and second");
    for (name, time, before, after) in [
        ("nothing happens", idle, at_rest, middle),
        ("a sighting per second", busy, middle, end),
    ] {
        println!(
            "{name}: {:.3} % of a core per node; {:.2} signed, {:.2} verified",
            share(time),
            rate(after.0 - before.0),
            rate(after.1 - before.1)
        );
    }
}
