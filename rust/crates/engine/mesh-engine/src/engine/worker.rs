//! The loop of an engine's thread: take commands, plan steps, run them, deliver their events.
//!
//! The holder of the [`Worker`] runs the loop. Usually it is the thread; a caller that has just received a
//! result for the runner may run it itself ([`Shared::work_here`]), which saves two thread switches.

use std::any::Any;
use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use futures::channel::{mpsc as async_mpsc, oneshot};

use crate::StageInfo;
use crate::request::{Event, Request, RequestError};
use crate::runner::{Outcome, Runner};
use crate::scheduler::{Load, RequestKey, RequestStatus, Scheduler, Step};

/// State shared by an engine's handles and its thread.
pub(super) struct Shared {
    info: OnceLock<StageInfo>,
    next_key: AtomicU64,
    load: Mutex<Load>,
    pulse: Mutex<Pulse>,
    death: Mutex<Option<RequestError>>,
    queue: Mutex<Queue>,
    filled: Condvar,
    /// `None` before it is started and when it has ended.
    worker: Mutex<Option<Worker>>,
}

/// The last report of the thread on itself and on its requests.
#[derive(Default)]
struct Pulse {
    /// Time at which a step last came back, or the first request came; `None` while the engine is idle.
    advanced: Option<Instant>,
    /// The states of its requests.
    statuses: HashMap<RequestKey, RequestStatus>,
    /// Time at which those were noted.
    noted: Option<Instant>,
}

#[derive(Default)]
struct Queue {
    commands: VecDeque<Command>,
    /// Time at which to poll the runner even without a command.
    timer: Option<Instant>,
    /// The engine's thread has ended and takes no more commands.
    closed: bool,
}

pub(super) enum Command {
    Submit(RequestKey, Work, async_mpsc::UnboundedSender<Event>),
    Cancel(RequestKey),
    Drain(oneshot::Sender<()>),
    Wake,
    Stop,
}

pub(super) enum Work {
    Generate(Box<Request>),
    Score(String, Vec<u32>),
}

impl Shared {
    pub(super) fn new() -> Self {
        Shared {
            info: OnceLock::new(),
            next_key: AtomicU64::new(0),
            load: Mutex::default(),
            pulse: Mutex::default(),
            death: Mutex::default(),
            queue: Mutex::default(),
            filled: Condvar::new(),
            worker: Mutex::default(),
        }
    }

    /// Gives the engine its runner and scheduler. Called once, before anything else.
    pub(super) fn start(&self, info: StageInfo, runner: Box<dyn Runner>, scheduler: Scheduler) {
        let _ = self.info.set(info);
        *lock(&self.load) = scheduler.load();
        *lock(&self.worker) = Some(Worker {
            runner,
            scheduler,
            step: Step::default(),
            streams: HashMap::new(),
            drained: Vec::new(),
            failures: 0,
        });
    }

    pub(super) fn info(&self) -> &StageInfo {
        self.info
            .get()
            .expect("handles are given out after the start")
    }

    pub(super) fn next_key(&self) -> RequestKey {
        self.next_key.fetch_add(1, Ordering::Relaxed)
    }

    pub(super) fn load(&self) -> Load {
        lock(&self.load).clone()
    }

    pub(super) fn status(&self, key: RequestKey) -> Option<RequestStatus> {
        lock(&self.pulse).statuses.get(&key).copied()
    }

    pub(super) fn quiet(&self, now: Instant) -> Duration {
        let advanced = lock(&self.pulse).advanced;
        advanced.map_or(Duration::ZERO, |at| now.saturating_duration_since(at))
    }

    pub(super) fn death(&self) -> Option<RequestError> {
        lock(&self.death).clone()
    }

    /// Leaves a command for the thread; `false` if it is gone.
    pub(super) fn tell(&self, command: Command) -> bool {
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
        let Ok(mut worker) = self.worker.try_lock() else {
            return false;
        };
        let waits_for = queue.timer;
        drop(queue);
        self.turn(&mut worker);
        let queue = lock(&self.queue);
        let earlier = match (queue.timer, waits_for) {
            (Some(timer), Some(waits_for)) => timer < waits_for,
            (timer, None) => timer.is_some(),
            (None, _) => false,
        };
        if earlier || queue.closed {
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
                    None => self
                        .filled
                        .wait(queue)
                        .unwrap_or_else(PoisonError::into_inner),
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
            self.turn(&mut lock(&self.worker));
        }
    }

