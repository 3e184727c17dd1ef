//! The interface between an engine's thread and the kind of work that it does.

use std::time::Instant;

use crate::{RequestError, StageError};

/// Identifies a request within one engine.
pub type RequestKey = u64;

/// A kind of work, with the state of one engine: its scheduler and the model that computes steps.
///
/// The thread passes requests to the scheduler, begins and polls steps for as long as there are any, and hands
/// out the events. All methods run on one thread at a time; only [`poll`](Self::poll) may take long.
pub trait Workload: Send + Sized + 'static {
    /// A request.
    type Request: Send;
    /// An event of a request.
    type Event: Send;
    /// Shape and limits of the model.
    type Info: Clone + Send + Sync;
    /// Decides which requests a step computes.
    type Scheduler: Schedule<Request = Self::Request, Event = Self::Event>;

    /// Name of several steps, for errors.
    const STEPS: &'static str = "steps";

    /// True if a step may take so long that the load has to be published when one begins. The load is
    /// published anyway when a request comes and when a step is through.
    const LONG_STEPS: bool = false;

    /// Shape and limits of the model, which stay the same.
    fn info(&self) -> &Self::Info;

    /// The requests in progress.
    fn scheduler(&mut self) -> &mut Self::Scheduler;

    /// Plans a step and begins it; returns `false` if there is nothing to compute, or no room for another
    /// step. Also ends requests whose deadline has passed.
    fn begin(&mut self, now: Instant) -> bool;

    /// Takes in the next outcome of the steps under way, or computes one.
    fn poll(&mut self, now: Instant) -> StepOutcome;

    /// Time of the next poll if nothing wakes the thread before; `None` means no timer.
    fn next_timer(&self) -> Option<Instant> {
        None
    }

    /// True for a request's last event.
    fn is_last(event: &Self::Event) -> bool;

    /// The last event of a request that fails with `error`.
    fn failed(error: RequestError) -> Self::Event;
}

/// A scheduler, as an engine's thread uses it. It does no I/O and reads no clock.
///
/// Each request ends with exactly one last event, unless it is cancelled.
pub trait Schedule {
    /// A request.
    type Request;
    /// An event of a request.
    type Event;

    /// Queues a request. A refusal is its first and last event.
    fn submit(&mut self, key: RequestKey, request: Self::Request, now: Instant);

    /// Forgets a request, also while a step with it runs: no event of it comes after this.
    fn cancel(&mut self, key: RequestKey);

    /// Refuses new requests from now on.
    fn drain(&mut self);

    /// Ends all requests with `error`.
    fn end_all(&mut self, error: &RequestError);

    /// True if no request is queued or running.
    fn is_idle(&self) -> bool;

    /// The next event, oldest first.
    fn next_event(&mut self) -> Option<(RequestKey, Self::Event)>;

    /// The state of a request; `None` if it has ended or never existed.
    fn status(&self, key: RequestKey) -> Option<RequestStatus>;

    /// Work in progress and measured speed.
    fn load(&self) -> Load;
}

/// A result of [`Workload::poll`].
#[derive(Debug)]
#[allow(missing_docs, reason = "the variants' comments name the fields")]
pub enum StepOutcome {
    /// No step under way has an outcome yet.
    Pending,
    /// A step is through.
    Completed,
    /// A step of so many rows failed, and its requests with it; the others go on.
    Failed { rows: usize, error: StageError },
    /// The steps under way are void; their requests go on.
    Resumed,
    /// Nothing more can be computed; every request ends with this error.
    Ended(RequestError),
}

/// Work in progress of an engine and its measured speed.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Load {
    /// Requests that hold a slot.
    pub running: u32,
    /// Requests that wait for one, preempted ones included.
    pub queued: u32,
    /// KV memory that requests in progress use, in tokens.
    pub kv_tokens_used: u64,
    /// KV memory that they are expected to use, in tokens.
    pub kv_tokens_reserved: u64,
    /// KV memory there is, in tokens.
    pub kv_tokens_total: u64,
    /// Decode speed over all streams at the current batch, tokens per second; 0 is unknown.
    pub decode_tps: f32,
    /// Prefill speed, tokens per second; 0 is unknown.
    pub prefill_tps: f32,
    /// Prompt tokens not yet computed, over all requests.
    pub prefill_backlog: u64,
    /// True if new requests are refused because the engine is to stop.
    pub draining: bool,
    /// Sums since the start.
    pub totals: Totals,
}

/// Sums since the start of an engine.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Totals {
    /// Completed steps.
    pub steps: u64,
    /// Rows that continued answers.
    pub decode_rows: u64,
    /// Rows that computed prompts.
    pub prefill_rows: u64,
    /// Tokens whose KV rows were found in the cache.
    pub reused_tokens: u64,
    /// Requests that ended with an answer.
    pub finished: u64,
    /// Requests that ended with an error.
    pub failed: u64,
    /// Requests that were cancelled.
    pub cancelled: u64,
    /// Number of times that a request gave its KV memory to older ones.
    pub preempted: u64,
}

/// The state of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the variants' comments name the fields")]
pub enum RequestStatus {
    /// It waits for a slot or for KV memory, behind so many requests.
    Queued { ahead: u32 },
    /// Its prompt, or after a preemption its prompt and the answer so far, is being computed: `done` of `total`
    /// tokens are cached or under way.
    Prefilling { done: u32, total: u32 },
    /// Its answer is being generated.
    Decoding,
    /// It gave its KV memory to older requests and waits to go on, behind so many.
    Preempted { ahead: u32 },
}
