//! Parts that both kinds of requests share: the remaining time, and the outcome for the metrics.

use std::time::Instant;

use mesh_control::placement::Refusal;
use mesh_control::request::{AnswerError, Lifecycle};

use crate::metrics::Outcome;

/// Milliseconds that a worker may spend; 0 is without limit.
pub(crate) fn deadline_ms(answer: &Lifecycle) -> u64 {
    let Some(last) = answer.last_moment() else {
        return 0;
    };
    let left = last.saturating_duration_since(Instant::now());
    u64::try_from(left.as_millis()).unwrap_or(u64::MAX).max(1)
}

/// Outcome, for the metrics, of a request that ends with this error.
pub(crate) fn outcome_of(error: &AnswerError) -> Outcome {
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
