//! A thread that computes masks while the engine computes a step.

use std::sync::OnceLock;
use std::sync::mpsc::{Receiver, Sender, channel};

type Work = Box<dyn FnOnce() + Send>;

/// A thread for work that is wanted soon. It starts with the first work and ends with this.
#[derive(Debug, Default)]
pub(crate) struct Ahead {
    queue: OnceLock<Sender<Work>>,
}

impl Ahead {
    /// Runs `work` on the thread; its result comes from the channel. Without a thread it runs here.
    pub(crate) fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Receiver<T> {
        let (result, receiver) = channel();
        let work: Work = Box::new(move || {
            // Nobody waits for it if its answer was cancelled.
            let _ = result.send(work());
        });
        let sent = self.queue.get_or_init(start).send(work);
        if let Err(unsent) = sent {
            (unsent.0)();
        }
        receiver
    }
}

/// The queue of a new thread, or one that takes nothing.
fn start() -> Sender<Work> {
    let (queue, works) = channel::<Work>();
    let thread = std::thread::Builder::new().name("grammar".to_owned());
    let thread = thread.spawn(move || works.into_iter().for_each(|work| work()));
    if let Err(error) = thread {
        tracing::warn!(%error, "no thread for grammars: they are followed on the engine's");
    }
    queue
}
