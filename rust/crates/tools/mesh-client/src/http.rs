//! The head's HTTP API: chat and completions of the OpenAI kind, streamed or whole, and the head's own endpoints.

use std::collections::VecDeque;
use std::time::Duration;

use reqwest::{Response, StatusCode};
use serde_json::{Value, json};

use crate::sse::SseParser;

/// A connection pool to one head.
#[derive(Debug, Clone)]
pub struct HttpClient {
    http: reqwest::Client,
    base: String,
    key: Option<String>,
}

impl HttpClient {
    /// A client of the head at `base`, such as `http://127.0.0.1:8080`, a bare `host:port` being taken as `http://`.
    ///
    /// # Errors
    /// If `base` is not an http address.
    pub fn new(base: &str, key: Option<String>) -> Result<Self, HttpError> {
        let base = match base.split_once("://") {
            None => format!("http://{base}"),
            Some(("http", _)) => base.to_owned(),
            Some(_) => return Err(HttpError::BadAddress(base.to_owned())),
        };
        let base = base
            .trim_end_matches('/')
            .trim_end_matches("/v1")
            .to_owned();
        let http = reqwest::Client::builder()
            .no_proxy()
            // Heads speak plain HTTP: no time for this machine's certificates, and no need for any.
            .tls_certs_only([])
            .connect_timeout(Duration::from_secs(5))
            // A head that works on a request says so every few seconds, so this is silence and not the whole answer.
            .read_timeout(SILENCE)
            .build()
            .map_err(|error| HttpError::Broken(error.to_string()))?;
        Ok(Self { http, base, key })
    }

    /// The address of the head, without `/v1`.
    pub fn base(&self) -> &str {
        &self.base
    }

    /// Sends `GET path`; the response is a JSON document.
    ///
    /// # Errors
    /// If the head cannot be reached, says no, or answers with something else.
    pub async fn get(&self, path: &str) -> Result<Value, HttpError> {
        let request = self.http.get(format!("{}{path}", self.base));
        read_json(self.send(request).await?).await
    }

    /// Sends `GET path`; returns the response as text.
    ///
    /// # Errors
    /// As [`HttpClient::get`].
    pub async fn get_text(&self, path: &str) -> Result<String, HttpError> {
        let request = self.http.get(format!("{}{path}", self.base));
        self.send(request).await?.text().await.map_err(broken)
    }

    /// Sends `POST path` with a JSON body; the response is a JSON document.
    ///
    /// # Errors
    /// As [`HttpClient::get`].
    pub async fn post(&self, path: &str, body: &Value) -> Result<Value, HttpError> {
        let request = self.http.post(format!("{}{path}", self.base)).json(body);
        let answer: Value = read_json(self.send(request).await?).await?;
        // A failure that came after the head had sent its status, to show that it is alive.
        if answer["error"].is_object() {
            return Err(api_error(
                StatusCode::INTERNAL_SERVER_ERROR,
                &answer.to_string(),
            ));
        }
        Ok(answer)
    }

    /// Names of the models that the mesh serves now.
    ///
    /// # Errors
    /// As [`HttpClient::get`].
    pub async fn models(&self) -> Result<Vec<String>, HttpError> {
        let list = self.get("/v1/models").await?;
        let entries = list["data"].as_array().ok_or_else(|| {
            HttpError::Broken(format!("/v1/models has no \"data\" list but {list}"))
        })?;
        Ok(entries
            .iter()
            .filter_map(|model| Some(model["id"].as_str()?.to_owned()))
            .collect())
    }

    /// Starts a streamed answer: `/v1/chat/completions` if `body` has `messages`, else `/v1/completions`. `stream` and
    /// `stream_options.include_usage` are set here.
    ///
    /// # Errors
    /// As [`HttpClient::get`].
    pub async fn stream(&self, mut body: Value) -> Result<AnswerStream, HttpError> {
        body["stream"] = json!(true);
        body["stream_options"] = json!({"include_usage": true});
        let path = completion_path(&body);
        let request = self.http.post(format!("{}{path}", self.base)).json(&body);
        let response = self.send(request).await?;
        Ok(AnswerStream {
            response,
            parser: SseParser::default(),
            ready: VecDeque::new(),
            ended: false,
        })
    }

