//! Which worker answers a request soonest.
//!
//! For every worker that serves the model the router estimates the time to the last token from measured speed, load and
//! queue; a conversation whose KV cache a worker holds is cheaper there by the prefill it saves. Workers whose estimates are
//! within 5 % of the best take turns.

use std::time::{Duration, Instant};

use mesh_proto::ModelKind;

use super::affinity::{Affinity, Prefix};
use super::fair::Source;
use super::length::Length;
use super::registry::{Registry, ServedModel, Worker, WorkerId, batch_gain};

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
        let serving: Vec<&Worker> = registry
            .iter()
            .filter(|worker| serves(worker, ask))
            .collect();
        let untried = |worker: &&&Worker| !ask.avoid.contains(&worker.id);
        let any_untried = serving.iter().any(|worker| untried(&worker));
        let candidate = |worker: &&&Worker| !any_untried || untried(worker);
        // A worker without an identity is never the first choice, however fast it looks: a worker of the mesh
        // is waited for.
        let any_mesh = serving
            .iter()
            .any(|worker| candidate(&worker) && !worker.is_legacy());
        let open: Vec<(&Worker, Estimate)> = serving
            .iter()
            .filter(candidate)
            .filter(|worker| !any_mesh || !worker.is_legacy())
            .filter(|worker| self.has_room(worker, ask, now))
            .map(|worker| (*worker, estimate(worker, ask, holder)))
            .collect();

        let Some(best) = open.iter().map(|(_, estimate)| estimate.finish).min() else {
            return if serving.is_empty() {
                Choice::Nobody
            } else {
                Choice::Busy
            };
        };
        let within = best.mul_f64(1.0 + TIE) + TIE_FLOOR;
        open.iter()
            .filter(|(_, estimate)| estimate.finish <= within)
            .min_by_key(|(worker, _)| (!holds(worker, holder), worker.last_turn, worker.id))
            .map_or(Choice::Busy, |(worker, estimate)| {
                Choice::Worker(worker.id, *estimate)
            })
    }

    /// The largest context for a request and the tokens that it has at least, if it is too long for every worker that serves it.
    pub fn too_long(&self, registry: &Registry, ask: &Ask) -> Option<(u32, u64)> {
        let serving = registry.iter().filter(|worker| serves(worker, ask));
        let cards = serving.map(|worker| worker.model(&ask.model).map(|model| &model.card));
        // A worker without an identity says nothing of what it serves.
        let cards: Option<Vec<_>> = cards.collect();
        ask.length.exceeds(cards?)
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

    /// Forgets a worker that left.
    pub fn left(&mut self, worker: WorkerId) {
        self.affinity.forget(worker);
    }

    fn has_room(&self, worker: &Worker, ask: &Ask, now: Instant) -> bool {
        if worker.busy_until.is_some_and(|until| now < until) {
            return false;
        }
        if worker.alone {
            return false;
        }
        // Requests wait there though slots are free: memory is short. They had better wait here, where whoever has room takes them.
        if worker.queues(&ask.model, self.capacity.ahead, now) {
            return false;
        }
        let capacity = match worker.model(&ask.model) {
            Some(model) => model.card.slots.max(1).saturating_add(self.capacity.ahead),
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

fn serves(worker: &Worker, ask: &Ask) -> bool {
    // The driver of a ring answers until the ring has moved away from it.
    let moves = |model: &ServedModel| model.ring.is_some();
    if worker.draining && !worker.model(&ask.model).is_some_and(moves) {
        return false;
    }
    if worker.request_revision < ask.revision {
        return false;
    }
    if worker.is_legacy() {
        return ask.legacy;
    }
    // Whoever is kept for something else holds this model for other meshes, or by mistake.
    if !worker.is_for(ask.purpose.name()) {
        return false;
    }
    let same_kind = |model: &ServedModel| model.card.kind() == ask.purpose.kind();
    let same_weights = |model: &ServedModel| match &ask.fingerprint {
        Some(fingerprint) => model.card.fingerprint == *fingerprint,
        None => true,
    };
    worker
        .model(&ask.model)
        .is_some_and(|model| same_kind(model) && same_weights(model))
}

fn holds(worker: &Worker, holder: Option<(WorkerId, u32)>) -> bool {
    holder.is_some_and(|(id, _)| id == worker.id)
}

fn estimate(worker: &Worker, ask: &Ask, holder: Option<(WorkerId, u32)>) -> Estimate {
    match worker.model(&ask.model) {
        Some(model) => estimate_mesh(worker, model, ask, holder),
        None => estimate_legacy(worker),
    }
}

fn estimate_mesh(
    worker: &Worker,
    model: &ServedModel,
    ask: &Ask,
    holder: Option<(WorkerId, u32)>,
) -> Estimate {
    let slots = model.card.slots.max(1);
    let batch = worker.active().saturating_add(1).min(slots);
    let cached = holder
        .filter(|(id, _)| *id == worker.id)
        .map_or(0, |(_, tokens)| tokens);
    let own = u64::from(ask.prompt_tokens.saturating_sub(cached));
    let to_prefill = worker.prefilling.max(worker.load.prefill_backlog);
    let to_prefill = to_prefill.saturating_add(own);

    let total_tps = known(model.decode_tps, ASSUMED_DECODE_TPS) * batch_gain(batch);
    let answer = f64::from(ask.answer_tokens) * f64::from(batch) / total_tps;
    let prefill = to_prefill as f64 / known(model.prefill_tps, ASSUMED_PREFILL_TPS);
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
                registry.join(
                    &format!("node{index}"),
                    ([127, 0, 0, 1], 9000).into(),
                    hello,
                    now,
                );
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
