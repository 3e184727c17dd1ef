//! A worker as the head knows it.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use dcf::Version;
use mesh_proto::{Load, ModelKind};

use super::clock::TokenClock;
use super::served::{RETRY, ServedModel};

/// Names a worker within this head's life; never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WorkerId(pub u64);

/// Transport between the head and a worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Carrier {
    /// Over its QUIC link; the node id is the SHA-256 of its public key.
    Mesh {
        /// Node id, lower-case hexadecimal.
        node_id: String,
    },
    /// Plain DCF over UDP: the worker has no identity.
    Plain {
        /// The version of its last heartbeat, in which it gets its tasks.
        version: Version,
    },
}

/// A worker as the head knows it.
#[derive(Debug, Clone)]
pub struct Worker {
    /// Its name within this head.
    pub id: WorkerId,
    /// Name a person knows it by.
    pub name: String,
    /// Transport to the worker.
    pub carrier: Carrier,
    /// Remote address of the link, or the address where a worker without an identity takes
    /// tasks.
    pub address: SocketAddr,
    /// The lead of its clock over this head's, in seconds, by the timestamps of its messages; 0 while that is
    /// unknown.
    pub clock_offset: f64,
    /// Program version; empty if it is unknown.
    pub version: String,
    /// Models that it serves; empty for a worker without an identity, which serves plain tasks.
    pub models: Vec<ServedModel>,
    /// Purposes that it is reserved for; empty means any.
    pub reserved_for: Vec<String>,
    /// The fields of a request that it acts upon: [`Hello::request_revision`].
    pub request_revision: u32,
    /// Its last load report.
    pub load: Load,
    /// Time at which a report last differed from the one before in a field that only a working engine
    /// changes.
    pub load_changed: Instant,
    /// Time since which its reports say that requests wait there, without a break.
    pub queues_since: Option<Instant>,
    /// It finishes its running requests and takes no new ones: it drains by itself, or an operator drains it.
    pub draining: bool,
    /// An operator drains it.
    pub drained: bool,
    /// It said busy: nothing new before this moment.
    pub busy_until: Option<Instant>,
    /// Time at which it joined.
    pub joined: Instant,
    /// Last sign of life.
    pub last_seen: Instant,
    /// Time at which a token last came back from it.
    pub last_success: Option<Instant>,
    /// True if the last attempt on it, probes included, brought an answer.
    pub proven: bool,
    /// Requests of this head that run on it.
    pub assigned: u32,
    /// Those of them whose first token has not come yet.
    pub unstarted: u32,
    /// End of the time in which one of those, which is suspected of the death of another worker, has this
    /// worker for itself.
    pub alone: Option<Instant>,
    /// A suspect waits for it: no newcomers before this moment.
    pub reserved_until: Option<Instant>,
    /// Prompt tokens of those whose first token has not come yet.
    pub prefilling: u64,
    /// Number of answers that it completed.
    pub completed: u64,
    /// Attempts that failed on it.
    pub failed: u64,
    /// Seconds that a request takes on it, smoothed; 0 is unknown.
    pub task_seconds: f64,
    /// Value of the router's counter at the last assignment: the tie break.
    pub last_turn: u64,
    /// Time at which it last named models that it did not serve before.
    pub(super) new_models_at: Option<Instant>,
    /// Time of the last token from it.
    pub tokens_seen: TokenClock,
}

impl Worker {
    /// Requests that hold or wait for a slot, by whichever count is larger: its report is up to 250 ms old,
    /// and other heads may use it too.
    pub(crate) fn active(&self) -> u32 {
        let reported = self.load.running.saturating_add(self.load.queued);
        self.assigned.max(reported)
    }

    /// The model of that name, if it serves it; its first one that makes text for a request that names none.
    pub fn model(&self, name: &str) -> Option<&ServedModel> {
        let is_meant = |model: &&ServedModel| {
            if name.is_empty() {
                model.card.kind() == ModelKind::Chat
            } else {
                model.card.name == name
            }
        };
        self.models.iter().find(is_meant)
    }

