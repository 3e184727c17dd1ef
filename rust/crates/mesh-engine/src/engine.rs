//! The thread that owns a runner and its scheduler, and the handle by which the rest of a program uses it.
//!
//! Nothing here depends on an async runtime: an [`EngineHandle`] never blocks, and a [`RequestStream`] is a plain
//! [`Stream`]. A request ends in exactly one last event, whatever happens to the engine: if its thread is gone, the
//! stream says so.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::task::{Context, Poll};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use futures::channel::{mpsc as async_mpsc, oneshot};
use futures::{Stream, StreamExt};

use crate::request::{Event, Request, RequestError, TokenScore};
use crate::runner::{Local, Outcome, Runner};
use crate::scheduler::{Load, RequestKey, Scheduler, SchedulerConfig, Step};
use crate::{Stage, StageInfo, Vocabulary};

/// A running engine: one thread with a scheduler and what runs its steps. Dropping it stops the thread; requests then fail.
pub struct Engine {
    handle: EngineHandle,
    thread: Option<JoinHandle<()>>,
}

/// Submits requests to an [`Engine`] and looks at its load, from any thread or task.
#[derive(Clone)]
pub struct EngineHandle {
    shared: Arc<Shared>,
    commands: mpsc::Sender<Command>,
}

/// Wakes an engine's thread.
#[derive(Clone)]
pub struct Waker(mpsc::Sender<Command>);

/// The events of one request. Dropping it cancels the request.
pub struct RequestStream {
    key: RequestKey,
    events: async_mpsc::UnboundedReceiver<Event>,
    handle: EngineHandle,
    ended: bool,
}

/// Why an engine cannot be started.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The stage holds only some layers.
    #[error("the stage holds layers {start}..{end} of {layers}; an engine needs all of them")]
    PartialModel {
        /// First layer held.
        start: u32,
        /// One past the last layer held.
        end: u32,
        /// Layers of the model.
        layers: u32,
    },
    /// The stage's logits and the vocabulary do not fit together.
    #[error("the model gives {logits} logits, but its vocabulary has {vocab} tokens")]
    VocabularyMismatch {
        /// Length of a logits row.
        logits: usize,
        /// Tokens in the vocabulary.
        vocab: usize,
    },
    /// The operating system gave no thread.
    #[error("cannot start the engine's thread: {0}")]
    Thread(String),
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

    /// As [`start`](Self::start), with steps that run elsewhere. The runner is made with what wakes the engine's thread.
    pub fn start_runner(
        name: &str,
        vocabulary: Arc<dyn Vocabulary>,
        config: SchedulerConfig,
        make: impl FnOnce(Waker) -> Box<dyn Runner>,
    ) -> Result<Self, StartError> {
        let (commands, inbox) = mpsc::channel();
        let runner = make(Waker(commands.clone()));
        let info = runner.info().clone();
        check(&info, &*vocabulary)?;
        let scheduler = Scheduler::new(&info, vocabulary, config);
        let shared = Arc::new(Shared {
            info,
            next_key: AtomicU64::new(0),
            load: Mutex::new(scheduler.load()),
            death: Mutex::new(None),
        });
        let worker = Worker {
            runner,
            scheduler,
            inbox,
            shared: Arc::clone(&shared),
            streams: HashMap::new(),
            drained: Vec::new(),
            failures: 0,
        };
        let thread = std::thread::Builder::new()
            .name(format!("engine {name}"))
            .spawn(move || worker.run_to_the_end())
            .map_err(|error| StartError::Thread(error.to_string()))?;
        Ok(Engine {
            handle: EngineHandle { shared, commands },
            thread: Some(thread),
        })
    }

    /// A handle to this engine.
    pub fn handle(&self) -> EngineHandle {
        self.handle.clone()
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // A thread that is gone has nothing left to stop.
        let _ = self.handle.commands.send(Command::Stop);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl EngineHandle {
    /// Submits a request; refusals come as its first event.
    pub fn submit(&self, request: Request) -> RequestStream {
        self.send_work(Work::Generate(Box::new(request)))
    }

    /// How the model sees each token of a text but the first, given the tokens before it.
    pub async fn score(&self, id: &str, tokens: Vec<u32>) -> Result<Vec<TokenScore>, RequestError> {
        let mut stream = self.send_work(Work::Score(id.to_owned(), tokens));
        loop {
            match stream.next().await {
                Some(Event::Scored(scores)) => return Ok(scores),
                Some(Event::Failed(error)) => return Err(error),
                Some(_) => {}
                None => return Err(self.dead()),
            }
        }
    }

    /// What the engine has to do and how fast it goes, as of its last step.
    pub fn load(&self) -> Load {
        lock(&self.shared.load).clone()
    }

    /// Shape and limits of the stage.
    pub fn info(&self) -> &StageInfo {
        &self.shared.info
    }

    /// Refuses new requests from now on; resolves when those that are queued or running have ended.
    pub async fn drain(&self) {
        let (done, drained) = oneshot::channel();
        if self.commands.send(Command::Drain(done)).is_ok() {
            // An engine that dies has drained, too.
            let _ = drained.await;
        }
    }

    /// Why the engine's thread is gone, if it is.
    pub fn death(&self) -> Option<RequestError> {
        lock(&self.shared.death).clone()
    }

    fn send_work(&self, work: Work) -> RequestStream {
        let key = self.shared.next_key.fetch_add(1, Ordering::Relaxed);
        let (sender, events) = async_mpsc::unbounded();
        // If the thread is gone, the sender is dropped with the command, and the stream says why.
        let _ = self.commands.send(Command::Submit(key, work, sender));
        RequestStream {
            key,
            events,
            handle: self.clone(),
            ended: false,
        }
    }

    fn dead(&self) -> RequestError {
        self.death().unwrap_or_else(|| dead(STOPPED))
    }
}

impl Waker {
    /// Has the engine's thread poll its runner.
    pub fn wake(&self) {
        // A thread that is gone needs no waking.
        let _ = self.0.send(Command::Wake);
    }
}

impl Stream for RequestStream {
    type Item = Event;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Event>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let event = match self.events.poll_next_unpin(cx) {
            Poll::Pending => return Poll::Pending,
            Poll::Ready(Some(event)) => event,
            Poll::Ready(None) => Event::Failed(self.handle.dead()),
        };
        self.ended = event.is_last();
        Poll::Ready(Some(event))
    }
}

