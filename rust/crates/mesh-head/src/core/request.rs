//! The life of one answer, across the deaths of the workers that make it.
//!
//! An [`Answer`] is told what happens (a worker was found, tokens came, the link broke, time passed) and says what follows
//! ([`Step`]). It keeps the tokens so far: when a worker dies, the next one continues after them ([`Resume`]), so that the
//! client sees one stream without a lost, doubled or changed token.
//!
//! **Busy is not dead.** Limits are on silence. A worker that has the request says what it waits for ([`mesh_proto::Progress`]) and
//! how long ago its engine got on; the silence limits count from there, so a request may wait for hours in a queue that moves. A
//! worker of an older version says nothing: then the limits count from when it was given the request.
//!
//! Events name their attempt. Whatever still arrives from an attempt that was given up changes nothing.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use dcf::ErrorCode;
use mesh_proto::{Done, Progress, RequestPhase, TokenLogprob, Tokens};

use super::placement::{Ended, Refusal};
use super::registry::WorkerId;

/// What an answer may cost.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Most silence of a worker that has the request: neither a token nor a sign of life.
    pub timeout: Duration,
    /// Most time that it waits for a worker with room, before its first token or after a failure.
    pub queue: Duration,
    /// From arrival to the last token, if that is limited at all.
    pub total: Option<Duration>,
    /// Attempts after the first.
    pub reruns: u32,
    /// Least silence between tokens that counts as death.
    pub silence: Duration,
    /// The same before the first token, on top of ten times what the router expects.
    pub first_token: Duration,
}

/// What to do next.
#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    /// Nothing; go on waiting.
    Wait,
    /// Give this to the client.
    Emit(Delta),
    /// The attempt is over as [`Ended`] says; ask for another worker and call [`Answer::placed`].
    Again(Ended),
    /// The answer is complete: give this to the client, and it was the last.
    Complete(Complete),
    /// There will be no (more) answer. If an attempt runs, it is over as [`Ended`] says.
    Fail(AnswerError, Ended),
}

/// A piece of the answer.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Delta {
    /// Index of the first of `tokens` in the answer.
    pub index: u32,
    /// New tokens.
    pub tokens: Vec<u32>,
    /// New text; may be empty.
    pub text: String,
    /// One per token where asked for.
    pub logprobs: Vec<TokenLogprob>,
}

/// The end of an answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Complete {
    /// The worker's account. Its `text` is the last piece of the answer.
    pub done: Done,
    /// From arrival to the first token.
    pub first_token: Option<Duration>,
    /// From arrival to the end.
    pub total: Duration,
    /// How often it was run again.
    pub reruns: u32,
}

/// Where the next attempt begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resume {
    /// Name of the attempt in later events.
    pub attempt: u32,
    /// Bytes of text the client has.
    pub text_sent: u64,
}

/// Why there is no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AnswerError {
    /// No worker took it.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The worker says that the request itself cannot be answered.
    #[error("{text}")]
    Rejected {
        /// The worker's code.
        code: ErrorCode,
        /// The worker's words.
        text: String,
    },
    /// The operator's limit on whole answers.
    #[error("no complete answer within {} s; ask for fewer tokens, or raise answer_limit", .0.as_secs_f64())]
    Timeout(Duration),
    /// The worker that has it shows no life.
    #[error(
        "the worker gave neither a token nor a sign of life for {} s (request_timeout); ask again, or raise request_timeout if the \
         worker is that slow",
        .0.as_secs_f64()
    )]
    Stalled(Duration),
    /// No worker had room for it.
    #[error(
        "no worker had room for this request within {} s (queue_timeout); ask again later, or add workers",
        .0.as_secs_f64()
    )]
    QueueTimeout(Duration),
    /// It failed too often.
    #[error(
        "{attempts} attempts at this request failed on {workers} {}, the last one with: {last}",
        if *workers == 1 { "worker" } else { "workers" }
    )]
    WorkersFailed {
        /// Attempts made.
        attempts: u32,
        /// Different workers that they were made on.
        workers: usize,
        /// What the last one said.
        last: String,
    },
    /// Workers died that had it.
    #[error(
        "{deaths} workers died while they had this request{}, so it is not tried again; change it, or ask again if they died of \
         something else: {last}",
        if *silent { " and had not begun to answer it" } else { "" }
    )]
    WorkersDied {
        /// Workers that died.
        deaths: u32,
        /// Before its first token.
        silent: bool,
        /// What was seen of the last one.
        last: String,
    },
    /// The head is shutting down.
    #[error("this head is shutting down; ask again in a moment, or ask another head")]
    ShuttingDown,
}

