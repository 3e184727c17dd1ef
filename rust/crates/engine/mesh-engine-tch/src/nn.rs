//! Layers that the networks share.

use tch::Tensor;

use crate::error::Outcome;
use crate::load::{Params, stack_name};
use crate::weight::{Weight, unlisted};

/// `x · weightᵀ + bias`.
#[derive(Debug)]
pub(crate) struct Linear {
    weight: Weight,
    bias: Option<Tensor>,
}

impl Linear {
    pub(crate) fn new(params: &mut Params, name: &str) -> Outcome<Self> {
        // A convolution of kernel 1 is a matrix.
        let weight = params.weight(&format!("{name}.weight"))?;
        let bias = params.maybe(&format!("{name}.bias"));
        Ok(Linear { weight, bias })
    }

    /// Several matrices over the same input as one, whose names end as one of the module's stacks.
    pub(crate) fn stacked(params: &mut Params, names: &[String]) -> Outcome<Self> {
        Linear::new(params, &stack_name(names))
    }

    /// True if it computes on a CPU.
    pub(crate) fn on_cpu(&self) -> bool {
        self.weight.on_cpu()
    }

    pub(crate) fn forward(&self, x: &Tensor) -> Outcome<Tensor> {
        Ok(x.f_linear(&self.weight.matrix()?, self.bias.as_ref())?)
    }
}

/// A convolution with a square kernel.
#[derive(Debug)]
pub(crate) struct Conv {
    weight: Weight,
    bias: Option<Tensor>,
    stride: i64,
    padding: i64,
}

impl Conv {
    /// A convolution that keeps the size.
    pub(crate) fn new(params: &mut Params, name: &str) -> Outcome<Self> {
        let weight = params.weight(&format!("{name}.weight"))?;
        let &[.., kernel] = weight.shape() else {
            return Err(unlisted(name));
        };
        Ok(Conv {
            padding: kernel / 2,
            weight,
            bias: params.maybe(&format!("{name}.bias")),
            stride: 1,
        })
    }

    /// One that halves the size. Without `padding` the input must have it on the right and below.
    pub(crate) fn halving(params: &mut Params, name: &str, padding: i64) -> Outcome<Self> {
        Ok(Conv {
            stride: 2,
            padding,
            ..Conv::new(params, name)?
        })
    }

    pub(crate) fn forward(&self, x: &Tensor) -> Outcome<Tensor> {
        let (stride, padding) = ([self.stride; 2], [self.padding; 2]);
        let weight = self.weight.get()?;
        Ok(x.f_conv2d(&weight, self.bias.as_ref(), stride, padding, [1, 1], 1)?)
    }
}

/// A norm over groups of channels.
#[derive(Debug)]
pub(crate) struct GroupNorm {
    weight: Tensor,
    bias: Tensor,
    groups: i64,
    eps: f64,
}

impl GroupNorm {
    pub(crate) fn new(params: &mut Params, name: &str, groups: u32, eps: f64) -> Outcome<Self> {
        Ok(GroupNorm {
            weight: params.take(&format!("{name}.weight"))?,
            bias: params.take(&format!("{name}.bias"))?,
            groups: groups.into(),
            eps,
        })
    }

    pub(crate) fn forward(&self, x: &Tensor) -> Outcome<Tensor> {
        Ok(x.f_group_norm(
            self.groups,
            Some(&self.weight),
            Some(&self.bias),
            self.eps,
            true,
        )?)
    }

    /// The norm and the activation behind it.
    pub(crate) fn silu(&self, x: &Tensor) -> Outcome<Tensor> {
        Ok(self.forward(x)?.f_silu_()?)
    }
}

/// A norm over the last dimension.
#[derive(Debug)]
pub(crate) struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl LayerNorm {
    pub(crate) fn new(params: &mut Params, name: &str, eps: f64) -> Outcome<Self> {
        Ok(LayerNorm {
            weight: params.take(&format!("{name}.weight"))?,
            bias: params.take(&format!("{name}.bias"))?,
            eps,
        })
    }

    pub(crate) fn forward(&self, x: &Tensor) -> Outcome<Tensor> {
        let width = self.weight.size();
        Ok(x.f_layer_norm(
            &*width,
            Some(&self.weight),
            Some(&self.bias),
            self.eps,
            true,
        )?)
    }
}

