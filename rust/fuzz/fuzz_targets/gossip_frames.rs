//! Any bytes are a frame, an identity document or a frame's content, or an error; none that a peer did not sign is taken. The
//! first byte says which: bytes laid over a genuine frame, over a genuine document, or signed by a peer as they are.
#![no_main]

use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use libfuzzer_sys::fuzz_target;
use mesh_gossip::{Config, Gossip, Now};
use mesh_identity::{Document, IdentityKey};

static ROOT: LazyLock<IdentityKey> = LazyLock::new(|| IdentityKey::from_seed(&[1; 32]));
static PEER: LazyLock<Arc<IdentityKey>> = LazyLock::new(|| Arc::new(IdentityKey::from_seed(&[2; 32])));
static OWN: LazyLock<Arc<IdentityKey>> = LazyLock::new(|| Arc::new(IdentityKey::from_seed(&[3; 32])));
static DOCUMENT: LazyLock<Vec<u8>> = LazyLock::new(|| document(&PEER));
/// A frame of the peer.
static FRAME: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let now = now();
    let mut peer = node(&PEER, now);
    peer.introduce(&document(&OWN), now).expect("the root signed it");
    peer.sight(("test", "subject", "detail"), now).expect("one");
    peer.poll(now).expect("a rumour").frame
});

fn now() -> Now {
    Now {
        instant: Instant::now(),
        unix: 1_800_000_000,
    }
}

fn document(key: &IdentityKey) -> Vec<u8> {
    let document = Document {
        key: key.public().clone(),
        name: "attic".to_owned(),
        role: "worker".to_owned(),
        mesh: "home".to_owned(),
        root: [4; 32],
        not_before: 1,
        not_after: u64::MAX,
    };
    document.sign(&ROOT)
}

fn node(key: &Arc<IdentityKey>, now: Now) -> Gossip {
    let config = Config {
        interval: Duration::from_secs(1),
        most_peers: 4,
        epoch: now.unix,
        seed: 5,
    };
    Gossip::new(config, key.clone(), ([4; 32], ROOT.public().clone()), now)
}

/// The genuine bytes with others laid over them from a place on.
fn laid_over(genuine: &[u8], data: &[u8]) -> Vec<u8> {
    let Some((place, over)) = data.split_first_chunk::<2>() else {
        return genuine.to_vec();
    };
    let mut bytes = genuine.to_vec();
    let at = usize::from(u16::from_be_bytes(*place)) % bytes.len();
    bytes.truncate(at.max(bytes.len().saturating_sub(over.len())));
    bytes.extend_from_slice(over);
    bytes
}

fuzz_target!(|data: &[u8]| {
    let Some((kind, data)) = data.split_first() else {
        return;
    };
    let now = now();
    let mut own = node(&OWN, now);
    match kind % 4 {
        0 => assert!(own.receive(data, now).is_err()),
        1 => {
            let changed = laid_over(&DOCUMENT, data);
            if own.introduce(&changed, now).is_ok() {
                assert_eq!(own.members(now)[0].node, PEER.node_id());
            }
        }
        2 => {
            own.introduce(&DOCUMENT, now).expect("the root signed it");
            let changed = laid_over(&FRAME, data);
            assert_eq!(own.receive(&changed, now).is_ok(), changed == *FRAME);
        }
        // A member that signs anything: neither a panic nor more than a bounded answer.
        _ => {
            own.introduce(&DOCUMENT, now).expect("the root signed it");
            let mut peer = node(&PEER, now);
            let _ = own.receive(&peer.sign_content(data), now);
            for _ in 0..20 {
                let due = Now {
                    instant: own.next_timeout(),
                    ..now
                };
                let _ = own.poll(due);
            }
            assert!(own.members(now).len() <= 1 && own.records() == 0);
        }
    }
});