/// How an attempt failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    /// The stream broke.
    Lost(String),
    /// The worker is gone: its link broke.
    Died(String),
    /// The worker answered with an Error.
    Error {
        /// Its code.
        code: ErrorCode,
        /// Its words.
        text: String,
    },
}

/// See the module's page.
#[derive(Debug)]
pub struct Answer {
    limits: Limits,
    started: Instant,
    /// Time since which it waits for a worker with room: progress before a failure starts this anew.
    waiting_since: Instant,
    /// Time at which this attempt's worker was found.
    placed_at: Instant,
    attempt: u32,
    phase: Phase,
    tokens: Vec<u32>,
    text_bytes: u64,
    first_token: Option<Instant>,
    pace: Pace,
    failures: u32,
    failed_on: Vec<WorkerId>,
    /// Workers that died while they had it.
    deaths: u32,
    /// A token came in this attempt.
    answered: bool,
    /// Those of them from which no token had come.
    silent_deaths: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Placing,
    Running {
        worker: WorkerId,
        last_heard: Instant,
        allowance: Duration,
        /// The allowance before the next token while it waits or is prefilled.
        patience: Duration,
        decoding: bool,
        /// The worker says what the request waits for.
        tells: bool,
    },
    Ended,
}

/// Step times of one answer.
#[derive(Debug, Default)]
struct Pace {
    mean: Option<Duration>,
    slowest: Duration,
}

impl Answer {
    /// A request that arrived at `now`.
    pub fn new(limits: Limits, now: Instant) -> Self {
        Self {
            limits,
            started: now,
            waiting_since: now,
            placed_at: now,
            attempt: 0,
            phase: Phase::Placing,
            tokens: Vec::new(),
            text_bytes: 0,
            first_token: None,
            pace: Pace::default(),
            failures: 0,
            failed_on: Vec::new(),
            deaths: 0,
            answered: false,
            silent_deaths: 0,
        }
    }

    /// The answer so far, for [`mesh_proto::Generate::generated`].
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Whether anything went to the client: then only the same weights may go on.
    pub fn has_begun(&self) -> bool {
        !self.tokens.is_empty() || self.text_bytes > 0
    }

    /// Workers that failed on it.
    pub fn failed_on(&self) -> &[WorkerId] {
        &self.failed_on
    }

    /// True if a worker died of it, perhaps: the next one had better have nothing else to begin.
    pub fn is_suspect(&self) -> bool {
        self.silent_deaths > 0 || self.deaths >= SUSPECT_AFTER
    }

    /// Attempts that failed so far.
    pub fn failures(&self) -> u32 {
        self.failures
    }

    /// Moment after which it is given up, unless something happens before.
    pub fn deadline(&self) -> Instant {
        let due = match self.phase {
            Phase::Running { last_heard, .. } => last_heard + self.limits.timeout,
            Phase::Placing | Phase::Ended => self.waiting_since + self.limits.queue,
        };
        self.last_moment().map_or(due, |last| last.min(due))
    }

    /// Moment after which an answer is of no use, if there is one.
    pub fn last_moment(&self) -> Option<Instant> {
        Some(self.started + self.limits.total?)
    }

    /// True if the worker that has it, for less time than a request may wait, has sent no token yet and does
    /// not report the cause of the wait: that worker is of an older version.
    pub fn waits_untold(&self, now: Instant) -> bool {
        let silent = matches!(
            self.phase,
            Phase::Running {
                decoding: false,
                tells: false,
                ..
            }
        );
        silent && now.saturating_duration_since(self.placed_at) < self.limits.queue
    }

    /// When to call [`Answer::time_passed`], unless something else happens before.
    pub fn next_timer(&self) -> Option<Instant> {
        match self.phase {
            Phase::Placing => Some(self.deadline()),
            Phase::Running {
                last_heard,
                allowance,
                ..
            } => Some(self.deadline().min(last_heard + allowance)),
            Phase::Ended => None,
        }
    }

    /// A worker was found, which the router expects to send its first token after `expected`.
    pub fn placed(&mut self, worker: WorkerId, expected: Duration, now: Instant) -> Resume {
        self.attempt += 1;
        self.answered = false;
        self.placed_at = now;
        let allowance = self.limits.first_token + expected.saturating_mul(10);
        self.phase = Phase::Running {
            worker,
            last_heard: now,
            allowance,
            patience: allowance,
            decoding: false,
            tells: false,
        };
        Resume {
            attempt: self.attempt,
            text_sent: self.text_bytes,
        }
    }

