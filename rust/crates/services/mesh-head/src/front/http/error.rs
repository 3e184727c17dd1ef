//! Errors as the OpenAI API gives them: `{"error": {"message", "type", "param", "code"}}`.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use dcf::ErrorCode;
use mesh_api::{Code, Error, ErrorResponse};
use mesh_control::memory::TooMuch;
use mesh_control::placement::Refusal;
use mesh_control::request::AnswerError;

use crate::api::invalid::Invalid;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ApiError {
    pub status: StatusCode,
    /// Message for people, in English.
    pub message: String,
    /// Field of the request that is to blame.
    pub param: Option<String>,
    pub code: Code,
    /// Seconds after which to try again.
    pub retry_after: Option<u32>,
}

impl ApiError {
    /// An error with the usual status of its code, without field and retry.
    pub(crate) fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            status: StatusCode::from_u16(code.status()).expect("codes have valid statuses"),
            message: message.into(),
            param: None,
            code,
            retry_after: None,
        }
    }

    /// An error that may be over in a moment.
    pub(crate) fn passing(code: Code, message: impl Into<String>) -> Self {
        Self {
            retry_after: Some(1),
            ..Self::new(code, message)
        }
    }

    pub(crate) fn too_many(limit: usize) -> Self {
        let message = format!(
            "{limit} answers to you, as many as one client may have (http.concurrent_requests), are running already, or would be; wait \
             for one to finish, or ask for fewer"
        );
        Self::passing(Code::RateLimitExceeded, message)
    }

    /// The body as JSON; also the data of an SSE error event.
    pub(crate) fn body(&self) -> String {
        let kind = match self.status {
            StatusCode::UNAUTHORIZED => "authentication_error",
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            status if status.is_client_error() => "invalid_request_error",
            _ => "server_error",
        };
        let error = Error {
            message: self.message.clone(),
            r#type: kind.to_owned(),
            param: self.param.clone(),
            code: Some(self.code.clone()),
        };
        serde_json::to_string(&ErrorResponse { error }).expect("strings are always JSON")
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let json = HeaderValue::from_static("application/json");
        let mut response =
            (self.status, [(header::CONTENT_TYPE, json)], self.body()).into_response();
        response.extensions_mut().insert(self.code.clone());
        let headers = response.headers_mut();
        if let Some(seconds) = self.retry_after {
            headers.insert(header::RETRY_AFTER, seconds.into());
        }
        if self.status == StatusCode::UNAUTHORIZED {
            let bearer = HeaderValue::from_static("Bearer");
            headers.insert(header::WWW_AUTHENTICATE, bearer);
        }
        response
    }
}

impl From<Invalid> for ApiError {
    fn from(invalid: Invalid) -> Self {
        let code = match invalid.unsupported {
            true => Code::UnsupportedParameter,
            false => Code::InvalidValue,
        };
        Self {
            param: Some(invalid.param),
            ..Self::new(code, invalid.message)
        }
    }
}

impl From<TooMuch> for ApiError {
    fn from(error: TooMuch) -> Self {
        let code = match error {
            TooMuch::Yours { .. } => Code::RateLimitExceeded,
            TooMuch::All { .. } => Code::Overloaded,
        };
        Self::passing(code, error.to_string())
    }
}

impl From<&AnswerError> for ApiError {
    fn from(error: &AnswerError) -> Self {
        let (code, retry_after) = match error {
            AnswerError::Refused(Refusal::QueueFull { .. }) => (Code::Overloaded, Some(1)),
            AnswerError::Refused(
                Refusal::NoWorker { .. }
                | Refusal::NoRing { .. }
                | Refusal::NoneAnswers { .. }
                | Refusal::TooOld { .. },
            ) => (Code::NoWorker, Some(5)),
            AnswerError::Refused(Refusal::UnknownModel { .. }) => (Code::ModelNotFound, None),
            AnswerError::Refused(Refusal::TooLong { .. }) => (Code::ContextLengthExceeded, None),
            AnswerError::Rejected { code, text } if *code == ErrorCode::CONTEXT_TOO_LONG => {
                return Self::new(Code::ContextLengthExceeded, as_clients_search_it(text));
            }
            AnswerError::Rejected { .. } => (Code::InvalidValue, None),
            AnswerError::Timeout(_) | AnswerError::Stalled(_) => (Code::Timeout, None),
            AnswerError::QueueTimeout(_) => (Code::Overloaded, Some(5)),
            AnswerError::WorkersFailed { .. } | AnswerError::WorkersDied { .. } => {
                (Code::WorkersFailed, None)
            }
            AnswerError::TooMuch(error) => return Self::from(*error),
            AnswerError::ShuttingDown => (Code::ShuttingDown, Some(5)),
        };
        Self {
            param: (code == Code::ModelNotFound).then(|| "model".into()),
            retry_after,
            ..Self::new(code, error.to_string())
        }
    }
}

