use super::*;

/// Three workers with a stage each and one without, which stands by for as many as it can. The head hears all
/// of them.
fn heard_ring() -> Mesh {
    let mut mesh = Mesh::serving(
        |settings| settings.stages = Some(3),
        &[("a", 5), ("b", 5), ("c", 5), ("s", 15)],
    );
    mesh.pass_hearing(0.0, &["a", "b", "c", "s"]);
    mesh
}

impl Mesh {
    /// Time in which the head hears these workers four times a second.
    fn pass_hearing(&mut self, seconds: f64, nodes: &[&str]) {
        let end = self.now + Duration::from_secs_f64(seconds);
        loop {
            for node in nodes {
                self.rings.heard(node, self.now);
            }
            if self.now >= end {
                return;
            }
            self.pass(0.25);
        }
    }

    /// One worker says that its links to others are closed.
    fn complain_of_links(&mut self, by: &str, suspects: &[&str]) {
        let suspects: Vec<String> = suspects.iter().map(|node| (*node).to_owned()).collect();
        let state = RingState {
            serving: true,
            suspects: suspects.clone(),
            severed: suspects,
            ..self.report(by, self.id(), PartPhase::Ready)
        };
        self.rings.state(by, state, self.now);
        self.poll();
    }

    fn relinks(&self) -> u64 {
        self.rings.counts.relinked
    }
}

const ALL: [&str; 4] = ["a", "b", "c", "s"];

#[test]
fn a_slow_member_that_the_head_hears_is_not_blamed() {
    let mut mesh = heard_ring();
    let members = mesh.members();
    mesh.complain(&members[2], &[&members[0]]);
    assert_eq!(mesh.asked[0], members[0], "the head asks for itself");
    mesh.pass_hearing(2.5, &ALL);
    assert_eq!((mesh.ring().epoch, mesh.members()), (1, members.clone()));
    // The member answers again; the earlier doubt is forgotten.
    mesh.complain(&members[2], &[]);
    mesh.pass_hearing(10.0, &ALL);
    assert_eq!((mesh.ring().epoch, mesh.members()), (1, members));
    assert_eq!((mesh.failovers(), mesh.relinks()), (0, 0));
}

#[test]
fn a_member_that_nobody_hears_is_lost_a_second_after_its_last_word() {
    let mut mesh = heard_ring();
    let members = mesh.members();
    // It was heard a moment before it fell silent, and its driver noticed that at once.
    mesh.complain(&members[2], &[&members[0]]);
    let others: Vec<&str> = ALL.into_iter().filter(|node| *node != members[0]).collect();
    mesh.pass_hearing(0.75, &others);
    assert_eq!(mesh.ring().epoch, 1);
    mesh.pass_hearing(0.5, &others);
    assert_eq!(mesh.ring().epoch, 2);
    assert!(!mesh.members().contains(&members[0]));
    let reason = mesh.ring().reason;
    assert!(
        reason.contains(&format!("worker-{} nor the head", members[2])),
        "{reason}"
    );
}

#[test]
fn a_killed_member_whose_link_another_one_found_closed_is_lost_at_once() {
    let mut mesh = heard_ring();
    let members = mesh.members();
    mesh.complain_of_links(&members[1], &[&members[0]]);
    assert_eq!(mesh.asked[0], members[0]);
    // The question finds the head's own link closed, too; if not, it stays unanswered.
    mesh.pass(0.55);
    assert_eq!(mesh.ring().epoch, 2);
    assert!(!mesh.members().contains(&members[0]));
}

#[test]
fn a_broken_link_is_made_anew_and_only_then_somebody_is_replaced() {
    let mut mesh = heard_ring();
    let members = mesh.members();
    mesh.complain_of_links(&members[1], &[&members[0]]);
    mesh.pass_hearing(0.25, &ALL);
    mesh.poll();
    assert_eq!(mesh.members(), members, "the same members");
    assert_eq!((mesh.ring().epoch, mesh.relinks()), (2, 1));
    for told in mesh.told.values() {
        assert_eq!(told.epoch, 2);
    }
    mesh.all_work();
    assert_eq!(mesh.failovers(), 0);
    mesh.complain_of_links(&members[1], &[&members[0]]);
    mesh.pass_hearing(0.25, &ALL);
    mesh.poll();
    assert_eq!((mesh.ring().epoch, mesh.relinks()), (3, 1));
    assert!(!mesh.members().contains(&members[0]));
    let reason = mesh.ring().reason;
    assert!(reason.contains("over a new link either"), "{reason}");
    mesh.check();
}

