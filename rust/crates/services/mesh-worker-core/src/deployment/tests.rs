use mesh_proto::RingStage;

use super::*;
use crate::testing::seat;

/// A deployment on the worker "own", driven by hand in simulated time. Streams are numbers.
struct Sim {
    deployment: Deployment<u32>,
    now: Instant,
    measured: PartState,
}

/// A ring with these members, each with its standby, three layers each.
fn ring(epoch: u32, stages: &[(&str, Option<&str>)]) -> Ring {
    let stages = (0..).zip(stages);
    let stages = stages.map(|(index, (member, standby))| RingStage {
        layer_start: index * 3,
        layer_end: index * 3 + 3,
        member: Some(seat(member)),
        standby: standby.map(seat),
        format: "int8".to_owned(),
    });
    Ring {
        ring: 7,
        epoch,
        model: "m".to_owned(),
        stages: stages.collect(),
        reason: "a test".to_owned(),
        ..Ring::default()
    }
}

fn hello(epoch: u32, stage: u32, purpose: RingPurpose) -> RingHello {
    RingHello {
        ring: 7,
        epoch,
        stage,
        purpose: purpose.into(),
    }
}

impl Sim {
    fn new() -> Self {
        Sim {
            deployment: Deployment::new(7, "own"),
            now: Instant::now(),
            measured: PartState::default(),
        }
    }

    /// The steps until the next wait, without reports. Drivers start.
    fn steps(&mut self) -> Vec<RingStep<u32>> {
        self.all_steps()
            .into_iter()
            .filter(|step| !matches!(step, RingStep::Report(_)))
            .collect()
    }

    fn all_steps(&mut self) -> Vec<RingStep<u32>> {
        let mut steps = Vec::new();
        loop {
            let measured = self.measured.clone();
            let card = || Some(ModelCard::default());
            let step = self.deployment.poll(self.now, |_| measured.clone(), card);
            match step {
                RingStep::Wait(until) => {
                    assert!(until > self.now);
                    return steps;
                }
                RingStep::End => {
                    steps.push(step);
                    return steps;
                }
                RingStep::StartDriver(stage) => {
                    steps.push(step);
                    self.deployment.driver_started(stage, Ok(()));
                }
                step => steps.push(step),
            }
        }
    }

    fn report(&mut self) -> Option<RingState> {
        let steps = self.all_steps();
        let mut reports = steps.into_iter().filter_map(|step| match step {
            RingStep::Report(state) => Some(*state),
            _ => None,
        });
        reports.next()
    }

    fn order(&mut self, ring: Ring) -> Vec<RingStep<u32>> {
        assert!(self.deployment.order(ring));
        self.steps()
    }

    /// All parts that are being loaded are.
    fn load_all(&mut self) -> Vec<RingStep<u32>> {
        let parts = self.deployment.parts.clone();
        for (stage, place) in parts {
            if let PartPlace::Loading(number) = place {
                assert!(self.deployment.loaded(number, stage, Ok(LOADED)));
            }
        }
        self.steps()
    }

    fn stream(&mut self, hello: RingHello, from: &str, stream: u32) -> Vec<RingStep<u32>> {
        self.deployment.stream_came(hello, from.to_owned(), stream);
        self.steps()
    }
}

const LOADED: LoadedPart = LoadedPart {
    seconds: 1.5,
    weight_bytes: 1 << 20,
};

fn load(number: u64, stage: u32) -> RingStep<u32> {
    RingStep::Load {
        number,
        stage,
        layers: stage * 3..stage * 3 + 3,
        format: "int8".to_owned(),
    }
}

#[test]
fn a_member_loads_its_part_and_begins_the_epoch() {
    let mut sim = Sim::new();
    let stages = [("a", None), ("own", Some("c")), ("b", Some("own"))];
    let steps = sim.order(ring(1, &stages));
    assert_eq!(steps, [RingStep::EndStreams, load(0, 1), load(1, 2)]);
    let steps = sim.load_all();
    let begins = |stage, member| RingStep::BeginPart { stage, member };
    let replicates = RingStep::Replicate(1, Some(seat("c")));
    assert_eq!(steps.len(), 3, "{steps:?}");
    for step in [begins(1, true), begins(2, false), replicates] {
        assert!(steps.contains(&step), "{steps:?}");
    }
    // The same order again changes nothing.
    assert!(sim.order(ring(1, &stages)).is_empty());
    assert!(!sim.deployment.is_alone());
}

