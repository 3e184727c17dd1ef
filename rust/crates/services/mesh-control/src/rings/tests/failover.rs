use super::*;

/// Three workers with a stage each and one without, which stands by for as many as it can.
fn three_and_a_spare() -> Mesh {
    Mesh::serving(
        |settings| settings.stages = Some(3),
        &[("a", 5), ("b", 5), ("c", 5), ("s", 15)],
    )
}

/// Member and standby of every stage by its index.
fn assignment(mesh: &Mesh) -> Vec<(String, Option<String>)> {
    mesh.members().into_iter().zip(mesh.standbys()).collect()
}

#[test]
fn a_lost_stage_goes_to_its_standby_in_the_next_epoch() {
    let mut mesh = three_and_a_spare();
    let before = assignment(&mesh);
    let (lost, standby) = before[1].clone();
    let standby = standby.expect("a standby for the middle stage");
    let ring = mesh.id();
    mesh.leave(&[&lost]);
    let view = mesh.ring();
    assert_eq!((view.epoch, &*view.state), (2, "recovering"));
    assert_eq!(mesh.id(), ring, "the ring lives on");
    assert_eq!(mesh.members()[1], standby);
    assert!(
        view.reason.contains(&format!("worker-{lost} is lost")),
        "{}",
        view.reason
    );
    for told in mesh.told.values() {
        assert_eq!(told.epoch, 2);
    }
    assert_eq!(
        view.stages[1].member.phase, "ready",
        "it holds the layers already"
    );
    mesh.check();
    mesh.all_work();
    assert_eq!(mesh.ring().state, "serving");
    assert_eq!(mesh.failovers(), 1);
}

#[test]
fn two_adjacent_stages_lost_at_once_cost_one_epoch() {
    let mut mesh = three_and_a_spare();
    let members = mesh.members();
    mesh.leave(&[&members[0], &members[1]]);
    assert_eq!(mesh.ring().epoch, 2, "one epoch for both");
    assert_eq!(mesh.failovers(), 1);
    assert!(
        mesh.members()
            .iter()
            .all(|node| !members[..2].contains(node))
    );
    mesh.check();
}

#[test]
fn a_stage_lost_with_its_standby_goes_to_whoever_has_room() {
    let mut mesh = Mesh::serving(
        |settings| settings.stages = Some(2),
        &[("a", 7), ("b", 7), ("s", 14), ("t", 7)],
    );
    let (member, standby) = assignment(&mesh)[0].clone();
    let standby = standby.expect("a standby");
    let ring = mesh.id();
    mesh.leave(&[&member, &standby]);
    mesh.check();
    let view = mesh.ring();
    assert!(!mesh.members().contains(&member) && !mesh.members().contains(&standby));
    if mesh.id() == ring {
        assert_eq!(view.epoch, 2);
        assert!(view.reason.contains("loads them"), "{}", view.reason);
    }
    mesh.all_work();
    assert_eq!(mesh.ring().state, "serving");
}

#[test]
fn a_dissolved_ring_says_who_is_lost_and_what_memory_is_missing() {
    let mut mesh = Mesh::serving(|_| {}, &[("a", 7), ("b", 7)]);
    let driver = mesh.members()[1].clone();
    let other = mesh.members()[0].clone();
    let ring = mesh.id();
    mesh.leave(&[&driver]);
    let told = &mesh.told[&(other, ring)];
    assert!(told.stages.is_empty());
    assert_eq!(told.epoch, 2);
    assert!(
        !told.reason.starts_with("moved"),
        "requests end with an error: {}",
        told.reason
    );
    for part in [&format!("worker-{driver} is lost"), "MiB", "6..12"] {
        assert!(
            told.reason.contains(part),
            "{part} is not in {}",
            told.reason
        );
    }
    assert!(mesh.serving.is_empty(), "withdrawn");
}

