//! The thread that owns an encoder and its scheduler.

use std::collections::HashMap;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::task::{Context, Poll};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use futures::channel::oneshot;

use super::scheduler::{Batch, EmbedConfig, Embedded, Key, Scheduler};
use super::{EmbedRequest, Encoder, EncoderInfo};
use crate::scheduler::Load;
use crate::{RequestError, StartError};

/// A running engine: one thread. Dropping it stops the thread; requests then fail.
pub struct EmbedEngine {
    handle: EmbedHandle,
    thread: Option<JoinHandle<()>>,
}

/// Submits requests to an [`EmbedEngine`] and reads its load, from any thread or task.
#[derive(Clone)]
pub struct EmbedHandle {
    shared: Arc<Shared>,
    commands: mpsc::Sender<Command>,
}

/// A future for the outcome of a request. Dropping it cancels the request.
pub struct EmbedReply {
    key: Key,
    end: oneshot::Receiver<Result<Embedded, RequestError>>,
    handle: EmbedHandle,
    ended: bool,
}

struct Shared {
    info: EncoderInfo,
    next_key: AtomicU64,
    load: Mutex<Load>,
    /// Time at which a batch last came back, or the first request came; `None` while the engine is idle.
    advanced: Mutex<Option<Instant>>,
    death: Mutex<Option<RequestError>>,
}

enum Command {
    Submit(
        Key,
        EmbedRequest,
        oneshot::Sender<Result<Embedded, RequestError>>,
    ),
    Cancel(Key),
    Drain(oneshot::Sender<()>),
    Stop,
}

impl EmbedEngine {
    /// Starts a thread named after `name` that runs `encoder`.
    ///
    /// # Errors
    /// If the system gives no thread.
    pub fn start(
        name: &str,
        encoder: Box<dyn Encoder>,
        config: EmbedConfig,
    ) -> Result<Self, StartError> {
        let (commands, inbox) = mpsc::channel();
        let scheduler = Scheduler::new(encoder.info().clone(), config);
        let shared = Arc::new(Shared {
            info: encoder.info().clone(),
            next_key: AtomicU64::new(0),
            load: Mutex::new(scheduler.load()),
            advanced: Mutex::default(),
            death: Mutex::new(None),
        });
        let worker = Worker {
            encoder,
            scheduler,
            inbox,
            shared: Arc::clone(&shared),
            replies: HashMap::new(),
            drained: Vec::new(),
            failures: 0,
        };
        let thread = std::thread::Builder::new()
            .name(format!("encoder {name}"))
            .spawn(move || worker.run_to_the_end())
            .map_err(|error| StartError::Thread(error.to_string()))?;
        Ok(EmbedEngine {
            handle: EmbedHandle { shared, commands },
            thread: Some(thread),
        })
    }

    /// A handle to this engine.
    pub fn handle(&self) -> EmbedHandle {
        self.handle.clone()
    }
}

impl Drop for EmbedEngine {
    fn drop(&mut self) {
        // A thread that is gone has nothing left to stop.
        let _ = self.handle.commands.send(Command::Stop);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl EmbedHandle {
    /// Submits a request; the reply resolves when the request ends.
    pub fn submit(&self, request: EmbedRequest) -> EmbedReply {
        let key = self.shared.next_key.fetch_add(1, Ordering::Relaxed);
        let (sender, end) = oneshot::channel();
        // If the thread is gone, the sender is dropped with the command, and the reply says why.
        let _ = self.commands.send(Command::Submit(key, request, sender));
        EmbedReply {
            key,
            end,
            handle: self.clone(),
            ended: false,
        }
    }

    /// Work in progress and measured speed, as of the engine's last batch.
    pub fn load(&self) -> Load {
        lock(&self.shared.load).clone()
    }

    /// Time since the engine last completed a batch while it had something to do; zero while it has nothing
    /// to do.
    pub fn quiet(&self) -> Duration {
        let advanced = *lock(&self.shared.advanced);
        advanced.map_or(Duration::ZERO, |at| at.elapsed())
    }

    /// Shape and limits of the encoder.
    pub fn info(&self) -> &EncoderInfo {
        &self.shared.info
    }

    /// Refuses new requests from now on; resolves when all waiting and running requests have ended.
    pub async fn drain(&self) {
        let (done, drained) = oneshot::channel();
        if self.commands.send(Command::Drain(done)).is_ok() {
            // An engine that dies has drained, too.
            let _ = drained.await;
        }
    }

    /// The error that ended the engine's thread; `None` while it runs.
    pub fn death(&self) -> Option<RequestError> {
        lock(&self.shared.death).clone()
    }
}

impl Future for EmbedReply {
    type Output = Result<Embedded, RequestError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let end = match Pin::new(&mut self.end).poll(cx) {
            Poll::Pending => return Poll::Pending,
            Poll::Ready(Ok(end)) => end,
            Poll::Ready(Err(_)) => Err(self.handle.death().unwrap_or_else(|| dead(STOPPED))),
        };
        self.ended = true;
        Poll::Ready(end)
    }
}

impl Drop for EmbedReply {
    fn drop(&mut self) {
        if !self.ended {
            let _ = self.handle.commands.send(Command::Cancel(self.key));
        }
    }
}

struct Worker {
    encoder: Box<dyn Encoder>,
    scheduler: Scheduler,
    inbox: mpsc::Receiver<Command>,
    shared: Arc<Shared>,
    replies: HashMap<Key, oneshot::Sender<Result<Embedded, RequestError>>>,
    drained: Vec<oneshot::Sender<()>>,
    /// Failed batches since the last good one.
    failures: u32,
}

impl Worker {
    /// Runs until the engine is stopped or breaks. Then every reply ends, because its sender is dropped here, and the reason
    /// is known before that.
    fn run_to_the_end(mut self) {
        let error = match catch_unwind(AssertUnwindSafe(|| self.run())) {
            Ok(error) => error,
            Err(_) => dead("its thread panicked; see the log"),
        };
        if error != dead(STOPPED) {
            tracing::error!(%error, "the encoder stopped");
        }
        *lock(&self.shared.death) = Some(error.clone());
        self.scheduler.end_all(&error);
        self.publish();
    }

