//! The UNet: diffusers' `UNet2DConditionModel` as Stable Diffusion 1, 2 and XL use it.

use serde_json::{Value, json};

use super::object::Object;
use super::shapes::{Shapes, TensorShape};
use crate::checkpoint::ModelError;

/// Parts of XL's conditioning: the pooled text and six numbers about the picture's size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AddedConfig {
    /// Width of the embedding of each of the six numbers.
    pub number: u32,
    /// Width of all: the pooled text and the embeddings of the numbers.
    pub inputs: u32,
}

impl AddedConfig {
    /// Numbers about the picture's size: original height and width, top and left of the crop, target height and width.
    pub const NUMBERS: u32 = 6;

    /// Width of the pooled text.
    pub fn pooled(&self) -> u32 {
        self.inputs.saturating_sub(Self::NUMBERS * self.number)
    }
}

/// A resolution of the UNet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UnetBlock {
    /// Channels.
    pub channels: u32,
    /// Attention heads.
    pub heads: u32,
    /// Transformer layers behind each residual block; 0 is without attention.
    pub depth: u32,
}

/// Configuration of a UNet.
#[derive(Debug, Clone, PartialEq)]
pub struct UnetConfig {
    /// Channels of the latents.
    pub channels: u32,
    /// Channels that the network takes: those of the latents, or in models for inpainting also a mask and the latents of the
    /// masked picture.
    pub inputs: u32,
    /// Side of the latents that the model was trained on.
    pub sample_size: u32,
    /// Resolutions on the way down, the finest first; the way up has the same.
    pub blocks: Vec<UnetBlock>,
    /// Transformer layers in the middle.
    pub mid_depth: u32,
    /// Residual blocks of each resolution on the way down; one more on the way up.
    pub layers: u32,
    /// Width of the text encoders' hidden rows.
    pub context: u32,
    /// True if transformers begin and end with matrices, false if with convolutions of kernel 1.
    pub linear_projection: bool,
    /// Groups of the norms.
    pub groups: u32,
    /// Added to variances by the residual blocks' norms.
    pub eps: f64,
    /// Added to the frequencies' number in the timestep's embedding.
    pub freq_shift: f64,
    /// XL's conditioning.
    pub added: Option<AddedConfig>,
    /// Width of the embedding of the guidance, in models that were distilled with it.
    pub guidance: Option<u32>,
}

impl UnetConfig {
    /// True if the network takes a mask and the latents of the masked picture beside the latents.
    pub fn inpaints(&self) -> bool {
        self.inputs == 2 * self.channels + 1
    }

    /// Why the network's inputs are not supported, if so.
    pub(crate) fn refusal(&self) -> Option<String> {
        let UnetConfig {
            channels, inputs, ..
        } = *self;
        (inputs != channels && !self.inpaints()).then(|| {
            format!(
                "its UNet takes {inputs} channels and gives {channels}: {channels} are supported, and {} with a mask and a masked \
                 picture",
                2 * channels + 1
            )
        })
    }

    /// Width of the timestep's embedding behind its two matrices.
    pub fn time_width(&self) -> u32 {
        4 * self.blocks.first().map_or(0, |block| block.channels)
    }