#[test]
fn a_ring_moves_as_a_whole_where_only_the_rest_together_can_hold_it() {
    let mut mesh = Mesh::serving(
        |settings| settings.standbys = false,
        &[("a", 5), ("b", 5), ("c", 5)],
    );
    let ring = mesh.id();
    // Room for the whole model in two halves, and for no third part beside what they hold.
    mesh.offer("a", 7, |_| {});
    mesh.offer("b", 7, |_| {});
    mesh.leave(&["c"]);
    assert_ne!(mesh.id(), ring);
    assert_eq!((mesh.ring().epoch, mesh.members().len()), (1, 2));
    for node in ["a", "b"] {
        let told = &mesh.told[&(node.to_owned(), ring)];
        assert!(told.stages.is_empty());
        assert!(
            told.reason.starts_with("moved: worker worker-c is lost"),
            "{}",
            told.reason
        );
    }
    assert_eq!(
        mesh.rings.prospects()[MODEL],
        Prospect::Coming,
        "requests wait"
    );
    mesh.check();
}

#[test]
fn a_lost_standby_is_replaced_in_the_same_epoch() {
    let mut mesh = Mesh::serving(
        |settings| settings.stages = Some(2),
        &[("a", 7), ("b", 7), ("s", 14), ("t", 14)],
    );
    let members = mesh.members();
    let standby = mesh.standbys()[0].clone().unwrap();
    mesh.leave(&[&standby]);
    let view = mesh.ring();
    assert_eq!(
        (view.epoch, &*view.state),
        (1, "serving"),
        "nothing that runs is disturbed"
    );
    assert_eq!(mesh.members(), members);
    assert!(
        mesh.standbys()
            .iter()
            .all(|other| other.as_ref() != Some(&standby))
    );
    assert!(mesh.standbys()[0].is_some(), "somebody else has room");
    assert_eq!(mesh.failovers(), 0);
    mesh.check();
}

#[test]
fn a_standby_lost_while_it_is_promoted_costs_another_epoch() {
    let mut mesh = Mesh::serving(
        |settings| settings.stages = Some(2),
        &[("a", 7), ("b", 7), ("s", 14), ("t", 14)],
    );
    let (member, standby) = assignment(&mesh)[0].clone();
    let standby = standby.unwrap();
    let ring = mesh.id();
    mesh.leave(&[&member]);
    assert_eq!(mesh.members()[0], standby);
    mesh.leave(&[&standby]);
    assert_eq!((mesh.id(), mesh.ring().epoch), (ring, 3));
    assert!(
        mesh.members()
            .iter()
            .all(|node| *node != standby && *node != member)
    );
    mesh.check();
    mesh.all_work();
    assert_eq!(mesh.ring().state, "serving");
}

#[test]
fn a_lost_driver_is_withdrawn_and_the_new_one_serves_when_it_says_so() {
    let mut mesh = three_and_a_spare();
    let (driver, standby) = assignment(&mesh)[2].clone();
    let standby = standby.unwrap();
    let ring = mesh.id();
    assert_eq!(mesh.serving[&(driver.clone(), MODEL.to_owned())], ring);
    mesh.leave(&[&driver]);
    assert!(mesh.serving.is_empty());
    assert_eq!(
        mesh.rings.prospects()[MODEL],
        Prospect::Coming,
        "requests wait"
    );
    assert_eq!(mesh.rings.serves_since(ring, &driver), None);
    assert_eq!(mesh.rings.serves_since(ring, &standby), Some(None));
    mesh.all_work();
    assert_eq!(mesh.serving[&(standby, MODEL.to_owned())], ring);
}

#[test]
fn driver_and_first_stage_lost_together_go_to_their_standbys() {
    let mut mesh = three_and_a_spare();
    let before = assignment(&mesh);
    mesh.leave(&[&before[0].0, &before[2].0]);
    assert_eq!(mesh.ring().epoch, 2);
    let now = mesh.members();
    assert_eq!(
        (Some(&now[0]), Some(&now[2])),
        (before[0].1.as_ref(), before[2].1.as_ref())
    );
    assert_eq!(now[1], before[1].0);
    mesh.check();
}

