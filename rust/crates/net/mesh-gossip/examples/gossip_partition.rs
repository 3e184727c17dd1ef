//! A mesh that is cut in two halves for 30 s and heals, in simulated time with real signatures: when both
//! sides agree.
//!
//!     cargo run --release -p mesh-gossip --example gossip_partition [NODES]

#[path = "../tests/common/mod.rs"]
mod common;

fn main() {
    let nodes = std::env::args().nth(1).and_then(|text| text.parse().ok());
    common::partition::heals(nodes.unwrap_or(64).max(10));
}
