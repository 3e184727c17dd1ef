//! Failures of attempts and errors of requests.

use std::time::Duration;

use dcf::ErrorCode;

use crate::memory::TooMuch;
use crate::placement::Refusal;

/// Party to blame for the last failure of an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Fault {
    /// Unknown: a link broke.
    #[default]
    Unknown,
    /// The worker's, if another one can answer the request.
    Perhaps,
    /// The worker's: it was silent.
    Silence,
    /// The worker's: it sent data that no request asks for.
    Worker,
}

/// Reasons for which there is no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AnswerError {
    /// No worker took it.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The worker says that the request itself cannot be answered.
    #[error("{text}")]
    Rejected {
        /// Code of the worker's Error.
        code: ErrorCode,
        /// Text of the worker's Error.
        text: String,
    },
    /// The operator's limit on whole answers.
    #[error("no complete answer within {} s; ask for fewer tokens, or raise answer_limit", .0.as_secs_f64())]
    Timeout(Duration),
    /// The worker that has it shows no life.
    #[error(
        "the worker gave neither a token nor a sign of life for {} s (request_timeout); ask again, or raise request_timeout if the \
         worker is that slow",
        .0.as_secs_f64()
    )]
    Stalled(Duration),
    /// No worker had room for it.
    #[error(
        "no worker had room for this request within {} s (queue_timeout); ask again later, or add workers",
        .0.as_secs_f64()
    )]
    QueueTimeout(Duration),
    /// It failed too often.
    #[error(
        "{attempts} attempts at this request failed on {workers} {}, the last one with: {last}",
        if *workers == 1 { "worker" } else { "workers" }
    )]
    WorkersFailed {
        /// Number of attempts.
        attempts: u32,
        /// Different workers that they were made on.
        workers: usize,
        /// Message of the last failure.
        last: String,
    },
    /// Too many workers died while they had the request.
    #[error(
        "{deaths} workers died while they had this request{}, so it is not tried again; change it, or ask again if they died of \
         something else: {last}",
        if *silent { " and had not begun to answer it" } else { "" }
    )]
    WorkersDied {
        /// Number of workers that died.
        deaths: u32,
        /// True if they died before the first token.
        silent: bool,
        /// The last death, as the head saw it.
        last: String,
    },
    /// Its answer would take more memory than there is.
    #[error(transparent)]
    TooMuch(#[from] TooMuch),
    /// The head is shutting down.
    #[error("this head is shutting down; ask again in a moment, or ask another head")]
    ShuttingDown,
}

impl AnswerError {
    /// The request itself cannot be answered.
    pub fn invalid(text: String) -> Self {
        let code = ErrorCode::INVALID_PAYLOAD;
        Self::Rejected { code, text }
    }
}

/// Failure of an attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    /// The stream broke.
    Lost(String),
    /// The worker's process is gone, or its machine.
    Died(String),
    /// The worker sent invalid data.
    Nonsense(String),
    /// The worker answered with an Error.
    Error {
        /// Code of its Error.
        code: ErrorCode,
        /// Text of its Error.
        text: String,
    },
}