/// Attention with `heads` heads: `[batch, rows, width]` each, `key` and `value` with rows of their own.
pub(crate) fn attention(
    query: &Tensor,
    key: &Tensor,
    value: &Tensor,
    heads: i64,
    causal: bool,
) -> Outcome<Tensor> {
    let split = |x: &Tensor| -> Outcome<Tensor> {
        let (batch, rows, width) = x.size3()?;
        Ok(x.f_view([batch, rows, heads, width / heads])?
            .f_transpose(1, 2)?)
    };
    let (query, key, value) = (split(query)?, split(key)?, split(value)?);
    let none = None::<Tensor>;
    let out = Tensor::f_scaled_dot_product_attention(
        &query, &key, &value, none, 0.0, causal, None, false,
    )?;
    let (batch, heads, rows, width) = out.size4()?;
    Ok(out
        .f_transpose(1, 2)?
        .f_reshape([batch, rows, heads * width])?)
}

/// A number as an operand, which takes the type of the other one.
///
/// The forms of operations that take numbers themselves panic when they fail: `tch` 0.24 frees the number while libtorch's
/// error is still set.
pub(crate) fn number(value: f64) -> Outcome<Tensor> {
    Ok(Tensor::f_from_slice(&[value])?.f_squeeze()?)
}

/// A residual block: two convolutions, between them the timestep where there is one.
#[derive(Debug)]
pub(crate) struct Resnet {
    norm1: GroupNorm,
    conv1: Conv,
    time: Option<Linear>,
    norm2: GroupNorm,
    conv2: Conv,
    shortcut: Option<Conv>,
}

impl Resnet {
    pub(crate) fn new(params: &mut Params, name: &str, groups: u32, eps: f64) -> Outcome<Self> {
        let part = |part: &str| format!("{name}.{part}");
        let has = |params: &Params, part: &str| params.has(&format!("{name}.{part}.weight"));
        Ok(Resnet {
            norm1: GroupNorm::new(params, &part("norm1"), groups, eps)?,
            conv1: Conv::new(params, &part("conv1"))?,
            time: match has(params, "time_emb_proj") {
                true => Some(Linear::new(params, &part("time_emb_proj"))?),
                false => None,
            },
            norm2: GroupNorm::new(params, &part("norm2"), groups, eps)?,
            conv2: Conv::new(params, &part("conv2"))?,
            shortcut: match has(params, "conv_shortcut") {
                true => Some(Conv::new(params, &part("conv_shortcut"))?),
                false => None,
            },
        })
    }

    /// `x` is `[batch, channels, height, width]`, `time` the activated embedding `[batch or 1, width]`.
    pub(crate) fn forward(&self, x: &Tensor, time: Option<&Tensor>) -> Outcome<Tensor> {
        let mut hidden = self.conv1.forward(&self.norm1.silu(x)?)?;
        if let (Some(layer), Some(time)) = (&self.time, time) {
            let time = layer.forward(time)?.f_unsqueeze(-1)?.f_unsqueeze(-1)?;
            hidden = hidden.f_add_(&time)?;
        }
        hidden = self.norm2.silu(&hidden)?;
        hidden = self.conv2.forward(&hidden)?;
        match &self.shortcut {
            Some(shortcut) => Ok(hidden.f_add_(&shortcut.forward(x)?)?),
            None => Ok(hidden.f_add_(x)?),
        }
    }
}

/// Doubles height and width, each value four times; or to the size of `like`.
pub(crate) fn double(x: &Tensor, like: Option<&Tensor>) -> Outcome<Tensor> {
    let (_, _, height, width) = x.size4()?;
    let size = match like {
        Some(like) => like.size4().map(|(_, _, height, width)| [height, width])?,
        None => [2 * height, 2 * width],
    };
    Ok(x.f_upsample_nearest2d(size, None, None)?)
}
