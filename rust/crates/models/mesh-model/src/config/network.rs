//! The shape of a network.

use super::architecture::Architecture;
use super::latent::LatentAttention;
use super::mixture::Mixture;
use super::rope::Rope;
use super::window::SlidingWindow;

/// Activation of the gate in a feed-forward layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Activation {
    /// `x / (1 + e^-x)`.
    Silu,
    /// GELU in its tanh form: `x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³)))`.
    GeluTanh,
    /// gpt-oss's, of gate and up: `(u + 1) · g / (1 + e^(-1.702 g))`, g the gate up to 7, u the up from -7 to 7.
    ClampedSwiglu,
}

/// The shape of a network.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Family of the network.
    pub architecture: Architecture,
    /// The model's own name, as the file gives it.
    pub name: Option<String>,
    /// Number of transformer layers.
    pub layers: u32,
    /// Width of a hidden row.
    pub hidden: usize,
    /// Query heads per layer.
    pub heads: usize,
    /// Key/value heads per layer; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head's query and key.
    pub head_dim: usize,
    /// Width of a head's value: that of its key, except with latent attention.
    pub value_dim: usize,
    /// Keys and values are products of one narrow row.
    pub latent: Option<LatentAttention>,
    /// Width of dense feed-forward layers.
    pub ffn: usize,
    /// The mixture of experts that takes the place of dense feed-forward layers, see
    /// [`ModelConfig::mixture_of`].
    pub mixture: Option<Mixture>,
    /// Number of rows of the embedding.
    pub vocab: usize,
    /// Maximum context that the model was trained for, in tokens.
    pub context: u32,
    /// Epsilon of the RMS norms.
    pub norm_eps: f32,
    /// Rotary position embedding; layers with a window may have another, see [`ModelConfig::rope_of`].
    pub rope: Rope,
    /// The layers that see only the last positions, if there are any.
    pub window: Option<SlidingWindow>,
    /// Attention scores are divided by the square root of this: the head's width, or what Hugging Face calls
    /// `query_pre_attn_scalar`.
    pub query_scalar: f32,
    /// Factor on the rows of the embedding at the input. It does not apply to the output matrix, even if that
    /// is the same tensor.
    pub embedding_scale: f32,
    /// Factor on the outputs of attention and feed-forward before they are added to the hidden row (Granite's
    /// `residual_multiplier`).
    pub residual_scale: f32,
    /// Logits are divided by this (Granite's `logits_scaling`).
    pub logit_divisor: f32,
    /// Added to every norm weight of the tensors: 0, or 1 where they are stored as the distance from 1
    /// (Gemma's safetensors; its GGUF files have the sum).
    pub norm_offset: f32,
    /// Outputs of attention and feed-forward are normed before they are added to the hidden row
    /// (`blk.N.post_attention_norm.weight`, `blk.N.post_ffw_norm.weight`).
    pub post_norms: bool,
    /// Activation of the feed-forward layers.
    pub activation: Activation,
    /// Query, key and value have biases (`blk.N.attn_q.bias` …).
    pub qkv_bias: bool,
    /// The output of attention has a bias (`blk.N.attn_output.bias`).
    pub output_bias: bool,
    /// Each query head has a score of no position in the sum of its weights (`blk.N.attn_sinks.weight`).
    pub attention_sinks: bool,
    /// Query and key heads are normed (`blk.N.attn_q_norm.weight` …).
    pub qk_norm: bool,
    /// These norms go over all heads of a row at once rather than over each head (OLMoE).
    pub qk_norm_over_heads: bool,
    /// The output matrix is the token embedding; there is no `output.weight`.
    pub tied_embeddings: bool,
}

impl ModelConfig {
    /// Number of positions that a row of `layer` sees, its own among them; `None` for all.
    pub fn window_of(&self, layer: u32) -> Option<u32> {
        let window = self.window.as_ref()?;
        window.has(layer).then_some(window.size)
    }

    /// The rotary embedding of `layer`.
    pub fn rope_of(&self, layer: u32) -> &Rope {
        match &self.window {
            Some(window) if window.has(layer) => &window.rope,
            _ => &self.rope,
        }
    }

