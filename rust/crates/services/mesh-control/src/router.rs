//! Chooses the worker that answers a request soonest.
//!
//! Only workers that have answered the head's own question get requests ([`Registry::service`]). For each of
//! them the router estimates the time to the last token from measured speed, load and queue; a conversation
//! whose KV cache a worker holds is cheaper there by the prefill it saves. Workers whose estimates are within
//! 5 % of the best take turns.

use std::time::{Duration, Instant};

use mesh_proto::ModelKind;

use super::affinity::{Affinity, Prefix};
use super::fair::Source;
use super::length::Length;
use super::registry::{Registry, ServedModel, Service, Worker, WorkerId, batch_gain};

/// Requirements of a request on a worker.
#[derive(Debug, Clone, Default)]
pub struct Requirements {
    /// Model name; empty is any model.
    pub model: String,
    /// Output that is wanted: text or vectors.
    pub kind: ModelKind,
    /// Tokens of the prompt, estimated.
    pub prompt_tokens: u32,
    /// Tokens of the answer, estimated.
    pub answer_tokens: u32,
    /// Prefixes of the prompt, shortest first.
    pub prefixes: Vec<Prefix>,
    /// It can be a plain DCF task, which a worker without an identity may take, too.
    pub plain: bool,
    /// Only workers whose model file has this SHA-256: an answer already begun must go on with the same
    /// weights.
    pub fingerprint: Option<String>,
    /// Workers on which this request failed: taken only when there is no other.
    pub avoid: Vec<WorkerId>,
    /// Only workers that act upon all of the request's fields: [`mesh_proto::Generate::revision`].
    pub revision: u32,
    /// The source of the request.
    pub source: Source,
    /// Knowledge of the prompt's length.
    pub length: Length,
    /// Workers died that had this request before its first token: no other may share its fate.
    pub alone: bool,
}

/// The router's decision on a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    /// This worker, with the expected times.
    Worker(WorkerId, Estimate),
    /// There are workers for it, all of them full.
    Busy,
    /// No worker serves it.
    Nobody,
}

/// Expected times of an answer, counted from now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Estimate {
    /// Time to the first token; a day where only the whole answer shows that the worker lives.
    pub first_token: Duration,
    /// Time to the last token.
    pub finish: Duration,
}

/// The router: a scoring function and the memory that ties and conversations need.
#[derive(Debug)]
pub struct Router {
    affinity: Affinity,
    turn: u64,
    capacity: Capacity,
}

/// Number of requests that a worker is given at once.
#[derive(Debug, Clone, Copy)]
pub struct Capacity {
    /// Requests beyond a worker's slots that it is given ahead, so that a freed slot is filled without a
    /// round trip.
    pub ahead: u32,
    /// Tasks given at once to one worker without an identity.
    pub plain: u32,
}

impl Router {
    /// A router that has seen nothing yet.
    pub fn new(capacity: Capacity) -> Self {
        Self {
            affinity: Affinity::default(),
            turn: 0,
            capacity,
        }
    }

    /// Picks a worker. It changes nothing: see [`Router::assigned`].
    pub fn choose(&self, registry: &Registry, ask: &Requirements, now: Instant) -> Choice {
        let holder = self.affinity.find(&ask.prefixes);
        let all = registry.iter();
        let known = all.map(|worker| (worker, serves(registry, worker, ask, now)));
        let known = known.filter(|(_, service)| *service != Service::Out);
        let known: Vec<(&Worker, Service)> = known.collect();
        if known.is_empty() {
            return Choice::Nobody;
        }
        // A worker without an identity is never the first choice, however fast it looks: a worker of the mesh
        // is waited for.
        let untried = |worker: &Worker| !ask.avoid.contains(&worker.id);
        let any_untried_mesh = known.iter().any(|(w, _)| w.has_identity() && untried(w));
        let may = |worker: &Worker| worker.has_identity() || !any_untried_mesh;
        let serving = known
            .iter()
            .filter(|(_, service)| *service == Service::Serves);
        let serving = serving
            .map(|(worker, _)| *worker)
            .filter(|worker| may(worker));
        let mut serving: Vec<&Worker> = serving.collect();
        let best = Best::of(&serving, ask);
        if serving.iter().any(|worker| untried(worker)) {
            serving.retain(|worker| untried(worker));
        }
        if serving.iter().any(|worker| worker.has_identity()) {
            serving.retain(|worker| worker.has_identity());
        }
        serving.retain(|worker| self.has_room(worker, ask, now));
        let open = serving.into_iter();
        let open = open.map(|worker| (worker, estimate(worker, ask, holder, best, now)));
        let open: Vec<(&Worker, Estimate)> = open.collect();

        let Some(soonest) = open.iter().map(|(_, estimate)| estimate.finish).min() else {
            return Choice::Busy;
        };
        let within = soonest.mul_f64(1.0 + TIE) + TIE_FLOOR;
        let tied = open
            .iter()
            .filter(|(_, estimate)| estimate.finish <= within);
        let rank = |worker: &Worker| {
            let holds = holder.is_some_and(|(id, _)| id == worker.id);
            (!holds, worker.last_turn, worker.id)
        };
        let next = tied.min_by_key(|(worker, _)| rank(worker));
        next.map_or(Choice::Busy, |(worker, estimate)| {
            Choice::Worker(worker.id, *estimate)
        })
    }

