use super::*;

fn fast(offer: &mut Offer) {
    offer.models[0].decode_us = 200.0;
    offer.models[0].logits_us = 20.0;
}

#[test]
fn a_clearly_better_plan_is_formed_beside_the_ring_and_takes_over_when_it_serves() {
    let mut mesh = Mesh::serving(|settings| settings.standbys = false, &[("a", 7), ("b", 7)]);
    let old = mesh.id();
    let driver = mesh.members()[1].clone();
    mesh.join_with("f", 30, fast);
    mesh.pass(2.0);
    assert_eq!(mesh.rings.view(mesh.now).len(), 2, "both for a while");
    assert_eq!(mesh.serving.len(), 1);
    assert!(
        mesh.serving
            .contains_key(&(driver.clone(), MODEL.to_owned()))
    );
    assert!(mesh.rings.prospects().is_empty(), "it is served");
    mesh.check();
    mesh.all_work();
    assert_eq!(mesh.serving.keys().next().unwrap().0, "f");
    assert_eq!(mesh.rings.retiring(), [old]);
    mesh.rings.running(old, 1);
    mesh.pass(5.0);
    assert_eq!(mesh.rings.view(mesh.now).len(), 2, "a request still runs");
    assert!(
        mesh.rings.serves_since(old, &driver).is_some(),
        "and goes on"
    );
    mesh.rings.running(old, 0);
    mesh.poll();
    assert_eq!(mesh.members(), ["f"]);
    let told = &mesh.told[&(driver, old)];
    assert!(told.stages.is_empty() && told.reason.starts_with("moved"));
    mesh.check();
}

#[test]
fn a_newcomer_that_could_stand_by_is_first_looked_at_as_a_member() {
    let mut mesh = Mesh::serving(|_| {}, &[("a", 7), ("b", 7)]);
    let old = mesh.id();
    mesh.join_with("f", 13, fast);
    assert_eq!(mesh.standbys(), [None, None], "not at once");
    mesh.pass(2.0);
    assert!(
        mesh.rings
            .rings
            .values()
            .any(|ring| ring.replaces == Some(old)),
        "{:?}",
        mesh.rings.view(mesh.now)
    );
    mesh.check();
}

#[test]
fn standbys_make_room_for_a_better_ring_and_come_back_if_it_fails() {
    let mut mesh = Mesh::serving(|_| {}, &[("a", 7), ("b", 7)]);
    let (old, driver) = (mesh.id(), mesh.members()[1].clone());
    mesh.rings.last_rebalance = Some(mesh.now);
    mesh.join_with("f", 13, fast);
    mesh.pass(2.0);
    mesh.all_work();
    assert_eq!(
        mesh.standbys()[0].as_deref(),
        Some("f"),
        "it stands by while it may not be more"
    );
    let compared = mesh
        .rings
        .rebalance(None, false, mesh.now)
        .unwrap()
        .remove(0);
    assert!(
        compared.verdict.contains("gives its standbys up"),
        "{}",
        compared.verdict
    );
    mesh.poll();
    mesh.check();
    assert_eq!(mesh.rings.view(mesh.now).len(), 2);
    assert!(
        mesh.serving.contains_key(&(driver, MODEL.to_owned())),
        "the old one goes on"
    );
    let told = &mesh.told[&("f".to_owned(), old)];
    assert_eq!(told.epoch, 1);
    assert!(told.stages.iter().all(|stage| stage.standby.is_none()));
    mesh.pass(10.0);
    assert!(
        mesh.rings.rings[&old]
            .stages
            .iter()
            .all(|stage| stage.standby.is_none()),
        "room is room"
    );

    let new = *mesh.rings.rings.keys().find(|id| **id != old).unwrap();
    let failed = mesh.report("f", new, PartPhase::Failed);
    mesh.rings.state("f", failed, mesh.now);
    mesh.pass(2.0);
    assert_eq!((mesh.id(), &*mesh.ring().state), (old, "serving"));
    mesh.pass(12.0);
    assert_eq!(
        mesh.standbys()[0].as_deref(),
        Some("f"),
        "it failed at the whole, for now"
    );
    mesh.check();
}