impl Drop for RequestStream {
    fn drop(&mut self) {
        if !self.ended {
            let _ = self.handle.commands.send(Command::Cancel(self.key));
        }
    }
}

struct Shared {
    info: StageInfo,
    next_key: AtomicU64,
    load: Mutex<Load>,
    death: Mutex<Option<RequestError>>,
}

enum Command {
    Submit(RequestKey, Work, async_mpsc::UnboundedSender<Event>),
    Cancel(RequestKey),
    Drain(oneshot::Sender<()>),
    Wake,
    Stop,
}

enum Work {
    Generate(Box<Request>),
    Score(String, Vec<u32>),
}

/// The engine's thread.
struct Worker {
    runner: Box<dyn Runner>,
    scheduler: Scheduler,
    inbox: mpsc::Receiver<Command>,
    shared: Arc<Shared>,
    streams: HashMap<RequestKey, async_mpsc::UnboundedSender<Event>>,
    drained: Vec<oneshot::Sender<()>>,
    /// Failed steps since the last good one.
    failures: u32,
}

impl Worker {
    /// Runs until the engine is stopped or breaks. Then every stream ends, because its sender is dropped here, and the
    /// reason is known before that.
    fn run_to_the_end(mut self) {
        let error = match catch_unwind(AssertUnwindSafe(|| self.run())) {
            Ok(error) => error,
            Err(panic) => dead(&format!("its thread panicked: {}", panic_text(&*panic))),
        };
        if error != dead(STOPPED) {
            tracing::error!(%error, "the engine stopped");
        }
        *lock(&self.shared.death) = Some(error.clone());
        self.scheduler.end_all(&error);
        self.publish();
    }

    /// Returns what ended it.
    fn run(&mut self) -> RequestError {
        let mut step = Step::default();
        let mut busy = false;
        loop {
            if !self.take_commands(busy) {
                // A runner that has ended says why better than who drops the engine after it.
                return self.poll().err().unwrap_or_else(|| dead(STOPPED));
            }
            busy = false;
            while self.runner.has_room() && self.scheduler.plan(&mut step, Instant::now()) {
                self.runner.begin(&mut step, Instant::now());
                busy = true;
            }
            match self.poll() {
                Ok(false) => {}
                Ok(true) => busy = true,
                Err(fatal) => return fatal,
            }
            self.publish();
        }
    }

