//! Scheduling in simulated time, against a stage whose every answer is known beforehand.

use std::collections::{HashMap, VecDeque};

use proptest::prelude::*;

use super::*;
use crate::request::{Done, Finish, Request, SamplingParams, TokenScore};
use crate::runner::apply;
use crate::testing::{self, HashStage, Letters};
use crate::{Stage, StageInput, StageOutput, sampler};

mod constraints;

const CONTEXT: u32 = 200;

/// A scheduler with its stage and a clock that advances by the duration of the steps.
struct Sim {
    scheduler: Scheduler,
    stage: HashStage,
    now: Instant,
    step: Step,
    /// Events of each request with the time they came.
    events: HashMap<RequestKey, Vec<(Instant, Event)>>,
}

impl Sim {
    fn new(slots: u32, max_rows: u32, config: SchedulerConfig) -> Self {
        Self::with_context(CONTEXT, slots, max_rows, config)
    }

    fn with_context(context: u32, slots: u32, max_rows: u32, config: SchedulerConfig) -> Self {
        let stage = HashStage::new(slots, context, max_rows);
        Sim {
            scheduler: Scheduler::new(stage.info(), Arc::new(Letters), config),
            stage,
            now: Instant::now(),
            step: Step::default(),
            events: HashMap::new(),
        }
    }

    fn submit(&mut self, key: RequestKey, request: Request) {
        self.scheduler.submit(key, request.into(), self.now);
        self.collect();
    }

    /// Plans a step; returns whether there is one.
    fn plan(&mut self) -> bool {
        let planned = self.scheduler.plan(&mut self.step, self.now);
        self.collect();
        planned
    }

    /// Runs the planned step: 10 ms and 1 ms for each row.
    fn run(&mut self) {
        let step = std::mem::take(&mut self.step);
        self.run_step(&step);
    }

    fn run_step(&mut self, step: &Step) {
        self.now += Duration::from_millis(10 + step.tokens.len() as u64);
        let input = StageInput::Tokens(&step.tokens);
        let output = apply(&step.slot_ops, &mut self.stage)
            .and_then(|()| self.stage.forward(&step.segments, input));
        match output {
            Ok(StageOutput::Logits(logits)) => self.scheduler.complete(step, logits, self.now),
            Ok(StageOutput::Hidden(_)) => unreachable!("the stage gives logits"),
            Err(error) => self.scheduler.fail(step, &error),
        }
        self.collect();
        let held = self.stage.rows_held() as u64;
        let failed = self.stage.fails_at.is_some_and(|at| self.stage.calls > at);
        assert!(
            failed || held <= self.scheduler.kv_total,
            "{held} KV rows are over the budget"
        );
    }

    fn run_until_idle(&mut self) {
        for _ in 0..100_000 {
            if !self.plan() {
                assert!(self.scheduler.is_idle());
                return;
            }
            self.run();
        }
        panic!("the scheduler does not come to an end");
    }

    fn collect(&mut self) {
        while let Some((key, event)) = self.scheduler.next_event() {
            self.events.entry(key).or_default().push((self.now, event));
        }
    }

    /// The tokens and the text of an answer that came so far, checked for gaps.
    fn answer(&self, key: RequestKey) -> (Vec<u32>, String) {
        let (mut tokens, mut text) = (Vec::new(), String::new());
        let mut first = None;
        for (i, (_, event)) in self.events[&key].iter().enumerate() {
            assert_eq!(event.is_last(), i + 1 == self.events[&key].len());
            match event {
                Event::Tokens(t) => {
                    let first = *first.get_or_insert(t.index);
                    assert_eq!(t.index as usize, first as usize + tokens.len());
                    tokens.extend_from_slice(&t.tokens);
                    text += &t.text;
                }
                Event::Done(done) => {
                    text += &done.text;
                    if let Some(first) = first {
                        assert_eq!(
                            done.completion_tokens as usize,
                            first as usize + tokens.len()
                        );
                    }
                }
                other => panic!("request {key} ended with {other:?}"),
            }
        }
        (tokens, text)
    }

