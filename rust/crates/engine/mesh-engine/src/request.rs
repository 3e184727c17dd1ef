//! Requests to an engine, the events that answer them, and their errors.

use std::time::{Duration, Instant};

use crate::{SharedGrammar, StageError};

/// A request of a [`Generation`](crate::Generation).
#[derive(Debug, Clone, PartialEq)]
pub enum GenerationRequest {
    /// For text.
    Text(Box<Request>),
    /// For the score of each token but the first, given the tokens before it: one [`Event::Scored`].
    Scores {
        /// Request id, for logs.
        id: String,
        /// The tokens to score.
        tokens: Vec<u32>,
    },
}

impl From<Request> for GenerationRequest {
    fn from(request: Request) -> Self {
        GenerationRequest::Text(Box::new(request))
    }
}

/// A request for text.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// Request id, for the logs of all services.
    pub id: String,
    /// Tokens to continue.
    pub prompt_tokens: Vec<u32>,
    /// Tokens of the answer generated elsewhere, to go on after: they are not reported again.
    pub generated: Vec<u32>,
    /// Bytes of answer text, `echo` included, that the client already has.
    pub text_sent: u64,
    /// Sampling parameters.
    pub params: SamplingParams,
    /// Texts that end the answer and are not part of it.
    pub stop: Vec<String>,
    /// Most tokens of the answer, `generated` included; `None` is as many as the context holds.
    pub max_tokens: Option<u32>,
    /// Time after which the answer is useless; `None` means no limit.
    pub deadline: Option<Instant>,
    /// Text put before the answer, not searched for stop texts.
    pub echo: String,
    /// Go on past tokens that end an answer.
    pub ignore_eos: bool,
    /// Cached rows are shared only between requests with the same salt.
    pub cache_salt: u64,
    /// The grammar that the answer follows.
    pub grammar: Option<SharedGrammar>,
}

impl Request {
    /// A greedy request for at most `max_tokens` tokens after `prompt_tokens`, with everything else left out.
    pub fn greedy(id: impl Into<String>, prompt_tokens: Vec<u32>, max_tokens: u32) -> Self {
        Request {
            id: id.into(),
            prompt_tokens,
            generated: Vec::new(),
            text_sent: 0,
            params: SamplingParams::greedy(),
            stop: Vec::new(),
            max_tokens: Some(max_tokens),
            deadline: None,
            echo: String::new(),
            ignore_eos: false,
            cache_salt: 0,
            grammar: None,
        }
    }
}

/// Parameters for choosing the next token from a row of logits.
///
/// The steps, in order: logit bias, penalties, temperature, top-k, top-p over the result of top-k, min-p, one
/// draw. Log probabilities are those of the model itself, before any of these.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// Divides the logits; 0 is greedy: the largest logit, the lowest id among equals.
    pub temperature: f32,
    /// Keeps the likeliest `top_k` tokens; 0 keeps all.
    pub top_k: u32,
    /// Keeps the fewest likeliest tokens, at least one, that together reach this probability; 1 keeps all.
    pub top_p: f32,
    /// Keeps tokens at least this likely relative to the likeliest; 0 keeps all.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens that occur in the prompt or the answer; 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted from the logits of tokens that occur in the answer; 0 is off.
    pub presence_penalty: f32,
    /// Subtracted once per occurrence in the answer; 0 is off.
    pub frequency_penalty: f32,
    /// With the token's index in the answer, decides every draw.
    pub seed: u64,
    /// Added to the logits of single tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// Alternatives to report with each token's log probability; `None` reports no log probabilities.
    pub logprobs: Option<u32>,
    /// Tokens that end the answer, besides those of the vocabulary. They count even where those are ignored.
    pub stop_token_ids: Vec<u32>,
    /// Tokens before which neither a token nor a stop text ends the answer.
    pub min_tokens: u32,
}

impl SamplingParams {
    /// Greedy sampling: always the likeliest token.
    pub fn greedy() -> Self {
        SamplingParams {
            temperature: 0.0,
            ..SamplingParams::default()
        }
    }
}

impl Default for SamplingParams {
    /// The model's own distribution: temperature 1, nothing cut off, no penalties, seed 0.
    fn default() -> Self {
        SamplingParams {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            seed: 0,
            logit_bias: Vec::new(),
            logprobs: None,
            stop_token_ids: Vec::new(),
            min_tokens: 0,
        }
    }
}

/// An event of a request. [`Event::Done`], [`Event::Scored`] and [`Event::Failed`] are last.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// New tokens, new text or both.
    Tokens(Tokens),
    /// The answer is complete.
    Done(Done),
    /// The scores asked for by [`EngineHandle::score`](crate::EngineHandle::score).
    Scored(Vec<TokenScore>),
    /// There will be no answer.
    Failed(RequestError),
}