    /// The model of exactly that name, to change.
    pub fn model_mut(&mut self, name: &str) -> Option<&mut ServedModel> {
        self.models.iter_mut().find(|model| model.card.name == name)
    }

    /// Returns true if it may be used for such models, by its `reserved_for`.
    pub(crate) fn is_for(&self, kind: ModelKind) -> bool {
        let purpose = match kind {
            ModelKind::Chat => "chat",
            ModelKind::Embed => "embeddings",
            ModelKind::Image => "images",
        };
        self.reserved_for.is_empty() || self.reserved_for.iter().any(|kept| kept == purpose)
    }

    /// A token was asked of one of its models at `asked`, and came or did not come.
    pub fn probed(&mut self, name: &str, came: bool, asked: Instant, now: Instant) {
        let Some(model) = self.model_mut(name) else {
            return;
        };
        if came {
            model.succeeded(now);
            self.last_success = Some(now);
        } else if model.last_token().is_none_or(|at| at < asked) {
            // A real answer meanwhile is a proof, too.
            model.failed(now);
            let wait = RETRY.saturating_mul(1 << model.unanswered.min(16));
            model.unanswered = model.unanswered.saturating_add(1);
            model.retry_at = Some(now + wait.min(LONGEST_RETRY));
        }
        self.proven = self.models.iter().all(|model| model.proven);
    }

    /// The name under which its faults are kept: its node id, or its address if it has none.
    pub fn key(&self) -> String {
        match &self.carrier {
            Carrier::Mesh { node_id } => node_id.clone(),
            Carrier::Plain { .. } => self.address.to_string(),
        }
    }

    /// True if a token came from it within this time, for any request of this head.
    pub(crate) fn made_a_token(&self, within: Duration, now: Instant) -> bool {
        let last = self.tokens_seen.last();
        last.is_some_and(|at| now.saturating_duration_since(at) < within)
    }

    /// True if more requests for this model than `ahead` wait there, and not just for the next step.
    pub fn queues(&self, model: &str, ahead: u32, now: Instant) -> bool {
        let meant = self.model(model);
        // Requests for vectors and images wait for their turn, not for memory.
        if meant.is_some_and(|model| model.card.kind() != ModelKind::Chat) {
            return false;
        }
        let own = meant.and_then(|model| {
            let mut speeds = self.load.speeds.iter();
            speeds.find(|speed| speed.name == model.card.name)?.queued
        });
        let long = |since| now.saturating_duration_since(since) >= QUEUES_LONG;
        own.unwrap_or(self.load.queued) > ahead && self.queues_since.is_some_and(long)
    }

    /// True if its reports say that it works and that requests wait there: one without a token may be among
    /// those. Reports alone are not believed for longer than `proof`: tokens must come from it, for any
    /// request.
    pub fn is_busy(&self, within: Duration, proof: Duration, now: Instant) -> bool {
        self.load.queued > 0
            && now.saturating_duration_since(self.load_changed) < within
            && self.made_a_token(proof, now)
    }

    /// A request for this model showed that the engine gets on.
    pub fn gave_sign(&mut self, name: &str, now: Instant) {
        if let Some(model) = self.model_mut(name) {
            model.last_sign = Some(now);
        }
    }

    /// Its node id; `None` for a worker without an identity.
    pub fn node_id(&self) -> Option<&str> {
        match &self.carrier {
            Carrier::Mesh { node_id } => Some(node_id),
            Carrier::Plain { .. } => None,
        }
    }

    /// True if it has an identity, as all workers of the mesh have. Others are never preferred to those.
    pub fn has_identity(&self) -> bool {
        self.node_id().is_some()
    }
}

/// Least wait of requests at a worker that is more than a wait for its next step.
const QUEUES_LONG: Duration = Duration::from_millis(500);

const LONGEST_RETRY: Duration = Duration::from_secs(30);

/// Returns true if a worker takes requests of the kind that this model answers. The driver of a ring answers
/// until the ring has moved away from it.
pub(super) fn is_available(worker: &Worker, model: &ServedModel) -> bool {
    (!worker.draining || model.ring.is_some()) && worker.is_for(model.card.kind())
}