#[test]
fn a_ring_on_its_way_out_ends_at_the_limit() {
    let mut mesh = Mesh::serving(|settings| settings.standbys = false, &[("a", 7), ("b", 7)]);
    let old = mesh.id();
    mesh.join_with("f", 30, fast);
    mesh.pass(2.0);
    mesh.all_work();
    mesh.rings.running(old, 3);
    mesh.pass(299.0);
    assert_eq!(mesh.rings.retiring().len(), 1);
    mesh.pass(1.0);
    assert!(mesh.rings.retiring().is_empty());
}

#[test]
fn without_room_for_both_the_old_ring_ends_first() {
    let mut mesh = Mesh::serving(|settings| settings.standbys = false, &[("a", 7), ("b", 7)]);
    let old = mesh.id();
    // The driver itself has become faster and larger: it cannot serve the model twice.
    let driver = mesh.members()[1].clone();
    mesh.offer(&driver, 30, fast);
    mesh.pass(2.0);
    assert_ne!(mesh.id(), old);
    assert_eq!(
        (&*mesh.ring().state, mesh.members()),
        ("forming", vec![driver.clone()])
    );
    let told = &mesh.told[&(driver, old)];
    assert!(told.reason.starts_with("moved"), "{}", told.reason);
    assert!(mesh.serving.is_empty());
    assert_eq!(mesh.rings.prospects()[MODEL], Prospect::Coming);
    mesh.check();
}

#[test]
fn a_small_gain_changes_nothing_and_a_dry_run_never_does() {
    let mut mesh = Mesh::serving(|settings| settings.standbys = false, &[("a", 7), ("b", 7)]);
    let ring = mesh.id();
    mesh.join_with("c", 7, |offer| offer.models[0].decode_us = 950.0);
    mesh.pass(2.0);
    assert_eq!(mesh.id(), ring);
    let small = mesh
        .rings
        .rebalance(None, true, mesh.now)
        .unwrap()
        .remove(0);
    assert!(
        small.gain < 0.15 && small.verdict.contains("ring.margin"),
        "{small:?}"
    );

    mesh.rings.last_rebalance = Some(mesh.now);
    mesh.join_with("f", 30, fast);
    mesh.pass(2.0);
    let large = mesh
        .rings
        .rebalance(Some(MODEL), true, mesh.now)
        .unwrap()
        .remove(0);
    assert!(
        large.gain > 0.5 && large.verdict.contains("beside"),
        "{large:?}"
    );
    assert_eq!(large.new.stages[0].node, "f");
    assert!(large.old_token_us > large.new.token_us);
    mesh.poll();
    assert_eq!(mesh.id(), ring, "a dry run");
    mesh.rings.rebalance(Some(MODEL), false, mesh.now).unwrap();
    assert_eq!(mesh.rings.view(mesh.now).len(), 2);
    mesh.poll();
    assert!(
        mesh.rings
            .rebalance(Some("gpt-9"), true, mesh.now)
            .unwrap_err()
            .contains("no ring")
    );
}

#[test]
fn rebalancing_keeps_its_pace_and_its_hands_off_a_ring_that_recovers() {
    let mut mesh = Mesh::serving(
        |settings| settings.stages = Some(2),
        &[("a", 7), ("b", 7), ("s", 14)],
    );
    let lost = mesh.members()[0].clone();
    mesh.leave(&[&lost]);
    let ring = mesh.id();
    mesh.join_with("f", 30, fast);
    mesh.join_with("g", 30, fast);
    mesh.pass(3.0);
    assert_eq!((mesh.id(), &*mesh.ring().state), (ring, "recovering"));
    let refused = mesh
        .rings
        .rebalance(Some(MODEL), false, mesh.now)
        .unwrap_err();
    assert!(refused.contains("does not serve"), "{refused}");
    mesh.rings.last_rebalance = Some(mesh.now);
    mesh.all_work();
    mesh.pass(59.0);
    assert!(
        mesh.rings.rings[&ring].moves.is_empty(),
        "not within a minute of the last one"
    );
    mesh.pass(1.5);
    assert!(
        !mesh.rings.rings[&ring].moves.is_empty(),
        "now its stages move to the faster ones"
    );
}

