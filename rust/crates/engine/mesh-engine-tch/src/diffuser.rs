//! A loaded model as the scheduler of images uses it.

use std::sync::Arc;

use mesh_diffusion::checkpoint::{Checkpoint, Module};
use mesh_diffusion::config::{Family, PipelineConfig};
use mesh_diffusion::prompt::weigh;
use mesh_diffusion::{
    Conditioning, Diffuser, DiffuserInfo, Image, LatentColours, LatentShape, Prompt, SamplerKind,
    TextEmbedding,
};
use mesh_engine::StageError;
use tch::{Kind, Tensor};

use crate::clip::to_f32;
use crate::error::{Failure, LoadError, Outcome, Within};
use crate::memory;
use crate::options::Options;
use crate::parts::{Autoencoder, Part, Parts};
use crate::tiles::{Canvas, starts};
use crate::unet::Condition;
use crate::weight::{Place, Workspace};

/// Smallest and largest side of a picture, in pixels.
const SIDES: (u32, u32) = (64, 4096);

/// Masks have at least this where a picture is painted.
const PAINTED: u8 = 128;

/// A model of images on libtorch.
#[derive(Debug)]
pub struct TchDiffuser {
    info: DiffuserInfo,
    config: PipelineConfig,
    options: Options,
    device: tch::Device,
    kind: Kind,
    /// Type of the autoencoder.
    vae_kind: Kind,
    parts: Parts,
}

impl TchDiffuser {
    /// Loads the model onto its device. The files are needed afterwards only with [`Options::offload`].
    ///
    /// # Errors
    /// If a file cannot be read or was changed, or the device is missing, too small or cannot compute with the type.
    pub fn load(checkpoint: &Arc<Checkpoint>, options: &Options) -> Result<Self, LoadError> {
        let _guard = tch::no_grad_guard();
        let device = options.device.find().ok_or(LoadError::NoDevice {
            device: options.device,
            count: tch::Cuda::device_count(),
        })?;
        if let Some(threads) = i32::try_from(options.threads)
            .ok()
            .filter(|threads| *threads > 0)
        {
            tch::set_num_threads(threads);
        }
        let config = checkpoint.config().clone();
        let (kind, vae_kind) = options.kinds(&config, device);
        probe(device, kind).map_err(|failure| LoadError::Precision {
            device: options.device,
            precision: options.precision,
            message: failure.message(),
        })?;
        let place = Place {
            device,
            kind,
            workspace: Workspace::default(),
        };
        let (parts, bytes) = Parts::load(checkpoint, options, place, vae_kind)?;
        tracing::info!(
            family = %config.family,
            ?device,
            ?kind,
            weights = ?options.weights,
            offload = ?options.offload,
            megabytes = bytes / 1_000_000,
            "loaded a model of images"
        );
        Ok(TchDiffuser {
            info: info(&config, options, kind, bytes),
            options: options.clone(),
            config,
            device,
            kind,
            vae_kind,
            parts,
        })
    }

    fn tensor(&self, values: &[f32], shape: &[i64], kind: Kind) -> Outcome<Tensor> {
        let tensor = Tensor::f_from_slice(values)?.f_view(shape)?;
        Ok(tensor.f_to_device(self.device)?.f_to_kind(kind)?)
    }

    fn embed(&self, prompt: &Prompt) -> Result<TextEmbedding, StageError> {
        let mut rows: Vec<Vec<f32>> = Vec::new();
        let mut widths = Vec::new();
        let mut pooled = Vec::new();
        let weights = prompt.weights();
        for (i, encoder) in self.parts.text()?.iter().enumerate() {
            let config = encoder.config();
            let ids = prompt.ids(config.pad.unwrap_or(prompt.end));
            check_tokens(&ids, config.vocab)?;
            let name = [Module::TextEncoder, Module::TextEncoder2][i.min(1)].name();
            let (hidden, first) = encoder
                .forward(&ids)
                .and_then(|encoded| {
                    let first = encoded
                        .pooled
                        .map(|pooled| to_f32(&pooled.f_get(0)?))
                        .transpose()?;
                    Ok((to_f32(&encoded.hidden)?, first))
                })
                .within(name)?;
            let width = config.width as usize;
            let mut hidden = hidden;
            for (chunk, weights) in hidden.chunks_mut(77 * width).zip(&weights) {
                weigh(chunk, weights, width);
            }
            rows.push(hidden);
            widths.push(width);
            // The last encoder's counts, as in XL.
            pooled = first.unwrap_or_default();
        }
        let tokens = 77 * weights.len();
        let width: usize = widths.iter().sum();
        let mut hidden = Vec::with_capacity(tokens * width);
        for token in 0..tokens {
            for (rows, width) in rows.iter().zip(&widths) {
                hidden.extend_from_slice(&rows[token * width..][..*width]);
            }
        }
        Ok(TextEmbedding {
            hidden,
            tokens,
            width,
            pooled,
        })
    }