    fn done(&self, key: RequestKey) -> &Done {
        match &self.events[&key].last().unwrap().1 {
            Event::Done(done) => done,
            other => panic!("request {key} ended with {other:?}"),
        }
    }

    fn error(&self, key: RequestKey) -> &RequestError {
        match &self.events[&key].last().unwrap().1 {
            Event::Failed(error) => error,
            other => panic!("request {key} ended with {other:?}"),
        }
    }

    /// Time of the first token, and the longest wait between two tokens.
    fn pace(&self, key: RequestKey) -> (Instant, Duration) {
        let tokens = self.events[&key]
            .iter()
            .filter(|(_, e)| matches!(e, Event::Tokens(_)));
        let times: Vec<Instant> = tokens.map(|&(at, _)| at).collect();
        let gaps = times.windows(2).map(|w| w[1] - w[0]);
        (times[0], gaps.max().unwrap_or_default())
    }
}

fn scores(tokens: Vec<u32>) -> GenerationRequest {
    let id = "score".to_owned();
    GenerationRequest::Scores { id, tokens }
}

fn prompt(seed: u32, len: u32) -> Vec<u32> {
    (0..len)
        .map(|i| 1 + (seed * 7919 + i * 31 + i * i * seed) % 47)
        .collect()
}

fn endless(prompt: Vec<u32>, max_tokens: u32) -> Request {
    Request {
        ignore_eos: true,
        ..Request::greedy("test", prompt, max_tokens)
    }
}

#[test]
fn an_answer_is_what_the_model_says() {
    let mut sim = Sim::new(2, 16, SchedulerConfig::default());
    let request = endless(prompt(1, 20), 30);
    sim.submit(1, request.clone());
    sim.run_until_idle();
    assert_eq!(sim.answer(1), testing::answer(&request, CONTEXT));
    let done = sim.done(1);
    assert_eq!(done.finish, Finish::Length);
    assert_eq!(
        (
            done.prompt_tokens,
            done.completion_tokens,
            done.cached_tokens
        ),
        (20, 30, 0)
    );
    // 20 rows in chunks of at most 16, then 29 single ones.
    assert_eq!(done.first_token, Some(Duration::from_millis(26 + 14)));
    assert_eq!(done.total, Duration::from_millis(40 + 29 * 11));
}

#[test]
fn a_long_prompt_does_not_stall_answers_in_progress() {
    let config = SchedulerConfig {
        decode_stall: Duration::from_millis(30),
        ..SchedulerConfig::default()
    };
    let mut sim = Sim::new(4, 128, config);
    sim.submit(1, endless(prompt(1, 5), 100));
    for _ in 0..10 {
        assert!(sim.plan());
        sim.run();
    }
    sim.submit(2, endless(prompt(2, 190), 5));
    sim.run_until_idle();
    let (_, longest_wait) = sim.pace(1);
    assert!(
        longest_wait <= Duration::from_millis(50),
        "waited {longest_wait:?}"
    );
    assert_eq!(
        sim.answer(2),
        testing::answer(&endless(prompt(2, 190), 5), CONTEXT)
    );
}

#[test]
fn a_short_prompt_does_not_wait_for_a_long_one() {
    let mut sim = Sim::new(4, 20, SchedulerConfig::default());
    sim.submit(1, endless(prompt(1, 190), 2));
    sim.submit(2, endless(prompt(2, 10), 2));
    sim.run_until_idle();
    assert!(sim.pace(2).0 + Duration::from_millis(200) < sim.pace(1).0);
}

#[test]
fn prompts_of_equal_length_finish_one_after_the_other() {
    let mut sim = Sim::new(4, 40, SchedulerConfig::default());
    for key in 0..4 {
        sim.submit(key, endless(prompt(key as u32 + 1, 100), 1));
    }
    sim.run_until_idle();
    let firsts: Vec<Instant> = (0..4).map(|key| sim.pace(key).0).collect();
    assert!(firsts.is_sorted());
    assert!(firsts[0] + Duration::from_millis(100) < firsts[3]);
}

