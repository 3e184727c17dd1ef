//! Random and mutated frames, thrown at one node.

use std::time::Duration;

use mesh_gossip::{Gossip, Now};

/// Outcome of a flood.
pub(crate) struct Flood {
    pub(crate) accepted: u64,
    pub(crate) refused: u64,
    /// Frames whose signature was looked at.
    pub(crate) verified: u64,
}

/// Throws frames at a node: random bytes, genuine frames with changes at random places, cut ones, and genuine ones again.
/// `genuine` were all taken before. A frame comes every 2 ms.
pub(crate) fn flood(node: &mut Gossip, genuine: &[Vec<u8>], frames: u64, start: Now) -> Flood {
    let mut random = fastrand::Rng::with_seed(77);
    let before = node.counts();
    let mut now = start;
    let mut bytes = Vec::new();
    for number in 0..frames {
        now.instant += Duration::from_millis(2);
        now.unix = start.unix + number / 500;
        bytes.clear();
        let source = &genuine[random.usize(..genuine.len())];
        match number % 4 {
            0 => {
                let length = random.usize(..6000);
                bytes.extend(std::iter::repeat_with(|| random.u8(..)).take(length));
            }
            1 => {
                bytes.extend_from_slice(source);
                bytes.truncate(random.usize(..source.len()));
            }
            2 => bytes.extend_from_slice(source),
            _ => {
                bytes.extend_from_slice(source);
                // Often a fresh counter, so that the signature decides.
                if random.bool() {
                    bytes[74] = random.u8(1..);
                }
                for _ in 0..random.usize(1..8) {
                    let at = random.usize(..bytes.len());
                    bytes[at] ^= random.u8(1..);
                }
            }
        }
        let _ = node.receive(&bytes, now);
        while node.poll(now).is_some() {}
        while node.poll_event().is_some() {}
    }
    let after = node.counts();
    let signature = |counts: mesh_gossip::Counts| {
        counts.refused_for(mesh_gossip::Refusal::Signature) + counts.accepted
    };
    Flood {
        accepted: after.accepted - before.accepted,
        refused: after.all_refused() - before.all_refused(),
        verified: signature(after) - signature(before),
    }
}

/// A node that has taken frames of its peers, and those frames.
pub(crate) fn victim() -> (Gossip, Vec<Vec<u8>>, Now) {
    let mut net = super::Net::new(4, Duration::from_secs(1), 8);
    net.record = true;
    for node in 1..4 {
        let (now, name) = (net.now(), format!("subject {node}"));
        net.nodes[node]
            .sight(("test", &name, ""), now)
            .expect("one");
        net.nodes[node]
            .remember(name.as_bytes(), b"value", Duration::from_secs(86400), now)
            .expect("one");
        net.drive(node);
    }
    net.run_for(Duration::from_secs(4));
    let now = net.now();
    (
        net.nodes.swap_remove(0),
        std::mem::take(&mut net.recorded),
        now,
    )
}
