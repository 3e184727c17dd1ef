mod brute;

use std::collections::BTreeMap;

use super::*;

/// A model whose layers take 100 bytes, and one byte per KV row.
fn model(layers: u32) -> ModelSpec {
    ModelSpec {
        layers,
        hidden: 64,
        layer_bytes: 100,
        first_bytes: 50,
        last_bytes: 70,
        kv_bytes: 1,
    }
}

fn node(id: &str, memory: u64, decode_us: f64) -> Candidate {
    Candidate {
        id: id.into(),
        name: id.to_uppercase(),
        memory,
        decode_us,
        prefill_us: decode_us / 4.0,
        logits_us: decode_us,
        load: 0.0,
        reserved_for: Vec::new(),
        paths: BTreeMap::from([(
            String::new(),
            PathSpec {
                rtt_us: 200.0,
                bandwidth: 1e9,
            },
        )]),
    }
}

fn policy() -> Policy {
    Policy {
        context: 10,
        slots: 1,
        ..Policy::default()
    }
}

/// Asserts the invariants of every plan.
fn assert_sound(model: &ModelSpec, candidates: &[Candidate], policy: &Policy, plan: &Plan) {
    let mut end = 0;
    let mut used: BTreeMap<&str, u64> = BTreeMap::new();
    let mut members = BTreeSet::new();
    for stage in &plan.stages {
        assert_eq!(stage.layers.start, end, "{plan:?}");
        assert!(!stage.layers.is_empty(), "{plan:?}");
        end = stage.layers.end;
        assert!(
            members.insert(&stage.node),
            "two stages on a node: {plan:?}"
        );
        assert_ne!(stage.standby.as_ref(), Some(&stage.node), "{plan:?}");
        let mut bytes = (model.layer_bytes + plan.kv_tokens * model.kv_bytes)
            * u64::from(stage.layers.end - stage.layers.start);
        bytes += if stage.layers.start == 0 {
            model.first_bytes
        } else {
            0
        };
        bytes += if end == model.layers {
            model.last_bytes
        } else {
            0
        };
        assert_eq!(stage.memory, bytes);
        for node in [Some(&stage.node), stage.standby.as_ref()]
            .into_iter()
            .flatten()
        {
            *used.entry(node).or_default() += bytes;
        }
    }
    assert_eq!(end, model.layers);
    assert!(plan.kv_tokens >= u64::from(policy.context));
    for (id, bytes) in used {
        let candidate = candidates
            .iter()
            .find(|c| c.id == *id)
            .expect("a candidate");
        assert!(bytes <= candidate.memory, "{id} holds {bytes}: {plan:?}");
        let reserved = &candidate.reserved_for;
        assert!(reserved.is_empty() || reserved.contains(&policy.purpose));
    }
    for candidate in candidates {
        let out = plan.left_out.iter().any(|out| out.node == candidate.id);
        assert_ne!(out, members.contains(&candidate.id), "{plan:?}");
    }
}

/// A generator that gives the same meshes everywhere.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (self.0 >> 33) % limit
    }

    fn mesh(&mut self) -> (ModelSpec, Vec<Candidate>, Policy) {
        let model = model(1 + self.below(6) as u32);
        let count = 1 + self.below(4) as usize;
        let ids = ["a", "b", "c", "d"];
        let mut nodes: Vec<Candidate> = ids[..count]
            .iter()
            .map(|id| {
                let memory = 100 + self.below(900);
                let mut node = node(id, memory, 1.0 + self.below(200) as f64);
                node.logits_us = 1.0 + self.below(300) as f64;
                node.load = self.below(3) as f32 / 2.0;
                if self.below(10) == 0 {
                    node.reserved_for = vec!["images".into()];
                }
                if self.below(3) == 0 {
                    node.paths.clear();
                }
                node
            })
            .collect();
        for node in &mut nodes {
            for id in &ids[..count] {
                if node.id != *id && self.below(2) == 0 {
                    let path = PathSpec {
                        rtt_us: self.below(600) as f64,
                        bandwidth: [1e5, 1e6, 1e8][self.below(3) as usize],
                    };
                    node.paths.insert((*id).into(), path);
                }
            }
        }
        let policy = Policy {
            objective: match self.below(2) {
                0 => Objective::Latency,
                _ => Objective::Throughput,
            },
            kv_tokens: Some(10),
            stages: (self.below(4) == 0).then(|| 1 + self.below(3) as u32),
            half_rows: self.below(2) == 0,
            ..policy()
        };
        (model, nodes, policy)
    }
}