#[test]
fn the_next_turn_computes_only_what_is_new() {
    let mut sim = Sim::new(2, 64, SchedulerConfig::default());
    let first = endless(prompt(1, 100), 20);
    sim.submit(1, first.clone());
    sim.submit(2, endless(prompt(2, 50), 20));
    sim.run_until_idle();
    let mut tokens = first.prompt_tokens.clone();
    tokens.extend(sim.answer(1).0);
    tokens.extend(prompt(3, 10));
    let before = sim.scheduler.load().totals;
    let second = endless(tokens, 1);
    sim.submit(3, second.clone());
    sim.run_until_idle();
    let after = sim.scheduler.load().totals;
    // The last token of the answer was never computed on.
    assert_eq!(sim.done(3).cached_tokens, 119);
    assert_eq!(after.prefill_rows - before.prefill_rows, 11);
    assert_eq!(sim.answer(3), testing::answer(&second, CONTEXT));
}

#[test]
fn an_answer_in_progress_lends_its_rows() {
    let mut sim = Sim::new(2, 64, SchedulerConfig::default());
    let request = endless(prompt(1, 60), 50);
    sim.submit(1, request.clone());
    assert!(sim.plan());
    sim.run();
    sim.submit(2, request.clone());
    sim.run_until_idle();
    assert_eq!(sim.done(2).cached_tokens, 59);
    let expected = testing::answer(&request, CONTEXT);
    assert_eq!(sim.answer(1), expected);
    assert_eq!(sim.answer(2), expected);
}

#[test]
fn the_queue_is_first_come_first_served_and_limited() {
    let config = SchedulerConfig {
        queue_limit: 2,
        ..SchedulerConfig::default()
    };
    let mut sim = Sim::new(1, 16, config);
    sim.submit(0, endless(prompt(9, 5), 10));
    assert!(sim.plan());
    for key in 1..=3 {
        sim.submit(key, endless(prompt(key as u32, 5), 5));
    }
    assert_eq!(*sim.error(3), RequestError::QueueFull { limit: 2 });
    sim.run();
    sim.run_until_idle();
    assert!(sim.pace(0).0 < sim.pace(1).0 && sim.pace(1).0 < sim.pace(2).0);
}

#[test]
fn where_a_request_is_on_its_way_is_known() {
    let mut sim = Sim::new(1, 16, SchedulerConfig::default());
    sim.submit(1, endless(prompt(1, 20), 5));
    sim.submit(2, endless(prompt(2, 5), 5));
    let status = |sim: &Sim, key| sim.scheduler.status(key);
    let queued = |ahead| Some(RequestStatus::Queued { ahead });
    assert_eq!((status(&sim, 1), status(&sim, 2)), (queued(0), queued(1)));
    assert!(sim.plan());
    let prefilling = Some(RequestStatus::Prefilling {
        done: 16,
        total: 20,
    });
    assert_eq!((status(&sim, 1), status(&sim, 2)), (prefilling, queued(0)));
    sim.run();
    assert!(sim.plan());
    sim.run();
    assert_eq!(status(&sim, 1), Some(RequestStatus::Decoding));
    sim.run_until_idle();
    assert_eq!((status(&sim, 1), status(&sim, 2)), (None, None));
}

#[test]
fn a_deadline_ends_a_request_wherever_it_is() {
    let mut sim = Sim::new(1, 16, SchedulerConfig::default());
    let late = |prompt, ms| Request {
        deadline: Some(sim.now + Duration::from_millis(ms)),
        ..endless(prompt, 100)
    };
    let (running, queued) = (late(prompt(1, 5), 100), late(prompt(2, 5), 50));
    sim.submit(1, running);
    sim.submit(2, queued);
    sim.run_until_idle();
    assert_eq!(*sim.error(2), RequestError::DeadlineExceeded { tokens: 0 });
    let RequestError::DeadlineExceeded { tokens } = *sim.error(1) else {
        panic!("{:?}", sim.error(1));
    };
    // A step of 5 rows and then single ones, 11 ms each.
    assert_eq!(tokens, 9);
    assert_eq!(sim.scheduler.load().running, 0);
}

