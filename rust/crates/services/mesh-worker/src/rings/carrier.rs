//! The one thread that carries messages between workers.
//!
//! A message passes several tasks: the socket's, its connection's, its stream's. On a runtime with more
//! threads each of them may wake another thread, and a ring waits for every one of those wakings, token by
//! token. On this thread they follow each other, and so does the step itself where it is short.

use std::io;

use tokio::runtime::{Builder, Handle};

/// Starts the thread. It lives as long as the process, as its sockets do.
pub(super) fn start() -> io::Result<Handle> {
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let handle = runtime.handle().clone();
    std::thread::Builder::new()
        .name("rings".to_owned())
        .spawn(move || runtime.block_on(std::future::pending::<()>()))?;
    Ok(handle)
}
