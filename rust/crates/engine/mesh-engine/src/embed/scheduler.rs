//! Decides which sequences share a batch.
//!
//! Sequences lie side by side without padding, so they need not be sorted by length: a batch takes as many as
//! fit its rows. Requests take turns, one sequence each, so that a request of a thousand texts does not delay
//! a request of one.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use super::{EmbedRequest, EncoderInfo};
use crate::workload::{Load, RequestKey, RequestStatus, Schedule, Totals};
use crate::{RequestError, StageError};

/// One call of an encoder: sequences of several requests.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Batch {
    /// Request, index of the sequence in it, its tokens.
    pub parts: Vec<(RequestKey, usize, Vec<u32>)>,
}

impl Batch {
    /// Tokens over all sequences.
    pub fn rows(&self) -> usize {
        self.parts.iter().map(|(_, _, tokens)| tokens.len()).sum()
    }
}

/// The result of a request: one vector per sequence, in the request's order.
pub type Embedded = Result<Vec<Vec<f32>>, RequestError>;

struct Job {
    /// Not yet in a batch, by index; the first is next.
    waiting: VecDeque<(usize, Vec<u32>)>,
    vectors: Vec<Vec<f32>>,
    missing: usize,
    deadline: Option<Instant>,
}

/// The batching scheduler of one encoder.
pub struct Scheduler {
    info: EncoderInfo,
    /// Requests that may wait.
    queue_limit: usize,
    jobs: HashMap<RequestKey, Job>,
    /// Requests with waiting sequences; the first is next.
    turns: VecDeque<RequestKey>,
    backlog: u64,
    draining: bool,
    tokens_per_second: f64,
    totals: Totals,
    ended: VecDeque<(RequestKey, Embedded)>,
}

impl Scheduler {
    /// An empty scheduler for an encoder with `info`.
    pub fn new(info: EncoderInfo, queue_limit: usize) -> Self {
        Scheduler {
            info,
            queue_limit,
            jobs: HashMap::new(),
            turns: VecDeque::new(),
            backlog: 0,
            draining: false,
            tokens_per_second: 0.0,
            totals: Totals::default(),
            ended: VecDeque::new(),
        }
    }

    fn admit(&self, request: &EmbedRequest) -> Result<(), RequestError> {
        if self.draining {
            return Err(RequestError::Draining);
        }
        let limit = self.queue_limit;
        if self.jobs.len() >= limit {
            return Err(RequestError::QueueFull { limit });
        }
        if request.sequences.is_empty() || request.sequences.iter().any(Vec::is_empty) {
            return Err(RequestError::EmptyPrompt);
        }
        for sequence in &request.sequences {
            if sequence.len() > self.info.max_tokens {
                return Err(RequestError::ContextTooLong {
                    tokens: sequence.len() as u64,
                    context: u32::try_from(self.info.max_tokens).unwrap_or(u32::MAX),
                });
            }
            let vocab = self.info.vocab;
            if let Some(&token) = sequence.iter().find(|&&token| token as usize >= vocab) {
                return Err(RequestError::NoSuchToken { token, vocab });
            }
        }
        Ok(())
    }

    /// Forms the next batch; `None` if no sequence waits.
    pub fn plan(&mut self, now: Instant) -> Option<Batch> {
        self.expire(now);
        let mut batch = Batch::default();
        let mut rows = 0;
        // A request whose next sequence does not fit keeps its turn for the next batch.
        while let Some(&key) = self.turns.front() {
            let Some(job) = self.jobs.get_mut(&key) else {
                self.turns.pop_front();
                continue;
            };
            let Some((_, sequence)) = job.waiting.front() else {
                self.turns.pop_front();
                continue;
            };
            if rows > 0 && rows + sequence.len() > self.info.max_rows {
                break;
            }
            rows += sequence.len();
            self.turns.pop_front();
            if let Some((index, sequence)) = job.waiting.pop_front() {
                batch.parts.push((key, index, sequence));
            }
            if !job.waiting.is_empty() {
                self.turns.push_back(key);
            }
        }
        self.backlog = self.backlog.saturating_sub(rows as u64);
        (!batch.parts.is_empty()).then_some(batch)
    }

