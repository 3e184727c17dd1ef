use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use futures::executor::{block_on, block_on_stream};

use super::*;
use crate::request::{Event, Finish, Request};
use crate::runner::Local;
use crate::testing::{self, HashStage, Letters};
use crate::{Runner, SchedulerConfig, StageError, StageInfo, Vocabulary};

const CONTEXT: u32 = 200;

fn engine(change: impl FnOnce(&mut HashStage)) -> Engine {
    let mut stage = HashStage::new(4, CONTEXT, 32);
    change(&mut stage);
    let config = SchedulerConfig::default();
    Engine::start("test", Box::new(stage), Arc::new(Letters), config).unwrap()
}

fn request(seed: u32, max_tokens: u32) -> Request {
    let prompt = (1..10).map(|i| (i * seed) % 40 + 1).collect();
    Request {
        ignore_eos: true,
        ..Request::greedy(format!("request {seed}"), prompt, max_tokens)
    }
}

/// The tokens, the text and the last event of a stream.
fn read(stream: RequestStream) -> (Vec<u32>, String, Event) {
    let (mut tokens, mut text) = (Vec::new(), String::new());
    let mut last = None;
    for event in block_on_stream(stream) {
        assert!(last.is_none(), "an event after the last one");
        match event {
            Event::Tokens(t) => {
                tokens.extend(t.tokens);
                text += &t.text;
            }
            Event::Done(done) => {
                text += &done.text;
                last = Some(Event::Done(done));
            }
            other => last = Some(other),
        }
    }
    (tokens, text, last.expect("a last event"))
}

fn failure(stream: RequestStream) -> RequestError {
    match read(stream).2 {
        Event::Failed(error) => error,
        other => panic!("{other:?}"),
    }
}

fn wait_until(condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(
            start.elapsed() < Duration::from_secs(10),
            "it does not come to pass"
        );
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn many_threads_get_their_own_answers() {
    let engine = engine(|_| {});
    std::thread::scope(|scope| {
        for seed in 1..=16 {
            let handle = engine.handle();
            scope.spawn(move || {
                let request = request(seed, 50);
                let (tokens, text, last) = read(handle.submit(request.clone()));
                assert_eq!((tokens, text), testing::answer(&request, CONTEXT));
                assert!(matches!(last, Event::Done(done) if done.finish == Finish::Length));
            });
        }
    });
    let load = engine.handle().load();
    assert_eq!(
        (load.running, load.queued, load.totals.finished),
        (0, 0, 16)
    );
    assert!(load.decode_tps > 0.0 && load.prefill_tps > 0.0);
}

#[test]
fn dropping_the_stream_cancels_the_request() {
    let engine = engine(|stage| stage.step_time = Some(Duration::from_millis(1)));
    let mut stream = block_on_stream(engine.handle().submit(request(1, 190)));
    assert!(matches!(stream.next(), Some(Event::Tokens(_))));
    drop(stream);
    wait_until(|| engine.handle().load().totals.cancelled == 1);
    wait_until(|| engine.handle().load().running == 0);
}

#[test]
fn an_engine_whose_device_has_no_memory_left_ends_at_once() {
    let engine = engine(|stage| stage.exhausted_at = Some(3));
    let handle = engine.handle();
    let error = failure(handle.submit(request(1, 20)));
    assert!(matches!(
        error,
        RequestError::Stage(StageError::OutOfMemory { .. })
    ));
    wait_until(|| handle.death().is_some());
    let death = failure(handle.submit(request(2, 5))).to_string();
    assert!(death.contains("no memory left"), "{death}");
}

#[test]
fn a_failed_step_fails_its_request_and_the_engine_goes_on() {
    let engine = engine(|stage| stage.fails_at = Some(3));
    let error = failure(engine.handle().submit(request(1, 20)));
    assert!(matches!(
        error,
        RequestError::Stage(StageError::Backend { .. })
    ));
    let (tokens, text, _) = read(engine.handle().submit(request(1, 20)));
    assert_eq!((tokens, text), testing::answer(&request(1, 20), CONTEXT));
    assert_eq!(engine.handle().death(), None);
}

#[test]
fn a_panic_ends_every_request_with_its_reason() {
    let engine = engine(|stage| {
        stage.panics_at = Some(5);
        stage.step_time = Some(Duration::from_millis(2));
    });
    let handle = engine.handle();
    let streams = [handle.submit(request(1, 50)), handle.submit(request(2, 50))];
    for stream in streams {
        let error = failure(stream).to_string();
        assert_eq!(
            error,
            "the engine stopped: a step panicked: told to panic; restart the worker"
        );
    }
    assert!(matches!(
        failure(handle.submit(request(3, 5))),
        RequestError::EngineDead { .. }
    ));
    assert!(handle.death().is_some());
    block_on(handle.drain());
}

#[test]
fn draining_waits_for_what_runs() {
    let engine = engine(|stage| stage.step_time = Some(Duration::from_millis(1)));
    let handle = engine.handle();
    let stream = handle.submit(request(1, 40));
    block_on(handle.drain());
    assert_eq!(handle.load().running, 0);
    assert_eq!(read(stream).0.len(), 40);
    assert_eq!(
        failure(handle.submit(request(2, 5))),
        RequestError::Draining
    );
}

#[test]
fn a_dropped_engine_ends_its_requests() {
    let engine = engine(|stage| stage.step_time = Some(Duration::from_millis(1)));
    let handle = engine.handle();
    let stream = handle.submit(request(1, 190));
    drop(engine);
    assert!(matches!(failure(stream), RequestError::EngineDead { .. }));
    let error = block_on(handle.score("score", vec![1, 2, 3])).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the engine stopped: it was shut down; restart the worker"
    );
}

