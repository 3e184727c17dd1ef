//! Codes and payloads of Error messages.

use std::{borrow::Cow, fmt};

/// The first byte of an Error message's payload. Codes above 0x40 are this project's own.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(transparent)]
pub struct ErrorCode(pub u8);

named_numbers! { ErrorCode, "error code":
    /// Success: no error.
    OK = 0, "ok";
    /// The payload cannot be understood; asking again will not help.
    INVALID_PAYLOAD = 1, "invalid payload";
    /// Everyone who could answer is busy; ask again later.
    WORKER_BUSY = 2, "worker busy";
    /// The model failed to compute an answer.
    INFERENCE_FAILED = 3, "inference failed";
    /// No answer within the time limit.
    TIMEOUT = 4, "timeout";
    /// No worker is available.
    NO_WORKERS = 5, "no workers";
    /// A payload in Chunks did not arrive whole.
    CHUNK_MISSING = 6, "chunk missing";
    /// The peers' versions cannot talk to each other.
    VERSION_MISMATCH = 7, "version mismatch";
    /// No worker has the model that was asked for.
    UNKNOWN_MODEL = 0x41, "unknown model";
    /// Prompt and answer do not fit the model's context.
    CONTEXT_TOO_LONG = 0x42, "context too long";
    /// The receiver is shutting down; ask another.
    DRAINING = 0x43, "draining";
    /// Too many messages from this source.
    RATE_LIMITED = 0x44, "rate limited";
    /// The sender may not ask for this.
    UNAUTHORIZED = 0x45, "unauthorized";
    /// The requester cancelled the request.
    CANCELLED = 0x46, "cancelled";
    /// A fault of the receiver.
    INTERNAL = 0x47, "internal error";
}

/// The payload of an Error message: code u8, then UTF-8 text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ErrorBody<'a> {
    /// Cause of the failure.
    pub code: ErrorCode,
    /// Explanation for people.
    pub text: Cow<'a, str>,
}

impl<'a> ErrorBody<'a> {
    /// Reads a payload; `None` if it is empty. Bytes that are not UTF-8 become U+FFFD: an error is worth showing even then.
    #[must_use]
    pub fn parse(payload: &'a [u8]) -> Option<Self> {
        let (&code, text) = payload.split_first()?;
        Some(Self {
            code: ErrorCode(code),
            text: String::from_utf8_lossy(text),
        })
    }
}

impl fmt::Display for ErrorBody<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.text.is_empty() {
            write!(f, "{}", self.code)
        } else {
            write!(f, "{}: {}", self.code, self.text)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_payload_is_no_error_body() {
        assert_eq!(ErrorBody::parse(b""), None);
    }

    #[test]
    fn text_that_is_not_utf8_is_still_shown() {
        let body = ErrorBody::parse(b"\x03bad \xff").unwrap();
        assert_eq!(body.to_string(), "inference failed: bad \u{fffd}");
    }

    #[test]
    fn an_unknown_code_keeps_its_number() {
        assert_eq!(
            ErrorBody::parse(b"\x99").unwrap().to_string(),
            "error code 0x99"
        );
    }
}
