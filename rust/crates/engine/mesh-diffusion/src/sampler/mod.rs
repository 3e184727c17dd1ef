//! Samplers: from noise to latents of a picture, one prediction of the model at a time.

mod config;

pub use config::{
    BetaSchedule, Prediction, SamplerConfig, SamplerKind, TimestepSpacing, UnknownSampler,
};
