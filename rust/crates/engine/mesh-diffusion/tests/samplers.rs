//! Samplers against diffusers 0.35.2: tests/data/samplers.json and timesteps.json, which tests/reference/make_goldens.py writes.

use std::collections::BTreeMap;

use mesh_diffusion::noise::Noise;
use mesh_diffusion::sampler::{MOST_STEPS, Plan, PlanOptions, Sampler, SamplerError};
use mesh_diffusion::{SamplerConfig, SamplerKind, TimestepSpacing};
use serde::Deserialize;
use serde_json::Value;

#[derive(Deserialize)]
struct Case {
    sampler: String,
    steps: u32,
    seed: u64,
    config: Value,
    strength: Option<f32>,
    #[serde(default)]
    mask: bool,
    /// torch's: the first array, then those of steps.
    noise: Vec<Vec<f32>>,
    start: Vec<f32>,
    latents: Vec<Vec<f32>>,
    timesteps: Vec<f32>,
}

impl Case {
    fn all() -> Vec<Case> {
        serde_json::from_str(include_str!("data/samplers.json")).unwrap()
    }

    fn kind(&self) -> SamplerKind {
        self.sampler.parse().unwrap()
    }

    fn plan(&self) -> Plan {
        let config: SamplerConfig = serde_json::from_value(self.config.clone()).unwrap();
        let options = PlanOptions {
            kind: self.kind(),
            karras: false,
            steps: self.steps,
            strength: self.strength,
        };
        Plan::new(&config, options).unwrap()
    }

    fn name(&self) -> String {
        let Case {
            sampler,
            steps,
            strength,
            config,
            ..
        } = self;
        format!("{sampler}, {steps} steps, strength {strength:?}, {config}")
    }

    /// The latents at the start and after each step.
    fn run(&self, mut between: impl FnMut(Sampler) -> Sampler) -> Vec<Vec<f32>> {
        let mut noise = self.noise.iter();
        let first = noise.next().unwrap();
        let mut sampler = match self.strength {
            None => Sampler::from_noise(self.plan(), first.clone()),
            Some(_) => Sampler::from_image(self.plan(), &image(), first).unwrap(),
        };
        let mut all = vec![sampler.latents().to_vec()];
        while let Some(timestep) = sampler.timestep() {
            // Those of Karras come from logarithms, which numpy rounds in its own way.
            let expected = self.timesteps[sampler.step() as usize];
            assert!(
                (timestep - expected).abs() < 1e-3,
                "{timestep}, not {expected}"
            );
            let prediction = predict(&sampler.scaled(), timestep);
            let fresh = sampler.takes_noise().then(|| noise.next().unwrap());
            sampler
                .advance(&prediction, fresh.map(Vec::as_slice))
                .unwrap();
            if self.mask {
                sampler.keep(&image(), first, |at| at % 3 == 0).unwrap();
            }
            sampler = between(sampler);
            all.push(sampler.latents().to_vec());
        }
        all
    }
}

const COUNT: usize = 16;

/// The picture to start from.
fn image() -> Vec<f32> {
    let at = |i: usize| -1.5 + 3.0 * i as f32 / (COUNT - 1) as f32;
    (0..COUNT).map(at).collect()
}

/// The stand-in for a model, as in make_goldens.py.
fn predict(latents: &[f32], timestep: f32) -> Vec<f32> {
    let value = |(place, x): (usize, &f32)| {
        let angle = 0.37 * place as f32 + 0.001 * timestep;
        0.7 * x / (1.0 + 0.1 * x.abs()) + 0.2 * angle.cos()
    };
    latents.iter().enumerate().map(value).collect()
}

fn distance(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let pairs = found.iter().zip(expected);
    // Relative where values are large: latents of Euler begin at a deviation of 14.
    let of = |(x, y): (&f32, &f32)| (x - y).abs() / y.abs().max(1.0);
    pairs.map(of).fold(0.0, f32::max)
}

#[test]
fn every_step_is_the_one_of_diffusers() {
    let mut worst = (0.0, String::new());
    for case in Case::all() {
        let found = case.run(|sampler| sampler);
        assert_eq!(found.len(), case.latents.len() + 1, "{}", case.name());
        let expected = std::iter::once(&case.start).chain(&case.latents);
        // The last bit of large latents stays with the small ones after them: where the terminal signal is rescaled to zero,
        // Euler's begin at a deviation of 4096.
        let mut bit = 0.0f32;
        // With a squared cosine the first alphas are so small that dividing by them shows the last bits as well.
        let cosine = case.config["beta_schedule"] == "squaredcos_cap_v2";
        let limit = if cosine { 1e-4 } else { 1e-5 };
        for (step, (found, expected)) in found.iter().zip(expected).enumerate() {
            let distance = distance(found, expected);
            assert!(
                distance < limit + bit,
                "{distance} at step {step} of {}",
                case.name()
            );
            if !cosine && bit < 1e-5 && distance > worst.0 {
                worst = (distance, case.name());
            }
            let largest = expected.iter().fold(0.0, |max: f32, x| max.max(x.abs()));
            bit = bit.max(f32::EPSILON * largest);
        }
    }
    println!("largest distance but for steps from a large sigma: {worst:?}");
}