#[test]
fn what_cannot_work_is_refused_before_any_work() {
    let config = SchedulerConfig {
        kv_tokens: Some(150),
        ..SchedulerConfig::default()
    };
    let mut sim = Sim::new(2, 16, config);
    sim.submit(1, endless(prompt(1, CONTEXT), 1));
    sim.submit(2, endless(prompt(1, 160), 1));
    sim.submit(3, endless(Vec::new(), 1));
    sim.submit(4, endless(vec![1, 48], 1));
    sim.submit(
        5,
        Request {
            stop: vec![String::new()],
            ..endless(vec![1], 1)
        },
    );
    let bad = SamplingParams {
        top_p: 2.0,
        ..SamplingParams::default()
    };
    sim.submit(
        6,
        Request {
            params: bad,
            ..endless(vec![1], 1)
        },
    );
    assert!(!sim.plan());
    assert_eq!(
        sim.error(1).to_string(),
        "This model's maximum context length is 150 tokens. However, your prompt has 200 tokens, which exceeds the available \
         context size or leaves no room for an answer; shorten it"
    );
    let context = 150;
    assert_eq!(
        *sim.error(2),
        RequestError::ContextTooLong {
            tokens: 160,
            context
        }
    );
    assert_eq!(*sim.error(3), RequestError::EmptyPrompt);
    assert_eq!(
        *sim.error(4),
        RequestError::NoSuchToken {
            token: 48,
            vocab: 48
        }
    );
    assert!(matches!(
        sim.error(5),
        RequestError::InvalidParameter { name: "stop", .. }
    ));
    assert!(matches!(
        sim.error(6),
        RequestError::InvalidParameter { name: "top_p", .. }
    ));
}

#[test]
fn tokens_that_end_an_answer_count_from_the_least_length_on() {
    let ask = |stop_token_ids: &[u32], min_tokens| {
        let mut request = endless(prompt(1, 20), 30);
        request.params.stop_token_ids = stop_token_ids.to_vec();
        request.params.min_tokens = min_tokens;
        let mut sim = Sim::new(1, 64, SchedulerConfig::default());
        sim.submit(1, request);
        sim.run_until_idle();
        (sim.answer(1).0, sim.done(1).finish)
    };
    let (free, finish) = ask(&[], 0);
    assert_eq!((free.len(), finish), (30, Finish::Length));
    let stop = free[4];
    let first = free.iter().position(|&token| token == stop).unwrap();
    let (cut, finish) = ask(&[stop], 0);
    assert_eq!((&cut[..], finish), (&free[..first], Finish::Stop));
    let (longer, _) = ask(&[stop], first as u32 + 6);
    assert!(longer.len() >= first + 6, "{}", longer.len());
    assert!(!longer.contains(&stop));
}

#[test]
fn an_answer_ends_where_the_kv_memory_does() {
    let config = SchedulerConfig {
        kv_tokens: Some(50),
        ..SchedulerConfig::default()
    };
    let mut sim = Sim::new(2, 64, config);
    sim.submit(1, endless(prompt(1, 30), 100));
    sim.run_until_idle();
    assert_eq!(
        (sim.done(1).finish, sim.done(1).completion_tokens),
        (Finish::Length, 20)
    );
}

#[test]
fn an_answer_ends_where_the_context_does() {
    let mut sim = Sim::new(1, 64, SchedulerConfig::default());
    let request = Request {
        max_tokens: None,
        ..endless(prompt(1, 190), 0)
    };
    sim.submit(1, request);
    sim.run_until_idle();
    assert_eq!(
        (sim.done(1).finish, sim.done(1).completion_tokens),
        (Finish::Length, 10)
    );
}

#[test]
fn kv_memory_limits_how_many_run_and_old_rows_give_way() {
    let config = SchedulerConfig {
        kv_tokens: Some(100),
        ..SchedulerConfig::default()
    };
    let mut sim = Sim::new(4, 64, config);
    for key in 1..=3 {
        sim.submit(key, endless(prompt(key as u32, 30), 10));
    }
    assert!(sim.plan());
    let load = sim.scheduler.load();
    assert_eq!((load.running, load.queued), (2, 1));
    assert_eq!((load.kv_tokens_used, load.kv_tokens_reserved), (60, 80));
    sim.run();
    sim.run_until_idle();
    // Request 3 made the rows of request 1 give way, the first to end; those of request 2 are still there.
    sim.submit(4, endless(prompt(2, 30), 1));
    sim.submit(5, endless(prompt(1, 30), 1));
    sim.run_until_idle();
    assert_eq!(sim.done(4).cached_tokens, 29);
    assert_eq!(sim.done(5).cached_tokens, 0);
}