#[test]
fn scores_come_back_for_every_token_but_the_first() {
    let engine = engine(|_| {});
    let (answer, _) = testing::answer(&request(1, 30), CONTEXT);
    let tokens = [request(1, 30).prompt_tokens, answer.clone()].concat();
    let scores = block_on(engine.handle().score("score", tokens)).unwrap();
    assert_eq!(scores.len(), 9 - 1 + 30);
    // A greedy answer is the likeliest token each time.
    for (score, token) in scores[8..].iter().zip(answer) {
        assert_eq!(score.argmax, token);
        assert_eq!(score.logprob, score.max_logprob);
    }
}

#[test]
fn a_part_of_a_model_is_no_engine() {
    struct Wide;
    impl Vocabulary for Wide {
        fn size(&self) -> usize {
            testing::VOCAB + 1
        }
        fn text(&self, _: u32) -> &[u8] {
            b""
        }
        fn is_end(&self, _: u32) -> bool {
            false
        }
    }
    let stage = Box::new(HashStage::new(1, 10, 10));
    let error = Engine::start("test", stage, Arc::new(Wide), SchedulerConfig::default());
    assert_eq!(
        error.err().unwrap().to_string(),
        "the model gives 48 logits, but its vocabulary has 49 tokens"
    );
}

/// Steps wait for a word from outside, as those of a ring do; notes which thread ran them.
struct Gated {
    local: Local,
    open: Arc<AtomicBool>,
    ran_by: Arc<Mutex<Vec<ThreadId>>>,
}

impl Runner for Gated {
    fn info(&self) -> &StageInfo {
        self.local.info()
    }

    fn has_room(&self) -> bool {
        self.local.has_room()
    }

    fn begin(&mut self, step: &mut crate::scheduler::Step, now: Instant) {
        self.local.begin(step, now);
    }

    fn poll(&mut self, now: Instant) -> Option<crate::Outcome<'_>> {
        if !self.open.swap(false, Ordering::SeqCst) {
            return None;
        }
        self.ran_by
            .lock()
            .unwrap()
            .push(std::thread::current().id());
        self.local.poll(now)
    }

    fn next_timer(&self) -> Option<Instant> {
        None
    }
}

