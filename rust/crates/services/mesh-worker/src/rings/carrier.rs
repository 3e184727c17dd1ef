//! The one thread that carries messages between workers.
//!
//! A message passes several tasks: the socket's, its connection's, its stream's. On a runtime with more
//! threads each of them may wake another thread, and a ring waits for every one of those wakings, token by
//! token. On this thread they follow each other, and so does the step itself where it is short.

use std::future::Future;
use std::io;

use tokio::runtime::{Builder, EnterGuard, Handle};

/// Runs tasks on that thread.
#[derive(Clone)]
pub(super) struct Carrier(Handle);

impl Carrier {
    /// Starts the thread. It lives as long as the process, as its sockets do.
    pub(super) fn start() -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        std::thread::Builder::new()
            .name("rings".to_owned())
            .spawn(move || runtime.block_on(std::future::pending::<()>()))?;
        Ok(Carrier(handle))
    }

    /// Runs a task there.
    pub(super) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.0.spawn(task);
    }

    /// Makes sockets that are opened until the guard is dropped belong to that thread.
    pub(super) fn enter(&self) -> EnterGuard<'_> {
        self.0.enter()
    }
}