    /// A whole answer at once; the path is chosen as in [`HttpClient::stream`].
    ///
    /// # Errors
    /// As [`HttpClient::get`].
    pub async fn complete(&self, body: &Value) -> Result<Value, HttpError> {
        self.post(completion_path(body), body).await
    }

    async fn send(&self, mut request: reqwest::RequestBuilder) -> Result<Response, HttpError> {
        if let Some(key) = &self.key {
            request = request.bearer_auth(key);
        }
        let response = request.send().await.map_err(|error| {
            if error.is_connect() || error.is_timeout() {
                HttpError::Unreachable {
                    address: self.base.clone(),
                    reason: root_cause(&error),
                }
            } else {
                broken(error)
            }
        })?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let body = response.text().await.unwrap_or_default();
        Err(api_error(status, &body))
    }
}

/// An event of a stream.
#[derive(Debug, Clone, PartialEq)]
pub enum Heard {
    /// A piece of the answer.
    Piece(Box<AnswerPiece>),
    /// No text yet: the reason why the request waits, in the head's words.
    Waits(String),
}

/// An answer while it arrives.
#[derive(Debug)]
pub struct AnswerStream {
    response: Response,
    parser: SseParser,
    ready: VecDeque<String>,
    ended: bool,
}

/// A piece of an answer.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct AnswerPiece {
    /// New text; may be empty.
    pub text: String,
    /// Reason for the end: `stop` or `length`.
    pub finish_reason: Option<String>,
    /// Token counts, in the last piece.
    pub usage: Option<Value>,
    /// Times and the worker, in the last piece.
    pub timings: Option<Value>,
    /// The whole chunk as it came.
    pub raw: Value,
}

impl AnswerStream {
    /// The next piece; `None` at the end.
    ///
    /// # Errors
    /// An error the head sent in the stream, or a stream that broke off.
    pub async fn next(&mut self) -> Result<Option<AnswerPiece>, HttpError> {
        loop {
            match self.next_or_wait().await? {
                Some(Heard::Piece(piece)) => return Ok(Some(*piece)),
                Some(Heard::Waits(_)) => {}
                None => return Ok(None),
            }
        }
    }

    /// The next piece, or the reason why the answer waits; `None` at the end.
    ///
    /// # Errors
    /// As [`AnswerStream::next`].
    pub async fn next_or_wait(&mut self) -> Result<Option<Heard>, HttpError> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                if event == "[DONE]" {
                    self.ended = true;
                    return Ok(None);
                }
                return parse_piece(&event).map(|piece| Some(Heard::Piece(Box::new(piece))));
            }
            if self.ended {
                return Ok(None);
            }
            let Some(bytes) = self.response.chunk().await.map_err(broken)? else {
                return Err(HttpError::Broken(
                    "the stream ended before its [DONE]".to_owned(),
                ));
            };
            let mut events = Vec::new();
            self.parser
                .push(&bytes, &mut events)
                .map_err(|error| HttpError::Broken(error.to_string()))?;
            self.ready.extend(events);
            if self.ready.is_empty()
                && let Some(comment) = self.parser.take_comment()
            {
                return Ok(Some(Heard::Waits(comment)));
            }
        }
    }

    /// The `x-request-id` of the answer, by which the services' logs name it.
    pub fn request_id(&self) -> Option<&str> {
        self.response.headers().get("x-request-id")?.to_str().ok()
    }
}

/// Errors of a request over HTTP.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HttpError {
    /// The address cannot be used.
    #[error(
        "{0} is not an http:// address; a head speaks plain HTTP, TLS is for a proxy before it"
    )]
    BadAddress(String),
    /// No server answers at the address.
    #[error("nothing answers at {address}: {reason}")]
    Unreachable {
        /// Address of the head.
        address: String,
        /// The operating system's error message.
        reason: String,
    },
    /// The head answered with an error.
    #[error("{message}")]
    Api {
        /// HTTP status of the response.
        status: u16,
        /// OpenAI's `error.type` field.
        kind: String,
        /// OpenAI's `error.code`, where there is one.
        code: Option<String>,
        /// The error message of the response.
        message: String,
    },
    /// The connection or the answer's form broke.
    #[error("the answer broke off: {0}")]
    Broken(String),
}

