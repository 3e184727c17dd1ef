//! Which worker answers a request soonest.
//!
//! Only workers that have answered the head's own question get requests ([`Registry::service`]). For each of them the router estimates
//! the time to the last token from measured speed, load and queue; a conversation whose KV cache a worker holds is cheaper there by the prefill it saves. Workers whose estimates are
//! within 5 % of the best take turns.

use std::time::{Duration, Instant};

use mesh_proto::ModelKind;

use super::affinity::{Affinity, Prefix};
use super::fair::Source;
use super::length::Length;
use super::registry::{Registry, ServedModel, Service, Worker, WorkerId, batch_gain};

/// What a request needs of a worker.
#[derive(Debug, Clone, Default)]
pub struct Ask {
    /// Model name; empty is any model.
    pub model: String,
    /// What is wanted of it.
    pub purpose: Purpose,
    /// Tokens of the prompt, estimated.
    pub prompt_tokens: u32,
    /// Tokens of the answer, estimated.
    pub answer_tokens: u32,
    /// Prefixes of the prompt, shortest first.
    pub prefixes: Vec<Prefix>,
    /// A plain DCF task that a v5.0.0 worker may take too.
    pub legacy: bool,
    /// Only workers whose model file has this SHA-256: an answer already begun must go on with the same weights.
    pub fingerprint: Option<String>,
    /// Workers on which this request failed: taken only when there is no other.
    pub avoid: Vec<WorkerId>,
    /// Only workers that act upon all of the request's fields: [`mesh_proto::Generate::revision`].
    pub revision: u32,
    /// The source of the request.
    pub source: Source,
    /// What can be told of the prompt's length.
    pub length: Length,
    /// Workers died that had this request before its first token: no other may share its fate.
    pub alone: bool,
}

/// What a request wants of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Purpose {
    /// Text.
    #[default]
    Chat,
    /// Embeddings.
    Embed,
}

impl Purpose {
    /// Its name in a worker's `reserved_for`.
    pub fn name(self) -> &'static str {
        match self {
            Purpose::Chat => "chat",
            Purpose::Embed => "embeddings",
        }
    }

    /// The models that serve it.
    pub fn kind(self) -> ModelKind {
        match self {
            Purpose::Chat => ModelKind::Chat,
            Purpose::Embed => ModelKind::Embed,
        }
    }
}

/// The router's answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    /// This worker.
    Worker(WorkerId, Estimate),
    /// There are workers for it, all of them full.
    Busy,
    /// There is none for it.
    Nobody,
}

/// When an answer is expected, counted from now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Estimate {
    /// To the first token.
    pub first_token: Duration,
    /// To the last one.
    pub finish: Duration,
}

/// The router: a scoring function and the memory that ties and conversations need.
#[derive(Debug)]
pub struct Router {
    affinity: Affinity,
    turn: u64,
    capacity: Capacity,
}

/// How many requests a worker is given at once.
#[derive(Debug, Clone, Copy)]
pub struct Capacity {
    /// Requests beyond a worker's slots that it is given ahead, so that a freed slot is filled without a round trip.
    pub ahead: u32,
    /// Tasks given to one v5.0.0 worker at once.
    pub legacy: u32,
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
    pub fn choose(&self, registry: &Registry, ask: &Ask, now: Instant) -> Choice {
        let holder = self.affinity.find(&ask.prefixes);
        let known: Vec<(&Worker, Service)> = registry
            .iter()
            .map(|worker| (worker, serves(registry, worker, ask, now)))
            .filter(|(_, service)| *service != Service::Out)
            .collect();
        if known.is_empty() {
            return Choice::Nobody;
        }
        // A worker without an identity is never the first choice, however fast it looks: a worker of the mesh
        // is waited for.
        let any_untried_mesh = known
            .iter()
            .any(|(worker, _)| !worker.is_legacy() && !ask.avoid.contains(&worker.id));
        let serving: Vec<&Worker> = known
            .iter()
            .filter(|(worker, service)| {
                *service == Service::Serves && !(any_untried_mesh && worker.is_legacy())
            })
            .map(|(worker, _)| *worker)
            .collect();
        let untried = |worker: &&&Worker| !ask.avoid.contains(&worker.id);
        let any_untried = serving.iter().any(|worker| untried(&worker));
        let any_mesh = serving
            .iter()
            .any(|worker| !worker.is_legacy() && (!any_untried || untried(&worker)));
        let best = Best::of(&serving, ask);
        let open: Vec<(&Worker, Estimate)> = serving
            .iter()
            .filter(|worker| !any_untried || untried(worker))
            .filter(|worker| !any_mesh || !worker.is_legacy())
            .filter(|worker| self.has_room(worker, ask, now))
            .map(|worker| (*worker, estimate(worker, ask, holder, best, now)))
            .collect();

        let Some(soonest) = open.iter().map(|(_, estimate)| estimate.finish).min() else {
            return Choice::Busy;
        };
        let within = soonest.mul_f64(1.0 + TIE) + TIE_FLOOR;
        open.iter()
            .filter(|(_, estimate)| estimate.finish <= within)
            .min_by_key(|(worker, _)| (!holds(worker, holder), worker.last_turn, worker.id))
            .map_or(Choice::Busy, |(worker, estimate)| {
                Choice::Worker(worker.id, *estimate)
            })
    }

