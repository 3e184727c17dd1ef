//! Signs of life of a request: the cause of its wait, sent to a head that asks for it, while no other message
//! is sent.
//!
//! The timer only decides when to look. The cause comes from the engine, together with the time since the
//! engine last completed a step, so that an engine that hangs shows as such.

use std::pin::Pin;
use std::time::{Duration, Instant};

use dcf::{Message, MsgType};
use mesh_engine::{RequestStatus, RequestStream, Workload};
use mesh_net::quic::timestamp_us;
use mesh_proto::{Progress, RequestPhase};
use prost::Message as _;
use tokio::time::{Sleep, sleep};

/// The next sign of life on one stream.
pub(crate) struct Life {
    /// `None` if the head does not want any.
    every: Option<Duration>,
    /// Time at which something must have been sent.
    due: Instant,
    sleep: Pin<Box<Sleep>>,
}

impl Life {
    /// For a request that asks for a sign every `progress_ms` milliseconds; 0 means never. The first one
    /// comes early, so that the head knows that it will hear of this request.
    pub(crate) fn new(progress_ms: u32) -> Self {
        let every = Duration::from_millis(u64::from(progress_ms)).clamp(SHORTEST, LONGEST);
        let first = every.min(FIRST);
        Life {
            every: (progress_ms > 0).then_some(every),
            due: Instant::now() + first,
            sleep: Box::pin(sleep(first)),
        }
    }

    /// Something else was sent, which is a sign of life as well.
    pub(crate) fn sent(&mut self) {
        if let Some(every) = self.every {
            self.due = Instant::now() + every;
        }
    }

    /// Resolves when nothing was sent for as long as the head asked for.
    pub(crate) async fn due(&mut self) {
        let Some(every) = self.every else {
            return std::future::pending().await;
        };
        loop {
            self.sleep.as_mut().await;
            let now = Instant::now();
            let is_due = self.due <= now;
            if is_due {
                self.due = now + every;
            }
            // Moved only when it has fired: tokens come far more often.
            self.sleep.as_mut().reset(self.due.into());
            if is_due {
                return;
            }
        }
    }
}

/// A request whose prompt is being written and tokenised, on which nothing has happened since `since`.
pub(crate) fn preparing(since: Option<Instant>) -> Progress {
    let quiet = since.map_or(Duration::ZERO, |since| since.elapsed());
    progress(RequestPhase::Preparing, quiet)
}

/// A request that its engine has. `begun` is whether its first token was sent.
pub(crate) fn of_stream<W: Workload>(stream: &RequestStream<W>, begun: bool) -> Progress {
    let quiet = stream.quiet();
    match stream.status() {
        Some(RequestStatus::Queued { ahead } | RequestStatus::Preempted { ahead }) => Progress {
            position: ahead,
            ..progress(RequestPhase::Queued, quiet)
        },
        Some(RequestStatus::Prefilling { done, total }) => Progress {
            prompt_tokens: total,
            prompt_done: done,
            ..progress(RequestPhase::Prefilling, quiet)
        },
        Some(RequestStatus::Decoding) => progress(RequestPhase::Decoding, quiet),
        None if begun => progress(RequestPhase::Decoding, quiet),
        // The engine is in the middle of a step and has not looked at it yet.
        None => progress(RequestPhase::Preparing, quiet),
    }
}

/// The message that says so.
pub(crate) fn message(sequence: u32, progress: Progress) -> Message {
    let body = progress.encode_to_vec();
    Message::new(MsgType::PROGRESS, sequence, timestamp_us(), body)
}

fn progress(phase: RequestPhase, quiet: Duration) -> Progress {
    Progress {
        phase: phase.into(),
        quiet_ms: u64::try_from(quiet.as_millis()).unwrap_or(u64::MAX),
        ..Progress::default()
    }
}

const SHORTEST: Duration = Duration::from_millis(50);
const LONGEST: Duration = Duration::from_secs(60);
const FIRST: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn signs_are_due_only_where_they_are_wanted_and_nothing_else_is_said() {
        let due = |life: &mut Life| {
            let waited = tokio::time::Instant::now();
            let mut life = std::mem::replace(life, Life::new(0));
            async move {
                let limit = Duration::from_millis(600);
                let came = tokio::time::timeout(limit, life.due()).await.is_ok();
                came.then(|| waited.elapsed())
            }
        };
        assert_eq!(due(&mut Life::new(0)).await, None);
        assert!(due(&mut Life::new(1000)).await.is_some(), "an early sign");
        let mut busy = Life::new(60_000);
        busy.sent();
        assert_eq!(due(&mut busy).await, None);
    }
}
