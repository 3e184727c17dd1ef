use mesh_proto::{RingPurpose, RingStage};

use super::*;
use crate::testing::seat;

fn ring(id: u64, epoch: u32, members: &[&str]) -> Ring {
    let stages = members.iter().map(|member| RingStage {
        member: Some(seat(member)),
        ..RingStage::default()
    });
    Ring {
        ring: id,
        epoch,
        stages: stages.collect(),
        ..Ring::default()
    }
}

fn hello(ring: u64) -> RingHello {
    RingHello {
        ring,
        epoch: 1,
        stage: 0,
        purpose: RingPurpose::Rows.into(),
    }
}

fn own() -> Deployments<u32> {
    let mut deployments = Deployments::default();
    deployments.identify("own".to_owned());
    deployments
}

/// Steps of a deployment until it waits or ends.
fn steps(deployments: &mut Deployments<u32>, number: u64, now: Instant) -> Vec<RingStep<u32>> {
    let mut steps = Vec::new();
    loop {
        let polled = deployments.poll(number, now, |_| PartState::default(), || None);
        match polled.0 {
            RingStep::Wait(_) => return steps,
            RingStep::End => {
                steps.push(RingStep::End);
                return steps;
            }
            step => steps.push(step),
        }
    }
}

#[test]
fn only_an_offered_model_is_deployed_and_only_by_a_worker_with_an_identity() {
    let now = Instant::now();
    let mut deployments = Deployments::<u32>::default();
    let order = ring(7, 1, &["own", "b"]);
    assert_eq!(
        deployments.order(order.clone(), true, now),
        Ordered::Refused
    );
    deployments.identify("own".to_owned());
    assert_eq!(
        deployments.order(order.clone(), false, now),
        Ordered::Refused
    );
    assert_eq!(
        deployments.order(order.clone(), true, now),
        Ordered::Begins(0)
    );
    assert_eq!(deployments.order(order, false, now), Ordered::Known);
    let unknown = ring(8, 1, &[]);
    assert_eq!(deployments.order(unknown, true, now), Ordered::Refused);
}

#[test]
fn a_ring_that_ends_and_comes_back_is_another_deployment() {
    let now = Instant::now();
    let mut deployments = own();
    deployments.order(ring(7, 1, &["own", "b"]), true, now);
    assert_eq!(deployments.shared(), 1);
    deployments.head_lost();
    assert_eq!(deployments.shared(), 0);
    // The first one has not been polled to its end yet.
    let again = deployments.order(ring(7, 1, &["own", "b"]), true, now);
    assert_eq!(again, Ordered::Begins(1));
    assert_eq!(steps(&mut deployments, 0, now).last(), Some(&RingStep::End));
    assert_ne!(steps(&mut deployments, 1, now).last(), Some(&RingStep::End));
    // What is left of the first one says nothing to the second.
    assert!(deployments.get(0).is_none());
    assert!(steps(&mut deployments, 1, now).is_empty());
    let moved = deployments.order(ring(7, 2, &["b", "c"]), true, now);
    assert_eq!(moved, Ordered::Known);
    assert_eq!(steps(&mut deployments, 1, now).last(), Some(&RingStep::End));
    assert!(deployments.all.is_empty());
}

#[test]
fn a_stream_waits_for_the_head_to_name_its_ring_but_not_for_ever() {
    let mut now = Instant::now();
    let mut deployments = own();
    assert!(
        deployments
            .stream_came(hello(7), "b".to_owned(), 1, now)
            .is_empty()
    );
    assert!(
        deployments
            .stream_came(hello(8), "b".to_owned(), 2, now)
            .is_empty()
    );
    now += Duration::from_secs(9);
    deployments.order(ring(7, 1, &["b", "own"]), true, now);
    assert_eq!(deployments.strays.len(), 1);
    now += Duration::from_secs(1);
    assert_eq!(deployments.expire_strays(now), [2]);
    // The deployment has the first one, and refuses it with its end.
    deployments.head_lost();
    let steps = steps(&mut deployments, 0, now);
    assert!(steps.contains(&RingStep::Refuse(1)), "{steps:?}");
}

#[test]
fn a_flood_of_streams_for_unknown_rings_is_bounded() {
    let now = Instant::now();
    let mut deployments = own();
    let mut refused = Vec::new();
    for stream in 0..1000 {
        let peer = format!("peer {}", stream % 100);
        refused.extend(deployments.stream_came(hello(stream.into()), peer, stream, now));
    }
    assert_eq!(deployments.strays.len(), MOST_STRAYS);
    assert_eq!(refused.len(), 1000 - MOST_STRAYS);
    assert_eq!(refused[0], 0, "the oldest goes first");
}

#[test]
fn a_flood_of_streams_from_one_member_leaves_those_of_others() {
    let now = Instant::now();
    let mut deployments = own();
    let early = deployments.stream_came(hello(7), "b".to_owned(), 1000, now);
    assert!(early.is_empty());
    let mut refused = Vec::new();
    for stream in 0..1000 {
        let peer = "flood".to_owned();
        refused.extend(deployments.stream_came(hello(stream.into()), peer, stream, now));
    }
    assert_eq!(deployments.strays.len(), MOST_STRAYS_OF_ONE + 1);
    assert_eq!(refused.len(), 1000 - MOST_STRAYS_OF_ONE);
    assert_eq!(refused[0], 0, "the oldest goes first");
    assert!(!refused.contains(&1000));
    deployments.order(ring(7, 1, &["b", "own"]), true, now);
    deployments.head_lost();
    let steps = steps(&mut deployments, 0, now);
    assert!(steps.contains(&RingStep::Refuse(1000)), "{steps:?}");
}

#[test]
fn a_drain_waits_for_shared_rings_that_have_requests() {
    let mut now = Instant::now();
    let mut deployments = own();
    assert!(deployments.may_leave(now, now) && deployments.is_idle(now));
    deployments.order(ring(1, 1, &["own", "own"]), true, now);
    assert!(deployments.may_leave(now, now), "nobody can take it over");
    deployments.order(ring(2, 1, &["own", "b"]), true, now);
    let begun = now;
    assert!(!deployments.may_leave(begun, now));
    now += Duration::from_secs(2);
    deployments.active(now);
    assert!(!deployments.is_idle(now));
    now += Duration::from_secs(2);
    assert!(!deployments.may_leave(begun, now));
    now += Duration::from_secs(1);
    assert!(deployments.may_leave(begun, now) && deployments.is_idle(now));
    // Or the head has moved its parts.
    deployments.active(now);
    assert!(!deployments.may_leave(begun, now));
    deployments.order(ring(2, 2, &["c", "b"]), true, now);
    assert!(deployments.may_leave(begun, now));
}
