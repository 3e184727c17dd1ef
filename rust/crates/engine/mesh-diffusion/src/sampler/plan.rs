//! The timesteps and noise levels of a run, all of which is known before the first step.

use super::SamplerError;
use super::betas::alphas_cumprod;
use super::config::{Prediction, SamplerConfig, SamplerKind, TimestepSpacing};

/// The timesteps and noise levels of a run.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    pub(super) kind: SamplerKind,
    pub(super) prediction: Prediction,
    /// Limit on values of the predicted picture.
    pub(super) clip: Option<f32>,
    /// Of the whole schedule, first to last.
    pub(super) timesteps: Vec<f32>,
    pub(super) levels: Levels,
    /// Steps that a start from a picture leaves out.
    pub(super) begin: usize,
    init_noise_sigma: f32,
}

/// Noise levels, in the form that the sampler computes with.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Levels {
    /// Deviations of the noise where the picture has variance 1, one per timestep and 0 at the end: DPM-Solver++ and Euler.
    Sigmas(Vec<f32>),
    /// Cumulative alpha at each timestep and at the one that follows it: DDIM and LCM.
    Alphas {
        steps: Vec<(f32, f32)>,
        /// LCM: factor on timesteps in the boundary conditions.
        scaling: f32,
    },
}

/// The choice of a sampler and its steps.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PlanOptions {
    /// The sampler.
    pub kind: SamplerKind,
    /// Karras' spacing of sigmas.
    pub karras: bool,
    /// Steps of the whole schedule.
    pub steps: u32,
    /// Share of the steps that are run, for a start from a picture.
    pub strength: Option<f32>,
}

impl Plan {
    /// A run's plan for a model with `config`.
    ///
    /// # Errors
    /// If the sampler cannot do so many steps, has no Karras spacing, or cannot work with this noise schedule.
    pub fn new(config: &SamplerConfig, options: PlanOptions) -> Result<Self, SamplerError> {
        let PlanOptions { kind, steps, .. } = options;
        if !(1..=MOST_STEPS).contains(&steps) || steps >= config.num_train_timesteps {
            let most = MOST_STEPS.min(config.num_train_timesteps.saturating_sub(1));
            return Err(SamplerError::Steps { steps, most });
        }
        if options.karras && !kind.takes_karras() {
            return Err(SamplerError::NoKarras { kind });
        }
        if kind == SamplerKind::EulerAncestral && config.prediction_type == Prediction::Sample {
            return Err(SamplerError::Config(
                "euler_a cannot use a model that predicts the picture; choose another sampler"
                    .into(),
            ));
        }
        let alphas = alphas_cumprod(config)?;
        let (timesteps, levels) = match kind {
            SamplerKind::Ddim => ddim(config, steps, &alphas)?,
            SamplerKind::Lcm => lcm(config, steps, &alphas)?,
            SamplerKind::DpmPlusPlus2M | SamplerKind::Euler | SamplerKind::EulerAncestral => {
                let karras = kind.takes_karras() && (options.karras || config.use_karras_sigmas);
                let (timesteps, sigmas) = with_sigmas(config, kind, steps, karras, alphas)?;
                (timesteps, Levels::Sigmas(sigmas))
            }
        };
        let init_noise_sigma = match &levels {
            Levels::Sigmas(sigmas) if kind != SamplerKind::DpmPlusPlus2M => {
                let max = sigmas.iter().copied().fold(0.0, f32::max);
                match config.spacing(kind) {
                    TimestepSpacing::Leading => (max * max + 1.0).sqrt(),
                    TimestepSpacing::Linspace | TimestepSpacing::Trailing => max,
                }
            }
            _ => 1.0,
        };
        let clips = config.clip_sample && matches!(kind, SamplerKind::Ddim | SamplerKind::Lcm);
        Ok(Plan {
            kind,
            prediction: config.prediction_type,
            clip: clips.then_some(config.clip_sample_range),
            begin: begin(steps, options.strength)?,
            timesteps,
            levels,
            init_noise_sigma,
        })
    }

    /// Steps of this run: fewer than asked for if it starts from a picture.
    pub fn steps(&self) -> u32 {
        (self.timesteps.len() - self.begin) as u32
    }

    /// The timesteps of this run, in their order.
    pub fn timesteps(&self) -> &[f32] {
        &self.timesteps[self.begin..]
    }