    /// Reads a `config.json` of diffusers' `UNet2DConditionModel`.
    pub(super) fn read(object: &Object) -> Result<Self, ModelError> {
        refuse_variants(object)?;
        let channels = object.wholes("block_out_channels", 1..=8, 1..=16384)?;
        let count = channels.len();
        let attends = |key, with: &str, without: &str, missing: &str| {
            if object.get(key).is_none() {
                return Err(object.refuse(key, missing));
            }
            let names = object.texts(key, count)?;
            let attends = names.into_iter().map(|name| match name {
                name if name == with => Ok(true),
                name if name == without => Ok(false),
                _ => {
                    Err(object.refuse(key, format!("but only {with} and {without} are supported")))
                }
            });
            attends.collect::<Result<Vec<bool>, _>>()
        };
        let missing = "but must name a block for each of block_out_channels";
        let down = attends(
            "down_block_types",
            "CrossAttnDownBlock2D",
            "DownBlock2D",
            missing,
        )?;
        let mut up = attends("up_block_types", "CrossAttnUpBlock2D", "UpBlock2D", missing)?;
        up.reverse();
        if up != down {
            return Err(object.refuse("up_block_types", "but must mirror down_block_types"));
        }
        // The key is called a width, but all models of the three families have the number of heads in it.
        let heads = match object.get("num_attention_heads") {
            Some(_) => object.each("num_attention_heads", count, 1..=256, 8)?,
            None => object.each("attention_head_dim", count, 1..=256, 8)?,
        };
        let depths = object.each("transformer_layers_per_block", count, 1..=64, 1)?;
        let blocks: Vec<UnetBlock> = (0..count)
            .map(|i| UnetBlock {
                channels: channels[i],
                heads: heads[i],
                depth: if down[i] { depths[i] } else { 0 },
            })
            .collect();
        if blocks
            .iter()
            .any(|block| !block.channels.is_multiple_of(block.heads))
        {
            return Err(object.refuse(
                "attention_head_dim",
                "but each must divide its block_out_channels",
            ));
        }
        let config = UnetConfig {
            channels: object.whole_or("out_channels", 1..=64, 4)?,
            inputs: object.whole_or("in_channels", 1..=256, 4)?,
            sample_size: object.whole_or("sample_size", 1..=1024, 64)?,
            mid_depth: depths[count - 1],
            blocks,
            layers: object.whole_or("layers_per_block", 1..=16, 2)?,
            context: object.whole_or("cross_attention_dim", 1..=16384, 1280)?,
            linear_projection: object.flag_or("use_linear_projection", false)?,
            groups: object.whole_or("norm_num_groups", 1..=1024, 32)?,
            eps: object.number_or("norm_eps", 1e-5)?,
            freq_shift: object.number_or("freq_shift", 0.0)?,
            added: read_added(object)?,
            guidance: object.optional_whole("time_cond_proj_dim", 2..=4096)?,
        };
        if let Some(reason) = config.refusal() {
            return Err(object.refuse("in_channels", format!("but {reason}")));
        }
        object.check_groups(config.groups, &channels)?;
        Ok(config)
    }

    /// Names and shapes of all tensors, as diffusers names them.
    pub fn tensors(&self) -> Vec<TensorShape> {
        let mut shapes = Shapes::default();
        let time = u64::from(self.time_width());
        let first = u64::from(self.blocks[0].channels);
        shapes.conv("conv_in", self.inputs.into(), first, 3);
        shapes.linear("time_embedding.linear_1", first, time);
        shapes.linear("time_embedding.linear_2", time, time);
        if let Some(guidance) = self.guidance {
            shapes.matrix("time_embedding.cond_proj", guidance.into(), first);
        }
        if let Some(added) = self.added {
            shapes.linear("add_embedding.linear_1", added.inputs.into(), time);
            shapes.linear("add_embedding.linear_2", time, time);
        }
        let mut inputs = first;
        for (i, block) in self.blocks.iter().enumerate() {
            let channels = u64::from(block.channels);
            for j in 0..self.layers {
                shapes.resnet(
                    &format!("down_blocks.{i}.resnets.{j}"),
                    inputs,
                    channels,
                    Some(time),
                );
                self.transformer(
                    &mut shapes,
                    &format!("down_blocks.{i}.attentions.{j}"),
                    channels,
                    block.depth,
                );
                inputs = channels;
            }
            if i + 1 < self.blocks.len() {
                shapes.conv(
                    &format!("down_blocks.{i}.downsamplers.0.conv"),
                    channels,
                    channels,
                    3,
                );
            }
        }
        shapes.resnet("mid_block.resnets.0", inputs, inputs, Some(time));
        self.transformer(
            &mut shapes,
            "mid_block.attentions.0",
            inputs,
            self.mid_depth,
        );
        shapes.resnet("mid_block.resnets.1", inputs, inputs, Some(time));
        for (i, block) in self.blocks.iter().rev().enumerate() {
            let channels = u64::from(block.channels);
            // What the last residual block joins comes from the next finer resolution.
            let finer = self
                .blocks
                .iter()
                .rev()
                .nth(i + 1)
                .unwrap_or(&self.blocks[0]);
            for j in 0..=self.layers {
                let skip = if j == self.layers {
                    finer.channels.into()
                } else {
                    channels
                };
                shapes.resnet(
                    &format!("up_blocks.{i}.resnets.{j}"),
                    inputs + skip,
                    channels,
                    Some(time),
                );
                self.transformer(
                    &mut shapes,
                    &format!("up_blocks.{i}.attentions.{j}"),
                    channels,
                    block.depth,
                );
                inputs = channels;
            }
            if i + 1 < self.blocks.len() {
                shapes.conv(
                    &format!("up_blocks.{i}.upsamplers.0.conv"),
                    channels,
                    channels,
                    3,
                );
            }
        }
        shapes.norm("conv_norm_out", first);
        shapes.conv("conv_out", first, self.channels.into(), 3);
        shapes.done()
    }