#[test]
fn the_plan_is_the_best_of_all_orders_and_splits() {
    let mut random = Random(1);
    let (mut planned, mut stages, mut standbys) = (0, [0; 5], 0);
    for round in 0..2000 {
        let (model, nodes, policy) = random.mesh();
        let all = brute::layouts(&model, &nodes, &policy, 10);
        let plan = match place(&model, &nodes, &policy) {
            Ok(plan) => plan,
            Err(error) => {
                assert!(all.is_empty(), "round {round}: {error}, but {:?}", all[0]);
                continue;
            }
        };
        assert_sound(&model, &nodes, &policy, &plan);
        let slowest_us = 1e6 / plan.tokens_per_second;
        let same = |a: f64, b: f64| (a - b).abs() <= b * 1e-7;
        let least =
            |value: fn(&brute::Layout) -> f64| all.iter().map(value).fold(f64::INFINITY, f64::min);
        let (best, value) = match policy.objective {
            Objective::Latency => (least(|layout| layout.0), plan.token_us),
            Objective::Throughput => (least(|layout| layout.1), slowest_us),
        };
        assert!(same(value, best), "round {round}: {value} is not {best}");
        let equal: Vec<_> = all
            .iter()
            .filter(|layout| match policy.objective {
                Objective::Latency => same(layout.0, best),
                Objective::Throughput => same(layout.1, best),
            })
            .collect();
        let token = equal
            .iter()
            .map(|layout| layout.0)
            .fold(f64::INFINITY, f64::min);
        assert!(
            same(plan.token_us, token),
            "round {round}: {} is not {token}",
            plan.token_us
        );
        let fewest = equal
            .iter()
            .filter(|layout| same(layout.0, token))
            .map(|layout| layout.2)
            .min();
        assert_eq!(Some(plan.stages.len()), fewest, "round {round}");

        for out in &plan.left_out {
            let with = all
                .iter()
                .filter(|layout| layout.3.contains(&out.node))
                .map(|layout| match policy.objective {
                    Objective::Latency => layout.0,
                    Objective::Throughput => layout.1,
                })
                .fold(f64::INFINITY, f64::min);
            match &out.reason {
                Reason::Slower {
                    with_us,
                    without_us,
                    ..
                } => {
                    assert!(
                        same(*with_us, with) && same(*without_us, best),
                        "round {round}"
                    );
                }
                Reason::NotNeeded => assert!(same(with, best), "round {round}"),
                _ => assert!(with.is_infinite(), "round {round}: {out:?}"),
            }
        }
        let covered = plan
            .stages
            .iter()
            .filter(|stage| stage.standby.is_some())
            .count();
        assert_eq!(
            covered,
            brute::coverage(&plan, &nodes, &policy),
            "round {round}: {plan:?}"
        );
        let held: Vec<Assignment> = plan.stages.iter().map(Assignment::from).collect();
        let (token_us, rate) = evaluate(&model, &held, &nodes, &policy).expect("the plan's own");
        assert!(same(token_us, plan.token_us) && same(rate, plan.tokens_per_second));
        planned += 1;
        stages[plan.stages.len()] += 1;
        standbys += covered;
    }
    // The meshes were neither all hopeless nor all trivial.
    assert!(
        planned >= 1000 && standbys > 200,
        "{planned} plans, {standbys} standbys"
    );
    assert!(stages[1..].iter().all(|&count| count > 10), "{stages:?}");
}

