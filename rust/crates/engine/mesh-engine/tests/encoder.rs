//! The batching of sequences and the thread that owns an encoder, with a toy for it.

use std::sync::mpsc;
use std::time::{Duration, Instant};

use futures::executor::block_on;
use proptest::prelude::*;

use mesh_engine::embed::scheduler::Scheduler;
use mesh_engine::embed::shorten;
use mesh_engine::{
    EmbedRequest, Embedding, Encoder, EncoderInfo, Engine, RequestError, Schedule, StageError,
};

/// Test encoder: the vector of a sequence is (length, sum).
struct Toy {
    info: EncoderInfo,
    fails: bool,
}

fn info() -> EncoderInfo {
    EncoderInfo {
        dimensions: 2,
        max_tokens: 8,
        vocab: 100,
        max_rows: 16,
        weight_bytes: 0,
    }
}

impl Encoder for Toy {
    fn info(&self) -> &EncoderInfo {
        &self.info
    }

    fn encode(&mut self, sequences: &[&[u32]]) -> Result<Vec<f32>, StageError> {
        if self.fails {
            return Err(StageError::Malformed("toy".into()));
        }
        let vector = |s: &&[u32]| [s.len() as f32, s.iter().sum::<u32>() as f32];
        Ok(sequences.iter().flat_map(vector).collect())
    }
}

fn request(sequences: &[&[u32]]) -> EmbedRequest {
    EmbedRequest {
        id: "r".into(),
        sequences: sequences.iter().map(|s| s.to_vec()).collect(),
        deadline: None,
    }
}

fn scheduler(queue_limit: usize) -> Scheduler {
    Scheduler::new(info(), queue_limit)
}

fn finish(scheduler: &mut Scheduler, now: Instant) -> usize {
    let mut toy = Toy {
        info: info(),
        fails: false,
    };
    let mut batches = 0;
    while let Some(batch) = scheduler.plan(now) {
        assert!(batch.rows() <= 16 || batch.parts.len() == 1);
        let sequences: Vec<&[u32]> = batch.parts.iter().map(|(_, _, s)| s.as_slice()).collect();
        let vectors = toy.encode(&sequences).unwrap();
        scheduler.complete(&batch, &vectors, Duration::from_millis(1));
        batches += 1;
    }
    batches
}

#[test]
fn a_small_request_does_not_wait_for_all_of_a_large_one() {
    let now = Instant::now();
    let mut scheduler = scheduler(4);
    let many = vec![&[1, 2, 3, 4][..]; 100];
    scheduler.submit(1, request(&many), now);
    scheduler.submit(2, request(&[&[5]]), now);
    let batch = scheduler.plan(now).unwrap();
    let keys: Vec<u64> = batch.parts.iter().map(|(key, _, _)| *key).collect();
    assert_eq!(
        keys,
        [1, 2, 1, 1],
        "13 rows; one more sequence would be over 16"
    );
}

#[test]
fn what_cannot_be_embedded_is_refused_by_name() {
    let now = Instant::now();
    let mut scheduler = scheduler(1);
    scheduler.submit(1, request(&[]), now);
    scheduler.submit(2, request(&[&[]]), now);
    scheduler.submit(3, request(&[&[1; 9]]), now);
    scheduler.submit(4, request(&[&[100]]), now);
    scheduler.submit(5, request(&[&[1]]), now);
    scheduler.submit(6, request(&[&[1]]), now);
    scheduler.drain();
    scheduler.submit(7, request(&[&[1]]), now);
    let ends: Vec<_> = std::iter::from_fn(|| scheduler.next_event()).collect();
    let expected = [
        (1, RequestError::EmptyPrompt),
        (2, RequestError::EmptyPrompt),
        (
            3,
            RequestError::ContextTooLong {
                tokens: 9,
                context: 8,
            },
        ),
        (
            4,
            RequestError::NoSuchToken {
                token: 100,
                vocab: 100,
            },
        ),
        (6, RequestError::QueueFull { limit: 1 }),
        (7, RequestError::Draining),
    ];
    assert_eq!(ends, expected.map(|(key, error)| (key, Err(error))));
}

#[test]
fn a_request_that_is_cancelled_or_late_takes_no_more_batches() {
    let now = Instant::now();
    let mut scheduler = scheduler(4);
    scheduler.submit(1, request(&[&[1; 8][..]; 5]), now);
    scheduler.submit(
        2,
        EmbedRequest {
            deadline: Some(now + Duration::from_secs(1)),
            ..request(&[&[1; 8][..]; 5])
        },
        now,
    );
    assert_eq!(scheduler.load().prefill_backlog, 80);
    let batch = scheduler.plan(now).unwrap();
    scheduler.cancel(1);
    scheduler.complete(&batch, &[0.0; 4], Duration::from_millis(1));
    assert!(scheduler.plan(now + Duration::from_secs(2)).is_none());
    assert_eq!(
        scheduler.next_event(),
        Some((2, Err(RequestError::DeadlineExceeded { tokens: 0 })))
    );
    assert!(scheduler.is_idle() && scheduler.next_event().is_none());
    let load = scheduler.load();
    assert_eq!((load.prefill_backlog, load.running, load.queued), (0, 0, 0));
}

