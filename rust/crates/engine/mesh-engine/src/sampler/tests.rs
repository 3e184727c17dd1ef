use super::*;
use proptest::prelude::*;

/// The distribution of `params` over `row`, straight from the definition in [`SamplingParams`].
fn reference(row: &[f32], p: &SamplingParams) -> Vec<f64> {
    let mut order: Vec<usize> = (0..row.len())
        .filter(|&i| row[i] > f32::NEG_INFINITY)
        .collect();
    order.sort_by(|&a, &b| row[b].total_cmp(&row[a]).then(a.cmp(&b)));
    let max = f64::from(row[order[0]]);
    let weight = |i: usize| ((f64::from(row[i]) - max) / f64::from(p.temperature)).exp();
    if p.top_k > 0 {
        order.truncate(p.top_k as usize);
    }
    let total: f64 = order.iter().map(|&i| weight(i)).sum();
    let mut sum = 0.0;
    let nucleus = order.iter().position(|&i| {
        sum += weight(i);
        sum >= total * f64::from(p.top_p)
    });
    if p.top_p < 1.0 {
        order.truncate(nucleus.map_or(order.len(), |last| last + 1));
    }
    order.retain(|&i| weight(i) >= f64::from(p.min_p));
    let total: f64 = order.iter().map(|&i| weight(i)).sum();
    let mut distribution = vec![0.0; row.len()];
    for i in order {
        distribution[i] = weight(i) / total;
    }
    distribution
}

fn row(vocab: usize, seed: u64) -> Vec<f32> {
    (0..vocab)
        .map(|i| (random::uniform(seed, i as u32) * 16.0 - 8.0) as f32)
        .collect()
}

fn choose(row: &[f32], params: &SamplingParams, index: u32) -> Option<u32> {
    let sampler = Sampler::new(params.clone(), &[], &[]);
    sampler
        .choose(row, index, &mut Scratch::default())
        .map(|choice| choice.token)
}

/// Draws many tokens and compares their counts with the definition by a chi-squared test.
fn check_distribution(row: &[f32], params: &SamplingParams) {
    let draws = 10_000;
    let expected = reference(row, params);
    let sampler = Sampler::new(params.clone(), &[], &[]);
    let mut scratch = Scratch::default();
    let mut counts = vec![0u32; row.len()];
    for index in 0..draws {
        let choice = sampler.choose(row, index, &mut scratch).unwrap();
        counts[choice.token as usize] += 1;
    }
    // Tokens too rare for the test are pooled.
    let (mut rare_expected, mut rare_count) = (0.0, 0.0);
    let (mut chi_squared, mut bins) = (0.0, 0.0);
    for (&p, &count) in expected.iter().zip(&counts) {
        assert!(
            p > 0.0 || count == 0,
            "a token that was cut off was drawn, with {params:?}"
        );
        let (mean, count) = (p * f64::from(draws), f64::from(count));
        if mean < 5.0 {
            rare_expected += mean;
            rare_count += count;
        } else {
            chi_squared += (count - mean).powi(2) / mean;
            bins += 1.0;
        }
    }
    if rare_expected >= 5.0 {
        chi_squared += (rare_count - rare_expected).powi(2) / rare_expected;
        bins += 1.0;
    }
    // Mean k, variance 2k for k degrees of freedom; five deviations are not chance.
    let freedom: f64 = bins - 1.0;
    let limit = freedom + 5.0 * (2.0 * freedom).sqrt() + 5.0;
    assert!(
        chi_squared <= limit,
        "chi squared {chi_squared} over {limit} with {params:?}"
    );
}

#[test]
fn draws_follow_the_defined_distribution() {
    let row = row(1000, 1);
    let plain = SamplingParams::default();
    let cases = [
        plain.clone(),
        SamplingParams {
            temperature: 0.5,
            ..plain.clone()
        },
        SamplingParams {
            temperature: 2.0,
            top_k: 50,
            ..plain.clone()
        },
        SamplingParams {
            top_p: 0.7,
            ..plain.clone()
        },
        SamplingParams {
            temperature: 3.0,
            top_p: 0.99,
            ..plain.clone()
        },
        SamplingParams {
            min_p: 0.2,
            ..plain.clone()
        },
        SamplingParams {
            top_k: 100,
            top_p: 0.8,
            min_p: 0.3,
            ..plain.clone()
        },
        SamplingParams {
            top_p: 0.95,
            min_p: 0.05,
            temperature: 0.7,
            seed: 9,
            ..plain
        },
    ];
    for params in cases {
        check_distribution(&row, &params);
    }
}

