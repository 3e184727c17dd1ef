//! The loop of an engine's thread: take commands, begin steps, run them, deliver their events.
//!
//! The holder of the [`Executor`] runs the loop. Usually it is the thread; a caller that has just received a
//! result for the workload may run it itself ([`EngineState::work_here`]), which saves two thread switches.

use std::any::Any;
use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::AtomicU64;
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use futures::channel::{mpsc, oneshot};

use crate::StageError;
use crate::request::RequestError;
use crate::workload::{Load, RequestKey, RequestStatus, Schedule, StepOutcome, Workload};

/// State of an engine, common to its handles and its thread.
pub(super) struct EngineState<W: Workload> {
    /// Set at the start, before handles are given out.
    pub(super) info: OnceLock<W::Info>,
    pub(super) next_key: AtomicU64,
    pub(super) load: Mutex<Load>,
    pub(super) activity: Mutex<Activity>,
    pub(super) death: Mutex<Option<RequestError>>,
    queue: Mutex<CommandQueue<W>>,
    filled: Condvar,
    /// `None` before it is started and when it has ended.
    executor: Mutex<Option<Executor<W>>>,
}

/// The last report of the thread on itself and on its requests.
#[derive(Default)]
pub(super) struct Activity {
    /// Time at which a step last came back, or the first request came; `None` while the engine is idle.
    pub(super) advanced: Option<Instant>,
    pub(super) statuses: HashMap<RequestKey, RequestStatus>,
    /// Time at which the statuses were noted.
    noted: Option<Instant>,
}

struct CommandQueue<W: Workload> {
    commands: VecDeque<Command<W>>,
    /// Time at which to poll the workload even without a command.
    timer: Option<Instant>,
    /// The engine's thread has ended and takes no more commands.
    closed: bool,
}

pub(super) enum Command<W: Workload> {
    Submit(RequestKey, W::Request, mpsc::UnboundedSender<W::Event>),
    Cancel(RequestKey),
    Drain(oneshot::Sender<()>),
    Wake,
    Stop,
}

impl<W: Workload> EngineState<W> {
    pub(super) fn new() -> Self {
        EngineState {
            info: OnceLock::new(),
            next_key: AtomicU64::new(0),
            load: Mutex::default(),
            activity: Mutex::default(),
            death: Mutex::default(),
            queue: Mutex::new(CommandQueue {
                commands: VecDeque::new(),
                timer: None,
                closed: false,
            }),
            filled: Condvar::new(),
            executor: Mutex::default(),
        }
    }

    /// Gives the engine its workload. Called once, before anything else.
    pub(super) fn start(&self, mut workload: W) {
        let _ = self.info.set(workload.info().clone());
        *lock(&self.load) = workload.scheduler().load();
        *lock(&self.executor) = Some(Executor {
            workload,
            streams: HashMap::new(),
            drained: Vec::new(),
            failures: 0,
        });
    }

    /// Leaves a command for the thread; `false` if it is gone.
    pub(super) fn tell(&self, command: Command<W>) -> bool {
        let mut queue = lock(&self.queue);
        if queue.closed {
            return false;
        }
        queue.commands.push_back(command);
        drop(queue);
        self.filled.notify_one();
        true
    }

    /// Runs the loop in the calling thread; `false` if another thread runs it, or commands wait for the
    /// engine's thread.
    pub(super) fn work_here(&self) -> bool {
        let queue = lock(&self.queue);
        if queue.closed || !queue.commands.is_empty() {
            return false;
        }
        let Ok(mut executor) = self.executor.try_lock() else {
            return false;
        };
        let waits_for = queue.timer;
        drop(queue);
        self.turn(&mut executor);
        let queue = lock(&self.queue);
        let earlier = |timer| waits_for.is_none_or(|waits_for| timer < waits_for);
        if queue.timer.is_some_and(earlier) || queue.closed {
            drop(queue);
            self.filled.notify_one();
        }
        true
    }

