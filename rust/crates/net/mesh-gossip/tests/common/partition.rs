//! A mesh that is cut in two halves for 30 s.

use std::time::Duration;

use mesh_gossip::MemberState;

use super::Net;

const SECOND: Duration = Duration::from_secs(1);

/// Cuts a mesh of so many nodes, at least 10, for 30 s in which both sides publish. Panics if they do not
/// agree afterwards.
pub(crate) fn heals(nodes: usize) {
    let last = nodes - 1;
    let mut net = Net::new(nodes, SECOND, 3);
    net.run_for(5 * SECOND);
    net.cut = Some(nodes / 2);
    net.run_for(10 * SECOND);
    for number in 0..10 {
        let publisher = number * last / 9;
        let now = net.now();
        let node = &mut net.nodes[publisher];
        let name = format!("record {number}");
        node.remember(name.as_bytes(), b"one", 3600 * SECOND, now)
            .unwrap();
        if number % 6 == 0 {
            node.sight(("test", &name, ""), now).unwrap();
            node.remember(name.as_bytes(), b"two", 3600 * SECOND, now)
                .unwrap();
        }
        net.drive(publisher);
    }
    net.run_for(20 * SECOND);
    let now = net.now();
    let down = |net: &Net, node: usize, other: usize| {
        let other = net.keys[other].node_id();
        let members = net.nodes[node].members(now);
        let member = members.into_iter().find(|member| member.node == other);
        member.unwrap().state == MemberState::Down
    };
    assert!(
        down(&net, 0, last) && down(&net, last, 0),
        "the sides miss each other"
    );
    assert!(!down(&net, 0, 4) && !down(&net, last, last - 2));
    assert_ne!(net.nodes[0].digest(), net.nodes[last].digest());

    net.cut = None;
    let healed = net.time;
    let agree = |net: &Net| {
        let digest = net.nodes[0].digest();
        net.nodes.iter().all(|node| node.digest() == digest)
    };
    assert!(
        net.run_until(healed + 30 * SECOND, agree),
        "records differ after 30 s"
    );
    println!("records agree {:?} after the partition", net.time - healed);
    assert!(
        net.nodes
            .iter()
            .all(|node| node.memory().len() == 10 && node.sightings().len() == 2)
    );
    let value = |node: usize, name: &str| {
        let memory = net.nodes[node].memory();
        let record = memory
            .into_iter()
            .find(|record| record.name == name.as_bytes());
        record.unwrap().value
    };
    assert_eq!(
        (value(last, "record 0"), value(0, "record 6")),
        (b"two".to_vec(), b"two".to_vec())
    );
    let all_alive = |net: &Net| {
        net.nodes.iter().all(|node| {
            let members = node.members(net.now());
            members
                .iter()
                .all(|member| member.state == MemberState::Alive)
        })
    };
    assert!(
        net.run_until(healed + 40 * SECOND, all_alive),
        "members differ after 40 s"
    );
    println!("members agree {:?} after the partition", net.time - healed);
}
