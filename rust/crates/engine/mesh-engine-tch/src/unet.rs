//! The UNet: predicts the noise in latents.

use mesh_diffusion::config::UnetConfig;
use tch::{Device, Kind, Tensor};

use crate::error::{Outcome, Within};
use crate::load::{Params, Stack};
use crate::nn::{Conv, GroupNorm, LayerNorm, Linear, Resnet, attention, double, number};

/// Added to variances by the transformers' norms.
const NORM_EPS: f64 = 1e-6;
const LAYER_EPS: f64 = 1e-5;
/// The longest wave of a timestep's embedding has this many times the length of the shortest.
const MAX_PERIOD: f64 = 10000.0;

/// Rows that a CPU takes through the widest layers at once, which are eight times as wide as the rows.
const FEED_ROWS: i64 = 2048;

/// Matrices that are computed as one.
pub(crate) const STACKS: [Stack; 2] = [
    &["attn1.to_q", "attn1.to_k", "attn1.to_v"],
    &["attn2.to_k", "attn2.to_v"],
];

/// A loaded UNet.
#[derive(Debug)]
pub(crate) struct Unet {
    config: UnetConfig,
    device: Device,
    kind: Kind,
    conv_in: Conv,
    time: TwoLinears,
    guidance: Option<Linear>,
    added: Option<TwoLinears>,
    down: Vec<Block>,
    mid: [Resnet; 2],
    mid_attention: Option<Transformer>,
    up: Vec<Block>,
    norm_out: GroupNorm,
    conv_out: Conv,
}

/// A resolution on the way down or up.
#[derive(Debug)]
struct Block {
    layers: Vec<(Resnet, Option<Transformer>)>,
    /// Halves or doubles the size.
    resize: Option<Conv>,
}

#[derive(Debug)]
struct TwoLinears(Linear, Linear);

/// Conditions of the prediction.
pub(crate) struct Condition<'a> {
    pub(crate) timestep: f64,
    /// Hidden rows of the prompts `[batch, rows, width]`.
    pub(crate) context: &'a Tensor,
    /// XL's pooled rows `[batch, width]` and the picture's height and width in pixels.
    pub(crate) added: Option<(&'a Tensor, [i64; 2])>,
    /// The guidance, for models that were distilled with it.
    pub(crate) guidance: Option<f64>,
}

impl Unet {
    pub(crate) fn new(
        config: &UnetConfig,
        params: &mut Params,
        device: Device,
        kind: Kind,
    ) -> Outcome<Self> {
        let (groups, eps) = (config.groups, config.eps);
        let resnet = |params: &mut Params, name: &str| Resnet::new(params, name, groups, eps);
        let layers = |params: &mut Params, name: &str, count: u32, heads: u32, depth: u32| {
            let layer = |j| {
                let transformer = format!("{name}.attentions.{j}");
                let resnet = resnet(params, &format!("{name}.resnets.{j}"))?;
                Ok((
                    resnet,
                    Transformer::maybe(params, &transformer, config, heads, depth)?,
                ))
            };
            (0..count).map(layer).collect::<Outcome<Vec<_>>>()
        };
        let last = config.blocks.len() - 1;
        let mut down = Vec::new();
        for (i, block) in config.blocks.iter().enumerate() {
            let name = format!("down_blocks.{i}");
            down.push(Block {
                layers: layers(params, &name, config.layers, block.heads, block.depth)?,
                resize: match i < last {
                    true => Some(Conv::halving(
                        params,
                        &format!("{name}.downsamplers.0.conv"),
                        1,
                    )?),
                    false => None,
                },
            });
        }
        let mut up = Vec::new();
        for (i, block) in config.blocks.iter().rev().enumerate() {
            let name = format!("up_blocks.{i}");
            up.push(Block {
                layers: layers(params, &name, config.layers + 1, block.heads, block.depth)?,
                resize: match i < last {
                    true => Some(Conv::new(params, &format!("{name}.upsamplers.0.conv"))?),
                    false => None,
                },
            });
        }
        Ok(Unet {
            config: config.clone(),
            device,
            kind,
            conv_in: Conv::new(params, "conv_in")?,
            time: TwoLinears::new(params, "time_embedding")?,
            guidance: match config.guidance {
                Some(_) => Some(Linear::new(params, "time_embedding.cond_proj")?),
                None => None,
            },
            added: match config.added {
                Some(_) => Some(TwoLinears::new(params, "add_embedding")?),
                None => None,
            },
            down,
            mid: [
                resnet(params, "mid_block.resnets.0")?,
                resnet(params, "mid_block.resnets.1")?,
            ],
            mid_attention: {
                let name = "mid_block.attentions.0";
                Transformer::maybe(
                    params,
                    name,
                    config,
                    config.blocks[last].heads,
                    config.mid_depth,
                )?
            },
            up,
            norm_out: GroupNorm::new(params, "conv_norm_out", groups, eps)?,
            conv_out: Conv::new(params, "conv_out")?,
        })
    }

