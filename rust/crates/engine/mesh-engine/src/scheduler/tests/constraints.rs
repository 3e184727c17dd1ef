//! Answers that follow a grammar.

use super::*;
use crate::{Allowed, Constraint, ConstraintError, Grammar, SharedGrammar, TokenSet};

/// Words of three to five letters from `a` to `m`, in rising order.
#[derive(Debug)]
struct Rising;

#[derive(Debug, Default)]
struct Word {
    letters: u32,
    last: u32,
    next: TokenSet,
}

impl Grammar for Rising {
    fn begin(&self) -> Box<dyn Constraint> {
        Box::new(Word::default())
    }
}

impl Constraint for Word {
    fn allowed(&mut self) -> Result<Allowed<'_>, ConstraintError> {
        if self.letters == 5 {
            return Ok(Allowed::End);
        }
        let end = (self.letters >= 3).then_some(0);
        // Three letters at least, so the first of them leave room for the rest.
        let last = 13 - 2u32.saturating_sub(self.letters);
        self.next = (self.last + 1..=last).chain(end).collect();
        Ok(Allowed::Tokens(&self.next))
    }

    fn accept(&mut self, token: u32) -> Result<(), ConstraintError> {
        if token <= self.last || token > 13 {
            return Err(ConstraintError(format!("{token} does not rise")));
        }
        self.letters += 1;
        self.last = token;
        Ok(())
    }
}

fn rising(seed: u64) -> Request {
    let params = SamplingParams {
        seed,
        repetition_penalty: 1.1,
        ..SamplingParams::default()
    };
    Request {
        params,
        max_tokens: Some(50),
        grammar: Some(SharedGrammar(Arc::new(Rising))),
        ..Request::greedy("rising", prompt(seed as u32, 12), 50)
    }
}

#[track_caller]
fn check(text: &str) {
    assert!((3..=5).contains(&text.len()), "{text:?}");
    let bytes = text.as_bytes();
    assert!(
        bytes.is_sorted() && bytes.iter().all(|b| (b'a'..=b'm').contains(b)),
        "{text:?}"
    );
}

#[test]
fn an_answer_follows_its_grammar_and_leaves_others_alone() {
    let mut sim = Sim::new(4, 16, SchedulerConfig::default());
    let free = endless(prompt(9, 20), 30);
    sim.submit(100, free.clone());
    for seed in 0..20 {
        sim.submit(seed, rising(seed));
    }
    sim.run_until_idle();
    for seed in 0..20 {
        check(&sim.answer(seed).1);
        assert_eq!(sim.done(seed).finish, Finish::Stop);
    }
    assert_eq!(sim.answer(100), testing::answer(&free, CONTEXT));
}

#[test]
fn an_answer_under_a_grammar_goes_on_elsewhere_from_any_token() {
    for seed in 0..10 {
        let mut sim = Sim::new(1, 16, SchedulerConfig::default());
        sim.submit(1, rising(seed));
        sim.run_until_idle();
        let (tokens, text) = sim.answer(1);
        for (key, at) in (2..).zip(0..=tokens.len()) {
            sim.submit(
                key,
                Request {
                    generated: tokens[..at].to_vec(),
                    text_sent: at as u64,
                    ..rising(seed)
                },
            );
            sim.run_until_idle();
            let (rest, rest_text) = sim.answer(key);
            assert_eq!((&rest[..], &rest_text[..]), (&tokens[at..], &text[at..]));
        }
    }
}

#[test]
fn tokens_from_elsewhere_that_break_the_grammar_are_named() {
    let mut sim = Sim::new(1, 16, SchedulerConfig::default());
    let request = Request {
        generated: vec![5, 3],
        ..rising(1)
    };
    sim.submit(1, request);
    let error = sim.error(1).to_string();
    assert!(
        error.contains("token 1") && error.contains("3 does not rise"),
        "{error}"
    );
}

#[test]
fn a_grammar_ends_an_answer_whatever_else_would_not() {
    for (ignore_eos, min_tokens) in [(true, 0), (false, 40), (true, 40)] {
        let mut sim = Sim::new(1, 16, SchedulerConfig::default());
        let mut request = Request {
            ignore_eos,
            ..rising(3)
        };
        request.params.min_tokens = min_tokens;
        sim.submit(1, request);
        sim.run_until_idle();
        check(&sim.answer(1).1);
        assert_eq!(sim.done(1).finish, Finish::Stop);
    }
}