    /// No worker was found.
    pub fn refused(&mut self, refusal: Refusal) -> Step {
        self.fail(refusal.into(), Ended::Cancelled)
    }

    /// The worker says that the request lives, and what it waits for. Its engine's last step counts, not the message.
    pub fn progressed(&mut self, attempt: u32, progress: &Progress, now: Instant) {
        if self.worker_of(attempt).is_none() {
            return;
        }
        let Phase::Running {
            last_heard,
            allowance,
            patience,
            decoding,
            tells,
            ..
        } = &mut self.phase
        else {
            return;
        };
        *tells = true;
        let quiet = Duration::from_millis(progress.quiet_ms);
        if let Some(moment) = now.checked_sub(quiet) {
            *last_heard = (*last_heard).max(moment);
        }
        if *decoding && progress.phase() != RequestPhase::Decoding {
            // It gave its place to others and waits, or is prefilled again: the pace of its tokens says nothing about that.
            *decoding = false;
            *allowance = *patience;
        }
        if progress.prompt_done > 0 {
            self.waiting_since = now;
        }
    }

    /// Tokens came.
    pub fn tokens_came(&mut self, attempt: u32, tokens: Tokens, now: Instant) -> Step {
        let Some(worker) = self.worker_of(attempt) else {
            return Step::Wait;
        };
        let have = self.tokens.len() as u64;
        let first = u64::from(tokens.index);
        let end = first + tokens.tokens.len() as u64;
        if end <= have && first < have {
            // All of it is here already; a repeat that says something else is no repeat.
            let known = &self.tokens[first as usize..end as usize];
            return if known == tokens.tokens {
                Step::Wait
            } else {
                self.again(
                    worker,
                    "the worker changed tokens that it had sent".to_owned(),
                    Ended::Failed,
                )
            };
        }
        if first != have {
            let text = format!("the worker sent tokens {first}..{end} where token {have} was next");
            return self.again(worker, text, Ended::Failed);
        }

        if !tokens.tokens.is_empty() {
            self.answered = true;
            self.heard(now);
            self.waiting_since = now;
            self.first_token.get_or_insert(now);
        }
        self.text_bytes += tokens.text.len() as u64;
        self.tokens.extend_from_slice(&tokens.tokens);
        Step::Emit(Delta {
            index: tokens.index,
            tokens: tokens.tokens,
            text: tokens.text,
            logprobs: tokens.logprobs,
        })
    }

    /// The worker says that the answer is complete.
    pub fn done(&mut self, attempt: u32, done: Done, now: Instant) -> Step {
        let Some(worker) = self.worker_of(attempt) else {
            return Step::Wait;
        };
        let have = self.tokens.len();
        if u64::from(done.completion_tokens) != have as u64 {
            let text = format!(
                "the worker counts {} tokens of which {have} came",
                done.completion_tokens
            );
            return self.again(worker, text, Ended::Failed);
        }
        self.text_bytes += done.text.len() as u64;
        self.phase = Phase::Ended;
        Step::Complete(Complete {
            done,
            first_token: self
                .first_token
                .map(|at| at.saturating_duration_since(self.started)),
            total: now.saturating_duration_since(self.started),
            reruns: self.failures,
        })
    }

    /// The attempt failed.
    pub fn failed(&mut self, attempt: u32, failure: Failure) -> Step {
        let Some(worker) = self.worker_of(attempt) else {
            return Step::Wait;
        };
        let (code, text) = match failure {
            Failure::Lost(text) => return self.again(worker, text, Ended::Failed),
            Failure::Died(text) => return self.died(worker, text),
            Failure::Error { code, text } => (code, text),
        };
        match code {
            // The request's fault: the same everywhere.
            ErrorCode::INVALID_PAYLOAD | ErrorCode::CONTEXT_TOO_LONG => {
                self.fail(AnswerError::Rejected { code, text }, Ended::Cancelled)
            }
            ErrorCode::WORKER_BUSY | ErrorCode::DRAINING => {
                // Not a failure, and the worker's own pause keeps this from turning quickly; the limit on waiting ends it.
                self.phase = Phase::Placing;
                Step::Again(Ended::Busy)
            }
            _ => self.again(worker, format!("{code}: {text}"), Ended::Failed),
        }
    }

    /// From the next attempt on silence of `least` is enough to count as death, if it is out of proportion to the pace so far.
    pub fn set_least_silence(&mut self, least: Duration) {
        self.limits.silence = least;
    }

    /// The silence so far is excused, and what comes of it is looked at again at `moment`.
    pub fn look_again_at(&mut self, moment: Instant) {
        if let Phase::Running {
            last_heard,
            allowance,
            ..
        } = &mut self.phase
            && let Some(heard) = moment.checked_sub(*allowance)
        {
            *last_heard = (*last_heard).max(heard);
        }
    }