    /// The largest context for a request and the tokens that it has at least, if it is too long for every
    /// worker that serves it.
    pub(crate) fn too_long(
        &self,
        registry: &Registry,
        ask: &Requirements,
        now: Instant,
    ) -> Option<(u32, u64)> {
        let serving = registry
            .iter()
            .filter(|worker| serves(registry, worker, ask, now) != Service::Out);
        let cards = serving.map(|worker| worker.model(&ask.model).map(|model| &model.card));
        // A worker without an identity does not report its models.
        let cards: Option<Vec<_>> = cards.collect();
        ask.length.exceeds(cards?)
    }

    /// The worker that a suspect can be alone with soonest.
    pub(crate) fn emptiest(
        registry: &Registry,
        ask: &Requirements,
        now: Instant,
    ) -> Option<WorkerId> {
        let serving = registry
            .iter()
            .filter(|worker| serves(registry, worker, ask, now) == Service::Serves);
        let order = |worker: &&Worker| {
            let failed = ask.avoid.contains(&worker.id);
            (failed, worker.unstarted, worker.assigned, worker.id)
        };
        serving.min_by_key(order).map(|worker| worker.id)
    }

    /// The slots to count on of all workers that a request may go to.
    pub fn slots(registry: &Registry, ask: &Requirements, now: Instant) -> usize {
        let serving = registry
            .iter()
            .filter(|worker| serves(registry, worker, ask, now) != Service::Out);
        let models = serving.filter_map(|worker| worker.model(&ask.model));
        models.map(|model| model.slots() as usize).sum()
    }

    /// Returns true if another worker than `than` answers requests like this one, so that a second opinion
    /// can be had.
    pub fn another(registry: &Registry, ask: &Requirements, than: WorkerId, now: Instant) -> bool {
        registry.iter().any(|worker| {
            worker.id != than
                && worker.has_identity()
                && !ask.avoid.contains(&worker.id)
                && serves(registry, worker, ask, now) == Service::Serves
        })
    }

    /// Notes that `worker` was given this request.
    pub fn assigned(&mut self, registry: &mut Registry, worker: WorkerId, ask: &Requirements) {
        self.turn += 1;
        if let Some(worker) = registry.get_mut(worker) {
            worker.last_turn = self.turn;
            if worker.has_identity() {
                self.affinity.note(&ask.prefixes, worker.id);
            }
        }
    }

    /// Returns true if a worker has a good part of this prompt in its cache, as far as the head knows.
    pub(crate) fn is_cached(&self, ask: &Requirements, worker: WorkerId) -> bool {
        let held = self.affinity.find(&ask.prefixes);
        held.is_some_and(|(holder, tokens)| holder == worker && tokens > ask.prompt_tokens / 8)
    }

    /// Forgets a worker that left.
    pub fn left(&mut self, worker: WorkerId) {
        self.affinity.forget(worker);
    }

    fn has_room(&self, worker: &Worker, ask: &Requirements, now: Instant) -> bool {
        if worker.busy_until.is_some_and(|until| now < until) {
            return false;
        }
        let lasts = |until: Option<Instant>| until.is_some_and(|until| now < until);
        if lasts(worker.alone) || !ask.alone && lasts(worker.reserved_until) {
            return false;
        }
        // Requests wait there though slots are free: memory is short. They wait better here, where any worker
        // with room takes them.
        if worker.queues(&ask.model, self.capacity.ahead, now) {
            return false;
        }
        let capacity = match worker.model(&ask.model) {
            Some(model) => model.slots().saturating_add(self.capacity.ahead),
            None => self.capacity.plain,
        };
        // The cause of another death must be plain: so at once, and where no other request waits for a first
        // token.
        if ask.alone && worker.unstarted > 0 {
            return false;
        }
        let ahead = if ask.alone { self.capacity.ahead } else { 0 };
        worker.assigned < capacity.saturating_sub(ahead).max(1)
    }
}

/// A worker's means to answer a request.
#[derive(Clone, Copy)]
enum Capability<'a> {
    Model(&'a ServedModel),
    /// It has no identity, and takes plain tasks.
    Tasks,
}

/// Decides whether a worker gets this request.
fn serves(registry: &Registry, worker: &Worker, ask: &Requirements, now: Instant) -> Service {
    let another = || {
        let mut others = registry.iter().filter(|other| other.id != worker.id);
        others.any(|other| can_replace(registry, other, worker, ask, now))
    };
    match has(worker, ask) {
        None => Service::Out,
        Some(Capability::Tasks) => registry.plain_service(worker, now, another),
        Some(Capability::Model(model)) => {
            let weights = has_weights(registry, model, ask, now);
            weights.max(registry.service_beside(worker, model, now, another))
        }
    }
}

