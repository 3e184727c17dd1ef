//! The attempt loop: carries one request of any kind to a worker, follows it, and goes on with the next worker
//! when that one dies. Whether and how it goes on is the decision of [`Lifecycle`].

use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use dcf::ErrorCode;
use mesh_control::placement::AttemptEnd;
use mesh_control::registry::WorkerId;
use mesh_control::request::{AnswerError, Bounds, Complete, Failure, Lifecycle, Resume, Step};
use mesh_control::router::Requirements;
use mesh_proto::Progress;
use tokio::time::{Sleep, sleep_until};
use tracing::debug;

use super::blame::FailedAttempts;
use super::codec::{AttemptTerms, Codec};
use super::deaths::Deaths;
use super::event::Event;
use super::outcome::deadline_ms;
use crate::mesh::connection::{Connection, FromWorker};
use crate::mesh::{Assignment, Mesh, RingRole};
use crate::workers::requests::{WorkerReply, gets_on, progress_ms, reply_in};

/// One request on its way. Dropping the future of [`Flight::run`] cancels it.
pub(super) struct Flight<'a, C> {
    pub(super) mesh: &'a Arc<Mesh>,
    pub(super) codec: C,
    pub(super) ask: Requirements,
    pub(super) answer: Lifecycle,
    last_token: Option<Instant>,
    /// The attempt before this one failed on a ring of this model, whose last token came then.
    broke_off: Option<(String, Instant)>,
    /// Workers that are not to be avoided though this request failed on them: not they failed but their ring.
    forgiven: Vec<WorkerId>,
    suspects: FailedAttempts,
    deaths: Deaths,
}

impl<'a, C: Codec> Flight<'a, C> {
    pub(super) fn new(mesh: &'a Arc<Mesh>, ask: Requirements, bounds: Bounds, codec: C) -> Self {
        let answer = Lifecycle::new(mesh.config.request_limits(), Instant::now()).within(bounds);
        Self {
            mesh,
            codec,
            ask,
            answer,
            last_token: None,
            broke_off: None,
            forgiven: Vec::new(),
            suspects: FailedAttempts::default(),
            deaths: Deaths::default(),
        }
    }

    /// Runs the request to its end.
    ///
    /// # Errors
    /// Why there is no (complete) answer.
    pub(super) async fn run(&mut self) -> Result<Complete, AnswerError> {
        let mut rerun = false;
        loop {
            let assignment = self.place(rerun).await?;
            let began = Instant::now();
            let resume = self.begin(&assignment, began);
            let (end, lost) = match &assignment.connection {
                Some(connection) => {
                    let end = self.attempt(&assignment, &**connection, resume).await;
                    if connection.close_reason().is_some() {
                        // The link's own task will notice, too, but the next attempt must not find the worker
                        // there.
                        self.mesh.leave(assignment.placed.worker);
                    }
                    end
                }
                None => {
                    let gone = Failure::Lost("the worker left".into());
                    (self.broke(&assignment, resume.attempt, gone), true)
                }
            };
            let ended = match end {
                Step::Complete(_) => AttemptEnd::Complete,
                Step::Fail(_, ended) | Step::Again(ended) => ended,
                Step::Wait | Step::Emit(_) | Step::Advanced(_) => AttemptEnd::Failed,
            };
            if ended == AttemptEnd::Failed {
                let fault = self.answer.fault();
                self.suspects.blame(fault, &assignment, began, self.mesh);
            }
            match end {
                Step::Complete(complete) => {
                    self.suspects.exonerate(&assignment, self.mesh);
                    assignment.end(ended);
                    return Ok(complete);
                }
                Step::Fail(error, _) => {
                    assignment.end(ended);
                    return Err(error);
                }
                Step::Again(_) | Step::Wait | Step::Emit(_) | Step::Advanced(_) => {
                    self.prepare_rerun(&assignment, ended, lost);
                    assignment.end(ended);
                    rerun = true;
                }
            }
        }
    }

