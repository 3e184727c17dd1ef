//! Engines: the stage trait, the sampler, the batching schedulers, the text pipeline, and the thread that runs them.
//!
//! From the bottom up: a [`Stage`] is a loaded range of layers with its KV cache. The [`sampler`] turns a row of logits
//! into a token, [`text`] turns tokens into text up to a stop text. The [`scheduler`] decides which rows of which
//! requests a step computes; it does no I/O and reads no clock.
//!
//! An [`Engine`] is a thread that does one kind of work; an [`EngineHandle`] submits requests to it from anywhere. Queueing,
//! batching steps, cancelling, draining, load, silence and death are the same for all kinds. A kind is an implementation of
//! [`Workload`], and a new kind needs nothing else here. There are two: [`Generation`], which owns a scheduler with a stage or
//! another [`Runner`] of steps, and [`Embedding`], which owns an encoder and its scheduler ([`embed`]).

#![forbid(unsafe_code)]

// For `testing`, which the tests of another crate include.
#[cfg(test)]
extern crate self as mesh_engine;

mod constraint;
pub mod embed;
mod engine;
mod generation;
mod request;
mod runner;
pub mod sampler;
pub mod scheduler;
mod stage;
#[cfg(test)]
mod testing;
pub mod text;
mod vocabulary;
mod workload;

pub use constraint::{Allowed, Constraint, ConstraintError, Grammar, SharedGrammar, TokenSet};
pub use embed::{EmbedRequest, Embedding, Encoder, EncoderInfo};
pub use engine::{Engine, EngineHandle, RequestStream, StartError, Waker};
pub use generation::Generation;
pub use request::{
    Done, Event, Finish, GenerationRequest, Logprob, Request, RequestError, SamplingParams,
    TokenLogprobs, TokenScore, Tokens,
};
pub use runner::{Outcome, Runner, apply};
pub use scheduler::SchedulerConfig;
pub use stage::{
    LogitRows, ModelShape, Segment, SlotId, Stage, StageError, StageInfo, StageInput, StageOutput,
};
pub use vocabulary::Vocabulary;
pub use workload::{Load, RequestKey, RequestStatus, Schedule, StepOutcome, Totals, Workload};
