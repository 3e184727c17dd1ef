//! Handles failed attempts: rerun, refusal or end of the answer.

use std::collections::BTreeSet;

use dcf::ErrorCode;

use super::error::{AnswerError, Failure, Fault};
use super::{Lifecycle, Phase, Rejection, Step};
use crate::placement::AttemptEnd;
use crate::registry::WorkerId;

impl Lifecycle {
    pub(super) fn silent_deaths(&self) -> usize {
        self.deaths.iter().filter(|(_, silent)| *silent).count()
    }

    /// Handles the failure of this attempt.
    pub fn failed(&mut self, attempt: u32, failure: Failure) -> Step {
        let Some(worker) = self.worker_of(attempt) else {
            return Step::Wait;
        };
        let (code, text) = match failure {
            Failure::Lost(text) => return self.retry(worker, Fault::Unknown, text),
            Failure::Died(text) => return self.died(worker, text),
            Failure::Nonsense(text) => return self.blame(worker, text),
            Failure::Error { code, text } => (code, readable(&text)),
        };
        match code {
            // A request that is at fault is so from the beginning.
            ErrorCode::INVALID_PAYLOAD | ErrorCode::CONTEXT_TOO_LONG if self.came_from_it() => {
                let text = format!("{code} in the middle of its answer: {text}");
                self.blame(worker, text)
            }
            ErrorCode::INVALID_PAYLOAD | ErrorCode::CONTEXT_TOO_LONG => {
                self.rejects(worker, code, text)
            }
            ErrorCode::WORKER_BUSY | ErrorCode::DRAINING => {
                // Not a failure, and the worker's own pause keeps this from turning quickly; the limit on
                // waiting ends it.
                self.phase = Phase::Placing;
                Step::Again(AttemptEnd::Busy)
            }
            _ => self.retry(worker, Fault::Perhaps, format!("{code}: {text}")),
        }
    }

    /// A worker died. Perhaps of this request: then it must not go on to kill one after the other.
    pub(super) fn died(&mut self, worker: WorkerId, text: String) -> Step {
        self.deaths.push((worker, !self.answered));
        let (deaths, silent) = (self.deaths.len(), self.silent_deaths());
        if silent < MOST_SILENT_DEATHS && deaths < MOST_DEATHS {
            return self.retry(worker, Fault::Unknown, text);
        }
        self.failures += 1;
        let error = AnswerError::WorkersDied {
            deaths: u32::try_from(deaths).unwrap_or(u32::MAX),
            silent: silent == deaths,
            last: text,
        };
        self.fail(error, AttemptEnd::Failed)
    }

    /// The request itself is at fault, as this worker says. If another one can be asked, it decides.
    pub(super) fn rejects(&mut self, worker: WorkerId, code: ErrorCode, text: String) -> Step {
        match self.rejected.take() {
            Some(first) if first.worker != worker => {
                let (code, text) = (first.code, first.text);
                self.fail(AnswerError::Rejected { code, text }, AttemptEnd::Cancelled)
            }
            None if self.second_opinion => {
                self.rejected = Some(Rejection { worker, code, text });
                self.phase = Phase::Placing;
                Step::Again(AttemptEnd::Cancelled)
            }
            _ => self.fail(AnswerError::Rejected { code, text }, AttemptEnd::Cancelled),
        }
    }

    /// Returns true if the worker of this attempt sent a token.
    pub(super) fn came_from_it(&self) -> bool {
        matches!(self.phase, Phase::Running { decoding: true, .. })
    }

    /// The attempt failed, and that is the worker's fault.
    pub(super) fn blame(&mut self, worker: WorkerId, text: String) -> Step {
        self.retry(worker, Fault::Worker, text)
    }

    /// The attempt failed: goes on elsewhere, unless that was the last one.
    pub(super) fn retry(&mut self, worker: WorkerId, fault: Fault, text: String) -> Step {
        self.fault = fault;
        self.failures += 1;
        self.failed_on.push(worker);
        if self.failures > self.limits.reruns {
            let error = AnswerError::WorkersFailed {
                attempts: self.failures,
                workers: self.failed_on.iter().collect::<BTreeSet<_>>().len(),
                last: text,
            };
            return self.fail(error, AttemptEnd::Failed);
        }
        self.phase = Phase::Placing;
        Step::Again(AttemptEnd::Failed)
    }

    pub(super) fn fail(&mut self, error: AnswerError, ended: AttemptEnd) -> Step {
        self.phase = Phase::Ended;
        // The only verdict on the request that there is.
        let error = match (self.rejected.take(), error) {
            (Some(first), AnswerError::Refused(_) | AnswerError::WorkersFailed { .. }) => {
                let (code, text) = (first.code, first.text);
                AnswerError::Rejected { code, text }
            }
            (_, error) => error,
        };
        Step::Fail(error, ended)
    }
}

/// A worker's text in a form that may be shown: short, and on one line.
fn readable(text: &str) -> String {
    let short = &text[..text.floor_char_boundary(ERROR_BYTES)];
    short.replace(char::is_control, " ")
}

/// Deaths of workers before a request's first token that end it: the first may be chance, and the second
/// worker had nothing else to begin.
const MOST_SILENT_DEATHS: usize = 2;

/// Deaths at any time that end it.
const MOST_DEATHS: usize = 4;

/// Bytes of a worker's error that anybody is shown.
const ERROR_BYTES: usize = 1024;
