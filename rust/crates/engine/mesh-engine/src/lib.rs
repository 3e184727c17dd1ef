//! The stage trait, the sampler, the batching scheduler and the text pipeline.
//!
//! From the bottom up: a [`Stage`] is a loaded range of layers with its KV cache. The [`sampler`] turns a row of logits
//! into a token, [`text`] turns tokens into text up to a stop text. The [`scheduler`] decides which rows of which
//! requests a step computes; it does no I/O and reads no clock. An [`Engine`] is the thread that owns a stage and a
//! scheduler, or of another [`Runner`] of steps and a scheduler; an [`EngineHandle`] submits requests to it from anywhere.
//! Embedding models have their own trait and thread, in [`embed`].

#![forbid(unsafe_code)]

pub mod embed;
mod engine;
mod request;
mod runner;
pub mod sampler;
pub mod scheduler;
mod stage;
#[cfg(test)]
mod testing;
pub mod text;
mod vocabulary;

pub use embed::{EmbedEngine, EmbedHandle, EmbedReply, EmbedRequest, Encoder, EncoderInfo};
pub use engine::{Engine, EngineHandle, RequestStream, StartError, Waker};
pub use request::{
    Done, Event, Finish, Logprob, Request, RequestError, SamplingParams, TokenLogprobs, TokenScore,
    Tokens,
};
pub use runner::{Outcome, Runner, apply};
pub use scheduler::{Load, RequestStatus, SchedulerConfig, Totals};
pub use stage::{
    LogitRows, ModelShape, Segment, SlotId, Stage, StageError, StageInfo, StageInput, StageOutput,
};
pub use vocabulary::Vocabulary;
