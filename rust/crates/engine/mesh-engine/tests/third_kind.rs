//! A third kind of work: all that an engine needs of it is a workload.

use std::collections::VecDeque;
use std::time::Instant;

use futures::StreamExt;
use futures::executor::block_on;

use mesh_engine::{
    Engine, Load, RequestError, RequestKey, RequestStatus, Schedule, StageError, StepOutcome,
    Workload,
};

/// Draws pictures in steps, one picture at a time, as image models do.
#[derive(Default)]
struct Drawing {
    pictures: Pictures,
    under_way: bool,
}

#[derive(Default)]
struct Pictures {
    /// Each with the steps done and to do.
    queue: VecDeque<(RequestKey, u32, u32)>,
    events: VecDeque<(RequestKey, Drawn)>,
    load: Load,
}

#[derive(Debug, PartialEq)]
enum Drawn {
    Step(u32),
    Picture,
    Failed(RequestError),
}

/// Steps of a picture; this number of them fails.
const FAILING: u32 = 13;

impl Schedule for Pictures {
    type Request = u32;
    type Event = Drawn;

    fn submit(&mut self, key: RequestKey, steps: u32, _: Instant) {
        if self.load.draining {
            self.events
                .push_back((key, Drawn::Failed(RequestError::Draining)));
        } else {
            self.queue.push_back((key, 0, steps));
        }
    }

    fn cancel(&mut self, key: RequestKey) {
        self.queue.retain(|(queued, ..)| *queued != key);
        self.load.totals.cancelled += 1;
    }

    fn drain(&mut self) {
        self.load.draining = true;
    }

    fn end_all(&mut self, error: &RequestError) {
        for (key, ..) in self.queue.drain(..) {
            self.events.push_back((key, Drawn::Failed(error.clone())));
        }
    }

    fn is_idle(&self) -> bool {
        self.queue.is_empty()
    }

    fn next_event(&mut self) -> Option<(RequestKey, Drawn)> {
        self.events.pop_front()
    }

    fn status(&self, key: RequestKey) -> Option<RequestStatus> {
        let ahead = self.queue.iter().position(|(queued, ..)| *queued == key)?;
        let ahead = ahead as u32;
        Some(RequestStatus::Queued { ahead })
    }

    fn load(&self) -> Load {
        self.load.clone()
    }
}

impl Workload for Drawing {
    type Request = u32;
    type Event = Drawn;
    type Info = ();
    type Scheduler = Pictures;

    const STEPS: &'static str = "drawings";

    fn info(&self) -> &() {
        &()
    }

    fn scheduler(&mut self) -> &mut Pictures {
        &mut self.pictures
    }

    fn begin(&mut self, _: Instant) -> bool {
        let begins = !self.under_way && !self.pictures.queue.is_empty();
        self.under_way |= begins;
        begins
    }

    fn poll(&mut self, _: Instant) -> StepOutcome {
        if !std::mem::take(&mut self.under_way) {
            return StepOutcome::Pending;
        }
        let Some((key, done, steps)) = self.pictures.queue.pop_front() else {
            return StepOutcome::Completed;
        };
        assert!(steps > 0, "nothing to draw");
        if steps == FAILING {
            let error = StageError::Malformed("spilt ink".to_owned());
            let event = Drawn::Failed(error.clone().into());
            self.pictures.events.push_back((key, event));
            return StepOutcome::Failed { rows: 1, error };
        }
        let done = done + 1;
        self.pictures.events.push_back((key, Drawn::Step(done)));
        if done == steps {
            self.pictures.events.push_back((key, Drawn::Picture));
        } else {
            self.pictures.queue.push_front((key, done, steps));
        }
        StepOutcome::Completed
    }

    fn is_last(event: &Drawn) -> bool {
        !matches!(event, Drawn::Step(_))
    }

    fn failed(error: RequestError) -> Drawn {
        Drawn::Failed(error)
    }
}

fn engine() -> Engine<Drawing> {
    Engine::start_with("drawing", |_| Ok(Drawing::default())).unwrap()
}

fn reason(event: Drawn) -> String {
    match event {
        Drawn::Failed(error) => error.to_string(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_third_kind_is_served_cancelled_and_drained() {
    let engine = engine();
    let handle = engine.handle();
    let events: Vec<Drawn> = block_on(handle.submit(3u32).collect());
    let expected = [
        Drawn::Step(1),
        Drawn::Step(2),
        Drawn::Step(3),
        Drawn::Picture,
    ];
    assert_eq!(events, expected);

    let mut endless = handle.submit(u32::MAX);
    assert_eq!(block_on(endless.next()), Some(Drawn::Step(1)));
    drop(endless);
    // It would wait for the endless one.
    block_on(handle.drain());
    assert_eq!(handle.load().totals.cancelled, 1);
    let refused = block_on(handle.submit(1u32).last_event());
    assert_eq!(refused, Drawn::Failed(RequestError::Draining));
}

#[test]
fn a_third_kind_that_panics_or_keeps_failing_ends_with_a_reason() {
    let panics = engine();
    let handle = panics.handle();
    let text = reason(block_on(handle.submit(0u32).last_event()));
    assert!(text.contains("a step panicked: nothing to draw"), "{text}");
    assert!(handle.death().is_some());

    let fails = engine();
    let handle = fails.handle();
    for _ in 0..3 {
        let text = reason(block_on(handle.submit(FAILING).last_event()));
        assert!(text.contains("spilt ink"), "{text}");
    }
    let text = reason(block_on(handle.submit(1u32).last_event()));
    assert!(text.contains("3 drawings in a row failed"), "{text}");
}