    /// The mixture of experts of `layer`; `None` if the layer is dense.
    pub fn mixture_of(&self, layer: u32) -> Option<&Mixture> {
        let mixture = self.mixture.as_ref();
        mixture.filter(|mixture| layer >= mixture.leading_dense)
    }

    /// Name of the norm before the feed-forward half of a layer, after `blk.N.`.
    pub fn ffn_norm(&self) -> &'static str {
        match self.architecture {
            // What the folders call it; here, too, it comes before the feed-forward half.
            Architecture::GptOss => "post_attention_norm.weight",
            _ => "ffn_norm.weight",
        }
    }

    /// Widths of the norms of query and key.
    pub fn qk_norm_widths(&self) -> [usize; 2] {
        match self.qk_norm_over_heads {
            true => [self.heads, self.kv_heads].map(|heads| heads * self.head_dim),
            false => [self.head_dim; 2],
        }
    }

    /// Elements of a layer's KV cache for one token: the keys and values of all heads. With latent attention,
    /// too, they are stored as attention reads them.
    pub fn kv_elements(&self) -> usize {
        self.kv_heads * (self.head_dim + self.value_dim)
    }

    /// The square root of the width, in the precision that Gemma was trained with: bfloat16.
    pub fn gemma_embedding_scale(hidden: usize) -> f32 {
        half::bf16::from_f64((hidden as f64).sqrt()).to_f32()
    }

    /// Elements of all weights, by shape.
    pub fn parameters(&self) -> u64 {
        self.count(|mixture| mixture.experts)
    }

    /// Elements of the weights that compute one token: of a mixture only the experts that are used. The same
    /// as [`ModelConfig::parameters`] for a dense network.
    pub fn active_parameters(&self) -> u64 {
        self.count(|mixture| mixture.used)
    }

    fn count(&self, experts: impl Fn(&Mixture) -> usize) -> u64 {
        let hidden = self.hidden as u64;
        let q = (self.heads * self.head_dim) as u64;
        let kv = (self.kv_heads * self.head_dim) as u64;
        let norms = if self.post_norms { 4 } else { 2 };
        let mut layer = self.attention_parameters() + norms * hidden;
        if self.qkv_bias {
            layer += q + 2 * kv;
        }
        if self.output_bias {
            layer += hidden;
        }
        if self.attention_sinks {
            layer += self.heads as u64;
        }
        if self.qk_norm {
            let widths = self.qk_norm_widths();
            layer += widths.iter().sum::<usize>() as u64;
        }
        let feed_forward = |layer| match self.mixture_of(layer) {
            None => 3 * hidden * self.ffn as u64,
            Some(mixture) => {
                let (ffn, used) = (mixture.ffn as u64, experts(mixture) as u64);
                let (mut router, mut expert) = (hidden, 3 * hidden * ffn);
                if mixture.biases {
                    router += 1;
                    expert += hidden + 2 * ffn;
                }
                let shared = mixture.shared.map_or(0, |shared| {
                    3 * hidden * shared.ffn as u64 + if shared.gated { hidden } else { 0 }
                });
                router * mixture.experts as u64 + expert * used + shared
            }
        };
        let feed_forward: u64 = (0..self.layers).map(feed_forward).sum();
        let embeddings = if self.tied_embeddings { 1 } else { 2 };
        let ends = embeddings * self.vocab as u64 * hidden + hidden;
        u64::from(self.layers) * layer + feed_forward + ends
    }

    /// Elements of a layer's matrices for attention, and of the norms between them.
    fn attention_parameters(&self) -> u64 {
        let [hidden, heads, key, value, rotated] = [
            self.hidden,
            self.heads,
            self.head_dim,
            self.value_dim,
            self.rope.dim,
        ]
        .map(|n| n as u64);
        let output = heads * value * hidden;
        let Some(latent) = self.latent else {
            return hidden * (heads * key + self.kv_elements() as u64) + output;
        };
        let queries = match latent.query_rank.map(|rank| rank as u64) {
            None => hidden * heads * key,
            Some(rank) => hidden * rank + rank + rank * heads * key,
        };
        let rank = latent.rank as u64;
        let down = hidden * (rank + rotated) + rank;
        queries + down + rank * heads * (key - rotated + value) + output
    }
}
