//! From the events of tasks to the answers of the API: gathered into one body, or streamed as they come.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use futures::stream::{self, SelectAll, Stream, StreamExt};
use mesh_proto::TokenLogprob;
use serde::Serialize;
use tokio_stream::wrappers::UnboundedReceiverStream;

use super::ask::{Api, Asked};
use super::error::ApiError;
use super::keys::Pass;
use super::wire::{
    ChatChoice, ChatChunk, ChatDelta, ChatLogprobs, ChatText, Envelope, Place, TextChoice,
    TextLogprobs, Timings, Usage, finish_reason, system_fingerprint,
};
use crate::core::request::{Complete, Delta};
use crate::drive::{Event, Placed};
use crate::ids;

/// The events of all choices of one request, each with its index.
pub(super) type Events = SelectAll<stream::BoxStream<'static, (usize, Event)>>;

/// One request on its way to its answers.
pub(super) struct Answering {
    head: Head,
    api: Api,
    wants_logprobs: bool,
    include_usage: bool,
    answers_per_prompt: usize,
    events: Events,
    choices: Vec<Choice>,
    usage: Usage,
    /// Counts against the client's limit until the answer is over.
    _pass: Pass,
}

/// What all chunks of an answer share.
struct Head {
    id: String,
    created: u64,
    model: String,
    fingerprint: Option<String>,
}

/// What is known of one choice.
#[derive(Default)]
struct Choice {
    worker: String,
    text: String,
    logprobs: Vec<TokenLogprob>,
    /// Behind the tokens so far.
    place: Place,
    complete: Option<Complete>,
}

impl Answering {
    /// An answer to `asked`, made of the events of its tasks.
    pub(super) fn new(
        asked: &Asked,
        created: u64,
        receivers: Vec<tokio::sync::mpsc::UnboundedReceiver<Event>>,
        pass: Pass,
    ) -> Self {
        let choices = receivers.iter().map(|_| Choice::default()).collect();
        let numbered = receivers.into_iter().enumerate().map(|(index, receiver)| {
            UnboundedReceiverStream::new(receiver)
                .map(move |event| (index, event))
                .boxed()
        });
        let head = Head {
            id: ids::fresh(asked.api.id_prefix()),
            created,
            model: asked.model.clone().unwrap_or_default(),
            fingerprint: None,
        };
        Self {
            head,
            api: asked.api,
            wants_logprobs: asked.params.logprobs.is_some(),
            include_usage: asked.include_usage,
            answers_per_prompt: asked.choices as usize,
            events: stream::select_all(numbered),
            choices,
            usage: Usage::default(),
            _pass: pass,
        }
    }

    /// Waits for all answers and puts them into one body.
    ///
    /// # Errors
    /// The first failure of any of them.
    pub(super) async fn gather(mut self) -> Result<Response, ApiError> {
        while let Some((index, event)) = self.next().await {
            if let Event::Delta(delta) = event? {
                let choice = &mut self.choices[index];
                choice.text += &delta.text;
                choice.logprobs.extend(delta.logprobs);
            }
        }
        let timings = self.timings();
        let usage = Some(Some(self.usage));
        match self.api {
            Api::Chat => {
                let wants_logprobs = self.wants_logprobs;
                let choice = |(index, choice): (usize, Choice)| ChatChoice {
                    index,
                    finish_reason: choice.finish_reason(),
                    logprobs: wants_logprobs.then(|| ChatLogprobs::new(&choice.logprobs)),
                    message: ChatText {
                        role: "assistant",
                        content: choice.text,
                        refusal: None,
                    },
                };
                let choices = self.choices.into_iter().enumerate().map(choice).collect();
                Ok(json_response(&self.head.envelope(
                    self.api.object(),
                    choices,
                    usage,
                    timings,
                )))
            }
            Api::Completions => {
                let wants_logprobs = self.wants_logprobs;
                let choices = self
                    .choices
                    .iter()
                    .enumerate()
                    .map(|(index, choice)| TextChoice {
                        index,
                        finish_reason: Some(choice.finish_reason()),
                        logprobs: wants_logprobs
                            .then(|| TextLogprobs::new(&choice.logprobs, &mut Place::default())),
                        text: &choice.text,
                    });
                let choices = choices.collect();
                Ok(json_response(&self.head.envelope(
                    self.api.object(),
                    choices,
                    usage,
                    timings,
                )))
            }
        }
    }