    /// Takes in all commands. Unless there is something to do at once, waits for one, or for a timer. Returns `false` when
    /// the engine is to stop.
    fn take_commands(&mut self, busy: bool) -> bool {
        if !busy {
            // Deadlines of requests pass though nothing happens.
            let look = (!self.scheduler.is_idle()).then(|| Instant::now() + DEADLINE_CHECK);
            let timer = self.runner.next_timer().into_iter().chain(look).min();
            let command = match timer {
                None => self.inbox.recv().ok(),
                Some(at) => {
                    match self
                        .inbox
                        .recv_timeout(at.saturating_duration_since(Instant::now()))
                    {
                        Ok(command) => Some(command),
                        Err(mpsc::RecvTimeoutError::Timeout) => Some(Command::Wake),
                        Err(mpsc::RecvTimeoutError::Disconnected) => None,
                    }
                }
            };
            if !command.is_some_and(|command| self.obey(command)) {
                return false;
            }
        }
        loop {
            match self.inbox.try_recv() {
                Ok(command) => {
                    if !self.obey(command) {
                        return false;
                    }
                }
                Err(mpsc::TryRecvError::Empty) => return true,
                Err(mpsc::TryRecvError::Disconnected) => return false,
            }
        }
    }

    fn obey(&mut self, command: Command) -> bool {
        let now = Instant::now();
        match command {
            Command::Submit(key, work, events) => {
                self.streams.insert(key, events);
                match work {
                    Work::Generate(request) => self.scheduler.submit(key, *request, now),
                    Work::Score(id, tokens) => self.scheduler.submit_score(key, id, tokens, now),
                }
            }
            Command::Cancel(key) => {
                self.streams.remove(&key);
                self.scheduler.cancel(key);
            }
            Command::Drain(done) => {
                self.scheduler.drain();
                self.drained.push(done);
            }
            Command::Wake => {}
            Command::Stop => return false,
        }
        true
    }

    /// Takes in what came of the steps under way; says whether anything did. An error is one that the engine does not
    /// survive.
    fn poll(&mut self) -> Result<bool, RequestError> {
        let (runner, scheduler, failures) =
            (&mut self.runner, &mut self.scheduler, &mut self.failures);
        let mut any = false;
        let run = || -> Result<(), RequestError> {
            if let Some(outcome) = runner.poll(Instant::now()) {
                any = true;
                match outcome {
                    Outcome::Logits(step, logits) => {
                        *failures = 0;
                        scheduler.complete(step, logits, Instant::now());
                    }
                    Outcome::Failed(step, error) => {
                        tracing::error!(%error, rows = step.tokens.len(), "a step failed");
                        scheduler.fail(step, &error);
                        *failures += 1;
                        if *failures >= FATAL_FAILURES {
                            return Err(dead(&format!(
                                "{failures} steps in a row failed, the last one: {error}"
                            )));
                        }
                    }
                    Outcome::Resumed(held) => scheduler.resume(&held),
                    Outcome::Ended(error) => return Err(error),
                }
            }
            Ok(())
        };
        match catch_unwind(AssertUnwindSafe(run)) {
            Ok(result) => result.map(|()| any),
            // Whatever the stage was doing, its state cannot be trusted any more.
            Err(panic) => Err(dead(&format!("a step panicked: {}", panic_text(&*panic)))),
        }
    }

    /// Hands out events and the load.
    fn publish(&mut self) {
        *lock(&self.shared.load) = self.scheduler.load();
        while let Some((key, event)) = self.scheduler.next_event() {
            let is_last = event.is_last();
            if let Some(stream) = self.streams.get(&key) {
                // A receiver that is gone has sent a cancel.
                let _ = stream.unbounded_send(event);
            }
            if is_last {
                self.streams.remove(&key);
            }
        }
        if self.scheduler.is_idle() {
            for done in self.drained.drain(..) {
                let _ = done.send(());
            }
        }
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

fn dead(reason: &str) -> RequestError {
    RequestError::EngineDead {
        reason: reason.to_owned(),
    }
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("(no message)")
}

/// What these mutexes guard is replaced as a whole, so a panic elsewhere leaves it sound.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

const STOPPED: &str = "it was shut down";

/// Failed steps in a row after which an engine is given up.
const FATAL_FAILURES: u32 = 3;

/// How late a request's deadline may be noticed while steps are under way elsewhere.
const DEADLINE_CHECK: Duration = Duration::from_millis(50);

#[cfg(test)]
mod tests;
