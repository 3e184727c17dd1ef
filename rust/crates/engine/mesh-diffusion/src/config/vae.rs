//! Autoencoders between pictures and latents: `AutoencoderKL`, and the tiny `AutoencoderTiny` (TAESD).

use serde_json::json;

use super::object::Object;
use super::shapes::{Shapes, TensorShape};
use crate::checkpoint::ModelError;

/// Channels of a picture.
const PIXEL: u64 = 3;

/// Configuration of a variational autoencoder.
#[derive(Debug, Clone, PartialEq)]
pub struct VaeConfig {
    /// Channels of the latents.
    pub latent: u32,
    /// Channels of each resolution, the finest first; the decoder has the same.
    pub blocks: Vec<u32>,
    /// Residual blocks of each resolution of the encoder; one more in the decoder.
    pub layers: u32,
    /// Groups of the norms.
    pub groups: u32,
    /// Side of the pictures that the model was trained on, in pixels.
    pub sample_size: u32,
    /// Latents of the sampler are those of the encoder, minus `shift`, times this.
    pub scale: f64,
    /// See `scale`.
    pub shift: f64,
    /// True if a convolution follows the encoder and one precedes the decoder.
    pub quant: bool,
    /// True if the middle has attention.
    pub attention: bool,
    /// True if half precision overflows, as XL's does: it is computed in f32.
    pub force_f32: bool,
}

impl VaeConfig {
    /// Pixels per latent value, in each direction.
    pub fn factor(&self) -> u32 {
        1 << (self.blocks.len().max(1) - 1)
    }

    /// Reads a `config.json` of diffusers' `AutoencoderKL`.
    pub(super) fn read(object: &Object) -> Result<Self, ModelError> {
        object.only("_class_name", &json!("AutoencoderKL"))?;
        object.only("act_fn", &json!("silu"))?;
        for key in ["in_channels", "out_channels"] {
            object.whole_or(key, 3..=3, 3)?;
        }
        let blocks = object.wholes("block_out_channels", 1..=8, 1..=16384)?;
        for (key, name) in [
            ("down_block_types", "DownEncoderBlock2D"),
            ("up_block_types", "UpDecoderBlock2D"),
        ] {
            if object
                .texts(key, blocks.len())?
                .iter()
                .any(|found| *found != name)
            {
                return Err(object.refuse(key, format!("but only {name} is supported")));
            }
        }
        for key in ["latents_mean", "latents_std"] {
            object.absent(key)?;
        }
        let quant = object.flag_or("use_quant_conv", true)?;
        if object.flag_or("use_post_quant_conv", true)? != quant {
            return Err(object.refuse(
                "use_post_quant_conv",
                "but must be the same as use_quant_conv",
            ));
        }
        let config = VaeConfig {
            latent: object.whole_or("latent_channels", 1..=64, 4)?,
            layers: object.whole_or("layers_per_block", 1..=16, 1)?,
            groups: object.whole_or("norm_num_groups", 1..=1024, 32)?,
            sample_size: object.whole_or("sample_size", 1..=1 << 14, 512)?,
            scale: object.number_or("scaling_factor", 0.18215)?,
            shift: object.number_or("shift_factor", 0.0)?,
            quant,
            attention: object.flag_or("mid_block_add_attention", true)?,
            force_f32: object.flag_or("force_upcast", true)?,
            blocks,
        };
        if config.scale <= 0.0 {
            return Err(object.refuse("scaling_factor", "but must be over 0"));
        }
        object.check_groups(config.groups, &config.blocks)?;
        Ok(config)
    }

    /// Names and shapes of all tensors, as diffusers names them.
    pub fn tensors(&self) -> Vec<TensorShape> {
        let mut shapes = Shapes::default();
        let latent = u64::from(self.latent);
        let (first, last) = (
            u64::from(self.blocks[0]),
            u64::from(self.blocks[self.blocks.len() - 1]),
        );

        shapes.conv("encoder.conv_in", PIXEL, first, 3);
        let mut inputs = first;
        for (i, &channels) in self.blocks.iter().enumerate() {
            let channels = u64::from(channels);
            for j in 0..self.layers {
                shapes.resnet(
                    &format!("encoder.down_blocks.{i}.resnets.{j}"),
                    inputs,
                    channels,
                    None,
                );
                inputs = channels;
            }
            if i + 1 < self.blocks.len() {
                shapes.conv(
                    &format!("encoder.down_blocks.{i}.downsamplers.0.conv"),
                    channels,
                    channels,
                    3,
                );
            }
        }
        self.middle(&mut shapes, "encoder.mid_block", last);
        shapes.norm("encoder.conv_norm_out", last);
        // Mean and logarithm of the variance.
        shapes.conv("encoder.conv_out", last, 2 * latent, 3);

        shapes.conv("decoder.conv_in", latent, last, 3);
        self.middle(&mut shapes, "decoder.mid_block", last);
        inputs = last;
        for (i, &channels) in self.blocks.iter().rev().enumerate() {
            let channels = u64::from(channels);
            for j in 0..=self.layers {
                shapes.resnet(
                    &format!("decoder.up_blocks.{i}.resnets.{j}"),
                    inputs,
                    channels,
                    None,
                );
                inputs = channels;
            }
            if i + 1 < self.blocks.len() {
                shapes.conv(
                    &format!("decoder.up_blocks.{i}.upsamplers.0.conv"),
                    channels,
                    channels,
                    3,
                );
            }
        }
        shapes.norm("decoder.conv_norm_out", first);
        shapes.conv("decoder.conv_out", first, PIXEL, 3);

        if self.quant {
            shapes.conv("quant_conv", 2 * latent, 2 * latent, 1);
            shapes.conv("post_quant_conv", latent, latent, 1);
        }
        shapes.done()
    }

