//! One answer over a simulated fleet: workers die, fall silent, stumble and repeat themselves on any
//! schedule, and the client must see the exact answer or a clear error.

mod limits;

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

const LIMITS: Limits = Limits {
    timeout: Duration::from_secs(60),
    queue: Duration::from_secs(60),
    total: Some(Duration::from_secs(60)),
    reruns: 3,
    silence: Duration::from_secs(1),
    first_token: Duration::from_secs(5),
};

/// The answer of every worker: token `i` is `1000 + i`. Every third token is half a character: its text comes
/// with the next one.
struct Truth {
    length: u32,
}

impl Truth {
    fn token(index: u32) -> u32 {
        1000 + index
    }

    /// Text that is certain after `tokens` tokens.
    fn text(&self, tokens: u32) -> String {
        let held = if tokens < self.length && tokens % 3 == 2 {
            1
        } else {
            0
        };
        (0..tokens.saturating_sub(held))
            .map(|index| format!("<{index}é>"))
            .collect()
    }
}

/// Course of an attempt.
#[derive(Debug, Clone)]
struct Script {
    /// Tokens per message.
    batch: u32,
    /// Milliseconds between messages.
    gap_ms: u64,
    /// After so many messages...
    after: u32,
    /// ...this happens.
    fate: Fate,
    /// Messages with these numbers are sent twice, so many milliseconds later.
    echoes: Vec<(u32, u64)>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Fate {
    Finish,
    Dies,
    FallsSilent,
    Fails,
    SkipsAToken,
    RepeatsWithChanges,
    LosesTheEnd,
    Busy,
}

#[derive(Debug, Clone)]
enum Event {
    Tokens(Tokens),
    Done(Done),
    Failed(Failure),
}

/// The messages of one attempt with their times.
fn play(script: &Script, truth: &Truth, generated: u32, text_sent: u64) -> Vec<(Duration, Event)> {
    let mut events = Vec::new();
    let (mut at, mut have, mut sent) = (Duration::from_millis(50), generated, text_sent as usize);
    for message in 0.. {
        let step = Duration::from_millis(script.gap_ms);
        if message == script.after {
            let next = Tokens {
                index: have,
                tokens: vec![Truth::token(have)],
                ..Default::default()
            };
            let event = match script.fate {
                Fate::Finish => None,
                Fate::Dies => Some(Event::Failed(Failure::Lost("connection lost".into()))),
                Fate::FallsSilent => return events,
                Fate::Fails => Some(Event::Failed(error(ErrorCode::INFERENCE_FAILED))),
                Fate::Busy => Some(Event::Failed(error(ErrorCode::WORKER_BUSY))),
                Fate::SkipsAToken => Some(Event::Tokens(Tokens {
                    index: have + 1,
                    ..next
                })),
                Fate::RepeatsWithChanges if have > 0 => Some(Event::Tokens(Tokens {
                    index: have - 1,
                    tokens: vec![7],
                    ..next
                })),
                Fate::RepeatsWithChanges => Some(Event::Tokens(Tokens { index: 9, ..next })),
                Fate::LosesTheEnd => Some(Event::Done(Done {
                    completion_tokens: truth.length + 1,
                    ..Default::default()
                })),
            };
            if let Some(event) = event {
                events.push((at, event));
                return events;
            }
        }
        if have >= truth.length {
            break;
        }
        let end = (have + script.batch).min(truth.length);
        let text = truth.text(end).get(sent..).unwrap_or_default().to_owned();
        sent += text.len();
        let tokens = (have..end).map(Truth::token).collect();
        let event = Event::Tokens(Tokens {
            index: have,
            tokens,
            text,
            logprobs: Vec::new(),
        });
        for (_, later) in script
            .echoes
            .iter()
            .filter(|(number, _)| *number == message)
        {
            events.push((at + Duration::from_millis(*later), event.clone()));
        }
        events.push((at, event));
        have = end;
        at += step;
    }
    // A stream is in order: the end comes after every repeat.
    let last = events.iter().map(|(at, _)| *at).max().unwrap_or(at).max(at);
    let text = truth
        .text(truth.length)
        .get(sent..)
        .unwrap_or_default()
        .to_owned();
    events.push((
        last,
        Event::Done(Done {
            completion_tokens: have,
            text,
            ..Default::default()
        }),
    ));
    events
}

fn error(code: ErrorCode) -> Failure {
    Failure::Error {
        code,
        text: "as scripted".into(),
    }
}

struct Seen {
    tokens: Vec<u32>,
    text: String,
    end: Result<Complete, AnswerError>,
    took: Duration,
}

/// Runs one answer to its end; attempt `n` follows `scripts[n]`, later ones finish.
fn run(truth: &Truth, scripts: &[Script]) -> Seen {
    let start = Instant::now();
    let mut now = start;
    let mut answer = Lifecycle::new(LIMITS, now);
    let (mut tokens, mut text) = (Vec::new(), String::new());
    // Events in flight, of old attempts too: (time, number) keeps those of one attempt in order.
    let mut network: BTreeMap<(Instant, u32, usize), Event> = BTreeMap::new();
    let mut attempts = 0;
    let end = loop {
        if answer.phase == Phase::Placing {
            let resume = answer.placed(WorkerId(attempts), Duration::from_millis(50), now);
            let finish = Script {
                batch: 2,
                gap_ms: 20,
                after: u32::MAX,
                fate: Fate::Finish,
                echoes: Vec::new(),
            };
            let script = scripts.get(attempts as usize).unwrap_or(&finish);
            attempts += 1;
            let generated = answer.tokens().len() as u32;
            for (number, (delay, event)) in play(script, truth, generated, resume.text_sent)
                .into_iter()
                .enumerate()
            {
                network.insert((now + delay, resume.attempt, number), event);
            }
        }
        let timer = answer
            .next_timer()
            .expect("an answer that has not ended has a deadline");
        let arrival = network
            .keys()
            .next()
            .copied()
            .filter(|(at, ..)| *at <= timer);
        let step = match arrival {
            Some(key) => {
                now = now.max(key.0);
                match network.remove(&key).unwrap() {
                    Event::Tokens(tokens) => answer.tokens_came(key.1, tokens, now),
                    Event::Done(done) => answer.done(key.1, done, now),
                    Event::Failed(failure) => answer.failed(key.1, failure),
                }
            }
            None => {
                now = timer;
                answer.time_passed(now)
            }
        };
        match step {
            Step::Wait | Step::Again(_) | Step::Advanced(_) => {}
            Step::Emit(delta) => {
                assert_eq!(
                    delta.index as usize,
                    tokens.len(),
                    "a gap or a repeat reached the client"
                );
                tokens.extend(delta.tokens);
                text += &delta.text;
            }
            Step::Complete(complete) => {
                text += &complete.done.text;
                break Ok(complete);
            }
            Step::Fail(error, _) => break Err(error),
        }
    };
    Seen {
        tokens,
        text,
        end,
        took: now - start,
    }
}

fn script(after: u32, fate: Fate) -> Script {
    Script {
        batch: 1,
        gap_ms: 30,
        after,
        fate,
        echoes: Vec::new(),
    }
}

fn whole(truth: &Truth) -> Vec<u32> {
    (0..truth.length).map(Truth::token).collect()
}

#[test]
fn a_worker_may_die_at_any_point() {
    let truth = Truth { length: 12 };
    for fate in [
        Fate::Dies,
        Fate::FallsSilent,
        Fate::Fails,
        Fate::SkipsAToken,
        Fate::RepeatsWithChanges,
        Fate::LosesTheEnd,
    ] {
        for after in 0..=12 {
            for again in 0..=12 {
                let seen = run(&truth, &[script(after, fate), script(again, Fate::Dies)]);
                let complete = seen.end.unwrap();
                assert_eq!(
                    seen.tokens,
                    whole(&truth),
                    "{fate:?} after {after}, then {again}"
                );
                assert_eq!(seen.text, truth.text(12));
                assert!(complete.reruns >= 1);
            }
        }
    }
}

#[test]
fn a_silent_worker_is_given_up_after_the_silence_limit() {
    let seen = run(&Truth { length: 12 }, &[script(4, Fate::FallsSilent)]);
    assert!(seen.end.is_ok());
    assert!(
        seen.took >= LIMITS.silence && seen.took < LIMITS.silence * 3,
        "{:?}",
        seen.took
    );
}

#[test]
fn silence_with_a_known_cause_is_excused() {
    let start = Instant::now();
    let mut answer = Lifecycle::new(LIMITS, start);
    let resume = answer.placed(WorkerId(1), Duration::ZERO, start);
    let tokens = Tokens {
        tokens: vec![1],
        ..Default::default()
    };
    answer.tokens_came(resume.attempt, tokens, start);
    let late = start + LIMITS.silence;
    answer.excused_until(late);
    assert_eq!(answer.time_passed(late), Step::Wait);
    answer.excused_until(start);
    assert_eq!(
        answer.next_timer(),
        Some(late + LIMITS.silence),
        "an excuse never takes time away"
    );
    assert_eq!(
        answer.time_passed(late + LIMITS.silence),
        Step::Again(AttemptEnd::Failed)
    );
    answer.excused_until(late);
    assert_eq!(
        answer.next_timer(),
        Some(start + LIMITS.timeout),
        "the deadline holds"
    );
}

#[test]
fn slow_steps_stretch_the_silence_limit() {
    let start = Instant::now();
    let mut answer = Lifecycle::new(LIMITS, start);
    let attempt = answer.placed(WorkerId(1), Duration::ZERO, start).attempt;
    let mut now = start;
    for index in 0..5 {
        now += Duration::from_millis(800);
        answer.tokens_came(
            attempt,
            Tokens {
                index,
                tokens: vec![1],
                ..Default::default()
            },
            now,
        );
    }
    assert_eq!(answer.next_timer(), Some(now + Duration::from_secs(16)));
}

#[test]
fn a_long_prefill_is_not_silence() {
    let start = Instant::now();
    let mut answer = Lifecycle::new(LIMITS, start);
    answer.placed(WorkerId(1), Duration::from_secs(3), start);
    assert_eq!(
        answer.time_passed(start + Duration::from_secs(34)),
        Step::Wait
    );
    assert!(matches!(
        answer.time_passed(start + Duration::from_secs(35)),
        Step::Again(AttemptEnd::Failed)
    ));
}

#[test]
fn too_many_deaths_are_an_error_that_says_so() {
    let seen = run(&Truth { length: 12 }, &vec![script(1, Fate::Dies); 9]);
    let error = seen.end.unwrap_err();
    assert_eq!(
        error.to_string(),
        "4 attempts at this request failed on 4 workers, the last one with: connection lost"
    );
    assert_eq!(seen.tokens, whole(&Truth { length: 4 }));
}

#[test]
fn the_deadline_ends_everything() {
    let slow = Script {
        gap_ms: 900,
        ..script(u32::MAX, Fate::Finish)
    };
    let seen = run(&Truth { length: 500 }, &[slow]);
    assert_eq!(
        seen.end.unwrap_err(),
        AnswerError::Timeout(LIMITS.total.unwrap())
    );
    assert_eq!(Some(seen.took), LIMITS.total);
}

#[test]
fn a_request_that_no_worker_can_answer_is_not_run_again() {
    let now = Instant::now();
    let mut answer = Lifecycle::new(LIMITS, now);
    let attempt = answer.placed(WorkerId(1), Duration::ZERO, now).attempt;
    let step = answer.failed(attempt, error(ErrorCode::CONTEXT_TOO_LONG));
    assert!(matches!(
        step,
        Step::Fail(
            AnswerError::Rejected {
                code: ErrorCode::CONTEXT_TOO_LONG,
                ..
            },
            _
        )
    ));
    assert_eq!(answer.next_timer(), None);
}

#[test]
fn busy_workers_do_not_use_up_the_reruns() {
    let seen = run(&Truth { length: 3 }, &vec![script(0, Fate::Busy); 20]);
    assert_eq!(seen.end.unwrap().reruns, 0);
}

/// A long-lived answer: no limit on the whole.
const PATIENT: Limits = Limits {
    total: None,
    ..LIMITS
};

fn waits(phase: RequestPhase, quiet_ms: u64) -> Progress {
    Progress {
        phase: phase.into(),
        quiet_ms,
        ..Progress::default()
    }
}

fn one_token(index: u32) -> Tokens {
    Tokens {
        index,
        tokens: vec![1],
        ..Default::default()
    }
}

#[test]
fn a_request_that_waits_in_a_queue_that_moves_is_not_given_up() {
    let start = Instant::now();
    let mut answer = Lifecycle::new(PATIENT, start);
    let attempt = answer.placed(WorkerId(1), Duration::ZERO, start).attempt;
    let mut now = start;
    for _ in 0..7200 {
        now += Duration::from_secs(1);
        assert_eq!(answer.time_passed(now), Step::Wait);
        // Others get their tokens from that worker.
        answer.progressed(attempt, &waits(RequestPhase::Queued, 40), Some(now), now);
    }
    assert!(!answer.waits_untold(start));
    // Then the signs stop: that is silence.
    let due = answer.next_timer().unwrap();
    assert!(due <= now + LIMITS.first_token);
    assert_eq!(answer.time_passed(due), Step::Again(AttemptEnd::Failed));
}

#[test]
fn a_step_without_tokens_gets_as_much_time_as_the_first_token() {
    let start = Instant::now();
    let mut answer = Lifecycle::new(PATIENT, start);
    let expected = Duration::from_secs(7);
    let attempt = answer.placed(WorkerId(1), expected, start).attempt;
    let mut now = start;
    for _ in 0..20 {
        now += Duration::from_secs(60);
        assert_eq!(answer.stepped(attempt, 64, now), Step::Advanced(64));
        assert_eq!(
            answer.time_passed(now + Duration::from_secs(59)),
            Step::Wait
        );
    }
    assert_eq!(answer.stepped(attempt + 1, 64, now), Step::Wait, "given up");
    let Step::Complete(complete) = answer.done(attempt, Done::default(), now) else {
        panic!("it goes on");
    };
    assert_eq!(complete.first_token, Some(Duration::from_secs(60)));
}

#[test]
fn a_death_after_a_step_is_not_a_silent_one() {
    let now = Instant::now();
    let mut answer = Lifecycle::new(PATIENT, now);
    for worker in 1..=3 {
        let attempt = answer.placed(WorkerId(worker), Duration::ZERO, now).attempt;
        answer.stepped(attempt, 1, now);
        let lost = answer.failed(attempt, Failure::Died("link closed".into()));
        assert!(matches!(lost, Step::Again(AttemptEnd::Failed)), "{lost:?}");
    }
}

#[test]
fn signs_of_life_of_an_engine_that_hangs_are_none() {
    let start = Instant::now();
    let mut answer = Lifecycle::new(PATIENT, start);
    let attempt = answer.placed(WorkerId(1), Duration::ZERO, start).attempt;
    for second in 1..5 {
        let now = start + Duration::from_secs(second);
        answer.progressed(
            attempt,
            &waits(RequestPhase::Prefilling, second * 1000),
            None,
            now,
        );
    }
    assert_eq!(answer.next_timer(), Some(start + LIMITS.first_token));
    let now = start + LIMITS.first_token;
    answer.progressed(
        attempt,
        &waits(RequestPhase::Prefilling, u64::MAX),
        None,
        now,
    );
    assert_eq!(answer.time_passed(now), Step::Again(AttemptEnd::Failed));
}

#[test]
fn an_answer_that_gives_its_place_to_others_is_waited_for() {
    let start = Instant::now();
    let mut answer = Lifecycle::new(PATIENT, start);
    let attempt = answer.placed(WorkerId(1), Duration::ZERO, start).attempt;
    let mut now = start;
    for index in 0..10 {
        now += Duration::from_millis(50);
        answer.tokens_came(attempt, one_token(index), now);
    }
    assert_eq!(answer.next_timer(), Some(now + LIMITS.silence));
    now += Duration::from_millis(900);
    answer.progressed(attempt, &waits(RequestPhase::Queued, 10), None, now);
    assert!(answer.next_timer() > Some(now + LIMITS.silence * 4));
    // Its next token ends the wait, which says nothing about the pace.
    now += Duration::from_secs(4);
    answer.tokens_came(attempt, one_token(10), now);
    assert_eq!(answer.next_timer(), Some(now + LIMITS.silence));
}

#[test]
fn a_steady_answer_is_not_cut_however_long_it_takes() {
    let start = Instant::now();
    let mut answer = Lifecycle::new(PATIENT, start);
    let attempt = answer.placed(WorkerId(1), Duration::ZERO, start).attempt;
    for index in 0..5000 {
        let now = start + Duration::from_millis(900) * index;
        assert_eq!(answer.time_passed(now), Step::Wait);
        answer.tokens_came(attempt, one_token(index), now);
    }
}

#[test]
fn waiting_for_room_has_its_own_limit_that_busy_workers_do_not_renew() {
    let start = Instant::now();
    let mut answer = Lifecycle::new(PATIENT, start);
    let mut now = start;
    let error = loop {
        let attempt = answer.placed(WorkerId(1), Duration::ZERO, now).attempt;
        now += Duration::from_secs(1);
        answer.failed(attempt, error(ErrorCode::WORKER_BUSY));
        if let Step::Fail(error, ended) = answer.time_passed(now) {
            assert_eq!(ended, AttemptEnd::Cancelled);
            break error;
        }
    };
    assert_eq!(error, AnswerError::QueueTimeout(LIMITS.queue));
    assert_eq!(now, start + LIMITS.queue);
}

#[test]
fn one_worker_that_fails_often_is_one_worker() {
    let now = Instant::now();
    let mut answer = Lifecycle::new(PATIENT, now);
    for _ in 0..LIMITS.reruns {
        let attempt = answer.placed(WorkerId(1), Duration::ZERO, now).attempt;
        answer.failed(attempt, Failure::Lost("gone".into()));
    }
    let attempt = answer.placed(WorkerId(1), Duration::ZERO, now).attempt;
    let Step::Fail(error, _) = answer.failed(attempt, Failure::Lost("gone".into())) else {
        panic!("it goes on");
    };
    assert_eq!(
        error.to_string(),
        "4 attempts at this request failed on 1 worker, the last one with: gone"
    );
}

/// Dies on one worker after the other; each time after so many tokens. The error at last, and the deaths
/// before it.
fn deaths(tokens_before: &[u32]) -> (AnswerError, u32) {
    let now = Instant::now();
    let mut answer = Lifecycle::new(PATIENT, now);
    let mut have = 0;
    for (deaths, &tokens) in (1..).zip(tokens_before) {
        let worker = WorkerId(u64::from(deaths));
        let attempt = answer.placed(worker, Duration::ZERO, now).attempt;
        for _ in 0..tokens {
            let came = Tokens {
                index: have,
                tokens: vec![Truth::token(have)],
                ..Tokens::default()
            };
            assert!(matches!(
                answer.tokens_came(attempt, came, now),
                Step::Emit(_)
            ));
            have += 1;
        }
        match answer.failed(attempt, Failure::Died("link closed".into())) {
            Step::Fail(error, AttemptEnd::Failed) => return (error, deaths),
            Step::Again(AttemptEnd::Failed) => {}
            other => panic!("{other:?}"),
        }
        // After the first death that it may have caused it gets a worker where nothing else begins.
        assert_eq!(answer.is_suspect(), tokens == 0 || deaths > 1);
    }
    panic!("it goes on for ever")
}

#[test]
fn a_request_that_kills_workers_is_not_handed_from_one_to_the_next() {
    let (error, after) = deaths(&[0; 10]);
    assert_eq!(after, 2);
    assert_eq!(
        error.to_string(),
        "2 workers died while they had this request and had not begun to answer it, so it is not tried again; change it, or ask again \
         if they died of something else: link closed"
    );
    assert_eq!(deaths(&[3, 0, 0, 0]).1, 3, "also of an answer that goes on");
    assert_eq!(deaths(&[1; 10]).1, 4, "also after its first token");
}

#[test]
fn a_worker_that_only_lost_its_link_does_not_count_as_dead() {
    let now = Instant::now();
    let mut answer = Lifecycle::new(PATIENT, now);
    for connection in 0..3 {
        let worker = WorkerId(connection);
        let attempt = answer.placed(worker, Duration::ZERO, now).attempt;
        let lost = answer.failed(attempt, Failure::Died("the peer went silent".into()));
        assert!(matches!(lost, Step::Again(AttemptEnd::Failed)), "{lost:?}");
        assert!(answer.is_suspect());
        answer.lives(worker);
        assert!(!answer.is_suspect());
    }
    assert_eq!(answer.failures(), 3, "they are failures all the same");
}

fn any_script() -> impl Strategy<Value = Script> {
    let fate = prop_oneof![
        2 => Just(Fate::Finish),
        3 => Just(Fate::Dies),
        2 => Just(Fate::FallsSilent),
        1 => Just(Fate::Fails),
        1 => Just(Fate::SkipsAToken),
        1 => Just(Fate::RepeatsWithChanges),
        1 => Just(Fate::LosesTheEnd),
        1 => Just(Fate::Busy),
    ];
    // Repeats come within the attempt's own stream, hence never before what they repeat.
    let echoes = prop::collection::vec((0u32..20, 0u64..3000), 0..4);
    (1u32..5, 0u64..2500, 0u32..20, fate, echoes).prop_map(
        |(batch, gap_ms, after, fate, echoes)| Script {
            batch,
            gap_ms,
            after,
            fate,
            echoes,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_schedule_gives_the_exact_answer_or_a_clear_error(
        length in 1u32..30,
        scripts in prop::collection::vec(any_script(), 0..8),
    ) {
        let truth = Truth { length };
        let seen = run(&truth, &scripts);
        prop_assert!(whole(&truth).starts_with(&seen.tokens));
        prop_assert!(truth.text(length).starts_with(&seen.text));
        match seen.end {
            Ok(_) => {
                prop_assert_eq!(seen.tokens, whole(&truth));
                prop_assert_eq!(seen.text, truth.text(length));
            }
            Err(AnswerError::WorkersFailed { attempts, .. }) => prop_assert_eq!(attempts, LIMITS.reruns + 1),
            Err(AnswerError::Timeout(_)) => prop_assert_eq!(seen.took, LIMITS.timeout),
            Err(other) => prop_assert!(false, "unexpected error {}", other),
        }
    }
}

#[test]
fn what_is_excused_is_looked_at_again_whatever_was_heard_meanwhile() {
    let start = Instant::now();
    let mut answer = Lifecycle::new(PATIENT, start);
    let attempt = answer.placed(WorkerId(1), Duration::ZERO, start).attempt;
    let heard = start + Duration::from_secs(2);
    answer.progressed(attempt, &waits(RequestPhase::Queued, 1), None, heard);
    let due = answer.next_timer().unwrap();
    let again = due + Duration::from_millis(300);
    answer.look_again_at(again);
    assert_eq!(answer.time_passed(due), Step::Wait);
    assert_eq!(answer.next_timer(), Some(again));
    assert!(!matches!(answer.time_passed(again), Step::Wait));
}

#[test]
fn signs_of_life_that_nothing_bears_out_are_believed_for_as_long_as_a_silence_may_last() {
    let start = Instant::now();
    let mut answer = Lifecycle::new(PATIENT, start);
    let attempt = answer.placed(WorkerId(1), Duration::ZERO, start).attempt;
    let mut now = start;
    let ended = loop {
        now += Duration::from_secs(1);
        let step = answer.progressed(attempt, &waits(RequestPhase::Prefilling, 0), None, now);
        assert_eq!(step, Step::Wait);
        match answer.time_passed(now) {
            Step::Wait => {}
            step => break step,
        }
    };
    assert_eq!(
        (ended, answer.fault()),
        (Step::Again(AttemptEnd::Failed), Fault::Silence)
    );
    let lasted = now - start;
    assert!(lasted >= LIMITS.timeout && lasted <= LIMITS.timeout + LIMITS.first_token * 2);
}

#[test]
fn a_prompt_that_gets_on_is_waited_for_and_more_of_it_than_there_is_proves_nothing() {
    let start = Instant::now();
    let bounds = Bounds {
        prompt_tokens: 1000,
        ..Bounds::default()
    };
    let mut answer = Lifecycle::new(PATIENT, start).within(bounds);
    let attempt = answer.placed(WorkerId(1), Duration::ZERO, start).attempt;
    let mut now = start;
    for done in 0..1000 {
        now += Duration::from_secs(1);
        let progress = Progress {
            prompt_done: done,
            ..waits(RequestPhase::Prefilling, 0)
        };
        answer.progressed(attempt, &progress, None, now);
        assert_eq!(answer.time_passed(now), Step::Wait);
    }
    let gave_up = (1000..2000).any(|done| {
        now += Duration::from_secs(1);
        let progress = Progress {
            prompt_done: done * 1000,
            ..waits(RequestPhase::Prefilling, 0)
        };
        answer.progressed(attempt, &progress, None, now);
        answer.time_passed(now) != Step::Wait
    });
    assert!(gave_up);
}
