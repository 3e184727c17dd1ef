//! Drives one answer: asks for a worker, talks to it, and carries out the decisions of [`Lifecycle`] until the
//! answer ends.

use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::{Duration, Instant};

use dcf::{ErrorCode, Message, MsgType};
use mesh_control::placement::{self, AttemptEnd};
use mesh_control::registry::WorkerId;
use mesh_control::request::{AnswerError, Failure, Lifecycle, Resume, Step};
use mesh_control::router::Requirements;
use mesh_net::quic::{Link, MsgStream};
use mesh_proto::{Done, Generate, ModelKind, Progress, Prompt, RequestPhase, Tokens};
use prost::Message as _;
use tokio::sync::mpsc;
use tokio::time::{Sleep, sleep_until};
use tracing::{debug, info, warn};

use super::deaths::Deaths;
use super::event::{Event, Placed};
use super::outcome::{deadline_ms, outcome_of};
use super::task::Task;
use crate::ids;
use crate::mesh::exchange::{LegacyTask, LegacyWorker};
use crate::mesh::{Assignment, Mesh, RingRole, Route, timestamp_us};
use crate::metrics::{Front, Outcome};
use crate::workers::requests::{error_of, gets_on, progress_ms};

/// Starts a task; dropping the receiver cancels it.
pub(crate) fn submit(mesh: &Arc<Mesh>, front: Front, task: Task) -> mpsc::UnboundedReceiver<Event> {
    // Unbounded, yet bounded by the context: a slow client must not hold a worker's slot for longer than the
    // answer takes.
    let (sender, receiver) = mpsc::unbounded_channel();
    let mesh = mesh.clone();
    tokio::spawn(async move {
        let gone = sender.closed();
        drive(&mesh, front, task, |event| drop(sender.send(event)), gone).await;
    });
    receiver
}

/// Runs a task to its end, or until `gone`.
pub(crate) async fn drive(
    mesh: &Arc<Mesh>,
    front: Front,
    task: Task,
    emit: impl FnMut(Event) + Send,
    gone: impl Future<Output = ()> + Send,
) {
    let started = Instant::now();
    let id = task.id.clone();
    let mut drive = Drive::new(mesh, task, emit);
    let gone = pin!(gone);
    let outcome = tokio::select! {
        biased;
        outcome = drive.run() => outcome,
        () = gone => Outcome::Cancelled,
    };
    let seconds = started.elapsed().as_secs_f64();
    mesh.metrics
        .tokens
        .inc_by(drive.answer.tokens().len() as u64);
    mesh.metrics.request_ended(front, outcome, seconds);
    debug!(
        request = id,
        ?front,
        ?outcome,
        seconds,
        reruns = drive.answer.failures(),
        "request ended"
    );
}

pub(super) struct Drive<'a, E> {
    pub(super) mesh: &'a Arc<Mesh>,
    task: Task,
    pub(super) ask: Requirements,
    pub(super) answer: Lifecycle,
    emit: E,
    /// Arrival of the last token.
    last_token: Option<Instant>,
    /// The attempt before this one failed on a ring of this model, whose last token came then.
    broke_off: Option<(String, Instant)>,
    /// Workers that are not to be avoided though this request failed on them: not they failed but their ring.
    forgiven: Vec<WorkerId>,
    /// Workers that are to blame if another one can do it.
    pub(super) suspects: Vec<Attempted>,
    /// The context that the worker claims whose rejection of this request is looked into.
    pub(super) rejected_in: u32,
    /// Time at which the client last heard the cause of the request's wait.
    told: Option<Instant>,
    deaths: Deaths,
}

/// An attempt, as the head's opinion of its worker needs it.
pub(super) struct Attempted {
    pub(super) key: String,
    pub(super) name: String,
    pub(super) model: String,
    pub(super) began: Instant,
}

/// Result of one attempt.
enum Attempt {
    Again {
        ended: AttemptEnd,
        /// By silence or loss, not by something that the worker said.
        lost: bool,
    },
    Over(AttemptEnd, Outcome),
}

impl Attempt {
    const LOST: Self = Self::Again {
        ended: AttemptEnd::Failed,
        lost: true,
    };
}