    fn middle(&self, shapes: &mut Shapes, name: &str, channels: u64) {
        shapes.resnet(&format!("{name}.resnets.0"), channels, channels, None);
        if self.attention {
            let attention = format!("{name}.attentions.0");
            shapes.norm(&format!("{attention}.group_norm"), channels);
            for matrix in ["to_q", "to_k", "to_v", "to_out.0"] {
                shapes.linear(&format!("{attention}.{matrix}"), channels, channels);
            }
        }
        shapes.resnet(&format!("{name}.resnets.1"), channels, channels, None);
    }
}

/// Configuration of a tiny autoencoder, which replaces a [`VaeConfig`]'s where speed counts more than detail.
#[derive(Debug, Clone, PartialEq)]
pub struct TinyVaeConfig {
    /// Channels of the latents.
    pub latent: u32,
    /// Channels inside.
    pub channels: u32,
    /// Residual blocks of each resolution of the encoder, the finest first.
    pub encoder: Vec<u32>,
    /// Residual blocks of each resolution of the decoder, the coarsest first.
    pub decoder: Vec<u32>,
    /// Latents of the sampler are those of the encoder times this.
    pub scale: f64,
}

impl TinyVaeConfig {
    /// Pixels per latent value, in each direction.
    pub fn factor(&self) -> u32 {
        1 << (self.decoder.len().max(1) - 1)
    }

    /// Reads a `config.json` of diffusers' `AutoencoderTiny`.
    pub(super) fn read(object: &Object) -> Result<Self, ModelError> {
        object.only("_class_name", &json!("AutoencoderTiny"))?;
        object.only("act_fn", &json!("relu"))?;
        object.only("upsample_fn", &json!("nearest"))?;
        object.whole_or("upsampling_scaling_factor", 2..=2, 2)?;
        for key in ["in_channels", "out_channels"] {
            object.whole_or(key, 3..=3, 3)?;
        }
        let channels = object.wholes("encoder_block_out_channels", 1..=8, 1..=4096)?;
        let resolutions = channels.len();
        let all: Vec<u32> = [
            &*channels,
            &object.wholes("decoder_block_out_channels", 1..=8, 1..=4096)?,
        ]
        .concat();
        if all.len() != 2 * resolutions || all.iter().any(|other| *other != channels[0]) {
            return Err(object.refuse(
                "decoder_block_out_channels",
                "but must have the same number of channels everywhere, as in encoder_block_out_channels",
            ));
        }
        let config = TinyVaeConfig {
            latent: object.whole_or("latent_channels", 1..=64, 4)?,
            channels: channels[0],
            encoder: object.wholes("num_encoder_blocks", resolutions..=resolutions, 0..=32)?,
            decoder: object.wholes("num_decoder_blocks", resolutions..=resolutions, 0..=32)?,
            scale: object.number_or("scaling_factor", 1.0)?,
        };
        match config.scale > 0.0 {
            true => Ok(config),
            false => Err(object.refuse("scaling_factor", "but must be over 0")),
        }
    }

    /// Names and shapes of all tensors, as diffusers names them.
    pub fn tensors(&self) -> Vec<TensorShape> {
        let mut shapes = Shapes::default();
        let (latent, channels) = (u64::from(self.latent), u64::from(self.channels));
        let block = |shapes: &mut Shapes, side: &str, at: &mut usize, count: u32| {
            for _ in 0..count {
                // The layers between are activations.
                for conv in [0, 2, 4] {
                    shapes.conv(
                        &format!("{side}.layers.{at}.conv.{conv}"),
                        channels,
                        channels,
                        3,
                    );
                }
                *at += 1;
            }
        };
        let mut at = 0;
        for (i, &count) in self.encoder.iter().enumerate() {
            let name = format!("encoder.layers.{at}");
            match i {
                0 => shapes.conv(&name, PIXEL, channels, 3),
                _ => shapes.conv_without_bias(&name, channels, channels, 3),
            }
            at += 1;
            block(&mut shapes, "encoder", &mut at, count);
        }
        shapes.conv(&format!("encoder.layers.{at}"), channels, latent, 3);

        shapes.conv("decoder.layers.0", latent, channels, 3);
        at = 2;
        for (i, &count) in self.decoder.iter().enumerate() {
            block(&mut shapes, "decoder", &mut at, count);
            if i + 1 == self.decoder.len() {
                shapes.conv(&format!("decoder.layers.{at}"), channels, PIXEL, 3);
            } else {
                // The layer before it doubles the resolution.
                shapes.conv_without_bias(
                    &format!("decoder.layers.{}", at + 1),
                    channels,
                    channels,
                    3,
                );
                at += 2;
            }
        }
        shapes.done()
    }
}