    fn transformer(&self, shapes: &mut Shapes, name: &str, width: u64, depth: u32) {
        if depth == 0 {
            return;
        }
        shapes.norm(&format!("{name}.norm"), width);
        let project = |shapes: &mut Shapes, side: &str| match self.linear_projection {
            true => shapes.linear(&format!("{name}.{side}"), width, width),
            false => shapes.conv(&format!("{name}.{side}"), width, width, 1),
        };
        project(shapes, "proj_in");
        for layer in 0..depth {
            let layer = format!("{name}.transformer_blocks.{layer}");
            for (attention, norm, context) in [
                ("attn1", "norm1", width),
                ("attn2", "norm2", self.context.into()),
            ] {
                shapes.norm(&format!("{layer}.{norm}"), width);
                shapes.matrix(&format!("{layer}.{attention}.to_q"), width, width);
                shapes.matrix(&format!("{layer}.{attention}.to_k"), context, width);
                shapes.matrix(&format!("{layer}.{attention}.to_v"), context, width);
                shapes.linear(&format!("{layer}.{attention}.to_out.0"), width, width);
            }
            shapes.norm(&format!("{layer}.norm3"), width);
            // The first half is multiplied by the activated second half.
            shapes.linear(&format!("{layer}.ff.net.0.proj"), width, 8 * width);
            shapes.linear(&format!("{layer}.ff.net.2"), 4 * width, width);
        }
        project(shapes, "proj_out");
    }
}

/// Variants of the network that no model of the three families uses.
fn refuse_variants(object: &Object) -> Result<(), ModelError> {
    let only: [(&str, Value); 17] = [
        ("_class_name", json!("UNet2DConditionModel")),
        ("act_fn", json!("silu")),
        ("center_input_sample", json!(false)),
        ("class_embeddings_concat", json!(false)),
        ("conv_in_kernel", json!(3)),
        ("conv_out_kernel", json!(3)),
        ("downsample_padding", json!(1)),
        ("dual_cross_attention", json!(false)),
        ("flip_sin_to_cos", json!(true)),
        ("mid_block_scale_factor", json!(1)),
        ("mid_block_type", json!("UNetMidBlock2DCrossAttn")),
        ("only_cross_attention", json!(false)),
        ("resnet_out_scale_factor", json!(1)),
        ("resnet_skip_time_act", json!(false)),
        ("resnet_time_scale_shift", json!("default")),
        ("time_embedding_type", json!("positional")),
        ("attention_type", json!("default")),
    ];
    for (key, value) in &only {
        // 1 and 1.0 are the same.
        let same = object.get(key).and_then(Value::as_f64).zip(value.as_f64());
        if !same.is_some_and(|(found, only)| found == only) {
            object.only(key, value)?;
        }
    }
    let absent = [
        "class_embed_type",
        "cross_attention_norm",
        "encoder_hid_dim",
        "encoder_hid_dim_type",
        "num_class_embeds",
        "reverse_transformer_layers_per_block",
        "time_embedding_act_fn",
        "time_embedding_dim",
        "timestep_post_act",
    ];
    absent.iter().try_for_each(|key| object.absent(key))
}

fn read_added(object: &Object) -> Result<Option<AddedConfig>, ModelError> {
    match object.text("addition_embed_type")? {
        None => Ok(None),
        Some("text_time") => {
            let added = AddedConfig {
                number: object.whole("addition_time_embed_dim", 2..=4096)?,
                inputs: object.whole("projection_class_embeddings_input_dim", 1..=1 << 16)?,
            };
            match added.pooled() {
                0 => Err(object.refuse(
                    "projection_class_embeddings_input_dim",
                    "but must be more than six times addition_time_embed_dim",
                )),
                _ => Ok(Some(added)),
            }
        }
        Some(_) => Err(object.refuse("addition_embed_type", "but only text_time is supported")),
    }
}