#[test]
fn a_member_lost_while_the_ring_is_being_formed_is_replaced() {
    let mut mesh = Mesh::new(|settings| settings.stages = Some(2));
    for (node, layers) in [("a", 7), ("b", 7), ("s", 14)] {
        mesh.join(node, layers);
    }
    mesh.pass(2.0);
    let lost = mesh.members()[0].clone();
    mesh.leave(&[&lost]);
    mesh.check();
    assert!(!mesh.members().contains(&lost));
    mesh.all_work();
    assert_eq!(mesh.ring().state, "serving");
}

#[test]
fn a_worker_that_is_member_and_standby_loses_both_stages() {
    let mut mesh = Mesh::serving(
        |settings| settings.stages = Some(3),
        &[("a", 8), ("b", 8), ("c", 8)],
    );
    let both = assignment(&mesh);
    let lost = both
        .iter()
        .map(|(member, _)| member.clone())
        .find(|node| {
            both.iter()
                .any(|(_, standby)| standby.as_ref() == Some(node))
        })
        .expect("members stand by for each other");
    mesh.leave(&[&lost]);
    mesh.check();
    assert!(!mesh.members().contains(&lost));
    assert!(!mesh.standbys().contains(&Some(lost)));
    mesh.all_work();
    assert_eq!(mesh.ring().state, "serving");
}

#[test]
fn members_take_no_second_stage_where_that_is_not_allowed() {
    let mut mesh = Mesh::serving(
        |settings| {
            settings.stages = Some(2);
            settings.double_stages = false;
            settings.standbys = true;
        },
        &[("a", 13), ("b", 13)],
    );
    let lost = mesh.members()[0].clone();
    mesh.leave(&[&lost]);
    for ring in mesh.rings.view(mesh.now) {
        let nodes: BTreeSet<&str> = ring
            .stages
            .iter()
            .map(|stage| stage.member.node_id.as_str())
            .collect();
        assert_eq!(nodes.len(), ring.stages.len());
    }
}

#[test]
fn reports_and_complaints_of_old_epochs_change_nothing() {
    let mut mesh = three_and_a_spare();
    let ring = mesh.id();
    let members = mesh.members();
    let old: Vec<RingState> = members
        .iter()
        .map(|node| RingState {
            suspects: members.clone(),
            serving: true,
            recovery: Some(mesh_proto::Recovery::default()),
            ..mesh.report(node, ring, PartPhase::Failed)
        })
        .collect();
    mesh.leave(&[&members[1]]);
    let (epoch, now) = (mesh.ring().epoch, mesh.members());
    for (node, state) in members.iter().zip(old) {
        mesh.rings.state(node, state, mesh.now);
    }
    mesh.rings
        .suspected(&members[1], ring, "no token for 3 s", mesh.now);
    mesh.poll();
    assert_eq!((mesh.ring().epoch, mesh.members()), (epoch, now));
    assert!(mesh.rings.recoveries(mesh.now).next().is_none());
}

#[test]
fn what_is_said_twice_counts_once() {
    let mut mesh = three_and_a_spare();
    let lost = mesh.members()[0].clone();
    mesh.leave(&[&lost, &lost]);
    mesh.leave(&[&lost]);
    assert_eq!(mesh.ring().epoch, 2);
    mesh.all_work();
    let ring = mesh.id();
    let driver = mesh.members()[2].clone();
    let recovered = RingState {
        serving: true,
        recovery: Some(mesh_proto::Recovery {
            gap_us: 400_000,
            rows: 12,
            requests: 2,
        }),
        ..mesh.report(&driver, ring, PartPhase::Ready)
    };
    for _ in 0..3 {
        mesh.rings.state(&driver, recovered.clone(), mesh.now);
    }
    mesh.poll();
    let recoveries: Vec<f64> = mesh
        .rings
        .recoveries(mesh.now)
        .map(|one| one.gap_ms)
        .collect();
    assert_eq!(recoveries, [400.0]);
    let gap = (MODEL.to_owned(), Duration::from_millis(400));
    assert_eq!(mesh.rings.take_counts().gaps, [gap]);
    assert_eq!(mesh.rings.take_counts(), RingCounts::default());
}

