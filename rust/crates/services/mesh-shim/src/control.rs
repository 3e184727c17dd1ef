//! What other threads ask of the loop.

use std::{
    io::{self, Write},
    os::unix::net::UnixStream,
    sync::{
        Mutex, MutexGuard,
        atomic::{AtomicU8, Ordering},
    },
};

use mesh_base::sync::lock;

use crate::config::Config;

/// Controls of the loop for other threads.
#[derive(Debug)]
pub(crate) struct LoopControl {
    phase: AtomicU8,
    /// The next configuration for the loop.
    fresh: Mutex<Option<Config>>,
    waker: UnixStream,
}

impl LoopControl {
    /// The control, and the end of a pipe that becomes readable when the loop has something to look at.
    pub(crate) fn new() -> io::Result<(Self, UnixStream)> {
        let (waker, wake) = UnixStream::pair()?;
        waker.set_nonblocking(true)?;
        wake.set_nonblocking(true)?;
        let control = Self {
            phase: AtomicU8::new(RUNNING),
            fresh: Mutex::new(None),
            waker,
        };
        Ok((control, wake))
    }

    pub(crate) fn phase(&self) -> u8 {
        self.phase.load(Ordering::SeqCst)
    }

    pub(crate) fn enter(&self, phase: u8) {
        self.phase.fetch_max(phase, Ordering::SeqCst);
        self.wake();
    }

    pub(crate) fn fresh(&self) -> MutexGuard<'_, Option<Config>> {
        lock(&self.fresh)
    }

    pub(crate) fn wake(&self) {
        // A full pipe means that the loop has been woken already.
        let _ = (&self.waker).write(&[0]);
    }
}

pub(crate) const RUNNING: u8 = 0;
pub(crate) const DRAINING: u8 = 1;
pub(crate) const STOPPED: u8 = 2;
