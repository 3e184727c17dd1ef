//! Text encoders: CLIP's in the form of transformers, and OpenCLIP's.

use super::object::Object;
use super::shapes::{Shapes, TensorShape};
use crate::checkpoint::ModelError;

/// Activation of a text encoder's feed-forward layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x · sigmoid(1.702 · x)`: CLIP's.
    QuickGelu,
    /// `x · Φ(x)`: OpenCLIP's.
    Gelu,
}

/// The hidden rows that a text encoder gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HiddenRows {
    /// Those of the last layer, normed: Stable Diffusion 1 and 2.
    Last,
    /// Those before the last layer, not normed: Stable Diffusion XL.
    Penultimate,
}

/// Configuration of a text encoder: a causal transformer with learned positions.
#[derive(Debug, Clone, PartialEq)]
pub struct TextConfig {
    /// Tokens of the vocabulary.
    pub vocab: u32,
    /// Tokens of a sequence: 77.
    pub positions: u32,
    /// Width of a hidden row.
    pub width: u32,
    /// Layers.
    pub layers: u32,
    /// Attention heads.
    pub heads: u32,
    /// Width of the feed-forward layers.
    pub inner: u32,
    /// Activation of the feed-forward layers.
    pub activation: Activation,
    /// Added to variances by the norms.
    pub eps: f64,
    /// The token at whose first place the pooled row is taken. With 2, which old files have by mistake, it is the
    /// place of the highest token.
    pub end: u32,
    /// Token of the places behind the end; `None` repeats the end.
    pub pad: Option<u32>,
    /// Width of the pooled projection; `None` is without.
    pub projection: Option<u32>,
    /// The hidden rows that condition the picture.
    pub rows: HiddenRows,
}

impl TextConfig {
    /// Reads a `config.json` of transformers' `CLIPTextModel` or `CLIPTextModelWithProjection`.
    pub(super) fn read(object: &Object, rows: HiddenRows) -> Result<Self, ModelError> {
        let projects = match object
            .get("architectures")
            .and_then(|list| list[0].as_str())
        {
            Some("CLIPTextModelWithProjection") => true,
            Some("CLIPTextModel") | None => false,
            Some(_) => {
                return Err(object.refuse(
                    "architectures",
                    "but must be CLIPTextModel or CLIPTextModelWithProjection",
                ));
            }
        };
        let config = TextConfig {
            vocab: object.whole_or("vocab_size", 2..=1 << 20, 49408)?,
            positions: object.whole_or("max_position_embeddings", 77..=77, 77)?,
            width: object.whole_or("hidden_size", 1..=8192, 512)?,
            layers: object.whole_or("num_hidden_layers", 1..=128, 12)?,
            heads: object.whole_or("num_attention_heads", 1..=256, 8)?,
            inner: object.whole_or("intermediate_size", 1..=1 << 16, 2048)?,
            activation: match object.text("hidden_act")? {
                Some("quick_gelu") | None => Activation::QuickGelu,
                Some("gelu") => Activation::Gelu,
                Some(_) => {
                    return Err(object.refuse("hidden_act", "but must be quick_gelu or gelu"));
                }
            },
            eps: object.number_or("layer_norm_eps", 1e-5)?,
            end: object.whole_or("eos_token_id", 0..=1 << 20, 49407)?,
            pad: None,
            projection: match projects {
                true => Some(object.whole_or("projection_dim", 1..=8192, 512)?),
                false => None,
            },
            rows,
        };
        match config.width.is_multiple_of(config.heads) {
            true => Ok(config),
            false => Err(object.refuse(
                "num_attention_heads",
                format!("but must divide hidden_size, {}", config.width),
            )),
        }
    }

    /// Names and shapes of all tensors, as transformers names them.
    pub fn tensors(&self) -> Vec<TensorShape> {
        let (width, inner) = (u64::from(self.width), u64::from(self.inner));
        let mut shapes = Shapes::default();
        let embeddings = "text_model.embeddings";
        shapes.add(
            format!("{embeddings}.token_embedding.weight"),
            &[self.vocab.into(), width],
        );
        shapes.add(
            format!("{embeddings}.position_embedding.weight"),
            &[self.positions.into(), width],
        );
        for layer in 0..self.layers {
            let layer = format!("text_model.encoder.layers.{layer}");
            shapes.norm(&format!("{layer}.layer_norm1"), width);
            for projection in ["q_proj", "k_proj", "v_proj", "out_proj"] {
                shapes.linear(&format!("{layer}.self_attn.{projection}"), width, width);
            }
            shapes.norm(&format!("{layer}.layer_norm2"), width);
            shapes.linear(&format!("{layer}.mlp.fc1"), width, inner);
            shapes.linear(&format!("{layer}.mlp.fc2"), inner, width);
        }
        shapes.norm("text_model.final_layer_norm", width);
        if let Some(projection) = self.projection {
            shapes.add("text_projection.weight".into(), &[projection.into(), width]);
        }
        shapes.done()
    }
}