    /// Sigmas of the whole schedule and 0, for samplers that compute with them.
    pub fn sigmas(&self) -> Option<&[f32]> {
        match &self.levels {
            Levels::Sigmas(sigmas) => Some(sigmas),
            Levels::Alphas { .. } => None,
        }
    }

    /// Deviation of the noise that a run starts from.
    pub fn init_noise_sigma(&self) -> f32 {
        self.init_noise_sigma
    }

    /// True if step `step` of this run takes fresh noise.
    pub fn takes_noise(&self, step: u32) -> bool {
        match self.kind {
            SamplerKind::EulerAncestral => true,
            SamplerKind::Lcm => step + 1 < self.steps(),
            _ => false,
        }
    }

    /// Factors on a picture and on noise that give latents as they are before step `step` of this run; after the last step
    /// the picture is free of noise.
    pub(super) fn mixture(&self, step: u32) -> (f32, f32) {
        let at = self.begin + step as usize;
        if at >= self.timesteps.len() {
            return (1.0, 0.0);
        }
        match &self.levels {
            Levels::Sigmas(sigmas) if self.kind == SamplerKind::DpmPlusPlus2M => {
                alpha_sigma(sigmas[at])
            }
            Levels::Sigmas(sigmas) => (1.0, sigmas[at]),
            Levels::Alphas { steps, .. } => (steps[at].0.sqrt(), (1.0 - steps[at].0).sqrt()),
        }
    }
}

/// Factors on picture and noise where sigma is their ratio and their squares add up to 1.
pub(super) fn alpha_sigma(sigma: f32) -> (f32, f32) {
    let alpha = 1.0 / (sigma * sigma + 1.0).sqrt();
    (alpha, sigma * alpha)
}

/// Index of the first step of a run that starts from a picture.
fn begin(steps: u32, strength: Option<f32>) -> Result<usize, SamplerError> {
    let Some(strength) = strength else {
        return Ok(0);
    };
    if !(strength > 0.0 && strength <= 1.0) {
        return Err(SamplerError::Strength { strength });
    }
    // As written: 0.7 is a little less than 0.7 in f32, and ten steps of it are 7.
    let written: f64 = strength.to_string().parse().unwrap_or(strength.into());
    let run = (f64::from(steps) * written) as u32;
    match run {
        0 => Err(SamplerError::NoSteps { steps, strength }),
        run => Ok((steps - run.min(steps)) as usize),
    }
}

fn ddim(
    config: &SamplerConfig,
    steps: u32,
    alphas: &[f32],
) -> Result<(Vec<f32>, Levels), SamplerError> {
    let train = i64::from(config.num_train_timesteps);
    let timesteps: Vec<i64> = match config.spacing(SamplerKind::Ddim) {
        TimestepSpacing::Linspace => {
            let mut all = linspace(0.0, (train - 1) as f64, steps as usize);
            all.reverse();
            all.into_iter()
                .map(|t| t.round_ties_even() as i64)
                .collect()
        }
        TimestepSpacing::Leading => leading(config, train / i64::from(steps), 0..steps),
        TimestepSpacing::Trailing => trailing(train, steps),
    };
    let distance = train / i64::from(steps);
    let end = end_alpha(config, alphas);
    let levels = timesteps.iter().map(|&t| {
        let at = known(alphas, t, SamplerKind::Ddim)?;
        let after = match t - distance {
            after if after >= 0 => known(alphas, after, SamplerKind::Ddim)?,
            _ => end,
        };
        Ok((at, after))
    });
    let steps = levels.collect::<Result<Vec<_>, SamplerError>>()?;
    check_pure_noise(config, &steps)?;
    let timesteps = timesteps.into_iter().map(|t| t as f32).collect();
    Ok((
        timesteps,
        Levels::Alphas {
            steps,
            scaling: 0.0,
        },
    ))
}