    /// The largest context for a request and the tokens that it has at least, if it is too long for every worker that serves it.
    pub fn too_long(&self, registry: &Registry, ask: &Ask, now: Instant) -> Option<(u32, u64)> {
        let serving = registry
            .iter()
            .filter(|worker| serves(registry, worker, ask, now) != Service::Out);
        let cards = serving.map(|worker| worker.model(&ask.model).map(|model| &model.card));
        // A worker without an identity says nothing of what it serves.
        let cards: Option<Vec<_>> = cards.collect();
        ask.length.exceeds(cards?)
    }

    /// The worker that a suspect can be alone with soonest.
    pub fn emptiest(registry: &Registry, ask: &Ask, now: Instant) -> Option<WorkerId> {
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
    pub fn slots(registry: &Registry, ask: &Ask, now: Instant) -> usize {
        let serving = registry
            .iter()
            .filter(|worker| serves(registry, worker, ask, now) != Service::Out);
        let models = serving.filter_map(|worker| worker.model(&ask.model));
        models.map(|model| model.slots() as usize).sum()
    }

    /// Whether another worker than `than` answers requests like this one: its opinion can be had.
    pub fn another(registry: &Registry, ask: &Ask, than: WorkerId, now: Instant) -> bool {
        registry.iter().any(|worker| {
            worker.id != than
                && !worker.is_legacy()
                && !ask.avoid.contains(&worker.id)
                && serves(registry, worker, ask, now) == Service::Serves
        })
    }

    /// Notes that `worker` was given this request.
    pub fn assigned(&mut self, registry: &mut Registry, worker: WorkerId, ask: &Ask) {
        self.turn += 1;
        if let Some(worker) = registry.get_mut(worker) {
            worker.last_turn = self.turn;
            if !worker.is_legacy() {
                self.affinity.note(&ask.prefixes, worker.id);
            }
        }
    }

    /// Whether a worker has a good part of this prompt in its cache, as far as the head knows.
    pub fn is_cached(&self, ask: &Ask, worker: WorkerId) -> bool {
        let held = self.affinity.find(&ask.prefixes);
        held.is_some_and(|(holder, tokens)| holder == worker && tokens > ask.prompt_tokens / 8)
    }

    /// Forgets a worker that left.
    pub fn left(&mut self, worker: WorkerId) {
        self.affinity.forget(worker);
    }

    fn has_room(&self, worker: &Worker, ask: &Ask, now: Instant) -> bool {
        if worker.busy_until.is_some_and(|until| now < until) {
            return false;
        }
        let lasts = |until: Option<Instant>| until.is_some_and(|until| now < until);
        if lasts(worker.alone) || !ask.alone && lasts(worker.kept) {
            return false;
        }
        // Requests wait there though slots are free: memory is short. They had better wait here, where whoever has room takes them.
        if worker.queues(&ask.model, self.capacity.ahead, now) {
            return false;
        }
        let capacity = match worker.model(&ask.model) {
            Some(model) => model.slots().saturating_add(self.capacity.ahead),
            None => self.capacity.legacy,
        };
        // The cause of another death must be plain: so at once, and where nobody else waits for a first token.
        if ask.alone && worker.unstarted > 0 {
            return false;
        }
        let ahead = if ask.alone { self.capacity.ahead } else { 0 };
        worker.assigned < capacity.saturating_sub(ahead).max(1)
    }
}

/// What a worker has for a request.
#[derive(Clone, Copy)]
enum Has<'a> {
    Model(&'a ServedModel),
    /// It has no identity, and takes plain tasks.
    Tasks,
}

/// Whether a worker gets this request.
fn serves(registry: &Registry, worker: &Worker, ask: &Ask, now: Instant) -> Service {
    let another = || {
        let mut others = registry.iter().filter(|other| other.id != worker.id);
        others.any(|other| can_replace(registry, other, worker, ask, now))
    };
    match has(worker, ask) {
        None => Service::Out,
        Some(Has::Tasks) => registry.legacy_service(worker, now, another),
        Some(Has::Model(model)) => {
            let weights = has_weights(registry, model, ask, now);
            weights.max(registry.service_beside(worker, model, now, another))
        }
    }
}

/// What `worker` has for this request, whether it answers or not.
fn has<'a>(worker: &'a Worker, ask: &Ask) -> Option<Has<'a>> {
    // The driver of a ring answers until the ring has moved away from it.
    let moves = |model: &ServedModel| model.ring.is_some();
    if worker.draining && !worker.model(&ask.model).is_some_and(moves) {
        return None;
    }
    if worker.request_revision < ask.revision {
        return None;
    }
    if worker.is_legacy() {
        return ask.legacy.then_some(Has::Tasks);
    }
    // Whoever is kept for something else holds this model for other meshes, or by mistake.
    if !worker.is_for(ask.purpose.name()) {
        return None;
    }
    let same_kind = |model: &&ServedModel| model.card.kind() == ask.purpose.kind();
    worker.model(&ask.model).filter(same_kind).map(Has::Model)
}

