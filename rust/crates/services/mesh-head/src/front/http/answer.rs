//! From the events of tasks to the answers of the API: gathered into one body, or streamed as they come.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use futures::stream::{self, SelectAll, Stream, StreamExt};
use mesh_api::{
    ChatChoice, ChatChunkChoice, ChatDelta, ChatLogprobs, ChatResponseMessage, CompletionChoice,
    CompletionLogprobs, CompletionUsage, Envelope, Timings,
};
use mesh_control::placement::Placed;
use mesh_control::request::{Complete, Delta};
use mesh_proto::{RequestPhase, TokenLogprob};
use serde::Serialize;
use tokio::time::{Instant, timeout_at};
use tokio_stream::wrappers::UnboundedReceiverStream;

use super::error::ApiError;
use super::hold::counted;
use super::keys::Pass;
use crate::api::generate::{Api, Asked};
use crate::api::wire::{
    Place, add_usage, chat_logprobs, completion_logprobs, finish_reason, system_fingerprint,
    timings,
};
use crate::flight::event::{Event, FOR_ROOM, words};
use crate::ids;

/// The events of all choices of one request, each with its index.
pub(super) type Events = SelectAll<stream::BoxStream<'static, (usize, Event)>>;

/// One request on its way to its answers.
pub(super) struct Answering {
    id: String,
    created: u64,
    model: String,
    fingerprint: Option<String>,
    api: Api,
    wants_logprobs: bool,
    include_usage: bool,
    answers_per_prompt: usize,
    events: Events,
    choices: Vec<Choice>,
    usage: CompletionUsage,
    /// The cause of a choice's wait, in words.
    waits: String,
    /// The chunks that name the role were made.
    has_roles: bool,
    keep_alive: Duration,
    sent: Instant,
    /// Counts against the client's limit until the answer is over.
    pass: Pass,
}

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
        Self {
            id: ids::fresh(asked.api.id_prefix()),
            created,
            model: asked.model.clone().unwrap_or_default(),
            fingerprint: None,
            api: asked.api,
            wants_logprobs: asked.params.logprobs.is_some(),
            include_usage: asked.include_usage,
            answers_per_prompt: asked.choices as usize,
            events: stream::select_all(numbered),
            choices,
            usage: CompletionUsage::default(),
            waits: String::new(),
            has_roles: false,
            keep_alive: GRACE,
            sent: Instant::now(),
            pass,
        }
    }

    /// Waits for all answers and puts them into one body.
    ///
    /// # Errors
    /// The first failure of any of them.
    pub(super) async fn gather(mut self) -> Result<Bytes, ApiError> {
        while let Some((index, event)) = self.next().await {
            if let Event::Delta(delta) = event? {
                let choice = &mut self.choices[index];
                choice.text += &delta.text;
                choice.logprobs.extend(delta.logprobs);
            }
        }
        let lease = self.pass.take_lease();
        let choices = self.choices.iter().enumerate();
        let body = match self.api {
            Api::Chat => self.whole(choices.map(|(index, choice)| ChatChoice {
                index,
                finish_reason: choice.finish_reason().into(),
                logprobs: self.chat_logprobs(&choice.logprobs),
                message: ChatResponseMessage {
                    role: "assistant".into(),
                    content: choice.text.as_str().into(),
                    refusal: None,
                },
            })),
            Api::Completions => self.whole(choices.map(|(index, choice)| CompletionChoice {
                index,
                finish_reason: Some(choice.finish_reason().into()),
                logprobs: self.completion_logprobs(&choice.logprobs, &mut Place::default()),
                text: choice.text.as_str().into(),
            })),
        };
        Ok(match lease {
            Some(lease) => counted(body, lease),
            None => body.into(),
        })
    }

    fn whole<C: Serialize>(&self, choices: impl Iterator<Item = C>) -> Vec<u8> {
        let (object, usage) = (self.api.object(), Some(Some(self.usage)));
        let answer = self.envelope(object, choices.collect(), usage, self.timings());
        serde_json::to_vec(&answer).expect("our own types are JSON")
    }

    /// Answers with a stream of server-sent events, as soon as the request is accepted: a worker has taken it
    /// in, or nothing was against it for a moment. Until then a failure has its own HTTP status. While there
    /// is nothing else to send, a comment every `keep_alive` says that the request lives, and gives the cause
    /// of its wait.
    ///
    /// # Errors
    /// A failure that is known at once.
    pub(super) async fn stream(mut self, keep_alive: Duration) -> Result<Response, ApiError> {
        let mut frames = VecDeque::new();
        let patience = Instant::now() + GRACE;
        loop {
            let Ok(first) = timeout_at(patience, self.next()).await else {
                frames.push_back(self.comment());
                break;
            };
            let Some((index, event)) = first else { break };
            let event = event?;
            let taken_in = match &event {
                Event::Waits(progress) => progress.phase() > RequestPhase::Preparing,
                Event::Queued | Event::Placed(_) => false,
                _ => true,
            };
            self.frames_of(index, event, &mut frames);
            if taken_in {
                if frames.is_empty() {
                    frames.push_back(self.comment());
                }
                break;
            }
        }
        self.keep_alive = keep_alive;
        let mut response = Body::from_stream(self.into_frames(frames)).into_response();
        let headers = response.headers_mut();
        let kind = HeaderValue::from_static("text/event-stream; charset=utf-8");
        headers.insert(header::CONTENT_TYPE, kind);
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        // nginx would hold tokens back.
        headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
        Ok(response)
    }

    /// The next piece or end of an answer, or that a worker has it. After a failure nothing more comes.
    async fn next(&mut self) -> Option<(usize, Result<Event, ApiError>)> {
        loop {
            let (index, event) = self.events.next().await?;
            match event {
                Event::Placed(placed) => {
                    self.placed(index, &placed);
                    return Some((index, Ok(Event::Placed(placed))));
                }
                Event::Queued => self.waits = FOR_ROOM.to_owned(),
                Event::Waits(progress) => {
                    self.waits = words(&progress);
                    return Some((index, Ok(Event::Waits(progress))));
                }
                Event::Failed(error) => {
                    // The other choices are of no use without this one.
                    self.events = stream::select_all(Vec::new());
                    return Some((index, Err(ApiError::from(&error))));
                }
                Event::Complete(mut complete) => {
                    let first_of_prompt = index.is_multiple_of(self.answers_per_prompt);
                    add_usage(&mut self.usage, &complete, first_of_prompt);
                    let text = std::mem::take(&mut complete.done.text);
                    let choice = &mut self.choices[index];
                    choice.text += &text;
                    choice.complete = Some(complete.clone());
                    complete.done.text = text;
                    return Some((index, Ok(Event::Complete(complete))));
                }
                // A plain task is answered in one piece.
                Event::Whole(bytes) => {
                    let text = String::from_utf8_lossy(&bytes).into_owned();
                    let delta = Delta {
                        text,
                        ..Delta::default()
                    };
                    return Some((index, Ok(Event::Delta(delta))));
                }
                // Steps are those of images.
                Event::Stepped { .. } => {}
                event @ Event::Delta(_) => {
                    "for the next token".clone_into(&mut self.waits);
                    return Some((index, Ok(event)));
                }
            }
        }
    }

    fn placed(&mut self, index: usize, placed: &Placed) {
        placed.name.clone_into(&mut self.choices[index].worker);
        if self.fingerprint.is_none() {
            self.fingerprint = system_fingerprint(&placed.fingerprint);
        }
        if self.model.is_empty() {
            placed.model.clone_into(&mut self.model);
        }
    }

    fn into_frames(
        self,
        first: VecDeque<Bytes>,
    ) -> impl Stream<Item = Result<Bytes, Infallible>> + Send + 'static {
        stream::unfold(
            (Some(self), first),
            |(mut answering, mut frames): (Option<Self>, VecDeque<Bytes>)| async move {
                loop {
                    if let Some(frame) = frames.pop_front() {
                        if let Some(this) = &mut answering {
                            this.sent = Instant::now();
                        }
                        return Some((Ok(frame), (answering, frames)));
                    }
                    let mut this = answering.take()?;
                    let quiet = this.sent + this.keep_alive;
                    match timeout_at(quiet, this.next()).await {
                        Err(_) => frames.push_back(this.comment()),
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
        let model_known = !matches!(event, Event::Queued | Event::Waits(_));
        if model_known && self.api == Api::Chat && !std::mem::replace(&mut self.has_roles, true) {
            for index in 0..self.choices.len() {
                frames.push_back(self.role_chunk(index));
            }
        }
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
            Event::Whole(_)
            | Event::Queued
            | Event::Placed(_)
            | Event::Waits(_)
            | Event::Stepped { .. }
            | Event::Failed(_) => {}
        }
    }

    /// A comment, which clients skip and proxies count as life.
    fn comment(&self) -> Bytes {
        format!(": waiting {}\n\n", self.waits).into()
    }

    fn role_chunk(&self, index: usize) -> Bytes {
        let delta = ChatDelta {
            role: Some("assistant".into()),
            content: Some("".into()),
        };
        let choice = ChatChunkChoice {
            index,
            delta,
            ..ChatChunkChoice::default()
        };
        self.chunk(choice, None)
    }

    fn text_chunk(&mut self, index: usize, text: &str, logprobs: &[TokenLogprob]) -> Bytes {
        if self.api == Api::Completions {
            let mut place = std::mem::take(&mut self.choices[index].place);
            let logprobs = self.completion_logprobs(logprobs, &mut place);
            self.choices[index].place = place;
            let choice = CompletionChoice {
                index,
                text: text.into(),
                logprobs,
                finish_reason: None,
            };
            return self.chunk(choice, None);
        }
        let delta = ChatDelta {
            role: None,
            content: Some(text.into()),
        };
        let choice = ChatChunkChoice {
            index,
            delta,
            logprobs: self.chat_logprobs(logprobs),
            finish_reason: None,
        };
        self.chunk(choice, None)
    }

    fn last_chunk(&self, index: usize, complete: &Complete) -> Bytes {
        let finish_reason = Some(finish_reason(complete).into());
        let timings = Some(timings(complete, &self.choices[index].worker));
        if self.api == Api::Completions {
            let choice = CompletionChoice {
                index,
                finish_reason,
                ..CompletionChoice::default()
            };
            return self.chunk(choice, timings);
        }
        let choice = ChatChunkChoice {
            index,
            finish_reason,
            ..ChatChunkChoice::default()
        };
        self.chunk(choice, timings)
    }

    fn usage_chunk(&self) -> Bytes {
        let (object, usage) = (self.api.chunk_object(), Some(Some(self.usage)));
        data_frame(&self.envelope::<()>(object, Vec::new(), usage, self.timings()))
    }

    fn chunk<C: Serialize>(&self, choice: C, timings: Option<Timings>) -> Bytes {
        let (object, usage) = (self.api.chunk_object(), self.include_usage.then_some(None));
        data_frame(&self.envelope(object, vec![choice], usage, timings))
    }

    fn chat_logprobs(&self, logprobs: &[TokenLogprob]) -> Option<ChatLogprobs> {
        self.wants_logprobs.then(|| chat_logprobs(logprobs))
    }

    fn completion_logprobs(
        &self,
        logprobs: &[TokenLogprob],
        place: &mut Place,
    ) -> Option<CompletionLogprobs> {
        let wanted = self.wants_logprobs;
        wanted.then(|| completion_logprobs(logprobs, place))
    }

    /// Of the first choice: with several, they ran side by side.
    fn timings(&self) -> Option<Timings> {
        let choice = self.choices.first()?;
        Some(timings(choice.complete.as_ref()?, &choice.worker))
    }

    fn envelope<C>(
        &self,
        object: &'static str,
        choices: Vec<C>,
        usage: Option<Option<CompletionUsage>>,
        timings: Option<Timings>,
    ) -> Envelope<'_, C> {
        Envelope {
            id: self.id.as_str().into(),
            object: object.into(),
            created: self.created,
            model: self.model.as_str().into(),
            system_fingerprint: self.fingerprint.as_deref().map(Into::into),
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

const TYPICAL_FRAME: usize = 320;
/// Time for which a streamed request may be refused with an HTTP status of its own.
pub(super) const GRACE: Duration = Duration::from_millis(400);
