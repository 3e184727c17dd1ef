use super::super::drain::DrainRefusal;
use super::*;

#[test]
fn a_drained_member_hands_over_to_its_standby() {
    let mut mesh = Mesh::serving(
        |settings| settings.stages = Some(2),
        &[("a", 7), ("b", 7), ("s", 14)],
    );
    let member = mesh.members()[0].clone();
    mesh.rings.drain(&member, mesh.now).unwrap();
    mesh.pass(1.0);
    let ring = mesh.ring();
    assert_eq!((ring.epoch, mesh.members()[0].as_str()), (2, "s"));
    assert!(ring.reason.starts_with("moved: "), "{}", ring.reason);
    let told = &mesh.told[&(member.clone(), mesh.id())];
    assert_eq!(
        told.epoch, 2,
        "the old member hears that it is none any more"
    );
    mesh.all_work();
    mesh.pass(3.0);
    assert_eq!(mesh.rings.holdings(&member), []);
    assert_eq!(mesh.failovers(), 0, "nothing failed");
    mesh.check();
}

#[test]
fn two_drained_members_do_not_both_hand_over_to_one_standby_where_that_is_not_allowed() {
    let mut mesh = Mesh::serving(
        |settings| {
            settings.stages = Some(2);
            settings.double_stages = false;
        },
        &[("a", 7), ("b", 7), ("s", 14)],
    );
    assert_eq!(
        mesh.standbys(),
        [Some("s".to_owned()), Some("s".to_owned())]
    );
    for node in ["a", "b"] {
        mesh.rings.says_draining(node, true);
    }
    mesh.pass(1.0);
    let members = mesh.members();
    assert_ne!(members[0], members[1]);
    mesh.check();
}

#[test]
fn a_drain_waits_for_a_standby_that_is_up_to_date() {
    let mut mesh = Mesh::serving(
        |settings| {
            settings.stages = Some(2);
            settings.standbys = false;
        },
        &[("a", 7), ("b", 7), ("s", 7)],
    );
    let member = mesh.members()[0].clone();
    mesh.rings.drain(&member, mesh.now).unwrap();
    mesh.poll();
    assert_eq!(mesh.standbys()[0].as_deref(), Some("s"), "one is chosen");
    let holding = mesh.rings.holdings(&member).remove(0);
    assert!(
        holding.waits_for.contains("worker-s to load"),
        "{}",
        holding.waits_for
    );
    let ring = mesh.id();
    mesh.ready("s", ring);
    let mut behind = mesh.report(&member, ring, PartPhase::Ready);
    behind.parts[0].lag_rows = 500;
    let level = mesh.report(&member, ring, PartPhase::Ready);
    mesh.rings.state(&member, behind, mesh.now);
    mesh.pass(5.0);
    assert_eq!(mesh.ring().epoch, 1, "500 rows behind");
    let holding = mesh.rings.holdings(&member).remove(0);
    assert!(
        holding.waits_for.contains("500 KV rows"),
        "{}",
        holding.waits_for
    );
    // Only a driver's report says that the ring serves; a member's lag is its own.
    mesh.serves(ring);
    mesh.rings.state(&member, level, mesh.now);
    mesh.serves(ring);
    mesh.poll();
    assert_eq!((mesh.ring().epoch, mesh.members()[0].as_str()), (2, "s"));
}

#[test]
fn a_drained_standby_is_replaced_in_the_same_epoch() {
    let mut mesh = Mesh::serving(
        |settings| settings.stages = Some(2),
        &[("a", 7), ("b", 7), ("s", 14), ("t", 14)],
    );
    let standby = mesh.standbys()[0].clone().unwrap();
    mesh.rings.drain(&standby, mesh.now).unwrap();
    mesh.poll();
    assert_eq!((mesh.ring().epoch, &*mesh.ring().state), (1, "serving"));
    assert!(!mesh.standbys().contains(&Some(standby.clone())));
    assert!(mesh.standbys()[0].is_some());
    assert!(
        !mesh.told[&(standby.clone(), mesh.id())]
            .stages
            .iter()
            .any(|stage| {
                stage
                    .standby
                    .as_ref()
                    .is_some_and(|addr| addr.node_id == standby)
            }),
        "it was told"
    );
    mesh.check();
}

