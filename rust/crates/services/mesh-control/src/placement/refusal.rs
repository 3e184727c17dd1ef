//! Reasons for which a request gets no worker.

use crate::fair::Source;

/// A request gets no worker.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Its source has its share of the queue, or more, and the queue is full.
    #[error(
        "all workers are busy and {yours} requests of {} wait already: that is its share of the {limit} places in the queue among \
         {sources} {}; wait for one of them to end, or add workers",
        whose.origin,
        if *sources == 1 { "source" } else { "sources" }
    )]
    QueueFull {
        /// Most requests that may wait.
        limit: usize,
        /// The source of the request.
        whose: Source,
        /// Requests of that source that wait.
        yours: usize,
        /// Sources that share the queue.
        sources: usize,
    },
    /// The model is known but no worker serves it now, or no worker is connected at all.
    #[error(
        "no worker is connected{}; start one, or wait for it to join",
        serving(model)
    )]
    NoWorker {
        /// The model asked for.
        model: String,
    },
    /// Workers offer layers of the model, and together they cannot hold it.
    #[error("the model {model:?} cannot be served now: {reason}")]
    NoRing {
        /// The model asked for.
        model: String,
        /// Reason for which the offers are not enough.
        reason: String,
    },
    /// Workers serve the model, but would ignore fields of the request.
    #[error(
        "the workers that serve {model:?} are of an older version and would ignore {}; update them, or leave that out",
        mesh_proto::REVISED_FIELDS
    )]
    TooOld {
        /// The model asked for.
        model: String,
    },
    /// No worker that serves the model has a context for so long a prompt.
    #[error(
        "This model's maximum context length is {context} tokens. However, your prompt has at least {least} tokens, which exceeds the available context size; shorten it"
    )]
    TooLong {
        /// The largest context among them.
        context: u32,
        /// Tokens that the prompt has at least.
        least: u64,
    },
    /// Workers claim to serve the model, and none of them has shown that it does.
    #[error(
        "no worker answers for {model:?} now: {why}; ask again in a moment, and see `hydramesh status`"
    )]
    NoneAnswers {
        /// The model asked for.
        model: String,
        /// The workers that claim to serve it, each with the reason why it does not.
        why: String,
    },
    /// No worker serves a model of this name.
    #[error("the model {model:?} does not exist; GET /v1/models lists those that do")]
    UnknownModel {
        /// The model asked for.
        model: String,
    },
}

fn serving(model: &str) -> String {
    if model.is_empty() {
        String::new()
    } else {
        format!(" that serves {model:?}")
    }
}
