//! Single files in the layout of the original programs: configuration from the tensors' names and shapes.

use std::path::Path;

use mesh_model::safetensors::Safetensors;

use super::names::{Origin, single_open_clip, single_unet, single_vae};
use super::{Checkpoint, ModelError, Module, WeightFile, Weights};
use crate::config::{
    Activation, AddedConfig, Family, HiddenRows, PipelineConfig, TextConfig, UnetBlock, UnetConfig,
    VaeConfig,
};
use crate::sampler::{Prediction, SamplerConfig};

const UNET: &str = "model.diffusion_model.";
const VAE: &str = "first_stage_model.";
/// Text encoders of the families: CLIP's of 1, OpenCLIP's of 2, CLIP's and OpenCLIP's of XL.
const CLIP_1: &str = "cond_stage_model.transformer.";
const OPEN_CLIP_2: &str = "cond_stage_model.model.";
const CLIP_XL: &str = "conditioner.embedders.0.transformer.";
const OPEN_CLIP_XL: &str = "conditioner.embedders.1.model.";

/// Heads of all attention in Stable Diffusion 1.
const HEADS_1: u64 = 8;
/// Width of a head everywhere else.
const HEAD: u64 = 64;
/// Layers of a kind in a row: twice as many as the largest text encoder has.
const MAX_COUNT: u32 = 64;

pub(super) fn open(path: &Path) -> Result<Checkpoint, ModelError> {
    read(WeightFile::open(path.into())?)
}

pub(super) fn read(file: WeightFile) -> Result<Checkpoint, ModelError> {
    let path = &*file.path;
    let shapes = Shapes {
        path,
        file: &file.file,
    };
    let config = shapes.config()?;
    config
        .consistent()
        .map_err(|(part, reason)| shapes.unknown(format!("its {part} is there, {reason}")))?;

    let mut modules = Vec::new();
    let mut find = |module, tensors| {
        let file = WeightFile {
            path: path.into(),
            file: file.file.clone(),
        };
        let weights = Weights::find(vec![file], tensors, |name| origins(&config, module, name))?;
        modules.push((module, weights.into()));
        Ok::<_, ModelError>(())
    };
    for (text, module) in config
        .text
        .iter()
        .zip([Module::TextEncoder, Module::TextEncoder2])
    {
        find(module, text.tensors())?;
    }
    find(Module::Unet, config.unet.tensors())?;
    find(Module::Vae, config.vae.tensors())?;
    Ok(Checkpoint { config, modules })
}

/// Places of a module's tensor in a single file.
pub(crate) fn origins(config: &PipelineConfig, module: Module, name: &str) -> Vec<Origin> {
    let clip = |prefix: &str| Origin::plain(&format!("{prefix}{name}"));
    match (module, config.family) {
        (Module::TextEncoder, Family::Sd1) => clip(CLIP_1),
        (Module::TextEncoder, Family::Sd2) => single_open_clip(name, OPEN_CLIP_2),
        (Module::TextEncoder, Family::Xl) => clip(CLIP_XL),
        (Module::TextEncoder2, _) => single_open_clip(name, OPEN_CLIP_XL),
        (Module::Unet, _) => single_unet(name, &config.unet),
        (Module::Vae, _) => single_vae(name, config.vae.blocks.len()),
    }
}

/// The shapes of a file's tensors.
struct Shapes<'a> {
    path: &'a Path,
    file: &'a Safetensors,
}