#[test]
fn a_drain_without_room_elsewhere_is_refused_and_changes_nothing() {
    let mut mesh = Mesh::serving(|_| {}, &[("a", 7), ("b", 7)]);
    let before = mesh.rings.view(mesh.now);
    let logs = Logs::capture();
    let refusal = mesh.rings.drain("a", mesh.now).unwrap_err();
    assert_eq!(logs.text(), "");
    let text = refusal.to_string();
    for part in ["worker-a", "MiB", "add a worker"] {
        assert!(text.contains(part), "{part} is not in {text}");
    }
    mesh.pass(1.0);
    let mut after = mesh.rings.view(mesh.now);
    after[0].age_seconds = before[0].age_seconds;
    assert_eq!(after, before);
    assert!(!mesh.rings.is_asked_to_drain("a"));
    assert!(matches!(
        mesh.rings.drain("nobody", mesh.now),
        Err(DrainRefusal::Unknown(_))
    ));
}

#[test]
fn a_drain_that_a_forming_ring_has_no_room_for_is_refused_and_logs_nothing() {
    let mut mesh = Mesh::new(|_| {});
    mesh.join("a", 7);
    mesh.join("b", 7);
    mesh.pass(2.0);
    let ring = mesh.id();
    let logs = Logs::capture();
    assert!(matches!(
        mesh.rings.drain("a", mesh.now),
        Err(DrainRefusal::NoRoom { .. })
    ));
    assert_eq!(logs.text(), "");
    mesh.poll();
    assert_eq!((mesh.id(), &*mesh.ring().state), (ring, "forming"));
}

#[test]
fn nothing_is_planned_on_a_drained_worker_until_it_is_undrained() {
    let mut mesh = Mesh::new(|_| {});
    mesh.join("a", 7);
    mesh.join("b", 7);
    mesh.rings.drain("b", mesh.now).unwrap();
    mesh.pass(3.0);
    assert!(matches!(
        mesh.rings.prospects()[MODEL],
        Prospect::Impossible(_)
    ));
    let error = mesh.rings.plan(MODEL, mesh.now).unwrap_err().to_string();
    assert!(error.contains("add a node"), "{error}");
    assert!(mesh.rings.undrain("b", mesh.now));
    assert!(!mesh.rings.undrain("b", mesh.now), "once is enough");
    mesh.pass(2.5);
    assert_eq!(mesh.ring().state, "forming");
}

#[test]
fn a_drained_worker_that_reconnects_stays_drained() {
    let mut mesh = Mesh::serving(
        |settings| settings.stages = Some(2),
        &[("a", 7), ("b", 7), ("s", 14)],
    );
    mesh.rings.drain("s", mesh.now).unwrap();
    mesh.poll();
    mesh.leave(&["s"]);
    mesh.join("s", 14);
    mesh.pass(5.0);
    assert_eq!(mesh.rings.holdings("s"), []);
}

#[test]
fn a_worker_that_says_it_drains_is_drained_without_being_asked() {
    let mut mesh = Mesh::serving(
        |settings| settings.stages = Some(2),
        &[("a", 7), ("b", 7), ("s", 14)],
    );
    let driver = mesh.members()[1].clone();
    mesh.rings.says_draining(&driver, true);
    mesh.pass(1.0);
    assert_eq!((mesh.ring().epoch, mesh.members()[1].as_str()), (2, "s"));
    assert!(mesh.serving.is_empty(), "the old driver is withdrawn");
    mesh.all_work();
    assert_eq!(mesh.serving.len(), 1);
    mesh.check();
}

#[test]
fn a_ring_moves_at_once_off_a_worker_that_is_about_to_end_and_that_nobody_stands_by_for() {
    let mut mesh = Mesh::serving(
        |settings| settings.standbys = false,
        &[("a", 5), ("b", 5), ("c", 5)],
    );
    assert_eq!(mesh.members().len(), 3);
    let ring = mesh.id();
    // Room for the whole model in two halves, and for no third part beside what they hold.
    mesh.offer("a", 7, |_| {});
    mesh.offer("b", 7, |_| {});
    mesh.rings.says_draining("c", true);
    mesh.pass(1.0);
    mesh.check();
    assert!(!mesh.members().contains(&"c".to_owned()));
    assert_ne!(mesh.id(), ring);
}

#[test]
fn a_member_drained_while_the_ring_is_formed_is_replaced_at_once() {
    let mut mesh = Mesh::new(|settings| settings.stages = Some(2));
    for (node, layers) in [("a", 7), ("b", 7), ("s", 14)] {
        mesh.join(node, layers);
    }
    mesh.pass(2.0);
    let member = mesh.members()[0].clone();
    mesh.rings.drain(&member, mesh.now).unwrap();
    mesh.poll();
    assert_eq!(mesh.rings.holdings(&member), []);
    mesh.all_work();
    assert_eq!(mesh.ring().state, "serving");
    mesh.check();
}