#[test]
fn the_last_member_drives_and_serves_after_its_first_answer() {
    let mut sim = Sim::new();
    sim.order(ring(1, &[("a", None), ("own", Some("c"))]));
    let steps = sim.load_all();
    let replicates = RingStep::Replicate(1, Some(seat("c")));
    let expected = [
        RingStep::StartDriver(1),
        RingStep::BeginDriver(1),
        replicates,
    ];
    assert_eq!(steps, expected);
    sim.deployment.running(1);
    assert_eq!(sim.steps(), [RingStep::WarmUp]);
    sim.deployment.warm(0);
    assert!(sim.steps().is_empty(), "of another epoch");
    sim.deployment.warm(1);
    assert_eq!(sim.steps(), [RingStep::Serve]);
    // After a loss clients wait: it serves at once, once all members are there.
    let steps = sim.order(ring(2, &[("b", None), ("own", Some("c"))]));
    let replicates = RingStep::Replicate(1, Some(seat("c")));
    assert_eq!(
        steps,
        [RingStep::EndStreams, RingStep::BeginDriver(1), replicates]
    );
    sim.deployment.running(1);
    assert!(sim.steps().is_empty());
    sim.deployment.running(2);
    assert_eq!(sim.steps(), [RingStep::Serve]);
}

#[test]
fn a_worker_that_runs_all_stages_is_alone() {
    let mut sim = Sim::new();
    assert!(!sim.deployment.is_alone(), "nothing is known yet");
    sim.order(ring(1, &[("own", None), ("own", None)]));
    assert!(sim.deployment.is_alone());
}

#[test]
fn parts_that_move_elsewhere_are_let_go_before_others_are_loaded() {
    let mut sim = Sim::new();
    sim.order(ring(1, &[("own", None), ("b", None), ("own", None)]));
    sim.load_all();
    let steps = sim.order(ring(2, &[("a", None), ("own", None), ("c", None)]));
    let reason = "a test".to_owned();
    let expected = [
        RingStep::Unload(0),
        RingStep::Unload(2),
        RingStep::Withdraw,
        RingStep::EndDriver {
            reason,
            moved: true,
        },
        RingStep::EndStreams,
        load(2, 1),
    ];
    assert_eq!(steps, expected);
    // With no part left the deployment is over.
    assert!(
        !sim.deployment
            .order(ring(3, &[("a", None), ("b", None), ("c", None)]))
    );
}

#[test]
fn an_older_epoch_is_ignored() {
    let mut sim = Sim::new();
    sim.order(ring(5, &[("own", None), ("b", None)]));
    assert!(sim.order(ring(4, &[("a", None), ("own", None)])).is_empty());
    assert_eq!(sim.deployment.ring().epoch, 5);
}

#[test]
fn the_same_members_in_a_new_epoch_make_new_links() {
    let mut sim = Sim::new();
    let stages = [("own", None), ("b", None)];
    sim.order(ring(1, &stages));
    sim.load_all();
    let steps = sim.order(ring(2, &stages));
    let nodes = vec!["own".to_owned(), "b".to_owned()];
    assert_eq!(steps[0], RingStep::Redial(nodes));
    assert_eq!(steps[1], RingStep::EndStreams);
}

#[test]
fn steps_of_an_epoch_that_is_over_are_not_carried_out() {
    let mut sim = Sim::new();
    let stages = [("own", None), ("b", None)];
    sim.order(ring(1, &stages));
    assert!(sim.deployment.loaded(0, 0, Ok(LOADED)));
    let rows = hello(1, 0, RingPurpose::Drive);
    sim.deployment.stream_came(rows, "b".to_owned(), 9);
    // Nothing was polled meanwhile.
    let steps = sim.order(ring(2, &[("own", None), ("c", None)]));
    let begins = RingStep::BeginPart {
        stage: 0,
        member: true,
    };
    assert_eq!(steps, [RingStep::Refuse(9), RingStep::EndStreams, begins]);
}

