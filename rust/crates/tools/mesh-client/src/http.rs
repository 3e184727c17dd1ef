//! The head's HTTP API: chat and completions of the OpenAI kind, streamed or whole, and the head's own endpoints.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::marker::PhantomData;
use std::time::Duration;

use mesh_api::{
    ChatCompletion, ChatCompletionChunk, ChatCompletionRequest, ChatLogprobs, Completion,
    CompletionRequest, CompletionUsage, ErrorResponse, GenerationOptions, ListModelsResponse, Mesh,
    StreamOptions, Timings, paths,
};
use reqwest::{Response, StatusCode};
use serde::de::{DeserializeOwned, IgnoredAny};
use serde::{Deserialize, Serialize};

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
    /// The certificate of an `https://` address is checked by the authorities that this machine trusts.
    ///
    /// # Errors
    /// If `base` is neither an http nor an https address.
    pub fn new(base: &str, key: Option<String>) -> Result<Self, HttpError> {
        Self::trusting(base, key, None)
    }

    /// As [`new`](Self::new), but the certificate must be of one of these authorities (PEM), if there are any.
    ///
    /// # Errors
    /// As [`new`](Self::new), and if `authorities` are not certificates.
    pub fn trusting(
        base: &str,
        key: Option<String>,
        authorities: Option<&[u8]>,
    ) -> Result<Self, HttpError> {
        let (base, secure) = match base.split_once("://") {
            None => (format!("http://{base}"), false),
            Some(("http", _)) => (base.to_owned(), false),
            Some(("https", _)) => (base.to_owned(), true),
            Some(_) => return Err(HttpError::BadAddress(base.to_owned())),
        };
        let base = base.trim_end_matches('/').trim_end_matches("/v1");
        let mut builder = reqwest::Client::builder();
        if let Some(pem) = authorities.filter(|_| secure) {
            let certificates = reqwest::Certificate::from_pem_bundle(pem)
                .map_err(|error| HttpError::BadAuthorities(error.to_string()))?;
            if certificates.is_empty() {
                let text = "it has no block BEGIN CERTIFICATE".to_owned();
                return Err(HttpError::BadAuthorities(text));
            }
            builder = builder.tls_certs_only(certificates);
        } else if !secure {
            // No time for this machine's certificates.
            builder = builder.tls_certs_only([]);
        }
        let http = builder
            .no_proxy()
            .connect_timeout(Duration::from_secs(5))
            // A head that works on a request says so every few seconds, so this is silence and not the whole answer.
            .read_timeout(SILENCE)
            .build()
            .map_err(|error| HttpError::Broken(error.to_string()))?;
        Ok(Self {
            http,
            base: base.to_owned(),
            key,
        })
    }

    /// The address of the head, without `/v1`.
    pub fn base(&self) -> &str {
        &self.base
    }

    /// Sends `GET path`; the response is a JSON document.
    ///
    /// # Errors
    /// If the head cannot be reached, says no, or answers with something else.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, HttpError> {
        let answer = self.send(self.http.get(self.url(path))).await?;
        answer.json().await.map_err(broken)
    }

    /// Sends `GET path`; returns the response as text.
    ///
    /// # Errors
    /// As [`HttpClient::get`].
    pub async fn get_text(&self, path: &str) -> Result<String, HttpError> {
        let answer = self.send(self.http.get(self.url(path))).await?;
        answer.text().await.map_err(broken)
    }

    /// Sends `POST path` with a JSON body; the response is a JSON document.
    ///
    /// # Errors
    /// As [`HttpClient::get`].
    pub async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, HttpError> {
        let request = self.http.post(self.url(path)).json(body);
        let answer = self.send(request).await?.bytes().await.map_err(broken)?;
        // A failure that came after the head had sent its status, to show that it is alive.
        if has_error(&answer) {
            let text = String::from_utf8_lossy(&answer);
            return Err(api_error(StatusCode::INTERNAL_SERVER_ERROR, &text));
        }
        serde_json::from_slice(&answer).map_err(|error| HttpError::Broken(error.to_string()))
    }

    /// Names of the models that the mesh serves now.
    ///
    /// # Errors
    /// As [`HttpClient::get`].
    pub async fn models(&self) -> Result<Vec<String>, HttpError> {
        let list: ListModelsResponse = self.get(paths::MODELS).await?;
        Ok(list.data.into_iter().map(|model| model.id).collect())
    }

    /// Workers, rings and shared models.
    ///
    /// # Errors
    /// As [`HttpClient::get`].
    pub async fn mesh(&self) -> Result<Mesh, HttpError> {
        self.get(paths::MESH).await
    }

    /// Starts a streamed answer. `stream` and `stream_options.include_usage` are set here.
    ///
    /// # Errors
    /// As [`HttpClient::get`].
    pub async fn stream<R: Generation>(&self, mut request: R) -> Result<AnswerStream, HttpError> {
        let options = request.options();
        options.stream = Some(true);
        options.stream_options = Some(StreamOptions {
            include_usage: Some(true),
            ..StreamOptions::default()
        });
        let request = self.http.post(self.url(R::PATH)).json(&request);
        Ok(AnswerStream {
            frames: Frames::of(self.send(request).await?),
            parse: parse_piece::<R::Chunk>,
        })
    }

    /// Starts a stream of events of another kind than generated text.
    ///
    /// # Errors
    /// As [`HttpClient::get`].
    pub async fn events<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<EventStream<T>, HttpError> {
        let request = self.http.post(self.url(path)).json(body);
        Ok(EventStream {
            frames: Frames::of(self.send(request).await?),
            event: PhantomData,
        })
    }

    /// A whole answer at once.
    ///
    /// # Errors
    /// As [`HttpClient::get`].
    pub async fn complete<R: Generation>(&self, request: &R) -> Result<R::Whole, HttpError> {
        self.post(R::PATH, request).await
    }

    fn url(&self, path: &str) -> String {
        format!("{}{path}", self.base)
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

/// A request for generated text.
pub trait Generation: Serialize {
    /// Path of the API.
    const PATH: &'static str;
    /// A whole answer.
    type Whole: DeserializeOwned;
    /// A chunk of a streamed answer.
    type Chunk: DeserializeOwned + Into<AnswerPiece>;

    /// Its options.
    fn options(&mut self) -> &mut GenerationOptions;
}

impl Generation for ChatCompletionRequest {
    const PATH: &'static str = paths::CHAT_COMPLETIONS;
    type Whole = ChatCompletion<'static>;
    type Chunk = ChatCompletionChunk<'static>;

    fn options(&mut self) -> &mut GenerationOptions {
        &mut self.options
    }
}

impl Generation for CompletionRequest {
    const PATH: &'static str = paths::COMPLETIONS;
    type Whole = Completion<'static>;
    type Chunk = Completion<'static>;

    fn options(&mut self) -> &mut GenerationOptions {
        &mut self.options
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
    frames: Frames,
    parse: fn(&str) -> Result<AnswerPiece, HttpError>,
}

/// Events while they arrive.
#[derive(Debug)]
pub struct EventStream<T> {
    frames: Frames,
    event: PhantomData<fn() -> T>,
}

/// An item of an [`EventStream`].
#[derive(Debug, Clone, PartialEq)]
pub enum Arrived<T> {
    /// An event.
    Event(T),
    /// No event yet: the reason why the request waits, in the head's words.
    Waits(String),
}

impl<T: DeserializeOwned> EventStream<T> {
    /// The next event, or the reason why there is none yet; `None` at the end.
    ///
    /// # Errors
    /// An error the head sent in the stream, or a stream that broke off.
    pub async fn next(&mut self) -> Result<Option<Arrived<T>>, HttpError> {
        Ok(match self.frames.next().await? {
            None => None,
            Some(Frame::Comment(comment)) => Some(Arrived::Waits(comment)),
            Some(Frame::Data(event)) => Some(Arrived::Event(parse_event(&event)?)),
        })
    }
}

/// The server-sent events of a response.
#[derive(Debug)]
struct Frames {
    response: Response,
    parser: SseParser,
    ready: VecDeque<String>,
    ended: bool,
}

enum Frame {
    Data(String),
    Comment(String),
}

impl Frames {
    fn of(response: Response) -> Self {
        Self {
            response,
            parser: SseParser::default(),
            ready: VecDeque::new(),
            ended: false,
        }
    }

    async fn next(&mut self) -> Result<Option<Frame>, HttpError> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                if event == "[DONE]" {
                    self.ended = true;
                    return Ok(None);
                }
                return Ok(Some(Frame::Data(event)));
            }
            if self.ended {
                return Ok(None);
            }
            let Some(bytes) = self.response.chunk().await.map_err(broken)? else {
                let broken = "the stream ended before its [DONE]";
                return Err(HttpError::Broken(broken.to_owned()));
            };
            let mut events = Vec::new();
            let pushed = self.parser.push(&bytes, &mut events);
            pushed.map_err(|error| HttpError::Broken(error.to_string()))?;
            self.ready.extend(events);
            if self.ready.is_empty()
                && let Some(comment) = self.parser.take_comment()
            {
                return Ok(Some(Frame::Comment(comment)));
            }
        }
    }
}