/// Whether a model has the weights that this request wants: those of an answer begun, else those that its name stands for.
fn has_weights(registry: &Registry, model: &ServedModel, ask: &Ask, now: Instant) -> Service {
    match &ask.fingerprint {
        None => registry.has_name(model, now),
        Some(wanted) if *wanted == model.card.fingerprint => Service::Serves,
        Some(_) => Service::Out,
    }
}

/// Whether `other` answers this request while `paused` is left alone.
fn can_replace(
    registry: &Registry,
    other: &Worker,
    paused: &Worker,
    ask: &Ask,
    now: Instant,
) -> bool {
    match has(other, ask) {
        None => false,
        // Without an identity it is no better than one that has one and failed.
        Some(Has::Tasks) => {
            let until = registry.reputation.paused_until(&other.key(), "", now);
            paused.is_legacy() && until.is_none()
        }
        Some(Has::Model(model)) => {
            ask.length.exceeds([&model.card]).is_none()
                && has_weights(registry, model, ask, now) == Service::Serves
                && registry.can_replace(other, model, now)
        }
    }
}

/// The best speeds that were measured on any worker for a model: nobody's claim counts for more.
#[derive(Debug, Clone, Copy, Default)]
struct Best {
    decode: Option<f64>,
    prefill: Option<f64>,
}

impl Best {
    fn of(serving: &[&Worker], ask: &Ask) -> Self {
        let models = || serving.iter().filter_map(|worker| worker.model(&ask.model));
        let most = |rates: &mut dyn Iterator<Item = f64>| rates.reduce(f64::max);
        Self {
            decode: most(&mut models().filter_map(|model| model.decode.rate())),
            prefill: most(&mut models().filter_map(|model| model.prefill.rate())),
        }
    }
}

fn holds(worker: &Worker, holder: Option<(WorkerId, u32)>) -> bool {
    holder.is_some_and(|(id, _)| id == worker.id)
}

fn estimate(
    worker: &Worker,
    ask: &Ask,
    holder: Option<(WorkerId, u32)>,
    best: Best,
    now: Instant,
) -> Estimate {
    match worker.model(&ask.model) {
        Some(model) => estimate_mesh(worker, model, ask, holder, best, now),
        None => estimate_legacy(worker),
    }
}

fn estimate_mesh(
    worker: &Worker,
    model: &ServedModel,
    ask: &Ask,
    holder: Option<(WorkerId, u32)>,
    best: Best,
    now: Instant,
) -> Estimate {
    let slots = model.slots();
    let batch = worker.active().saturating_add(1).min(slots);
    let cached = holder
        .filter(|(id, _)| *id == worker.id)
        .map_or(0, |(_, tokens)| tokens);
    let own = u64::from(ask.prompt_tokens.saturating_sub(cached));
    let to_prefill = worker.prefilling.max(worker.load.prefill_backlog);
    let to_prefill = to_prefill.saturating_add(own);

    let decode_tps = model.decode.believed(model.decode_tps, best.decode);
    let prefill_tps = model.prefill.believed(model.prefill_tps, best.prefill);
    let total_tps = known(decode_tps, ASSUMED_DECODE_TPS) * batch_gain(batch);
    let answer = f64::from(ask.answer_tokens) * f64::from(batch) / total_tps;
    let prefill = to_prefill as f64 / known(prefill_tps, ASSUMED_PREFILL_TPS) + model.delay(now);
    // Requests that must end before a slot is free; each takes about as long as this answer, `slots` end in parallel.
    let ahead = worker.active().saturating_sub(slots - 1);
    let wait = f64::from(ahead) * answer / f64::from(slots);
    Estimate {
        first_token: seconds(wait + prefill),
        finish: seconds(wait + prefill + answer),
    }
}

