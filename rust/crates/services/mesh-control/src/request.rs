//! The life of one answer, across the deaths of the workers that make it.
//!
//! A [`Lifecycle`] takes events (a worker was found, tokens came, the link broke, time passed) and returns the
//! next [`Step`]. It keeps the tokens so far: when a worker dies, the next one continues after them
//! ([`Resume`]), so that the client sees one stream without a lost, doubled or changed token.
//!
//! **Busy is not dead.** Limits are on silence. A worker that has the request reports the cause of its wait
//! ([`mesh_proto::Progress`]) and the time since its engine last made progress; the silence limits count from
//! there, so a request may wait for hours in a queue that moves. A worker of an older version reports
//! nothing: then the limits count from the time at which it was given the request.
//!
//! Events name their attempt. Events of an attempt that was given up change nothing.

mod bounds;
mod error;
mod failures;
#[cfg(test)]
mod tests;

use std::time::{Duration, Instant};

use dcf::ErrorCode;
use mesh_proto::{Done, Progress, RequestPhase, TokenLogprob, Tokens};

use super::placement::{AttemptEnd, Refusal};
use super::registry::WorkerId;
use bounds::TOKEN_BYTES;
pub use bounds::{Bounds, Limits};
pub use error::{AnswerError, Failure, Fault};

/// Next action for the caller.
#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    /// Nothing; go on waiting.
    Wait,
    /// Give this to the client.
    Emit(Delta),
    /// The work got on by as much as so many tokens, and there is nothing to give to the client.
    Advanced(u32),
    /// The attempt is over as [`AttemptEnd`] says; ask for another worker and call [`Lifecycle::placed`].
    Again(AttemptEnd),
    /// The answer is complete: give this to the client, and it was the last.
    Complete(Complete),
    /// There will be no (more) answer. If an attempt runs, it is over as [`AttemptEnd`] says.
    Fail(AnswerError, AttemptEnd),
}

/// A piece of the answer.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Delta {
    /// Index of the first of `tokens` in the answer.
    pub index: u32,
    /// Ids of the new tokens.
    pub tokens: Vec<u32>,
    /// New text; may be empty.
    pub text: String,
    /// Log probabilities, one per token, where asked for.
    pub logprobs: Vec<TokenLogprob>,
}

/// The end of an answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Complete {
    /// The worker's account. Its `text` is the last piece of the answer.
    pub done: Done,
    /// Time from arrival to the first token.
    pub first_token: Option<Duration>,
    /// Time from arrival to the end.
    pub total: Duration,
    /// Number of reruns.
    pub reruns: u32,
}

/// Start of the next attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resume {
    /// Name of the attempt in later events.
    pub attempt: u32,
    /// Bytes of text the client has.
    pub text_sent: u64,
}

/// See the module's page.
#[derive(Debug)]
pub struct Lifecycle {
    limits: Limits,
    started: Instant,
    /// Time since which it waits for a worker with room: progress before a failure restarts this.
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
    /// Workers that died while they had it, and whether that was before a token came from them.
    deaths: Vec<(WorkerId, bool)>,
    /// A token came in this attempt.
    answered: bool,
    bounds: Bounds,
    fault: Fault,
    /// Messages of this attempt that brought nothing, since this moment.
    idle: (u32, Instant),
    /// Time at which the worker last showed something that the head can see for itself: a token, or a wait
    /// that gets shorter.
    advanced: Instant,
    /// The wait that it reported then.
    reported: Option<Progress>,
    /// The worker that rejected the request as invalid, and its message; another worker is asked to confirm
    /// that.
    rejected: Option<Rejection>,
    second_opinion: bool,
}

/// A worker's claim that a request cannot be answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejection {
    /// The worker that rejected the request.
    pub worker: WorkerId,
    /// Code of its Error.
    pub code: ErrorCode,
    /// Text of its Error.
    pub text: String,
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
        /// The worker reports the cause of the request's wait.
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

