//! CLIP's text encoder: a causal transformer over 77 tokens.

use mesh_diffusion::config::{Activation, HiddenRows, TextConfig};
use tch::{Device, Kind, Tensor};

use crate::error::{Outcome, Within};
use crate::load::{Params, Stack};
use crate::nn::{LayerNorm, Linear, attention, number};
use crate::weight::Weight;

/// Matrices that are computed as one.
pub(crate) const STACKS: [Stack; 1] =
    [&["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]];

/// A loaded text encoder.
#[derive(Debug)]
pub(crate) struct TextEncoder {
    config: TextConfig,
    tokens: Weight,
    positions: Weight,
    layers: Vec<Layer>,
    norm: LayerNorm,
    projection: Option<Linear>,
}

#[derive(Debug)]
struct Layer {
    norm1: LayerNorm,
    qkv: Linear,
    out: Linear,
    norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
}

/// Output of a text encoder.
pub(crate) struct Encoded {
    /// `[sequences, 77, width]`.
    pub(crate) hidden: Tensor,
    /// `[sequences, projection]`.
    pub(crate) pooled: Option<Tensor>,
}

impl TextEncoder {
    pub(crate) fn new(config: &TextConfig, params: &mut Params) -> Outcome<Self> {
        let embeddings = "text_model.embeddings";
        let layers = (0..config.layers).map(|i| {
            Layer::new(
                params,
                &format!("text_model.encoder.layers.{i}"),
                config.eps,
            )
        });
        Ok(TextEncoder {
            config: config.clone(),
            layers: layers.collect::<Outcome<_>>()?,
            tokens: params.weight(&format!("{embeddings}.token_embedding.weight"))?,
            positions: params.weight(&format!("{embeddings}.position_embedding.weight"))?,
            norm: LayerNorm::new(params, "text_model.final_layer_norm", config.eps)?,
            projection: match config.projection {
                Some(_) => Some(Linear::new(params, "text_projection")?),
                None => None,
            },
        })
    }

    pub(crate) fn config(&self) -> &TextConfig {
        &self.config
    }

    /// Encodes sequences of 77 tokens, which must be of the vocabulary.
    pub(crate) fn forward(&self, sequences: &[[u32; 77]]) -> Outcome<Encoded> {
        let ids: Vec<i64> = sequences.iter().flatten().map(|&id| id.into()).collect();
        let width = self.config.width.into();
        let embed = || -> Outcome<Tensor> {
            let mut tokens = self
                .tokens
                .rows(&ids)?
                .f_view([sequences.len() as i64, 77, width])?;
            Ok(tokens.f_add_(&self.positions.get()?)?)
        };
        let mut x = embed().within("embeddings")?;
        let penultimate = self.config.rows == HiddenRows::Penultimate;
        let mut hidden = None;
        for (i, layer) in self.layers.iter().enumerate() {
            let last = i + 1 == self.layers.len();
            if last && penultimate {
                hidden = Some(x.shallow_clone());
                if self.projection.is_none() {
                    break;
                }
            }
            x = layer
                .forward(&x, &self.config)
                .within(format_args!("layers.{i}"))?;
        }
        if let (Some(hidden), None) = (&hidden, &self.projection) {
            let hidden = hidden.shallow_clone();
            return Ok(Encoded {
                hidden,
                pooled: None,
            });
        }
        let normed = self.norm.forward(&x).within("final_layer_norm")?;
        let pooled = match &self.projection {
            Some(projection) => Some(
                self.pool(&normed, sequences, projection)
                    .within("text_projection")?,
            ),
            None => None,
        };
        let hidden = hidden.unwrap_or(normed);
        Ok(Encoded { hidden, pooled })
    }

    /// The projected row of each sequence's first end token.
    fn pool(
        &self,
        normed: &Tensor,
        sequences: &[[u32; 77]],
        projection: &Linear,
    ) -> Outcome<Tensor> {
        let mut rows = Vec::with_capacity(sequences.len());
        for (i, ids) in sequences.iter().enumerate() {
            let end = match self.config.end {
                // Files from before the key was right. The end is the highest token of CLIP's vocabulary.
                2 => ids.iter().max().copied().unwrap_or(0),
                end => end,
            };
            let at = ids.iter().position(|&id| id == end).unwrap_or(0);
            rows.push(normed.f_get(i as i64)?.f_get(at as i64)?);
        }
        projection.forward(&Tensor::f_stack(&rows, 0)?)
    }
}

impl Layer {
    fn new(params: &mut Params, name: &str, eps: f64) -> Outcome<Self> {
        let qkv = ["q", "k", "v"].map(|part| format!("{name}.self_attn.{part}_proj"));
        Ok(Layer {
            norm1: LayerNorm::new(params, &format!("{name}.layer_norm1"), eps)?,
            qkv: Linear::stacked(params, &qkv)?,
            out: Linear::new(params, &format!("{name}.self_attn.out_proj"))?,
            norm2: LayerNorm::new(params, &format!("{name}.layer_norm2"), eps)?,
            fc1: Linear::new(params, &format!("{name}.mlp.fc1"))?,
            fc2: Linear::new(params, &format!("{name}.mlp.fc2"))?,
        })
    }

    fn forward(&self, x: &Tensor, config: &TextConfig) -> Outcome<Tensor> {
        let qkv = self.qkv.forward(&self.norm1.forward(x)?)?.f_chunk(3, -1)?;
        let attended = attention(&qkv[0], &qkv[1], &qkv[2], config.heads.into(), true)?;
        let mut x = self.out.forward(&attended)?.f_add_(x)?;
        let hidden = self.fc1.forward(&self.norm2.forward(&x)?)?;
        let hidden = match config.activation {
            Activation::Gelu => hidden.f_gelu("none")?,
            Activation::QuickGelu => hidden
                .f_mul(&number(1.702)?)?
                .f_sigmoid_()?
                .f_mul_(&hidden)?,
        };
        Ok(x.f_add_(&self.fc2.forward(&hidden)?)?)
    }
}

/// Rows of a tensor as numbers.
pub(crate) fn to_f32(tensor: &Tensor) -> Outcome<Vec<f32>> {
    let tensor = tensor
        .f_to_kind(Kind::Float)?
        .f_to_device(Device::Cpu)?
        .f_contiguous()?;
    let mut out = vec![0.0; tensor.numel()];
    let count = out.len();
    tensor.f_copy_data(&mut out, count)?;
    Ok(out)
}
