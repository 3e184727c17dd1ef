//! Errors, as the OpenAI API gives them.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize};

/// The body of an error; also the data of an error in a stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct ErrorResponse {
    /// The error.
    pub error: Error,
}

/// An error.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Error {
    /// Message for people, in English: the thing, its value and the remedy.
    pub message: String,
    /// `invalid_request_error`, `authentication_error`, `rate_limit_error` or `server_error`.
    #[serde(default, deserialize_with = "crate::null::as_default")]
    pub r#type: String,
    /// Field of the request that is to blame, as a path: `messages[0].content`.
    #[serde(default)]
    pub param: Option<String>,
    /// Code for programs.
    #[serde(default, deserialize_with = "code")]
    pub code: Option<Code>,
}

/// Other servers send numbers, too.
fn code<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Code>, D::Error> {
    let value = serde_json::Value::deserialize(deserializer)?;
    Ok(match value {
        serde_json::Value::String(_) => serde_json::from_value(value).ok(),
        serde_json::Value::Number(number) => Some(Code::Other(number.to_string())),
        _ => None,
    })
}

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $status:literal, $text:literal;)*) => {
        /// The cause of an error, for programs.
        #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
        #[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
        #[cfg_attr(feature = "schema", schemars(rename = "ErrorCode"))]
        pub enum Code {
            $($(#[$doc])* #[serde(rename = $text)] $name,)*
            /// A code of another version or another server.
            #[serde(untagged)]
            #[cfg_attr(feature = "schema", schemars(skip))]
            Other(String),
        }

        impl Code {
            /// The code as it is sent.
            pub fn as_str(&self) -> &str {
                match self {
                    $(Self::$name => $text,)*
                    Self::Other(text) => text,
                }
            }

            /// The HTTP status that it usually comes with.
            pub fn status(&self) -> u16 {
                match self {
                    $(Self::$name => $status,)*
                    Self::Other(_) => 500,
                }
            }
        }
    };
}

codes! {
    /// 400: several nodes have this name; use a node id.
    AmbiguousNode = 400, "ambiguous_node";
    /// 400: several workers have this name; use a node id.
    AmbiguousWorker = 400, "ambiguous_worker";
    /// 409: the mesh root is being rotated already.
    RotationUnderWay = 409, "rotation_under_way";
    /// 409: the model has no ring that could be compared.
    CannotRebalance = 409, "cannot_rebalance";
    /// 400: prompt and answer do not fit the context of the model.
    ContextLengthExceeded = 400, "context_length_exceeded";
    /// 500: drained or undrained, but that is lost when the head restarts.
    DrainNotKept = 500, "drain_not_kept";
    /// 403: the `Host` header is not a name of this head (`http.hosts`).
    HostNotAllowed = 403, "host_not_allowed";
    /// 404: no such image, or its time is over.
    ImageNotFound = 404, "image_not_found";
    /// 500: a fault of the head.
    InternalError = 500, "internal_error";
    /// 401: missing, wrong, expired, revoked or insufficient API key or token.
    InvalidApiKey = 401, "invalid_api_key";
    /// 400: the body cannot be read.
    InvalidBody = 400, "invalid_body";
    /// 400: a field is missing or has a wrong type or value; 409 for pins: the name is not pinned, or too many
    /// are.
    InvalidValue = 400, "invalid_value";
    /// 409: too many nodes are expelled already.
    ListFull = 409, "list_full";
    /// 405: the path has no such method.
    MethodNotAllowed = 405, "method_not_allowed";
    /// 403: the key or token lacks a right, which the message names.
    MissingRight = 403, "missing_right";
    /// 404: no such model.
    ModelNotFound = 404, "model_not_found";
    /// 409: another node has the name by now.
    NameTaken = 409, "name_taken";
    /// 503: no placement is possible for the model.
    NoPlan = 503, "no_plan";
    /// 409: no other worker has room for the layers.
    NoRoom = 409, "no_room";
    /// 503: no worker serves the model now.
    NoWorker = 503, "no_worker";
    /// 404: no such node, or none that waits for approval.
    NodeNotFound = 404, "node_not_found";
    /// 500: the expulsion or readmission failed, or is lost when the head restarts.
    NotKept = 500, "not_kept";
    /// 403: the `Origin` of a browser is not allowed (`http.cors`).
    OriginNotAllowed = 403, "origin_not_allowed";
    /// 503: the queue or the memory of the head is full.
    Overloaded = 503, "overloaded";
    /// 429: as much is running for this client as it may have.
    RateLimitExceeded = 429, "rate_limit_exceeded";
    /// 408: the body did not arrive in time.
    RequestTimeout = 408, "request_timeout";
    /// 413: the body exceeds `http.body_limit`.
    RequestTooLarge = 413, "request_too_large";
    /// 503: the head stops.
    ShuttingDown = 503, "shutting_down";
    /// 504: no complete answer in time.
    Timeout = 504, "timeout";
    /// 500: the token could not be stored.
    TokenFailed = 500, "token_failed";
    /// 404: no such join token or curtain token.
    TokenNotFound = 404, "token_not_found";
    /// 409: the join token was used already.
    TokenUsed = 409, "token_used";
    /// 409: too many join tokens or curtain tokens are open.
    TooManyTokens = 409, "too_many_tokens";
    /// 404: no such path.
    UnknownUrl = 404, "unknown_url";
    /// 415: the body is not JSON.
    UnsupportedMediaType = 415, "unsupported_media_type";
    /// 400: the field asks for something that is not supported.
    UnsupportedParameter = 400, "unsupported_parameter";
    /// 404: no such worker.
    WorkerNotFound = 404, "worker_not_found";
    /// 403: the key or token is of another tenant than the `OpenAI-Organization` that the request names.
    WrongTenant = 403, "wrong_tenant";
    /// 502: the request failed on several workers.
    WorkersFailed = 502, "workers_failed";
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_of_any_server_are_read() {
        let code = |error: &str| {
            let body = format!(r#"{{"error": {{"message": "m"{error}}}}}"#);
            let read: ErrorResponse = serde_json::from_str(&body).unwrap();
            read.error.code
        };
        assert_eq!(code(r#", "code": "no_worker""#), Some(Code::NoWorker));
        assert_eq!(
            code(r#", "code": "tired""#),
            Some(Code::Other("tired".into()))
        );
        assert_eq!(code(r#", "code": 503"#), Some(Code::Other("503".into())));
        assert_eq!((code(r#", "code": null"#), code("")), (None, None));
        assert_eq!(
            code(r#", "type": null, "code": "no_worker""#),
            Some(Code::NoWorker)
        );
        assert_eq!(
            serde_json::to_string(&Code::NoWorker).unwrap(),
            "\"no_worker\""
        );
    }
}