/// A piece of an answer.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct AnswerPiece {
    /// New text; may be empty.
    pub text: String,
    /// Reason for the end: `stop` or `length`.
    pub finish_reason: Option<String>,
    /// Token counts, in the last piece.
    pub usage: Option<CompletionUsage>,
    /// Times and the worker, in the last piece.
    pub timings: Option<Timings>,
    /// Log probabilities of a chat's tokens, where they were asked for.
    pub logprobs: Option<ChatLogprobs>,
}

impl From<ChatCompletionChunk<'_>> for AnswerPiece {
    fn from(chunk: ChatCompletionChunk<'_>) -> Self {
        let choice = chunk.choices.into_iter().next().unwrap_or_default();
        Self {
            text: choice.delta.content.unwrap_or_default().into_owned(),
            finish_reason: choice.finish_reason.map(Cow::into_owned),
            usage: chunk.usage.flatten(),
            timings: chunk.timings,
            logprobs: choice.logprobs,
        }
    }
}

impl From<Completion<'_>> for AnswerPiece {
    fn from(chunk: Completion<'_>) -> Self {
        let choice = chunk.choices.into_iter().next().unwrap_or_default();
        Self {
            text: choice.text.into_owned(),
            finish_reason: choice.finish_reason.map(Cow::into_owned),
            usage: chunk.usage.flatten(),
            timings: chunk.timings,
            logprobs: None,
        }
    }
}

