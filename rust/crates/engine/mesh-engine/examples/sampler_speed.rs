//! Measures the time to choose one token, for vocabularies of 49,152 and 151,936 tokens, against one pass
//! that only adds up the logits.

use std::hint::black_box;
use std::time::{Duration, Instant};

use mesh_engine::SamplingParams;
use mesh_engine::sampler::{Sampler, Scratch};

fn main() {
    let plain = SamplingParams::default();
    let cases = [
        ("greedy", SamplingParams::greedy()),
        (
            "greedy, 5 logprobs",
            SamplingParams {
                logprobs: Some(5),
                ..SamplingParams::greedy()
            },
        ),
        (
            "repetition 1.1",
            SamplingParams {
                repetition_penalty: 1.1,
                ..SamplingParams::greedy()
            },
        ),
        ("plain draw", plain.clone()),
        (
            "top-k 40",
            SamplingParams {
                top_k: 40,
                ..plain.clone()
            },
        ),
        (
            "top-p 0.95",
            SamplingParams {
                top_p: 0.95,
                temperature: 0.7,
                ..plain.clone()
            },
        ),
        (
            "min-p 0.05",
            SamplingParams {
                min_p: 0.05,
                ..plain
            },
        ),
    ];
    for vocab in [49_152, 151_936] {
        let row = row(vocab);
        let sum = median(|_| {
            black_box(black_box(&row).iter().sum::<f32>());
        });
        println!("vocabulary {vocab}: adding up {:.1} us", micros(sum));
        for (name, params) in &cases {
            let sampler = Sampler::new(params.clone(), &[1, 2, 3], &[4, 5]);
            let mut scratch = Scratch::default();
            let time = median(|i| {
                black_box(sampler.choose(black_box(&row), i, &mut scratch));
            });
            let ratio = time.as_secs_f64() / sum.as_secs_f64();
            println!(
                "  {name:20} {:7.1} us, {ratio:.2} x adding up",
                micros(time)
            );
        }
    }
}

/// Logits distributed like a model's: bell-shaped, with a few that stand out.
fn row(vocab: usize) -> Vec<f32> {
    let mut state = 1u64;
    let mut random = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 24) as f32
    };
    let bell = |random: &mut dyn FnMut() -> f32| (0..6).map(|_| random()).sum::<f32>() * 3.0 - 9.0;
    let mut row: Vec<f32> = (0..vocab).map(|_| bell(&mut random)).collect();
    for i in 0..20 {
        row[i * 997] += 12.0 - i as f32 / 2.0;
    }
    row
}

fn median(mut run: impl FnMut(u32)) -> Duration {
    let mut times: Vec<Duration> = (0..200)
        .map(|i| {
            let start = Instant::now();
            run(i);
            start.elapsed()
        })
        .collect();
    times.sort_unstable();
    times[times.len() / 2]
}

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}