    /// One prediction for each of `texts`, in order.
    fn predict(
        &self,
        latents: &Tensor,
        timestep: f32,
        texts: &[&TextEmbedding],
        size: [i64; 2],
        guidance: f32,
    ) -> Outcome<Vec<Vec<f32>>> {
        let batch = texts.len() as i64;
        let (tokens, width) = (texts[0].tokens as i64, texts[0].width as i64);
        let hidden: Vec<&[f32]> = texts.iter().map(|text| &*text.hidden).collect();
        let context = self.tensor(&hidden.concat(), &[batch, tokens, width], self.kind)?;
        let pooled: Vec<&[f32]> = texts.iter().map(|text| &*text.pooled).collect();
        let pooled = match self.config.unet.added {
            Some(added) => {
                Some(self.tensor(&pooled.concat(), &[batch, added.pooled().into()], self.kind)?)
            }
            None => None,
        };
        let condition = Condition {
            timestep: timestep.into(),
            context: &context,
            added: pooled.as_ref().map(|pooled| (pooled, size)),
            guidance: self.config.unet.guidance.map(|_| guidance.into()),
        };
        let latents = latents.f_expand([batch, -1, -1, -1], false)?;
        let out = to_f32(&self.parts.unet()?.forward(&latents, &condition)?)?;
        let one = out.len() / texts.len();
        Ok(out.chunks(one.max(1)).map(<[f32]>::to_vec).collect())
    }

    fn check(&self, latents: &[f32], shape: LatentShape) -> Result<(), StageError> {
        let channels = self.info.latent_channels;
        if shape.channels != channels || shape.is_empty() || latents.len() != shape.len() {
            return Err(StageError::Malformed(format!(
                "{} latents for a shape of {}×{}×{}: this model's have {channels} channels",
                latents.len(),
                shape.channels,
                shape.height,
                shape.width
            )));
        }
        Ok(())
    }

    fn check_text(&self, text: &TextEmbedding, like: &TextEmbedding) -> Result<(), StageError> {
        let unet = &self.config.unet;
        let pooled = unet
            .added
            .map_or(text.pooled.len(), |added| added.pooled() as usize);
        let fits = text.width == unet.context as usize
            && text.hidden.len() == text.tokens * text.width
            && text.tokens > 0
            && text.tokens == like.tokens
            && text.pooled.len() == pooled;
        match fits {
            true => Ok(()),
            false => Err(StageError::Malformed(format!(
                "conditioning of {} tokens, {} values wide and pooled to {}: this model's is {} wide and pooled to {pooled}, and \
                 both prompts have the same number of tokens",
                text.tokens,
                text.width,
                text.pooled.len(),
                unet.context
            ))),
        }
    }

    fn decode_whole(&self, latents: &Tensor) -> Outcome<Tensor> {
        self.parts.vae()?.decode(latents)
    }

    /// Pixels `[3, height, width]`, about -1 to 1.
    fn pixels(&self, latents: &Tensor) -> Outcome<Vec<f32>> {
        let tile = self.options.tile();
        let (_, _, height, width) = latents.size4()?;
        let (height, width) = (height as usize, width as usize);
        if height.max(width) <= tile {
            return to_f32(&self.decode_whole(latents)?);
        }
        let factor = self.info.pixels_per_latent as usize;
        let mut canvas = Canvas::new(3, factor * height, factor * width);
        for row in starts(height, tile) {
            for column in starts(width, tile) {
                let (rows, columns) = (tile.min(height), tile.min(width));
                let part = latents.f_narrow(2, row as i64, rows as i64)?;
                let part = part
                    .f_narrow(3, column as i64, columns as i64)?
                    .f_contiguous()?;
                let range = |start: usize, length: usize| factor * start..factor * (start + length);
                let pixels = to_f32(&self.decode_whole(&part)?)?;
                canvas.add(
                    &pixels,
                    range(row, rows),
                    range(column, columns),
                    factor * tile / 4,
                );
            }
        }
        Ok(canvas.finish())
    }
}

impl Diffuser for TchDiffuser {
    fn info(&self) -> &DiffuserInfo {
        &self.info
    }