impl AnswerStream {
    /// The next piece; `None` at the end.
    ///
    /// # Errors
    /// An error the head sent in the stream, or a stream that broke off.
    pub async fn next(&mut self) -> Result<Option<AnswerPiece>, HttpError> {
        while let Some(heard) = self.next_or_wait().await? {
            if let Heard::Piece(piece) = heard {
                return Ok(Some(*piece));
            }
        }
        Ok(None)
    }

    /// The next piece, or the reason why the answer waits; `None` at the end.
    ///
    /// # Errors
    /// As [`AnswerStream::next`].
    pub async fn next_or_wait(&mut self) -> Result<Option<Heard>, HttpError> {
        Ok(match self.frames.next().await? {
            None => None,
            Some(Frame::Comment(comment)) => Some(Heard::Waits(comment)),
            Some(Frame::Data(event)) => Some(Heard::Piece(Box::new((self.parse)(&event)?))),
        })
    }

    /// The `x-request-id` of the answer, by which the services' logs name it.
    pub fn request_id(&self) -> Option<&str> {
        self.frames
            .response
            .headers()
            .get("x-request-id")?
            .to_str()
            .ok()
    }
}

/// Errors of a request over HTTP.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages name the fields")]
pub enum HttpError {
    /// The address cannot be used.
    #[error("{0} is not an address of a head: use http://HOST:PORT or https://HOST:PORT")]
    BadAddress(String),
    /// A file of certificate authorities cannot be used.
    #[error("the certificates of authorities cannot be used: {0}")]
    BadAuthorities(String),
    /// No server answers at the address.
    #[error("nothing answers at {address}: {reason}")]
    Unreachable { address: String, reason: String },
    /// The head answered with an error.
    #[error("{message}")]
    Api {
        status: u16,
        /// OpenAI's `error.type` field.
        kind: String,
        /// OpenAI's `error.code`, where there is one.
        code: Option<String>,
        message: String,
    },
    /// The connection or the answer's form broke.
    #[error("the answer broke off: {0}")]
    Broken(String),
}