#[test]
fn requests_without_a_limit_share_the_memory_that_two_of_them_might_need() {
    let config = SchedulerConfig {
        kv_tokens: Some(4000),
        ..SchedulerConfig::default()
    };
    let mut sim = Sim::with_context(2000, 8, 64, config);
    let request = |key: RequestKey| Request {
        max_tokens: None,
        ..Request::greedy("test", prompt(key as u32, 20), 0)
    };
    for key in 1..=9 {
        sim.submit(key, request(key));
    }
    assert!(sim.plan());
    let load = sim.scheduler.load();
    assert_eq!((load.running, load.queued), (8, 1));
    sim.run();
    sim.run_until_idle();
    for key in 1..=9 {
        assert_eq!(sim.answer(key), testing::answer(&request(key), 2000));
    }
}

#[test]
fn when_memory_runs_out_the_youngest_gives_way_and_goes_on_where_it_was() {
    let config = SchedulerConfig {
        kv_tokens: Some(300),
        answer_tokens: 10,
        ..SchedulerConfig::default()
    };
    let mut sim = Sim::new(4, 64, config);
    for key in 1..=3 {
        sim.submit(key, endless(prompt(key as u32, 20), 170));
    }
    // No one was preempted yet; the memory of three is in use.
    while sim.scheduler.load().totals.preempted == 0 {
        assert!(sim.plan());
        assert!(sim.scheduler.load().kv_tokens_used <= 300);
        sim.run();
    }
    sim.submit(4, endless(prompt(4, 5), 5));
    let status = |key| sim.scheduler.status(key);
    assert_eq!(status(1), Some(RequestStatus::Decoding));
    assert_eq!(status(3), Some(RequestStatus::Preempted { ahead: 0 }));
    assert_eq!(status(4), Some(RequestStatus::Queued { ahead: 1 }));
    let load = sim.scheduler.load();
    assert_eq!((load.running, load.queued), (2, 2));
    sim.run_until_idle();
    for key in 1..=3 {
        let request = endless(prompt(key as u32, 20), 170);
        assert_eq!(sim.answer(key), testing::answer(&request, CONTEXT));
    }
    let ends = [1, 2, 3, 4].map(|key| sim.events[&key].last().unwrap().0);
    assert!(ends[0] < ends[2] && sim.pace(4).0 > ends[0], "{ends:?}");
    // Rows of its prompt that it computed before do not count as cached.
    assert_eq!(sim.done(3).cached_tokens, 0);
    let totals = sim.scheduler.load().totals;
    assert!((1..8).contains(&totals.preempted), "{totals:?}");
    // Some of its rows remained, since no other request needed them.
    assert!(totals.reused_tokens > 0, "{totals:?}");
}

#[test]
fn rows_kept_for_nobody_give_way_before_anybody_is_preempted() {
    let config = SchedulerConfig {
        kv_tokens: Some(200),
        answer_tokens: 10,
        ..SchedulerConfig::default()
    };
    let mut sim = Sim::new(3, 64, config);
    sim.submit(1, endless(prompt(1, 120), 10));
    sim.run_until_idle();
    sim.submit(2, endless(prompt(2, 20), 70));
    sim.submit(3, endless(prompt(3, 20), 70));
    sim.run_until_idle();
    assert_eq!(sim.scheduler.load().totals.preempted, 0);
    for key in 2..=3 {
        let request = endless(prompt(key as u32, 20), 70);
        assert_eq!(sim.answer(key), testing::answer(&request, CONTEXT));
    }
}