#[test]
fn beyond_the_exact_search_the_local_one_comes_close() {
    let mut random = Random(7);
    let (mut worst, mut found) = (1.0f64, 0);
    for round in 0..60 {
        let objective = [Objective::Latency, Objective::Throughput][round % 2];
        let model = model(12);
        let usable: Vec<Candidate> = (0..8)
            .map(|i| {
                let memory = 250 + random.below(700);
                node(&format!("n{i}"), memory, 10.0 + random.below(90) as f64)
            })
            .collect();
        let policy = Policy {
            objective,
            kv_tokens: Some(10),
            ..policy()
        };
        let refs: Vec<&Candidate> = usable.iter().collect();
        let mesh = Mesh::new(&model, &refs, &policy);
        let demand = Demand {
            objective,
            stages: None,
            kv_tokens: 10,
            must: None,
        };
        let search = Search::new(&mesh);
        if let Some(best) = search.best(&demand) {
            let near = search.local(&demand).expect("some layout");
            worst = worst.max(near.value / best.value);
            found += 1;
        }
    }
    assert!(found > 40, "{found}");
    println!("{found} meshes, the worst layout took {worst} times the best");
    assert!(worst < 1.1, "{worst} times the best");
}

#[test]
fn many_nodes_are_placed_too() {
    let model = model(40);
    for objective in [Objective::Latency, Objective::Throughput] {
        let nodes: Vec<Candidate> = (0..100)
            .map(|i| node(&format!("n{i:02}"), 700, 50.0 + f64::from(i)))
            .collect();
        let policy = Policy {
            objective,
            ..policy()
        };
        let begin = std::time::Instant::now();
        let plan = place(&model, &nodes, &policy).expect("a plan");
        assert!(begin.elapsed().as_secs() < 10, "{:?}", begin.elapsed());
        assert_sound(&model, &nodes, &policy, &plan);
        assert!(plan.stages.len() >= 7, "{}", plan.stages.len());
        assert!(plan.stages.iter().all(|stage| stage.standby.is_some()));
    }
}

#[test]
fn a_slow_node_is_left_out_with_numbers() {
    let nodes = [node("fast", 10_000, 1_000.0), node("slow", 10_000, 9_000.0)];
    let plan = place(&model(10), &nodes, &policy()).expect("a plan");
    assert_eq!(plan.stages.len(), 1);
    assert_eq!(plan.stages[0].node, "fast");
    assert_eq!(plan.stages[0].standby.as_deref(), Some("slow"));
    assert_eq!(plan.token_us, 11_000.0);
    let [LeftOut { node, reason }] = &plan.left_out[..] else {
        panic!("{:?}", plan.left_out);
    };
    assert_eq!(node, "slow");
    let Reason::Slower {
        with_us,
        without_us,
        ..
    } = *reason
    else {
        panic!("{reason:?}");
    };
    assert_eq!(without_us, 11_000.0);
    // One layer on it, and two hops.
    assert!(with_us > 19_000.0 && with_us < 20_000.0, "{with_us}");
}

#[test]
fn throughput_takes_a_second_node_where_latency_does_not() {
    let nodes = [node("a", 10_000, 100.0), node("b", 10_000, 100.0)];
    let at = |objective| {
        let policy = Policy {
            objective,
            ..policy()
        };
        place(&model(20), &nodes, &policy).expect("a plan")
    };
    let (alone, both) = (at(Objective::Latency), at(Objective::Throughput));
    assert_eq!(alone.stages.len(), 1);
    assert_eq!(alone.left_out.len(), 1);
    assert_eq!(both.stages.len(), 2);
    assert!(both.tokens_per_second > 1.8 * alone.tokens_per_second);
    assert!(both.token_us > alone.token_us);
}

