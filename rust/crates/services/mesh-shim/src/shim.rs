//! Starting a shim, whose loop has a thread of its own, and the handle of a running one.

use std::{
    io,
    net::SocketAddr,
    os::fd::AsFd,
    sync::Arc,
    thread::{self, JoinHandle},
};

use mesh_base::datagrams;

use crate::{
    config::{Config, Unsound},
    control::{DRAINING, LoopControl, STOPPED},
    event_loop::{EventLoop, bind},
    resolve::{HeadAddresses, Resolver},
    stats::Stats,
};

pub use crate::event_loop::BEAT_INTERVAL;

/// A shim is started with [`Shim::spawn`].
#[derive(Debug)]
pub struct Shim;

/// A running shim. Dropping it stops the shim at once.
#[derive(Debug)]
pub struct ShimHandle {
    address: SocketAddr,
    stats: Arc<Stats>,
    control: Arc<LoopControl>,
    _resolver: Option<Resolver>,
    thread: Option<JoinHandle<()>>,
}

/// Reasons for which a shim does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The configuration is not valid.
    #[error(transparent)]
    Config(#[from] Unsound),
    /// The port for clients.
    #[error(
        "cannot listen on {address}/udp: {source}; is another shim running, or the port reserved?"
    )]
    Listen {
        /// Address of the port.
        address: SocketAddr,
        /// Error of the system.
        source: io::Error,
    },
    /// A thread or a pipe.
    #[error("cannot start the loop of the shim: {0}")]
    System(#[from] io::Error),
}

impl Shim {
    /// Starts a shim; its thread runs until the handle says otherwise.
    ///
    /// # Errors
    /// [`StartError`] if the configuration is not sound or the port is taken. A head that cannot be reached,
    /// or whose name is not known yet, is no error: it may come later.
    pub fn spawn(config: Config) -> Result<ShimHandle, StartError> {
        Self::spawn_with(config, || ())
    }

    /// Like [`Shim::spawn`]; `beat` is called at least every [`BEAT_INTERVAL`] by the loop, and proves that
    /// it turns.
    ///
    /// # Errors
    /// As [`Shim::spawn`].
    pub fn spawn_with(
        config: Config,
        beat: impl FnMut() + Send + 'static,
    ) -> Result<ShimHandle, StartError> {
        config.check()?;
        let listening = config.listen;
        let ingress = bind(listening).map_err(|source| StartError::Listen {
            address: listening,
            source,
        })?;
        let address = ingress.local_addr()?;
        if address.ip().is_unspecified()
            && let Err(error) = datagrams::tell_destinations(ingress.as_fd(), address.is_ipv6())
        {
            tracing::debug!(%error, "answers leave from the preferred address");
        }
        let (control, wake) = LoopControl::new()?;
        let control = Arc::new(control);
        let addresses = Arc::new(HeadAddresses::new(&config.heads));
        let stats = Arc::new(Stats::default());
        let mut event_loop = EventLoop::new(
            config,
            (ingress, wake),
            Arc::clone(&addresses),
            Arc::clone(&stats),
            Arc::clone(&control),
            beat,
        );
        let woken = Arc::clone(&control);
        let resolver = Resolver::start(addresses, move || woken.wake())?;
        let thread = thread::Builder::new().name("shim".into());
        let thread = thread.spawn(move || event_loop.run())?;
        Ok(ShimHandle {
            address,
            stats,
            control,
            _resolver: resolver,
            thread: Some(thread),
        })
    }
}

impl ShimHandle {
    /// Address to which clients send their datagrams.
    #[must_use]
    pub fn addr(&self) -> SocketAddr {
        self.address
    }

    /// Counters of the shim, updated while it runs.
    #[must_use]
    pub fn stats(&self) -> &Arc<Stats> {
        &self.stats
    }

    /// Returns true while the loop runs.
    #[must_use]
    pub fn is_running(&self) -> bool {
        let thread = self.thread.as_ref();
        thread.is_some_and(|thread| !thread.is_finished())
    }

    /// The handle that applies a new configuration while the shim runs.
    #[must_use]
    pub fn live(&self) -> Live {
        Live(Arc::clone(&self.control))
    }

    /// Takes no new task from now on, and ends when those under way are answered, or when `drain_limit` is
    /// over: then their clients get an Error. Returns at once; see [`ShimHandle::join`].
    pub fn drain(&self) {
        self.control.enter(DRAINING);
    }

    /// Waits for the loop to end.
    ///
    /// # Errors
    /// If the loop panicked.
    pub fn join(mut self) -> thread::Result<()> {
        self.thread.take().map_or(Ok(()), JoinHandle::join)
    }

    /// Ends at once; tasks under way get no answer.
    pub fn stop(self) {}
}

impl Drop for ShimHandle {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.control.enter(STOPPED);
            if thread.join().is_err() {
                tracing::error!("the loop of the shim panicked");
            }
        }
    }
}

/// The settings that a running shim can change without a restart.
#[derive(Clone, Debug)]
pub struct Live(Arc<LoopControl>);

impl Live {
    /// Puts the keys [`Bridge::LIVE_KEYS`](crate::bridge::Bridge::LIVE_KEYS) of `fresh` into effect, with the loop's next turn.
    pub fn reload(&self, fresh: Config) {
        *self.0.fresh() = Some(fresh);
        self.0.wake();
    }
}