    fn encode(
        &mut self,
        prompt: &Prompt,
        negative: Option<&Prompt>,
    ) -> Result<Conditioning, StageError> {
        let _guard = tch::no_grad_guard();
        self.parts.bring(Part::Text)?;
        let positive = self.embed(prompt)?;
        let negative = match negative {
            Some(negative) if negative.is_empty() && self.config.zero_empty_negative => {
                Some(TextEmbedding {
                    hidden: vec![0.0; positive.hidden.len()],
                    pooled: vec![0.0; positive.pooled.len()],
                    ..positive
                })
            }
            Some(negative) => Some(self.embed(negative)?),
            None => None,
        };
        self.parts.check_unchanged()?;
        Ok(Conditioning {
            prompt: positive,
            negative,
            beside: Vec::new(),
        })
    }

    fn denoise(
        &mut self,
        latents: &[f32],
        shape: LatentShape,
        timestep: f32,
        conditioning: &Conditioning,
        guidance: f32,
    ) -> Result<Vec<f32>, StageError> {
        let _guard = tch::no_grad_guard();
        self.check(latents, shape)?;
        self.parts.bring(Part::Unet)?;
        let positive = &conditioning.prompt;
        // A model that was distilled with its guidance takes it as a number.
        let negative = conditioning
            .negative
            .as_ref()
            .filter(|_| self.config.unet.guidance.is_none());
        self.check_text(positive, positive)?;
        let channels = self.config.unet.inputs as usize;
        let beside = &conditioning.beside;
        if latents.len() + beside.len() != channels * shape.height * shape.width {
            return Err(StageError::Malformed(format!(
                "{} values beside {} latents: this model takes {channels} channels",
                beside.len(),
                latents.len()
            )));
        }
        let dims = [1, channels as i64, shape.height as i64, shape.width as i64];
        let factor = i64::from(self.info.pixels_per_latent);
        let size = [factor * dims[2], factor * dims[3]];
        let inputs = [latents, beside].concat();
        let latents = self.tensor(&inputs, &dims, self.kind).within("unet")?;
        let predict = |texts: &[&TextEmbedding]| {
            let predictions = self
                .predict(&latents, timestep, texts, size, guidance)
                .within("unet")?;
            Ok::<_, StageError>(predictions.into_iter())
        };
        let nothing = || StageError::from(Failure::new("unet: no prediction"));
        let Some(negative) = negative else {
            let out = predict(&[positive])?.next().ok_or_else(nothing)?;
            self.parts.check_unchanged()?;
            return Ok(out);
        };
        self.check_text(negative, positive)?;
        let (unguided, guided) = match self.options.guidance_in_turn {
            true => (predict(&[negative])?.next(), predict(&[positive])?.next()),
            false => {
                let mut both = predict(&[negative, positive])?;
                (both.next(), both.next())
            }
        };
        let (mut out, guided) = unguided.zip(guided).ok_or_else(nothing)?;
        self.parts.check_unchanged()?;
        for (out, guided) in out.iter_mut().zip(guided) {
            *out += guidance * (guided - *out);
        }
        Ok(out)
    }

    fn decode(&mut self, latents: &[f32], shape: LatentShape) -> Result<Image, StageError> {
        let _guard = tch::no_grad_guard();
        self.check(latents, shape)?;
        self.parts.bring(Part::Vae)?;
        let dims = [
            1,
            shape.channels as i64,
            shape.height as i64,
            shape.width as i64,
        ];
        let pixels = self
            .tensor(latents, &dims, self.vae_kind)
            .and_then(|latents| self.pixels(&latents))
            .within("vae")?;
        self.parts.check_unchanged()?;
        if self.parts.on_cpu() {
            memory::give_back();
        }
        let factor = self.info.pixels_per_latent as usize;
        let (height, width) = (factor * shape.height, factor * shape.width);
        let plane = height * width;
        let mut rgb = vec![0; 3 * plane];
        for (at, pixel) in rgb.chunks_exact_mut(3).enumerate() {
            for (channel, byte) in pixel.iter_mut().enumerate() {
                let value = (pixels[channel * plane + at] / 2.0 + 0.5).clamp(0.0, 1.0);
                *byte = (value * 255.0).round_ties_even() as u8;
            }
        }
        Ok(Image {
            width: width as u32,
            height: height as u32,
            rgb,
        })
    }

