//! Samplers: from noise to latents of a picture, one prediction of the model at a time.
//!
//! A [`Plan`] has the timesteps and noise levels of a run. A [`Sampler`] is a run: it holds the latents and says what the
//! model has to look at ([`Sampler::scaled`]) and at which timestep; [`Sampler::advance`] takes the prediction. It draws
//! no random numbers itself. [`Sampler::save`] and [`Sampler::restore`] go on elsewhere, bit for bit.
//!
//! Timesteps, sigmas and the order of operations are those of the schedulers in diffusers 0.35.2
//! (`DPMSolverMultistepScheduler`, `EulerDiscreteScheduler`, `EulerAncestralDiscreteScheduler`, `DDIMScheduler`,
//! `LCMScheduler`), in f32. The methods: DPM-Solver++ (arXiv 2211.01095), Euler as in arXiv 2206.00364, DDIM
//! (arXiv 2010.02502), latent consistency models (arXiv 2310.04378).

mod betas;
mod config;
mod error;
mod plan;
mod state;
mod step;

pub use config::{
    BetaSchedule, Prediction, SamplerConfig, SamplerKind, TimestepSpacing, UnknownSampler,
};
pub use error::SamplerError;
pub use plan::{MOST_STEPS, Plan, PlanOptions};
pub use step::Sampler;