    /// Runs the engine's thread until it is stopped or the engine breaks.
    pub(super) fn work(&self) {
        loop {
            let mut queue = lock(&self.queue);
            while queue.commands.is_empty() && !queue.closed {
                let now = Instant::now();
                queue = match queue.timer {
                    None => {
                        let waited = self.filled.wait(queue);
                        waited.unwrap_or_else(PoisonError::into_inner)
                    }
                    Some(at) if at <= now => break,
                    Some(at) => {
                        let waited = self.filled.wait_timeout(queue, at - now);
                        waited.unwrap_or_else(PoisonError::into_inner).0
                    }
                };
            }
            if queue.closed {
                return;
            }
            drop(queue);
            self.turn(&mut lock(&self.executor));
        }
    }

    /// Works until no work is possible at once. If that ends the engine, every stream ends, because its
    /// sender is dropped here, after the reason was noted.
    fn turn(&self, executor: &mut Option<Executor<W>>) {
        let Some(working) = executor else {
            return;
        };
        let error = match catch_unwind(AssertUnwindSafe(|| working.turn(self))) {
            Ok(None) => return,
            Ok(Some(error)) => error,
            Err(panic) => dead(&format!("its thread panicked: {}", panic_text(&*panic))),
        };
        match &error {
            RequestError::Moved { reason } => {
                tracing::info!(reason, "the engine ends: the model moves")
            }
            RequestError::RingLost { .. } => tracing::warn!(%error, "the engine ends"),
            error if *error == dead(STOPPED) => {}
            error => tracing::error!(%error, "the engine stopped"),
        }
        *lock(&self.death) = Some(error.clone());
        working.workload.scheduler().end_all(&error);
        working.publish(self);
        let mut queue = lock(&self.queue);
        queue.closed = true;
        let unheard = std::mem::take(&mut queue.commands);
        drop(queue);
        drop(unheard);
        *executor = None;
    }
}

/// The workload and all state that belongs to the loop.
struct Executor<W: Workload> {
    workload: W,
    streams: HashMap<RequestKey, mpsc::UnboundedSender<W::Event>>,
    drained: Vec<oneshot::Sender<()>>,
    /// Failed steps since the last good one.
    failures: u32,
}

impl<W: Workload> Executor<W> {
    /// Works until no work is possible at once; then sets the time of the next poll. Returns the error that
    /// ended the engine.
    fn turn(&mut self, state: &EngineState<W>) -> Option<RequestError> {
        loop {
            let commands = std::mem::take(&mut lock(&state.queue).commands);
            let mut news = false;
            for command in commands {
                news |= matches!(command, Command::Submit(..));
                if !self.obey(command) {
                    // A workload's own error is more precise than the one for a dropped engine.
                    return Some(self.poll().err().unwrap_or_else(|| dead(STOPPED)));
                }
            }
            if !self.workload.scheduler().is_idle() {
                // Visible to readers while the step below is computed.
                let advanced = &mut lock(&state.activity).advanced;
                advanced.get_or_insert_with(Instant::now);
            }
            let mut busy = false;
            while self.workload.begin(Instant::now()) {
                busy = true;
            }
            if news || (busy && W::LONG_STEPS) {
                // The step may take long.
                *lock(&state.load) = self.workload.scheduler().load();
            }
            if news {
                self.note_statuses(state, true);
            }
            match self.poll() {
                Ok(false) => {}
                Ok(true) => {
                    busy = true;
                    lock(&state.activity).advanced = Some(Instant::now());
                }
                Err(fatal) => return Some(fatal),
            }
            self.publish(state);
            if busy {
                continue;
            }
            let mut queue = lock(&state.queue);
            if queue.commands.is_empty() {
                // Deadlines of requests pass though nothing happens.
                let look =
                    (!self.workload.scheduler().is_idle()).then(|| Instant::now() + DEADLINE_CHECK);
                queue.timer = self.workload.next_timer().into_iter().chain(look).min();
                return None;
            }
        }
    }

