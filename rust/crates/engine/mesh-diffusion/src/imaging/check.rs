//! Checks requests before they are queued.

use mesh_engine::RequestError;

use super::state::{Fingerprint, restore};
use super::{DiffuserInfo, ImageRequest, LatentShape};
use crate::noise::BLOCK;
use crate::prompt::{Prompt, PromptError};
use crate::sampler::{Plan, PlanOptions, Sampler};
use crate::tokenizer::ClipTokenizer;

/// Values derived from a valid request.
pub(super) struct Checked {
    pub(super) shape: LatentShape,
    pub(super) plan: Plan,
    pub(super) prompt: Prompt,
    /// `None` without classifier-free guidance.
    pub(super) negative: Option<Prompt>,
    pub(super) fingerprint: Fingerprint,
    /// The run to go on with, and the latents of the picture that a mask keeps.
    pub(super) resumed: Option<(Sampler, Option<Vec<f32>>)>,
}

/// Checks `request` against the model's limits.
///
/// # Errors
/// [`RequestError::Invalid`], with a reason for people.
pub(super) fn check(
    info: &DiffuserInfo,
    tokenizer: &ClipTokenizer,
    request: &ImageRequest,
) -> Result<Checked, RequestError> {
    check_size(info, request)?;
    check_init(request)?;
    if !(0.0..=MOST_GUIDANCE).contains(&request.guidance) {
        return Err(RequestError::InvalidParameter {
            name: "guidance",
            value: request.guidance.to_string(),
            range: "0 to 100",
        });
    }
    let shape = info.latent_shape(request.width, request.height);
    if shape.len() < BLOCK {
        return Err(invalid(format!(
            "a picture of {}×{} has {} latents, but the smallest has {BLOCK}",
            request.width,
            request.height,
            shape.len()
        )));
    }
    let options = PlanOptions {
        kind: request.sampler,
        karras: request.karras,
        steps: request.steps,
        strength: request.init.as_ref().map(|init| init.strength),
    };
    let plan = Plan::new(&info.sampler, options).map_err(|error| invalid(error.to_string()))?;
    let (prompt, negative) = prompts(tokenizer, request)?;
    let fingerprint = Fingerprint::of(info, request);
    let resumed = request.resume.as_ref().map(|progress| {
        let mask = request.init.as_ref().and_then(|init| init.mask.as_ref());
        let masked = info.inpaints || mask.is_some();
        restore(progress, &plan, shape, fingerprint, masked).map_err(|text| {
            invalid(format!(
                "cannot resume: {text}; send the request without it"
            ))
        })
    });
    Ok(Checked {
        shape,
        plan,
        prompt,
        negative,
        fingerprint,
        resumed: resumed.transpose()?,
    })
}

fn check_size(info: &DiffuserInfo, request: &ImageRequest) -> Result<(), RequestError> {
    let (min, max) = (info.min_size, info.max_size);
    let multiple = info.size_multiple.max(info.pixels_per_latent).max(1);
    for (name, side) in [("width", request.width), ("height", request.height)] {
        if !(min..=max).contains(&side) || !side.is_multiple_of(multiple) {
            return Err(invalid(format!(
                "{name} is {side}, but must be a multiple of {multiple} from {min} to {max}"
            )));
        }
    }
    let needed = info.memory_bytes(request.width, request.height);
    match info.memory_limit {
        Some(limit) if needed > limit => Err(invalid(format!(
            "a picture of {}×{} takes {} MiB of memory, but this worker has {} MiB for pictures; ask for a smaller one",
            request.width,
            request.height,
            needed.div_ceil(1 << 20),
            limit >> 20
        ))),
        _ => Ok(()),
    }
}

fn check_init(request: &ImageRequest) -> Result<(), RequestError> {
    let Some(init) = &request.init else {
        return Ok(());
    };
    let (width, height) = (request.width, request.height);
    let image = &init.image;
    if (image.width, image.height) != (width, height) {
        return Err(invalid(format!(
            "the picture to start from has {}×{} pixels, but the request's size is {width}×{height}; scale it, or ask for its size",
            image.width, image.height
        )));
    }
    let pixels = u64::from(width) * u64::from(height);
    if image.rgb.len() as u64 != pixels * 3 {
        return Err(invalid(format!(
            "the picture to start from has {} bytes, not the {} of {width}×{height} pixels of RGB",
            image.rgb.len(),
            pixels * 3
        )));
    }
    match &init.mask {
        Some(mask) if mask.len() as u64 != pixels => Err(invalid(format!(
            "the mask has {} bytes, not one for each of the {pixels} pixels",
            mask.len()
        ))),
        _ => Ok(()),
    }
}

/// Both prompts, with the same number of chunks.
fn prompts(
    tokenizer: &ClipTokenizer,
    request: &ImageRequest,
) -> Result<(Prompt, Option<Prompt>), RequestError> {
    let read = |name: &str, text: &str| {
        let failed = |error: PromptError| invalid(format!("{name}: {error}"));
        Prompt::new(tokenizer, text).map_err(failed)
    };
    let mut prompt = read("the prompt", &request.prompt)?;
    let mut negative = read("the negative prompt", &request.negative_prompt)?;
    if request.guidance <= 1.0 {
        return Ok((prompt, None));
    }
    let chunks = prompt.chunks.len().max(negative.chunks.len());
    prompt.extend_to(chunks);
    negative.extend_to(chunks);
    Ok((prompt, Some(negative)))
}

pub(super) fn invalid(reason: String) -> RequestError {
    RequestError::Invalid { reason }
}

const MOST_GUIDANCE: f32 = 100.0;