    /// Finds a worker before the deadline.
    async fn place(&mut self, rerun: bool) -> Result<Assignment, AnswerError> {
        self.codec.tell(Event::Queued);
        let placing = self.mesh.place(self.ask.clone(), rerun);
        let step = match tokio::time::timeout_at(self.answer.deadline().into(), placing).await {
            Ok(Ok(assignment)) => return Ok(assignment),
            Ok(Err(refusal)) => self.answer.refused(refusal),
            Err(_) => {
                let late = Instant::now().max(self.answer.deadline());
                self.answer.time_passed(late)
            }
        };
        Err(match step {
            Step::Fail(error, _) => error,
            _ => AnswerError::QueueTimeout(self.mesh.config.queue_timeout),
        })
    }

    /// Tells the core and the front end which worker has the request.
    fn begin(&mut self, assignment: &Assignment, now: Instant) -> Resume {
        let placed = &assignment.placed;
        let least = self.mesh.config.silence_limit;
        self.answer.set_least_silence(match placed.ring {
            Some(_) => least.min(RING_SILENCE),
            None => least,
        });
        self.answer.set_context(placed.context);
        self.deaths.review(&mut self.answer, self.mesh);
        let expected = placed.estimate.first_token;
        let resume = self.answer.placed(placed.worker, expected, now);
        debug!(
            request = self.codec.id(),
            worker = placed.name,
            attempt = resume.attempt,
            "placed"
        );
        self.codec.tell(Event::Placed(placed.clone()));
        resume
    }

    /// One attempt on one worker. Returns the core's last decision, and whether it is due to silence or loss and
    /// not to something that the worker said.
    async fn attempt(
        &mut self,
        assignment: &Assignment,
        connection: &dyn Connection,
        resume: Resume,
    ) -> (Step, bool) {
        let ring = assignment.placed.ring;
        let progress_ms = progress_ms(self.mesh);
        let request = self.codec.request(&AttemptTerms {
            placed: &assignment.placed,
            answer: &self.answer,
            resume,
            deadline_ms: deadline_ms(&self.answer),
            // A ring's silence is noticed sooner.
            progress_ms: match ring {
                Some(_) => progress_ms.min(RING_SILENCE.as_millis() as u32 / 4),
                None => progress_ms,
            },
        });
        let attempt = resume.attempt;
        let mut timer = Timer::new(&self.answer);
        let mut changes = self.mesh.ring_changes();
        let mut opening = connection.open(request);
        let mut stream = loop {
            tokio::select! {
                biased;
                opened = &mut opening => match opened {
                    Ok(stream) => break stream,
                    Err(failure) => return (self.broke(assignment, attempt, failure), true),
                },
                now = timer.fired(&self.answer) => {
                    match self.time_passed(assignment, connection, attempt, now) {
                        Step::Wait => {}
                        end => return (end, true),
                    }
                }
            }
        };
        stream.limit(self.codec.message_bytes(&self.answer.bounds()));
        let mut prefilling = true;
        loop {
            let (step, lost) = tokio::select! {
                biased;
                received = stream.receive() => {
                    let lost = matches!(received, Ok(FromWorker::End) | Err(_));
                    (self.received(assignment, attempt, received), lost)
                }
                now = timer.fired(&self.answer) => {
                    (self.time_passed(assignment, connection, attempt, now), true)
                }
                _ = changes.changed(), if ring.is_some() => {
                    (self.ring_changed(assignment, attempt), false)
                }
            };
            match step {
                Step::Wait => {}
                Step::Emit(delta) => {
                    if !delta.tokens.is_empty() {
                        let first = std::mem::take(&mut prefilling);
                        self.tokens_came(assignment, delta.tokens.len(), first);
                    }
                    self.codec.tell(Event::Delta(delta));
                }
                Step::Advanced(tokens) => {
                    if tokens > 0 {
                        let first = std::mem::take(&mut prefilling);
                        self.tokens_came(assignment, tokens as usize, first);
                    }
                }
                Step::Complete(_) => {
                    self.contradict(assignment);
                    if !C::HAS_TOKENS {
                        assignment.prefilled();
                    }
                    stream.finish();
                    return (step, lost);
                }
                Step::Again(_) | Step::Fail(..) => return (step, lost),
            }
        }
    }