/// Means of `worker` to answer this request, regardless of its state.
fn has<'a>(worker: &'a Worker, ask: &Requirements) -> Option<Capability<'a>> {
    // The driver of a ring answers until the ring has moved away from it.
    let moves = |model: &ServedModel| model.ring.is_some();
    if worker.draining && !worker.model(&ask.model).is_some_and(moves) {
        return None;
    }
    if worker.request_revision < ask.revision {
        return None;
    }
    if !worker.has_identity() {
        return ask.plain.then_some(Capability::Tasks);
    }
    // A worker that is reserved for something else holds this model for other meshes, or by mistake.
    if !worker.is_for(ask.kind) {
        return None;
    }
    let same_kind = |model: &&ServedModel| model.card.kind() == ask.kind;
    let model = worker.model(&ask.model).filter(same_kind);
    model.map(Capability::Model)
}

/// Decides whether a model has the weights that this request wants: those of an answer begun, else those that
/// its name stands for.
fn has_weights(
    registry: &Registry,
    model: &ServedModel,
    ask: &Requirements,
    now: Instant,
) -> Service {
    match &ask.fingerprint {
        None => registry.has_name(model, now),
        Some(wanted) if *wanted == model.card.fingerprint => Service::Serves,
        Some(_) => Service::Out,
    }
}

/// Returns true if `other` answers this request while `paused` is left alone.
fn can_replace(
    registry: &Registry,
    other: &Worker,
    paused: &Worker,
    ask: &Requirements,
    now: Instant,
) -> bool {
    match has(other, ask) {
        None => false,
        // Without an identity it is no better than one that has one and failed.
        Some(Capability::Tasks) => {
            let until = registry.reputation.paused_until(&other.key(), "", now);
            !paused.has_identity() && until.is_none()
        }
        Some(Capability::Model(model)) => {
            ask.length.exceeds([&model.card]).is_none()
                && has_weights(registry, model, ask, now) == Service::Serves
                && registry.can_replace(other, model, now)
        }
    }
}

/// The best speeds that were measured on any worker for a model: no worker's claim counts for more.
#[derive(Debug, Clone, Copy, Default)]
struct Best {
    decode: Option<f64>,
    prefill: Option<f64>,
}

impl Best {
    fn of(serving: &[&Worker], ask: &Requirements) -> Self {
        let models = || serving.iter().filter_map(|worker| worker.model(&ask.model));
        let most = |rates: &mut dyn Iterator<Item = f64>| rates.reduce(f64::max);
        Self {
            decode: most(&mut models().filter_map(|model| model.decode.rate())),
            prefill: most(&mut models().filter_map(|model| model.prefill.rate())),
        }
    }
}

fn estimate(
    worker: &Worker,
    ask: &Requirements,
    holder: Option<(WorkerId, u32)>,
    best: Best,
    now: Instant,
) -> Estimate {
    match worker.model(&ask.model) {
        Some(model) => estimate_mesh(worker, model, ask, holder, best, now),
        None => Estimate {
            first_token: seconds(LONGEST_SECONDS),
            finish: seconds(worker.plain_seconds()),
        },
    }
}

fn estimate_mesh(
    worker: &Worker,
    model: &ServedModel,
    ask: &Requirements,
    holder: Option<(WorkerId, u32)>,
    best: Best,
    now: Instant,
) -> Estimate {
    let slots = model.slots();
    let batch = worker.active().saturating_add(1).min(slots);
    let held = holder.filter(|(id, _)| *id == worker.id);
    let cached = held.map_or(0, |(_, tokens)| tokens);
    let own = u64::from(ask.prompt_tokens.saturating_sub(cached));
    let to_prefill = worker.prefilling.max(worker.load.prefill_backlog);
    let to_prefill = to_prefill.saturating_add(own);

    let decode_tps = model.decode.believed(model.decode_tps, best.decode);
    let prefill_tps = model.prefill.believed(model.prefill_tps, best.prefill);
    let total_tps = known(decode_tps, ASSUMED_DECODE_TPS) * batch_gain(batch);
    let answer = f64::from(ask.answer_tokens) * f64::from(batch) / total_tps;
    let prefill = to_prefill as f64 / known(prefill_tps, ASSUMED_PREFILL_TPS) + model.delay(now);
    // Requests that must end before a slot is free; each takes about as long as this answer, `slots` end in
    // parallel.
    let ahead = worker.active().saturating_sub(slots - 1);
    let wait = f64::from(ahead) * answer / f64::from(slots);
    Estimate {
        first_token: seconds(wait + prefill),
        finish: seconds(wait + prefill + answer),
    }
}

fn known(value: f64, assumed: f64) -> f64 {
    if value > 0.0 { value } else { assumed }
}

fn seconds(value: f64) -> Duration {
    Duration::try_from_secs_f64(value.min(LONGEST_SECONDS)).unwrap_or_default()
}

/// Estimates this close to each other are equal; nearer than this they are not known.
const TIE: f64 = 0.05;
const TIE_FLOOR: Duration = Duration::from_millis(1);
const ASSUMED_DECODE_TPS: f64 = 20.0;
const ASSUMED_PREFILL_TPS: f64 = 200.0;
const LONGEST_SECONDS: f64 = 86_400.0;

#[cfg(test)]
mod tests;