impl<'a, E: FnMut(Event) + Send> Drive<'a, E> {
    fn new(mesh: &'a Arc<Mesh>, mut task: Task, emit: E) -> Self {
        // Known to the head, so that an attempt elsewhere draws the same tokens.
        task.params.seed.get_or_insert_with(ids::unique);
        let named = task.model.take();
        let known = named.as_ref().is_some_and(|name| mesh.knows_model(name));
        let model = named.or_else(|| mesh.default_model()).unwrap_or_default();
        let mut ask = task.ask(&model);
        // The models of a v5.0.0 worker are not known; a request that names a model of the mesh means that
        // one.
        ask.legacy &= !known;
        let answer =
            Lifecycle::new(mesh.config.request_limits(), Instant::now()).within(task.bounds());
        Self {
            mesh,
            task,
            ask,
            answer,
            emit,
            last_token: None,
            broke_off: None,
            forgiven: Vec::new(),
            suspects: Vec::new(),
            rejected_in: 0,
            told: None,
            deaths: Deaths::default(),
        }
    }

    async fn run(&mut self) -> Outcome {
        if self.mesh.shutdown.is_draining() {
            return self.failed(AnswerError::ShuttingDown);
        }
        if self.mesh.replicas(&self.ask.model).kind == Some(ModelKind::Embed) {
            return self.failed(AnswerError::Rejected {
                code: ErrorCode::INVALID_PAYLOAD,
                text: format!(
                    "the model {:?} makes embeddings, not text; POST /v1/embeddings asks for those",
                    self.ask.model
                ),
            });
        }
        let mut rerun = false;
        loop {
            let assignment = match self.place(rerun).await {
                Ok(assignment) => assignment,
                Err(step) => return self.settle(step),
            };
            let placed = &assignment.placed;
            let expected = match assignment.route {
                // It shows no life but heartbeats until the whole answer is there.
                Route::Legacy(_) => self.mesh.config.request_timeout,
                _ => placed.estimate.first_token,
            };
            let least = self.mesh.config.silence_limit;
            self.answer.set_least_silence(match placed.ring {
                Some(_) => least.min(RING_SILENCE),
                None => least,
            });
            self.answer.set_context(placed.context);
            let began = Instant::now();
            self.deaths.review(&mut self.answer, self.mesh);
            let resume = self.answer.placed(placed.worker, expected, began);
            debug!(
                request = self.task.id,
                worker = placed.name,
                attempt = resume.attempt,
                "placed"
            );
            (self.emit)(Event::Placed(Placed {
                model: placed.model.clone(),
                worker: placed.name.clone(),
                fingerprint: placed.fingerprint.clone(),
            }));
            let attempt = match assignment.route.clone() {
                Route::Link(link) => {
                    let attempt = self.attempt_mesh(&assignment, &link, resume).await;
                    if link.close_reason().is_some() {
                        // The link's own task will notice, too, but the next attempt must not find the worker
                        // there.
                        self.mesh.leave(assignment.placed.worker);
                    }
                    attempt
                }
                Route::Legacy(worker) => {
                    let mesh = self.mesh.clone();
                    self.attempt_legacy(mesh.exchange.open(worker), worker, resume)
                        .await
                }
                Route::Gone => {
                    let step = self
                        .answer
                        .failed(resume.attempt, Failure::Lost("the worker left".into()));
                    self.follow(step, true).unwrap_or(Attempt::LOST)
                }
            };
            match attempt {
                Attempt::Over(ended, outcome) => {
                    if ended == AttemptEnd::Failed {
                        self.blame(&assignment, began);
                    }
                    if ended == AttemptEnd::Complete {
                        self.exonerate(&assignment);
                    }
                    assignment.end(ended);
                    return outcome;
                }
                Attempt::Again { ended, lost } => {
                    if ended == AttemptEnd::Failed {
                        self.blame(&assignment, began);
                    }
                    self.prepare_rerun(&assignment, ended, lost);
                    assignment.end(ended);
                    rerun = true;
                }
            }
        }
    }

    /// Finds a worker before the deadline.
    async fn place(&mut self, rerun: bool) -> Result<Assignment, Step> {
        (self.emit)(Event::Queued);
        let placing = self.mesh.place(self.ask.clone(), rerun);
        match tokio::time::timeout_at(self.answer.deadline().into(), placing).await {
            Ok(Ok(assignment)) => Ok(assignment),
            Ok(Err(refusal)) => Err(self.answer.refused(refusal)),
            Err(_) => Err(self
                .answer
                .time_passed(Instant::now().max(self.answer.deadline()))),
        }
    }

