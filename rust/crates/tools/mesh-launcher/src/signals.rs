//! Reaction of a program that started services to SIGINT and SIGTERM.

use std::future::Future;

use anyhow::{Context, Result};
use nix::sys::signal::Signal;
use tokio::signal::unix::{SignalKind, signal};

/// Runs `work` to its end. If SIGINT or SIGTERM comes first, drops `work`, which kills the services and removes the network
/// namespaces that it holds, and ends this process with exit code 130 or 143.
///
/// A signal is noticed when `work` waits for something. Code that blocks its thread for long belongs in
/// [`tokio::task::spawn_blocking`].
///
/// # Errors
/// Those of `work`, and if signals cannot be caught.
pub fn until_signal<T>(work: impl Future<Output = Result<T>>) -> impl Future<Output = Result<T>> {
    // A program's whole work is a large future.
    let work = Box::pin(work);
    async move {
        let caught = |kind| signal(kind).context("catching a signal");
        let mut interrupt = caught(SignalKind::interrupt())?;
        let mut terminate = caught(SignalKind::terminate())?;
        // The branches that lose are dropped before the code of the one that wins runs.
        let signal = tokio::select! {
            done = work => return done,
            _ = interrupt.recv() => Signal::SIGINT,
            _ = terminate.recv() => Signal::SIGTERM,
        };
        eprintln!("{signal}: services are stopped");
        std::process::exit(128 + signal as i32);
    }
}
