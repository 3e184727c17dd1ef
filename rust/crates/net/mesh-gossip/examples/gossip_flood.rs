//! A million random, changed, cut and repeated frames at one node. Prints how many were accepted and the peak of memory.
//!
//!     cargo run --release -p mesh-gossip --example gossip_flood [FRAMES]

#[path = "../tests/common/mod.rs"]
mod common;

use std::time::Instant;

use common::hostile::{flood, victim};

fn main() {
    let frames = std::env::args().nth(1).and_then(|text| text.parse().ok());
    let frames: u64 = frames.unwrap_or(1_000_000);
    let (mut node, genuine, start) = victim();
    let warm = flood(&mut node, &genuine, frames / 20, start);
    let (before, digest) = (peak_kib(), node.digest());
    let later = mesh_gossip::Now {
        instant: start.instant + std::time::Duration::from_millis(2 * (frames / 20)),
        unix: start.unix + frames / 20 / 500,
    };
    let began = Instant::now();
    let flooded = flood(&mut node, &genuine, frames - frames / 20, later);
    let took = began.elapsed();
    println!(
        "{frames} frames: accepted {}, refused {}, {} signatures verified",
        warm.accepted + flooded.accepted,
        warm.refused + flooded.refused,
        warm.verified + flooded.verified
    );
    let mean = took / u32::try_from(frames - frames / 20).expect("a few million");
    println!("mean cost of a frame {mean:?}");
    println!(
        "peak memory {before} KiB after a twentieth, {} KiB at the end",
        peak_kib()
    );
    println!("records unchanged: {}", node.digest() == digest);
}

/// Peak of this process's resident memory.
fn peak_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let number = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    number.unwrap_or(0)
}