    /// The prediction for `latents`, `[batch, channels, height, width]`.
    pub(crate) fn forward(&self, latents: &Tensor, condition: &Condition<'_>) -> Outcome<Tensor> {
        let time = self.embed(condition).within("time_embedding")?;
        let context = condition.context;
        let mut x = self.conv_in.forward(latents).within("conv_in")?;
        let mut skips = vec![x.shallow_clone()];
        for (i, block) in self.down.iter().enumerate() {
            let name = format!("down_blocks.{i}");
            for (j, layer) in block.layers.iter().enumerate() {
                x = forward(layer, &x, &time, context)
                    .within(format_args!("{j}"))
                    .within(&name)?;
                skips.push(x.shallow_clone());
            }
            if let Some(conv) = &block.resize {
                x = conv.forward(&x).within("downsampler").within(&name)?;
                skips.push(x.shallow_clone());
            }
        }
        x = self.mid[0]
            .forward(&x, Some(&time))
            .within("mid_block.resnets.0")?;
        if let Some(transformer) = &self.mid_attention {
            x = transformer
                .forward(&x, context)
                .within("mid_block.attentions.0")?;
        }
        x = self.mid[1]
            .forward(&x, Some(&time))
            .within("mid_block.resnets.1")?;
        for (i, block) in self.up.iter().enumerate() {
            let name = format!("up_blocks.{i}");
            for (j, layer) in block.layers.iter().enumerate() {
                let skip = skips.pop().expect("there are as many on the way down");
                let joined = Tensor::f_cat(&[x, skip], 1).within(&name)?;
                x = forward(layer, &joined, &time, context)
                    .within(format_args!("{j}"))
                    .within(&name)?;
            }
            if let Some(conv) = &block.resize {
                x = double(&x, skips.last())
                    .and_then(|x| conv.forward(&x))
                    .within("upsampler")
                    .within(&name)?;
            }
        }
        let x = self.norm_out.silu(&x).within("conv_norm_out")?;
        self.conv_out.forward(&x).within("conv_out")
    }

    /// The activated embedding of the timestep and of what comes with it: `[batch or 1, width]`.
    fn embed(&self, condition: &Condition<'_>) -> Outcome<Tensor> {
        let width = self.config.blocks[0].channels.into();
        let timestep = [condition.timestep];
        let waves = waves(&timestep, width, self.config.freq_shift)?;
        let mut time = self.place(&waves)?;
        if let (Some(layer), Some(guidance)) = (&self.guidance, condition.guidance) {
            let width = self.config.guidance.unwrap_or(0).into();
            let guidance = self.place(&guidance_waves(guidance, width)?)?;
            time = time.f_add_(&layer.forward(&guidance)?)?;
        }
        let mut time = self.time.forward(&time)?;
        if let (Some(layers), Some(config), Some((pooled, size))) =
            (&self.added, self.config.added, condition.added)
        {
            let [height, width] = size.map(|side| side as f64);
            // The picture was not cropped, and nothing was scaled to its size.
            let numbers = [height, width, 0.0, 0.0, height, width];
            let numbers = waves_of(&numbers, config.number.into())?;
            let (batch, _) = pooled.size2()?;
            let numbers = self.place(&numbers)?.f_expand([batch, -1], false)?;
            let added = Tensor::f_cat(&[pooled, &numbers], 1)?;
            time = layers
                .forward(&added)
                .within("add_embedding")?
                .f_add_(&time)?;
        }
        Ok(time.f_silu_()?)
    }