fn lcm(
    config: &SamplerConfig,
    steps: u32,
    alphas: &[f32],
) -> Result<(Vec<f32>, Levels), SamplerError> {
    let original = config.original_inference_steps;
    if original == 0 || original > config.num_train_timesteps {
        return Err(SamplerError::Config(format!(
            "original_inference_steps is {original}, but must be 1 to num_train_timesteps, {}",
            config.num_train_timesteps
        )));
    }
    if steps > original {
        let most = original;
        return Err(SamplerError::Steps { steps, most });
    }
    let ratio = config.num_train_timesteps / original;
    let from_last = |i: u32| {
        // Floored, as in f64 elsewhere: the product is a whole number far below 2^53.
        let index = (f64::from(i) * (f64::from(original) / f64::from(steps))).floor() as u32;
        i64::from((original - index) * ratio) - 1
    };
    let timesteps: Vec<i64> = (0..steps).map(from_last).collect();
    let levels = timesteps.iter().enumerate().map(|(i, &t)| {
        let after = timesteps.get(i + 1).copied().unwrap_or(t);
        let at = known(alphas, t, SamplerKind::Lcm)?;
        Ok((at, known(alphas, after, SamplerKind::Lcm)?))
    });
    let steps = levels.collect::<Result<Vec<_>, SamplerError>>()?;
    check_pure_noise(config, &steps)?;
    let timesteps = timesteps.into_iter().map(|t| t as f32).collect();
    let scaling = config.timestep_scaling as f32;
    Ok((timesteps, Levels::Alphas { steps, scaling }))
}

fn end_alpha(config: &SamplerConfig, alphas: &[f32]) -> f32 {
    match config.set_alpha_to_one {
        true => 1.0,
        false => alphas[0],
    }
}

fn known(alphas: &[f32], timestep: i64, kind: SamplerKind) -> Result<f32, SamplerError> {
    let at = usize::try_from(timestep).ok().and_then(|t| alphas.get(t));
    at.copied().ok_or_else(|| {
        SamplerError::Config(format!(
            "{kind} comes to timestep {timestep}, but the model was trained on 0 to {}; take another number of steps, or \
             check steps_offset in scheduler_config.json",
            alphas.len() - 1
        ))
    })
}

/// In pure noise no picture can be found from a prediction of the noise: the division is by 0.
fn check_pure_noise(config: &SamplerConfig, steps: &[(f32, f32)]) -> Result<(), SamplerError> {
    let pure = steps.iter().any(|&(alpha, _)| alpha <= 0.0);
    if pure && config.prediction_type == Prediction::Epsilon {
        return Err(SamplerError::Config(
            "the model predicts noise, and its schedule begins with nothing else (rescale_betas_zero_snr): take dpmpp_2m or \
             euler"
                .into(),
        ));
    }
    Ok(())
}

/// Timesteps and sigmas of DPM-Solver++ and both Eulers.
fn with_sigmas(
    config: &SamplerConfig,
    kind: SamplerKind,
    steps: u32,
    karras: bool,
    mut alphas: Vec<f32>,
) -> Result<(Vec<f32>, Vec<f32>), SamplerError> {
    if config.rescale_betas_zero_snr
        && let Some(last) = alphas.last_mut()
    {
        // Not quite 0, so that the first sigma is finite.
        *last = 2f32.powi(-24);
    }
    let all: Vec<f32> = alphas
        .iter()
        .map(|alpha| ((1.0 - alpha) / alpha).sqrt())
        .collect();
    if !all.iter().all(|sigma| sigma.is_finite() && *sigma > 0.0)
        || !all.windows(2).all(|pair| pair[0] < pair[1])
    {
        return Err(SamplerError::Config(
            "the betas do not give noise that grows from timestep to timestep; check beta_start, beta_end and trained_betas"
                .into(),
        ));
    }
    let dpm = kind == SamplerKind::DpmPlusPlus2M;
    let mut timesteps = match dpm {
        true => dpm_timesteps(config, steps),
        false => euler_timesteps(config, kind, steps),
    };
    let mut sigmas: Vec<f64> = timesteps.iter().map(|&t| interpolate(&all, t)).collect();
    if karras {
        // DPM-Solver++ spans the sigmas of training, Euler those of the run.
        let (max, min) = match dpm {
            true => (f64::from(all[all.len() - 1]), f64::from(all[0])),
            false => (sigmas[0], sigmas[sigmas.len() - 1]),
        };
        sigmas = karras_sigmas(max, min, steps as usize);
        let logs: Vec<f32> = all.iter().map(|sigma| sigma.ln()).collect();
        let whole = dpm && config.beta_schedule != super::BetaSchedule::SquaredCosine;
        let timestep = |&sigma: &f64| match sigma_to_timestep(sigma, &logs) {
            timestep if whole => timestep.round_ties_even(),
            // Timesteps of DPM-Solver++ are whole numbers in any case.
            timestep if dpm => timestep.trunc(),
            timestep => timestep,
        };
        timesteps = sigmas.iter().map(timestep).collect();
    }
    let sigmas = sigmas.into_iter().map(|sigma| sigma as f32);
    let timesteps = timesteps.into_iter().map(|t| t as f32);
    Ok((timesteps.collect(), sigmas.chain([0.0]).collect()))
}

