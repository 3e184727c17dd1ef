//! One request: from its prompts over its steps to its picture.

use std::time::Instant;

use mesh_engine::{RequestError, StageError};

use super::check::{Checked, invalid};
use super::state::{Fingerprint, save};
use super::{Conditioning, Diffuser, Image, ImageRequest, InitImage, LatentShape, Progress};
use crate::noise::Noise;
use crate::prompt::Prompt;
use crate::sampler::{Plan, Sampler};

/// A request that is queued or under way.
pub(super) struct Job {
    shape: LatentShape,
    plan: Plan,
    prompt: Prompt,
    negative: Option<Prompt>,
    guidance: f32,
    seed: u64,
    init: Option<InitImage>,
    fingerprint: Fingerprint,
    previews: bool,
    resumed: Option<(Sampler, Option<Vec<f32>>)>,
    run: Option<Run>,
    pub(super) deadline: Option<Instant>,
}

/// The steps of a request.
struct Run {
    sampler: Sampler,
    noise: Noise,
    /// Empty if no step is left.
    conditioning: Conditioning,
    mask: Option<Mask>,
    /// Latents of the masked picture, in models for inpainting.
    masked: Option<Vec<f32>>,
}

/// The part of the initial picture that a mask keeps.
struct Mask {
    /// One per latent of a channel.
    kept: Vec<bool>,
    image: Vec<f32>,
    noise: Vec<f32>,
}

/// The outcome of one turn.
pub(super) enum Turn {
    /// The prompts are encoded and the latents are there.
    Prepared,
    /// A step is done.
    Step(Progress),
    /// The picture.
    Done(Image),
}

/// A failure of one turn, which ends the request.
pub(super) enum Failure {
    /// The model failed.
    Stage(StageError),
    /// The request's own numbers left the finite ones; the model is as good as before.
    Request(RequestError),
}

impl From<StageError> for Failure {
    fn from(error: StageError) -> Self {
        Failure::Stage(error)
    }
}

impl Job {
    pub(super) fn new(request: ImageRequest, checked: Checked) -> Self {
        let Checked {
            shape,
            plan,
            prompt,
            negative,
            fingerprint,
            resumed,
        } = checked;
        Job {
            shape,
            plan,
            prompt,
            negative,
            guidance: request.guidance,
            seed: request.seed,
            init: request.init,
            fingerprint,
            previews: request.previews,
            resumed,
            run: None,
            deadline: request.deadline,
        }
    }

    /// Steps done.
    pub(super) fn done(&self) -> u32 {
        let sampler = self.run.as_ref().map(|run| &run.sampler);
        let sampler = sampler.or(self.resumed.as_ref().map(|(sampler, _)| sampler));
        sampler.map_or(0, Sampler::step)
    }

    /// Steps in all.
    pub(super) fn steps(&self) -> u32 {
        self.plan.steps()
    }

    /// Takes the next turn on the model.
    pub(super) fn turn(&mut self, model: &mut impl Diffuser) -> Result<Turn, Failure> {
        let Some(run) = &mut self.run else {
            self.prepare(model)?;
            return Ok(Turn::Prepared);
        };
        let Some(timestep) = run.sampler.timestep() else {
            let image = model.decode(run.sampler.latents(), self.shape)?;
            let mut image = self.checked(model, image)?;
            if let Some(init) = &self.init {
                restore_kept(&mut image, init);
            }
            return Ok(Turn::Done(image));
        };
        let scaled = run.sampler.scaled();
        let prediction = model.denoise(
            &scaled,
            self.shape,
            timestep,
            &run.conditioning,
            self.guidance,
        )?;
        let colours = model.info().colours.filter(|_| self.previews);
        let preview = colours.and_then(|colours| {
            let latents = run.predicted(&prediction);
            colours.picture(&latents, self.shape)
        });
        run.advance(&prediction, self.shape)?;
        let kept = run.mask.as_ref().map(|mask| &mask.image);
        let kept = kept.or(run.masked.as_ref()).map(Vec::as_slice);
        let progress = save(self.fingerprint, &run.sampler, kept);
        Ok(Turn::Step(Progress {
            preview,
            ..progress
        }))
    }

