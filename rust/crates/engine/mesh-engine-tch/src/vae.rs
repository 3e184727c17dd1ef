//! The variational autoencoder between pictures and latents.

use mesh_diffusion::config::VaeConfig;
use tch::Tensor;

use crate::error::{Outcome, Within};
use crate::load::{Params, Stack};
use crate::nn::{Conv, GroupNorm, Linear, Resnet, attention, double, number};

/// Added to variances by the norms.
const EPS: f64 = 1e-6;

/// Matrices that are computed as one.
pub(crate) const STACKS: [Stack; 1] = [&["to_q", "to_k", "to_v"]];

/// A loaded autoencoder.
#[derive(Debug)]
pub(crate) struct Vae {
    config: VaeConfig,
    encoder: Encoder,
    decoder: Decoder,
    quant: Option<(Conv, Conv)>,
}

#[derive(Debug)]
struct Encoder {
    conv_in: Conv,
    blocks: Vec<Block>,
    middle: Middle,
    norm_out: GroupNorm,
    conv_out: Conv,
}

#[derive(Debug)]
struct Decoder {
    conv_in: Conv,
    middle: Middle,
    blocks: Vec<Block>,
    norm_out: GroupNorm,
    conv_out: Conv,
}

#[derive(Debug)]
struct Block {
    resnets: Vec<Resnet>,
    resize: Option<Conv>,
}

#[derive(Debug)]
struct Middle {
    before: Resnet,
    attention: Option<Attention>,
    behind: Resnet,
}

#[derive(Debug)]
struct Attention {
    norm: GroupNorm,
    qkv: Linear,
    out: Linear,
}

impl Vae {
    pub(crate) fn new(config: &VaeConfig, params: &mut Params) -> Outcome<Self> {
        let groups = config.groups;
        let last = config.blocks.len() - 1;
        let resnets = |params: &mut Params, name: &str, count: u32| {
            let resnet = |j| Resnet::new(params, &format!("{name}.resnets.{j}"), groups, EPS);
            (0..count).map(resnet).collect::<Outcome<Vec<_>>>()
        };
        let mut down = Vec::new();
        let mut up = Vec::new();
        for i in 0..=last {
            let name = format!("encoder.down_blocks.{i}");
            down.push(Block {
                resnets: resnets(params, &name, config.layers)?,
                resize: match i < last {
                    true => Some(Conv::halving(
                        params,
                        &format!("{name}.downsamplers.0.conv"),
                        0,
                    )?),
                    false => None,
                },
            });
            let name = format!("decoder.up_blocks.{i}");
            up.push(Block {
                resnets: resnets(params, &name, config.layers + 1)?,
                resize: match i < last {
                    true => Some(Conv::new(params, &format!("{name}.upsamplers.0.conv"))?),
                    false => None,
                },
            });
        }
        Ok(Vae {
            encoder: Encoder {
                conv_in: Conv::new(params, "encoder.conv_in")?,
                blocks: down,
                middle: Middle::new(params, "encoder.mid_block", config)?,
                norm_out: GroupNorm::new(params, "encoder.conv_norm_out", groups, EPS)?,
                conv_out: Conv::new(params, "encoder.conv_out")?,
            },
            decoder: Decoder {
                conv_in: Conv::new(params, "decoder.conv_in")?,
                middle: Middle::new(params, "decoder.mid_block", config)?,
                blocks: up,
                norm_out: GroupNorm::new(params, "decoder.conv_norm_out", groups, EPS)?,
                conv_out: Conv::new(params, "decoder.conv_out")?,
            },
            quant: match config.quant {
                true => Some((
                    Conv::new(params, "quant_conv")?,
                    Conv::new(params, "post_quant_conv")?,
                )),
                false => None,
            },
            config: config.clone(),
        })
    }

    /// Pictures `[batch, 3, height, width]`, about -1 to 1, of the sampler's latents.
    pub(crate) fn decode(&self, latents: &Tensor) -> Outcome<Tensor> {
        let VaeConfig { scale, shift, .. } = self.config;
        let mut x = latents.f_div(&number(scale)?)?.f_add(&number(shift)?)?;
        if let Some((_, post)) = &self.quant {
            x = post.forward(&x).within("post_quant_conv")?;
        }
        self.decoder.forward(&x).within("decoder")
    }

