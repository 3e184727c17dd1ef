use std::collections::BTreeSet;

use mesh_proto::{ModelKind, ModelSpeed};

use super::proofs::Finding;
use super::served::{MOST_CONTEXT, MOST_DIMENSIONS, MOST_SLOTS, NAME_BYTES};
use super::*;
use crate::spotcheck::{Position, Sample};
use dcf::Version;

impl Registry {
    /// The worker answers all questions that it is asked now, as honest ones do.
    pub(crate) fn prove_all(&mut self, id: WorkerId, now: Instant) {
        let position = Position {
            token: 1,
            logprob: -0.1,
            top: vec![(1, -0.1), (2, -3.0)],
        };
        for proof in self.proofs_due(id, &BTreeSet::new(), 1, now) {
            let sample = match proof.kind {
                ModelKind::Chat => Sample::Text(vec![position.clone(); 4]),
                ModelKind::Embed | ModelKind::Image => Sample::Vector(vec![1.0, 2.0]),
            };
            self.proved(id, &proof, Some(sample), now, 2, now);
        }
    }
}

fn address(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

fn hello(name: &str) -> Hello {
    let card = ModelCard {
        name: "tiny".into(),
        slots: 4,
        decode_tps: 100.0,
        ..Default::default()
    };
    Hello {
        node_name: name.into(),
        models: vec![card],
        ..Default::default()
    }
}

#[test]
fn a_silent_worker_is_pruned_at_the_timeout_and_not_before() {
    let start = Instant::now();
    let mut registry = Registry::new(Duration::from_secs(10));
    let (mesh, _) = registry.join("aa", address(1), hello("one"), start);
    let (plain, new) = registry
        .plain_heartbeat(address(2), Version::V5_0, start)
        .unwrap();
    assert!(new);
    registry.report(mesh, Load::default(), start + Duration::from_secs(5));
    assert!(
        registry
            .prune(start + Duration::from_millis(9_999))
            .is_empty()
    );
    let pruned: Vec<_> = registry
        .prune(start + Duration::from_secs(10))
        .iter()
        .map(|worker| worker.id)
        .collect();
    assert_eq!(pruned, [plain]);
    assert_eq!(registry.prune(start + Duration::from_secs(15)).len(), 1);
    assert!(registry.is_empty());
}

#[test]
fn a_heartbeat_keeps_a_worker_without_an_identity_alive() {
    let start = Instant::now();
    let mut registry = Registry::new(Duration::from_secs(10));
    for beat in 0..20 {
        let now = start + Duration::from_secs(2 * beat);
        let (_, new) = registry
            .plain_heartbeat(address(2), Version::V5_0, now)
            .unwrap();
        assert_eq!(new, beat == 0);
        assert!(registry.prune(now).is_empty());
    }
}

#[test]
fn a_node_that_comes_back_replaces_its_old_entry() {
    let start = Instant::now();
    let mut registry = Registry::new(Duration::from_secs(10));
    let (old, none) = registry.join("aa", address(1), hello("one"), start);
    assert_eq!(none, None);
    let (new, replaced) = registry.join("aa", address(9), hello("one"), start);
    assert_eq!(replaced, Some(old));
    assert_ne!(new, old);
    assert_eq!(registry.len(), 1);
}

#[test]
fn a_worker_that_moves_keeps_its_entry() {
    let start = Instant::now();
    let mut registry = Registry::new(Duration::from_secs(10));
    let (id, _) = registry.join("aa", address(1), hello("one"), start);
    assert_eq!(registry.moved(id, address(1)), None);
    assert_eq!(registry.moved(id, address(2)), Some(address(1)));
    assert_eq!(registry.get(id).unwrap().address, address(2));
    // Packets on its link are signs of life, with or without heartbeats.
    registry.seen(id, start + Duration::from_secs(9));
    assert!(registry.prune(start + Duration::from_secs(18)).is_empty());
}

#[test]
fn a_model_is_remembered_for_a_while_after_its_worker_left() {
    let start = Instant::now();
    let mut registry = Registry::new(Duration::from_secs(10));
    let (id, _) = registry.join("aa", address(1), hello("one"), start);
    registry.leave(id, start);
    assert!(registry.knows_model("tiny"));
    assert!(!registry.knows_model("large"));
    registry.prune(start + MODEL_MEMORY);
    assert!(!registry.knows_model("tiny"));
}

#[test]
fn a_batched_speed_is_brought_back_to_one_stream() {
    let start = Instant::now();
    let mut registry = Registry::new(Duration::from_secs(10));
    let (id, _) = registry.join("aa", address(1), hello("one"), start);
    let speeds = vec![ModelSpeed {
        name: "tiny".into(),
        decode_tps: 300.0,
        prefill_tps: f32::NAN,
        queued: None,
    }];
    registry.report(
        id,
        Load {
            running: 4,
            speeds,
            ..Default::default()
        },
        start,
    );
    let model = registry.get(id).unwrap().model("tiny").unwrap();
    assert_eq!(model.decode_tps, 150.0);
    assert_eq!(model.prefill_tps, 0.0);
}

#[test]
fn a_driver_serves_its_ring_until_it_is_withdrawn_and_a_whole_model_stays() {
    let start = Instant::now();
    let mut registry = Registry::new(Duration::from_secs(10));
    let (id, _) = registry.join("aa", address(1), hello("one"), start);
    let card = |name: &str, decode_tps| ModelCard {
        name: name.into(),
        decode_tps,
        ..Default::default()
    };
    registry.serve(id, 7, card("large", 10.0), start);
    registry.serve(id, 7, card("tiny", 10.0), start);
    let worker = registry.get(id).unwrap();
    assert_eq!(worker.model("large").unwrap().ring, Some(7));
    assert_eq!(
        worker.model("tiny").unwrap().ring,
        None,
        "it holds that one whole"
    );
    registry.serve(id, 7, card("large", 12.0), start);
    let worker = registry.of_node("aa").unwrap();
    assert_eq!(
        (
            worker.models.len(),
            worker.model("large").unwrap().decode_tps
        ),
        (2, 12.0)
    );
    registry.withdraw(id, 8, start);
    assert_eq!(registry.get(id).unwrap().models.len(), 2, "another ring");
    registry.withdraw(id, 7, start);
    assert!(registry.get(id).unwrap().model("large").is_none());
    assert!(registry.knows_model("large"), "it was served a moment ago");
}

fn serving(registry: &mut Registry, node: &str, now: Instant) -> WorkerId {
    let mut hello = hello(node);
    hello.models[0].fingerprint = "f".into();
    registry.join(node, address(1), hello, now).0
}

/// The answer of one that gives these tokens.
fn tokens(first: u32) -> Sample {
    let positions = (first..first + 8).map(|token| Position {
        token,
        logprob: -0.1,
        top: vec![(token, -0.1), (9999, -4.0)],
    });
    Sample::Text(positions.collect())
}

/// Asks all due workers for so many seconds. Liars give other tokens.
fn run(
    registry: &mut Registry,
    ids: &[(WorkerId, bool)],
    now: &mut Instant,
    seconds: u64,
) -> Vec<Finding> {
    let mut findings = Vec::new();
    for _ in 0..seconds {
        *now += Duration::from_secs(1);
        for (id, honest) in ids {
            registry.seen(*id, *now);
            for proof in registry.proofs_due(*id, &BTreeSet::new(), 7, *now) {
                let sample = tokens(if *honest { 1 } else { 500 });
                findings.extend(registry.proved(*id, &proof, Some(sample), *now, 8, *now));
            }
        }
        registry.prune(*now);
    }
    findings
}

#[test]
fn a_liar_never_serves_and_is_in_quarantine_within_30_s_and_comes_back_to_the_same() {
    let mut now = Instant::now();
    let mut registry = Registry::new(Duration::from_secs(10));
    let (a, b) = (
        serving(&mut registry, "a", now),
        serving(&mut registry, "b", now),
    );
    run(&mut registry, &[(a, true), (b, true)], &mut now, 60);
    let liar = serving(&mut registry, "liar", now);
    let service = |registry: &Registry, id, now| {
        let worker = registry.get(id).unwrap();
        registry.service(worker, &worker.models[0], now)
    };
    let mut findings = Vec::new();
    for _ in 0..30 {
        assert_ne!(service(&registry, liar, now), Service::Serves);
        let all = [(a, true), (b, true), (liar, false)];
        findings.extend(run(&mut registry, &all, &mut now, 1));
    }
    let [Finding::Quarantined { node, reason, .. }] = &findings[..] else {
        panic!("{findings:?}");
    };
    assert_eq!(node, "liar");
    assert!(reason.contains("differ from those of a, b"), "{reason}");
    assert_eq!(service(&registry, a, now), Service::Serves);
    assert!(registry.is_out("liar", now));
    assert!(registry.disagreements(now)[0].contains("in quarantine"));
    // Another connection is no other node.
    let again = serving(&mut registry, "liar", now);
    assert_eq!(service(&registry, again, now), Service::Out);
    assert!(
        registry
            .proofs_due(again, &BTreeSet::new(), 9, now)
            .is_empty()
    );
    // When the quarantine ends it has to agree first, as at the beginning.
    let all = [(a, true), (b, true), (again, false)];
    let findings = run(&mut registry, &all, &mut now, 120);
    assert_eq!(findings.len(), 1, "{findings:?}");
    assert!(registry.is_out("liar", now + Duration::from_secs(120)));
}

#[test]
fn an_operator_ends_a_quarantine_and_the_node_proves_itself_anew() {
    let now = Instant::now();
    let mut registry = Registry::new(Duration::from_secs(10));
    let id = serving(&mut registry, "a", now);
    registry.prove_all(id, now);
    let service = |registry: &Registry| {
        let worker = registry.get(id).unwrap();
        registry.service(worker, &worker.models[0], now)
    };
    registry.reputation.quarantine("a", "a", "it lies", now);
    registry.reputation.quarantine("a", "a", "it lies", now);
    assert_eq!(service(&registry), Service::Out);
    assert!(registry.readmit("a", now));
    assert_eq!(service(&registry), Service::Soon);
    registry.prove_all(id, now);
    assert_eq!(service(&registry), Service::Serves);
    let next = registry.reputation.quarantine("a", "a", "it lies", now);
    assert_eq!(next, Duration::from_secs(60), "as the first time");
    assert!(!registry.readmit("b", now));
}

#[test]
fn two_that_differ_are_both_named_and_the_junior_one_waits() {
    let mut now = Instant::now();
    let mut registry = Registry::new(Duration::from_secs(10));
    let senior = serving(&mut registry, "attic", now);
    run(&mut registry, &[(senior, true)], &mut now, 10);
    let junior = serving(&mut registry, "cellar", now);
    let both = [(senior, true), (junior, false)];
    let findings = run(&mut registry, &both, &mut now, 20);
    let [Finding::Disputed { text }] = &findings[..] else {
        panic!("{findings:?}");
    };
    assert!(text.contains("`attic`") && text.contains("`cellar`"));
    assert_eq!(registry.disagreements(now), std::slice::from_ref(text));
    let worker = registry.get(junior).unwrap();
    let model = &worker.models[0];
    assert_eq!(registry.service(worker, model, now), Service::Out);
    assert!(registry.why_not(worker, model, now).is_some());
}

#[test]
fn the_next_driver_of_a_ring_that_answered_needs_no_new_proof() {
    let now = Instant::now();
    let mut registry = Registry::new(Duration::from_secs(10));
    let card = || ModelCard {
        name: "large".into(),
        ..Default::default()
    };
    let bare = |registry: &mut Registry, node: &str| {
        registry.join(node, address(1), Hello::default(), now).0
    };
    let (one, two) = (bare(&mut registry, "a"), bare(&mut registry, "b"));
    let service = |registry: &Registry, id| {
        let worker = registry.get(id).unwrap();
        registry.service(worker, worker.model("large").unwrap(), now)
    };
    registry.serve(one, 7, card(), now);
    assert_eq!(service(&registry, one), Service::Soon);
    registry.prove_all(one, now);
    assert_eq!(service(&registry, one), Service::Serves);
    registry.withdraw(one, 7, now);
    registry.serve(two, 7, card(), now);
    assert_eq!(service(&registry, two), Service::Serves);
    registry.serve(one, 8, card(), now);
    assert_eq!(service(&registry, one), Service::Soon, "another ring");
}

#[test]
fn one_that_declines_questions_is_full_unless_nothing_comes_of_it() {
    let start = Instant::now();
    let mut registry = Registry::new(Duration::from_secs(10));
    let id = serving(&mut registry, "a", start);
    registry.prove_all(id, start);
    let at = |seconds| start + Duration::from_secs(seconds);
    assert!(registry.declined(id, "tiny", at(100)));
    assert!(
        registry
            .proofs_due(id, &BTreeSet::new(), 7, at(100))
            .is_empty(),
        "not at once again"
    );
    assert!(registry.declined(id, "tiny", at(129)));
    let model = &registry.get(id).unwrap().models[0];
    assert!(model.proven);
    // An answer that began long ago goes on.
    model.tokens_seen.note(at(129));
    assert!(registry.declined(id, "tiny", at(155)));
    assert!(
        !registry.declined(id, "tiny", at(160)),
        "it only says that it is full"
    );
}

#[test]
fn a_token_of_a_long_answer_disproves_silence() {
    let start = Instant::now();
    let mut registry = Registry::new(Duration::from_secs(10));
    let id = serving(&mut registry, "a", start);
    registry.prove_all(id, start);
    let at = |seconds| start + Duration::from_secs(seconds);
    let worker = registry.get_mut(id).unwrap();
    worker.models[0].tokens_seen.note(at(110));
    worker.probed("tiny", false, at(100), at(130));
    assert!(worker.models[0].proven);
    worker.probed("tiny", false, at(120), at(150));
    assert!(!worker.models[0].proven);
}

#[test]
fn claims_that_no_model_can_have_are_cut_or_left_out() {
    let now = Instant::now();
    let mut registry = Registry::new(Duration::from_secs(10));
    let card = |name: &str| ModelCard {
        name: name.into(),
        slots: u32::MAX,
        context: u32::MAX,
        dimensions: u32::MAX,
        architecture: "x\u{1b}".repeat(10_000),
        ..Default::default()
    };
    let names = [
        "good".to_owned(),
        "good".to_owned(),
        String::new(),
        "a\nb".into(),
        "x".repeat(9999),
    ];
    let hello = Hello {
        models: names.iter().map(|name| card(name)).collect(),
        ..Default::default()
    };
    let (id, _) = registry.join("a", address(1), hello, now);
    let models = &registry.get(id).unwrap().models;
    assert_eq!(models.len(), 1);
    let card = &models[0].card;
    assert!(card.slots <= MOST_SLOTS && card.context <= MOST_CONTEXT);
    assert!(card.dimensions <= MOST_DIMENSIONS && card.architecture.len() <= NAME_BYTES);
    assert!(!card.architecture.contains(char::is_control));
}

#[test]
fn new_models_are_asked_for_a_proof_once_a_second_and_each_name_once() {
    let start = Instant::now();
    let mut registry = Registry::new(Duration::from_secs(10));
    let (id, _) = registry.join("a", address(1), hello("one"), start);
    registry.prove_all(id, start);
    let asked = |registry: &mut Registry, ms| {
        let at = start + Duration::from_millis(ms);
        let proofs = registry.proofs_due(id, &BTreeSet::new(), 1, at).len();
        registry.prove_all(id, at);
        proofs
    };
    let list = |weights: u64| {
        let card = ModelCard {
            name: "other".into(),
            fingerprint: weights.to_string(),
            ..Default::default()
        };
        vec![card; 32]
    };
    registry.serves(id, list(0), start);
    assert_eq!(asked(&mut registry, 0), 1);
    assert_eq!(asked(&mut registry, 1), 0);
    // Other weights every tenth of a second.
    for tenth in 1..10 {
        registry.serves(id, list(tenth), start + Duration::from_millis(100 * tenth));
        assert_eq!(asked(&mut registry, 100 * tenth), 0);
    }
    assert_eq!(asked(&mut registry, 1_800), 1);
    // What it serves already is not new.
    registry.serves(id, list(9), start + Duration::from_millis(1_900));
    assert_eq!(asked(&mut registry, 1_900), 0);
}

#[test]
fn a_model_that_was_loaded_again_has_its_new_division_and_its_old_measurements() {
    let start = Instant::now();
    let mut registry = Registry::new(Duration::from_secs(10));
    let (id, _) = registry.join("a", address(1), hello("one"), start);
    registry.prove_all(id, start);
    let card = ModelCard {
        backend: "cuda\u{1b}".into(),
        split: Some(mesh_proto::DeviceSplit {
            device_layers: 3,
            ..Default::default()
        }),
        ..hello("one").models.remove(0)
    };
    registry.serves(id, vec![card], start);
    let model = &registry.get(id).expect("it is connected").models[0];
    let layers = model.card.split.as_ref().map(|split| split.device_layers);
    assert_eq!((&*model.card.backend, layers), ("cuda", Some(3)));
    assert!(model.proven);
}

#[test]
fn forged_heartbeats_do_not_grow_the_registry_without_bound() {
    let start = Instant::now();
    let mut registry = Registry::new(Duration::from_secs(10));
    let accepted = (1..=5000)
        .filter(|port| {
            let at = address(*port);
            registry.plain_heartbeat(at, Version::V5_1, start).is_some()
        })
        .count();
    assert_eq!(accepted, plain::MOST_PLAIN);
}