/// Longest silence of a head. An older one says nothing before a whole answer.
const SILENCE: Duration = Duration::from_secs(300);

fn completion_path(body: &Value) -> &'static str {
    if body.get("messages").is_some() {
        "/v1/chat/completions"
    } else {
        "/v1/completions"
    }
}

fn parse_piece(event: &str) -> Result<AnswerPiece, HttpError> {
    let raw: Value = serde_json::from_str(event)
        .map_err(|error| HttpError::Broken(format!("a chunk is no JSON ({error}): {event}")))?;
    if raw.get("error").is_some_and(|error| !error.is_null()) {
        return Err(api_error(StatusCode::INTERNAL_SERVER_ERROR, event));
    }
    let choice = &raw["choices"][0];
    let text = choice["delta"]["content"]
        .as_str()
        .or_else(|| choice["text"].as_str())
        .unwrap_or_default()
        .to_owned();
    Ok(AnswerPiece {
        text,
        finish_reason: choice["finish_reason"].as_str().map(str::to_owned),
        usage: present(&raw["usage"]),
        timings: present(&raw["timings"]),
        raw,
    })
}

fn present(value: &Value) -> Option<Value> {
    (!value.is_null()).then(|| value.clone())
}

fn api_error(status: StatusCode, body: &str) -> HttpError {
    let parsed: Value = serde_json::from_str(body).unwrap_or_default();
    let error = &parsed["error"];
    let message = match error["message"].as_str() {
        Some(message) => message.to_owned(),
        None => format!("HTTP {status}: {}", body.trim()),
    };
    HttpError::Api {
        status: status.as_u16(),
        kind: error["type"].as_str().unwrap_or_default().to_owned(),
        code: match &error["code"] {
            Value::String(code) => Some(code.clone()),
            Value::Number(code) => Some(code.to_string()),
            _ => None,
        },
        message,
    }
}

async fn read_json(response: Response) -> Result<Value, HttpError> {
    response.json().await.map_err(broken)
}

fn broken(error: reqwest::Error) -> HttpError {
    HttpError::Broken(root_cause(&error))
}

/// The innermost message: reqwest's own repeats the address and hides the reason.
fn root_cause(error: &reqwest::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    cause.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_in_the_stream_is_an_error_of_the_call() {
        let event = r#"{"error":{"message":"no worker serves it","type":"server_error","code":"no_worker"}}"#;
        let error = parse_piece(event).expect_err("an error");
        assert_eq!(error.to_string(), "no worker serves it");
        assert!(matches!(error, HttpError::Api { code: Some(code), .. } if code == "no_worker"));
    }

    #[test]
    fn an_error_page_that_is_no_json_is_shown_with_its_status() {
        let error = api_error(StatusCode::BAD_GATEWAY, "<html>proxy</html>\n");
        assert_eq!(
            error.to_string(),
            "HTTP 502 Bad Gateway: <html>proxy</html>"
        );
    }

    #[test]
    fn https_is_refused_with_the_reason() {
        let error = HttpClient::new("https://mesh.example", None).expect_err("no TLS");
        assert!(error.to_string().contains("plain HTTP"));
        let client = HttpClient::new("127.0.0.1:8080/v1/", None).expect("an address");
        assert_eq!(client.base(), "http://127.0.0.1:8080");
    }

    #[tokio::test]
    async fn nothing_listening_is_unreachable() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("bound").to_string();
        drop(listener);
        let client = HttpClient::new(&address, None).expect("an address");
        let error = client.get("/health").await.expect_err("nobody there");
        assert!(matches!(error, HttpError::Unreachable { .. }), "{error}");
    }
}