    fn prepare(&mut self, model: &mut impl Diffuser) -> Result<(), Failure> {
        let mut run = match self.resumed.take() {
            Some((sampler, image)) => self.resume(sampler, image, model.info().inpaints),
            None if model.info().inpaints => self.start_inpainting(model)?,
            None => self.start(model)?,
        };
        if run.sampler.timestep().is_some() {
            run.conditioning = model.encode(&self.prompt, self.negative.as_ref())?;
            run.conditioning.beside = self.beside(run.masked.as_deref());
        }
        self.run = Some(run);
        // A mask's picture is needed again in the end.
        self.init.take_if(|init| init.mask.is_none());
        Ok(())
    }

    /// Draws in the order of diffusers' pipelines: a sample of the picture's latents, the noise, and with a mask a sample
    /// of the masked picture's latents, which only models with more input channels use.
    fn start(&self, model: &mut impl Diffuser) -> Result<Run, Failure> {
        let count = self.shape.len();
        let mut noise = Noise::new(self.seed);
        let plan = self.plan.clone();
        let Some(init) = &self.init else {
            let sampler = Sampler::from_noise(plan, noise.normal(count));
            return Ok(Run::new(sampler, noise, None));
        };
        let image = model.encode_image(&init.image, None, &noise.normal(count))?;
        let first = noise.normal(count);
        let sampler = match &init.mask {
            Some(_) if init.strength >= 1.0 => Ok(Sampler::from_noise(plan, first.clone())),
            _ => Sampler::from_image(plan, &image, &first),
        };
        // A length that the model got wrong.
        let sampler = sampler.map_err(|error| StageError::Malformed(error.to_string()))?;
        let mask = init.mask.as_ref().map(|mask| Mask {
            kept: kept(mask, init, self.shape),
            image,
            noise: first,
        });
        if mask.is_some() {
            noise.skip(Noise::draws(count));
        }
        Ok(Run::new(sampler, noise, mask))
    }

    /// As [`Job::start`] of a model for inpainting, which draws a sample of the picture only where that is a part of the start.
    fn start_inpainting(&self, model: &mut impl Diffuser) -> Result<Run, Failure> {
        let count = self.shape.len();
        let mut noise = Noise::new(self.seed);
        let plan = self.plan.clone();
        let sampler = match &self.init {
            Some(init) if init.strength < 1.0 => {
                let image = model.encode_image(&init.image, None, &noise.normal(count))?;
                Sampler::from_image(plan, &image, &noise.normal(count))
                    .map_err(|error| StageError::Malformed(error.to_string()))?
            }
            _ => Sampler::from_noise(plan, noise.normal(count)),
        };
        let fresh = noise.normal(count);
        let masked = match &self.init {
            Some(InitImage {
                image,
                mask: Some(mask),
                ..
            }) => model.encode_image(image, Some(mask), &fresh)?,
            // All is painted.
            _ => {
                let pixels = model.info().pixels_per_latent as usize;
                let (width, height) = (self.shape.width * pixels, self.shape.height * pixels);
                let image = Image {
                    width: width as u32,
                    height: height as u32,
                    rgb: vec![0; 3 * width * height],
                };
                model.encode_image(&image, Some(&vec![u8::MAX; width * height]), &fresh)?
            }
        };
        let run = Run::new(sampler, noise, None);
        Ok(Run {
            masked: Some(masked),
            ..run
        })
    }

    /// Channels beside the latents: the mask and the latents of the masked picture.
    fn beside(&self, masked: Option<&[f32]>) -> Vec<f32> {
        let Some(masked) = masked else {
            return Vec::new();
        };
        let init = self.init.as_ref();
        let mask = init.and_then(|init| Some((init.mask.as_ref()?, init)));
        let mut beside: Vec<f32> = match mask {
            Some((mask, init)) => kept(mask, init, self.shape)
                .into_iter()
                .map(|kept| if kept { 0.0 } else { 1.0 })
                .collect(),
            None => vec![1.0; self.shape.height * self.shape.width],
        };
        beside.extend(masked);
        beside
    }