#[test]
fn the_noise_of_steps_follows_that_of_the_start() {
    for case in Case::all() {
        let mut noise = Noise::new(case.seed);
        for expected in &case.noise {
            assert!(distance(&noise.normal(COUNT), expected) <= 1e-6);
        }
    }
}

#[test]
fn a_saved_state_goes_on_bit_for_bit_at_every_step() {
    for case in Case::all() {
        let restored = case.run(|sampler| {
            let bytes = sampler.save();
            let again = Sampler::restore(case.plan(), COUNT, &bytes).unwrap();
            assert_eq!(again, sampler);
            again
        });
        assert_eq!(restored, case.run(|sampler| sampler), "{}", case.name());
    }
}

#[test]
fn states_that_are_not_the_plan_s_are_refused() {
    let case = &Case::all()[0];
    let mut sampler = Sampler::from_noise(case.plan(), vec![0.5; COUNT]);
    sampler.advance(&[0.1; COUNT], None).unwrap();
    let bytes = sampler.save();
    let restore = |bytes: &[u8]| Sampler::restore(case.plan(), COUNT, bytes);
    assert!(restore(&bytes).is_ok());
    for length in 0..bytes.len() {
        assert!(restore(&bytes[..length]).is_err(), "{length} bytes");
    }
    assert!(restore(&[bytes.as_slice(), &[0]].concat()).is_err());
    // A wrong number anywhere in the head; the values themselves may be any that are finite.
    for at in 0..19 {
        for wrong in [0, 1, 2, 3, 77, 255] {
            let mut changed = bytes.clone();
            changed[at] = wrong;
            let again = restore(&changed);
            if let Ok(again) = again {
                let is_step = again.step() < sampler.plan().steps();
                assert!(changed == bytes || is_step, "byte {at} as {wrong}");
            }
        }
    }
    let mut infinite = bytes.clone();
    infinite[19..23].copy_from_slice(&f32::NAN.to_le_bytes());
    let error = restore(&infinite).unwrap_err().to_string();
    assert!(error.contains("not finite"), "{error}");
    let error = Sampler::restore(case.plan(), COUNT + 1, &bytes).unwrap_err();
    assert!(matches!(error, SamplerError::State(_)), "{error}");
}

#[test]
fn a_step_with_wrong_arrays_changes_nothing() {
    let euler = Case::all()
        .into_iter()
        .find(|case| case.sampler == "euler_a")
        .unwrap();
    let mut sampler = Sampler::from_noise(euler.plan(), vec![0.5; COUNT]);
    let before = sampler.clone();
    let good = [0.1; COUNT];
    assert!(sampler.advance(&good[1..], Some(&good)).is_err());
    assert!(sampler.advance(&good, Some(&good[1..])).is_err());
    assert!(matches!(
        sampler.advance(&good, None),
        Err(SamplerError::NoNoise { .. })
    ));
    assert!(sampler.advance(&[f32::NAN; COUNT], Some(&good)).is_err());
    assert!(
        sampler
            .advance(&[f32::MAX; COUNT], Some(&[f32::MAX; COUNT]))
            .is_err()
    );
    assert_eq!(sampler, before);
    while sampler.timestep().is_some() {
        sampler.advance(&good, Some(&good)).unwrap();
    }
    let finished = sampler.advance(&good, Some(&good));
    assert!(matches!(finished, Err(SamplerError::Finished { .. })));
}

#[test]
fn timesteps_are_those_of_diffusers_for_any_number_of_steps() {
    let lists: BTreeMap<String, Vec<(usize, f64, f64)>> =
        serde_json::from_str(include_str!("data/timesteps.json")).unwrap();
    for (name, sums) in lists {
        let mut words = name.split(' ');
        let kind: SamplerKind = words.next().unwrap().parse().unwrap();
        let spacing = match words.next().unwrap() {
            "leading" => TimestepSpacing::Leading,
            "linspace" => TimestepSpacing::Linspace,
            _ => TimestepSpacing::Trailing,
        };
        let config = SamplerConfig {
            timestep_spacing: Some(spacing),
            ..SamplerConfig::stable_diffusion(Default::default())
        };
        let karras = words.next().is_some();
        for (steps, (count, timesteps, sigmas)) in (1..).zip(sums) {
            if spacing == TimestepSpacing::Trailing && ONE_TOO_MANY.contains(&steps) {
                assert!(count == steps as usize + 1 || karras);
                continue;
            }
            assert_eq!(count, steps as usize);
            let options = PlanOptions {
                kind,
                karras,
                steps,
                strength: None,
            };
            let plan = Plan::new(&config, options).unwrap();
            let found = weighted(plan.timesteps());
            let near = (found - timesteps).abs() < 0.01 + 1e-6 * timesteps.abs();
            assert!(near, "{name}, {steps} steps: {found}, not {timesteps}");
            if let Some(of) = plan.sigmas() {
                let found = weighted(of);
                let near = (found - sigmas).abs() < 1e-3 + 1e-5 * sigmas.abs();
                assert!(near, "{name}, {steps} steps: sigmas {found}, not {sigmas}");
            }
        }
    }
}

