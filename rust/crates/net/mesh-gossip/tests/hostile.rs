//! Frames, documents and records of attackers.

mod common;

use std::time::Duration;

use common::hostile::{flood, victim};
use common::{MESH, Net, START, document, key, node, root};
use mesh_gossip::{Config, Gossip, Now, Refusal};

fn now() -> Now {
    Now {
        instant: std::time::Instant::now(),
        unix: START,
    }
}

#[test]
fn random_changed_and_repeated_frames_change_nothing_and_are_counted() {
    let (mut node, genuine, start) = victim();
    let (digest, records) = (node.digest(), node.records());
    assert!(genuine.len() > 5 && records == 6);
    let flooded = flood(&mut node, &genuine, 20_000, start);
    assert_eq!((flooded.accepted, flooded.refused), (0, 20_000));
    assert!(flooded.verified > 500, "{}", flooded.verified);
    assert_eq!((node.digest(), node.records()), (digest, records));
    let counts = node.counts();
    for reason in [
        Refusal::Length,
        Refusal::Version,
        Refusal::Stranger,
        Refusal::Replay,
        Refusal::Rate,
        Refusal::Signature,
    ] {
        assert!(counts.refused_for(reason) > 0, "{reason:?}");
    }
}

#[test]
fn only_documents_that_the_root_signed_for_this_mesh_admit_a_peer() {
    let now = now();
    let mut node = node(0, Duration::from_secs(1), now);
    let peer = key(1);
    let good = document(&peer, "attic", START + 60);
    let mut changed = good.clone();
    changed[2000] ^= 1;
    assert_eq!(node.introduce(&changed, now), Err(Refusal::Document));
    assert_eq!(node.introduce(b"junk", now), Err(Refusal::Document));
    let past = document(&peer, "attic", START);
    assert_eq!(node.introduce(&past, now), Err(Refusal::Expired));
    let own = document(&key(0), "me", START + 60);
    assert_eq!(node.introduce(&own, now), Err(Refusal::Own));
    assert_eq!(node.introduce(&good, now), Ok(peer.node_id()));
    assert_eq!(node.members(now)[0].name, "attic");
    assert_eq!(node.counts().refused_for(Refusal::Document), 2);

    let config = Config {
        interval: Duration::from_secs(1),
        most_peers: 1,
        epoch: START,
        seed: 1,
    };
    let root = root().public().clone();
    let mut elsewhere = Gossip::new(config, key(0), ([8; 32], root.clone()), now);
    assert_eq!(elsewhere.introduce(&good, now), Err(Refusal::Mesh));
    let mut small = Gossip::new(config, key(0), (MESH, root), now);
    assert_eq!(small.introduce(&good, now), Ok(peer.node_id()));
    let second = document(&key(2), "barn", START + 60);
    assert_eq!(small.introduce(&second, now), Err(Refusal::Full));
    // A document that ended makes room.
    let later = Now {
        unix: START + 61,
        ..now
    };
    let second = document(&key(2), "barn", START + 120);
    assert_eq!(small.introduce(&second, later), Ok(key(2).node_id()));
}

#[test]
fn frames_of_other_meshes_strangers_expired_and_dismissed_peers_are_refused() {
    let mut net = Net::new(3, Duration::from_secs(1), 9);
    net.record = true;
    let at = net.now();
    net.nodes[1].sight(("test", "subject", ""), at).unwrap();
    net.drive(1);
    net.run_for(Duration::from_secs(3));
    let frame = net.recorded.pop().unwrap();
    let now = net.now();
    let config = Config {
        interval: Duration::from_secs(1),
        most_peers: 8,
        epoch: START,
        seed: 1,
    };
    let root = root().public().clone();
    let mut other_mesh = Gossip::new(config, key(5), ([8; 32], root.clone()), now);
    assert_eq!(other_mesh.receive(&frame, now), Err(Refusal::Mesh));
    let mut stranger = Gossip::new(config, key(5), (MESH, root), now);
    assert_eq!(stranger.receive(&frame, now), Err(Refusal::Stranger));
    for number in 0..3 {
        let document = document(&key(number), "node", now.unix + 60);
        stranger.introduce(&document, now).unwrap();
    }
    let later = Now {
        unix: now.unix + 61,
        ..now
    };
    assert_eq!(stranger.receive(&frame, later), Err(Refusal::Expired));
    assert_eq!(stranger.receive(&frame, now), Ok(()));
    assert_eq!(stranger.receive(&frame, now), Err(Refusal::Replay));

    // An expelled node's records go with it.
    let (expelled, records) = (net.keys[1].node_id(), net.nodes[0].records());
    assert_eq!(records, 1);
    net.nodes[0].dismiss(expelled, now);
    assert_eq!(net.nodes[0].records(), 0);
    let before = net.nodes[0].counts().refused_for(Refusal::Stranger);
    net.nodes[2].dismiss(expelled, now);
    net.run_for(Duration::from_secs(3));
    assert!(net.nodes[0].counts().refused_for(Refusal::Stranger) > before);
    assert_eq!(net.nodes[0].records(), 0);
}

#[test]
fn a_node_publishes_a_bounded_number_of_records() {
    let now = now();
    let mut node = node(0, Duration::from_secs(1), now);
    let day = Duration::from_secs(86400);
    for number in 0..16_u8 {
        node.remember(&[number + 1], b"value", day, now).unwrap();
    }
    assert!(node.remember(b"one more", b"value", day, now).is_err());
    // Another version of one that is there has room, and an unchanged one is not signed again.
    node.remember(&[1], b"other", day, now).unwrap();
    let version = |node: &Gossip| node.memory().iter().map(|record| record.version).max();
    let newest = version(&node);
    node.remember(&[1], b"other", day, now).unwrap();
    assert_eq!(version(&node), newest);
    assert!(node.remember(&[0; 65], b"", day, now).is_err());
    assert!(node.remember(b"", b"", day, now).is_err());
    assert!(node.remember(&[1], &[0; 1025], day, now).is_err());
}