impl Lifecycle {
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
            deaths: Vec::new(),
            answered: false,
            bounds: Bounds::default(),
            fault: Fault::Unknown,
            idle: (0, now),
            advanced: now,
            reported: None,
            rejected: None,
            second_opinion: false,
        }
    }

    /// The same, with bounds on the worker's answer.
    #[must_use]
    pub fn within(self, bounds: Bounds) -> Self {
        Self { bounds, ..self }
    }

    /// Sets the model's context in tokens, which bounds the answer; 0 is unknown.
    pub fn set_context(&mut self, context: u32) {
        if context > 0 {
            self.bounds.tokens = self.bounds.tokens.min(context);
        }
    }

    /// Limits on what a worker may send.
    pub fn bounds(&self) -> Bounds {
        self.bounds
    }

    /// Party to blame for the last failure.
    pub fn fault(&self) -> Fault {
        self.fault
    }

    /// Sets whether another worker can be asked for confirmation if one says that the request is at fault.
    pub fn set_second_opinion(&mut self, possible: bool) {
        self.second_opinion = possible;
    }

    /// The rejection by a worker of a request that another worker answers. To be asked when an answer begins
    /// or is complete.
    pub fn contradicted(&mut self) -> Option<Rejection> {
        self.rejected.take()
    }

    /// Workers that are not to be asked again while there are others.
    pub fn avoided(&self) -> Vec<WorkerId> {
        let rejected = self.rejected.iter().map(|rejected| rejected.worker);
        self.failed_on.iter().copied().chain(rejected).collect()
    }

    /// The answer so far, for [`mesh_proto::Generate::generated`].
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Returns true if anything went to the client: then only the same weights may go on.
    pub fn has_begun(&self) -> bool {
        !self.tokens.is_empty() || self.text_bytes > 0
    }

    /// True if a worker died of it, perhaps: the next one had better have nothing else to begin.
    pub fn is_suspect(&self) -> bool {
        self.silent_deaths() > 0 || self.deaths.len() >= SUSPECT_AFTER
    }

    /// A worker that counted as dead lives: only its link was lost.
    pub fn lives(&mut self, worker: WorkerId) {
        self.deaths.retain(|(dead, _)| *dead != worker);
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
        let Phase::Running {
            decoding, tells, ..
        } = self.phase
        else {
            return false;
        };
        !decoding && !tells && now.saturating_duration_since(self.placed_at) < self.limits.queue
    }

    /// Time at which to call [`Lifecycle::time_passed`], unless an event comes before.
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
        self.fault = Fault::Unknown;
        (self.idle, self.advanced, self.reported) = ((0, now), now, None);
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
        self.fail(refusal.into(), AttemptEnd::Cancelled)
    }

    /// The worker reports that the request lives, and the cause of its wait. Its engine's last step counts,
    /// not the message. `seen` is the arrival of the last token from that worker, for any request: a wait
    /// that never gets shorter is believed for as long as a silence may last, counted from there.
    pub fn progressed(
        &mut self,
        attempt: u32,
        progress: &Progress,
        seen: Option<Instant>,
        now: Instant,
    ) -> Step {
        let Some(worker) = self.worker_of(attempt) else {
            return Step::Wait;
        };
        if let Some(step) = self.idles(worker, now) {
            return step;
        }
        self.advances(progress, seen, now);
        let Phase::Running {
            last_heard,
            allowance,
            patience,
            decoding,
            tells,
            ..
        } = &mut self.phase
        else {
            return Step::Wait;
        };
        *tells = true;
        let quiet = Duration::from_millis(progress.quiet_ms);
        let limit = self.advanced + self.limits.timeout.max(*patience);
        if let Some(moment) = now.checked_sub(quiet)
            && now < limit
        {
            *last_heard = (*last_heard).max(moment);
        }
        if *decoding && progress.phase() != RequestPhase::Decoding {
            // It gave its place to others and waits, or is prefilled again: the pace of its tokens says
            // nothing about that.
            *decoding = false;
            *allowance = *patience;
        }
        if progress.prompt_done > 0 {
            self.waiting_since = now;
        }
        Step::Wait
    }

    /// A message came that means nothing to this head. A few of them do no harm.
    pub fn idled(&mut self, attempt: u32, now: Instant) -> Step {
        let Some(worker) = self.worker_of(attempt) else {
            return Step::Wait;
        };
        self.idles(worker, now).unwrap_or(Step::Wait)
    }

    /// Takes in tokens of this attempt.
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
            if known == tokens.tokens {
                return self.idles(worker, now).unwrap_or(Step::Wait);
            }
            let text = "the worker changed tokens that it had sent";
            return self.blame(worker, text.to_owned());
        }
        if first != have {
            let text = format!("the worker sent tokens {first}..{end} where token {have} was next");
            return self.blame(worker, text);
        }
        if let Some(text) = self.excess(&tokens) {
            return self.blame(worker, text);
        }
        if tokens.tokens.is_empty() && tokens.text.is_empty() {
            return self.idles(worker, now).unwrap_or(Step::Wait);
        }

        if !tokens.tokens.is_empty() {
            self.answered = true;
            self.heard(now);
            self.waiting_since = now;
            self.advanced = now;
            self.idle = (0, now);
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

    /// A step of work without tokens is done, which takes as long as so many tokens. The time to the next one says
    /// less about a death than that between tokens: it is allowed as much as the first one.
    pub fn stepped(&mut self, attempt: u32, tokens: u32, now: Instant) -> Step {
        if self.worker_of(attempt).is_none() {
            return Step::Wait;
        }
        self.answered = true;
        self.heard(now);
        self.waiting_since = now;
        self.advanced = now;
        self.idle = (0, now);
        self.first_token.get_or_insert(now);
        if let Phase::Running {
            allowance,
            patience,
            ..
        } = &mut self.phase
        {
            *allowance = (*allowance).max(*patience);
        }
        Step::Advanced(tokens)
    }

    /// The worker says that the answer is complete.
    pub fn done(&mut self, attempt: u32, mut done: Done, now: Instant) -> Step {
        let Some(worker) = self.worker_of(attempt) else {
            return Step::Wait;
        };
        let have = self.tokens.len();
        if u64::from(done.completion_tokens) != have as u64 {
            let counted = done.completion_tokens;
            let text = format!("the worker counts {counted} tokens of which {have} came");
            return self.blame(worker, text);
        }
        let text_bytes = self.text_bytes.saturating_add(done.text.len() as u64);
        if text_bytes > self.bounds.text(have as u32) {
            let text = format!("the worker sent {text_bytes} bytes of text for {have} tokens");
            return self.blame(worker, text);
        }
        // The head cannot count these, but it knows what they cannot exceed.
        done.prompt_tokens = done.prompt_tokens.min(self.bounds.prompt_tokens);
        done.cached_tokens = done.cached_tokens.min(done.prompt_tokens);
        self.text_bytes += done.text.len() as u64;
        self.phase = Phase::Ended;
        let since_start = |at: Instant| at.saturating_duration_since(self.started);
        Step::Complete(Complete {
            done,
            first_token: self.first_token.map(since_start),
            total: since_start(now),
            reruns: self.failures,
        })
    }

    /// Sets the least silence that counts as death, from the next attempt on. A silence must also be out of
    /// proportion to the pace so far.
    pub fn set_least_silence(&mut self, least: Duration) {
        self.limits.silence = least;
    }

    /// The silence so far is excused; its consequences are decided again at `moment`.
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
            return self.fail(AnswerError::Timeout(total), AttemptEnd::Cancelled);
        }
        if now >= self.deadline() {
            if matches!(self.phase, Phase::Running { .. }) {
                self.fault = Fault::Silence;
                let stalled = AnswerError::Stalled(self.limits.timeout);
                return self.fail(stalled, AttemptEnd::Failed);
            }
            let late = AnswerError::QueueTimeout(self.limits.queue);
            return self.fail(late, AttemptEnd::Cancelled);
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
                self.retry(worker, Fault::Silence, text)
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

    /// Describes the limit that this message exceeds; `None` if it exceeds none.
    fn excess(&self, tokens: &Tokens) -> Option<String> {
        let bounds = &self.bounds;
        let have = self.tokens.len() + tokens.tokens.len();
        if have > bounds.tokens as usize {
            let most = bounds.tokens;
            let text = format!("the worker sent {have} tokens where {most} were asked for");
            return Some(text);
        }
        let text = self.text_bytes.saturating_add(tokens.text.len() as u64);
        if text > bounds.text(have as u32) {
            let text = format!("the worker sent {text} bytes of text for {have} tokens");
            return Some(text);
        }
        let alternatives = match (bounds.alternatives, tokens.logprobs.is_empty()) {
            (_, true) => return None,
            (None, false) => return Some("the worker sent probabilities unasked".to_owned()),
            (Some(alternatives), false) => alternatives.max(1) as usize + 1,
        };
        let of_top = |top: &TokenLogprob| !top.top.is_empty() || top.bytes.len() > TOKEN_BYTES;
        let each = |logprob: &TokenLogprob| {
            logprob.top.len() > alternatives
                || logprob.bytes.len() > TOKEN_BYTES
                || logprob.top.iter().any(of_top)
        };
        let many = tokens.logprobs.len() > tokens.tokens.len();
        (many || tokens.logprobs.iter().any(each))
            .then(|| "the worker sent more probabilities than were asked for".to_owned())
    }

    /// Notes the progress in a worker's report that the head can check itself.
    fn advances(&mut self, progress: &Progress, seen: Option<Instant>, now: Instant) {
        let shorter = self.reported.is_none_or(|before| {
            let moved_up = progress.position < before.position && before.position <= POSITIONS;
            let ahead = moved_up || progress.prompt_done > before.prompt_done;
            progress.phase > before.phase || (progress.phase == before.phase && ahead)
        });
        let known = self.bounds.prompt_tokens;
        if shorter && progress.prompt_done <= known {
            self.reported = Some(*progress);
            self.advanced = now;
        }
        if let Some(seen) = seen {
            self.advanced = self.advanced.max(seen);
        }
    }

    /// A message came that brings nothing. Too many of them in a short time are no honest worker's.
    fn idles(&mut self, worker: WorkerId, now: Instant) -> Option<Step> {
        let (count, since) = &mut self.idle;
        if now.saturating_duration_since(*since) >= IDLE_WINDOW {
            (*count, *since) = (0, now);
        }
        *count += 1;
        (*count > IDLE_MESSAGES).then(|| {
            let text = format!(
                "the worker sent more than {IDLE_MESSAGES} messages without a token within {} s",
                IDLE_WINDOW.as_secs()
            );
            self.blame(worker, text)
        })
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
/// Messages without news that a worker may send within [`IDLE_WINDOW`]. It is asked for one a second at most.
const IDLE_MESSAGES: u32 = 400;
/// Places in a worker's queue whose loss counts as progress. Others are known by the tokens of those before
/// them.
const POSITIONS: u32 = 64;
const IDLE_WINDOW: Duration = Duration::from_secs(10);
/// Deaths at any time after which it is given a worker for itself.
const SUSPECT_AFTER: usize = 2;