#[test]
fn a_worker_whose_address_changed_gets_its_neighbour_into_no_trouble() {
    // The members whose links are closed complain: here the healthy neighbour is named, there all others are.
    for whom in [&["b"][..], &["a", "b", "s"], &["b", "s"]] {
        let mut mesh = heard_ring();
        let members = mesh.members();
        let standbys = mesh.standbys();
        let driver = members[2].clone();
        let suspects: Vec<&str> = whom
            .iter()
            .copied()
            .filter(|node| *node != driver)
            .collect();
        mesh.complain_of_links(&driver, &suspects);
        mesh.pass_hearing(0.25, &ALL);
        mesh.poll();
        mesh.all_work();
        assert_eq!((mesh.members(), mesh.standbys()), (members, standbys));
        assert_eq!((mesh.failovers(), &*mesh.ring().state), (0, "serving"));
    }
}

#[test]
fn who_reaches_nobody_over_new_links_either_is_the_one_to_go() {
    let mut mesh = heard_ring();
    let members = mesh.members();
    let driver = members[2].clone();
    for _ in 0..2 {
        mesh.complain_of_links(&driver, &[&members[0], &members[1]]);
        mesh.pass_hearing(0.25, &ALL);
        mesh.poll();
        mesh.all_work();
    }
    assert_eq!(mesh.members()[..2], members[..2], "they stay");
    assert_ne!(mesh.members()[2], driver);
}

#[test]
fn a_member_that_stays_silent_for_another_one_gets_a_new_link() {
    let mut mesh = heard_ring();
    let members = mesh.members();
    mesh.complain(&members[2], &[&members[0]]);
    mesh.pass_hearing(3.5, &ALL);
    assert_eq!((mesh.ring().epoch, mesh.members()), (2, members));
    assert_eq!(mesh.relinks(), 1);
}

#[test]
fn a_head_that_did_not_run_blames_nobody_for_it() {
    let mut mesh = heard_ring();
    let members = mesh.members();
    mesh.now += Duration::from_secs(20);
    mesh.rings.stalled(Duration::from_secs(20), mesh.now);
    mesh.complain(&members[2], &[&members[0]]);
    mesh.pass_hearing(1.0, &ALL);
    assert_eq!((mesh.ring().epoch, mesh.members()), (1, members));
}

#[test]
fn a_driver_whose_steps_go_on_is_not_blamed_for_a_slow_answer() {
    let mut mesh = heard_ring();
    let (ring, driver) = (mesh.id(), mesh.members()[2].clone());
    for step in 1..10 {
        mesh.pass_hearing(1.0, &ALL);
        let mut state = mesh.report(&driver, ring, PartPhase::Ready);
        state.serving = true;
        state.parts[0].step_us = step as f32;
        mesh.rings.state(&driver, state, mesh.now);
        mesh.rings
            .suspected(&driver, ring, "no token for 3.0 s", mesh.now);
        mesh.poll();
    }
    assert_eq!(mesh.ring().epoch, 1);
    // Its network lives, its steps do not.
    mesh.pass_hearing(3.0, &ALL);
    mesh.rings
        .suspected(&driver, ring, "no token for 3.0 s", mesh.now);
    mesh.poll();
    assert_eq!(mesh.ring().epoch, 2);
}

#[test]
fn loading_that_gets_on_may_take_any_time() {
    let mut mesh = Mesh::new(|settings| settings.stages = Some(2));
    for (node, layers) in [("a", 7), ("b", 7), ("s", 14)] {
        mesh.join(node, layers);
    }
    mesh.pass(2.0);
    let (slow, other) = (mesh.members()[0].clone(), mesh.members()[1].clone());
    mesh.ready(&other, mesh.id());
    for progress in 1..20 {
        let mut report = mesh.report(&slow, mesh.id(), PartPhase::Loading);
        report.parts[0].progress = progress;
        mesh.rings.state(&slow, report, mesh.now);
        mesh.pass(200.0);
    }
    assert!(mesh.members().contains(&slow));
    mesh.pass(90.0);
    assert!(mesh.members().contains(&slow));
    mesh.pass(15.0);
    assert!(!mesh.members().contains(&slow), "it stands still");
}

#[test]
fn what_ends_or_moves_by_plan_is_no_alarm() {
    let logs = Logs::capture();
    let mut mesh = Mesh::new(|settings| settings.stages = Some(2));
    for (node, layers) in [("a", 7), ("b", 7), ("s", 14)] {
        mesh.join(node, layers);
    }
    mesh.pass(2.0);
    let member = mesh.members()[0].clone();
    mesh.rings.drain(&member, mesh.now).unwrap();
    mesh.poll();
    assert!(!mesh.members().contains(&member));
    let counts = mesh.rings.take_counts();
    assert_eq!(counts, RingCounts::default());
    assert!(!logs.text().contains("WARN"), "{}", logs.text());
}