    /// The sampler's latents of pictures `[batch, 3, height, width]` from -1 to 1: `mean + deviation · noise`.
    pub(crate) fn encode(&self, pictures: &Tensor, noise: &Tensor) -> Outcome<Tensor> {
        let mut x = self.encoder.forward(pictures).within("encoder")?;
        if let Some((quant, _)) = &self.quant {
            x = quant.forward(&x).within("quant_conv")?;
        }
        let parts = x.f_chunk(2, 1)?;
        let deviation = parts[1]
            .f_maximum(&number(-30.0)?)?
            .f_minimum(&number(20.0)?)?;
        let deviation = deviation.f_mul(&number(0.5)?)?.f_exp()?;
        let sample = parts[0].f_add(&deviation.f_mul(noise)?)?;
        let VaeConfig { scale, shift, .. } = self.config;
        Ok(sample.f_sub(&number(shift)?)?.f_mul(&number(scale)?)?)
    }
}

impl Encoder {
    fn forward(&self, pictures: &Tensor) -> Outcome<Tensor> {
        let mut x = self.conv_in.forward(pictures).within("conv_in")?;
        for (i, block) in self.blocks.iter().enumerate() {
            let name = format!("down_blocks.{i}");
            x = block.resnets(x).within(&name)?;
            if let Some(conv) = &block.resize {
                x = conv
                    .forward(&x.f_constant_pad_nd([0, 1, 0, 1])?)
                    .within(&name)?;
            }
        }
        x = self.middle.forward(x).within("mid_block")?;
        self.conv_out
            .forward(&self.norm_out.silu(&x)?)
            .within("conv_out")
    }
}

impl Decoder {
    fn forward(&self, latents: &Tensor) -> Outcome<Tensor> {
        let mut x = self.conv_in.forward(latents).within("conv_in")?;
        x = self.middle.forward(x).within("mid_block")?;
        for (i, block) in self.blocks.iter().enumerate() {
            let name = format!("up_blocks.{i}");
            x = block.resnets(x).within(&name)?;
            if let Some(conv) = &block.resize {
                x = double(&x, None)
                    .and_then(|x| conv.forward(&x))
                    .within(&name)?;
            }
        }
        self.conv_out
            .forward(&self.norm_out.silu(&x)?)
            .within("conv_out")
    }
}

impl Block {
    fn resnets(&self, mut x: Tensor) -> Outcome<Tensor> {
        for (j, resnet) in self.resnets.iter().enumerate() {
            x = resnet
                .forward(&x, None)
                .within(format_args!("resnets.{j}"))?;
        }
        Ok(x)
    }
}

impl Middle {
    fn new(params: &mut Params, name: &str, config: &VaeConfig) -> Outcome<Self> {
        Ok(Middle {
            before: Resnet::new(params, &format!("{name}.resnets.0"), config.groups, EPS)?,
            attention: match config.attention {
                true => Some(Attention::new(
                    params,
                    &format!("{name}.attentions.0"),
                    config.groups,
                )?),
                false => None,
            },
            behind: Resnet::new(params, &format!("{name}.resnets.1"), config.groups, EPS)?,
        })
    }

    fn forward(&self, x: Tensor) -> Outcome<Tensor> {
        let mut x = self.before.forward(&x, None).within("resnets.0")?;
        if let Some(attention) = &self.attention {
            x = attention.forward(&x).within("attentions.0")?;
        }
        self.behind.forward(&x, None).within("resnets.1")
    }
}

impl Attention {
    fn new(params: &mut Params, name: &str, groups: u32) -> Outcome<Self> {
        let part = |part: &str| format!("{name}.{part}");
        Ok(Attention {
            norm: GroupNorm::new(params, &part("group_norm"), groups, EPS)?,
            qkv: Linear::stacked(params, &["to_q", "to_k", "to_v"].map(part))?,
            out: Linear::new(params, &part("to_out.0"))?,
        })
    }

    fn forward(&self, x: &Tensor) -> Outcome<Tensor> {
        let (batch, channels, height, width) = x.size4()?;
        let rows = self.norm.forward(x)?.f_permute([0, 2, 3, 1])?.f_reshape([
            batch,
            height * width,
            channels,
        ])?;
        let qkv = self.qkv.forward(&rows)?.f_chunk(3, -1)?;
        let rows = self
            .out
            .forward(&attention(&qkv[0], &qkv[1], &qkv[2], 1, false)?)?;
        let mut picture = rows
            .f_view([batch, height, width, channels])?
            .f_permute([0, 3, 1, 2])?;
        Ok(picture.f_add_(x)?)
    }
}