#[test]
fn a_load_that_is_not_needed_any_more_is_dropped_even_if_the_stage_came_back() {
    let mut sim = Sim::new();
    sim.order(ring(1, &[("own", None), ("own", None)]));
    sim.order(ring(2, &[("own", None), ("b", None)]));
    assert!(!sim.deployment.loaded(1, 1, Ok(LOADED)));
    let steps = sim.order(ring(3, &[("own", None), ("own", None)]));
    assert_eq!(steps, [RingStep::EndStreams, load(2, 1)]);
    assert!(!sim.deployment.loaded(1, 1, Ok(LOADED)), "the load before");
    assert!(sim.deployment.loaded(2, 1, Ok(LOADED)));
}

#[test]
fn a_part_that_failed_is_reported_and_loaded_again_on_the_next_order() {
    let mut sim = Sim::new();
    sim.order(ring(1, &[("own", None), ("b", None)]));
    let error = "no memory: 8 GiB are needed and 2 GiB are free";
    sim.deployment.loaded(0, 0, Err(error.to_owned()));
    let report = sim.report().unwrap();
    assert_eq!(report.parts[0].phase(), PartPhase::Failed);
    assert_eq!(report.parts[0].error, error);
    let steps = sim.order(ring(1, &[("own", None), ("b", None)]));
    assert_eq!(steps, [load(1, 0)]);
    // A driver that does not start fails its part.
    let mut sim = Sim::new();
    sim.order(ring(1, &[("own", None)]));
    sim.deployment.loaded(0, 0, Ok(LOADED));
    let card = || None;
    let step = sim.deployment.poll(sim.now, |_| PartState::default(), card);
    assert_eq!(step, RingStep::StartDriver(0));
    sim.deployment
        .driver_started(0, Err("no thread".to_owned()));
    assert_eq!(sim.report().unwrap().parts[0].error, "no thread");
}

#[test]
fn a_driver_that_starts_after_its_stage_moved_ends_at_once() {
    let mut sim = Sim::new();
    sim.order(ring(1, &[("own", None), ("own", None)]));
    sim.deployment.loaded(1, 1, Ok(LOADED));
    let poll = |sim: &mut Sim| {
        let card = || None;
        sim.deployment.poll(sim.now, |_| PartState::default(), card)
    };
    assert_eq!(poll(&mut sim), RingStep::StartDriver(1));
    assert!(sim.deployment.order(ring(2, &[("own", None), ("b", None)])));
    sim.deployment.driver_started(1, Ok(()));
    let steps = sim.steps();
    assert!(steps.contains(&RingStep::Withdraw), "{steps:?}");
    assert!(!sim.deployment.has_driver);
}

#[test]
fn streams_are_taken_from_the_member_that_the_ring_names_once_each() {
    let mut sim = Sim::new();
    sim.order(ring(2, &[("a", None), ("own", None), ("b", Some("own"))]));
    sim.load_all();
    for (number, stage, purpose, from, accepted) in [
        (1, 1, RingPurpose::Rows, "a", true),
        (2, 1, RingPurpose::Rows, "a", false),
        (3, 1, RingPurpose::Drive, "b", true),
        (4, 1, RingPurpose::Drive, "b", false),
        (5, 2, RingPurpose::Mirror, "b", true),
        // A standby that begins again is let in again.
        (6, 2, RingPurpose::Mirror, "b", true),
        (7, 1, RingPurpose::Rows, "liar", false),
        (8, 2, RingPurpose::Mirror, "a", false),
        (9, 1, RingPurpose::Unspecified, "a", false),
    ] {
        let steps = sim.stream(hello(2, stage, purpose), from, number);
        let is_accepted = matches!(
            &steps[..],
            [RingStep::Accept { stream, .. }] if *stream == number
        );
        assert_eq!(is_accepted, accepted, "{number}: {steps:?}");
        assert!(accepted || steps == [RingStep::Refuse(number)], "{steps:?}");
    }
    assert_eq!(
        sim.stream(hello(1, 1, RingPurpose::Rows), "a", 10),
        [RingStep::Refuse(10)],
        "of an older epoch"
    );
}

#[test]
fn streams_that_come_early_wait_and_are_bounded() {
    let mut sim = Sim::new();
    sim.order(ring(1, &[("a", None), ("own", None), ("b", None)]));
    let early = hello(1, 1, RingPurpose::Rows);
    assert!(sim.stream(early, "a", 0).is_empty());
    for number in 1..WAITING as u32 {
        let next = hello(2, 1, RingPurpose::Rows);
        assert!(sim.stream(next, "a", number).is_empty());
    }
    let flood = sim.stream(hello(3, 1, RingPurpose::Rows), "a", 999);
    assert_eq!(flood, [RingStep::Refuse(999)]);
    let steps = sim.load_all();
    assert!(matches!(
        steps.last(),
        Some(RingStep::Accept { stream: 0, .. })
    ));
    // A dissolved ring refuses those that wait.
    sim.deployment.end("moved: elsewhere");
    let refused = sim.steps();
    let refused = refused.iter().filter(|s| matches!(s, RingStep::Refuse(_)));
    assert_eq!(refused.count(), WAITING - 1);
}