#[test]
fn a_recovery_is_told_with_the_loss_that_it_mends() {
    let mut mesh = three_and_a_spare();
    let lost = mesh.members()[0].clone();
    mesh.leave(&[&lost]);
    mesh.all_work();
    // Standbys come between the driver's first word and its count of the pause.
    mesh.join("another", 15);
    mesh.pass(5.0);
    assert_eq!(mesh.ring().epoch, 2);
    assert!(mesh.ring().reason.contains("standbys"), "{:?}", mesh.ring());
    assert_eq!(told_of_a_recovery(&mut mesh).matches("lost").count(), 1);

    // Two epochs, of which the first never served: who waited, waited for both.
    mesh.join("one more", 15);
    mesh.all_work();
    for _ in 0..2 {
        let member = mesh.members()[0].clone();
        mesh.leave(&[&member]);
    }
    assert_eq!(mesh.ring().epoch, 4);
    assert_eq!(told_of_a_recovery(&mut mesh).matches("lost").count(), 2);
}

/// The reason that is kept for the present epoch's recovery when its driver tells of it.
fn told_of_a_recovery(mesh: &mut Mesh) -> String {
    let ring = mesh.id();
    let driver = mesh.members()[2].clone();
    let state = RingState {
        serving: true,
        recovery: Some(mesh_proto::Recovery::default()),
        ..mesh.report(&driver, ring, PartPhase::Ready)
    };
    mesh.rings.state(&driver, state, mesh.now);
    let last = mesh.rings.recoveries(mesh.now).last();
    last.expect("a recovery").reason
}

#[test]
fn a_member_that_does_not_answer_the_driver_is_replaced_and_left_alone_for_longer_each_time() {
    let mut mesh = Mesh::serving(
        |settings| settings.stages = Some(2),
        &[("a", 7), ("b", 7), ("s", 7), ("t", 7)],
    );
    let driver = mesh.members()[1].clone();
    let suspect = mesh.members()[0].clone();
    mesh.complain(&driver, &[&suspect, "nobody", &driver]);
    assert_eq!(mesh.ring().epoch, 2);
    assert!(!mesh.members().contains(&suspect));
    assert!(!mesh.standbys().contains(&Some(suspect.clone())));
    mesh.all_work();
    mesh.pass(9.0);
    assert!(
        !mesh.standbys().contains(&Some(suspect.clone())),
        "too early"
    );
    mesh.pass(1.5);
    mesh.all_work();
    assert!(
        mesh.standbys().contains(&Some(suspect.clone())),
        "it may stand by again"
    );
    mesh.complain(&driver, &[&suspect]);
    assert_eq!(mesh.ring().epoch, 2, "a standby only");
    mesh.pass(12.0);
    assert!(
        !mesh.standbys().contains(&Some(suspect.clone())),
        "twice as long now"
    );
    mesh.pass(9.0);
    mesh.all_work();
    assert!(mesh.standbys().contains(&Some(suspect)));
}

#[test]
fn a_driver_that_reaches_nobody_is_the_one_that_is_cut_off() {
    let mut mesh = three_and_a_spare();
    let members = mesh.members();
    let driver = members[2].clone();
    let mut others = members[..2].to_vec();
    others.extend(mesh.standbys().into_iter().flatten());
    let others: Vec<&str> = others.iter().map(String::as_str).collect();
    mesh.complain(&driver, &others);
    assert_eq!(mesh.ring().epoch, 2);
    assert_eq!(mesh.members()[..2], members[..2], "they stay");
    assert_ne!(mesh.members()[2], driver);
    mesh.check();
}

