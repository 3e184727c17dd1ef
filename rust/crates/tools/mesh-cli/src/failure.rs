//! Failures in words for users, and exit codes for scripts.

use std::fmt;

use dcf::ErrorCode;
use mesh_client::dcf_udp::DcfError;
use mesh_client::http::HttpError;
use mesh_net::quic::SessionError;

/// Exit codes of the command. 0 is success; 2 is also the argument parser's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// A failure without an exit code of its own.
    Failed = 1,
    /// The arguments make no sense.
    Usage = 2,
    /// The mesh cannot be reached.
    Unreachable = 3,
    /// No worker is present, all are busy, or none has the model.
    NoWorker = 4,
    /// No answer in time.
    Timeout = 5,
    /// A key is missing or insufficient.
    Refused = 6,
    /// Interrupted by Ctrl-C.
    Interrupted = 130,
}

impl Exit {
    /// The process's exit code.
    pub fn code(self) -> u8 {
        self as u8
    }
}

/// The failure of a command: an exit code and a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// Kind of failure, which decides the exit code.
    pub exit: Exit,
    /// Description of the failure.
    pub message: String,
    /// Advice on a remedy.
    pub hint: Option<String>,
}

impl Failure {
    /// A failure with this exit code and no hint.
    pub fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self {
            exit,
            message: message.into(),
            hint: None,
        }
    }

    /// A failure with [`Exit::Failed`].
    pub fn failed(message: impl Into<String>) -> Self {
        Self::new(Exit::Failed, message)
    }

    /// A failure with [`Exit::Usage`].
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(Exit::Usage, message)
    }

    /// The failure of a command that Ctrl-C ended.
    pub fn interrupted() -> Self {
        Self::new(Exit::Interrupted, "interrupted")
    }

    /// Adds advice on a remedy.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "hydramesh: {}", self.message)?;
        if let Some(hint) = &self.hint {
            write!(f, "\n  {hint}")?;
        }
        Ok(())
    }
}

const START_ONE: &str = "Is a mesh running? `hydramesh demo --keep` starts one on this machine; --help says how to name another.";

impl From<DcfError> for Failure {
    fn from(error: DcfError) -> Self {
        let message = error.to_string();
        match error {
            DcfError::Unreachable { .. } => Self::new(Exit::Unreachable, message).hint(START_ONE),
            DcfError::Timeout { .. } => Self::new(Exit::Timeout, message)
                .hint("Is the mesh still there? `hydramesh status` shows what the workers do."),
            DcfError::Refused { code, .. } => match code {
                ErrorCode::NO_WORKERS => Self::new(Exit::NoWorker, message)
                    .hint("`hydramesh status` shows the workers that have joined."),
                ErrorCode::WORKER_BUSY | ErrorCode::DRAINING | ErrorCode::RATE_LIMITED => {
                    Self::new(Exit::NoWorker, message).hint("Try again in a moment.")
                }
                ErrorCode::UNKNOWN_MODEL => Self::new(Exit::NoWorker, message)
                    .hint("`hydramesh status` shows the models that are served."),
                ErrorCode::TIMEOUT => Self::new(Exit::Timeout, message),
                ErrorCode::UNAUTHORIZED => Self::new(Exit::Refused, message),
                ErrorCode::INVALID_PAYLOAD | ErrorCode::CONTEXT_TOO_LONG => Self::usage(message),
                _ => Self::failed(message),
            },
            DcfError::Session(SessionError::Refused { code, .. }) => match code {
                ErrorCode::RATE_LIMITED | ErrorCode::DRAINING => {
                    Self::new(Exit::NoWorker, message).hint("Try again in a moment.")
                }
                _ => Self::new(Exit::Refused, message),
            },
            DcfError::Session(SessionError::Connect(_)) => Self::new(Exit::Unreachable, message)
                .hint("--sealed names the head's QUIC port (7780/udp), and not a shim's."),
            DcfError::Session(SessionError::ForeignMesh { .. }) => {
                Self::new(Exit::Refused, message)
            }
            DcfError::TaskTooLong { .. } => Self::usage(message),
            _ => Self::failed(message),
        }
    }
}

impl From<HttpError> for Failure {
    fn from(error: HttpError) -> Self {
        let message = error.to_string();
        match error {
            HttpError::BadAddress(_) => Self::usage(message),
            HttpError::BadAuthorities(_) => {
                Self::usage(message).hint("Name a PEM file with --ca-file (HYDRAMESH_CA_FILE).")
            }
            HttpError::Unreachable { .. } => Self::new(Exit::Unreachable, message).hint(START_ONE),
            HttpError::Api { status, .. } => match status {
                401 | 403 => Self::new(Exit::Refused, message)
                    .hint("Give the key with --api-key-file or HYDRAMESH_API_KEY_FILE."),
                404 | 429 | 503 => Self::new(Exit::NoWorker, message)
                    .hint("`hydramesh status` shows the workers and their models."),
                400 | 413 | 422 => Self::usage(message),
                408 | 504 => Self::new(Exit::Timeout, message),
                _ => Self::failed(message),
            },
            _ => Self::failed(message),
        }
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::failed(format!("{error:#}"))
    }
}

/// Makes the process end quietly if the reader of its output is gone.
pub fn end_quietly_on_broken_pipe() {
    let default = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let text = panic.payload().downcast_ref::<String>();
        if text.is_some_and(|text| text.contains("Broken pipe")) {
            std::process::exit(0);
        }
        default(panic);
    }));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_script_can_tell_failures_apart() {
        let refused = |code| {
            Failure::from(DcfError::Refused {
                code,
                text: "x".to_owned(),
            })
            .exit
            .code()
        };
        assert_eq!(refused(ErrorCode::NO_WORKERS), 4);
        assert_eq!(refused(ErrorCode::UNKNOWN_MODEL), 4);
        assert_eq!(refused(ErrorCode::TIMEOUT), 5);
        assert_eq!(refused(ErrorCode::INTERNAL), 1);
        let unreachable = HttpError::Unreachable {
            address: "a".to_owned(),
            reason: "b".to_owned(),
        };
        assert_eq!(Failure::from(unreachable).exit.code(), 3);
    }
}
