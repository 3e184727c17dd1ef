//! The thread that runs a runner and its scheduler, and the handle through which the rest of a program uses
//! it.
//!
//! Nothing here depends on an async runtime: an [`EngineHandle`] never blocks, and a [`RequestStream`] is a plain
//! [`Stream`]. Every request ends in exactly one last event: if the engine's thread is gone, the stream
//! reports an error.

mod worker;

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use futures::channel::{mpsc as async_mpsc, oneshot};
use futures::{Stream, StreamExt};

use self::worker::{Command, STOPPED, Shared, Work, dead};
use crate::request::{Event, Request, RequestError, TokenScore};
use crate::runner::{Local, Runner};
use crate::scheduler::{Load, RequestKey, RequestStatus, Scheduler, SchedulerConfig};
use crate::{Stage, StageInfo, Vocabulary};

/// A running engine: one thread with a scheduler and a runner. Dropping it stops the thread; requests then
/// fail.
pub struct Engine {
    handle: EngineHandle,
    thread: Option<JoinHandle<()>>,
}

/// Submits requests to an [`Engine`] and reads its load, from any thread or task.
#[derive(Clone)]
pub struct EngineHandle {
    shared: Arc<Shared>,
}

/// Makes an engine poll its runner.
#[derive(Clone)]
pub struct Waker(Arc<Shared>);

/// The events of one request. Dropping it cancels the request.
pub struct RequestStream {
    key: RequestKey,
    events: async_mpsc::UnboundedReceiver<Event>,
    handle: EngineHandle,
    ended: bool,
}

/// Errors of starting an engine.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The stage holds only some layers.
    #[error("the stage holds layers {start}..{end} of {layers}; an engine needs all of them")]
    PartialModel {
        /// Index of the first layer held.
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

    /// As [`start`](Self::start), with the runner that `make` returns. It receives the waker of the engine's
    /// thread.
    pub fn start_runner(
        name: &str,
        vocabulary: Arc<dyn Vocabulary>,
        config: SchedulerConfig,
        make: impl FnOnce(Waker) -> Box<dyn Runner>,
    ) -> Result<Self, StartError> {
        let shared = Arc::new(Shared::new());
        let runner = make(Waker(Arc::clone(&shared)));
        let info = runner.info().clone();
        check(&info, &*vocabulary)?;
        let scheduler = Scheduler::new(&info, vocabulary, config);
        shared.start(info, runner, scheduler);
        let works = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name(format!("engine {name}"))
            .spawn(move || works.work())
            .map_err(|error| StartError::Thread(error.to_string()))?;
        Ok(Engine {
            handle: EngineHandle { shared },
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
        let _ = self.handle.shared.tell(Command::Stop);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl EngineHandle {
    /// Submits a request; a refusal is its first and last event.
    pub fn submit(&self, request: Request) -> RequestStream {
        self.send_work(Work::Generate(Box::new(request)))
    }

    /// Scores each token of `tokens` but the first, given the tokens before it.
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

    /// Work in progress and measured speed, as of the engine's last step.
    pub fn load(&self) -> Load {
        self.shared.load()
    }

    /// Time since the engine last completed a step while it had work; zero while it is idle. A hanging step
    /// shows here even if the rest of the process runs.
    pub fn quiet(&self) -> Duration {
        self.shared.quiet(Instant::now())
    }

    /// Shape and limits of the stage.
    pub fn info(&self) -> &StageInfo {
        self.shared.info()
    }

    /// Refuses new requests from now on; resolves when all queued and running requests have ended.
    pub async fn drain(&self) {
        let (done, drained) = oneshot::channel();
        if self.shared.tell(Command::Drain(done)) {
            // An engine that dies has drained, too.
            let _ = drained.await;
        }
    }

    /// The error that ended the engine's thread; `None` while it runs.
    pub fn death(&self) -> Option<RequestError> {
        self.shared.death()
    }

    fn send_work(&self, work: Work) -> RequestStream {
        let key = self.shared.next_key();
        let (sender, events) = async_mpsc::unbounded();
        // If the thread is gone, the sender is dropped with the command, and the stream says why.
        let _ = self.shared.tell(Command::Submit(key, work, sender));
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
    /// Wakes the engine's thread so that it polls its runner.
    pub fn wake(&self) {
        // A thread that is gone needs no waking.
        let _ = self.0.tell(Command::Wake);
    }

    /// Polls the runner in the calling thread if it is free and no command waits, else [`wake`](Self::wake)s
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

impl RequestStream {
    /// The state of the request as of the engine's last steps; `None` before the engine has looked at it.
    pub fn status(&self) -> Option<RequestStatus> {
        self.handle.shared.status(self.key)
    }

    /// [`EngineHandle::quiet`] of its engine.
    pub fn quiet(&self) -> Duration {
        self.handle.quiet()
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
            let _ = self.handle.shared.tell(Command::Cancel(self.key));
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

#[cfg(test)]
mod tests;
