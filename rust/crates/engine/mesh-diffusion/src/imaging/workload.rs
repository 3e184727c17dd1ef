//! Imaging: the workload of models of images.

use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_engine::{RequestError, RequestKey, StepOutcome, Workload};

use super::scheduler::Scheduler;
use super::{Diffuser, DiffuserInfo, ImageEvent, ImageRequest};
use crate::tokenizer::ClipTokenizer;

/// Limits on requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImagingOptions {
    /// Requests that take turns with each other. Each keeps its latents, and its picture takes the longer the more there are.
    pub slots: usize,
    /// Requests that may wait besides those.
    pub queue_limit: usize,
}

impl Default for ImagingOptions {
    fn default() -> Self {
        ImagingOptions {
            slots: 2,
            queue_limit: 16,
        }
    }
}

/// A model of images and its scheduler.
pub struct Imaging<D: Diffuser> {
    model: D,
    scheduler: Scheduler,
    /// The request that takes the turn under way.
    turn: Option<RequestKey>,
    /// Other work that goes first.
    others: Option<Others>,
}

/// Work of others on the same machine that goes first.
struct Others {
    run: fn() -> bool,
    patience: Duration,
    /// The turn under way waits since then.
    waiting: Option<Instant>,
}

impl<D: Diffuser> Imaging<D> {
    /// The workload of `model`, whose prompts `tokenizer` reads.
    pub fn new(model: D, tokenizer: Arc<ClipTokenizer>, options: ImagingOptions) -> Self {
        Imaging {
            scheduler: Scheduler::new(model.info().clone(), tokenizer, options),
            model,
            turn: None,
            others: None,
        }
    }

    /// The same, but no turn begins while `others_run`, unless it has waited for `patience`.
    #[must_use]
    pub fn giving_way(mut self, others_run: fn() -> bool, patience: Duration) -> Self {
        self.others = Some(Others {
            run: others_run,
            patience,
            waiting: None,
        });
        self
    }
}

impl Others {
    fn go_first(&mut self, now: Instant) -> bool {
        if !(self.run)() {
            self.waiting = None;
            return false;
        }
        let since = *self.waiting.get_or_insert(now);
        let wait = now.saturating_duration_since(since) < self.patience;
        if !wait {
            // This turn is taken, and the next one waits anew.
            self.waiting = None;
        }
        wait
    }
}

/// Interval at which a turn that waits for others looks again.
const LOOK: Duration = Duration::from_millis(10);

impl<D: Diffuser> Workload for Imaging<D> {
    type Request = ImageRequest;
    type Event = ImageEvent;
    type Info = DiffuserInfo;
    type Scheduler = Scheduler;

    const STEPS: &'static str = "steps of pictures";
    const LONG_STEPS: bool = true;

    fn info(&self) -> &DiffuserInfo {
        self.model.info()
    }

    fn scheduler(&mut self) -> &mut Scheduler {
        &mut self.scheduler
    }

    fn begin(&mut self, now: Instant) -> bool {
        if self.turn.is_some() {
            return false;
        }
        self.turn = self.scheduler.plan(now);
        self.turn.is_some()
    }

    fn poll(&mut self, now: Instant) -> StepOutcome {
        let Some(key) = self.turn.take() else {
            return StepOutcome::Pending;
        };
        if let Some(others) = &mut self.others
            && others.go_first(now)
        {
            // The turn is planned again: in the meantime its request may be cancelled or too late.
            std::thread::sleep(LOOK);
            return StepOutcome::Resumed;
        }
        match self.scheduler.turn(key, &mut self.model) {
            Ok(()) => StepOutcome::Completed,
            Err(error) => StepOutcome::Failed { rows: 1, error },
        }
    }

    fn is_last(event: &ImageEvent) -> bool {
        matches!(event, ImageEvent::Done(_))
    }

    fn failed(error: RequestError) -> ImageEvent {
        ImageEvent::Done(Err(error))
    }
}