fn estimate_legacy(worker: &Worker) -> Estimate {
    let finish = known(worker.task_seconds, ASSUMED_TASK_SECONDS) * f64::from(worker.assigned + 1);
    Estimate {
        first_token: seconds(finish),
        finish: seconds(finish),
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
const ASSUMED_TASK_SECONDS: f64 = 5.0;
const LONGEST_SECONDS: f64 = 86_400.0;

#[cfg(test)]
mod tests {
    use dcf::Version;
    use mesh_proto::{Hello, Load, ModelCard};

    use super::*;

    struct Fleet {
        registry: Registry,
        router: Router,
        now: Instant,
    }

    impl Fleet {
        fn new(speeds: &[f32]) -> Self {
            let now = Instant::now();
            let mut registry = Registry::new(Duration::from_secs(10));
            for (index, tps) in speeds.iter().enumerate() {
                let card = ModelCard {
                    name: "m".into(),
                    fingerprint: "f".into(),
                    slots: 4,
                    decode_tps: *tps,
                    prefill_tps: tps * 5.0,
                    ..Default::default()
                };
                let hello = Hello {
                    node_name: format!("w{index}"),
                    models: vec![card],
                    ..Default::default()
                };
                let (id, _) = registry.join(
                    &format!("node{index}"),
                    ([127, 0, 0, 1], 9000).into(),
                    hello,
                    now,
                );
                registry.prove_all(id, now);
            }
            Self {
                registry,
                router: Router::new(Capacity {
                    ahead: 1,
                    legacy: 2,
                }),
                now,
            }
        }

        fn place(&mut self, ask: &Ask) -> Choice {
            let choice = self.router.choose(&self.registry, ask, self.now);
            if let Choice::Worker(id, _) = choice {
                self.router.assigned(&mut self.registry, id, ask);
                self.registry.get_mut(id).unwrap().assigned += 1;
            }
            choice
        }

        fn worker(&mut self, ask: &Ask) -> u64 {
            match self.place(ask) {
                Choice::Worker(id, _) => id.0,
                other => panic!("no worker: {other:?}"),
            }
        }
    }

    fn ask() -> Ask {
        Ask {
            model: "m".into(),
            prompt_tokens: 50,
            answer_tokens: 100,
            ..Default::default()
        }
    }

    #[test]
    fn equal_workers_take_turns() {
        let mut fleet = Fleet::new(&[100.0, 100.0, 100.0]);
        let order: Vec<u64> = (0..6).map(|_| fleet.worker(&ask())).collect();
        assert_eq!(order, [1, 2, 3, 1, 2, 3]);
    }

    #[test]
    fn a_fast_worker_gets_more_until_its_queue_makes_it_slower() {
        let mut fleet = Fleet::new(&[100.0, 30.0]);
        let order: Vec<u64> = (0..8).map(|_| fleet.worker(&ask())).collect();
        let fast = order.iter().filter(|worker| **worker == 1).count();
        assert_eq!(order[0], 1);
        assert!((5..8).contains(&fast), "{order:?}");
    }

    #[test]
    fn load_reported_by_the_worker_counts() {
        let mut fleet = Fleet::new(&[100.0, 90.0]);
        fleet.registry.report(
            WorkerId(1),
            Load {
                running: 4,
                queued: 3,
                ..Default::default()
            },
            fleet.now,
        );
        assert_eq!(fleet.worker(&ask()), 2);
    }

    #[test]
    fn a_prefill_backlog_counts() {
        let mut fleet = Fleet::new(&[100.0, 90.0]);
        fleet.registry.report(
            WorkerId(1),
            Load {
                prefill_backlog: 2000,
                ..Default::default()
            },
            fleet.now,
        );
        assert_eq!(fleet.worker(&ask()), 2);
    }

    #[test]
    fn a_backlog_that_cannot_be_is_only_a_bad_choice() {
        let mut fleet = Fleet::new(&[100.0, 90.0]);
        let load = Load {
            prefill_backlog: u64::MAX,
            kv_tokens_used: u64::MAX,
            ..Default::default()
        };
        fleet.registry.report(WorkerId(1), load, fleet.now);
        assert_eq!(fleet.worker(&ask()), 2);
    }

    #[test]
    fn a_draining_worker_gets_nothing_new() {
        let mut fleet = Fleet::new(&[100.0]);
        fleet.registry.report(
            WorkerId(1),
            Load {
                draining: true,
                ..Default::default()
            },
            fleet.now,
        );
        assert_eq!(fleet.place(&ask()), Choice::Nobody);
    }

    #[test]
    fn a_conversation_stays_with_the_worker_that_has_its_cache_unless_that_is_much_busier() {
        let mut fleet = Fleet::new(&[100.0, 100.0]);
        let talk = Ask {
            prompt_tokens: 1000,
            prefixes: vec![
                Prefix {
                    hash: 1,
                    tokens: 500,
                },
                Prefix {
                    hash: 2,
                    tokens: 950,
                },
            ],
            ..ask()
        };
        let home = fleet.worker(&talk);
        for _ in 0..3 {
            assert_eq!(fleet.worker(&talk), home);
            fleet.registry.get_mut(WorkerId(home)).unwrap().assigned = 1;
        }
        fleet.registry.report(
            WorkerId(home),
            Load {
                running: 4,
                queued: 20,
                ..Default::default()
            },
            fleet.now,
        );
        assert_ne!(fleet.worker(&talk), home);
    }

    #[test]
    fn full_workers_are_busy_and_not_overrun() {
        let mut fleet = Fleet::new(&[100.0, 100.0]);
        for _ in 0..10 {
            fleet.worker(&ask());
        }
        assert_eq!(fleet.place(&ask()), Choice::Busy);
    }

    #[test]
    fn a_worker_that_failed_this_request_is_the_last_resort() {
        let mut fleet = Fleet::new(&[100.0, 10.0]);
        let again = Ask {
            avoid: vec![WorkerId(1)],
            ..ask()
        };
        assert_eq!(fleet.worker(&again), 2);
        fleet.registry.leave(WorkerId(2), fleet.now);
        assert_eq!(fleet.worker(&again), 1);
    }

    #[test]
    fn an_answer_begun_goes_on_with_the_same_weights_only() {
        let mut fleet = Fleet::new(&[100.0]);
        let begun = Ask {
            fingerprint: Some("other".into()),
            ..ask()
        };
        assert_eq!(fleet.place(&begun), Choice::Nobody);
        assert_eq!(
            fleet.worker(&Ask {
                fingerprint: Some("f".into()),
                ..ask()
            }),
            1
        );
    }

    #[test]
    fn a_worker_that_is_kept_for_something_gets_nothing_else() {
        let mut fleet = Fleet::new(&[100.0, 10.0]);
        fleet.registry.get_mut(WorkerId(1)).unwrap().reserved_for = vec!["embeddings".into()];
        assert_eq!(fleet.worker(&ask()), 2);
        fleet.registry.get_mut(WorkerId(2)).unwrap().reserved_for = vec!["images".into()];
        assert_eq!(fleet.place(&ask()), Choice::Nobody);
        fleet.registry.get_mut(WorkerId(1)).unwrap().reserved_for =
            vec!["images".into(), "chat".into()];
        assert_eq!(fleet.worker(&ask()), 1);
    }

    #[test]
    fn embeddings_are_asked_of_embedding_models_only() {
        let mut fleet = Fleet::new(&[100.0, 100.0]);
        fleet.registry.get_mut(WorkerId(2)).unwrap().models[0]
            .card
            .kind = ModelKind::Embed.into();
        let embed = Ask {
            purpose: Purpose::Embed,
            ..ask()
        };
        for _ in 0..3 {
            assert_eq!(fleet.worker(&embed), 2);
            assert_eq!(fleet.worker(&ask()), 1);
        }
    }

    #[test]
    fn legacy_workers_take_plain_tasks_only() {
        let mut fleet = Fleet::new(&[]);
        fleet
            .registry
            .legacy_heartbeat(([127, 0, 0, 1], 4000).into(), Version::V5_1, fleet.now)
            .unwrap();
        assert_eq!(fleet.place(&ask()), Choice::Nobody);
        let plain = Ask {
            legacy: true,
            ..ask()
        };
        assert!(matches!(fleet.place(&plain), Choice::Worker(..)));
        assert!(matches!(fleet.place(&plain), Choice::Worker(..)));
        assert_eq!(fleet.place(&plain), Choice::Busy);
    }

    #[test]
    fn a_legacy_worker_is_never_preferred_to_a_mesh_worker() {
        let mut fleet = Fleet::new(&[1.0]);
        let (legacy, _) = fleet
            .registry
            .legacy_heartbeat(([127, 0, 0, 1], 4000).into(), Version::V5_0, fleet.now)
            .unwrap();
        // As fast as it can claim to be, and the mesh worker as slow as can be.
        fleet.registry.get_mut(legacy).unwrap().task_seconds = 1e-9;
        let plain = Ask {
            legacy: true,
            ..ask()
        };
        let mesh = fleet.worker(&plain);
        assert_ne!(mesh, legacy.0);
        for _ in 0..4 {
            assert_eq!(fleet.worker(&plain), mesh);
        }
        assert_eq!(
            fleet.place(&plain),
            Choice::Busy,
            "it is waited for when it is full"
        );
        let failed = Ask {
            avoid: vec![WorkerId(mesh)],
            ..plain.clone()
        };
        assert_eq!(
            fleet.worker(&failed),
            legacy.0,
            "a task that failed there may go on"
        );
        fleet.registry.leave(WorkerId(mesh), fleet.now);
        assert_eq!(fleet.worker(&plain), legacy.0);
    }

    #[test]
    fn a_claim_is_worth_no_more_than_what_others_were_measured_to_do() {
        let mut fleet = Fleet::new(&[50.0, 1e6]);
        let measured = &mut fleet.registry.get_mut(WorkerId(1)).unwrap().models[0];
        measured.decoded(1000, Duration::from_secs(20), 1);
        measured.prefilled(1000, Duration::from_secs(4));
        let first: Vec<u64> = (0..2).map(|_| fleet.worker(&ask())).collect();
        assert_eq!(first, [1, 2], "as good as the best, and no better");
        // Its first answers show what it is worth.
        let liar = &mut fleet.registry.get_mut(WorkerId(2)).unwrap().models[0];
        liar.decoded(200, Duration::from_secs(40), 1);
        for _ in 0..3 {
            assert_eq!(fleet.worker(&ask()), 1);
        }
    }

    #[test]
    fn one_that_says_it_is_idle_and_answers_late_is_slow() {
        let mut fleet = Fleet::new(&[50.0, 100.0]);
        assert_eq!(fleet.worker(&ask()), 2);
        let late = &mut fleet.registry.get_mut(WorkerId(2)).unwrap().models[0];
        late.waited(50, Duration::from_secs(8), fleet.now);
        for _ in 0..3 {
            assert_eq!(fleet.worker(&ask()), 1);
        }
        fleet.registry.get_mut(WorkerId(1)).unwrap().assigned = 0;
        fleet.now += Duration::from_secs(600);
        assert_eq!(fleet.worker(&ask()), 2, "that was long ago");
    }

    #[test]
    fn nothing_goes_to_one_that_has_not_answered_or_is_out() {
        let mut fleet = Fleet::new(&[10.0, 100.0]);
        let fast = WorkerId(2);
        assert_eq!(fleet.worker(&ask()), 2);
        let model = |fleet: &mut Fleet| {
            let worker = fleet.registry.get_mut(fast).unwrap();
            worker.models[0].failed(fleet.now);
        };
        model(&mut fleet);
        assert_eq!(fleet.worker(&ask()), 1, "it failed");
        fleet.registry.prove_all(fast, fleet.now);
        assert_eq!(fleet.worker(&ask()), 2, "it answered again");
        let mut pauses = Vec::new();
        for _ in 0..3 {
            fleet.now += Duration::from_secs(1);
            let now = fleet.now;
            let faults = &mut fleet.registry.reputation;
            pauses.extend(faults.at_fault("node1", "m", now, now));
        }
        assert_eq!(fleet.worker(&ask()), 1, "it is paused");
        fleet.now += pauses[2];
        assert_eq!(fleet.worker(&ask()), 2);
        let now = fleet.now;
        let length = fleet
            .registry
            .reputation
            .quarantine("node1", "w1", "it lies", now);
        assert_eq!(fleet.worker(&ask()), 1);
        fleet.now += length;
        assert_eq!(fleet.worker(&ask()), 2);
    }

    #[test]
    fn other_weights_under_a_name_get_nothing_while_the_first_are_served() {
        let mut fleet = Fleet::new(&[10.0]);
        fleet.registry.prune(fleet.now);
        let card = ModelCard {
            name: "m".into(),
            fingerprint: "poisoned".into(),
            slots: 4,
            decode_tps: 1e6,
            ..Default::default()
        };
        let hello = Hello {
            node_name: "other".into(),
            models: vec![card],
            ..Default::default()
        };
        let address = ([127, 0, 0, 1], 9000).into();
        let (other, _) = fleet.registry.join("other", address, hello, fleet.now);
        fleet.registry.prove_all(other, fleet.now);
        for _ in 0..4 {
            assert_eq!(fleet.worker(&ask()), 1);
        }
        let warnings = fleet.registry.disagreements(fleet.now);
        assert!(
            warnings[0].contains("`other` serves other weights"),
            "{warnings:?}"
        );
        fleet.registry.leave(WorkerId(1), fleet.now);
        fleet.now += Duration::from_secs(40);
        fleet.registry.seen(other, fleet.now);
        fleet.registry.prune(fleet.now);
        assert_eq!(fleet.worker(&ask()), other.0);
    }

    fn serving(fleet: &mut Fleet, node: &str, fingerprint: &str) -> WorkerId {
        let card = ModelCard {
            name: "m".into(),
            fingerprint: fingerprint.into(),
            slots: 4,
            ..Default::default()
        };
        let hello = Hello {
            node_name: node.into(),
            models: vec![card],
            ..Default::default()
        };
        let address = ([127, 0, 0, 1], 9000).into();
        let (id, _) = fleet.registry.join(node, address, hello, fleet.now);
        fleet.registry.prove_all(id, fleet.now);
        id
    }

    /// Lets time pass in which all workers are heard.
    fn pass(fleet: &mut Fleet, seconds: u64) {
        for _ in 0..seconds {
            fleet.now += Duration::from_secs(1);
            let ids: Vec<WorkerId> = fleet.registry.iter().map(|worker| worker.id).collect();
            for id in ids {
                fleet.registry.seen(id, fleet.now);
            }
            fleet.registry.prune(fleet.now);
        }
    }

    #[test]
    fn a_worker_that_gets_no_requests_keeps_no_name_for_its_weights() {
        type Leave = fn(&mut Worker);
        let drained: Leave = |worker| worker.draining = true;
        let kept: Leave = |worker| worker.reserved_for = vec!["embeddings".into()];
        for leave in [drained, kept] {
            let mut fleet = Fleet::new(&[10.0]);
            pass(&mut fleet, 1);
            let other = serving(&mut fleet, "other", "g");
            assert_eq!(fleet.worker(&ask()), 1);
            leave(fleet.registry.get_mut(WorkerId(1)).unwrap());
            pass(&mut fleet, 32);
            assert_eq!(fleet.worker(&ask()), other.0);
        }
    }

    #[test]
    fn a_name_goes_over_to_other_weights_soon_after_the_last_worker_with_the_old_ones_left() {
        let mut fleet = Fleet::new(&[10.0]);
        fleet.registry = fleet.registry.with_handover(Duration::from_secs(10));
        pass(&mut fleet, 1);
        fleet.registry.leave(WorkerId(1), fleet.now);
        let updated = serving(&mut fleet, "node0", "g");
        let why_not = |fleet: &Fleet| {
            let worker = fleet.registry.get(updated).unwrap();
            fleet.registry.why_not(worker, &worker.models[0], fleet.now)
        };
        pass(&mut fleet, 5);
        assert_eq!(fleet.place(&ask()), Choice::Busy, "requests wait");
        assert!(why_not(&fleet).unwrap().contains("asked soon"));
        // Whoever comes back with the old weights meanwhile goes on.
        let old = serving(&mut fleet, "old", "f");
        assert_eq!(fleet.worker(&ask()), old.0);
        assert!(why_not(&fleet).unwrap().contains("other weights"));
        pass(&mut fleet, 40);
        assert_eq!(fleet.worker(&ask()), old.0);
        fleet.registry.leave(old, fleet.now);
        pass(&mut fleet, 11);
        assert_eq!(fleet.worker(&ask()), updated.0);
        assert_eq!(why_not(&fleet), None);
    }

    #[test]
    fn weights_that_nobody_names_are_not_those_of_a_name() {
        let mut fleet = Fleet::new(&[]);
        let silent = serving(&mut fleet, "silent", "");
        pass(&mut fleet, 2);
        assert_eq!(fleet.worker(&ask()), silent.0);
        let named = serving(&mut fleet, "named", "f");
        pass(&mut fleet, 2);
        for _ in 0..4 {
            assert_eq!(fleet.worker(&ask()), named.0);
        }
        let warnings = fleet.registry.disagreements(fleet.now);
        assert!(
            warnings[0].contains("`silent` does not say"),
            "{warnings:?}"
        );
    }

    #[test]
    fn the_model_of_those_who_name_none_does_not_change_for_a_newcomer() {
        let mut fleet = Fleet::new(&[10.0]);
        let now = fleet.now;
        let default = |registry: &mut Registry| registry.default_model(ModelKind::Chat, now);
        assert_eq!(default(&mut fleet.registry).as_deref(), Some("m"));
        let card = ModelCard {
            name: "aaa".into(),
            ..Default::default()
        };
        let hello = Hello {
            models: vec![card],
            ..Default::default()
        };
        let address = ([127, 0, 0, 1], 9000).into();
        let (other, _) = fleet.registry.join("other", address, hello, now);
        fleet.registry.prove_all(other, now);
        assert_eq!(default(&mut fleet.registry).as_deref(), Some("m"));
        fleet.registry.leave(WorkerId(1), now);
        assert_eq!(default(&mut fleet.registry).as_deref(), Some("aaa"));
    }

    #[test]
    fn a_second_opinion_is_one_of_another_worker_that_answers() {
        let mut fleet = Fleet::new(&[10.0, 10.0]);
        let (one, two) = (WorkerId(1), WorkerId(2));
        let another = |fleet: &Fleet| Router::another(&fleet.registry, &ask(), one, fleet.now);
        assert!(another(&fleet));
        let worker = fleet.registry.get_mut(two).unwrap();
        worker.models[0].failed(fleet.now);
        assert!(!another(&fleet));
        fleet
            .registry
            .legacy_heartbeat(([127, 0, 0, 1], 4000).into(), Version::V5_1, fleet.now)
            .unwrap();
        assert!(!another(&fleet));
    }

    #[test]
    fn a_legacy_worker_waits_until_a_mesh_workers_trial_is_over() {
        let mut fleet = Fleet::new(&[]);
        let (legacy, _) = fleet
            .registry
            .legacy_heartbeat(([127, 0, 0, 1], 4000).into(), Version::V5_0, fleet.now)
            .unwrap();
        let plain = Ask {
            legacy: true,
            ..ask()
        };
        let card = ModelCard {
            name: "m".into(),
            ..Default::default()
        };
        let hello = Hello {
            models: vec![card],
            ..Default::default()
        };
        let address = ([127, 0, 0, 1], 9000).into();
        let (mesh, _) = fleet.registry.join("a", address, hello, fleet.now);
        assert_eq!(fleet.place(&plain), Choice::Busy);
        fleet.now += Duration::from_secs(30);
        assert_eq!(fleet.worker(&plain), legacy.0, "it never answered");
        fleet.registry.prove_all(mesh, fleet.now);
        assert_eq!(fleet.worker(&plain), mesh.0);
        // One that keeps failing is left alone for a while, too.
        fleet.registry.leave(mesh, fleet.now);
        let key = fleet.registry.get(legacy).unwrap().key();
        let mut pause = Duration::ZERO;
        for _ in 0..5 {
            fleet.now += Duration::from_secs(1);
            let now = fleet.now;
            let faults = &mut fleet.registry.reputation;
            pause = faults.at_fault(&key, "", now, now).unwrap();
        }
        assert!(pause > Duration::from_secs(5));
        assert_eq!(fleet.place(&plain), Choice::Busy);
        fleet.now += Duration::from_secs(5);
        assert_eq!(
            fleet.worker(&plain),
            legacy.0,
            "there is nobody else to ask"
        );
    }

    #[test]
    fn a_long_pause_counts_only_while_another_worker_takes_the_request() {
        let mut fleet = Fleet::new(&[100.0, 10.0]);
        for _ in 0..12 {
            fleet.now += Duration::from_secs(1);
            let now = fleet.now;
            let reputation = &mut fleet.registry.reputation;
            reputation.at_fault("node0", "m", now, now);
        }
        let paused = WorkerId(1);
        assert_eq!(fleet.worker(&ask()), 2);
        let serves = |fleet: &Fleet, ask: &Ask| {
            let worker = fleet.registry.get(paused).unwrap();
            serves(&fleet.registry, worker, ask, fleet.now)
        };
        assert_eq!(serves(&fleet, &ask()), Service::Out);
        // The other one does not know the request's fields: for this request there is nobody else.
        fleet.registry.get_mut(paused).unwrap().request_revision = 1;
        let newer = Ask {
            revision: 1,
            ..ask()
        };
        assert_eq!(fleet.place(&newer), Choice::Busy);
        fleet.registry.leave(WorkerId(2), fleet.now);
        assert_eq!(fleet.place(&ask()), Choice::Busy, "requests wait");
        fleet.now += Duration::from_secs(5);
        assert_eq!(fleet.worker(&ask()), 1);
        assert_eq!(fleet.worker(&newer), 1);
        // A quarantine counts in any case.
        let now = fleet.now;
        let reputation = &mut fleet.registry.reputation;
        reputation.quarantine("node0", "w0", "it lies", now);
        assert_eq!(fleet.place(&ask()), Choice::Nobody);
    }

    #[test]
    fn the_choice_is_the_same_in_every_run() {
        let run = || {
            let mut fleet = Fleet::new(&[100.0, 80.0, 80.0, 40.0]);
            (0..16).map(|_| fleet.worker(&ask())).collect::<Vec<_>>()
        };
        let first = run();
        for _ in 0..10 {
            assert_eq!(run(), first);
        }
    }
}