    /// Runs until the engine stops; returns the reason.
    fn run(&mut self) -> RequestError {
        loop {
            if !self.take_commands() {
                return dead(STOPPED);
            }
            if let Some(batch) = self.scheduler.plan(Instant::now()) {
                lock(&self.shared.advanced).get_or_insert_with(Instant::now);
                // Readers of the load during the batch must see that there is work.
                *lock(&self.shared.load) = self.scheduler.load();
                if let Err(fatal) = self.compute(&batch) {
                    return fatal;
                }
                let more = !self.scheduler.is_idle();
                *lock(&self.shared.advanced) = more.then(Instant::now);
            }
            self.publish();
        }
    }

    fn compute(&mut self, batch: &Batch) -> Result<(), RequestError> {
        let sequences: Vec<&[u32]> = batch.parts.iter().map(|(_, _, s)| s.as_slice()).collect();
        let started = Instant::now();
        match self.encoder.encode(&sequences) {
            Ok(vectors) => {
                self.failures = 0;
                self.scheduler.complete(batch, &vectors, started.elapsed());
            }
            Err(error) => {
                tracing::error!(%error, rows = batch.rows(), "a batch failed");
                self.scheduler.fail(batch, &error);
                self.failures += 1;
                if self.failures >= FATAL_FAILURES {
                    return Err(dead(&format!(
                        "{FATAL_FAILURES} batches in a row failed, the last one: {error}"
                    )));
                }
            }
        }
        Ok(())
    }

    /// Takes in all commands; waits for one if no sequence waits. Returns `false` when the engine is to stop.
    fn take_commands(&mut self) -> bool {
        // A request that is known and not finished still has waiting sequences, since batches are computed at
        // once.
        if self.scheduler.is_idle() && !self.inbox.recv().is_ok_and(|command| self.obey(command)) {
            return false;
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
        match command {
            Command::Submit(key, request, reply) => {
                self.replies.insert(key, reply);
                self.scheduler.submit(key, request);
            }
            Command::Cancel(key) => {
                self.replies.remove(&key);
                self.scheduler.cancel(key);
            }
            Command::Drain(done) => {
                self.scheduler.drain();
                self.drained.push(done);
            }
            Command::Stop => return false,
        }
        true
    }

    /// Delivers ended requests and publishes the load.
    fn publish(&mut self) {
        *lock(&self.shared.load) = self.scheduler.load();
        while let Some((key, end)) = self.scheduler.next_end() {
            if let Some(reply) = self.replies.remove(&key) {
                // A receiver that is gone has sent a cancel.
                let _ = reply.send(end);
            }
        }
        if self.scheduler.is_idle() {
            for done in self.drained.drain(..) {
                let _ = done.send(());
            }
        }
    }
}

fn dead(reason: &str) -> RequestError {
    RequestError::EngineDead {
        reason: reason.to_owned(),
    }
}

/// Locks `mutex`, poisoned or not: the guarded value is replaced as a whole, so a panic elsewhere leaves it
/// sound.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

const STOPPED: &str = "it was shut down";

/// Failed batches in a row after which an encoder is given up.
const FATAL_FAILURES: u32 = 3;