    fn prepare_rerun(&mut self, assignment: &Assignment, ended: AttemptEnd, lost: bool) {
        if let Some(ring) = assignment.placed.ring {
            let gone = self.mesh.ring_role(assignment.placed.worker, ring) == RingRole::Gone;
            if let Some(at) = self.last_token.filter(|_| lost || gone) {
                let model = assignment.placed.model.clone();
                self.broke_off.get_or_insert((model, at));
            }
            if lost && ended == AttemptEnd::Failed {
                self.forgiven.push(assignment.placed.worker);
                self.mesh.suspect(
                    assignment.placed.worker,
                    ring,
                    "an answer got no more tokens from it",
                );
            }
        }
        if ended == AttemptEnd::Failed {
            self.mesh.metrics.reruns.inc();
            info!(
                request = self.task.id,
                worker = assignment.placed.name,
                tokens = self.answer.tokens().len(),
                "run again elsewhere after the tokens so far"
            );
        }
        let avoided = self.answer.avoided().into_iter();
        self.ask.avoid = avoided
            .filter(|worker| !self.forgiven.contains(worker))
            .collect();
        self.ask.alone = self.answer.is_suspect();
        if self.answer.has_begun() {
            self.ask.legacy = false;
            self.ask.model.clone_from(&assignment.placed.model);
            self.ask.fingerprint = Some(assignment.placed.fingerprint.clone());
        }
    }

    /// One attempt on a worker of the mesh.
    async fn attempt_mesh(
        &mut self,
        assignment: &Assignment,
        link: &Link,
        resume: Resume,
    ) -> Attempt {
        let generate = self.generate(&assignment.placed, resume);
        let mut timer = Timer::new(&self.answer);
        let mut changes = self.mesh.ring_changes();
        let ring = assignment.placed.ring;
        let mut stream = {
            let opening = open(link, generate);
            let mut opening = pin!(opening);
            loop {
                tokio::select! {
                    biased;
                    opened = &mut opening => match opened {
                        Ok(stream) => break stream,
                        Err(failure) => {
                            let failure = self.deaths.of(failure, assignment, &mut self.answer, self.mesh);
                            let step = self.answer.failed(resume.attempt, failure);
                            return self.follow(step, true).unwrap_or(Attempt::LOST);
                        }
                    },
                    now = timer.fired(&self.answer) => {
                        let step = self.time_passed(assignment, resume.attempt, now);
                        if let Some(attempt) = self.follow(step, true) {
                            return attempt;
                        }
                    }
                }
            }
        };
        stream.limit(self.answer.bounds().message());
        let mut prefilling = true;
        loop {
            let (step, lost) = tokio::select! {
                biased;
                received = stream.recv() => {
                    let lost = !matches!(received, Ok(Some(_)));
                    let received = received.map_err(|error| error.to_string());
                    (self.received(assignment, resume.attempt, received), lost)
                }
                now = timer.fired(&self.answer) => (self.time_passed(assignment, resume.attempt, now), true),
                _ = changes.changed(), if ring.is_some() => (self.ring_changed(assignment, resume.attempt), false),
            };
            if let Step::Emit(delta) = &step
                && !delta.tokens.is_empty()
            {
                let now = Instant::now();
                self.last_token = Some(now);
                assignment.received(delta.tokens.len(), prefilling, now);
                if let Some((model, since)) = self.broke_off.take() {
                    self.mesh.metrics.ring_gap(&model, now - since);
                }
            }
            if prefilling && matches!(&step, Step::Emit(delta) if !delta.tokens.is_empty()) {
                prefilling = false;
                assignment.first_token();
                self.contradict(assignment);
            }
            if matches!(&step, Step::Complete(_)) {
                self.contradict(assignment);
            }
            if let Some(attempt) = self.follow(step, lost) {
                if !matches!(attempt, Attempt::Over(AttemptEnd::Complete, _)) {
                    stream.reset(ErrorCode::CANCELLED);
                } else {
                    // The worker has sent its last message; only the confirmation of its receipt is left to
                    // send.
                    let _ = stream.finish();
                }
                return attempt;
            }
        }
    }

