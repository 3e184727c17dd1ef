//! Bounds of what a worker may send, and rejections that a second worker confirms.

use super::*;

fn bounded(tokens: u32) -> (Lifecycle, u32, Instant) {
    let start = Instant::now();
    let bounds = Bounds {
        tokens,
        ..Bounds::default()
    };
    let mut answer = Lifecycle::new(LIMITS, start).within(bounds);
    let attempt = answer.placed(WorkerId(1), Duration::ZERO, start).attempt;
    (answer, attempt, start)
}

fn is_blamed(answer: &Lifecycle, step: &Step) -> bool {
    *step == Step::Again(AttemptEnd::Failed) && answer.fault() == Fault::Worker
}

#[test]
fn a_token_more_than_was_asked_for_ends_the_attempt_by_the_workers_fault() {
    let (mut answer, attempt, now) = bounded(3);
    for index in 0..3 {
        let step = answer.tokens_came(attempt, one_token(index), now);
        assert!(matches!(step, Step::Emit(_)));
    }
    let step = answer.tokens_came(attempt, one_token(3), now);
    assert!(is_blamed(&answer, &step), "{step:?}");
    assert_eq!(answer.tokens().len(), 3, "nothing of it is kept");

    let (mut answer, attempt, now) = bounded(1_000_000);
    answer.set_context(2);
    let many = Tokens {
        tokens: vec![1; 3],
        ..Tokens::default()
    };
    let step = answer.tokens_came(attempt, many, now);
    assert!(
        is_blamed(&answer, &step),
        "no answer is longer than the context"
    );
}

#[test]
fn text_probabilities_and_errors_are_bounded_too() {
    let text = |bytes: usize| Tokens {
        tokens: vec![1],
        text: "x".repeat(bytes),
        ..Tokens::default()
    };
    let (mut answer, attempt, now) = bounded(100);
    let step = answer.tokens_came(attempt, text(1025), now);
    assert!(is_blamed(&answer, &step), "{step:?}");
    let (mut answer, attempt, now) = bounded(100);
    assert!(matches!(
        answer.tokens_came(attempt, text(256), now),
        Step::Emit(_)
    ));
    // Text behind the last token.
    let done = Done {
        completion_tokens: 1,
        text: "x".repeat(10_000),
        ..Done::default()
    };
    let step = answer.done(attempt, done, now);
    assert!(is_blamed(&answer, &step), "{step:?}");

    let logprob = |bytes: usize, top: usize| TokenLogprob {
        token: 1,
        bytes: vec![0; bytes],
        logprob: -1.0,
        top: vec![TokenLogprob::default(); top],
    };
    let with = |logprobs| Tokens {
        tokens: vec![1],
        logprobs,
        ..Tokens::default()
    };
    for (alternatives, logprobs) in [
        (None, vec![logprob(1, 0)]),
        (Some(2), vec![logprob(1, 0); 2]),
        (Some(2), vec![logprob(1, 4)]),
        (Some(2), vec![logprob(5000, 0)]),
    ] {
        let (mut answer, attempt, now) = bounded(10);
        answer.bounds.alternatives = alternatives;
        let step = answer.tokens_came(attempt, with(logprobs), now);
        assert!(is_blamed(&answer, &step), "{step:?}");
    }
    let (mut answer, attempt, now) = bounded(10);
    answer.bounds.alternatives = Some(2);
    let step = answer.tokens_came(attempt, with(vec![logprob(3, 3)]), now);
    assert!(matches!(step, Step::Emit(_)));

    let (mut answer, attempt, _) = bounded(10);
    let failure = Failure::Error {
        code: ErrorCode::INVALID_PAYLOAD,
        text: "\u{1b}[2J\n".repeat(100_000),
    };
    let Step::Fail(AnswerError::Rejected { text, .. }, _) = answer.failed(attempt, failure) else {
        panic!("not rejected");
    };
    assert!(text.len() <= 1024 && !text.contains(char::is_control));
}