    fn place(&self, x: &Tensor) -> Outcome<Tensor> {
        Ok(x.f_to_device(self.device)?.f_to_kind(self.kind)?)
    }
}

fn forward(
    layer: &(Resnet, Option<Transformer>),
    x: &Tensor,
    time: &Tensor,
    context: &Tensor,
) -> Outcome<Tensor> {
    let (resnet, transformer) = layer;
    let x = resnet.forward(x, Some(time)).within("resnet")?;
    match transformer {
        Some(transformer) => transformer.forward(&x, context).within("attention"),
        None => Ok(x),
    }
}

/// Cosines and sines of numbers, `[numbers, width]`: the embedding of timesteps in f32.
fn waves(numbers: &[f64], width: i64, shift: f64) -> Outcome<Tensor> {
    let half = width / 2;
    let exponents: Vec<f32> = (0..half).map(|i| i as f32).collect();
    let exponents = Tensor::f_from_slice(&exponents)?;
    let factor = -MAX_PERIOD.ln() / (half as f64 - shift);
    let frequencies = exponents.f_mul(&number(factor)?)?.f_exp()?;
    let numbers: Vec<f32> = numbers.iter().map(|&number| number as f32).collect();
    let angles = Tensor::f_from_slice(&numbers)?
        .f_unsqueeze(1)?
        .f_mul(&frequencies.f_unsqueeze(0)?)?;
    let mut waves = Tensor::f_cat(&[angles.f_cos()?, angles.f_sin()?], 1)?;
    if width % 2 == 1 {
        waves = waves.f_constant_pad_nd([0, 1])?;
    }
    Ok(waves)
}

/// The embeddings of several numbers in one row.
fn waves_of(numbers: &[f64], width: i64) -> Outcome<Tensor> {
    Ok(waves(numbers, width, 0.0)?.f_view([1, -1])?)
}

/// The embedding of a guidance, sines first: latent consistency models, <https://arxiv.org/abs/2310.04378>.
fn guidance_waves(guidance: f64, width: i64) -> Outcome<Tensor> {
    let waves = waves(&[1000.0 * (guidance - 1.0)], width, 1.0)?;
    let half = width / 2;
    let (cosines, sines) = (
        waves.f_narrow(1, 0, half)?,
        waves.f_narrow(1, half, width - half)?,
    );
    match width % 2 {
        0 => Ok(Tensor::f_cat(&[sines, cosines], 1)?),
        _ => {
            let sines = sines.f_narrow(1, 0, half)?;
            Ok(Tensor::f_cat(&[sines, cosines], 1)?.f_constant_pad_nd([0, 1])?)
        }
    }
}

impl TwoLinears {
    fn new(params: &mut Params, name: &str) -> Outcome<Self> {
        let layer =
            |params: &mut Params, number| Linear::new(params, &format!("{name}.linear_{number}"));
        Ok(TwoLinears(layer(params, 1)?, layer(params, 2)?))
    }

    fn forward(&self, x: &Tensor) -> Outcome<Tensor> {
        self.1.forward(&self.0.forward(x)?.f_silu_()?)
    }
}

/// Transformer layers over the positions of a picture.
#[derive(Debug)]
struct Transformer {
    norm: GroupNorm,
    proj_in: Linear,
    layers: Vec<TransformerLayer>,
    proj_out: Linear,
}

#[derive(Debug)]
struct TransformerLayer {
    heads: i64,
    norm1: LayerNorm,
    qkv: Linear,
    out1: Linear,
    norm2: LayerNorm,
    query: Linear,
    key_value: Linear,
    out2: Linear,
    norm3: LayerNorm,
    gated: Linear,
    out3: Linear,
}

