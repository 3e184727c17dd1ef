//! The state of a run as bytes.
//!
//! Little-endian: version (1 byte), sampler (1 byte), 1 if the step before left its picture (1 byte), steps of the whole
//! schedule, steps left out, steps done, number of latents (4 bytes each); then the latents as f32, and as many values of the
//! picture if there is one.

use super::SamplerError;
use super::config::SamplerKind;
use super::plan::Plan;
use super::step::Sampler;

impl Sampler {
    /// The state after the steps done, from which [`Sampler::restore`] goes on.
    pub fn save(&self) -> Vec<u8> {
        let arrays = 1 + usize::from(self.before.is_some());
        let mut bytes = Vec::with_capacity(HEAD + arrays * self.latents.len() * 4);
        bytes.push(VERSION);
        bytes.push(code(self.plan.kind));
        bytes.push(self.before.is_some().into());
        let numbers = [
            self.plan.timesteps.len() as u32,
            self.plan.begin as u32,
            self.step,
            self.latents.len() as u32,
        ];
        for number in numbers {
            bytes.extend(number.to_le_bytes());
        }
        for value in self.latents.iter().chain(self.before.iter().flatten()) {
            bytes.extend(value.to_le_bytes());
        }
        bytes
    }

    /// A run that goes on after a saved state of the same plan, with so many latents.
    ///
    /// # Errors
    /// If the bytes are not such a state. They may come from anywhere.
    pub fn restore(plan: Plan, latents: usize, bytes: &[u8]) -> Result<Self, SamplerError> {
        let wrong = |text: String| Err(SamplerError::State(text));
        let Some((head, values)) = bytes.split_first_chunk::<HEAD>() else {
            return wrong(format!("has {} bytes, fewer than its head", bytes.len()));
        };
        let [version, kind, has_before, numbers @ ..] = head;
        if *version != VERSION {
            return wrong(format!(
                "has version {version}, but this program reads version {VERSION}"
            ));
        }
        if *kind != code(plan.kind) {
            return wrong(format!("is not one of sampler {}", plan.kind));
        }
        let mut found = [0; 4];
        for (number, bytes) in found.iter_mut().zip(numbers.as_chunks().0) {
            *number = u32::from_le_bytes(*bytes);
        }
        let [steps, begin, step, count] = found;
        if (steps as usize, begin as usize) != (plan.timesteps.len(), plan.begin) {
            return wrong(format!(
                "is of a run from step {begin} of {steps}, but the request's is from step {} of {}",
                plan.begin,
                plan.timesteps.len()
            ));
        }
        if step > plan.steps() {
            return wrong(format!("has step {step} of {}", plan.steps()));
        }
        if count as usize != latents {
            return wrong(format!(
                "has {count} latents, but the request has {latents}"
            ));
        }
        // Every step but none of DPM-Solver++ leaves its picture; no other sampler does.
        let leaves = plan.kind == SamplerKind::DpmPlusPlus2M && step > 0;
        if *has_before != u8::from(leaves) {
            return wrong("has the wrong history for its step".to_owned());
        }
        let arrays = 1 + usize::from(leaves);
        if Some(values.len()) != latents.checked_mul(arrays * 4) {
            return wrong(format!(
                "has {} bytes of values, which are not {arrays} × {latents} numbers",
                values.len()
            ));
        }
        let values: Vec<f32> = values
            .as_chunks()
            .0
            .iter()
            .map(|&bytes| f32::from_le_bytes(bytes))
            .collect();
        if !values.iter().all(|x| x.is_finite()) {
            return wrong("has a number that is not finite".to_owned());
        }
        let mut latents_of = values;
        let before = leaves.then(|| latents_of.split_off(latents));
        Ok(Sampler {
            plan,
            step,
            latents: latents_of,
            before,
        })
    }
}

fn code(kind: SamplerKind) -> u8 {
    match kind {
        SamplerKind::DpmPlusPlus2M => 1,
        SamplerKind::Euler => 2,
        SamplerKind::EulerAncestral => 3,
        SamplerKind::Ddim => 4,
        SamplerKind::Lcm => 5,
    }
}

const VERSION: u8 = 1;
const HEAD: usize = 3 + 4 * 4;
