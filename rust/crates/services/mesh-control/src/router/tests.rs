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
            router: Router::new(Capacity { ahead: 1, plain: 2 }),
            now,
        }
    }

    fn place(&mut self, ask: &Requirements) -> Choice {
        let choice = self.router.choose(&self.registry, ask, self.now);
        if let Choice::Worker(id, _) = choice {
            self.router.assigned(&mut self.registry, id, ask);
            self.registry.get_mut(id).unwrap().assigned += 1;
        }
        choice
    }

    fn worker(&mut self, ask: &Requirements) -> u64 {
        match self.place(ask) {
            Choice::Worker(id, _) => id.0,
            other => panic!("no worker: {other:?}"),
        }
    }
}

fn ask() -> Requirements {
    Requirements {
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
    let talk = Requirements {
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
    let again = Requirements {
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
    let begun = Requirements {
        fingerprint: Some("other".into()),
        ..ask()
    };
    assert_eq!(fleet.place(&begun), Choice::Nobody);
    assert_eq!(
        fleet.worker(&Requirements {
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
    let embed = Requirements {
        kind: ModelKind::Embed,
        ..ask()
    };
    for _ in 0..3 {
        assert_eq!(fleet.worker(&embed), 2);
        assert_eq!(fleet.worker(&ask()), 1);
    }
}

#[test]
fn workers_without_an_identity_take_plain_tasks_only() {
    let mut fleet = Fleet::new(&[]);
    fleet
        .registry
        .plain_heartbeat(([127, 0, 0, 1], 4000).into(), Version::V5_1, fleet.now)
        .unwrap();
    assert_eq!(fleet.place(&ask()), Choice::Nobody);
    let plain = Requirements {
        plain: true,
        ..ask()
    };
    assert!(matches!(fleet.place(&plain), Choice::Worker(..)));
    assert!(matches!(fleet.place(&plain), Choice::Worker(..)));
    assert_eq!(fleet.place(&plain), Choice::Busy);
}

#[test]
fn a_worker_without_an_identity_is_never_preferred_to_a_mesh_worker() {
    let mut fleet = Fleet::new(&[1.0]);
    let (plain_worker, _) = fleet
        .registry
        .plain_heartbeat(([127, 0, 0, 1], 4000).into(), Version::V5_0, fleet.now)
        .unwrap();
    // As fast as it can claim to be, and the mesh worker as slow as can be.
    fleet.registry.get_mut(plain_worker).unwrap().task_seconds = 1e-9;
    let plain = Requirements {
        plain: true,
        ..ask()
    };
    let mesh = fleet.worker(&plain);
    assert_ne!(mesh, plain_worker.0);
    for _ in 0..4 {
        assert_eq!(fleet.worker(&plain), mesh);
    }
    assert_eq!(
        fleet.place(&plain),
        Choice::Busy,
        "it is waited for when it is full"
    );
    let failed = Requirements {
        avoid: vec![WorkerId(mesh)],
        ..plain.clone()
    };
    assert_eq!(
        fleet.worker(&failed),
        plain_worker.0,
        "a task that failed there may go on"
    );
    fleet.registry.leave(WorkerId(mesh), fleet.now);
    assert_eq!(fleet.worker(&plain), plain_worker.0);
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
    // A worker that comes back with the old weights meanwhile goes on.
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
        .plain_heartbeat(([127, 0, 0, 1], 4000).into(), Version::V5_1, fleet.now)
        .unwrap();
    assert!(!another(&fleet));
}

#[test]
fn a_worker_without_an_identity_waits_until_a_mesh_workers_trial_is_over() {
    let mut fleet = Fleet::new(&[]);
    let (plain_worker, _) = fleet
        .registry
        .plain_heartbeat(([127, 0, 0, 1], 4000).into(), Version::V5_0, fleet.now)
        .unwrap();
    let plain = Requirements {
        plain: true,
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
    assert_eq!(fleet.worker(&plain), plain_worker.0, "it never answered");
    fleet.registry.prove_all(mesh, fleet.now);
    assert_eq!(fleet.worker(&plain), mesh.0);
    // One that keeps failing is left alone for a while, too.
    fleet.registry.leave(mesh, fleet.now);
    let key = fleet.registry.get(plain_worker).unwrap().key();
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
        plain_worker.0,
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
    let serves = |fleet: &Fleet, ask: &Requirements| {
        let worker = fleet.registry.get(paused).unwrap();
        serves(&fleet.registry, worker, ask, fleet.now)
    };
    assert_eq!(serves(&fleet, &ask()), Service::Out);
    // The other one does not know the request's fields: for this request there is nobody else.
    fleet.registry.get_mut(paused).unwrap().request_revision = 1;
    let newer = Requirements {
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