#[test]
fn a_silent_driver_is_replaced_and_only_while_the_ring_serves() {
    let mut mesh = three_and_a_spare();
    let ring = mesh.id();
    let driver = mesh.members()[2].clone();
    let first = mesh.members()[0].clone();
    mesh.rings.suspected(&first, ring, "no token", mesh.now);
    mesh.poll();
    assert_eq!(
        mesh.ring().epoch,
        1,
        "only the driver can be blamed for an answer"
    );
    mesh.rings
        .suspected(&driver, ring, "no token for 3.0 s", mesh.now);
    mesh.poll();
    assert_eq!(mesh.ring().epoch, 2);
    let next = mesh.members()[2].clone();
    assert_ne!(next, driver);
    mesh.rings
        .suspected(&next, ring, "no token for 3.0 s", mesh.now);
    mesh.poll();
    assert_eq!(mesh.ring().epoch, 2, "it is silent because it recovers");
}

#[test]
fn a_part_that_fails_to_load_goes_to_somebody_else() {
    let mut mesh = Mesh::new(|settings| settings.stages = Some(2));
    for (node, layers) in [("a", 7), ("b", 7), ("s", 14)] {
        mesh.join(node, layers);
    }
    mesh.pass(2.0);
    let failing = mesh.members()[0].clone();
    let mut report = mesh.report(&failing, mesh.id(), PartPhase::Failed);
    report.parts[0].error = "the file is too short".into();
    mesh.rings.state(&failing, report, mesh.now);
    mesh.poll();
    assert!(!mesh.members().contains(&failing));
    let reason = mesh.ring().reason;
    assert!(reason.contains("the file is too short"), "{reason}");
    mesh.check();
}

#[test]
fn a_part_that_never_loads_is_given_to_somebody_else() {
    let mut mesh = Mesh::new(|settings| settings.stages = Some(2));
    for (node, layers) in [("a", 7), ("b", 7), ("s", 14)] {
        mesh.join(node, layers);
    }
    mesh.pass(2.0);
    let slow = mesh.members()[0].clone();
    let other = mesh.members()[1].clone();
    mesh.ready(&other, mesh.id());
    mesh.pass(899.0);
    assert!(mesh.members().contains(&slow));
    mesh.pass(1.0);
    assert!(!mesh.members().contains(&slow));
}

#[test]
fn a_worker_that_comes_back_stands_by_where_one_lacks() {
    let mut mesh = three_and_a_spare();
    let lost = mesh.members()[0].clone();
    mesh.leave(&[&lost]);
    mesh.all_work();
    assert!(mesh.standbys().contains(&None));
    mesh.join(&lost, 5);
    mesh.pass(2.0);
    assert!(
        mesh.standbys().contains(&Some(lost)),
        "{:?}",
        mesh.standbys()
    );
    assert_eq!(mesh.ring().epoch, 2, "without a change of epoch");
    mesh.check();
}

#[test]
fn a_worker_on_a_new_link_holds_nothing_any_more() {
    let mut mesh = three_and_a_spare();
    let again = mesh.members()[0].clone();
    mesh.join(&again, 5);
    assert_eq!(
        mesh.ring().epoch,
        2,
        "its old parts are lost, though it is there"
    );
    mesh.check();
}

#[test]
fn a_driver_that_stops_serving_is_withdrawn_until_it_serves_again() {
    let mut mesh = three_and_a_spare();
    let ring = mesh.id();
    let driver = mesh.members()[2].clone();
    let state = mesh.report(&driver, ring, PartPhase::Ready);
    mesh.rings.state(&driver, state, mesh.now);
    mesh.poll();
    assert!(mesh.serving.is_empty());
    assert_eq!(mesh.rings.prospects()[MODEL], Prospect::Coming);
    mesh.serves(ring);
    assert_eq!(mesh.serving.len(), 1);
    assert_eq!(mesh.ring().epoch, 1);
}
