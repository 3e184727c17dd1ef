//! Configurations of a model's networks.
//!
//! They are read from the files of a folder in diffusers' form, or derived from the tensors of a single file. The engine
//! reads them and never asks for the family. Every number is bounded, so that nothing made from a configuration is larger than
//! a few times the largest known model; whether the tensors are really there is checked by [`crate::checkpoint`].

pub(crate) mod object;
mod shapes;
mod text;
mod unet;
mod vae;

use std::fmt;
use std::path::Path;

use serde_json::{Value, json};

pub use shapes::TensorShape;
pub use text::{Activation, HiddenRows, TextConfig};
pub use unet::{AddedConfig, UnetBlock, UnetConfig};
pub use vae::{TinyVaeConfig, VaeConfig};

use crate::checkpoint::ModelError;
use crate::sampler::SamplerConfig;
use object::Object;

/// A family of models, for people and for the defaults of requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Family {
    /// Stable Diffusion 1: 1.1 to 1.5.
    Sd1,
    /// Stable Diffusion 2 and 2.1.
    Sd2,
    /// Stable Diffusion XL.
    Xl,
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Family::Sd1 => "Stable Diffusion 1",
            Family::Sd2 => "Stable Diffusion 2",
            Family::Xl => "Stable Diffusion XL",
        })
    }
}

/// Configuration of a whole model.
#[derive(Debug, Clone, PartialEq)]
pub struct PipelineConfig {
    /// The family.
    pub family: Family,
    /// One text encoder, or two, whose hidden rows lie side by side.
    pub text: Vec<TextConfig>,
    /// The network that predicts the noise.
    pub unet: UnetConfig,
    /// The autoencoder.
    pub vae: VaeConfig,
    /// The noise schedule.
    pub sampler: SamplerConfig,
    /// True if an empty negative prompt is all zeros, as XL was trained.
    pub zero_empty_negative: bool,
}

impl PipelineConfig {
    /// Side of the pictures that the model was trained on, in pixels.
    pub fn default_size(&self) -> u32 {
        self.unet.sample_size * self.vae.factor()
    }

    /// Reads the configuration of the model in the folder at `root`, in diffusers' form.
    ///
    /// # Errors
    /// If a file is missing or malformed, or asks for something that is not supported.
    pub fn read(root: &Path) -> Result<Self, ModelError> {
        let index = Object::require(&root.join("model_index.json"))?;
        // A component is a pair of a library and a class; both are null for one that the model does without.
        let component = |key: &str| {
            let class = index.get(key).and_then(|pair| pair[1].as_str());
            class.is_some()
        };
        for (key, reason) in [
            ("text_encoder", "but a model of the family has one"),
            ("unet", "but only models with a UNet are supported"),
            ("vae", "but a model of the family has one"),
        ] {
            if !component(key) {
                return Err(index.refuse(key, reason));
            }
        }
        let two = component("text_encoder_2");
        let unet = UnetConfig::read(&Object::require(&root.join("unet/config.json"))?)?;
        let family = match (two, unet.linear_projection) {
            (true, _) => Family::Xl,
            (false, true) => Family::Sd2,
            (false, false) => Family::Sd1,
        };
        let mut text = Vec::new();
        for number in 0..if two { 2 } else { 1 } {
            text.push(read_text(root, number, two)?);
        }
        let scheduler = Object::open(&root.join("scheduler/scheduler_config.json"))?;
        let config = PipelineConfig {
            family,
            text,
            vae: VaeConfig::read(&Object::require(&root.join("vae/config.json"))?)?,
            sampler: match scheduler {
                Some(scheduler) => scheduler.parse()?,
                None => SamplerConfig::stable_diffusion(crate::sampler::Prediction::Epsilon),
            },
            zero_empty_negative: two && index.flag_or("force_zeros_for_empty_prompt", true)?,
            unet,
        };
        config.check(&index)?;
        Ok(config)
    }

    /// Reads the configuration of a tiny autoencoder in the folder at `root`.
    ///
    /// # Errors
    /// As [`PipelineConfig::read`].
    pub fn read_tiny_vae(root: &Path) -> Result<TinyVaeConfig, ModelError> {
        TinyVaeConfig::read(&Object::require(&root.join("config.json"))?)
    }

    /// Checks that the parts fit each other.
    fn check(&self, index: &Object) -> Result<(), ModelError> {
        if let Err((key, reason)) = self.consistent() {
            return Err(index.refuse(key, reason));
        }
        Ok(())
    }

    /// The part that does not fit the others, and why.
    pub(crate) fn consistent(&self) -> Result<(), (&'static str, String)> {
        let width: u32 = self.text.iter().map(|text| text.width).sum();
        if width != self.unet.context {
            let context = self.unet.context;
            return Err((
                "text_encoder",
                format!("but its hidden rows are {width} wide and the UNet wants {context}"),
            ));
        }
        if self.vae.latent != self.unet.channels {
            let (vae, unet) = (self.vae.latent, self.unet.channels);
            return Err((
                "vae",
                format!("but its latents have {vae} channels and the UNet wants {unet}"),
            ));
        }
        let pooled = self
            .text
            .last()
            .and_then(|text| text.projection)
            .unwrap_or(0);
        match self.unet.added.map(|added| added.pooled()) {
            Some(wanted) if wanted != pooled => Err((
                "text_encoder_2",
                format!("but its pooled rows are {pooled} wide and the UNet wants {wanted}"),
            )),
            _ => Ok(()),
        }
    }
}

fn read_text(root: &Path, number: usize, two: bool) -> Result<TextConfig, ModelError> {
    let suffix = ["", "_2"][number];
    let object = Object::require(&root.join(format!("text_encoder{suffix}/config.json")))?;
    let rows = if two {
        HiddenRows::Penultimate
    } else {
        HiddenRows::Last
    };
    let mut config = TextConfig::read(&object, rows)?;
    config.pad = read_pad(root, suffix)?;
    Ok(config)
}

/// The token of padding: `!`, which is 0, where the tokenizer's files say so.
fn read_pad(root: &Path, suffix: &str) -> Result<Option<u32>, ModelError> {
    let folder = root.join(format!("tokenizer{suffix}"));
    for name in ["special_tokens_map.json", "tokenizer_config.json"] {
        let Some(object) = Object::open(&folder.join(name))? else {
            continue;
        };
        let Some(token) = object.get("pad_token") else {
            continue;
        };
        let content = token.get("content").unwrap_or(token);
        return match content {
            Value::String(text) if text == "!" => Ok(Some(0)),
            end if *end == json!("<|endoftext|>") => Ok(None),
            _ => Err(object.refuse("pad_token", "but must be ! or <|endoftext|>")),
        };
    }
    Ok(None)
}