    fn encode_image(
        &mut self,
        image: &Image,
        mask: Option<&[u8]>,
        noise: &[f32],
    ) -> Result<Vec<f32>, StageError> {
        let _guard = tch::no_grad_guard();
        let multiple = self.info.size_multiple;
        let (width, height) = (image.width as usize, image.height as usize);
        let shape = self.info.latent_shape(image.width, image.height);
        let fits = image.width.is_multiple_of(multiple) && image.height.is_multiple_of(multiple);
        if !fits
            || shape.is_empty()
            || image.rgb.len() != 3 * width * height
            || noise.len() != shape.len()
            || mask.is_some_and(|mask| mask.len() != width * height)
        {
            return Err(StageError::Malformed(format!(
                "picture of {width}×{height} pixels in {} bytes with {} noise values: sides must be multiples of {multiple}",
                image.rgb.len(),
                noise.len()
            )));
        }
        let plane = width * height;
        let painted = |at: usize| {
            mask.and_then(|mask| mask.get(at))
                .is_some_and(|&x| x >= PAINTED)
        };
        let mut pixels = vec![0.0; 3 * plane];
        for (at, pixel) in image.rgb.chunks_exact(3).enumerate() {
            if painted(at) {
                continue;
            }
            for (channel, &byte) in pixel.iter().enumerate() {
                pixels[channel * plane + at] = f32::from(byte) / 255.0 * 2.0 - 1.0;
            }
        }
        let dims = [
            1,
            shape.channels as i64,
            shape.height as i64,
            shape.width as i64,
        ];
        self.parts.bring(Part::Vae)?;
        let encode = || {
            let picture =
                self.tensor(&pixels, &[1, 3, height as i64, width as i64], self.vae_kind)?;
            match self.parts.vae()? {
                Autoencoder::Full(vae) => {
                    vae.encode(&picture, &self.tensor(noise, &dims, self.vae_kind)?)
                }
                // It has no distribution to draw from.
                Autoencoder::Tiny(vae) => vae.encode(&picture),
            }
            .and_then(|latents| to_f32(&latents))
        };
        let latents = encode().within("vae")?;
        self.parts.check_unchanged()?;
        Ok(latents)
    }
}

/// Checks that the device computes with the type, with one small layer of each kind.
fn probe(device: tch::Device, kind: Kind) -> Outcome<()> {
    let ones = |shape: &[i64]| Tensor::f_ones(shape, (kind, device));
    let x = ones(&[1, 8, 8, 8])?;
    let x = x.f_conv2d(
        &ones(&[8, 8, 3, 3])?,
        Some(&ones(&[8])?),
        [1, 1],
        [1, 1],
        [1, 1],
        1,
    )?;
    let mut x = x.f_group_norm(2, None::<&Tensor>, None, 1e-5, true)?;
    let x = x.f_silu_()?.f_view([1, 8, 64])?;
    let x = x
        .f_linear(&ones(&[64, 64])?, None::<&Tensor>)?
        .f_unsqueeze(0)?;
    let _attended = Tensor::f_scaled_dot_product_attention(
        &x,
        &x,
        &x,
        None::<&Tensor>,
        0.0,
        false,
        None,
        false,
    )?;
    Ok(())
}

fn check_tokens(ids: &[[u32; 77]], vocab: u32) -> Result<(), StageError> {
    match ids.iter().flatten().find(|id| **id >= vocab) {
        None => Ok(()),
        Some(&token) => Err(StageError::NoSuchToken {
            token,
            vocab: vocab as usize,
        }),
    }
}

fn info(config: &PipelineConfig, options: &Options, kind: Kind, weight_bytes: u64) -> DiffuserInfo {
    let factor = config.vae.factor();
    let distilled = config.unet.guidance.is_some();
    let channels = u64::from(config.unet.blocks[0].channels);
    let width = kind.elt_size_in_bytes() as u64;
    let batch = if options.guidance_in_turn || distilled {
        1
    } else {
        2
    };
    // Measured with the shape of Stable Diffusion 1.5: a prediction takes about as much as 36 activations of the finest
    // resolution, the autoencoder as 6 of its own.
    let unet = 36 * batch * channels * width / u64::from(factor * factor);
    let vae = match options.tiny_vae {
        None => {
            6 * u64::from(config.vae.blocks[0])
                * width.max(if config.vae.force_f32 { 4 } else { 2 })
        }
        Some(_) => 4 * 64 * width,
    };
    DiffuserInfo {
        family: config.family.to_string(),
        default_size: config.default_size(),
        size_multiple: factor,
        min_size: SIDES.0.max(factor),
        max_size: SIDES.1,
        latent_channels: config.unet.channels as usize,
        pixels_per_latent: factor,
        colours: (config.vae.latent == 4).then(|| LatentColours::of(config.family)),
        inpaints: config.unet.inpaints(),
        sampler: config.sampler.clone(),
        default_sampler: if distilled {
            SamplerKind::Lcm
        } else {
            SamplerKind::DpmPlusPlus2M
        },
        default_steps: if distilled { 6 } else { 25 },
        default_guidance: match config.family {
            _ if distilled => 8.0,
            Family::Xl => 5.0,
            _ => 7.5,
        },
        weight_bytes,
        memory_base: 128 << 20,
        memory_per_pixel: unet.max(vae),
        memory_limit: options
            .memory_limit
            .map(|limit| limit.saturating_sub(weight_bytes)),
    }
}

#[cfg(test)]
mod tests;
