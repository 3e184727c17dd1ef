//! Normal numbers against torch's CPU generator: tests/data/randn.json, which tests/reference/make_goldens.py writes.

use mesh_diffusion::noise::Noise;
use serde::Deserialize;

#[derive(Deserialize)]
struct Goldens {
    cases: Vec<Case>,
    large: Large,
}

#[derive(Deserialize)]
struct Case {
    seed: u64,
    arrays: Vec<Vec<f32>>,
}

#[derive(Deserialize)]
struct Large {
    seed: u64,
    count: usize,
    every_1000th: Vec<f32>,
    largest: f32,
}

fn goldens() -> Goldens {
    serde_json::from_str(include_str!("data/randn.json")).unwrap()
}

fn near(found: f32, expected: f32) -> bool {
    (found - expected).abs() <= 1e-6
}

#[test]
fn numbers_are_those_of_torch() {
    let goldens = goldens();
    for Case { seed, arrays } in goldens.cases {
        let mut noise = Noise::new(seed);
        for expected in arrays {
            let found = noise.normal(expected.len());
            for (found, expected) in found.iter().zip(&expected) {
                assert!(
                    near(*found, *expected),
                    "seed {seed}: {found}, not {expected}"
                );
            }
        }
    }
    let large = goldens.large;
    let found = Noise::new(large.seed).normal(large.count);
    for (found, expected) in found.iter().step_by(1000).zip(&large.every_1000th) {
        assert!(near(*found, *expected), "{found}, not {expected}");
    }
    let largest = found.iter().fold(0.0, |max: f32, x| max.max(x.abs()));
    assert!(
        near(largest, large.largest),
        "{largest}, not {}",
        large.largest
    );
}

#[test]
fn a_generator_goes_on_from_its_state() {
    for counts in [[16, 3, 20, 1], [1, 2, 17, 640], [5, 5, 5, 5]] {
        let mut noise = Noise::new(11);
        for count in counts {
            noise.normal(count);
            let mut again = Noise::resume(noise.state());
            assert_eq!(again.normal(33), noise.clone().normal(33));
            assert_eq!(again.normal(3), {
                let mut noise = noise.clone();
                noise.normal(33);
                noise.normal(3)
            });
        }
    }
}

#[test]
fn the_draws_of_an_array_are_known() {
    for count in (0..70).chain([1000, 4096]) {
        let mut noise = Noise::new(3);
        noise.normal(count);
        assert_eq!(noise.state().drawn, Noise::draws(count), "{count}");
    }
}
