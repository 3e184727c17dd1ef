use super::*;

const SECOND: Duration = Duration::from_secs(1);
const EVERY: Duration = Duration::from_secs(300);
const SCHEDULE: Schedule = Schedule {
    every: EVERY,
    seed: 9,
};

/// A model with these logits at each position, on a machine whose rounding moves them.
fn answer_of(logits: &[[f32; 4]], noise: f32, seed: u64) -> Sample {
    let positions = logits.iter().enumerate().map(|(index, row)| {
        let moved: Vec<f32> = row
            .iter()
            .enumerate()
            .map(|(token, logit)| {
                let hash = (seed ^ (index * 4 + token) as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
                logit + noise * ((hash >> 40) as f32 / (1 << 23) as f32 - 1.0)
            })
            .collect();
        let total = moved.iter().map(|logit| logit.exp()).sum::<f32>().ln();
        let mut top: Vec<(u32, f32)> = moved
            .iter()
            .enumerate()
            .map(|(token, logit)| (index as u32 * 4 + token as u32, logit - total))
            .collect();
        top.sort_by(|a, b| b.1.total_cmp(&a.1));
        Position {
            token: top[0].0,
            logprob: top[0].1,
            top,
        }
    });
    Sample::Text(positions.collect())
}

/// Near ties, as language models have them all the time.
const LOGITS: [[f32; 4]; 8] = [
    [5.0, 1.0, 0.0, -1.0],
    [3.0, 2.9, 0.0, -1.0],
    [4.0, 1.0, 0.5, 0.0],
    [2.0, 1.8, 1.7, 1.0],
    [6.0, 0.0, 0.0, 0.0],
    [2.5, 2.45, 2.4, 0.0],
    [3.0, 0.0, -1.0, -2.0],
    [4.0, 3.0, 0.0, 0.0],
];

fn honest(seed: u64) -> Sample {
    answer_of(&LOGITS, 0.6, seed)
}

fn forged() -> Sample {
    let mut wrong = LOGITS;
    wrong.iter_mut().for_each(|row| row.reverse());
    answer_of(&wrong, 0.0, 0)
}

#[test]
fn machines_with_other_rounding_always_agree_and_forged_answers_never_do() {
    let mut differ = 0;
    for seed in 0..500 {
        let (one, two) = (honest(seed), honest(seed + 1000));
        assert!(one.agrees(&two), "{one:?} {two:?}");
        let tokens = |sample: &Sample| match sample {
            Sample::Text(positions) => positions.iter().map(|p| p.token).collect::<Vec<_>>(),
            Sample::Vector(_) => Vec::new(),
        };
        differ += u32::from(tokens(&one) != tokens(&two));
        assert!(!one.agrees(&forged()) && !forged().agrees(&one));
    }
    assert!(differ > 50, "the noise is without effect");
}

#[test]
fn a_worker_cannot_talk_itself_out_of_a_difference() {
    // It says that the right token was nearly as likely, or nothing at all.
    let Sample::Text(mut positions) = forged() else {
        panic!("no text")
    };
    let claim = |position: &mut Position| {
        position.top = (0..64).map(|token| (token, position.logprob)).collect();
    };
    positions.iter_mut().for_each(claim);
    assert!(!honest(1).agrees(&Sample::Text(positions.clone())));
    positions
        .iter_mut()
        .for_each(|position| position.top.clear());
    assert!(!honest(1).agrees(&Sample::Text(positions.clone())));
    positions
        .iter_mut()
        .for_each(|position| position.logprob = f32::NAN);
    assert!(!honest(1).agrees(&Sample::Text(positions)));
    assert!(!honest(1).agrees(&Sample::Text(Vec::new())));
    let Sample::Text(mut short) = honest(1) else {
        panic!("no text")
    };
    short.truncate(1);
    assert!(!honest(2).agrees(&Sample::Text(short)));
}

#[test]
fn vectors_agree_by_their_direction() {
    let one = Sample::Vector(vec![0.6, 0.8, 0.0]);
    assert!(one.agrees(&Sample::Vector(vec![0.61, 0.79, 0.01])));
    for wrong in [
        vec![0.6, 0.8],
        vec![0.8, -0.6, 0.0],
        vec![0.0; 3],
        vec![f32::NAN; 3],
        vec![],
    ] {
        assert!(!one.agrees(&Sample::Vector(wrong)));
    }
}

/// Workers that answer what they are asked.
struct Group {
    checks: SpotChecks,
    weights: Weights,
    /// By seniority.
    workers: Vec<(&'static str, bool)>,
    now: Instant,
    seed: u64,
    verdicts: Vec<CheckVerdict>,
    asked: u32,
}

impl Group {
    fn new() -> Self {
        Self {
            checks: SpotChecks::default(),
            weights: ("m".into(), "f".into()),
            workers: Vec::new(),
            now: Instant::now(),
            seed: 0,
            verdicts: Vec::new(),
            asked: 0,
        }
    }

    fn join(&mut self, name: &'static str, honest: bool) {
        self.workers.push((name, honest));
    }

    /// Everybody who is due answers, as the head would ask them.
    fn run(&mut self, seconds: u64) {
        for _ in 0..seconds * 4 {
            self.now += SECOND / 4;
            for (name, is_honest) in self.workers.clone() {
                if !self.checks.is_due(&self.weights, name, self.now) {
                    continue;
                }
                self.asked += 1;
                self.seed += 1;
                let question = self
                    .checks
                    .question(&self.weights, name, self.seed, self.now);
                let sample = match is_honest {
                    true => honest(self.seed),
                    false => forged(),
                };
                let peers: Vec<&str> = self.workers.iter().map(|(subject, _)| *subject).collect();
                let verdicts = self.checks.answered(
                    &self.weights,
                    name,
                    (question.round, sample),
                    &peers,
                    Schedule {
                        every: EVERY,
                        seed: self.seed,
                    },
                    self.now,
                );
                for verdict in &verdicts {
                    if let CheckVerdict::Outvoted { subject, .. } = verdict {
                        self.checks.forget(subject);
                        self.workers.retain(|(name, _)| name != subject);
                    }
                }
                self.verdicts.extend(verdicts);
            }
        }
    }

    fn check_state(&self, name: &str) -> CheckState {
        self.checks.check_state(&self.weights, name, self.now)
    }

    fn outvoted(&self) -> Vec<&str> {
        let outvoted = self.verdicts.iter().filter_map(|verdict| match verdict {
            CheckVerdict::Outvoted { subject, .. } => Some(subject.as_str()),
            _ => None,
        });
        outvoted.collect()
    }
}

#[test]
fn one_alone_serves_after_its_first_answer() {
    let mut group = Group::new();
    group.join("a", true);
    assert_eq!(group.check_state("a"), CheckState::New);
    group.run(1);
    assert_eq!(group.check_state("a"), CheckState::Cleared);
}

#[test]
fn honest_ones_are_all_cleared_and_asked_seldom() {
    let mut group = Group::new();
    for name in ["a", "b", "c", "d", "e"] {
        group.join(name, true);
    }
    group.run(1);
    assert!(
        ["a", "b", "c", "d", "e"]
            .iter()
            .all(|name| group.check_state(name) == CheckState::Cleared)
    );
    group.run(2400);
    let before = group.asked;
    group.run(3600);
    assert_eq!(group.verdicts, []);
    // Twelve checks an hour each, and as many again as comparators.
    assert!(
        group.asked - before <= 5 * 3 * 14,
        "{}",
        group.asked - before
    );
    assert!(group.asked - before >= 5 * 11, "{}", group.asked - before);
}

#[test]
fn a_liar_among_two_honest_ones_never_serves_and_is_out_within_seconds() {
    let mut group = Group::new();
    group.join("a", true);
    group.join("b", true);
    group.run(100);
    group.join("liar", false);
    for _ in 0..10 {
        group.run(1);
        assert_ne!(group.check_state("liar"), CheckState::Cleared);
    }
    assert_eq!(group.outvoted(), ["liar"]);
    assert_eq!(group.check_state("a"), CheckState::Cleared);
    assert_eq!(group.check_state("b"), CheckState::Cleared);
}

#[test]
fn one_that_begins_to_lie_later_is_found_at_the_next_check() {
    let mut group = Group::new();
    group.join("turns", true);
    group.join("b", true);
    group.join("c", true);
    group.run(20);
    group.workers[0].1 = false;
    group.run(30);
    assert_eq!(
        group.outvoted(),
        ["turns"],
        "within 30 s in its first minute"
    );
    let mut group = Group::new();
    group.join("b", true);
    group.join("c", true);
    group.join("turns", true);
    group.run(3600);
    group.workers[2].1 = false;
    group.run(310);
    assert_eq!(group.outvoted(), ["turns"]);
}

#[test]
fn of_two_that_differ_the_senior_goes_on_and_a_third_decides() {
    for senior_lies in [false, true] {
        let mut group = Group::new();
        group.join("senior", !senior_lies);
        group.run(60);
        group.join("junior", senior_lies);
        group.run(30);
        assert_eq!(
            group.verdicts,
            [CheckVerdict::Disputed {
                senior: "senior".into(),
                junior: "junior".into()
            }]
        );
        assert_eq!(group.check_state("junior"), CheckState::Held);
        assert_eq!(group.check_state("senior"), CheckState::Cleared);
        group.join("third", true);
        group.run(40);
        let liar = if senior_lies { "senior" } else { "junior" };
        assert_eq!(group.outvoted(), [liar], "{:?}", group.verdicts);
        let honest = if senior_lies { "junior" } else { "senior" };
        assert_eq!(group.check_state(honest), CheckState::Cleared);
        assert_eq!(group.check_state("third"), CheckState::Cleared);
    }
}

#[test]
fn one_whose_comparators_do_not_answer_is_not_kept_waiting_for_ever() {
    let mut checks = SpotChecks::default();
    let weights = ("m".to_owned(), "f".to_owned());
    let mut now = Instant::now();
    let peers = ["a"];
    let question = checks.question(&weights, "a", 1, now);
    checks.answered(
        &weights,
        "a",
        (question.round, honest(1)),
        &peers,
        SCHEDULE,
        now,
    );
    now += ROUND_LIFE * 2;
    let peers = ["a", "b"];
    let question = checks.question(&weights, "b", 2, now);
    checks.answered(
        &weights,
        "b",
        (question.round, honest(1)),
        &peers,
        SCHEDULE,
        now,
    );
    assert!(
        checks.is_due(&weights, "a", now),
        "it is asked beside the newcomer"
    );
    assert_eq!(checks.check_state(&weights, "b", now), CheckState::New);
    now += COMPARE_WAIT;
    assert_eq!(checks.check_state(&weights, "b", now), CheckState::New);
    now += BUSY_WAIT;
    assert_eq!(checks.check_state(&weights, "b", now), CheckState::Cleared);
}

#[test]
fn newcomers_do_not_vouch_for_each_other_while_those_of_long_standing_are_busy() {
    let mut checks = SpotChecks::default();
    let weights = ("m".to_owned(), "f".to_owned());
    let mut now = Instant::now();
    let mut peers = vec!["a"];
    let question = checks.question(&weights, "a", 1, now);
    let answer = |checks: &mut SpotChecks, who, round, sample, peers: &[&str], now| {
        checks.answered(&weights, who, (round, sample), peers, SCHEDULE, now)
    };
    answer(&mut checks, "a", question.round, honest(1), &peers, now);
    now += ROUND_LIFE * 2;
    peers.extend(["x", "y"]);
    let round = checks.question(&weights, "x", 2, now).round;
    assert_eq!(checks.question(&weights, "y", 3, now).round, round);
    answer(&mut checks, "x", round, forged(), &peers, now);
    now += SETTLE_AFTER * 2;
    answer(&mut checks, "y", round, forged(), &peers, now);
    now += COMPARE_WAIT;
    for liar in ["x", "y"] {
        assert_eq!(checks.check_state(&weights, liar, now), CheckState::New);
    }
    assert!(checks.is_due(&weights, "a", now));
}

#[test]
fn questions_differ_and_the_tables_stay_bounded() {
    let questions: BTreeSet<String> = (0..1000_u64)
        .map(|seed| question_of(seed.wrapping_mul(0x2545_F491_4F6C_DD1D)))
        .collect();
    assert!(questions.len() > 950, "{}", questions.len());
    assert!(questions.iter().all(|question| is_question(question)));
    assert!(!is_question("why?") && !is_question("Hello"));
    let mut checks = SpotChecks::default();
    let now = Instant::now();
    for number in 0..3000 {
        let weights = (format!("m{number}"), String::new());
        checks.question(&weights, "a", 1, now);
    }
    assert!(checks.groups.len() <= GROUPS);
}

#[test]
fn one_that_answers_at_once_is_asked_once_while_the_others_have_yet_to_answer() {
    let mut checks = SpotChecks::default();
    let weights = ("m".to_owned(), "f".to_owned());
    let start = Instant::now();
    let mut peers = vec!["a"];
    let answer = |checks: &mut SpotChecks, who, round, sample, peers: &[&str], now| {
        checks.answered(&weights, who, (round, sample), peers, SCHEDULE, now)
    };
    let first = checks.question(&weights, "a", 1, start).round;
    answer(&mut checks, "a", first, honest(1), &peers, start);
    peers.push("x");
    let begun = start + ROUND_LIFE;
    let round = checks.question(&weights, "x", 2, begun).round;
    answer(&mut checks, "x", round, honest(2), &peers, begun);
    let late = begun + ROUND_LIFE - SECOND;
    assert!(!checks.is_due(&weights, "x", begun));
    assert!(!checks.is_due(&weights, "x", late));
    assert!(checks.is_due(&weights, "a", late));
    assert_eq!(checks.question(&weights, "a", 3, late).round, round);
    answer(&mut checks, "a", round, honest(3), &peers, late);
    assert_eq!(checks.check_state(&weights, "x", late), CheckState::Cleared);

    // One that gives none is not waited for.
    peers.push("y");
    let begun = late + ROUND_LIFE;
    let round = checks.question(&weights, "y", 4, begun).round;
    answer(&mut checks, "y", round, honest(4), &peers, begun);
    checks.gave_none(&weights, "a");
    checks.gave_none(&weights, "x");
    assert!(!checks.is_due(&weights, "y", begun + SECOND));
    assert!(checks.is_due(&weights, "y", begun + SETTLE_AFTER));
}

#[test]
fn a_newcomer_does_not_wait_for_those_that_are_gone_or_late() {
    let weights = ("m".to_owned(), "f".to_owned());
    let start = Instant::now();
    let mut checks = SpotChecks::default();
    for (number, name) in ["a", "b"].into_iter().enumerate() {
        let round = checks.question(&weights, name, 1, start).round;
        let sample = (round, honest(number as u64));
        checks.answered(&weights, name, sample, &["a"], SCHEDULE, start);
    }
    let begun = start + ROUND_LIFE;
    let all = ["a", "b", "x"];
    let round = checks.question(&weights, "x", 2, begun).round;
    checks.answered(&weights, "x", (round, honest(7)), &all, SCHEDULE, begun);
    assert_eq!(checks.waiting(), std::slice::from_ref(&weights));
    assert_eq!(checks.look_again(&weights, &all, SCHEDULE, begun), []);

    // Both that it waits for are gone.
    let mut gone = checks.clone();
    gone.look_again(&weights, &["x"], SCHEDULE, begun + SECOND);
    assert_eq!(
        gone.check_state(&weights, "x", begun + SECOND),
        CheckState::Cleared
    );
    assert_eq!(gone.waiting(), Vec::<Weights>::new());

    // One has answered, and the other one is late.
    checks.answered(&weights, "a", (round, honest(8)), &all, SCHEDULE, begun);
    assert_eq!(checks.check_state(&weights, "x", begun), CheckState::New);
    let late = begun + SETTLE_AFTER;
    checks.look_again(&weights, &all, SCHEDULE, late);
    assert_eq!(checks.check_state(&weights, "x", late), CheckState::Cleared);
}