#[test]
fn scores_that_give_way_come_out_as_they_do_alone() {
    let config = SchedulerConfig {
        kv_tokens: Some(220),
        answer_tokens: 1,
        ..SchedulerConfig::default()
    };
    let mut sim = Sim::new(3, 64, config.clone());
    let tokens = prompt(3, 90);
    sim.submit(1, endless(prompt(1, 40), 150));
    sim.submit(2, endless(prompt(2, 5), 150));
    for _ in 0..20 {
        assert!(sim.plan());
        sim.run();
    }
    // One row at a time, so that the answers outgrow the memory meanwhile.
    sim.scheduler.config.score_rows = 1;
    sim.scheduler.submit(3, scores(tokens.clone()), sim.now);
    sim.run_until_idle();
    assert!(sim.scheduler.load().totals.preempted > 0);
    let mut alone = Sim::new(1, 64, config);
    alone.scheduler.submit(3, scores(tokens), alone.now);
    alone.run_until_idle();
    assert_eq!(
        sim.events[&3].last().unwrap().1,
        alone.events[&3].last().unwrap().1
    );
}

#[test]
fn cancelling_frees_the_slot_at_once_even_while_a_step_runs() {
    let mut sim = Sim::new(1, 16, SchedulerConfig::default());
    sim.submit(1, endless(prompt(1, 10), 100));
    sim.submit(2, endless(prompt(2, 10), 3));
    sim.submit(3, endless(prompt(3, 10), 3));
    assert!(sim.plan());
    sim.scheduler.cancel(1);
    sim.scheduler.cancel(3);
    sim.run();
    sim.run_until_idle();
    assert!(!sim.events.contains_key(&1) && !sim.events.contains_key(&3));
    assert_eq!(
        sim.answer(2),
        testing::answer(&endless(prompt(2, 10), 3), CONTEXT)
    );
    // The rows of the cancelled step serve the next request with the same prompt.
    sim.submit(4, endless(prompt(2, 10), 3));
    sim.run_until_idle();
    assert_eq!(sim.done(4).cached_tokens, 9);
    assert_eq!(sim.scheduler.load().totals.cancelled, 2);
}

#[test]
fn a_failed_step_fails_its_requests_and_no_others() {
    let mut sim = Sim::new(2, 16, SchedulerConfig::default());
    sim.stage.fails_at = Some(1);
    sim.submit(1, endless(prompt(1, 10), 10));
    sim.submit(2, endless(prompt(2, 10), 10));
    sim.submit(3, endless(prompt(1, 10), 10));
    sim.run_until_idle();
    let message = "a step of the engine failed: hash failed: told to fail";
    assert_eq!(sim.error(1).to_string(), message);
    assert_eq!(sim.error(2).to_string(), message);
    assert_eq!(
        sim.answer(3),
        testing::answer(&endless(prompt(1, 10), 10), CONTEXT)
    );
    assert_eq!(sim.done(3).cached_tokens, 0);
}

#[test]
fn an_answer_goes_on_elsewhere_exactly_where_it_was() {
    let params = SamplingParams {
        seed: 5,
        repetition_penalty: 1.1,
        logprobs: Some(2),
        ..SamplingParams::default()
    };
    let request = Request {
        params,
        stop: vec!["the t".to_owned(), "zq".to_owned()],
        echo: "Say: ".to_owned(),
        ..Request::greedy("test", prompt(4, 12), 60)
    };
    let expected = testing::answer(&request, CONTEXT);
    let mut sim = Sim::new(1, 16, SchedulerConfig::default());
    sim.submit(0, request.clone());
    sim.run_until_idle();
    assert_eq!(sim.answer(0), expected);

    // Wherever the first worker was lost, another one goes on from the events that arrived.
    let events = sim.events[&0].clone();
    assert!(events.len() > 10, "the test wants a longer answer");
    for arrived in 0..events.len() {
        let (mut tokens, mut text) = (Vec::new(), String::new());
        for (_, event) in &events[..arrived] {
            if let Event::Tokens(t) = event {
                tokens.extend_from_slice(&t.tokens);
                text += &t.text;
            }
        }
        let resumed = Request {
            generated: tokens.clone(),
            text_sent: text.len() as u64,
            ..request.clone()
        };
        let mut other = Sim::new(1, 16, SchedulerConfig::default());
        other.submit(0, resumed);
        other.run_until_idle();
        let (rest, rest_text) = other.answer(0);
        assert_eq!([tokens, rest].concat(), expected.0);
        assert_eq!(text + &rest_text, expected.1);
        assert_eq!(other.done(0).completion_tokens as usize, expected.0.len());
        assert_eq!(other.done(0).finish, sim.done(0).finish);
    }
}