impl Event {
    /// True for the request's last event.
    pub fn is_last(&self) -> bool {
        !matches!(self, Event::Tokens(_))
    }
}

/// New tokens of an answer.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Tokens {
    /// Index of the first of `tokens` in the whole answer, [`Request::generated`] included.
    pub index: u32,
    /// Token ids, in order.
    pub tokens: Vec<u32>,
    /// New text, whole characters only; empty while a character or a possible stop text is incomplete.
    pub text: String,
    /// One entry per token if asked for, else empty.
    pub logprobs: Vec<TokenLogprobs>,
}

/// Log probability of a chosen token, with its likeliest alternatives.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprobs {
    /// The token chosen, which `top` need not contain.
    pub chosen: Logprob,
    /// The likeliest tokens, likeliest first.
    pub top: Vec<Logprob>,
}

/// A token and the natural logarithm of its probability.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Logprob {
    /// Token id in the model's vocabulary.
    pub token: u32,
    /// Natural logarithm of its probability under the model.
    pub logprob: f32,
}

/// The end of an answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Done {
    /// Reason for the end.
    pub finish: Finish,
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Tokens of the answer, [`Request::generated`] included.
    pub completion_tokens: u32,
    /// Prompt tokens whose KV rows were found in the cache.
    pub cached_tokens: u32,
    /// From submission to the first token computed here; `None` if none was.
    pub first_token: Option<Duration>,
    /// From submission to the end.
    pub total: Duration,
    /// Text that was held back and is now certain.
    pub text: String,
}

/// Reason for the end of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Finish {
    /// A token that ends answers, or a stop text.
    Stop,
    /// `max_tokens` or the context was reached.
    Length,
}

/// Score of one token of a given text.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenScore {
    /// Natural logarithm of the token's probability, given the tokens before it.
    pub logprob: f32,
    /// The likeliest token in its place.
    pub argmax: u32,
    /// Natural logarithm of that one's probability.
    pub max_logprob: f32,
}

/// Errors that end a request without an answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages name the fields")]
pub enum RequestError {
    /// The prompt has no tokens.
    #[error("the prompt is empty; it needs at least one token")]
    EmptyPrompt,
    /// A token id outside the vocabulary.
    #[error(
        "token id {token} is out of vocabulary: the model has {vocab} tokens. Token ids must be this model's own"
    )]
    NoSuchToken { token: u32, vocab: usize },
    /// The tokens leave no room for an answer.
    #[error(
        "This model's maximum context length is {context} tokens. However, your prompt has {tokens} tokens, which exceeds the available \
         context size or leaves no room for an answer; shorten it"
    )]
    ContextTooLong {
        /// Tokens of the prompt and of the answer so far.
        tokens: u64,
        /// Tokens the context holds: the model's own, or all of the KV memory if that is less.
        context: u32,
    },
    /// A sampling parameter outside its range.
    #[error("{name} is {value}, but must be {range}")]
    InvalidParameter {
        /// Name in the API.
        name: &'static str,
        value: String,
        range: &'static str,
    },
    /// The answer cannot go on under its grammar.
    #[error("the answer cannot go on under its grammar at token {index}: {reason}")]
    Grammar {
        /// Index of the token in the answer.
        index: u32,
        reason: String,
    },
    /// A request that this model cannot serve, in words.
    #[error("{reason}")]
    Invalid { reason: String },
    /// The queue is full.
    #[error("{limit} requests already wait for this engine; try again later")]
    QueueFull { limit: usize },
    /// The request's deadline passed before its answer was complete.
    #[error("the deadline passed with {tokens} tokens of the answer done")]
    DeadlineExceeded { tokens: u32 },
    /// The request's deadline passed before its picture was complete.
    #[error("the deadline passed with {done} of {steps} steps of the picture done")]
    PictureLate { done: u32, steps: u32 },
    /// The engine is draining and refuses new requests.
    #[error("the engine is shutting down and takes no new requests")]
    Draining,
    /// A row of logits has no finite number.
    #[error("the model gave no finite logit for token {index} of the answer")]
    BadLogits {
        /// Index of the token that was to be chosen.
        index: u32,
    },
    /// The stage failed the step that the request was in.
    #[error("a step of the engine failed: {0}")]
    Stage(#[from] StageError),
    /// Too few machines are left to run the model.
    #[error("the mesh can no longer run this model: {reason}")]
    RingLost { reason: String },
    /// The model moved to other machines, where the request can continue.
    #[error("the model has moved: {reason}")]
    Moved { reason: String },
    /// The engine's thread is gone.
    #[error("the engine stopped: {reason}; restart the worker")]
    EngineDead { reason: String },
}
