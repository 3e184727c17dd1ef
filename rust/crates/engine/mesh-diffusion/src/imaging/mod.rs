//! Imaging: the model's trait, the scheduler that lets requests take turns, and the workload of both.
//!
//! A [`Diffuser`] is a loaded model. It turns prompts into conditioning, predicts the noise in latents, and turns latents into
//! pictures. Callers pass plain numbers; no tensor appears in the API.

mod check;
mod job;
mod request;
mod scheduler;
mod state;
mod workload;

pub use request::{Image, ImageEvent, ImageRequest, InitImage, Progress};
pub use scheduler::Scheduler;
pub use workload::{Imaging, ImagingOptions};

use mesh_engine::StageError;

use crate::preview::LatentColours;
use crate::prompt::Prompt;
use crate::sampler::{SamplerConfig, SamplerKind};

/// Shape of latents: a row-major array `[channels, height, width]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LatentShape {
    /// Channels: 4 in Stable Diffusion.
    pub channels: usize,
    /// Rows: the picture's height divided by [`DiffuserInfo::pixels_per_latent`].
    pub height: usize,
    /// Columns: the picture's width divided by the same.
    pub width: usize,
}

impl LatentShape {
    /// Number of values.
    pub fn len(&self) -> usize {
        self.channels * self.height * self.width
    }

    /// True if there are no values.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Shape, limits and defaults of a loaded model.
#[derive(Debug, Clone, PartialEq)]
pub struct DiffuserInfo {
    /// Family for people: `Stable Diffusion 1`, `Stable Diffusion XL`.
    pub family: String,
    /// Side of the pictures that the model was trained on, in pixels.
    pub default_size: u32,
    /// Widths and heights are multiples of this.
    pub size_multiple: u32,
    /// Smallest width and height.
    pub min_size: u32,
    /// Largest width and height.
    pub max_size: u32,
    /// Channels of latents.
    pub latent_channels: usize,
    /// Pixels per latent value, in each direction.
    pub pixels_per_latent: u32,
    /// The colours of latents, for previews; `None` if they are not known.
    pub colours: Option<LatentColours>,
    /// True if the model was made for inpainting: it takes [`Conditioning::beside`].
    pub inpaints: bool,
    /// The noise schedule.
    pub sampler: SamplerConfig,
    /// Sampler of requests that name none.
    pub default_sampler: SamplerKind,
    /// Steps of requests that name no number.
    pub default_steps: u32,
    /// Guidance of requests that name none.
    pub default_guidance: f32,
    /// Bytes of weights held in memory.
    pub weight_bytes: u64,
    /// Bytes that a step takes besides the weights, at any size.
    pub memory_base: u64,
    /// Bytes that each pixel of a picture adds to that.
    pub memory_per_pixel: u64,
    /// Bytes that there are for both; `None` means unknown, and every size is taken.
    pub memory_limit: Option<u64>,
}

impl DiffuserInfo {
    /// Shape of the latents of a picture.
    pub fn latent_shape(&self, width: u32, height: u32) -> LatentShape {
        let side = |pixels: u32| (pixels / self.pixels_per_latent.max(1)) as usize;
        LatentShape {
            channels: self.latent_channels,
            height: side(height),
            width: side(width),
        }
    }

    /// Bytes that a step of a picture takes besides the weights.
    pub fn memory_bytes(&self, width: u32, height: u32) -> u64 {
        let pixels = u64::from(width) * u64::from(height);
        let size = self.memory_per_pixel.saturating_mul(pixels);
        size.saturating_add(self.memory_base)
    }
}

/// Output of the text encoders for one prompt.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct TextEmbedding {
    /// Hidden rows, row-major `[tokens, width]`, prompt weights applied.
    pub hidden: Vec<f32>,
    /// Tokens: 77 for each chunk of the prompt.
    pub tokens: usize,
    /// Width of a row.
    pub width: usize,
    /// The pooled projection, for models that want one; else empty.
    pub pooled: Vec<f32>,
}

/// The conditioning of a request: what its prompts say, as the model wants it.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Conditioning {
    /// The prompt's.
    pub prompt: TextEmbedding,
    /// The negative prompt's, of the same shape; `None` without classifier-free guidance.
    pub negative: Option<TextEmbedding>,
    /// Channels that the model takes beside the latents, row-major `[channels, height, width]`: in models for inpainting a mask,
    /// 1 where the picture is painted, and the latents of the masked picture. Empty in all others.
    pub beside: Vec<f32>,
}

/// A loaded model of images.
///
/// Everything depends on the arguments of a call alone. Calls are synchronous and use the model's own threads. A model can be
/// used on after an error.
pub trait Diffuser: Send + 'static {
    /// Shape, limits and defaults of this model.
    fn info(&self) -> &DiffuserInfo;

    /// Conditioning for the prompts, which have the same number of chunks. Without a `negative` there is no classifier-free
    /// guidance.
    ///
    /// # Errors
    /// If the engine fails.
    fn encode(
        &mut self,
        prompt: &Prompt,
        negative: Option<&Prompt>,
    ) -> Result<Conditioning, StageError>;

    /// The model's prediction for `latents`, which the sampler has scaled, at a timestep of training. With a negative in the
    /// conditioning it is guided: `negative + guidance · (prompt - negative)`. As many values as `latents`.
    ///
    /// # Errors
    /// If the engine fails.
    fn denoise(
        &mut self,
        latents: &[f32],
        shape: LatentShape,
        timestep: f32,
        conditioning: &Conditioning,
        guidance: f32,
    ) -> Result<Vec<f32>, StageError>;

    /// The picture of `latents`.
    ///
    /// # Errors
    /// If the engine fails.
    fn decode(&mut self, latents: &[f32], shape: LatentShape) -> Result<Image, StageError>;

    /// The latents of a picture whose sides fit [`DiffuserInfo::size_multiple`], scaled as the sampler wants them. `noise`, one
    /// normal number per latent, draws a sample of the encoder's distribution: `mean + deviation · noise`. With a `mask`, one byte
    /// per pixel, the picture is grey where that is 128 or more.
    ///
    /// # Errors
    /// If the engine fails.
    fn encode_image(
        &mut self,
        image: &Image,
        mask: Option<&[u8]>,
        noise: &[f32],
    ) -> Result<Vec<f32>, StageError>;
}

impl<D: Diffuser + ?Sized> Diffuser for Box<D> {
    fn info(&self) -> &DiffuserInfo {
        (**self).info()
    }

    fn encode(
        &mut self,
        prompt: &Prompt,
        negative: Option<&Prompt>,
    ) -> Result<Conditioning, StageError> {
        (**self).encode(prompt, negative)
    }

    fn denoise(
        &mut self,
        latents: &[f32],
        shape: LatentShape,
        timestep: f32,
        conditioning: &Conditioning,
        guidance: f32,
    ) -> Result<Vec<f32>, StageError> {
        (**self).denoise(latents, shape, timestep, conditioning, guidance)
    }

    fn decode(&mut self, latents: &[f32], shape: LatentShape) -> Result<Image, StageError> {
        (**self).decode(latents, shape)
    }

    fn encode_image(
        &mut self,
        image: &Image,
        mask: Option<&[u8]>,
        noise: &[f32],
    ) -> Result<Vec<f32>, StageError> {
        (**self).encode_image(image, mask, noise)
    }
}