    /// Records the vectors of `batch`, back to back, which took `elapsed` to compute.
    pub fn complete(&mut self, batch: &Batch, vectors: &[f32], elapsed: Duration) {
        let rows = batch.rows();
        self.totals.steps += 1;
        self.totals.prefill_rows += rows as u64;
        let speed = rows as f64 / elapsed.as_secs_f64().max(1e-6);
        self.tokens_per_second = match self.tokens_per_second {
            0.0 => speed,
            // Single short texts say little about the speed of a full batch.
            old => {
                let weight = (rows as f64 / self.info.max_rows.max(1) as f64).min(1.0) * 0.3;
                old + (speed - old) * weight
            }
        };
        let vectors = vectors.chunks_exact(self.info.dimensions);
        for ((key, index, _), vector) in batch.parts.iter().zip(vectors) {
            let Some(job) = self.jobs.get_mut(key) else {
                continue;
            };
            job.vectors[*index] = vector.to_vec();
            job.missing -= 1;
            if job.missing == 0
                && let Some(job) = self.jobs.remove(key)
            {
                self.totals.finished += 1;
                self.ended.push_back((*key, Ok(job.vectors)));
            }
        }
    }

    /// Ends all requests in `batch` with `error`.
    pub fn fail(&mut self, batch: &Batch, error: &StageError) {
        self.totals.steps += 1;
        for (key, _, _) in &batch.parts {
            self.end(*key, RequestError::Stage(error.clone()));
        }
    }

    /// Ends requests whose deadline has passed.
    pub fn expire(&mut self, now: Instant) {
        let late = |job: &Job| job.deadline.is_some_and(|deadline| deadline <= now);
        let late = self.jobs.iter().filter(|(_, job)| late(job));
        let keys: Vec<RequestKey> = late.map(|(key, _)| *key).collect();
        for key in keys {
            self.end(key, RequestError::DeadlineExceeded { tokens: 0 });
        }
    }

    fn end(&mut self, key: RequestKey, error: RequestError) {
        if self.remove(key) {
            self.totals.failed += 1;
            self.ended.push_back((key, Err(error)));
        }
    }

    fn remove(&mut self, key: RequestKey) -> bool {
        let Some(job) = self.jobs.remove(&key) else {
            return false;
        };
        self.turns.retain(|other| *other != key);
        let waiting = tokens(job.waiting.iter().map(|(_, sequence)| sequence));
        self.backlog = self.backlog.saturating_sub(waiting);
        true
    }
}

impl Schedule for Scheduler {
    type Request = EmbedRequest;
    type Event = Embedded;

    fn submit(&mut self, key: RequestKey, request: EmbedRequest, _: Instant) {
        if let Err(error) = self.admit(&request) {
            self.totals.failed += 1;
            self.ended.push_back((key, Err(error)));
            return;
        }
        let missing = request.sequences.len();
        self.backlog += tokens(request.sequences.iter());
        let job = Job {
            waiting: request.sequences.into_iter().enumerate().collect(),
            vectors: vec![Vec::new(); missing],
            missing,
            deadline: request.deadline,
        };
        self.jobs.insert(key, job);
        self.turns.push_back(key);
    }

    fn cancel(&mut self, key: RequestKey) {
        if self.remove(key) {
            self.totals.cancelled += 1;
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

    fn next_event(&mut self) -> Option<(RequestKey, Self::Event)> {
        self.ended.pop_front()
    }

    // The sequences of a request take turns with those of all others.
    fn status(&self, key: RequestKey) -> Option<RequestStatus> {
        let ahead = self.load().queued;
        let known = self.jobs.contains_key(&key);
        known.then_some(RequestStatus::Queued { ahead })
    }

    fn load(&self) -> Load {
        let waiting = self.turns.len().min(self.jobs.len());
        Load {
            running: (self.jobs.len() - waiting) as u32,
            queued: waiting as u32,
            prefill_tps: self.tokens_per_second as f32,
            prefill_backlog: self.backlog,
            draining: self.draining,
            totals: self.totals,
            ..Load::default()
        }
    }
}

fn tokens<'a>(sequences: impl Iterator<Item = &'a Vec<u32>>) -> u64 {
    sequences.map(|sequence| sequence.len() as u64).sum()
}
