//! Parts that all kinds of requests share: the remaining time, and the outcome for the metrics.

use std::time::Instant;

use mesh_control::fair::Origin;
use mesh_control::placement::Refusal;
use mesh_control::request::{AnswerError, Lifecycle};
use tracing::warn;

use crate::audit::{EndedRequest, Holder};
use crate::mesh::Mesh;
use crate::metrics::{Front, Outcome};

/// Counts a request however it ends, also if the client goes away.
pub(super) struct Account<'a> {
    mesh: &'a Mesh,
    front: Front,
    id: String,
    task: &'static str,
    origin: Origin,
    holder: Option<Holder>,
    /// Name of the model, as far as it is known.
    pub(super) model: String,
    pub(super) started: Instant,
    pub(super) outcome: Outcome,
}

impl<'a> Account<'a> {
    /// An account of the request with this id for a `task`, which came from `origin` with a holder's key or token.
    pub(super) fn new(
        mesh: &'a Mesh,
        front: Front,
        (task, id): (&'static str, &str),
        (origin, holder): (Origin, Option<Holder>),
        model: Option<&String>,
    ) -> Self {
        Self {
            mesh,
            front,
            id: id.to_owned(),
            task,
            origin,
            holder,
            model: model.cloned().unwrap_or_default(),
            started: Instant::now(),
            outcome: Outcome::Cancelled,
        }
    }

    /// Notes how the request ended. A failure of the mesh is logged as the lack of what was `wanted`.
    pub(super) fn settle<T>(&mut self, id: &str, result: &Result<T, AnswerError>, wanted: &str) {
        let ended = result.as_ref();
        self.outcome = ended.map_or_else(outcome_of, |_| Outcome::Complete);
        if let Err(error) = result
            && matches!(self.outcome, Outcome::Failed | Outcome::Timeout)
        {
            warn!(request = id, %error, "no {wanted}");
        }
    }
}

impl Drop for Account<'_> {
    fn drop(&mut self) {
        let took = self.started.elapsed();
        let metrics = &self.mesh.metrics;
        metrics.request_ended(self.front, self.outcome, took.as_secs_f64());
        self.mesh.audit.request(&EndedRequest {
            id: &self.id,
            front: self.front,
            task: self.task,
            model: &self.model,
            origin: self.origin,
            holder: self.holder.as_ref(),
            outcome: self.outcome,
            took,
        });
    }
}

/// Milliseconds that a worker may spend; 0 is without limit.
pub(super) fn deadline_ms(answer: &Lifecycle) -> u64 {
    let Some(last) = answer.last_moment() else {
        return 0;
    };
    let left = last.saturating_duration_since(Instant::now());
    u64::try_from(left.as_millis()).unwrap_or(u64::MAX).max(1)
}

/// Outcome, for the metrics, of a request that ends with this error.
fn outcome_of(error: &AnswerError) -> Outcome {
    match error {
        AnswerError::Refused(Refusal::UnknownModel { .. } | Refusal::TooLong { .. })
        | AnswerError::Rejected { .. } => Outcome::Rejected,
        AnswerError::Refused(_) | AnswerError::TooMuch(_) | AnswerError::ShuttingDown => {
            Outcome::Refused
        }
        AnswerError::Timeout(_) | AnswerError::Stalled(_) | AnswerError::QueueTimeout(_) => {
            Outcome::Timeout
        }
        AnswerError::WorkersFailed { .. } | AnswerError::WorkersDied { .. } => Outcome::Failed,
    }
}