#[test]
fn a_better_ring_that_fails_while_it_is_formed_leaves_the_old_one_alone() {
    let mut mesh = Mesh::serving(|settings| settings.standbys = false, &[("a", 7), ("b", 7)]);
    let old = mesh.id();
    mesh.join_with("f", 30, fast);
    mesh.pass(2.0);
    mesh.leave(&["f"]);
    assert_eq!((mesh.id(), &*mesh.ring().state), (old, "serving"));
    assert_eq!(mesh.serving.len(), 1);
}

#[test]
fn the_old_ring_lost_while_its_successor_is_formed_is_not_formed_again() {
    let mut mesh = Mesh::serving(|settings| settings.standbys = false, &[("a", 7), ("b", 7)]);
    let old = mesh.id();
    mesh.join_with("f", 30, fast);
    mesh.pass(2.0);
    mesh.leave(&["a"]);
    mesh.check();
    assert!(
        mesh.rings
            .view(mesh.now)
            .iter()
            .any(|ring| ring.stages[0].member.node_id == "f")
    );
    mesh.all_work();
    mesh.rings.running(old, 0);
    mesh.pass(301.0);
    assert_eq!(mesh.members(), ["f"]);
    mesh.check();
}

/// A ring of two workers, one of which was lost to a slow spare and has come back.
fn one_has_come_back() -> (Mesh, String) {
    let mut mesh = Mesh::new(|settings| settings.stages = Some(2));
    mesh.join("a", 7);
    mesh.join("b", 7);
    mesh.join_with("s", 14, |offer| offer.models[0].decode_us = 3000.0);
    mesh.pass(2.0);
    mesh.all_work();
    let lost = mesh.members()[1].clone();
    mesh.leave(&[&lost]);
    assert_eq!(mesh.members()[1], "s");
    mesh.all_work();
    // Nothing is changed for speed alone so soon after a loss.
    mesh.pass(31.0);
    mesh.join(&lost, 7);
    mesh.pass(2.0);
    (mesh, lost)
}

#[test]
fn a_stage_moves_to_a_faster_worker_while_the_ring_serves() {
    let (mut mesh, back) = one_has_come_back();
    let ring = mesh.id();
    assert_eq!((mesh.ring().epoch, &*mesh.ring().state), (2, "serving"));
    assert_eq!(
        mesh.standbys()[1],
        Some(back.clone()),
        "it loads the stage and catches up"
    );
    assert_eq!(mesh.members()[1], "s");
    mesh.ready(&back, ring);
    mesh.pass(1.0);
    assert_eq!((mesh.id(), mesh.ring().epoch), (ring, 3));
    assert_eq!(mesh.members()[1], back);
    mesh.check();
    mesh.all_work();
    assert_eq!(mesh.ring().state, "serving");
    assert_eq!(
        mesh.standbys()[1].as_deref(),
        Some("s"),
        "as it was in the beginning"
    );
    assert_eq!(mesh.failovers(), 1, "the loss, not the move");
    mesh.pass(200.0);
    assert_eq!(mesh.ring().epoch, 3, "and that is that");
}

#[test]
fn a_move_that_fails_leaves_the_ring_as_it_is() {
    let (mut mesh, back) = one_has_come_back();
    let ring = mesh.id();
    mesh.leave(&[&back]);
    mesh.pass(5.0);
    assert_eq!(
        (mesh.id(), mesh.ring().epoch, &*mesh.ring().state),
        (ring, 2, "serving")
    );
    assert!(mesh.rings.rings[&ring].moves.is_empty());
    assert_eq!(mesh.members()[1], "s");
    mesh.check();

    let (mut mesh, back) = one_has_come_back();
    let ring = mesh.id();
    // The slow one dies before the faster one has loaded: it takes over all the same.
    mesh.leave(&["s"]);
    assert_eq!((mesh.id(), mesh.ring().epoch), (ring, 3));
    assert_eq!(mesh.members()[1], back);
    assert!(mesh.rings.rings[&ring].moves.is_empty());
    mesh.check();
}