#[test]
fn scores_do_not_depend_on_chunks_or_company() {
    let tokens = prompt(3, 60);
    let expected: Vec<TokenScore> = (1..tokens.len())
        .map(|i| {
            let history = tokens[..i].iter().fold(0, |h, &t| testing::extend(h, t));
            let row: Vec<f32> = testing::logits(history).collect();
            sampler::score(&row, tokens[i]).unwrap()
        })
        .collect();
    for (max_rows, score_rows) in [(64, 64), (64, 7), (5, 32)] {
        let config = SchedulerConfig {
            score_rows,
            ..SchedulerConfig::default()
        };
        let mut sim = Sim::new(4, max_rows, config);
        sim.submit(1, endless(tokens.clone(), 20));
        sim.scheduler.submit(2, scores(tokens.clone()), sim.now);
        sim.scheduler.submit(3, scores(tokens.clone()), sim.now);
        sim.run_until_idle();
        for key in [2, 3] {
            assert_eq!(
                sim.events[&key].last().unwrap().1,
                Event::Scored(expected.clone())
            );
        }
        assert_eq!(
            sim.answer(1),
            testing::answer(&endless(tokens.clone(), 20), CONTEXT)
        );
    }
}

#[test]
fn nothing_to_do_is_done_at_once() {
    let mut sim = Sim::new(1, 16, SchedulerConfig::default());
    sim.submit(1, endless(prompt(1, 5), 0));
    sim.scheduler.submit(2, scores(vec![3]), sim.now);
    assert!(!sim.plan());
    assert_eq!(sim.done(1).finish, Finish::Length);
    assert_eq!(sim.events[&2][0].1, Event::Scored(Vec::new()));
}

#[test]
fn draining_finishes_what_is_there_and_refuses_the_rest() {
    let mut sim = Sim::new(1, 16, SchedulerConfig::default());
    sim.submit(1, endless(prompt(1, 5), 5));
    sim.submit(2, endless(prompt(2, 5), 5));
    sim.scheduler.drain();
    sim.submit(3, endless(prompt(3, 5), 5));
    assert_eq!(*sim.error(3), RequestError::Draining);
    sim.run_until_idle();
    assert_eq!(sim.answer(2).0.len(), 5);
}

#[derive(Debug, Clone)]
struct Arrival {
    after_steps: usize,
    request: Request,
    cancelled_after: Option<usize>,
}

fn arrival() -> impl Strategy<Value = Arrival> {
    // Few beginnings, so that prompts share prefixes of all lengths.
    let tokens = (0u32..3, 1u32..60, 0u32..3, 0u32..10)
        .prop_map(|(head, n, tail, m)| [prompt(head, n), prompt(tail + 10, m)].concat());
    let params = (0.0f32..1.5, 0u32..20, any::<u64>(), prop::bool::ANY).prop_map(
        |(temperature, top_k, seed, penalised)| SamplingParams {
            temperature: if temperature < 0.3 { 0.0 } else { temperature },
            top_k,
            seed,
            repetition_penalty: if penalised { 1.2 } else { 1.0 },
            ..SamplingParams::default()
        },
    );
    let stops = prop::collection::vec("[a-e ]{1,2}", 0..2);
    let cancelled = prop::option::weighted(0.2, 0usize..30);
    (0usize..40, tokens, params, stops, 0u32..40, cancelled).prop_map(
        |(after_steps, prompt, params, stop, max_tokens, cancelled_after)| Arrival {
            after_steps,
            request: Request {
                params,
                stop,
                ..Request::greedy("test", prompt, max_tokens)
            },
            cancelled_after,
        },
    )
}

