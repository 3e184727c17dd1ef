//! The state of a request after a step, as it travels in [`Progress`].
//!
//! Version (1 byte), fingerprint of the request (16 bytes), 1 if latents of a masked picture follow (1 byte); those latents as
//! little-endian f32; the state of the sampler. The position in the noise follows from the step, so it is not in it.

use sha2::{Digest as _, Sha256};

use super::{DiffuserInfo, ImageRequest, LatentShape, Progress};
use crate::sampler::{Plan, Sampler};

/// Identifies a request, all that its picture depends on: a state of another one is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Fingerprint([u8; 16]);

impl Fingerprint {
    pub(super) fn of(info: &DiffuserInfo, request: &ImageRequest) -> Self {
        let mut hash = Sha256::new();
        // Each with its length, so that no two requests give the same bytes.
        let mut add = |bytes: &[u8]| {
            hash.update((bytes.len() as u64).to_le_bytes());
            hash.update(bytes);
        };
        add(format!("{:?}", info.sampler).as_bytes());
        add(request.prompt.as_bytes());
        add(request.negative_prompt.as_bytes());
        for number in [request.width, request.height, request.steps] {
            add(&number.to_le_bytes());
        }
        add(&request.guidance.to_le_bytes());
        add(&request.seed.to_le_bytes());
        add(request.sampler.name().as_bytes());
        add(&[request.karras.into()]);
        if let Some(init) = &request.init {
            add(&init.strength.to_le_bytes());
            add(&init.image.rgb);
            add(init.mask.as_deref().unwrap_or_default());
        }
        if info.inpaints {
            add(b"inpaints");
        }
        let digest = hash.finalize();
        let (first, _) = digest
            .as_slice()
            .split_first_chunk()
            .expect("SHA-256 has 32 bytes");
        Fingerprint(*first)
    }
}

/// Progress of a run. `kept` are the latents of the picture that a mask keeps, or of the masked picture.
pub(super) fn save(fingerprint: Fingerprint, sampler: &Sampler, kept: Option<&[f32]>) -> Progress {
    let of_sampler = sampler.save();
    let values = kept.map_or(0, <[f32]>::len);
    let mut state = Vec::with_capacity(HEAD + values * 4 + of_sampler.len());
    state.push(VERSION);
    state.extend(fingerprint.0);
    state.push(kept.is_some().into());
    for value in kept.into_iter().flatten() {
        state.extend(value.to_le_bytes());
    }
    state.extend(of_sampler);
    Progress {
        step: sampler.step(),
        steps: sampler.plan().steps(),
        state,
        preview: None,
    }
}

/// The run and the latents of a masked picture, from progress that may come from anywhere; a text says why it is refused.
pub(super) fn restore(
    progress: &Progress,
    plan: &Plan,
    shape: LatentShape,
    fingerprint: Fingerprint,
    masked: bool,
) -> Result<(Sampler, Option<Vec<f32>>), String> {
    let state = progress.state.as_slice();
    let Some((head, mut rest)) = state.split_first_chunk::<HEAD>() else {
        return Err(format!(
            "the state has {} bytes, fewer than its head",
            state.len()
        ));
    };
    let [version, of @ .., has_kept] = head;
    if *version != VERSION {
        return Err(format!(
            "the state has version {version}, but this worker reads version {VERSION}"
        ));
    }
    if *of != fingerprint.0 {
        return Err("the state is one of another request or model".to_owned());
    }
    if *has_kept != u8::from(masked) {
        return Err("the state and the request differ on the mask".to_owned());
    }
    let mut kept = None;
    if masked {
        let (values, after) = rest
            .split_at_checked(shape.len() * 4)
            .ok_or("the state is cut short")?;
        let values: Vec<f32> = values
            .as_chunks()
            .0
            .iter()
            .map(|&bytes| f32::from_le_bytes(bytes))
            .collect();
        if !values.iter().all(|x| x.is_finite()) {
            return Err("the state has a number that is not finite".to_owned());
        }
        kept = Some(values);
        rest = after;
    }
    let sampler = Sampler::restore(plan.clone(), shape.len(), rest);
    let sampler = sampler.map_err(|error| error.to_string())?;
    let (step, steps) = (sampler.step(), plan.steps());
    if (progress.step, progress.steps) != (step, steps) {
        return Err(format!(
            "the progress says step {} of {}, but its state step {step} of {steps}",
            progress.step, progress.steps
        ));
    }
    Ok((sampler, kept))
}

const VERSION: u8 = 1;
const HEAD: usize = 1 + 16 + 1;
