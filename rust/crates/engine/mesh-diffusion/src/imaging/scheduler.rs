//! Decides which request takes the next turn.
//!
//! A turn is the smallest piece of work that cannot be interrupted: the prompts, one step, or the picture. Requests under
//! way take turns in a ring, so that all of them advance; the others wait in order. A request ends at the end of a turn.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_engine::{Load, RequestError, RequestKey, RequestStatus, Schedule, StageError, Totals};

use super::check::check;
use super::job::{Failure, Job, Turn};
use super::{Diffuser, DiffuserInfo, ImageEvent, ImageRequest, ImagingOptions};
use crate::tokenizer::ClipTokenizer;

/// The scheduler of one model of images.
pub struct Scheduler {
    info: DiffuserInfo,
    tokenizer: Arc<ClipTokenizer>,
    options: ImagingOptions,
    jobs: HashMap<RequestKey, Job>,
    waiting: VecDeque<RequestKey>,
    /// Requests under way; the first is next.
    turns: VecDeque<RequestKey>,
    draining: bool,
    steps_per_second: f64,
    totals: Totals,
    events: VecDeque<(RequestKey, ImageEvent)>,
}

impl Scheduler {
    /// An empty scheduler for a model with `info`.
    pub fn new(info: DiffuserInfo, tokenizer: Arc<ClipTokenizer>, options: ImagingOptions) -> Self {
        Scheduler {
            info,
            tokenizer,
            options,
            jobs: HashMap::new(),
            waiting: VecDeque::new(),
            turns: VecDeque::new(),
            draining: false,
            steps_per_second: 0.0,
            totals: Totals::default(),
            events: VecDeque::new(),
        }
    }

    fn admit(&self, request: ImageRequest) -> Result<Job, RequestError> {
        if self.draining {
            return Err(RequestError::Draining);
        }
        let limit = self.options.queue_limit;
        if self.waiting.len() >= limit && self.turns.len() >= self.slots() {
            return Err(RequestError::QueueFull { limit });
        }
        let checked = check(&self.info, &self.tokenizer, &request)?;
        Ok(Job::new(request, checked))
    }

    fn slots(&self) -> usize {
        self.options.slots.max(1)
    }

    /// The request that takes the next turn; `None` if there is none. Ends requests whose deadline has passed.
    pub(super) fn plan(&mut self, now: Instant) -> Option<RequestKey> {
        self.expire(now);
        self.fill();
        self.turns.front().copied()
    }

    /// Takes the turn of a request on the model, and returns an error of the model.
    pub(super) fn turn(
        &mut self,
        key: RequestKey,
        model: &mut impl Diffuser,
    ) -> Result<(), StageError> {
        // It may have been cancelled in the meantime.
        let Some(job) = self.jobs.get_mut(&key) else {
            return Ok(());
        };
        let started = Instant::now();
        let outcome = job.turn(model);
        self.totals.steps += 1;
        match outcome {
            Ok(Turn::Prepared) => self.rotate(key),
            Ok(Turn::Step(progress)) => {
                self.totals.decode_rows += 1;
                self.measure(started.elapsed());
                self.events.push_back((key, ImageEvent::Step(progress)));
                self.rotate(key);
            }
            Ok(Turn::Done(image)) => {
                self.remove(key);
                self.totals.finished += 1;
                self.events.push_back((key, ImageEvent::Done(Ok(image))));
            }
            Err(Failure::Request(error)) => self.end(key, error),
            Err(Failure::Stage(error)) => {
                self.end(key, RequestError::Stage(error.clone()));
                return Err(error);
            }
        }
        Ok(())
    }

    fn measure(&mut self, elapsed: Duration) {
        let speed = 1.0 / elapsed.as_secs_f64().max(1e-6);
        self.steps_per_second = match self.steps_per_second {
            0.0 => speed,
            old => old + (speed - old) * 0.2,
        };
    }

    /// Puts a request behind the others under way.
    fn rotate(&mut self, key: RequestKey) {
        if self.turns.front() == Some(&key) {
            self.turns.rotate_left(1);
        }
    }

    /// Starts waiting requests in free slots.
    fn fill(&mut self) {
        while self.turns.len() < self.slots() {
            let Some(key) = self.waiting.pop_front() else {
                return;
            };
            self.turns.push_back(key);
        }
    }

    fn expire(&mut self, now: Instant) {
        let late = |job: &Job| job.deadline.is_some_and(|deadline| deadline <= now);
        let late = self.jobs.iter().filter(|(_, job)| late(job));
        let late: Vec<(RequestKey, RequestError)> = late
            .map(|(&key, job)| {
                let (done, steps) = (job.done(), job.steps());
                (key, RequestError::PictureLate { done, steps })
            })
            .collect();
        for (key, error) in late {
            self.end(key, error);
        }
    }

    fn end(&mut self, key: RequestKey, error: RequestError) {
        if self.remove(key) {
            self.fail(key, error);
        }
    }

    fn fail(&mut self, key: RequestKey, error: RequestError) {
        self.totals.failed += 1;
        self.events.push_back((key, ImageEvent::Done(Err(error))));
    }

    fn remove(&mut self, key: RequestKey) -> bool {
        self.waiting.retain(|other| *other != key);
        self.turns.retain(|other| *other != key);
        self.jobs.remove(&key).is_some()
    }
}

impl Schedule for Scheduler {
    type Request = ImageRequest;
    type Event = ImageEvent;

    fn submit(&mut self, key: RequestKey, request: ImageRequest, _: Instant) {
        match self.admit(request) {
            Ok(job) => {
                self.jobs.insert(key, job);
                self.waiting.push_back(key);
                self.fill();
            }
            Err(error) => self.fail(key, error),
        }
    }

    fn cancel(&mut self, key: RequestKey) {
        if self.remove(key) {
            self.totals.cancelled += 1;
            self.events.retain(|(other, _)| *other != key);
        }
    }

    fn drain(&mut self) {
        self.draining = true;
    }

    fn end_all(&mut self, error: &RequestError) {
        let keys: Vec<RequestKey> = self.jobs.keys().copied().collect();
        for key in keys {
            self.end(key, error.clone());
        }
    }

    fn is_idle(&self) -> bool {
        self.jobs.is_empty()
    }

    fn next_event(&mut self) -> Option<(RequestKey, ImageEvent)> {
        self.events.pop_front()
    }

    fn status(&self, key: RequestKey) -> Option<RequestStatus> {
        if !self.jobs.contains_key(&key) {
            return None;
        }
        let ahead = self.waiting.iter().position(|&waiting| waiting == key);
        Some(match ahead {
            Some(ahead) => RequestStatus::Queued {
                ahead: ahead as u32,
            },
            None => RequestStatus::Decoding,
        })
    }

    /// A step counts as a token: the speeds are steps per second, the backlog is steps not yet done.
    fn load(&self) -> Load {
        let left = |job: &Job| u64::from(job.steps() - job.done());
        Load {
            running: self.turns.len() as u32,
            queued: self.waiting.len() as u32,
            decode_tps: self.steps_per_second as f32,
            prefill_tps: self.steps_per_second as f32,
            prefill_backlog: self.jobs.values().map(left).sum(),
            draining: self.draining,
            totals: self.totals,
            ..Load::default()
        }
    }
}
