//! The noise schedule of a model and the choice of a sampler.

use std::fmt;
use std::str::FromStr;

use serde::Deserialize;

/// The sampler of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SamplerKind {
    /// DPM-Solver++ of second order, multistep, midpoint; the last step is of first order.
    DpmPlusPlus2M,
    /// Euler's method.
    Euler,
    /// Euler's method with fresh noise in every step.
    EulerAncestral,
    /// DDIM with eta 0.
    Ddim,
    /// Latent consistency models: a few steps of models that were distilled for it.
    Lcm,
}

impl SamplerKind {
    /// All samplers.
    pub const ALL: [SamplerKind; 5] = [
        SamplerKind::DpmPlusPlus2M,
        SamplerKind::Euler,
        SamplerKind::EulerAncestral,
        SamplerKind::Ddim,
        SamplerKind::Lcm,
    ];

    /// Name in requests: `dpmpp_2m`, `euler`, `euler_a`, `ddim` or `lcm`.
    pub fn name(self) -> &'static str {
        match self {
            SamplerKind::DpmPlusPlus2M => "dpmpp_2m",
            SamplerKind::Euler => "euler",
            SamplerKind::EulerAncestral => "euler_a",
            SamplerKind::Ddim => "ddim",
            SamplerKind::Lcm => "lcm",
        }
    }

    /// True if Karras' spacing of sigmas can be used with it.
    pub fn takes_karras(self) -> bool {
        matches!(self, SamplerKind::DpmPlusPlus2M | SamplerKind::Euler)
    }
}

impl fmt::Display for SamplerKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for SamplerKind {
    type Err = UnknownSampler;

    fn from_str(name: &str) -> Result<Self, UnknownSampler> {
        let mut all = SamplerKind::ALL.into_iter();
        let known = all.find(|kind| kind.name() == name);
        // A name from a request is as long as its author likes.
        known.ok_or_else(|| UnknownSampler(name.chars().take(40).collect()))
    }
}

/// A sampler's name that does not exist.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown sampler {0:?}: use dpmpp_2m, euler, euler_a, ddim or lcm")]
pub struct UnknownSampler(pub String);

/// The quantity that a model predicts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Prediction {
    /// The noise in the latents.
    #[default]
    Epsilon,
    /// `alpha · noise - sigma · picture`.
    VPrediction,
    /// The picture.
    Sample,
}

/// The choice of a run's timesteps among those of training.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TimestepSpacing {
    /// Equal distances from both ends.
    Linspace,
    /// The multiples of a whole ratio, from 0.
    #[default]
    Leading,
    /// Steps of a ratio, from the last timestep downwards.
    Trailing,
}

/// The course of beta, the variance of the noise that each timestep of training adds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BetaSchedule {
    /// Linear.
    #[default]
    Linear,
    /// Linear in the square root of beta: Stable Diffusion's.
    ScaledLinear,
    /// From a squared cosine.
    #[serde(rename = "squaredcos_cap_v2")]
    SquaredCosine,
}

/// The noise schedule of a model, with the field names and defaults of diffusers' `scheduler_config.json`. Fields of the file
/// that are not here do not concern the samplers of this crate.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct SamplerConfig {
    /// Timesteps of training.
    pub num_train_timesteps: u32,
    /// Beta at the first timestep.
    pub beta_start: f64,
    /// Beta at the last timestep.
    pub beta_end: f64,
    /// Course of beta between them.
    pub beta_schedule: BetaSchedule,
    /// All betas, in place of the three fields above.
    pub trained_betas: Option<Vec<f64>>,
    /// The quantity that the model predicts.
    pub prediction_type: Prediction,
    /// `None` takes the usual one of the request's sampler: linspace for [`SamplerKind::DpmPlusPlus2M`] and both Eulers, leading
    /// for the others.
    pub timestep_spacing: Option<TimestepSpacing>,
    /// Added to timesteps with leading spacing.
    pub steps_offset: u32,
    /// DDIM and LCM: the step after the last one has no noise at all; else it has that of timestep 0.
    pub set_alpha_to_one: bool,
    /// DDIM and LCM: limits the predicted picture to ±`clip_sample_range`.
    pub clip_sample: bool,
    /// See `clip_sample`.
    pub clip_sample_range: f32,
    /// Rescales betas so that the last timestep is pure noise.
    pub rescale_betas_zero_snr: bool,
    /// Karras' spacing is used without a request for it, as some models' files say.
    pub use_karras_sigmas: bool,
    /// LCM: steps among which those of a run are chosen.
    pub original_inference_steps: u32,
    /// LCM: factor on timesteps in the boundary conditions.
    pub timestep_scaling: f64,
}

impl Default for SamplerConfig {
    fn default() -> Self {
        SamplerConfig {
            num_train_timesteps: 1000,
            beta_start: 0.0001,
            beta_end: 0.02,
            beta_schedule: BetaSchedule::Linear,
            trained_betas: None,
            prediction_type: Prediction::Epsilon,
            timestep_spacing: None,
            steps_offset: 0,
            set_alpha_to_one: true,
            clip_sample: false,
            clip_sample_range: 1.0,
            rescale_betas_zero_snr: false,
            use_karras_sigmas: false,
            original_inference_steps: 50,
            timestep_scaling: 10.0,
        }
    }
}

impl SamplerConfig {
    /// The schedule of Stable Diffusion 1, 2 and XL, for files that carry none.
    pub fn stable_diffusion(prediction_type: Prediction) -> Self {
        SamplerConfig {
            beta_start: 0.00085,
            beta_end: 0.012,
            beta_schedule: BetaSchedule::ScaledLinear,
            prediction_type,
            steps_offset: 1,
            set_alpha_to_one: false,
            ..SamplerConfig::default()
        }
    }

    /// The spacing of timesteps with `kind`.
    pub fn spacing(&self, kind: SamplerKind) -> TimestepSpacing {
        let usual = match kind {
            SamplerKind::Ddim | SamplerKind::Lcm => TimestepSpacing::Leading,
            _ => TimestepSpacing::Linspace,
        };
        self.timestep_spacing.unwrap_or(usual)
    }
}