#[test]
fn a_forced_number_of_stages_is_kept_and_equal_nodes_share() {
    let nodes = [
        node("a", 10_000, 10.0),
        node("b", 10_000, 10.0),
        node("c", 10_000, 10.0),
    ];
    for stages in 1..=3 {
        let policy = Policy {
            stages: Some(stages),
            ..policy()
        };
        let plan = place(&model(30), &nodes, &policy).expect("a plan");
        assert_sound(&model(30), &nodes, &policy, &plan);
        assert_eq!(plan.stages.len(), stages as usize);
        for stage in &plan.stages {
            assert_eq!(stage.layers.len() as u32, 30 / stages);
        }
    }
    let policy = Policy {
        stages: Some(4),
        ..policy()
    };
    let error = place(&model(30), &nodes, &policy).expect_err("three nodes");
    assert!(
        matches!(
            error,
            PlanError::Stages {
                asked: 4,
                nodes: 3,
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn reservations_are_honoured() {
    let mut nodes = [node("a", 10_000, 10.0), node("b", 10_000, 100.0)];
    nodes[0].reserved_for = vec!["embeddings".into()];
    let plan = place(&model(4), &nodes, &policy()).expect("a plan");
    assert_eq!(plan.stages[0].node, "b");
    assert_eq!(plan.stages[0].standby, None);
    let reserved = Reason::Reserved {
        purposes: vec!["embeddings".into()],
    };
    assert_eq!(plan.left_out[0].reason, reserved);
    let policy = Policy {
        purpose: "embeddings".into(),
        ..policy()
    };
    let plan = place(&model(4), &nodes, &policy).expect("a plan");
    assert_eq!(plan.stages[0].node, "a");
}

#[test]
fn what_is_missing_is_named() {
    let nodes = [node("a", 400, 10.0), node("b", 300, 10.0)];
    let error = place(&model(10), &nodes, &policy()).expect_err("1220 bytes");
    assert_eq!(
        error.to_string(),
        "the model needs 1.2 KiB for its weights and the KV cache of one context of 10 tokens; the 2 nodes that can be used \
         offer 0.7 KiB: add a node, shorten the context or take a smaller weight format"
    );
    assert_eq!(place(&model(10), &[], &policy()), Err(PlanError::Empty));
    let mut unknown = node("a", 4000, f64::NAN);
    unknown.load = f32::NAN;
    let error = place(&model(10), &[unknown, node("b", 10, 1.0)], &policy()).expect_err("nobody");
    assert_eq!(
        error.to_string(),
        "none of the 2 nodes can be used: 1 of unknown speed, 1 without memory for one layer and one \
         context"
    );
    let pieces: Vec<Candidate> = (0..8).map(|i| node(&i.to_string(), 215, 1.0)).collect();
    let error = place(&model(10), &pieces, &policy()).expect_err("one layer each");
    assert!(
        matches!(error, PlanError::Pieces { layer: 110, .. }),
        "{error}"
    );
}

#[test]
fn kv_memory_shrinks_before_a_slow_node_is_taken_and_not_below_one_context() {
    let wanting = |slots| Policy { slots, ..policy() };
    // Both together could hold 8 contexts; the fast one alone holds two.
    let nodes = [node("fast", 1320, 10.0), node("slow", 100_000, 5_000.0)];
    let plan = place(&model(10), &nodes, &wanting(8)).expect("a plan");
    assert_eq!((plan.stages.len(), plan.kv_tokens), (1, 20));
    // A node as fast as it is taken for the sake of KV memory where the hop costs little.
    let mut near = [node("a", 1320, 1_000.0), node("b", 100_000, 1_010.0)];
    near[0].paths.insert(
        "b".into(),
        PathSpec {
            rtt_us: 10.0,
            bandwidth: 1e9,
        },
    );
    let plan = place(&model(10), &near, &wanting(8)).expect("a plan");
    assert_eq!(plan.kv_tokens, 80);
    // A plan needs KV memory for at least one context.
    let error = place(&model(10), &[node("a", 1219, 1.0)], &wanting(1)).expect_err("1 byte short");
    assert!(
        matches!(
            error,
            PlanError::Memory {
                needs: 1220,
                offers: 1219,
                ..
            }
        ),
        "{error}"
    );
    assert!(place(&model(10), &[node("a", 1220, 1.0)], &wanting(1)).is_ok());
}

#[test]
fn the_order_of_the_candidates_does_not_matter() {
    let mut random = Random(3);
    for _ in 0..200 {
        let (model, mut nodes, policy) = random.mesh();
        let plan = place(&model, &nodes, &policy).ok();
        nodes.reverse();
        assert_eq!(place(&model, &nodes, &policy).ok(), plan);
        nodes.extend_from_within(..);
        assert_eq!(place(&model, &nodes, &policy).ok(), plan, "listed twice");
    }
}

#[test]
fn hostile_numbers_do_not_panic() {
    let numbers = [
        0.0,
        -1.0,
        1e300,
        1e-300,
        f64::NAN,
        f64::INFINITY,
        f64::NEG_INFINITY,
        5.0,
    ];
    for (i, &x) in numbers.iter().enumerate() {
        for &y in &numbers {
            let mut bad = node("bad", u64::MAX >> i, x);
            bad.logits_us = y;
            bad.prefill_us = y;
            bad.load = y as f32;
            bad.paths.insert(
                "good".into(),
                PathSpec {
                    rtt_us: x,
                    bandwidth: y,
                },
            );
            let nodes = [bad, node("good", u64::MAX, 10.0)];
            for objective in [Objective::Latency, Objective::Throughput] {
                let policy = Policy {
                    objective,
                    context: u32::MAX,
                    slots: u32::MAX,
                    kv_tokens: Some(u64::MAX),
                    stages: Some(2),
                    ..policy()
                };
                if let Ok(plan) = place(&model(1024), &nodes, &policy) {
                    assert!(plan.token_us.is_finite() && plan.tokens_per_second.is_finite());
                }
            }
        }
    }
    let bad_model = ModelSpec {
        layers: u32::MAX,
        ..model(1)
    };
    let error = place(&bad_model, &[node("a", 1, 1.0)], &policy()).expect_err("layers");
    assert!(matches!(
        error,
        PlanError::Model {
            field: "layers",
            ..
        }
    ));
}

#[test]
fn a_lost_standby_is_replaced_by_a_node_with_room() {
    let model = model(4);
    let stages = [
        Assignment {
            node: "a".into(),
            layers: 0..2,
            standby: Some("c".into()),
        },
        Assignment {
            node: "b".into(),
            layers: 2..4,
            standby: None,
        },
    ];
    let nodes = [
        node("a", 1_000, 10.0),
        node("b", 1_000, 10.0),
        node("c", 1_000, 10.0),
        node("d", 1_000, 90.0),
        node("e", 100, 1.0),
    ];
    let standby = |nodes: &[Candidate], exclude: &[String]| {
        standby_for(&model, &stages, 1, 10, nodes, &policy(), exclude)
    };
    // d holds nothing; then c, which already stands by; then a, which works.
    assert_eq!(standby(&nodes, &[]).as_deref(), Some("d"));
    assert_eq!(standby(&nodes, &["d".into()]).as_deref(), Some("c"));
    assert_eq!(standby(&nodes[..2], &[]).as_deref(), Some("a"));
    assert_eq!(standby(&nodes[1..2], &[]), None);
    // a needs 270 bytes for its own stage, and would need 290 more.
    assert_eq!(standby(&[node("a", 559, 1.0)], &[]), None);
    assert_eq!(standby(&[node("a", 560, 1.0)], &[]).as_deref(), Some("a"));
    assert_eq!(
        standby_for(&model, &stages, 7, 10, &nodes, &policy(), &[]),
        None
    );

    let replacement =
        |exclude: &[String]| replacement_for(&model, &stages, 1, 10, &nodes, &policy(), exclude);
    assert_eq!(replacement(&["b".into()]).as_deref(), Some("c"));
    assert_eq!(replacement(&["b".into(), "c".into()]).as_deref(), Some("d"));
    assert_eq!(replacement(&["b".into(), "c".into(), "d".into()]), None);
}

proptest::proptest! {
    #[test]
    fn plans_are_sound(seed in 0u64..u64::MAX, slots in 1u32..20, spare in 0u64..3000) {
        let (model, mut nodes, mut policy) = Random(seed).mesh();
        for node in &mut nodes {
            node.memory += spare;
        }
        policy.kv_tokens = None;
        policy.slots = slots;
        if let Ok(plan) = place(&model, &nodes, &policy) {
            assert_sound(&model, &nodes, &policy, &plan);
            assert!(plan.kv_tokens <= u64::from(slots) * 10);
        }
    }
}