    fn tokens_came(&mut self, assignment: &Assignment, tokens: usize, first: bool) {
        let now = Instant::now();
        self.last_token = Some(now);
        assignment.received(tokens, first, now);
        if let Some((model, since)) = self.broke_off.take() {
            self.mesh.metrics.ring_gap(&model, now - since);
        }
        if first {
            assignment.first_token();
            self.contradict(assignment);
        }
    }

    fn contradict(&mut self, by: &Assignment) {
        let suspects = &self.suspects;
        suspects.contradict(&mut self.answer, by, self.mesh);
    }

    fn received(
        &mut self,
        assignment: &Assignment,
        attempt: u32,
        received: Result<FromWorker, Failure>,
    ) -> Step {
        let now = Instant::now();
        let incoming = match received {
            Ok(FromWorker::Message(message)) => match reply_in(message) {
                WorkerReply::Progress(progress) => {
                    return self.progressed(assignment, attempt, progress, now);
                }
                WorkerReply::Failed(failure) => {
                    let failure = self.codec.failed(attempt, failure);
                    let request = (&self.ask, &mut self.answer);
                    let suspects = &mut self.suspects;
                    suspects.ask_another(&failure, request, assignment, self.mesh);
                    return self.answer.failed(attempt, failure);
                }
                WorkerReply::Work(message) => FromWorker::Message(message),
            },
            Ok(FromWorker::End) => {
                let failure = Failure::Lost(C::ENDED_EARLY.to_owned());
                return self.broke(assignment, attempt, failure);
            }
            Ok(whole @ FromWorker::Whole(_)) => whole,
            Err(failure) => return self.broke(assignment, attempt, failure),
        };
        let kind = match &incoming {
            FromWorker::Message(message) => Some(message.kind),
            FromWorker::Whole(_) | FromWorker::End => None,
        };
        let step = self.codec.read(incoming, attempt, &mut self.answer, now);
        step.unwrap_or_else(|| {
            if let Some(kind) = kind {
                debug!(%kind, "unexpected on a request's stream");
            }
            self.answer.idled(attempt, now)
        })
    }

    fn progressed(
        &mut self,
        assignment: &Assignment,
        attempt: u32,
        progress: Progress,
        now: Instant,
    ) -> Step {
        let seen = assignment.last_token_of_worker();
        let step = self.answer.progressed(attempt, &progress, seen, now);
        if gets_on(&progress) {
            assignment.gave_sign();
        }
        if step == Step::Wait {
            self.codec.tell(Event::Waits(progress));
        }
        step
    }

    /// The stream broke, perhaps because the worker died.
    fn broke(&mut self, assignment: &Assignment, attempt: u32, failure: Failure) -> Step {
        let (deaths, answer) = (&mut self.deaths, &mut self.answer);
        let failure = deaths.of(failure, assignment, answer, self.mesh);
        self.answer.failed(attempt, failure)
    }