    /// Waits for the first piece of any answer, then answers with a stream of server-sent events. Until then a failure
    /// can still have its own HTTP status.
    ///
    /// # Errors
    /// A failure that comes before the first piece.
    pub(super) async fn stream(mut self) -> Result<Response, ApiError> {
        let first = self.next().await;
        let mut frames = VecDeque::new();
        if self.api == Api::Chat {
            for index in 0..self.choices.len() {
                frames.push_back(self.role_chunk(index));
            }
        }
        if let Some((index, event)) = first {
            self.frames_of(index, event?, &mut frames);
        }
        let mut response = Body::from_stream(self.into_frames(frames)).into_response();
        let headers = response.headers_mut();
        headers.insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("text/event-stream; charset=utf-8"),
        );
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        // nginx would hold tokens back.
        headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
        Ok(response)
    }

    /// The next piece or end of an answer. After a failure nothing more comes.
    async fn next(&mut self) -> Option<(usize, Result<Event, ApiError>)> {
        loop {
            let (index, event) = self.events.next().await?;
            match event {
                Event::Placed(placed) => self.placed(index, placed),
                Event::Failed(error) => {
                    // The other choices are of no use without this one.
                    self.events = stream::select_all(Vec::new());
                    return Some((index, Err(ApiError::from(&error))));
                }
                Event::Complete(mut complete) => {
                    self.usage
                        .add(&complete, index.is_multiple_of(self.answers_per_prompt));
                    let text = std::mem::take(&mut complete.done.text);
                    let choice = &mut self.choices[index];
                    choice.text += &text;
                    choice.complete = Some(complete.clone());
                    complete.done.text = text;
                    return Some((index, Ok(Event::Complete(complete))));
                }
                // A v5.0.0 worker answers in one piece.
                Event::Whole(bytes) => {
                    let text = String::from_utf8_lossy(&bytes).into_owned();
                    let delta = Delta {
                        text,
                        ..Delta::default()
                    };
                    return Some((index, Ok(Event::Delta(delta))));
                }
                event @ Event::Delta(_) => return Some((index, Ok(event))),
            }
        }
    }

    fn placed(&mut self, index: usize, placed: Placed) {
        self.choices[index].worker = placed.worker;
        if self.head.fingerprint.is_none() {
            self.head.fingerprint = system_fingerprint(&placed.fingerprint);
        }
        if self.head.model.is_empty() {
            self.head.model = placed.model;
        }
    }

    fn into_frames(
        self,
        first: VecDeque<Bytes>,
    ) -> impl Stream<Item = Result<Bytes, Infallible>> + Send + 'static {
        stream::unfold(
            (Some(self), first),
            |(mut answering, mut frames)| async move {
                loop {
                    if let Some(frame) = frames.pop_front() {
                        return Some((Ok(frame), (answering, frames)));
                    }
                    let mut this = answering.take()?;
                    match tokio::time::timeout(KEEP_ALIVE, this.next()).await {
                        // A comment, which clients skip and proxies count as life.
                        Err(_) => frames.push_back(Bytes::from_static(b": waiting\n\n")),
                        Ok(Some((index, Ok(event)))) => this.frames_of(index, event, &mut frames),
                        Ok(Some((_, Err(error)))) => {
                            frames.push_back(event_frame(error.body().as_bytes()));
                            continue;
                        }
                        Ok(None) => {
                            if this.include_usage {
                                frames.push_back(this.usage_chunk());
                            }
                            frames.push_back(Bytes::from_static(b"data: [DONE]\n\n"));
                            continue;
                        }
                    }
                    answering = Some(this);
                }
            },
        )
    }

    fn frames_of(&mut self, index: usize, event: Event, frames: &mut VecDeque<Bytes>) {
        match event {
            Event::Delta(delta) => {
                if !delta.text.is_empty() || (self.wants_logprobs && !delta.logprobs.is_empty()) {
                    frames.push_back(self.text_chunk(index, &delta.text, &delta.logprobs));
                }
            }
            Event::Complete(complete) => {
                if !complete.done.text.is_empty() {
                    frames.push_back(self.text_chunk(index, &complete.done.text, &[]));
                }
                frames.push_back(self.last_chunk(index, &complete));
            }
            // None of them comes from `next`.
            Event::Whole(_) | Event::Placed(_) | Event::Failed(_) => {}
        }
    }

    fn role_chunk(&self, index: usize) -> Bytes {
        let delta = ChatDelta {
            role: Some("assistant"),
            content: Some(""),
        };
        self.chunk(
            ChatChunk {
                index,
                delta,
                logprobs: None,
                finish_reason: None,
            },
            None,
        )
    }

    fn text_chunk(&mut self, index: usize, text: &str, logprobs: &[TokenLogprob]) -> Bytes {
        match self.api {
            Api::Chat => {
                let delta = ChatDelta {
                    role: None,
                    content: Some(text),
                };
                let logprobs = self.wants_logprobs.then(|| ChatLogprobs::new(logprobs));
                self.chunk(
                    ChatChunk {
                        index,
                        delta,
                        logprobs,
                        finish_reason: None,
                    },
                    None,
                )
            }
            Api::Completions => {
                let place = &mut self.choices[index].place;
                let logprobs = self
                    .wants_logprobs
                    .then(|| TextLogprobs::new(logprobs, place));
                self.chunk(
                    TextChoice {
                        index,
                        text,
                        logprobs,
                        finish_reason: None,
                    },
                    None,
                )
            }
        }
    }

    fn last_chunk(&self, index: usize, complete: &Complete) -> Bytes {
        let finish_reason = Some(finish_reason(complete));
        let timings = Some(Timings::new(complete, &self.choices[index].worker));
        match self.api {
            Api::Chat => self.chunk(
                ChatChunk {
                    index,
                    delta: ChatDelta::default(),
                    logprobs: None,
                    finish_reason,
                },
                timings,
            ),
            Api::Completions => self.chunk(
                TextChoice {
                    index,
                    text: "",
                    logprobs: None,
                    finish_reason,
                },
                timings,
            ),
        }
    }

    fn usage_chunk(&self) -> Bytes {
        let none: Vec<()> = Vec::new();
        data_frame(&self.head.envelope(
            self.api.chunk_object(),
            none,
            Some(Some(self.usage)),
            self.timings(),
        ))
    }

    fn chunk<C: Serialize>(&self, choice: C, timings: Option<Timings>) -> Bytes {
        let usage = self.include_usage.then_some(None);
        data_frame(
            &self
                .head
                .envelope(self.api.chunk_object(), vec![choice], usage, timings),
        )
    }

    /// Of the first choice: with several, they ran side by side.
    fn timings(&self) -> Option<Timings> {
        let choice = self.choices.first()?;
        Some(Timings::new(choice.complete.as_ref()?, &choice.worker))
    }
}