    /// Works until no work is possible at once. If that ends the engine, every stream ends, because its
    /// sender is dropped here, after the reason was noted.
    fn turn(&self, worker: &mut Option<Worker>) {
        let Some(working) = worker else {
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
        working.scheduler.end_all(&error);
        working.publish(self);
        let mut queue = lock(&self.queue);
        queue.closed = true;
        let unheard = std::mem::take(&mut queue.commands);
        drop(queue);
        drop(unheard);
        *worker = None;
    }
}

/// The runner of an engine's steps and all state of the engine.
struct Worker {
    runner: Box<dyn Runner>,
    scheduler: Scheduler,
    step: Step,
    streams: HashMap<RequestKey, async_mpsc::UnboundedSender<Event>>,
    drained: Vec<oneshot::Sender<()>>,
    /// Failed steps since the last good one.
    failures: u32,
}

impl Worker {
    /// Works until no work is possible at once; then sets the time of the next poll. Returns the error that
    /// ended the engine.
    fn turn(&mut self, shared: &Shared) -> Option<RequestError> {
        loop {
            let commands = std::mem::take(&mut lock(&shared.queue).commands);
            let mut news = false;
            for command in commands {
                news |= matches!(command, Command::Submit(..));
                if !self.obey(command) {
                    // A runner's own error is more precise than the one for a dropped engine.
                    return Some(self.poll().err().unwrap_or_else(|| dead(STOPPED)));
                }
            }
            if !self.scheduler.is_idle() {
                // Visible to readers while the step below is computed.
                lock(&shared.pulse)
                    .advanced
                    .get_or_insert_with(Instant::now);
            }
            let mut busy = false;
            while self.runner.has_room() && self.scheduler.plan(&mut self.step, Instant::now()) {
                self.runner.begin(&mut self.step, Instant::now());
                busy = true;
            }
            if news {
                // The step may take long.
                self.note_statuses(shared, true);
            }
            match self.poll() {
                Ok(false) => {}
                Ok(true) => {
                    busy = true;
                    lock(&shared.pulse).advanced = Some(Instant::now());
                }
                Err(fatal) => return Some(fatal),
            }
            self.publish(shared);
            if busy {
                continue;
            }
            let mut queue = lock(&shared.queue);
            if queue.commands.is_empty() {
                // Deadlines of requests pass though nothing happens.
                let look = (!self.scheduler.is_idle()).then(|| Instant::now() + DEADLINE_CHECK);
                queue.timer = self.runner.next_timer().into_iter().chain(look).min();
                return None;
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

    /// Takes in the next outcome of the running steps; returns `false` when no outcome is ready. An error ends
    /// the engine.
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
            // The stage may have stopped halfway, so its state cannot be trusted any more.
            Err(panic) => Err(dead(&format!("a step panicked: {}", panic_text(&*panic)))),
        }
    }

    /// Hands out events and the load.
    fn publish(&mut self, shared: &Shared) {
        *lock(&shared.load) = self.scheduler.load();
        self.note_statuses(shared, false);
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

impl Worker {
    /// Notes the status of all requests, at intervals or `at_once`.
    fn note_statuses(&self, shared: &Shared, at_once: bool) {
        let now = Instant::now();
        let mut pulse = lock(&shared.pulse);
        if self.scheduler.is_idle() {
            pulse.advanced = None;
        }
        let fresh = |at| now.saturating_duration_since(at) < STATUS_INTERVAL;
        if !at_once && pulse.noted.is_some_and(fresh) {
            return;
        }
        pulse.noted = Some(now);
        pulse.statuses.clear();
        for &key in self.streams.keys() {
            if let Some(status) = self.scheduler.status(key) {
                pulse.statuses.insert(key, status);
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
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) const STOPPED: &str = "it was shut down";

/// Failed steps in a row after which an engine is given up.
const FATAL_FAILURES: u32 = 3;

/// Maximum age of the states of requests while steps go on.
pub(super) const STATUS_INTERVAL: Duration = Duration::from_millis(100);

/// Longest delay in noticing a request's deadline while steps are under way elsewhere.
const DEADLINE_CHECK: Duration = Duration::from_millis(50);
