//! Meshes in simulated time, with real signatures.

mod common;

use std::time::Duration;

use common::{Net, START};
use mesh_gossip::{MemberState, Pulse, Refusal};

const SECOND: Duration = Duration::from_secs(1);

/// Delays until the nodes of a mesh of 64 learn of sightings, sorted.
fn delays(net: &mut Net, name: &str, sightings: usize) -> Vec<Duration> {
    let mut delays = Vec::new();
    for number in 0..sightings {
        let subject = format!("{name} {number}");
        let (origin, began) = ((number * 17) % net.nodes.len(), net.time);
        let now = net.now();
        net.nodes[origin]
            .sight(("test", &subject, ""), now)
            .unwrap();
        net.drive(origin);
        net.run_for(Duration::from_millis(2100));
        let heard = net.heard_of(&subject);
        assert_eq!(
            heard.len(),
            net.nodes.len() - 1,
            "{subject} did not reach every node"
        );
        for (node, times) in heard {
            assert_eq!(
                times.len(),
                1,
                "node {node} was told of {subject} more than once"
            );
            delays.push(times[0] - began);
        }
    }
    delays.sort();
    delays
}

fn p99(delays: &[Duration]) -> Duration {
    delays[delays.len() * 99 / 100]
}

#[test]
fn a_sighting_reaches_64_nodes_within_a_second_and_within_two_when_frames_are_lost_and_forged() {
    let mut net = Net::new(64, 4 * SECOND, 1);
    let undisturbed = delays(&mut net, "undisturbed", 1);
    println!("p99 {:?}, last {:?}", p99(&undisturbed), undisturbed.last());
    assert!(p99(&undisturbed) <= SECOND);

    (net.loss, net.forged) = (0.1, 0.1);
    let disturbed = delays(&mut net, "disturbed", 1);
    println!(
        "with loss and forgeries p99 {:?}, last {:?}",
        p99(&disturbed),
        disturbed.last()
    );
    assert!(p99(&disturbed) <= 2 * SECOND);
    // Every forged frame that arrived was counted, and none was taken.
    let refused: u64 = net
        .nodes
        .iter()
        .map(|node| node.counts().all_refused())
        .sum();
    assert!(net.forgeries > 30, "{}", net.forgeries);
    net.forged = 0.0;
    net.run_for(Duration::from_millis(20));
    let at_end: u64 = net
        .nodes
        .iter()
        .map(|node| node.counts().all_refused())
        .sum();
    assert!(refused <= net.forgeries);
    assert_eq!(at_end, net.forgeries);
    let signatures: u64 = net
        .nodes
        .iter()
        .map(|node| node.counts().refused_for(Refusal::Signature))
        .sum();
    assert!(signatures > 0);
    for node in &net.nodes {
        assert_eq!(node.sightings().len(), 2, "no forged sighting is known");
    }
}

#[test]
fn a_partition_of_30_s_heals_and_both_sides_agree() {
    common::partition::heals(10);
}

#[test]
fn a_silent_node_is_suspected_and_taken_for_dead_and_comes_back() {
    let mut net = Net::new(4, SECOND, 4);
    net.run_for(6 * SECOND);
    let state = |net: &Net| {
        let dead = net.keys[0].node_id();
        let members = net.nodes[3].members(net.now());
        members
            .into_iter()
            .find(|member| member.node == dead)
            .unwrap()
            .state
    };
    assert_eq!(state(&net), MemberState::Alive);
    net.cut = Some(1);
    let down = |net: &Net| state(net) == MemberState::Down;
    assert!(net.run_until(net.time + 40 * SECOND, down));
    net.cut = None;
    let alive = |net: &Net| state(net) == MemberState::Alive;
    assert!(net.run_until(net.time + 30 * SECOND, alive));
}

#[test]
fn a_fleet_pulse_comes_from_the_machines_themselves_and_ages() {
    let mut net = Net::new(5, SECOND, 5);
    for (number, node) in (1..).zip(&mut net.nodes) {
        node.set_pulse(Pulse {
            load_percent: Some(10 * number),
            memory_total: Some(1 << 30),
            ..Pulse::default()
        });
    }
    net.run_for(10 * SECOND);
    let fleet = net.nodes[0].fleet(net.now());
    assert_eq!((fleet.nodes, fleet.memory_total), (5, 5 << 30));
    let load = fleet.load_percent.unwrap();
    assert_eq!((load.least, load.mean, load.most), (10.0, 30.0, 50.0));
    net.cut = Some(1);
    net.run_for(16 * SECOND);
    assert_eq!(net.nodes[0].fleet(net.now()).nodes, 1);
}

#[test]
fn sightings_and_records_end_and_are_withdrawn() {
    let mut net = Net::new(4, SECOND, 6);
    let now = net.now();
    net.nodes[0]
        .sight(("expelled", "somebody", "by the operator"), now)
        .unwrap();
    net.nodes[0]
        .remember(b"short", b"life", 5 * SECOND, now)
        .unwrap();
    net.run_for(3 * SECOND);
    for node in &net.nodes {
        assert_eq!((node.sightings().len(), node.memory().len()), (1, 1));
    }
    let now = net.now();
    net.nodes[0].withdraw("expelled", "somebody", now).unwrap();
    net.run_for(5 * SECOND);
    for node in &net.nodes {
        assert_eq!((node.sightings().len(), node.memory().len()), (0, 0));
        assert_eq!(node.records(), 1, "the withdrawal itself is remembered");
    }
    // A sighting that was withdrawn can be told again.
    let now = net.now();
    net.nodes[0]
        .sight(("expelled", "somebody", ""), now)
        .unwrap();
    net.run_for(3 * SECOND);
    assert!(net.nodes.iter().all(|node| node.sightings().len() == 1));
    assert!(net.now().unix > START);
}