#[test]
fn whoever_brings_what_a_step_waits_for_may_finish_it() {
    const TOKENS: u32 = 30;
    let (open, ran_by) = (Arc::new(AtomicBool::new(false)), Arc::default());
    let mut waker = None;
    let engine = Engine::start_runner(
        "test",
        Arc::new(Letters),
        SchedulerConfig::default(),
        |wake| {
            waker = Some(wake);
            Box::new(Gated {
                local: Local::new(Box::new(HashStage::new(4, CONTEXT, 32))),
                open: Arc::clone(&open),
                ran_by: Arc::clone(&ran_by),
            })
        },
    )
    .unwrap();
    let waker = waker.unwrap();
    let request = request(3, TOKENS);
    let stream = engine.handle().submit(request.clone());
    wait_until(|| engine.handle().load().running == 1);
    for step in 1..=TOKENS as usize {
        open.store(true, Ordering::SeqCst);
        waker.wake_here();
        wait_until(|| ran_by.lock().unwrap().len() >= step);
    }
    let (tokens, text, _) = read(stream);
    assert_eq!((tokens, text), testing::answer(&request, CONTEXT));
    let here = std::thread::current().id();
    let mine = ran_by
        .lock()
        .unwrap()
        .iter()
        .filter(|&&id| id == here)
        .count();
    // Now and then the engine's own thread looks at the same moment.
    assert!(mine > TOKENS as usize / 2, "{mine} of {TOKENS}");
}

#[test]
fn an_engine_that_breaks_in_another_thread_ends_there_too() {
    let open = Arc::new(AtomicBool::new(false));
    let mut waker = None;
    let engine = Engine::start_runner(
        "test",
        Arc::new(Letters),
        SchedulerConfig::default(),
        |wake| {
            waker = Some(wake);
            let mut stage = HashStage::new(4, CONTEXT, 32);
            stage.panics_at = Some(0);
            Box::new(Gated {
                local: Local::new(Box::new(stage)),
                open: Arc::clone(&open),
                ran_by: Arc::default(),
            })
        },
    )
    .unwrap();
    let stream = engine.handle().submit(request(1, 5));
    let waker = waker.unwrap();
    wait_until(|| {
        open.store(true, Ordering::SeqCst);
        waker.wake_here();
        engine.handle().death().is_some()
    });
    assert!(matches!(failure(stream), RequestError::EngineDead { .. }));
    assert!(matches!(
        failure(engine.handle().submit(request(2, 5))),
        RequestError::EngineDead { .. }
    ));
}

#[test]
fn requests_say_what_they_wait_for_and_an_engine_that_hangs_is_not_vouched_for() {
    let (open, ran_by) = (Arc::new(AtomicBool::new(false)), Arc::default());
    let mut waker = None;
    let engine = Engine::start_runner(
        "test",
        Arc::new(Letters),
        SchedulerConfig::default(),
        |wake| {
            waker = Some(wake);
            Box::new(Gated {
                local: Local::new(Box::new(HashStage::new(1, CONTEXT, 32))),
                open: Arc::clone(&open),
                ran_by: Arc::clone(&ran_by),
            })
        },
    )
    .unwrap();
    let waker = waker.unwrap();
    let handle = engine.handle();
    assert_eq!(handle.quiet(), Duration::ZERO);
    let first = handle.submit(request(3, 50));
    let second = handle.submit(request(5, 50));
    wait_until(|| second.status() == Some(RequestStatus::Queued { ahead: 0 }));
    wait_until(|| matches!(first.status(), Some(RequestStatus::Prefilling { .. })));
    // The thread turns all the while, but no step comes back.
    wait_until(|| handle.quiet() > Duration::from_millis(300));
    let before = handle.quiet();
    open.store(true, Ordering::SeqCst);
    waker.wake();
    wait_until(|| second.quiet() < before);
    wait_until(|| {
        open.store(true, Ordering::SeqCst);
        waker.wake();
        // One step for each time that its status is noted: else its answer ends in between.
        std::thread::sleep(2 * thread::STATUS_INTERVAL);
        first.status() == Some(RequestStatus::Decoding)
    });
    drop((first, second));
    // A step under way has to come back, even if its request is gone.
    wait_until(|| {
        open.store(true, Ordering::SeqCst);
        waker.wake();
        handle.quiet() == Duration::ZERO
    });
}