impl Transformer {
    /// `None` for a depth of 0.
    fn maybe(
        params: &mut Params,
        name: &str,
        config: &UnetConfig,
        heads: u32,
        depth: u32,
    ) -> Outcome<Option<Self>> {
        if depth == 0 {
            return Ok(None);
        }
        let layer =
            |i| TransformerLayer::new(params, &format!("{name}.transformer_blocks.{i}"), heads);
        let layers = (0..depth).map(layer).collect::<Outcome<_>>()?;
        Ok(Some(Transformer {
            norm: GroupNorm::new(params, &format!("{name}.norm"), config.groups, NORM_EPS)?,
            proj_in: Linear::new(params, &format!("{name}.proj_in"))?,
            layers,
            proj_out: Linear::new(params, &format!("{name}.proj_out"))?,
        }))
    }

    fn forward(&self, x: &Tensor, context: &Tensor) -> Outcome<Tensor> {
        let (batch, channels, height, width) = x.size4()?;
        // With channels innermost these are views.
        let rows = self.norm.forward(x)?.f_permute([0, 2, 3, 1])?.f_reshape([
            batch,
            height * width,
            channels,
        ])?;
        let mut rows = self.proj_in.forward(&rows)?;
        for (i, layer) in self.layers.iter().enumerate() {
            rows = layer
                .forward(rows, context)
                .within(format_args!("transformer_blocks.{i}"))?;
        }
        let rows = self.proj_out.forward(&rows)?;
        let mut picture = rows
            .f_view([batch, height, width, channels])?
            .f_permute([0, 3, 1, 2])?;
        Ok(picture.f_add_(x)?)
    }
}

impl TransformerLayer {
    fn new(params: &mut Params, name: &str, heads: u32) -> Outcome<Self> {
        let part = |part: &str| format!("{name}.{part}");
        let norm = |params: &mut Params, number| {
            LayerNorm::new(params, &format!("{name}.norm{number}"), LAYER_EPS)
        };
        Ok(TransformerLayer {
            heads: heads.into(),
            norm1: norm(params, 1)?,
            qkv: Linear::stacked(
                params,
                &["attn1.to_q", "attn1.to_k", "attn1.to_v"].map(part),
            )?,
            out1: Linear::new(params, &part("attn1.to_out.0"))?,
            norm2: norm(params, 2)?,
            query: Linear::new(params, &part("attn2.to_q"))?,
            key_value: Linear::stacked(params, &["attn2.to_k", "attn2.to_v"].map(part))?,
            out2: Linear::new(params, &part("attn2.to_out.0"))?,
            norm3: norm(params, 3)?,
            gated: Linear::new(params, &part("ff.net.0.proj"))?,
            out3: Linear::new(params, &part("ff.net.2"))?,
        })
    }

    fn forward(&self, mut x: Tensor, context: &Tensor) -> Outcome<Tensor> {
        let qkv = self.qkv.forward(&self.norm1.forward(&x)?)?.f_chunk(3, -1)?;
        let attended = attention(&qkv[0], &qkv[1], &qkv[2], self.heads, false)?;
        drop(qkv);
        x = x.f_add_(&self.out1.forward(&attended)?)?;

        let query = self.query.forward(&self.norm2.forward(&x)?)?;
        let key_value = self.key_value.forward(context)?.f_chunk(2, -1)?;
        let attended = attention(&query, &key_value[0], &key_value[1], self.heads, false)?;
        x = x.f_add_(&self.out2.forward(&attended)?)?;

        let (batch, rows, width) = x.size3()?;
        let rows = batch * rows;
        let flat = x.f_view([rows, width])?;
        let step = match self.gated.on_cpu() {
            true => FEED_ROWS,
            false => rows.max(1),
        };
        for at in (0..rows).step_by(step as usize) {
            let mut part = flat.f_narrow(0, at, step.min(rows - at))?;
            let gated = self.gated.forward(&self.norm3.forward(&part)?)?;
            let halves = gated.f_chunk(2, -1)?;
            let hidden = halves[1].f_gelu("none")?.f_mul_(&halves[0])?;
            drop((gated, halves));
            let _same = part.f_add_(&self.out3.forward(&hidden)?)?;
        }
        Ok(x)
    }
}
