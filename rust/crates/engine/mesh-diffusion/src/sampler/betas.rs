//! Betas and what follows from them, in f32 and in the order of torch's operations, so that all numbers agree with
//! diffusers'.

use super::SamplerError;
use super::config::{BetaSchedule, SamplerConfig};

/// Cumulative products of `1 - beta`, one for each timestep of training.
pub(super) fn alphas_cumprod(config: &SamplerConfig) -> Result<Vec<f32>, SamplerError> {
    let mut betas = betas(config)?;
    if config.rescale_betas_zero_snr {
        betas = rescale_zero_terminal_snr(&betas);
    }
    let alphas = cumprod(betas.iter().map(|beta| 1.0 - beta));
    let sound = |alpha: &f32| (0.0..=1.0).contains(alpha);
    match alphas.iter().position(|alpha| !sound(alpha)) {
        None => Ok(alphas),
        Some(at) => Err(SamplerError::Config(format!(
            "the betas give timestep {at} a cumulative alpha of {}, but it must be 0 to 1",
            alphas[at]
        ))),
    }
}

fn betas(config: &SamplerConfig) -> Result<Vec<f32>, SamplerError> {
    let timesteps = config.num_train_timesteps;
    if !(2..=MOST_TIMESTEPS).contains(&timesteps) {
        return Err(SamplerError::Config(format!(
            "num_train_timesteps is {timesteps}, but must be 2 to {MOST_TIMESTEPS}"
        )));
    }
    let count = timesteps as usize;
    if let Some(betas) = &config.trained_betas {
        return match betas.len() == count {
            true => Ok(betas.iter().map(|&beta| beta as f32).collect()),
            false => Err(SamplerError::Config(format!(
                "trained_betas has {} values, but num_train_timesteps is {timesteps}",
                betas.len()
            ))),
        };
    }
    let (start, end) = (config.beta_start, config.beta_end);
    Ok(match config.beta_schedule {
        BetaSchedule::Linear => linspace(start, end, count),
        BetaSchedule::ScaledLinear => {
            let roots = linspace(start.sqrt(), end.sqrt(), count);
            roots.into_iter().map(|root| root * root).collect()
        }
        BetaSchedule::SquaredCosine => {
            let bar = |t: f64| {
                ((t + 0.008) / 1.008 * std::f64::consts::FRAC_PI_2)
                    .cos()
                    .powi(2)
            };
            let at = |i: usize| bar(i as f64 / count as f64);
            let betas = (0..count).map(|i| (1.0 - at(i + 1) / at(i)).min(0.999) as f32);
            betas.collect()
        }
    })
}

/// `torch.linspace`: from both ends to the middle.
fn linspace(start: f64, end: f64, count: usize) -> Vec<f32> {
    let (start, end) = (start as f32, end as f32);
    let step = (end - start) / (count - 1) as f32;
    let value = |i: usize| match i < count / 2 {
        true => start + step * i as f32,
        false => end - step * (count - i - 1) as f32,
    };
    (0..count).map(value).collect()
}

/// `torch.cumprod`, which multiplies in f64.
fn cumprod(values: impl Iterator<Item = f32>) -> Vec<f32> {
    let products = values.scan(1.0, |product: &mut f64, value| {
        *product *= f64::from(value);
        Some(*product as f32)
    });
    products.collect()
}

/// Algorithm 1 of "Common Diffusion Noise Schedules and Sample Steps are Flawed" (arXiv 2305.08891).
fn rescale_zero_terminal_snr(betas: &[f32]) -> Vec<f32> {
    let mut roots = cumprod(betas.iter().map(|beta| 1.0 - beta));
    roots.iter_mut().for_each(|alpha| *alpha = alpha.sqrt());
    let (first, last) = (roots[0], roots[roots.len() - 1]);
    let factor = first / (first - last);
    let bars: Vec<f32> = roots
        .into_iter()
        .map(|root| {
            let root = (root - last) * factor;
            root * root
        })
        .collect();
    let mut before = 1.0;
    let betas = bars.into_iter().map(|bar| {
        let beta = 1.0 - bar / before;
        before = bar;
        beta
    });
    betas.collect()
}

/// The largest in use is 1000.
const MOST_TIMESTEPS: u32 = 10_000;