#[test]
fn a_draw_depends_on_seed_and_index_alone() {
    let row = row(500, 2);
    let params = |seed| SamplingParams {
        seed,
        ..SamplingParams::default()
    };
    let answer = |seed| {
        (0..50)
            .map(|i| choose(&row, &params(seed), i))
            .collect::<Vec<_>>()
    };
    assert_eq!(answer(1), answer(1));
    assert_ne!(answer(1), answer(2));
    assert_eq!(answer(1)[30], choose(&row, &params(1), 30));
}

#[test]
fn greedy_takes_the_lowest_id_of_equals() {
    let mut row = vec![0.5; 5000];
    row[4321] = 3.0;
    row[1234] = 3.0;
    assert_eq!(choose(&row, &SamplingParams::greedy(), 0), Some(1234));
    let top_1 = SamplingParams {
        top_k: 1,
        ..SamplingParams::default()
    };
    assert_eq!(choose(&row, &top_1, 0), Some(1234));
}

#[test]
fn not_a_number_is_never_chosen_and_infinity_always() {
    let drawn = SamplingParams::default();
    let nucleus = SamplingParams {
        top_p: 0.9,
        min_p: 0.01,
        ..SamplingParams::default()
    };
    for params in [SamplingParams::greedy(), drawn, nucleus] {
        let mut row = vec![f32::NAN; 300];
        assert_eq!(choose(&row, &params, 0), None);
        row[17] = f32::NEG_INFINITY;
        assert_eq!(choose(&row, &params, 0), None);
        row[200] = -5.0;
        assert_eq!(choose(&row, &params, 0), Some(200));
        row[100] = f32::INFINITY;
        assert_eq!(choose(&row, &params, 0), Some(100));
        assert_eq!(choose(&[], &params, 0), None);
    }
}

#[test]
fn bias_bans_and_forces() {
    let row = row(100, 3);
    let likeliest = math::argmax(&row).unwrap();
    let banned = SamplingParams {
        logit_bias: vec![(likeliest, -100.0)],
        ..SamplingParams::greedy()
    };
    assert_ne!(choose(&row, &banned, 0), Some(likeliest));
    let forced = SamplingParams {
        logit_bias: vec![(5, 100.0)],
        ..SamplingParams::default()
    };
    assert!((0..100).all(|i| choose(&row, &forced, i) == Some(5)));
}

#[test]
fn penalties_look_where_they_should() {
    let row = [2.0, 1.9, 1.0, -1.0];
    let next = |params: &SamplingParams, prompt: &[u32], answer: &[u32]| {
        let sampler = Sampler::new(params.clone(), prompt, answer);
        sampler
            .choose(&row, 0, &mut Scratch::default())
            .unwrap()
            .token
    };
    let repetition = SamplingParams {
        repetition_penalty: 1.2,
        ..SamplingParams::greedy()
    };
    assert_eq!(next(&repetition, &[], &[]), 0);
    assert_eq!(next(&repetition, &[0], &[]), 1);
    assert_eq!(next(&repetition, &[], &[0]), 1);
    let presence = SamplingParams {
        presence_penalty: 0.5,
        ..SamplingParams::greedy()
    };
    assert_eq!(next(&presence, &[0], &[]), 0);
    assert_eq!(next(&presence, &[], &[0]), 1);
    assert_eq!(next(&presence, &[], &[0, 0, 1]), 0);
    let frequency = SamplingParams {
        frequency_penalty: 0.5,
        ..SamplingParams::greedy()
    };
    assert_eq!(next(&frequency, &[], &[0, 0, 1]), 1);
}

#[test]
fn a_resumed_sampler_penalises_what_was_generated_elsewhere() {
    let params = SamplingParams {
        repetition_penalty: 1.3,
        frequency_penalty: 0.2,
        ..SamplingParams::default()
    };
    let row = row(50, 4);
    let mut scratch = Scratch::default();
    let mut whole = Sampler::new(params.clone(), &[1, 2], &[]);
    let mut answer = Vec::new();
    for index in 0..40 {
        let token = whole.choose(&row, index, &mut scratch).unwrap().token;
        let resumed = Sampler::new(params.clone(), &[1, 2], &answer);
        assert_eq!(
            resumed.choose(&row, index, &mut scratch).unwrap().token,
            token
        );
        whole.accept(token);
        answer.push(token);
    }
}

