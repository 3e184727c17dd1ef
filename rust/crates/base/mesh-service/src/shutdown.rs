//! The effects of a process's signals.
//!
//! | signal | effect |
//! |---|---|
//! | SIGTERM, SIGINT, SIGQUIT, SIGPWR, SIGXCPU | a drain with a limit; the second one exits at once |
//! | SIGHUP | asks for a reload, also when the terminal hangs up that the service was started in |
//! | SIGUSR1, SIGUSR2, SIGALRM, SIGVTALRM, SIGPROF, SIGIO, SIGXFSZ | nothing, but a line in the log |
//! | SIGPIPE | nothing: a write to a closed pipe is an error of that write |
//!
//! No signal that can be caught ends a service without a drain, but those of a crash (SIGSEGV, SIGABRT and their like).
//! Handlers, unlike ignored signals, are not inherited by the programs that a service starts.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::Signal;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

/// Tells every task of a service to drain, and waits for them no longer than a limit.
#[derive(Clone, Debug)]
pub struct Shutdown {
    draining: CancellationToken,
    limit: Duration,
    reload: Arc<Notify>,
}

/// Outcome of a drain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drained {
    /// All running work finished.
    Finished,
    /// The limit passed before all work had finished.
    TimedOut,
}

impl Shutdown {
    /// A shutdown that only [`begin`](Self::begin) begins.
    pub fn manual(limit: Duration) -> Self {
        Self {
            draining: CancellationToken::new(),
            limit,
            reload: Arc::default(),
        }
    }

    /// A shutdown that signals begin; see the table above. The second one exits the process with 128 + its number. To be
    /// called on a tokio runtime and early: until then a signal has its usual effect.
    pub fn on_signals(limit: Duration) -> std::io::Result<Self> {
        let shutdown = Self::manual(limit);
        for kind in ENDING {
            let shutdown = shutdown.clone();
            on_signal(kind, move || shutdown.end(kind))?;
        }
        let reload = shutdown.reload.clone();
        on_signal(Signal::SIGHUP, move || reload.notify_one())?;
        for kind in WITHOUT_EFFECT {
            on_signal(kind, move || {
                tracing::info!(signal = %kind, "this signal has no effect here; SIGHUP reloads, SIGTERM drains");
            })?;
        }
        Ok(shutdown)
    }

    /// The first signal drains, the second exits.
    fn end(&self, kind: Signal) {
        if self.draining.is_cancelled() {
            tracing::warn!(signal = %kind, "second signal: exiting without waiting");
            std::process::exit(128 + kind as i32);
        }
        let limit_seconds = self.limit.as_secs_f64();
        tracing::info!(signal = %kind, limit_seconds, "signal received: draining");
        crate::notify::stopping(self.limit);
        self.draining.cancel();
    }

    /// Resolves when a SIGHUP came since the last call, or [`ask_reload`](Self::ask_reload) was called; several at once count
    /// as one. For one task at a time.
    pub async fn reload_asked(&self) {
        self.reload.notified().await;
    }

    /// Asks for a reload, as SIGHUP does.
    pub fn ask_reload(&self) {
        self.reload.notify_one();
    }

    /// Begins the drain; later calls have no effect.
    pub fn begin(&self) {
        self.draining.cancel();
    }

    /// True once the drain has begun.
    pub fn is_draining(&self) -> bool {
        self.draining.is_cancelled()
    }

    /// Resolves when the drain begins; callers then stop accepting work.
    pub async fn draining(&self) {
        self.draining.cancelled().await;
    }

    /// The token behind [`draining`](Self::draining), to hand to tasks.
    pub fn token(&self) -> CancellationToken {
        self.draining.clone()
    }

    /// Maximum duration of a drain.
    pub fn limit(&self) -> Duration {
        self.limit
    }

    /// Once the drain has begun, waits for `running` to finish, at most for the limit.
    pub async fn drain(&self, running: impl Future) -> Drained {
        self.draining().await;
        match tokio::time::timeout(self.limit, running).await {
            Ok(_) => Drained::Finished,
            Err(_) => Drained::TimedOut,
        }
    }
}

fn on_signal(kind: Signal, act: impl Fn() + Send + 'static) -> std::io::Result<()> {
    let mut received = signal(SignalKind::from_raw(kind as i32))?;
    tokio::spawn(async move {
        while received.recv().await.is_some() {
            act();
        }
    });
    Ok(())
}

/// Signals that end a service. SIGQUIT is Ctrl-\\ in a terminal, SIGPWR a machine that loses its power,
/// SIGXCPU a limit on processor time, whose hard limit kills.
const ENDING: [Signal; 5] = [
    Signal::SIGTERM,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGPWR,
    Signal::SIGXCPU,
];
/// Signals whose default action kills the process, caught so that they do not. With SIGXFSZ caught, a write
/// beyond the file size limit fails with an error.
const WITHOUT_EFFECT: [Signal; 7] = [
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGALRM,
    Signal::SIGVTALRM,
    Signal::SIGPROF,
    Signal::SIGIO,
    Signal::SIGXFSZ,
];

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_drain_waits_for_work_up_to_its_limit() {
        let shutdown = Shutdown::manual(Duration::from_millis(200));
        assert!(!shutdown.is_draining());
        shutdown.begin();
        assert!(shutdown.is_draining());
        assert_eq!(
            shutdown
                .drain(tokio::time::sleep(Duration::from_millis(5)))
                .await,
            Drained::Finished
        );
        assert_eq!(
            shutdown.drain(std::future::pending::<()>()).await,
            Drained::TimedOut
        );
    }

    // One test for all of them: signals are the process's, and tests share it.
    #[tokio::test]
    async fn signals_without_effect_change_nothing_hangups_reload_and_sigterm_drains() {
        let shutdown = Shutdown::on_signals(Duration::from_secs(1)).expect("signal handlers");
        let raise = |kind| nix::sys::signal::raise(kind).expect("raise");
        for kind in WITHOUT_EFFECT {
            raise(kind);
        }
        for _ in 0..3 {
            raise(Signal::SIGHUP);
        }
        let patience = Duration::from_secs(10);
        tokio::time::timeout(patience, shutdown.reload_asked())
            .await
            .expect("a reload is asked for");
        assert!(!shutdown.is_draining());
        raise(Signal::SIGTERM);
        tokio::time::timeout(patience, shutdown.draining())
            .await
            .expect("drain must begin");
    }
}