    fn resume(&self, sampler: Sampler, image: Option<Vec<f32>>, inpaints: bool) -> Run {
        let count = self.shape.len();
        let mut noise = Noise::new(self.seed);
        let mut mask = None;
        let mut masked = None;
        if inpaints {
            let from_image = self.init.as_ref().is_some_and(|init| init.strength < 1.0);
            let samples = if from_image { 3 } else { 2 };
            noise.skip(samples * Noise::draws(count));
            masked = image;
        } else if let Some(init) = &self.init {
            noise.skip(Noise::draws(count));
            let first = noise.normal(count);
            if let (Some(of), Some(image)) = (&init.mask, image) {
                noise.skip(Noise::draws(count));
                mask = Some(Mask {
                    kept: kept(of, init, self.shape),
                    image,
                    noise: first,
                });
            }
        } else {
            noise.skip(Noise::draws(count));
        }
        let with_noise = (0..sampler.step()).filter(|&step| self.plan.takes_noise(step));
        noise.skip(with_noise.count() as u64 * Noise::draws(count));
        let run = Run::new(sampler, noise, mask);
        Run { masked, ..run }
    }

    /// The picture, if it is one of the request's size.
    fn checked(&self, model: &impl Diffuser, image: Image) -> Result<Image, StageError> {
        let pixels = model.info().pixels_per_latent as usize;
        let (width, height) = (self.shape.width * pixels, self.shape.height * pixels);
        let found = (image.width as usize, image.height as usize);
        if found == (width, height) && image.rgb.len() == width * height * 3 {
            return Ok(image);
        }
        Err(StageError::Malformed(format!(
            "the decoder gave {} bytes for {}×{} pixels, not a picture of {width}×{height}",
            image.rgb.len(),
            found.0,
            found.1
        )))
    }
}

impl Run {
    fn new(sampler: Sampler, noise: Noise, mask: Option<Mask>) -> Self {
        Run {
            sampler,
            noise,
            conditioning: Conditioning::default(),
            mask,
            masked: None,
        }
    }

    /// Latents of the finished picture that this prediction implies.
    fn predicted(&self, prediction: &[f32]) -> Vec<f32> {
        let mut latents = self.sampler.predicted(prediction);
        if let Some(mask) = &self.mask {
            let plane = mask.kept.len().max(1);
            for (at, (latent, of)) in latents.iter_mut().zip(&mask.image).enumerate() {
                if mask.kept.get(at % plane).copied().unwrap_or(false) {
                    *latent = *of;
                }
            }
        }
        latents
    }

    fn advance(&mut self, prediction: &[f32], shape: LatentShape) -> Result<(), Failure> {
        let fresh = self.sampler.takes_noise();
        let fresh = fresh.then(|| self.noise.normal(shape.len()));
        let advanced = self.sampler.advance(prediction, fresh.as_deref());
        advanced.map_err(|error| Failure::Request(invalid(format!("no picture: {error}"))))?;
        if let Some(mask) = &self.mask {
            let plane = mask.kept.len().max(1);
            let kept = |at: usize| mask.kept.get(at % plane).copied().unwrap_or(false);
            let done = self.sampler.keep(&mask.image, &mask.noise, kept);
            done.map_err(|error| StageError::Malformed(error.to_string()))?;
        }
        Ok(())
    }
}

/// Gives pixels that the mask keeps their colours: latents are coarser than pixels, and the autoencoder changes all colours a
/// little.
fn restore_kept(image: &mut Image, init: &InitImage) {
    let Some(mask) = &init.mask else { return };
    let (pixels, _) = image.rgb.as_chunks_mut::<3>();
    let (of, _) = init.image.rgb.as_chunks::<3>();
    for ((pixel, of), mask) in pixels.iter_mut().zip(of).zip(mask) {
        if *mask < PAINTED {
            *pixel = *of;
        }
    }
}

/// For each latent of a channel, whether the pixel at its corner is kept.
fn kept(mask: &[u8], init: &InitImage, shape: LatentShape) -> Vec<bool> {
    let (width, height) = (init.image.width as usize, init.image.height as usize);
    let rows = (0..shape.height).map(|row| row * height / shape.height);
    let of_row = |row: usize| {
        let columns = (0..shape.width).map(|column| column * width / shape.width);
        columns.map(move |column| mask.get(row * width + column).is_some_and(|&x| x < PAINTED))
    };
    rows.flat_map(of_row).collect()
}

/// Least value of a mask where the picture is painted anew.
const PAINTED: u8 = 128;