impl Head {
    fn envelope<C>(
        &self,
        object: &'static str,
        choices: Vec<C>,
        usage: Option<Option<Usage>>,
        timings: Option<Timings>,
    ) -> Envelope<'_, C> {
        Envelope {
            id: &self.id,
            object,
            created: self.created,
            model: &self.model,
            system_fingerprint: self.fingerprint.as_deref(),
            choices,
            usage,
            timings,
        }
    }
}

impl Choice {
    fn finish_reason(&self) -> &'static str {
        self.complete.as_ref().map_or("stop", finish_reason)
    }
}

/// A server-sent event with this JSON.
fn data_frame(value: &impl Serialize) -> Bytes {
    let mut frame = Vec::with_capacity(TYPICAL_FRAME);
    frame.extend_from_slice(b"data: ");
    serde_json::to_writer(&mut frame, value)
        .expect("our own types are JSON and a Vec takes all of it");
    frame.extend_from_slice(b"\n\n");
    frame.into()
}

/// A server-sent event with this text, which has no line break.
fn event_frame(data: &[u8]) -> Bytes {
    [b"data: ", data, b"\n\n"].concat().into()
}

fn json_response(value: &impl Serialize) -> Response {
    let body = serde_json::to_vec(value).expect("our own types are JSON");
    (
        [(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/json"),
        )],
        body,
    )
        .into_response()
}

const TYPICAL_FRAME: usize = 320;
const KEEP_ALIVE: Duration = Duration::from_secs(15);
