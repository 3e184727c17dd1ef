//! Errors of samplers.

use super::SamplerKind;

/// Errors of planning a run, of a step and of a saved state.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages name the fields")]
pub enum SamplerError {
    /// Too few or too many steps.
    #[error("steps is {steps}, but must be 1 to {most}")]
    Steps { steps: u32, most: u32 },
    /// A strength out of range.
    #[error("strength is {strength}, but must be over 0 and at most 1")]
    Strength { strength: f32 },
    /// The strength leaves no step.
    #[error("strength {strength} of {steps} steps leaves none to run; raise one of them")]
    NoSteps { steps: u32, strength: f32 },
    /// Karras' spacing with a sampler that has none.
    #[error("sampler {kind} has no Karras spacing; use dpmpp_2m or euler, or leave Karras out")]
    NoKarras { kind: SamplerKind },
    /// A noise schedule that cannot be used.
    #[error("the model's noise schedule: {0}")]
    Config(String),
    /// An array of the wrong length.
    #[error("{array} has {found} values, but the latents have {expected}")]
    Length {
        array: &'static str,
        found: usize,
        expected: usize,
    },
    /// The step takes noise, and there is none.
    #[error("step {step} of sampler {kind} takes noise, but none was given")]
    NoNoise { step: u32, kind: SamplerKind },
    /// All steps are done.
    #[error("all {steps} steps are done")]
    Finished { steps: u32 },
    /// A prediction or latents with a number that is not finite.
    #[error("{array} of step {step} have a number that is not finite")]
    NotFinite { array: &'static str, step: u32 },
    /// A saved state that cannot be used.
    #[error("the saved state of the sampler {0}")]
    State(String),
}