/// Longest silence of a head. An older one says nothing before a whole answer.
const SILENCE: Duration = Duration::from_secs(300);

fn parse_piece<C: DeserializeOwned + Into<AnswerPiece>>(
    event: &str,
) -> Result<AnswerPiece, HttpError> {
    parse_event::<C>(event).map(C::into)
}

fn parse_event<T: DeserializeOwned>(event: &str) -> Result<T, HttpError> {
    if has_error(event.as_bytes()) {
        return Err(api_error(StatusCode::INTERNAL_SERVER_ERROR, event));
    }
    serde_json::from_str(event).map_err(|error| {
        // An image is long.
        let start = &event[..event.floor_char_boundary(1024)];
        HttpError::Broken(format!("a chunk is not valid ({error}): {start}"))
    })
}

/// An object with an error, in the head's form or another. Its other fields would pass for an empty answer.
fn has_error(json: &[u8]) -> bool {
    #[derive(Deserialize)]
    struct Answer {
        error: Option<IgnoredAny>,
    }
    let is_object = json.trim_ascii_start().starts_with(b"{");
    is_object
        && serde_json::from_slice::<Answer>(json).is_ok_and(|Answer { error }| error.is_some())
}

fn api_error(status: StatusCode, body: &str) -> HttpError {
    let (kind, code, message) = match serde_json::from_str(body) {
        Ok(ErrorResponse { error }) => {
            let code = error.code.map(|code| code.to_string());
            (error.r#type, code, error.message)
        }
        Err(_) => {
            let message = format!("HTTP {status}: {}", body.trim());
            (String::new(), None, message)
        }
    };
    HttpError::Api {
        status: status.as_u16(),
        kind,
        code,
        message,
    }
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
        let error = parse_piece::<ChatCompletionChunk<'_>>(event).expect_err("an error");
        assert_eq!(error.to_string(), "no worker serves it");
        assert!(matches!(error, HttpError::Api { code: Some(code), .. } if code == "no_worker"));
    }

    #[test]
    fn an_error_in_another_form_is_an_error_too() {
        for (event, expected) in [
            (
                r#"{"error":"out of memory"}"#,
                r#"HTTP 500 Internal Server Error: {"error":"out of memory"}"#,
            ),
            (
                r#"{"error":{"message":"overloaded","type":null}}"#,
                "overloaded",
            ),
        ] {
            let error = parse_piece::<ChatCompletionChunk<'_>>(event).expect_err("an error");
            assert_eq!(error.to_string(), expected);
            assert!(has_error(event.as_bytes()));
        }
        let piece = parse_piece::<ChatCompletionChunk<'_>>(r#"{"choices":[],"error":null}"#);
        assert_eq!(piece.expect("a chunk"), AnswerPiece::default());
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
    fn an_address_is_http_or_https() {
        let error = HttpClient::new("ftp://mesh.example", None).expect_err("not HTTP");
        assert!(error.to_string().contains("https://HOST:PORT"), "{error}");
        let client = HttpClient::new("https://mesh.example/v1", None).expect("an address");
        assert_eq!(client.base(), "https://mesh.example");
        let nothing = HttpClient::trusting("https://mesh.example", None, Some(b"key"));
        let error = nothing.expect_err("no certificate").to_string();
        assert!(error.contains("BEGIN CERTIFICATE"), "{error}");
        let client = HttpClient::new("127.0.0.1:8080/v1/", None).expect("an address");
        assert_eq!(client.base(), "http://127.0.0.1:8080");
    }

    #[tokio::test]
    async fn nothing_listening_is_unreachable() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("bound").to_string();
        drop(listener);
        let client = HttpClient::new(&address, None).expect("an address");
        let error = client.mesh().await.expect_err("nobody there");
        assert!(matches!(error, HttpError::Unreachable { .. }), "{error}");
    }
}