#[test]
fn counts_that_only_the_worker_knows_are_cut_to_what_they_can_be() {
    let (mut answer, attempt, now) = bounded(10);
    answer.bounds.prompt_tokens = 50;
    answer.tokens_came(attempt, one_token(0), now);
    let done = Done {
        prompt_tokens: u32::MAX,
        cached_tokens: u32::MAX,
        completion_tokens: 1,
        ..Done::default()
    };
    let Step::Complete(complete) = answer.done(attempt, done, now) else {
        panic!("not complete");
    };
    assert_eq!(
        (complete.done.prompt_tokens, complete.done.cached_tokens),
        (50, 50)
    );
}

#[test]
fn a_flood_of_messages_that_bring_nothing_is_a_fault_and_emits_nothing() {
    let (mut answer, attempt, now) = bounded(10);
    let first = Progress::default();
    let mut steps = (0..5000).map(|index| match index % 3 {
        0 => answer.progressed(attempt, &first, None, now),
        1 => answer.tokens_came(attempt, Tokens::default(), now),
        _ => answer.idled(attempt, now),
    });
    assert_eq!(
        steps.find(|step| *step != Step::Wait),
        Some(Step::Again(AttemptEnd::Failed))
    );
    // Once a second it is what was asked for.
    let (mut answer, attempt, mut now) = bounded(10);
    for _ in 0..5000 {
        now += Duration::from_secs(1);
        assert_eq!(
            answer.progressed(attempt, &first, Some(now), now),
            Step::Wait
        );
    }
}

fn invalid(text: &str) -> Failure {
    Failure::Error {
        code: ErrorCode::INVALID_PAYLOAD,
        text: text.into(),
    }
}

#[test]
fn a_rejection_counts_when_a_second_worker_confirms_it() {
    let now = Instant::now();
    let mut answer = Lifecycle::new(LIMITS, now);
    let attempt = answer.placed(WorkerId(1), Duration::ZERO, now).attempt;
    answer.set_second_opinion(true);
    assert_eq!(
        answer.failed(attempt, invalid("first")),
        Step::Again(AttemptEnd::Cancelled)
    );
    assert_eq!(answer.avoided(), [WorkerId(1)]);
    let attempt = answer.placed(WorkerId(2), Duration::ZERO, now).attempt;
    let Step::Fail(AnswerError::Rejected { text, .. }, AttemptEnd::Cancelled) =
        answer.failed(attempt, invalid("second"))
    else {
        panic!("not rejected");
    };
    assert_eq!((text.as_str(), answer.failures()), ("first", 0));
}

#[test]
fn a_rejection_that_another_worker_contradicts_is_the_first_ones_fault() {
    let now = Instant::now();
    let mut answer = Lifecycle::new(LIMITS, now);
    let attempt = answer.placed(WorkerId(1), Duration::ZERO, now).attempt;
    answer.set_second_opinion(true);
    answer.failed(attempt, invalid("no"));
    let attempt = answer.placed(WorkerId(2), Duration::ZERO, now).attempt;
    assert!(matches!(
        answer.tokens_came(attempt, one_token(0), now),
        Step::Emit(_)
    ));
    let contradicted = answer.contradicted().expect("it was wrong");
    assert_eq!(contradicted.worker, WorkerId(1));
    // In the middle of an answer it is no judgement of the request.
    let step = answer.failed(attempt, invalid("no"));
    assert!(is_blamed(&answer, &step), "{step:?}");
}

#[test]
fn a_rejection_stands_where_nobody_else_can_be_asked() {
    let now = Instant::now();
    let mut answer = Lifecycle::new(LIMITS, now);
    let attempt = answer.placed(WorkerId(1), Duration::ZERO, now).attempt;
    assert!(matches!(
        answer.failed(attempt, invalid("no")),
        Step::Fail(AnswerError::Rejected { .. }, _)
    ));
    // The other one left before it could be asked.
    let mut answer = Lifecycle::new(LIMITS, now);
    let attempt = answer.placed(WorkerId(1), Duration::ZERO, now).attempt;
    answer.set_second_opinion(true);
    answer.failed(attempt, invalid("no"));
    let refused = Refusal::NoWorker { model: "m".into() };
    assert!(matches!(
        answer.refused(refused),
        Step::Fail(AnswerError::Rejected { .. }, _)
    ));
}