    fn obey(&mut self, command: Command<W>) -> bool {
        match command {
            Command::Submit(key, request, events) => {
                self.streams.insert(key, events);
                let scheduler = self.workload.scheduler();
                scheduler.submit(key, request, Instant::now());
            }
            Command::Cancel(key) => {
                self.streams.remove(&key);
                self.workload.scheduler().cancel(key);
            }
            Command::Drain(done) => {
                self.workload.scheduler().drain();
                self.drained.push(done);
            }
            Command::Wake => {}
            Command::Stop => return false,
        }
        true
    }

    /// Takes in the next outcome of the running steps; returns `false` when no outcome is ready. An error ends
    /// the engine.
    fn poll(&mut self) -> Result<bool, RequestError> {
        let workload = &mut self.workload;
        let outcome = catch_unwind(AssertUnwindSafe(|| workload.poll(Instant::now())));
        // The model may have stopped halfway, so its state cannot be trusted any more.
        match outcome.map_err(|panic| dead(&format!("a step panicked: {}", panic_text(&*panic))))? {
            StepOutcome::Pending => return Ok(false),
            StepOutcome::Completed => self.failures = 0,
            StepOutcome::Resumed => {}
            StepOutcome::Failed { rows, error } => {
                tracing::error!(%error, rows, "a step failed");
                if let StageError::OutOfMemory { .. } = error {
                    return Err(dead(&error.to_string()));
                }
                self.failures += 1;
                if self.failures >= FATAL_FAILURES {
                    return Err(dead(&format!(
                        "{FATAL_FAILURES} {} in a row failed, the last one: {error}",
                        W::STEPS
                    )));
                }
            }
            StepOutcome::Ended(error) => return Err(error),
        }
        Ok(true)
    }

    /// Hands out events and the load.
    fn publish(&mut self, state: &EngineState<W>) {
        *lock(&state.load) = self.workload.scheduler().load();
        self.note_statuses(state, false);
        while let Some((key, event)) = self.workload.scheduler().next_event() {
            let is_last = W::is_last(&event);
            if let Some(stream) = self.streams.get(&key) {
                // A receiver that is gone has sent a cancel.
                let _ = stream.unbounded_send(event);
            }
            if is_last {
                self.streams.remove(&key);
            }
        }
        if self.workload.scheduler().is_idle() {
            for done in self.drained.drain(..) {
                let _ = done.send(());
            }
        }
    }

    /// Notes the status of all requests, at intervals or `at_once`.
    fn note_statuses(&mut self, state: &EngineState<W>, at_once: bool) {
        let now = Instant::now();
        let mut activity = lock(&state.activity);
        if self.workload.scheduler().is_idle() {
            activity.advanced = None;
        }
        let fresh = |at| now.saturating_duration_since(at) < STATUS_INTERVAL;
        if !at_once && activity.noted.is_some_and(fresh) {
            return;
        }
        activity.noted = Some(now);
        activity.statuses.clear();
        for &key in self.streams.keys() {
            if let Some(status) = self.workload.scheduler().status(key) {
                activity.statuses.insert(key, status);
            }
        }
    }
}

pub(super) fn dead(reason: &str) -> RequestError {
    RequestError::EngineDead {
        reason: reason.to_owned(),
    }
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("(no message)")
}

/// Locks `mutex`, poisoned or not: the guarded value is replaced as a whole, so a panic elsewhere leaves it
/// sound.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) const STOPPED: &str = "it was shut down";

/// Failed steps in a row after which an engine is given up.
const FATAL_FAILURES: u32 = 3;

/// Maximum age of the states of requests while steps go on.
pub(super) const STATUS_INTERVAL: Duration = Duration::from_millis(100);

/// Longest delay in noticing a request's deadline while steps are under way elsewhere.
const DEADLINE_CHECK: Duration = Duration::from_millis(50);