    /// The silence up to this moment has a known cause that is not the worker's death: its ring recovered.
    pub fn excused_until(&mut self, moment: Instant) {
        if let Phase::Running { last_heard, .. } = &mut self.phase {
            *last_heard = (*last_heard).max(moment);
        }
    }

    /// Time has passed: perhaps too much.
    pub fn time_passed(&mut self, now: Instant) -> Step {
        if self.phase == Phase::Ended {
            return Step::Wait;
        }
        if self.last_moment().is_some_and(|last| now >= last) {
            // A worker that let a whole deadline pass did not do well, but that need not be its fault.
            let total = self.limits.total.unwrap_or_default();
            return self.fail(AnswerError::Timeout(total), Ended::Cancelled);
        }
        if now >= self.deadline() {
            return match self.phase {
                Phase::Running { .. } => {
                    self.fail(AnswerError::Stalled(self.limits.timeout), Ended::Cancelled)
                }
                _ => self.fail(
                    AnswerError::QueueTimeout(self.limits.queue),
                    Ended::Cancelled,
                ),
            };
        }
        match self.phase {
            Phase::Running {
                worker,
                last_heard,
                allowance,
                ..
            } if now >= last_heard + allowance => {
                let silent = (now - last_heard).as_secs_f64();
                let text = format!("no token and no sign of life for {silent:.1} s");
                self.again(worker, text, Ended::Failed)
            }
            _ => Step::Wait,
        }
    }

    fn worker_of(&self, attempt: u32) -> Option<WorkerId> {
        match self.phase {
            Phase::Running { worker, .. } if attempt == self.attempt => Some(worker),
            _ => None,
        }
    }

    fn heard(&mut self, now: Instant) {
        let Phase::Running {
            last_heard,
            allowance,
            decoding,
            ..
        } = &mut self.phase
        else {
            return;
        };
        // The wait for an attempt's first token is a prefill, which says nothing about the pace of decoding.
        if *decoding {
            self.pace.step(now.saturating_duration_since(*last_heard));
        }
        *decoding = true;
        *last_heard = now;
        *allowance = self.pace.allowance(self.limits.silence);
    }

    /// A worker died. Perhaps of this request: then it must not go on to kill one after the other.
    fn died(&mut self, worker: WorkerId, text: String) -> Step {
        self.deaths += 1;
        self.silent_deaths += u32::from(!self.answered);
        if self.silent_deaths < MOST_SILENT_DEATHS && self.deaths < MOST_DEATHS {
            return self.again(worker, text, Ended::Failed);
        }
        self.failures += 1;
        let error = AnswerError::WorkersDied {
            deaths: self.deaths,
            silent: self.silent_deaths == self.deaths,
            last: text,
        };
        self.fail(error, Ended::Failed)
    }

    fn again(&mut self, worker: WorkerId, text: String, ended: Ended) -> Step {
        self.failures += 1;
        self.failed_on.push(worker);
        if self.failures > self.limits.reruns {
            return self.fail(
                AnswerError::WorkersFailed {
                    attempts: self.failures,
                    workers: self.failed_on.iter().collect::<BTreeSet<_>>().len(),
                    last: text,
                },
                ended,
            );
        }
        self.phase = Phase::Placing;
        Step::Again(ended)
    }

    fn fail(&mut self, error: AnswerError, ended: Ended) -> Step {
        self.phase = Phase::Ended;
        Step::Fail(error, ended)
    }
}

impl Pace {
    fn step(&mut self, gap: Duration) {
        let mean = self.mean.unwrap_or(gap);
        self.mean = Some(mean.mul_f64(1.0 - PACE_WEIGHT) + gap.mul_f64(PACE_WEIGHT));
        self.slowest = self.slowest.max(gap);
    }

    /// Silence that is out of proportion to the steps so far: twenty times the mean, four times the slowest.
    fn allowance(&self, floor: Duration) -> Duration {
        floor
            .max(self.mean.unwrap_or_default() * 20)
            .max(self.slowest * 4)
    }
}

const PACE_WEIGHT: f64 = 0.1;

/// Deaths of workers before a request's first token that end it: the first may be chance, and the second worker had nothing else
/// to begin.
const MOST_SILENT_DEATHS: u32 = 2;
/// Deaths at any time that end it.
const MOST_DEATHS: u32 = 4;
/// Deaths at any time after which it is given a worker for itself.
const SUSPECT_AFTER: u32 = 2;

#[cfg(test)]
mod tests;