#[test]
fn log_probabilities_are_the_models_own() {
    let row = row(2000, 5);
    let expected = reference(&row, &SamplingParams::default());
    let params = SamplingParams {
        logprobs: Some(5),
        logit_bias: vec![(7, 100.0)],
        ..SamplingParams::greedy()
    };
    let sampler = Sampler::new(params, &[], &[]);
    let choice = sampler.choose(&row, 0, &mut Scratch::default()).unwrap();
    let logprobs = choice.logprobs.unwrap();
    assert_eq!(logprobs.chosen.token, 7);
    assert_eq!(logprobs.top.len(), 5);
    for l in logprobs.top.iter().chain([&logprobs.chosen]) {
        let exact = expected[l.token as usize].ln();
        assert!(
            (f64::from(l.logprob) - exact).abs() < 1e-4,
            "{l:?}, but {exact}"
        );
    }
    assert!(logprobs.top.is_sorted_by(|a, b| a.logprob >= b.logprob));
    let best = math::argmax(&row).unwrap();
    assert_eq!(logprobs.top[0].token, best);

    let scored = score(&row, 7).unwrap();
    assert_eq!(scored.argmax, best);
    assert!((scored.logprob - logprobs.chosen.logprob).abs() < 1e-5);
    assert!((scored.max_logprob - logprobs.top[0].logprob).abs() < 1e-5);
}

#[test]
fn parameters_out_of_range_are_named() {
    let message = |params: SamplingParams| validate(&params, 10).unwrap_err().to_string();
    let plain = SamplingParams::default();
    assert_eq!(
        message(SamplingParams {
            temperature: -1.0,
            ..plain.clone()
        }),
        "temperature is -1, but must be 0 to 100"
    );
    assert!(
        message(SamplingParams {
            temperature: f32::NAN,
            ..plain.clone()
        })
        .contains("NaN")
    );
    assert!(
        message(SamplingParams {
            top_p: -0.5,
            ..plain.clone()
        })
        .starts_with("top_p is -0.5")
    );
    assert!(
        message(SamplingParams {
            min_p: 1.5,
            ..plain.clone()
        })
        .starts_with("min_p")
    );
    let bias = vec![(10, 1.0)];
    assert!(
        message(SamplingParams {
            logit_bias: bias,
            ..plain.clone()
        })
        .contains("token id 10")
    );
    assert!(
        message(SamplingParams {
            logprobs: Some(21),
            ..plain.clone()
        })
        .contains("21")
    );
    assert_eq!(validate(&plain, 10), Ok(()));
}

/// Logits with ties, infinities and NaN among them.
fn hostile_logit() -> impl Strategy<Value = f32> {
    prop_oneof![
        8 => (-20i8..20).prop_map(|x| f32::from(x) / 4.0),
        1 => prop_oneof![
            Just(f32::NAN),
            Just(f32::INFINITY),
            Just(f32::NEG_INFINITY),
            Just(f32::MAX),
            Just(f32::MIN),
        ],
    ]
}

fn params() -> impl Strategy<Value = SamplingParams> {
    let cuts = (0u32..40, 0.0f32..=1.0, 0.0f32..=1.0);
    let temperature = prop_oneof![Just(0.0f32), 0.00001f32..100.0];
    (
        temperature,
        cuts,
        any::<u64>(),
        0.1f32..3.0,
        prop::option::of(0u32..20),
    )
        .prop_map(
            |(temperature, (top_k, top_p, min_p), seed, repetition_penalty, logprobs)| {
                SamplingParams {
                    temperature,
                    top_k,
                    top_p,
                    min_p,
                    repetition_penalty,
                    seed,
                    logprobs,
                    ..SamplingParams::default()
                }
            },
        )
}

proptest! {
    #[test]
    fn any_row_and_parameters_give_a_possible_token_or_none(
        row in prop::collection::vec(hostile_logit(), 0..400),
        params in params(),
        index: u32,
    ) {
        let sampler = Sampler::new(params, &[0, 3], &[1, 3]);
        let choice = sampler.choose(&row, index, &mut Scratch::default());
        let possible = row.iter().any(|&x| x > f32::NEG_INFINITY);
        prop_assert!(possible || choice.is_none());
        if let Some(choice) = choice {
            prop_assert!(row[choice.token as usize] > f32::NEG_INFINITY);
        }
    }

    #[test]
    fn the_top_of_a_row_is_the_beginning_of_the_sorted_row(
        row in prop::collection::vec(hostile_logit(), 0..2000),
        k in 0usize..300,
        floor in prop_oneof![Just(f32::NEG_INFINITY), -5.0f32..5.0],
    ) {
        let all = |floor: f32| row.iter().zip(0u32..).filter(move |&(&x, _)| x >= floor && x > f32::NEG_INFINITY);
        let mut expected: Vec<(f32, u32)> = all(floor).map(|(&x, i)| (x, i)).collect();
        expected.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        expected.truncate(k);
        let mut out = Vec::new();
        select::top(&row, k, floor, &mut out);
        let got: Vec<u32> = out.iter().map(|c| c.token).collect();
        prop_assert_eq!(got, expected.iter().map(|&(_, i)| i).collect::<Vec<_>>());

        select::at_least(&row, floor, &mut out);
        let got: Vec<u32> = out.iter().map(|c| c.token).collect();
        prop_assert_eq!(got, all(floor).map(|(_, i)| i).collect::<Vec<_>>());
    }
}