/// For these numbers of steps rounding gives `numpy.arange` one element too many, and diffusers a timestep of -1.
const ONE_TOO_MANY: [u32; 4] = [61, 103, 121, 122];

fn weighted(values: &[f32]) -> f64 {
    let values = values.iter().zip(1..);
    values
        .map(|(&x, place)| f64::from(x) * f64::from(place))
        .sum()
}

#[test]
fn plans_that_cannot_work_are_refused_with_the_reason() {
    let config = SamplerConfig::stable_diffusion(Default::default());
    let refused = |config: &SamplerConfig, kind, karras, steps, strength| {
        let options = PlanOptions {
            kind,
            karras,
            steps,
            strength,
        };
        Plan::new(config, options).unwrap_err().to_string()
    };
    use SamplerKind::{Ddim, DpmPlusPlus2M, Euler, EulerAncestral, Lcm};
    let text = refused(&config, Euler, false, 0, None);
    assert_eq!(text, "steps is 0, but must be 1 to 150");
    let text = refused(&config, Euler, false, MOST_STEPS + 1, None);
    assert!(text.contains("150"), "{text}");
    assert!(refused(&config, Lcm, false, 51, None).contains("1 to 50"));
    assert!(refused(&config, Ddim, true, 5, None).contains("no Karras"));
    assert!(refused(&config, Ddim, false, 5, Some(0.1)).contains("leaves none"));
    for strength in [0.0, -1.0, 1.1, f32::NAN, f32::INFINITY] {
        assert!(refused(&config, Ddim, false, 5, Some(strength)).contains("over 0"));
    }
    let sample = SamplerConfig::stable_diffusion(mesh_diffusion::Prediction::Sample);
    assert!(refused(&sample, EulerAncestral, false, 5, None).contains("euler_a"));

    let hostile = [
        SamplerConfig {
            num_train_timesteps: u32::MAX,
            ..config.clone()
        },
        SamplerConfig {
            num_train_timesteps: 1,
            ..config.clone()
        },
        SamplerConfig {
            beta_start: f64::NAN,
            ..config.clone()
        },
        SamplerConfig {
            beta_start: -1.0,
            ..config.clone()
        },
        SamplerConfig {
            beta_end: 1e300,
            ..config.clone()
        },
        SamplerConfig {
            beta_start: 0.0,
            beta_end: 0.0,
            ..config.clone()
        },
        SamplerConfig {
            trained_betas: Some(vec![0.1; 3]),
            ..config.clone()
        },
        SamplerConfig {
            trained_betas: Some(vec![0.0; 1000]),
            ..config.clone()
        },
    ];
    for config in hostile {
        refused(&config, DpmPlusPlus2M, true, 5, None);
    }
    let far = SamplerConfig {
        steps_offset: u32::MAX,
        ..config.clone()
    };
    assert!(refused(&far, Ddim, false, 5, None).contains("steps_offset"));
    for original in [0, 2000] {
        let config = SamplerConfig {
            original_inference_steps: original,
            ..config.clone()
        };
        assert!(refused(&config, Lcm, false, 1, None).contains("original_inference_steps"));
    }
    let pure = SamplerConfig {
        rescale_betas_zero_snr: true,
        timestep_spacing: Some(TimestepSpacing::Trailing),
        ..config
    };
    assert!(refused(&pure, Ddim, false, 5, None).contains("rescale_betas_zero_snr"));
}

#[test]
fn strength_counts_steps_as_written() {
    let config = SamplerConfig::stable_diffusion(Default::default());
    let steps = |steps, strength| {
        let options = PlanOptions {
            kind: SamplerKind::Ddim,
            karras: false,
            steps,
            strength: Some(strength),
        };
        Plan::new(&config, options).unwrap().steps()
    };
    assert_eq!(steps(10, 0.7), 7);
    assert_eq!(steps(20, 0.55), 11);
    assert_eq!(steps(30, 0.999), 29);
    assert_eq!(steps(30, 1.0), 30);
}
