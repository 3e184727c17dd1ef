//! Generation: the workload of language models.

use std::sync::Arc;
use std::time::Instant;

use crate::engine::{Engine, EngineHandle, StartError, Waker};
use crate::request::{Event, GenerationRequest, RequestError, TokenScore};
use crate::runner::{Local, Outcome, Runner};
use crate::scheduler::{Scheduler, SchedulerConfig, Step};
use crate::workload::{StepOutcome, Workload};
use crate::{Stage, StageInfo, Vocabulary};

/// A runner and the scheduler of its steps.
pub struct Generation {
    runner: Box<dyn Runner>,
    scheduler: Scheduler,
    step: Step,
}

impl Engine {
    /// Starts a thread named after `name` that runs `stage`, which must hold a whole model with `vocabulary`.
    pub fn start(
        name: &str,
        stage: Box<dyn Stage>,
        vocabulary: Arc<dyn Vocabulary>,
        config: SchedulerConfig,
    ) -> Result<Self, StartError> {
        Self::start_runner(name, vocabulary, config, |_| Box::new(Local::new(stage)))
    }

    /// As [`start`](Self::start), with the runner that `make` returns. It receives the waker of the engine's
    /// thread.
    pub fn start_runner(
        name: &str,
        vocabulary: Arc<dyn Vocabulary>,
        config: SchedulerConfig,
        make: impl FnOnce(Waker) -> Box<dyn Runner>,
    ) -> Result<Self, StartError> {
        Self::start_with(name, |waker| {
            let runner = make(waker);
            let info = runner.info();
            check(info, &*vocabulary)?;
            Ok(Generation {
                scheduler: Scheduler::new(info, vocabulary, config),
                runner,
                step: Step::default(),
            })
        })
    }
}

impl EngineHandle {
    /// Scores each token of `tokens` but the first, given the tokens before it.
    pub async fn score(&self, id: &str, tokens: Vec<u32>) -> Result<Vec<TokenScore>, RequestError> {
        let id = id.to_owned();
        let stream = self.submit(GenerationRequest::Scores { id, tokens });
        match stream.last_event().await {
            Event::Scored(scores) => Ok(scores),
            Event::Failed(error) => Err(error),
            Event::Tokens(_) | Event::Done(_) => unreachable!("scores are asked for, not text"),
        }
    }
}

impl Workload for Generation {
    type Request = GenerationRequest;
    type Event = Event;
    type Info = StageInfo;
    type Scheduler = Scheduler;

    fn info(&self) -> &StageInfo {
        self.runner.info()
    }

    fn scheduler(&mut self) -> &mut Scheduler {
        &mut self.scheduler
    }

    fn begin(&mut self, now: Instant) -> bool {
        let begins = self.runner.has_room() && self.scheduler.plan(&mut self.step, now);
        if begins {
            self.runner.begin(&mut self.step, Instant::now());
        }
        begins
    }

    fn poll(&mut self, now: Instant) -> StepOutcome {
        match self.runner.poll(now) {
            None => StepOutcome::Pending,
            Some(Outcome::Logits(step, logits)) => {
                self.scheduler.complete(step, logits, Instant::now());
                StepOutcome::Completed
            }
            Some(Outcome::Failed(step, error)) => {
                self.scheduler.fail(step, &error);
                let rows = step.tokens.len();
                StepOutcome::Failed { rows, error }
            }
            Some(Outcome::Resumed(held)) => {
                self.scheduler.resume(&held);
                StepOutcome::Resumed
            }
            Some(Outcome::Ended(error)) => StepOutcome::Ended(error),
        }
    }

    fn next_timer(&self) -> Option<Instant> {
        self.runner.next_timer()
    }

    fn is_last(event: &Event) -> bool {
        event.is_last()
    }

    fn failed(error: RequestError) -> Event {
        Event::Failed(error)
    }
}

fn check(info: &StageInfo, vocabulary: &dyn Vocabulary) -> Result<(), StartError> {
    if !info.is_first() || !info.is_last() {
        return Err(StartError::PartialModel {
            start: info.layers.start,
            end: info.layers.end,
            layers: info.shape.layers,
        });
    }
    // A model may pad its output; a token without a logit is another matter.
    if vocabulary.size() > info.shape.vocab {
        return Err(StartError::VocabularyMismatch {
            logits: info.shape.vocab,
            vocab: vocabulary.size(),
        });
    }
    Ok(())
}