    /// One attempt on a worker without an identity.
    async fn attempt_legacy(
        &mut self,
        mut pending: LegacyTask<'_>,
        worker: LegacyWorker,
        resume: Resume,
    ) -> Attempt {
        let payload = self.task.legacy.clone().unwrap_or_default();
        let task = Message::new(MsgType::TASK, pending.sequence, timestamp_us(), payload);
        let mut timer = Timer::new(&self.answer);
        let step = match self.mesh.bus.send(&task, worker).await {
            Err(error) => self
                .answer
                .failed(resume.attempt, Failure::Lost(error.to_string())),
            Ok(()) => loop {
                tokio::select! {
                    biased;
                    reply = &mut pending.reply => break self.replied(resume.attempt, reply.ok()),
                    now = timer.fired(&self.answer) => {
                        // It works on one task after the other: while it answers others, this one waits its
                        // turn.
                        if let Some(at) = self.mesh.exchange.last_answer(worker.address) {
                            self.answer.excused_until(at);
                        }
                        match self.answer.time_passed(now) {
                            Step::Wait => {}
                            step => break step,
                        }
                    }
                }
            },
        };
        self.follow(step, true).unwrap_or(Attempt::LOST)
    }

    /// The answer's timer fired. While its ring recovers, silence is no sign of death.
    fn time_passed(&mut self, assignment: &Assignment, attempt: u32, now: Instant) -> Step {
        let placed = &assignment.placed;
        if self.answer.waits_untold(now) && assignment.is_busy() {
            self.answer.excused_until(now);
        }
        match placed
            .ring
            .map(|ring| self.mesh.ring_role(placed.worker, ring))
        {
            Some(RingRole::Serves(since)) => {
                self.answer.excused_until(since);
                let limit = self.mesh.config.silence_limit * 2;
                let lately = |at| now.saturating_duration_since(at) < limit;
                // A driver that is heard is slow, and gets the time that any worker gets.
                if self.last_token.is_some_and(lately) && self.mesh.hears(placed.worker) {
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
        let placed = &assignment.placed;
        let role = placed
            .ring
            .map(|ring| self.mesh.ring_role(placed.worker, ring));
        if role != Some(RingRole::Gone) {
            return Step::Wait;
        }
        // The same as if the worker itself had said so: it counts as no failure of the request.
        let moved = Failure::Error {
            code: ErrorCode::DRAINING,
            text: "moved: another worker drives the ring now".to_owned(),
        };
        self.answer.failed(attempt, moved)
    }

    fn received(
        &mut self,
        assignment: &Assignment,
        attempt: u32,
        received: Result<Option<Message>, String>,
    ) -> Step {
        let now = Instant::now();
        let message = match received {
            Ok(Some(message)) => message,
            Ok(None) => {
                let text = "the worker ended the stream before the answer was complete";
                let failure = Failure::Lost(text.to_owned());
                let failure = self
                    .deaths
                    .of(failure, assignment, &mut self.answer, self.mesh);
                return self.answer.failed(attempt, failure);
            }
            Err(error) => {
                let failure = self.deaths.of(
                    Failure::Lost(error),
                    assignment,
                    &mut self.answer,
                    self.mesh,
                );
                return self.answer.failed(attempt, failure);
            }
        };
        let undecodable =
            |kind| Failure::Nonsense(format!("the worker sent a {kind} that cannot be read"));
        match message.kind {
            MsgType::TOKENS => match Tokens::decode(message.payload) {
                Ok(tokens) => self.answer.tokens_came(attempt, tokens, now),
                Err(_) => self.answer.failed(attempt, undecodable(MsgType::TOKENS)),
            },
            MsgType::DONE => match Done::decode(message.payload) {
                Ok(done) => self.answer.done(attempt, done, now),
                Err(_) => self.answer.failed(attempt, undecodable(MsgType::DONE)),
            },
            MsgType::ERROR => {
                let failure = error_of(&message);
                if matches!(
                    failure,
                    Failure::Error {
                        code: ErrorCode::INVALID_PAYLOAD | ErrorCode::CONTEXT_TOO_LONG,
                        ..
                    }
                ) {
                    self.ask_another(assignment);
                }
                self.answer.failed(attempt, failure)
            }
            MsgType::PROGRESS => match Progress::decode(message.payload) {
                Ok(progress) => {
                    let seen = assignment.last_token_of_worker();
                    let step = self.answer.progressed(attempt, &progress, seen, now);
                    if gets_on(&progress) {
                        assignment.gave_sign();
                    }
                    // A client that does not read must not pile them up.
                    let is_news = self.told.is_none_or(|at| now - at >= TELL_EVERY);
                    if step == Step::Wait && progress.phase() != RequestPhase::Decoding && is_news {
                        self.told = Some(now);
                        (self.emit)(Event::Waits(progress));
                    }
                    step
                }
                Err(_) => self.answer.failed(attempt, undecodable(MsgType::PROGRESS)),
            },
            // A newer worker may say more than this head understands.
            other => {
                debug!(kind = %other, "unexpected on a request's stream");
                self.answer.idled(attempt, now)
            }
        }
    }

    fn replied(&mut self, attempt: u32, reply: Option<Message>) -> Step {
        let Some(message) = reply else {
            return self
                .answer
                .failed(attempt, Failure::Lost("the worker is gone".into()));
        };
        if message.kind != MsgType::RESULT {
            return self.answer.failed(attempt, error_of(&message));
        }
        if message.payload.len() > MOST_WHOLE {
            let text = format!("its Result has {} bytes", message.payload.len());
            return self.answer.failed(attempt, Failure::Nonsense(text));
        }
        (self.emit)(Event::Whole(message.payload));
        self.answer.done(attempt, Done::default(), Instant::now())
    }

    /// Carries out the core's decision; `None` means to go on with the attempt.
    fn follow(&mut self, step: Step, lost: bool) -> Option<Attempt> {
        match step {
            Step::Wait => None,
            Step::Emit(delta) => {
                (self.emit)(Event::Delta(delta));
                None
            }
            Step::Again(ended) => Some(Attempt::Again { ended, lost }),
            Step::Complete(_) => Some(Attempt::Over(AttemptEnd::Complete, self.settle(step))),
            Step::Fail(_, ended) => Some(Attempt::Over(ended, self.settle(step))),
        }
    }

    /// Sends the last event to the front end.
    fn settle(&mut self, step: Step) -> Outcome {
        match step {
            Step::Complete(complete) => {
                let metrics = &self.mesh.metrics;
                if let Some(first_token) = complete.first_token {
                    metrics.first_token(first_token.as_secs_f64());
                }
                metrics
                    .prompt_tokens
                    .inc_by(u64::from(complete.done.prompt_tokens));
                metrics
                    .cached_tokens
                    .inc_by(u64::from(complete.done.cached_tokens));
                (self.emit)(Event::Complete(complete));
                Outcome::Complete
            }
            Step::Fail(error, _) => self.failed(error),
            Step::Wait | Step::Emit(_) | Step::Again(_) => Outcome::Failed,
        }
    }

    fn failed(&mut self, error: AnswerError) -> Outcome {
        let outcome = outcome_of(&error);
        if outcome == Outcome::Failed || outcome == Outcome::Timeout {
            warn!(request = self.task.id, %error, "no answer");
        }
        (self.emit)(Event::Failed(error));
        outcome
    }

    fn generate(&self, placed: &placement::Placed, resume: Resume) -> Message {
        // A ring's silence is noticed sooner.
        let progress_ms = match placed.ring {
            Some(_) => progress_ms(self.mesh).min(RING_SILENCE.as_millis() as u32 / 4),
            None => progress_ms(self.mesh),
        };
        let generate = Generate {
            request_id: self.task.id.clone(),
            model: placed.model.clone(),
            prompt: Some(Prompt::clone(&self.task.prompt)),
            params: Some(self.task.params.clone()),
            generated: self.answer.tokens().to_vec(),
            text_sent: resume.text_sent,
            deadline_ms: deadline_ms(&self.answer),
            progress_ms,
            cache_salt: self.task.salt,
        };
        Message::new(
            MsgType::GENERATE,
            resume.attempt,
            timestamp_us(),
            generate.encode_to_vec(),
        )
    }
}

/// Opens a request stream.
async fn open(link: &Link, generate: Message) -> Result<MsgStream, Failure> {
    let lost = |error: mesh_net::quic::StreamFailure| Failure::Lost(error.to_string());
    let mut stream = link.open().await.map_err(lost)?;
    stream.send(generate).await.map_err(lost)?;
    Ok(stream)
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

/// Bytes of a whole answer of a worker without an identity.
const MOST_WHOLE: usize = 8 << 20;

/// Least time between two messages to a client about the cause of its request's wait.
const TELL_EVERY: Duration = Duration::from_millis(100);

/// Time until the head looks again at a driver that is heard and sends no tokens.
const RING_LOOK: Duration = Duration::from_millis(300);

/// Silence of a ring's driver that counts as its death, if its link is silent, too: its standby goes on
/// within milliseconds. It is more than a driver needs to notice a silent member, whose loss is not the
/// driver's.
const RING_SILENCE: Duration = Duration::from_millis(1_500);
