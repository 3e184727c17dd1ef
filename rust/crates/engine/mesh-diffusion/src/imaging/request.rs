//! Requests for pictures and what comes of them.

use std::time::Instant;

use mesh_engine::RequestError;

use crate::sampler::SamplerKind;

/// A request for a picture.
#[derive(Debug, Clone, PartialEq)]
pub struct ImageRequest {
    /// Request id, used in logs only.
    pub id: String,
    /// Text of the picture, with weights as [`crate::prompt`] reads them.
    pub prompt: String,
    /// Text of what the picture is led away from; it has no effect if `guidance` is at most 1.
    pub negative_prompt: String,
    /// Width in pixels, a multiple of [`DiffuserInfo::size_multiple`](crate::DiffuserInfo::size_multiple).
    pub width: u32,
    /// Height in pixels, a multiple of the same.
    pub height: u32,
    /// Steps of the whole schedule, of which a start from a picture leaves out the first ones.
    pub steps: u32,
    /// Factor of classifier-free guidance; at most 1 is without.
    pub guidance: f32,
    /// Decides all random numbers; of a number over 32 bits the low 32 count, as in torch.
    pub seed: u64,
    /// The sampler.
    pub sampler: SamplerKind,
    /// Karras' spacing of sigmas, for samplers that have it.
    pub karras: bool,
    /// The picture to start from; `None` starts from noise.
    pub init: Option<InitImage>,
    /// Progress of this very request elsewhere, to go on after.
    pub resume: Option<Progress>,
    /// Add a preview to each step's progress, if the model's latents have known colours.
    pub previews: bool,
    /// Time after which the picture is useless; `None` means no limit.
    pub deadline: Option<Instant>,
}

impl ImageRequest {
    /// The request as text for the file of its picture ([`crate::png`]), in the form of AUTOMATIC1111's web interface.
    pub fn parameters(&self) -> String {
        let mut text = self.prompt.clone();
        if !self.negative_prompt.is_empty() {
            text += &format!("\nNegative prompt: {}", self.negative_prompt);
        }
        let schedule = if self.karras {
            ", Schedule type: Karras"
        } else {
            ""
        };
        let sampler = match self.sampler {
            SamplerKind::DpmPlusPlus2M => "DPM++ 2M",
            SamplerKind::Euler => "Euler",
            SamplerKind::EulerAncestral => "Euler a",
            SamplerKind::Ddim => "DDIM",
            SamplerKind::Lcm => "LCM",
        };
        text += &format!(
            "\nSteps: {}, Sampler: {sampler}{schedule}, CFG scale: {}, Seed: {}, Size: {}x{}",
            self.steps, self.guidance, self.seed, self.width, self.height
        );
        if let Some(init) = &self.init {
            text += &format!(", Denoising strength: {}", init.strength);
        }
        text
    }
}

/// A picture to start from.
#[derive(Debug, Clone, PartialEq)]
pub struct InitImage {
    /// The picture, of the request's size.
    pub image: Image,
    /// Share of the steps that are run, over 0 up to 1; 1 keeps nothing of the picture.
    pub strength: f32,
    /// One byte per pixel, row by row: 128 and more is painted anew, less is kept: it has the colours of `image` in the end. `None`
    /// paints everything.
    pub mask: Option<Vec<u8>>,
}

/// A picture.
#[derive(Clone, PartialEq, Eq)]
pub struct Image {
    /// Width in pixels.
    pub width: u32,
    /// Height in pixels.
    pub height: u32,
    /// Three bytes per pixel, row by row.
    pub rgb: Vec<u8>,
}

impl std::fmt::Debug for Image {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Image({}×{})", self.width, self.height)
    }
}

/// The state after a step, from which any worker with the same model goes on, bit for bit.
#[derive(Clone, PartialEq, Eq)]
pub struct Progress {
    /// Steps done.
    pub step: u32,
    /// Steps that the request takes: [`ImageRequest::steps`], fewer if it starts from a picture.
    pub steps: u32,
    /// Latents, the sampler's history and the position in the noise; opaque to all but this crate.
    pub state: Vec<u8>,
    /// The finished picture as the model predicted it in this step, a pixel for each place of the latents; `None` where none was
    /// asked for. It is not needed to go on.
    pub preview: Option<Image>,
}

impl std::fmt::Debug for Progress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Progress {
            step, steps, state, ..
        } = self;
        write!(f, "Progress({step} of {steps}, {} bytes)", state.len())
    }
}

/// An event of a request. [`ImageEvent::Done`] is last.
#[derive(Debug, Clone, PartialEq)]
pub enum ImageEvent {
    /// A step is done.
    Step(Progress),
    /// The picture, or the reason why there is none.
    Done(Result<Image, RequestError>),
}