impl Shapes<'_> {
    fn unknown(&self, reason: String) -> ModelError {
        let path = self.path.into();
        ModelError::Unknown { path, reason }
    }

    fn has(&self, name: &str) -> bool {
        self.file.tensor(name).is_some()
    }

    /// A dimension of a tensor that must be there, within what a configuration may have.
    fn dim(&self, name: &str, index: usize) -> Result<u32, ModelError> {
        let Some(view) = self.file.tensor(name) else {
            return Err(self.unknown(format!("it has no tensor {name}")));
        };
        let dim = view
            .shape
            .get(index)
            .copied()
            .filter(|dim| (1..=1 << 20).contains(dim));
        let dim = dim.and_then(|dim| u32::try_from(dim).ok());
        dim.ok_or_else(|| self.unknown(format!("tensor {name} has shape {:?}", view.shape)))
    }

    /// The count of consecutive numbers for which `name` exists.
    fn count(&self, name: impl Fn(u32) -> String) -> u32 {
        (0..MAX_COUNT).take_while(|&i| self.has(&name(i))).count() as u32
    }

    fn config(&self) -> Result<PipelineConfig, ModelError> {
        let family = self.family()?;
        let text = match family {
            Family::Sd1 => vec![self.clip(CLIP_1, HiddenRows::Last)?],
            Family::Sd2 => vec![self.open_clip(OPEN_CLIP_2, HiddenRows::Last)?],
            Family::Xl => vec![
                self.clip(CLIP_XL, HiddenRows::Penultimate)?,
                self.open_clip(OPEN_CLIP_XL, HiddenRows::Penultimate)?,
            ],
        };
        let pooled = text.last().and_then(|text| text.projection).unwrap_or(0);
        let unet = self.unet(family, pooled)?;
        let vae = self.vae(family)?;
        Ok(PipelineConfig {
            family,
            text,
            unet,
            vae,
            sampler: SamplerConfig::stable_diffusion(self.prediction(family)),
            zero_empty_negative: family == Family::Xl,
        })
    }

    fn family(&self) -> Result<Family, ModelError> {
        let starts = |prefix: &str| {
            self.file
                .tensors()
                .any(|tensor| tensor.name.starts_with(prefix))
        };
        if !starts(UNET) {
            let reason = "it has no tensors model.diffusion_model.*; give a whole checkpoint, not a part or an adapter";
            return Err(self.unknown(reason.into()));
        }
        match () {
            () if starts(CLIP_XL) && starts(OPEN_CLIP_XL) => Ok(Family::Xl),
            () if starts(OPEN_CLIP_2) => Ok(Family::Sd2),
            () if starts(CLIP_1) => Ok(Family::Sd1),
            () => Err(self.unknown("it has no text encoder of a known layout".into())),
        }
    }

    /// The predicted quantity, from the file's metadata or from a mark among its tensors. Stable Diffusion 2 is taken for the
    /// larger of its two models, as diffusers does.
    fn prediction(&self, family: Family) -> Prediction {
        let mut metadata = self.file.metadata();
        let named = metadata.find(|(key, _)| *key == "modelspec.prediction_type");
        match named.map(|(_, value)| value) {
            Some("v" | "v_prediction") => Prediction::VPrediction,
            Some("epsilon" | "eps") => Prediction::Epsilon,
            _ if self.has("v_pred") || family == Family::Sd2 => Prediction::VPrediction,
            _ => Prediction::Epsilon,
        }
    }

    fn clip(&self, prefix: &str, rows: HiddenRows) -> Result<TextConfig, ModelError> {
        let model = format!("{prefix}text_model");
        let tokens = format!("{model}.embeddings.token_embedding.weight");
        let width = self.dim(&tokens, 1)?;
        let vocab = self.dim(&tokens, 0)?;
        Ok(TextConfig {
            vocab,
            positions: self.dim(&format!("{model}.embeddings.position_embedding.weight"), 0)?,
            width,
            layers: self.layers(|i| format!("{model}.encoder.layers.{i}.layer_norm1.weight"))?,
            heads: self.heads(width)?,
            inner: self.dim(&format!("{model}.encoder.layers.0.mlp.fc1.weight"), 0)?,
            activation: Activation::QuickGelu,
            eps: 1e-5,
            end: vocab - 1,
            pad: None,
            projection: None,
            rows,
        })
    }

    fn open_clip(&self, prefix: &str, rows: HiddenRows) -> Result<TextConfig, ModelError> {
        let tokens = format!("{prefix}token_embedding.weight");
        let width = self.dim(&tokens, 1)?;
        let vocab = self.dim(&tokens, 0)?;
        let layers = self.layers(|i| format!("{prefix}transformer.resblocks.{i}.ln_1.weight"))?;
        let pooled = rows == HiddenRows::Penultimate;
        Ok(TextConfig {
            vocab,
            positions: self.dim(&format!("{prefix}positional_embedding"), 0)?,
            width,
            // Stable Diffusion 2 was trained without the last one.
            layers: if pooled { layers } else { (layers - 1).max(1) },
            heads: self.heads(width)?,
            inner: self.dim(
                &format!("{prefix}transformer.resblocks.0.mlp.c_fc.weight"),
                0,
            )?,
            activation: Activation::Gelu,
            eps: 1e-5,
            end: vocab - 1,
            pad: Some(0),
            projection: match pooled {
                true => Some(self.dim(&format!("{prefix}text_projection"), 1)?),
                false => None,
            },
            rows,
        })
    }

    fn layers(&self, name: impl Fn(u32) -> String) -> Result<u32, ModelError> {
        match self.count(&name) {
            0 => Err(self.unknown(format!("it has no tensor {}", name(0)))),
            layers => Ok(layers),
        }
    }

    /// Heads of 64 values each.
    fn heads(&self, width: u32) -> Result<u32, ModelError> {
        match u64::from(width).is_multiple_of(HEAD) {
            true => Ok(width / HEAD as u32),
            false => Err(self.unknown(format!(
                "attention over {width} values is not made of heads of {HEAD}"
            ))),
        }
    }

    fn unet(&self, family: Family, pooled: u32) -> Result<UnetConfig, ModelError> {
        let input = |at: u32, part: &str| format!("{UNET}input_blocks.{at}.{part}");
        let conv_in = input(0, "0.weight");
        let depth =
            |at: u32| self.count(|i| input(at, &format!("1.transformer_blocks.{i}.norm1.weight")));
        let mut blocks: Vec<UnetBlock> = Vec::new();
        let mut counts: Vec<u32> = vec![0];
        let mut at = 1;
        loop {
            if self.has(&input(at, "0.op.weight")) {
                counts.push(0);
            } else if self.has(&input(at, "0.in_layers.2.weight")) {
                let channels = self.dim(&input(at, "0.in_layers.2.weight"), 0)?;
                let heads = match family {
                    Family::Sd1 => HEADS_1 as u32,
                    _ => self.heads(channels)?,
                };
                let block = UnetBlock {
                    channels,
                    heads,
                    depth: depth(at),
                };
                let count = counts.last_mut().expect("it begins with one");
                match *count {
                    0 => blocks.push(block),
                    _ if blocks.last() == Some(&block) => {}
                    _ => {
                        return Err(self.unknown(format!(
                            "input block {at} of its UNet differs from the one before"
                        )));
                    }
                }
                *count += 1;
            } else {
                break;
            }
            at += 1;
        }
        let layers = counts[0];
        if layers == 0
            || layers > 16
            || blocks.len() > 8
            || counts.iter().any(|count| *count != layers)
        {
            return Err(self.unknown(format!(
                "its UNet has {counts:?} residual blocks by resolution"
            )));
        }
        let context = blocks
            .iter()
            .position(|block| block.depth > 0)
            .map(|i| 1 + i as u32 * (layers + 1));
        let Some(first) = context else {
            return Err(self.unknown("its UNet has no attention".into()));
        };
        let proj_in = input(first, "1.proj_in.weight");
        let label = format!("{UNET}label_emb.0.0.weight");
        let added = match self.has(&label) {
            false => None,
            true => {
                let inputs = self.dim(&label, 1)?;
                let number = inputs.saturating_sub(pooled) / AddedConfig::NUMBERS;
                Some(AddedConfig { number, inputs })
                    .filter(|added| added.pooled() == pooled && number > 1)
            }
        };
        let guidance = format!("{UNET}time_embed.cond_proj.weight");
        Ok(UnetConfig {
            channels: self.dim(&format!("{UNET}out.2.weight"), 0)?,
            inputs: self.dim(&conv_in, 1)?,
            sample_size: match family {
                Family::Sd1 => 64,
                Family::Sd2 if self.prediction(family) == Prediction::Epsilon => 64,
                Family::Sd2 => 96,
                Family::Xl => 128,
            },
            mid_depth: self
                .count(|i| format!("{UNET}middle_block.1.transformer_blocks.{i}.norm1.weight")),
            layers,
            context: self.dim(&input(first, "1.transformer_blocks.0.attn2.to_k.weight"), 1)?,
            linear_projection: self
                .file
                .tensor(&proj_in)
                .is_some_and(|tensor| tensor.shape.len() == 2),
            groups: 32,
            eps: 1e-5,
            freq_shift: 0.0,
            added,
            guidance: match self.has(&guidance) {
                true => Some(self.dim(&guidance, 1)?),
                false => None,
            },
            blocks,
        })
        .and_then(|config: UnetConfig| self.check_unet(config))
    }

    /// Refuses shapes that cannot be computed although every tensor is present.
    fn check_unet(&self, config: UnetConfig) -> Result<UnetConfig, ModelError> {
        if let Some(reason) = config.refusal() {
            return Err(self.unknown(reason));
        }
        let fits = |block: &UnetBlock| {
            block.channels.is_multiple_of(config.groups)
                && block.channels.is_multiple_of(block.heads)
        };
        match config.blocks.iter().find(|block| !fits(block)) {
            None => Ok(config),
            Some(block) => Err(self.unknown(format!(
                "its UNet has {} channels, not a multiple of 32",
                block.channels
            ))),
        }
    }

    fn vae(&self, family: Family) -> Result<VaeConfig, ModelError> {
        let block = |i: u32, j: u32| format!("{VAE}encoder.down.{i}.block.{j}.conv1.weight");
        let resolutions = self.count(|i| block(i, 0));
        if resolutions == 0 || resolutions > 8 {
            return Err(self.unknown(format!("its autoencoder has {resolutions} resolutions")));
        }
        let blocks: Result<Vec<u32>, _> = (0..resolutions)
            .map(|i| self.dim(&block(i, 0), 0))
            .collect();
        let blocks = blocks?;
        if let Some(channels) = blocks.iter().find(|channels| !channels.is_multiple_of(32)) {
            return Err(self.unknown(format!(
                "its autoencoder has {channels} channels, not a multiple of 32"
            )));
        }
        Ok(VaeConfig {
            latent: self.dim(&format!("{VAE}decoder.conv_in.weight"), 1)?,
            blocks,
            layers: self.count(|j| block(0, j)),
            groups: 32,
            sample_size: if family == Family::Xl { 1024 } else { 512 },
            scale: if family == Family::Xl {
                0.13025
            } else {
                0.18215
            },
            shift: 0.0,
            quant: self.has(&format!("{VAE}quant_conv.weight")),
            attention: self.has(&format!("{VAE}encoder.mid.attn_1.q.weight")),
            force_f32: true,
        })
    }
}