/// A request that may run to the end of the context.
fn long_arrival() -> impl Strategy<Value = Arrival> {
    let max_tokens = prop::option::of(0u32..200);
    (arrival(), max_tokens, any::<bool>()).prop_map(|(arrival, max_tokens, ignore_eos)| Arrival {
        request: Request {
            max_tokens,
            ignore_eos,
            ..arrival.request
        },
        ..arrival
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Batching, chunking, reuse, copies, eviction, cancellation and failed steps never change an answer.
    #[test]
    fn scheduling_never_changes_an_answer(
        arrivals in prop::collection::vec(arrival(), 1..12),
        slots in 1u32..5,
        max_rows in 1u32..40,
        kv_tokens in prop::option::of(110u64..400),
        fails_at in prop::option::weighted(0.2, 0usize..30),
    ) {
        let config = SchedulerConfig { kv_tokens, ..SchedulerConfig::default() };
        run_arrivals(arrivals, Sim::new(slots, max_rows, config), fails_at, 1, |_| ())?;
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Neither does a preemption, with several steps under way. Running requests are always older than
    /// waiting ones, so no request starves.
    #[test]
    fn preemption_never_changes_an_answer_and_starves_nobody(
        arrivals in prop::collection::vec(long_arrival(), 1..12),
        slots in 1u32..6,
        max_rows in 2u32..40,
        kv_tokens in 110u64..400,
        expected in 1u32..100,
        fails_at in prop::option::weighted(0.2, 0usize..200),
        depth in 1usize..4,
    ) {
        let config = SchedulerConfig {
            kv_tokens: Some(kv_tokens),
            steps_under_way: depth as u32,
            answer_tokens: expected,
            ..SchedulerConfig::default()
        };
        let sim = Sim::new(slots, max_rows, config);
        run_arrivals(arrivals, sim, fails_at, depth, |scheduler| {
            let running = scheduler.running.iter().map(|r| r.job.key);
            let queued = scheduler.queue.iter().map(|job| job.key);
            let keys: Vec<RequestKey> = running.chain(queued).collect();
            assert!(keys.is_sorted(), "{keys:?}");
            assert!(scheduler.load().kv_tokens_used <= kv_tokens);
        })?;
    }
}

/// Lets requests arrive, with up to `depth` steps under way, until all have ended; checks the outcome of
/// each.
fn run_arrivals(
    mut arrivals: Vec<Arrival>,
    mut sim: Sim,
    fails_at: Option<usize>,
    depth: usize,
    check: impl Fn(&Scheduler),
) -> Result<(), TestCaseError> {
    arrivals.sort_by_key(|arrival| arrival.after_steps);
    sim.stage.fails_at = fails_at;
    let mut under_way = VecDeque::new();
    for round in 0.. {
        for (key, arrival) in (0..).zip(&arrivals) {
            if arrival.after_steps == round {
                sim.submit(key, arrival.request.clone());
            }
        }
        while under_way.len() < depth && sim.plan() {
            check(&sim.scheduler);
            under_way.push_back(std::mem::take(&mut sim.step));
        }
        // Between plan and completion is the worst moment to cancel.
        for (key, arrival) in (0..).zip(&arrivals) {
            if arrival
                .cancelled_after
                .is_some_and(|n| arrival.after_steps + n == round)
            {
                sim.scheduler.cancel(key);
            }
        }
        if let Some(step) = under_way.pop_front() {
            sim.run_step(&step);
        } else if round > 80 {
            break;
        }
        prop_assert!(round < 20_000, "the scheduler does not come to an end");
    }
    prop_assert!(sim.scheduler.is_idle());
    prop_assert_eq!(sim.scheduler.load().kv_tokens_used, 0);
    for (key, arrival) in (0..).zip(&arrivals) {
        let context = CONTEXT.min(u32::try_from(sim.scheduler.kv_total).unwrap_or(CONTEXT));
        let expected = testing::answer(&arrival.request, context);
        let ended = sim
            .events
            .get(&key)
            .is_some_and(|e| e.last().unwrap().1.is_last());
        if !ended {
            prop_assert!(arrival.cancelled_after.is_some());
        } else if let Some((_, Event::Failed(error))) = sim.events[&key].last() {
            prop_assert!(fails_at.is_some() && matches!(error, RequestError::Stage(_)));
        } else {
            prop_assert_eq!(sim.answer(key), expected);
        }
    }
    Ok(())
}
