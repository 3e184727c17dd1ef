//! SIGTERM and SIGINT: first a drain with a limit, then, at a second signal, the exit.

use std::future::Future;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Tells every task of a service to drain, and waits for them no longer than a limit.
#[derive(Clone, Debug)]
pub struct Shutdown {
    draining: CancellationToken,
    limit: Duration,
}

/// How a drain ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drained {
    /// Everything that ran has finished.
    Finished,
    /// The limit passed first.
    TimedOut,
}

impl Shutdown {
    /// A shutdown that only [`begin`](Self::begin) begins.
    pub fn manual(limit: Duration) -> Self {
        Self {
            draining: CancellationToken::new(),
            limit,
        }
    }

    /// A shutdown that the first SIGTERM or SIGINT begins; the second one exits the process with 128 + its number.
    /// Must be called on a tokio runtime.
    pub fn on_signals(limit: Duration) -> std::io::Result<Self> {
        let shutdown = Self::manual(limit);
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let draining = shutdown.draining.clone();
        tokio::spawn(async move {
            loop {
                let kind = tokio::select! {
                    _ = terminate.recv() => SignalKind::terminate(),
                    _ = interrupt.recv() => SignalKind::interrupt(),
                };
                if draining.is_cancelled() {
                    tracing::warn!("second signal: exiting without waiting");
                    std::process::exit(128 + kind.as_raw_value());
                }
                tracing::info!(
                    limit_seconds = limit.as_secs_f64(),
                    "signal received: draining"
                );
                crate::notify::stopping(limit);
                draining.cancel();
            }
        });
        Ok(shutdown)
    }

    /// Begins the drain.
    pub fn begin(&self) {
        self.draining.cancel();
    }

    /// Whether the drain has begun.
    pub fn is_draining(&self) -> bool {
        self.draining.is_cancelled()
    }

    /// Resolves when the drain begins: stop taking new work then.
    pub async fn draining(&self) {
        self.draining.cancelled().await;
    }

    /// The token behind [`draining`](Self::draining), to hand to tasks.
    pub fn token(&self) -> CancellationToken {
        self.draining.clone()
    }

    /// How long a drain may take.
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

    #[tokio::test]
    async fn sigterm_begins_the_drain() {
        let shutdown = Shutdown::on_signals(Duration::from_secs(1)).expect("signal handlers");
        nix::sys::signal::raise(nix::sys::signal::Signal::SIGTERM).expect("raise");
        tokio::time::timeout(Duration::from_secs(5), shutdown.draining())
            .await
            .expect("drain must begin");
    }
}
