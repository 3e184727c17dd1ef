//! The interface between the kinds of work and the mechanism that serves them all.
//!
//! Everything about a request that is the same for all kinds is written once: `answer` reads it from its
//! stream, prepares it, follows the engine and answers; `host` keeps the models. A kind is a
//! [`mesh_engine::Workload`] with a [`Codec`] and a function that loads its models; a new kind needs nothing
//! else. `generate`, `embed` and `image` are those that exist.

use std::time::{Duration, Instant};

use bytes::Bytes;
use dcf::{ErrorCode, Message, MsgType};
use mesh_engine::{EngineHandle, Generation, Load, RequestError, Workload};
use mesh_net::quic::timestamp_us;
use tokio::task::JoinError;

use crate::config::SamplingDefaults;
use crate::preparations;
use crate::templates::{TemplateError, Templates};

/// Translates the head's messages for one kind of work to an engine's requests, and its events to messages.
///
/// The steps of a request, in order: [`check`](Self::check), a wait for a permit by its
/// [`bytes`](Self::bytes), [`write`](Self::write), [`request`](Self::request), the engine, and
/// [`encode`](Self::encode) for each event.
pub(crate) trait Codec: Workload {
    /// Type of the message that begins a request.
    const TASK: MsgType;
    /// The work goes before that of images.
    const PRECEDES: bool = true;
    /// A model of this kind, with its article, for errors.
    const MODEL: &'static str;

    /// Body of the message that begins a request.
    type Task: prost::Message + Default;
    /// Needed to prepare requests: the tokenizer, the templates.
    type Model: Clone + Send + Sync + 'static;
    /// A task whose prompt is written.
    type Written: Send + 'static;
    /// Needed to encode the events of one request.
    type Reply: Send + 'static;

    fn header(task: &Self::Task) -> TaskHeader<'_>;

    /// Refuses a task before anything is made of it.
    fn check(model: &ModelEngine<Self>, task: &Self::Task) -> Result<(), PrepareError>;

    /// Bytes of a task's prompt, which bound the memory that preparing it takes.
    fn bytes(task: &Self::Task) -> usize;

    /// Bytes that follow the task in parts.
    fn upload_bytes(_: &Self::Task) -> usize {
        0
    }

    /// Adds them to a task whose prompt is written.
    fn with_upload(_: &mut Self::Written, _: Bytes) {}

    /// Writes the prompt as the model's template says, if the kind has templates.
    fn write(
        model: &ModelEngine<Self>,
        templates: &Templates,
        task: Self::Task,
    ) -> impl Future<Output = Result<Self::Written, PrepareError>> + Send;

    /// Makes the engine's request of a task that arrived at `arrived`. Blocks: a long prompt takes
    /// milliseconds to tokenise.
    fn request(
        model: &ModelEngine<Self>,
        defaults: &SamplingDefaults,
        written: Self::Written,
        arrived: Instant,
    ) -> Result<(Self::Request, Self::Reply), PrepareError>;

    /// Types and bodies of the messages for an event, or the error that it reports.
    fn encode(
        reply: &Self::Reply,
        event: Self::Event,
    ) -> impl Future<Output = Result<Bodies, RequestError>> + Send;

    /// Work in progress and speeds, in tokens a second, for the head.
    fn load(engine: &EngineHandle<Self>) -> Load {
        engine.load()
    }

    /// Most rows of an engine's step.
    fn max_rows(info: &Self::Info) -> usize;

    /// A ring's model as one of this kind. Rings generate.
    fn of_ring(_: ModelEngine<Generation>) -> Option<ModelEngine<Self>> {
        None
    }
}

/// Messages of one event in their order, each with its type.
pub(crate) type Bodies = Vec<(MsgType, Vec<u8>)>;

pub(crate) struct TaskHeader<'a> {
    /// Request id, for logs.
    pub(crate) id: &'a str,
    /// Name of the model; empty means any.
    pub(crate) model: &'a str,
    /// Interval of signs of life in milliseconds; 0 means none.
    pub(crate) progress_ms: u32,
}

pub(crate) struct ModelEngine<W: Codec = Generation> {
    pub(crate) model: W::Model,
    pub(crate) engine: EngineHandle<W>,
}

impl<W: Codec> Clone for ModelEngine<W> {
    fn clone(&self) -> Self {
        ModelEngine {
            model: self.model.clone(),
            engine: self.engine.clone(),
        }
    }
}

/// Reasons for which a task is refused before it reaches an engine.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PrepareError {
    #[error("this worker does not serve {kind} called {name:?}")]
    UnknownModel { kind: &'static str, name: String },
    #[error(transparent)]
    Template(#[from] TemplateError),
    #[error(
        "This model's maximum context length is {context} tokens. However, your prompt has more than {context} tokens, which exceeds the available context size; shorten it"
    )]
    TooLong { context: u32 },
    #[error(transparent)]
    Full(#[from] preparations::Full),
    /// A fault of the task itself.
    #[error("{0}")]
    Invalid(String),
    #[error("the request could not be prepared: {0}")]
    Failed(#[from] JoinError),
}

impl PrepareError {
    pub(crate) fn code(&self) -> ErrorCode {
        match self {
            PrepareError::UnknownModel { .. } => ErrorCode::UNKNOWN_MODEL,
            PrepareError::Failed(_) => ErrorCode::INTERNAL,
            PrepareError::TooLong { .. } => ErrorCode::CONTEXT_TOO_LONG,
            PrepareError::Full(_) => ErrorCode::WORKER_BUSY,
            PrepareError::Template(error) if error.is_internal() => ErrorCode::INTERNAL,
            PrepareError::Template(_) | PrepareError::Invalid(_) => ErrorCode::INVALID_PAYLOAD,
        }
    }
}

/// A message with this body that belongs to no request.
pub(crate) fn message(kind: MsgType, body: &impl prost::Message) -> Message {
    Message::new(kind, 0, timestamp_us(), body.encode_to_vec())
}

/// Code of a request's error on the wire.
pub(crate) fn code(error: &RequestError) -> ErrorCode {
    match error {
        RequestError::EmptyPrompt
        | RequestError::NoSuchToken { .. }
        | RequestError::InvalidParameter { .. }
        | RequestError::Grammar { .. }
        | RequestError::Invalid { .. } => ErrorCode::INVALID_PAYLOAD,
        RequestError::ContextTooLong { .. } => ErrorCode::CONTEXT_TOO_LONG,
        RequestError::QueueFull { .. } => ErrorCode::WORKER_BUSY,
        RequestError::DeadlineExceeded { .. } | RequestError::PictureLate { .. } => {
            ErrorCode::TIMEOUT
        }
        RequestError::Draining | RequestError::Moved { .. } => ErrorCode::DRAINING,
        RequestError::RingLost { .. } => ErrorCode::NO_WORKERS,
        _ => ErrorCode::INFERENCE_FAILED,
    }
}

/// The time at which a task is late; 0 milliseconds mean no limit.
pub(crate) fn deadline(arrived: Instant, deadline_ms: u64) -> Option<Instant> {
    (deadline_ms > 0)
        .then(|| arrived.checked_add(Duration::from_millis(deadline_ms)))
        .flatten()
}