/// Clients look for this phrase to shorten a conversation. Workers say it; older ones said where the limit is
/// in words of their own.
fn as_clients_search_it(message: &str) -> String {
    if message.contains(CONTEXT_PHRASE) {
        return message.to_owned();
    }
    let limit = message.rsplit("context of ").next().unwrap_or_default();
    let digits: String = limit.chars().take_while(char::is_ascii_digit).collect();
    if digits.is_empty() {
        return format!("The prompt is over this model's maximum context length: {message}");
    }
    format!("This model's {CONTEXT_PHRASE} {digits} tokens: {message}")
}

const CONTEXT_PHRASE: &str = "maximum context length is";

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use mesh_control::fair::Source;

    #[test]
    fn every_failure_has_a_status_and_a_code() {
        let rejected = |code| AnswerError::Rejected {
            code,
            text: "said the worker".into(),
        };
        let cases = [
            (
                AnswerError::Refused(Refusal::QueueFull {
                    limit: 3,
                    whose: Source::default(),
                    yours: 3,
                    sources: 1,
                }),
                503,
                "overloaded",
            ),
            (
                AnswerError::Refused(Refusal::NoWorker { model: "m".into() }),
                503,
                "no_worker",
            ),
            (
                AnswerError::Refused(Refusal::TooOld { model: "m".into() }),
                503,
                "no_worker",
            ),
            (
                AnswerError::Refused(Refusal::NoRing {
                    model: "m".into(),
                    reason: "x".into(),
                }),
                503,
                "no_worker",
            ),
            (
                AnswerError::Refused(Refusal::UnknownModel { model: "m".into() }),
                404,
                "model_not_found",
            ),
            (
                rejected(ErrorCode::CONTEXT_TOO_LONG),
                400,
                "context_length_exceeded",
            ),
            (rejected(ErrorCode::INVALID_PAYLOAD), 400, "invalid_value"),
            (AnswerError::Timeout(Duration::from_secs(1)), 504, "timeout"),
            (AnswerError::Stalled(Duration::from_secs(1)), 504, "timeout"),
            (
                AnswerError::QueueTimeout(Duration::from_secs(1)),
                503,
                "overloaded",
            ),
            (
                AnswerError::WorkersFailed {
                    attempts: 2,
                    workers: 2,
                    last: "x".into(),
                },
                502,
                "workers_failed",
            ),
            (AnswerError::ShuttingDown, 503, "shutting_down"),
        ];
        for (error, status, code) in cases {
            let api = ApiError::from(&error);
            assert_eq!(
                (api.status.as_u16(), api.code.as_str()),
                (status, code),
                "{error}"
            );
            assert!(api.message.ends_with(&error.to_string()));
            let retry = status == 503;
            assert_eq!(
                api.into_response().headers().contains_key("retry-after"),
                retry,
                "{error}"
            );
        }
    }

    #[test]
    fn a_full_context_is_told_in_the_words_that_clients_search() {
        let told = |text: &str| {
            let error = AnswerError::Rejected {
                code: ErrorCode::CONTEXT_TOO_LONG,
                text: text.into(),
            };
            ApiError::from(&error).message
        };
        let old = told(
            "2001 tokens leave no room for an answer in the context of 2000; shorten the prompt",
        );
        assert!(
            old.contains("maximum context length is 2000 tokens"),
            "{old}"
        );
        let new = "This model's maximum context length is 150 tokens. However, ...";
        assert_eq!(told(new), new);
    }

    #[test]
    fn the_body_has_the_four_fields_clients_read() {
        let error = ApiError::from(Invalid::new("top_p", "too \"large\""));
        let body: serde_json::Value = serde_json::from_str(&error.body()).unwrap();
        assert_eq!(
            body,
            serde_json::json!({"error": {
                "message": "too \"large\"", "type": "invalid_request_error", "param": "top_p", "code": "invalid_value",
            }})
        );
    }
}
