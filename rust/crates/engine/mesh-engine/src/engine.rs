//! The thread that does one kind of work, and the handle through which the rest of a program uses it.
//!
//! Nothing here knows the kind of work: a [`Workload`] has the scheduler and the model. Nothing depends on an
//! async runtime: an [`EngineHandle`] never blocks, and a [`RequestStream`] is a plain [`Stream`]. Every
//! request ends in exactly one last event: if the engine's thread is gone, the stream reports an error.

mod thread;

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::thread::JoinHandle;
use std::time::Duration;

use futures::channel::{mpsc, oneshot};
use futures::{Stream, StreamExt};

use self::thread::{Command, EngineState, STOPPED, dead, lock};
use crate::generation::Generation;
use crate::request::RequestError;
use crate::workload::{Load, RequestKey, RequestStatus, Workload};

/// A running engine: one thread with a [`Workload`], by default of a language model. Dropping it stops the
/// thread; requests then fail.
pub struct Engine<W: Workload = Generation> {
    handle: EngineHandle<W>,
    thread: Option<JoinHandle<()>>,
}

/// Submits requests to an [`Engine`] and reads its load, from any thread or task.
pub struct EngineHandle<W: Workload = Generation> {
    state: Arc<EngineState<W>>,
}

/// Makes an engine poll its workload.
pub struct Waker<W: Workload = Generation>(Arc<EngineState<W>>);

/// The events of one request. Dropping it cancels the request.
pub struct RequestStream<W: Workload = Generation> {
    key: RequestKey,
    events: mpsc::UnboundedReceiver<W::Event>,
    handle: EngineHandle<W>,
    ended: bool,
}

/// Errors of starting an engine.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages name the fields")]
pub enum StartError {
    /// The stage holds only some layers.
    #[error("the stage holds layers {start}..{end} of {layers}; an engine needs all of them")]
    PartialModel { start: u32, end: u32, layers: u32 },
    /// The stage's logits and the vocabulary do not fit together.
    #[error("the model gives {logits} logits, but its vocabulary has {vocab} tokens")]
    VocabularyMismatch { logits: usize, vocab: usize },
    /// The operating system gave no thread.
    #[error("cannot start the engine's thread: {0}")]
    Thread(String),
}

impl<W: Workload> Engine<W> {
    /// Starts a thread named after `name` for the workload that `make` returns. It receives the waker of the
    /// thread.
    ///
    /// # Errors
    /// The error of `make`, or if the system gives no thread.
    pub fn start_with(
        name: &str,
        make: impl FnOnce(Waker<W>) -> Result<W, StartError>,
    ) -> Result<Self, StartError> {
        let state = Arc::new(EngineState::new());
        state.start(make(Waker(Arc::clone(&state)))?);
        let works = Arc::clone(&state);
        let thread = std::thread::Builder::new()
            .name(format!("engine {name}"))
            .spawn(move || works.work())
            .map_err(|error| StartError::Thread(error.to_string()))?;
        Ok(Engine {
            handle: EngineHandle { state },
            thread: Some(thread),
        })
    }

    /// A handle to this engine.
    pub fn handle(&self) -> EngineHandle<W> {
        self.handle.clone()
    }
}

impl<W: Workload> Drop for Engine<W> {
    fn drop(&mut self) {
        // A thread that is gone has nothing left to stop.
        let _ = self.handle.state.tell(Command::Stop);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl<W: Workload> EngineHandle<W> {
    /// Submits a request; a refusal is its first and last event.
    pub fn submit(&self, request: impl Into<W::Request>) -> RequestStream<W> {
        let key = self.state.next_key.fetch_add(1, Ordering::Relaxed);
        let (sender, events) = mpsc::unbounded();
        // If the thread is gone, the sender is dropped with the command, and the stream says why.
        let command = Command::Submit(key, request.into(), sender);
        let _ = self.state.tell(command);
        RequestStream {
            key,
            events,
            handle: self.clone(),
            ended: false,
        }
    }

    /// Work in progress and measured speed, as of the engine's last step.
    pub fn load(&self) -> Load {
        lock(&self.state.load).clone()
    }

    /// Time since the engine last completed a step while it had work; zero while it is idle. A hanging step
    /// shows here even if the rest of the process runs.
    pub fn quiet(&self) -> Duration {
        let advanced = lock(&self.state.activity).advanced;
        advanced.map_or(Duration::ZERO, |at| at.elapsed())
    }

    /// Shape and limits of the model.
    pub fn info(&self) -> &W::Info {
        let info = self.state.info.get();
        info.expect("handles are given out after the start")
    }

    /// Refuses new requests from now on; resolves when all queued and running requests have ended.
    pub async fn drain(&self) {
        let (done, drained) = oneshot::channel();
        if self.state.tell(Command::Drain(done)) {
            // An engine that dies has drained, too.
            let _ = drained.await;
        }
    }

    /// The error that ended the engine's thread; `None` while it runs.
    pub fn death(&self) -> Option<RequestError> {
        lock(&self.state.death).clone()
    }
}

impl<W: Workload> Clone for EngineHandle<W> {
    fn clone(&self) -> Self {
        let state = Arc::clone(&self.state);
        EngineHandle { state }
    }
}

impl<W: Workload> Waker<W> {
    /// Wakes the engine's thread so that it polls its workload.
    pub fn wake(&self) {
        // A thread that is gone needs no waking.
        let _ = self.0.tell(Command::Wake);
    }

    /// Polls the workload in the calling thread if it is free and no command waits, else [`wake`](Self::wake)s
    /// the engine's thread.
    ///
    /// Handing a step of a few milliseconds to another thread costs a noticeable share of it. The caller is kept for as long as
    /// the step takes.
    pub fn wake_here(&self) {
        if !self.0.work_here() {
            self.wake();
        }
    }
}

impl<W: Workload> RequestStream<W> {
    /// The state of the request as of the engine's last steps; `None` before the engine has looked at it.
    pub fn status(&self) -> Option<RequestStatus> {
        let activity = lock(&self.handle.state.activity);
        activity.statuses.get(&self.key).copied()
    }

    /// [`EngineHandle::quiet`] of its engine.
    pub fn quiet(&self) -> Duration {
        self.handle.quiet()
    }

    /// Waits for the last event; those before it are lost.
    pub async fn last_event(mut self) -> W::Event {
        loop {
            match self.next().await {
                Some(event) if W::is_last(&event) => return event,
                Some(_) => {}
                None => return self.gone(),
            }
        }
    }

    /// The last event of a request whose engine's thread is gone.
    fn gone(&self) -> W::Event {
        W::failed(self.handle.death().unwrap_or_else(|| dead(STOPPED)))
    }
}

impl<W: Workload> Stream for RequestStream<W> {
    type Item = W::Event;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<W::Event>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let event = match self.events.poll_next_unpin(cx) {
            Poll::Pending => return Poll::Pending,
            Poll::Ready(Some(event)) => event,
            Poll::Ready(None) => self.gone(),
        };
        self.ended = W::is_last(&event);
        Poll::Ready(Some(event))
    }
}

impl<W: Workload> Drop for RequestStream<W> {
    fn drop(&mut self) {
        if !self.ended {
            let _ = self.handle.state.tell(Command::Cancel(self.key));
        }
    }
}

#[cfg(test)]
mod tests;
