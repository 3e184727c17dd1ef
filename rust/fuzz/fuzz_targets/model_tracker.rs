//! What workers say about the models that they hold and seek, in any bytes: the tracker takes it or leaves it out, and what it then
//! tells others makes sense.
#![no_main]

use std::time::{Duration, Instant};

use libfuzzer_sys::fuzz_target;
use mesh_control::tracker::{Action, Tracker};
use mesh_proto::Models;
use mesh_share::PieceSet;
use prost::Message;

fuzz_target!(|data: &[u8]| {
    let mut tracker = Tracker::new();
    let mut now = Instant::now();
    for worker in ["a", "b", "c"] {
        tracker.joined(worker, worker, None);
    }
    for (index, part) in data.chunks(256).enumerate() {
        let Ok(models) = Models::decode(part) else {
            continue;
        };
        let worker = ["a", "b", "c"][index % 3];
        tracker.said(worker, "10.0.0.1:7781".parse().ok(), models, now);
        for action in tracker.poll(now) {
            if let Action::Tell { node, sources } = action {
                for model in sources.models {
                    assert!(model.holders.iter().all(|addr| addr.node_id != node));
                    if let Some(pieces) = model.for_others {
                        PieceSet::from_proto(&pieces).expect("a set of its own");
                    }
                }
            }
        }
        now += Duration::from_secs(7);
        let _ = tracker.view();
    }
});