proptest! {
    #[test]
    fn every_vector_comes_to_its_own_place(
        lengths in prop::collection::vec(prop::collection::vec(1_usize..=8, 1..20), 1..8)
    ) {
        let (mut scheduler, now) = (scheduler(8), Instant::now());
        for (key, lengths) in lengths.iter().enumerate() {
            let sequences: Vec<Vec<u32>> = lengths.iter().enumerate().map(|(i, &n)| vec![i as u32; n]).collect();
            scheduler.submit(key as u64, EmbedRequest { id: String::new(), sequences, deadline: None }, now);
        }
        finish(&mut scheduler, now);
        let mut seen = 0;
        while let Some((key, end)) = scheduler.next_event() {
            let want: Vec<Vec<f32>> = lengths[key as usize].iter().enumerate()
                .map(|(i, &n)| vec![n as f32, (i * n) as f32]).collect();
            prop_assert_eq!(end.unwrap(), want);
            seen += 1;
        }
        prop_assert_eq!(seen, lengths.len());
        prop_assert_eq!(scheduler.load().prefill_backlog, 0);
    }
}

fn engine(fails: bool) -> Engine<Embedding> {
    let toy = Toy {
        info: info(),
        fails,
    };
    Engine::start_with("toy", |_| Ok(Embedding::new(Box::new(toy), 100))).unwrap()
}

#[test]
fn an_engine_answers_drains_and_says_why_it_is_gone() {
    let engine = engine(false);
    let handle = engine.handle();
    let answer = block_on(handle.submit(request(&[&[1, 2], &[3]])).last_event()).unwrap();
    assert_eq!(answer, [[2.0, 3.0], [1.0, 3.0]]);
    block_on(handle.drain());
    assert_eq!(
        block_on(handle.submit(request(&[&[1]])).last_event()),
        Err(RequestError::Draining)
    );
    assert_eq!(handle.death(), None);
    drop(engine);
    let gone = block_on(handle.submit(request(&[&[1]])).last_event()).unwrap_err();
    assert!(gone.to_string().contains("shut down"), "{gone}");
}

/// Says when a batch has begun, and computes it when it is told to.
struct Gated {
    toy: Toy,
    begun: mpsc::Sender<()>,
    go: mpsc::Receiver<()>,
}

impl Encoder for Gated {
    fn info(&self) -> &EncoderInfo {
        self.toy.info()
    }

    fn encode(&mut self, sequences: &[&[u32]]) -> Result<Vec<f32>, StageError> {
        self.begun.send(()).expect("the test waits");
        self.go.recv().expect("the test goes on");
        self.toy.encode(sequences)
    }
}

#[test]
fn the_load_during_a_batch_leaves_out_the_batch() {
    let (begun, has_begun) = mpsc::channel();
    let (go, may_go) = mpsc::channel();
    let gated = Gated {
        toy: Toy {
            info: info(),
            fails: false,
        },
        begun,
        go: may_go,
    };
    let engine = Engine::start_with("gated", |_| Ok(Embedding::new(Box::new(gated), 100))).unwrap();
    let handle = engine.handle();
    // 40 rows, at most 16 in a batch.
    let stream = handle.submit(request(&[&[1; 8][..]; 5]));
    let backlogs = [(); 3].map(|()| {
        has_begun.recv().expect("a batch");
        let backlog = handle.load().prefill_backlog;
        go.send(()).expect("it waits");
        backlog
    });
    assert_eq!(block_on(stream.last_event()).unwrap().len(), 5);
    assert_eq!(backlogs, [24, 8, 0]);
}

#[test]
fn an_encoder_that_keeps_failing_is_given_up() {
    let engine = engine(true);
    let handle = engine.handle();
    for _ in 0..3 {
        let error = block_on(handle.submit(request(&[&[1]])).last_event()).unwrap_err();
        assert!(matches!(error, RequestError::Stage(_)), "{error}");
    }
    let gone = block_on(handle.submit(request(&[&[1]])).last_event()).unwrap_err();
    assert!(gone.to_string().contains("3 batches in a row"), "{gone}");
}

#[test]
fn a_shortened_vector_has_length_one() {
    let mut vector = vec![3.0, 4.0, 12.0];
    shorten(&mut vector, 3);
    assert_eq!(vector, [3.0, 4.0, 12.0]);
    shorten(&mut vector, 2);
    assert_eq!(vector, [0.6, 0.8]);
    let mut zero = vec![0.0, 0.0, 1.0];
    shorten(&mut zero, 2);
    assert_eq!(zero, [0.0, 0.0]);
}