#[test]
fn a_standby_that_changes_in_the_same_epoch_is_replaced() {
    let mut sim = Sim::new();
    sim.order(ring(1, &[("own", Some("c")), ("b", None)]));
    sim.load_all();
    let steps = sim.order(ring(1, &[("own", Some("d")), ("b", None)]));
    assert_eq!(steps, [RingStep::Replicate(0, Some(seat("d")))]);
    let steps = sim.order(ring(1, &[("own", None), ("b", None)]));
    assert_eq!(steps, [RingStep::Replicate(0, None)]);
}

#[test]
fn members_that_do_not_answer_are_suspected_until_they_are_heard() {
    let mut sim = Sim::new();
    sim.order(ring(1, &[("a", None), ("b", None), ("own", None)]));
    sim.load_all();
    sim.deployment.silent(0, "silent for 1 s", false);
    sim.deployment.silent(2, "silent for 1 s", false);
    let end = |link| StreamEnd {
        epoch: 1,
        peer: Some(seat("b")),
        purpose: "rows",
        reason: "reset".to_owned(),
        link,
    };
    sim.deployment.stream_ended(end(false));
    let report = sim.report().unwrap();
    assert_eq!(
        report.suspects,
        ["a"],
        "never itself, nor for a stream alone"
    );
    assert!(report.severed.is_empty());
    sim.deployment.stream_ended(end(true));
    let report = sim.report().expect("at once");
    assert_eq!(
        (report.suspects.len(), &report.severed[..]),
        (2, &["b".to_owned()][..])
    );
    sim.deployment.heard(0);
    sim.deployment.heard(1);
    let report = sim.report().unwrap();
    assert_eq!(report.suspects, ["b"], "a link that is closed stays closed");
    sim.order(ring(2, &[("a", None), ("c", None), ("own", None)]));
    sim.deployment.stream_ended(end(true));
    assert!(sim.deployment.suspects.is_empty(), "of the epoch before");
}

#[test]
fn changes_are_reported_at_most_four_times_a_second_and_urgent_ones_at_once() {
    let mut sim = Sim::new();
    assert!(sim.report().is_none(), "there is no ring yet");
    assert!(sim.deployment.order(ring(1, &[("own", None), ("b", None)])));
    let report = sim.report().unwrap();
    assert_eq!(report.parts[0].phase(), PartPhase::Loading);
    sim.measured.progress = 3;
    assert!(sim.report().is_none());
    sim.now += REPORT_INTERVAL;
    assert_eq!(sim.report().unwrap().parts[0].progress, 3);
    sim.now += REPORT_INTERVAL * 4;
    assert!(sim.report().is_none(), "nothing changed");
    assert!(sim.deployment.loaded(0, 0, Ok(LOADED)));
    let report = sim.report().unwrap();
    assert_eq!(report.parts[0].phase(), PartPhase::Ready);
    assert_eq!(report.parts[0].load_seconds, 1.5);
    sim.measured.error = "a step panicked; see the worker's log".to_owned();
    assert!(sim.report().unwrap().parts[0].error.contains("panicked"));
    sim.deployment.recovered(Recovery::default());
    assert!(sim.report().unwrap().recovery.is_some());
    sim.now += REPORT_INTERVAL * 4;
    assert!(sim.report().is_none(), "a recovery is told once");
}

#[test]
fn requests_go_on_elsewhere_only_if_the_ring_moved() {
    for (reason, moved) in [("moved: worker b is lost", true), ("no memory", false)] {
        let mut sim = Sim::new();
        sim.order(ring(1, &[("own", None)]));
        sim.load_all();
        sim.deployment.end(reason);
        sim.deployment.end("again");
        let reason = reason.to_owned();
        let ends = RingStep::EndDriver { reason, moved };
        assert_eq!(sim.steps(), [RingStep::Withdraw, ends, RingStep::End]);
    }
}
