//! The interface between the attempt loop and a kind of work.

use std::time::Instant;

use mesh_control::placement::Placed;
use mesh_control::request::{Bounds, Failure, Lifecycle, Resume, Step};

use super::event::Event;
use crate::mesh::connection::{FromWorker, WorkerRequest};

/// A kind of work: how a request is put to a worker, and how the worker's messages are read.
///
/// The codec keeps what has come so far where the answer's core does not: [`Lifecycle`] has the tokens of a text.
/// So a request is always put with what is there already, and another worker goes on after it.
pub(super) trait Codec: Send {
    /// Failure of a worker that ends its stream too early, in words for the log.
    const ENDED_EARLY: &'static str;

    /// The work brings tokens as it proceeds. Without them its end counts as its first token.
    const HAS_TOKENS: bool;

    /// Id of the request in the logs of all services.
    fn id(&self) -> &str;

    /// The request for one attempt: what is left of it.
    fn request(&self, start: &AttemptTerms<'_>) -> WorkerRequest;

    /// Most payload bytes of one message of the worker.
    fn message_bytes(&self, bounds: &Bounds) -> usize;

    /// Takes in a message of this kind of work, and lets the core decide on it. `None` means that this
    /// version does not know the message.
    fn read(
        &mut self,
        incoming: FromWorker,
        attempt: u32,
        answer: &mut Lifecycle,
        now: Instant,
    ) -> Option<Step>;

    /// Looks at a worker's failure before the core does. The work so far may be the cause.
    fn failed(&mut self, _attempt: u32, failure: Failure) -> Failure {
        failure
    }

    /// Returns true if only the same weights may go on with what has come so far.
    fn has_begun(&self, answer: &Lifecycle) -> bool {
        answer.has_begun()
    }

    /// Something that the front end may show while the work is not done.
    fn tell(&mut self, _: Event) {}

    /// Logs that another worker goes on after this one failed.
    fn log_rerun(&self, worker: &str, answer: &Lifecycle);
}

pub(super) struct AttemptTerms<'a> {
    pub placed: &'a Placed,
    pub answer: &'a Lifecycle,
    /// Name of the attempt, and the text that the client has.
    pub resume: Resume,
    /// Milliseconds that the worker may spend; 0 is without limit.
    pub deadline_ms: u64,
    /// Interval at which the worker is to say that the request lives.
    pub progress_ms: u32,
}