    /// The answer's timer fired. While its ring recovers, silence is no sign of death.
    fn time_passed(
        &mut self,
        assignment: &Assignment,
        connection: &dyn Connection,
        attempt: u32,
        now: Instant,
    ) -> Step {
        // It works on one request after the other: while it answers others, this one waits its turn.
        if let Some(at) = connection.last_answer() {
            self.answer.excused_until(at);
        }
        if self.answer.waits_untold(now) && assignment.is_busy() {
            self.answer.excused_until(now);
        }
        match assignment.ring_role() {
            Some(RingRole::Serves(since)) => {
                self.answer.excused_until(since);
                let limit = self.mesh.config.silence_limit * 2;
                let lately = |at| now.saturating_duration_since(at) < limit;
                // A driver that is heard is slow, and gets the time that any worker gets.
                let hears = || self.mesh.hears(assignment.placed.worker);
                if self.last_token.is_some_and(lately) && hears() {
                    self.answer.look_again_at(now + RING_LOOK);
                }
            }
            Some(RingRole::Recovers) => self.answer.excused_until(now),
            Some(RingRole::Gone) if now < self.answer.deadline() => {
                return self.ring_changed(assignment, attempt);
            }
            Some(RingRole::Gone) | None => {}
        }
        self.answer.time_passed(now)
    }

    /// A ring changed: if this answer's worker does not drive its ring any more, it goes on elsewhere.
    fn ring_changed(&mut self, assignment: &Assignment, attempt: u32) -> Step {
        if assignment.ring_role() != Some(RingRole::Gone) {
            return Step::Wait;
        }
        // The same as if the worker itself had said so: it counts as no failure of the request.
        let moved = Failure::Error {
            code: ErrorCode::DRAINING,
            text: "moved: another worker drives the ring now".to_owned(),
        };
        self.answer.failed(attempt, moved)
    }

    fn prepare_rerun(&mut self, assignment: &Assignment, ended: AttemptEnd, lost: bool) {
        let placed = &assignment.placed;
        if let Some(ring) = placed.ring {
            let gone = assignment.ring_role() == Some(RingRole::Gone);
            if let Some(at) = self.last_token.filter(|_| lost || gone) {
                self.broke_off.get_or_insert((placed.model.clone(), at));
            }
            if lost && ended == AttemptEnd::Failed {
                self.forgiven.push(placed.worker);
                let reason = "an answer got no more tokens from it";
                self.mesh.suspect(placed.worker, ring, reason);
            }
        }
        if ended == AttemptEnd::Failed {
            self.mesh.metrics.reruns.inc();
            // Rings record their own changes.
            if placed.ring.is_none() {
                self.mesh.audit.failover(&placed.model, 1);
            }
            self.codec.log_rerun(&placed.name, &self.answer);
        }
        self.ask.avoid = self.answer.avoided();
        self.ask
            .avoid
            .retain(|worker| !self.forgiven.contains(worker));
        self.ask.alone = self.answer.is_suspect();
        if self.codec.has_begun(&self.answer) {
            self.ask.plain = false;
            self.ask.model.clone_from(&placed.model);
            self.ask.fingerprint = Some(placed.fingerprint.clone());
        }
    }
}

/// The answer's timer. It is moved only when the next deadline comes closer: mostly, tokens push it away, and
/// it is cheaper to look again when it fires.
struct Timer {
    sleep: Pin<Box<Sleep>>,
}

impl Timer {
    fn new(answer: &Lifecycle) -> Self {
        Self {
            sleep: Box::pin(sleep_until(due(answer).into())),
        }
    }

    /// Resolves when [`Lifecycle::time_passed`] may have something to say.
    async fn fired(&mut self, answer: &Lifecycle) -> Instant {
        let due = tokio::time::Instant::from(due(answer));
        if due < self.sleep.deadline() || self.sleep.is_elapsed() {
            self.sleep.as_mut().reset(due);
        }
        self.sleep.as_mut().await;
        Instant::now()
    }
}

fn due(answer: &Lifecycle) -> Instant {
    answer
        .next_timer()
        .unwrap_or_else(|| Instant::now() + Duration::from_secs(3600))
}

/// Time until the head looks again at a driver that is heard and sends no tokens.
const RING_LOOK: Duration = Duration::from_millis(300);

/// Silence of a ring's driver that counts as its death, if its link is silent, too: its standby goes on
/// within milliseconds. It is more than a driver needs to notice a silent member, whose loss is not the
/// driver's.
const RING_SILENCE: Duration = Duration::from_millis(1_500);