fn dpm_timesteps(config: &SamplerConfig, steps: u32) -> Vec<f64> {
    let train = i64::from(config.num_train_timesteps);
    match config.spacing(SamplerKind::DpmPlusPlus2M) {
        TimestepSpacing::Linspace => {
            let all = linspace(0.0, (train - 1) as f64, steps as usize + 1);
            let but_first = all.into_iter().skip(1).rev();
            but_first.map(f64::round_ties_even).collect()
        }
        TimestepSpacing::Leading => {
            let timesteps = leading(config, train / (i64::from(steps) + 1), 1..steps + 1);
            timesteps.into_iter().map(|t| t as f64).collect()
        }
        TimestepSpacing::Trailing => {
            let timesteps = trailing(train, steps).into_iter();
            timesteps.map(|t| t as f64).collect()
        }
    }
}

fn euler_timesteps(config: &SamplerConfig, kind: SamplerKind, steps: u32) -> Vec<f64> {
    let train = i64::from(config.num_train_timesteps);
    match config.spacing(kind) {
        TimestepSpacing::Linspace => {
            let all = linspace(0.0, (train - 1) as f64, steps as usize);
            // Rounded to f32 before sigmas are interpolated.
            let all = all.into_iter().rev();
            all.map(|t| f64::from(t as f32)).collect()
        }
        TimestepSpacing::Leading => {
            let timesteps = leading(config, train / i64::from(steps), 0..steps);
            timesteps.into_iter().map(|t| t as f64).collect()
        }
        TimestepSpacing::Trailing => {
            let timesteps = trailing(train, steps).into_iter();
            timesteps.map(|t| t as f64).collect()
        }
    }
}

fn leading(config: &SamplerConfig, ratio: i64, multiples: std::ops::Range<u32>) -> Vec<i64> {
    let offset = i64::from(config.steps_offset);
    let timesteps = multiples.rev().map(|i| i64::from(i) * ratio + offset);
    timesteps.collect()
}

fn trailing(train: i64, steps: u32) -> Vec<i64> {
    let train = train as f64;
    // The distance of the first two, as `numpy.arange` has it.
    let distance = (train - train / f64::from(steps)) - train;
    let timestep = |i| (train + f64::from(i) * distance).round_ties_even() as i64 - 1;
    (0..steps).map(timestep).collect()
}

/// `numpy.linspace`.
fn linspace(start: f64, end: f64, count: usize) -> Vec<f64> {
    let step = (end - start) / count.saturating_sub(1).max(1) as f64;
    let mut values: Vec<f64> = (0..count).map(|i| i as f64 * step + start).collect();
    if count > 1 {
        values[count - 1] = end;
    }
    values
}

/// The value of `table` at `at`, linear between its elements, constant beyond its ends.
fn interpolate(table: &[f32], at: f64) -> f64 {
    let last = table.len() - 1;
    if at <= 0.0 {
        return table[0].into();
    }
    if at >= last as f64 {
        return table[last].into();
    }
    let low = at as usize;
    let (from, to) = (f64::from(table[low]), f64::from(table[low + 1]));
    (to - from) * (at - low as f64) + from
}

/// Equation 5 of "Elucidating the Design Space of Diffusion-Based Generative Models" (arXiv 2206.00364), with rho 7.
fn karras_sigmas(max: f64, min: f64, steps: usize) -> Vec<f64> {
    const RHO: f64 = 7.0;
    let (max, min) = (max.powf(1.0 / RHO), min.powf(1.0 / RHO));
    let ramp = linspace(0.0, 1.0, steps).into_iter();
    ramp.map(|at| (max + at * (min - max)).powf(RHO)).collect()
}

/// The timestep, between those of training, whose sigma has the logarithm of `sigma`.
fn sigma_to_timestep(sigma: f64, logs: &[f32]) -> f64 {
    let log = sigma.max(1e-10).ln();
    let above = logs.partition_point(|&of| f64::from(of) <= log);
    let low = above.saturating_sub(1).min(logs.len() - 2);
    let (from, to) = (logs[low], logs[low + 1]);
    let weight = (f64::from(from) - log) / f64::from(from - to);
    let weight = weight.clamp(0.0, 1.0);
    (1.0 - weight) * low as f64 + weight * (low + 1) as f64
}

/// More steps gain nothing that anybody sees.
pub const MOST_STEPS: u32 = 150;
