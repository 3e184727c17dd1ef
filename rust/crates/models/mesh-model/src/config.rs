//! The shape of a network, read from a checkpoint's keys and checked against its tensors.

mod rope;
mod shapes;
mod window;

use crate::checkpoint::Checkpoint;
use crate::gguf::{GgufError, Value};

pub use crate::checkpoint::RopeStyle;
pub use rope::{Rope, RopeScaling};
pub use window::SlidingWindow;

/// A family of networks that the engines can run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Architecture {
    /// Llama 1 to 3, SmolLM2, TinyLlama, Mistral.
    Llama,
    /// Qwen2 and Qwen2.5: biases on query, key and value.
    Qwen2,
    /// Qwen3: norms on query and key.
    Qwen3,
    /// Gemma 3, text only: most layers see a window only, norms before and after each half layer.
    Gemma3,
}

impl Architecture {
    /// The name in `general.architecture` and before the architecture's own keys.
    pub fn name(self) -> &'static str {
        match self {
            Architecture::Llama => "llama",
            Architecture::Qwen2 => "qwen2",
            Architecture::Qwen3 => "qwen3",
            Architecture::Gemma3 => "gemma3",
        }
    }

    /// All families that the engines can run.
    pub const ALL: [Architecture; 4] = [
        Architecture::Llama,
        Architecture::Qwen2,
        Architecture::Qwen3,
        Architecture::Gemma3,
    ];

    fn from_name(name: &str) -> Option<Self> {
        Architecture::ALL
            .into_iter()
            .find(|architecture| architecture.name() == name)
    }
}

/// Activation of the gate in a feed-forward layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Activation {
    /// `x / (1 + e^-x)`.
    Silu,
    /// GELU in its tanh form: `x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³)))`.
    GeluTanh,
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
    /// Width of one head.
    pub head_dim: usize,
    /// Width of the feed-forward layer.
    pub ffn: usize,
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
    /// Added to every norm weight of the tensors: 0, or 1 where they are stored as the distance from 1 (Gemma's safetensors;
    /// its GGUF files have the sum).
    pub norm_offset: f32,
    /// Outputs of attention and feed-forward are normed before they are added to the hidden row
    /// (`blk.N.post_attention_norm.weight`, `blk.N.post_ffw_norm.weight`).
    pub post_norms: bool,
    /// Activation of the feed-forward layers.
    pub activation: Activation,
    /// Query, key and value have biases (`blk.N.attn_q.bias` …).
    pub qkv_bias: bool,
    /// Query and key heads are normed (`blk.N.attn_q_norm.weight` …).
    pub qk_norm: bool,
    /// The output matrix is the token embedding; there is no `output.weight`.
    pub tied_embeddings: bool,
}

/// Errors of a network's configuration.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// A key or tensor is missing or of the wrong type.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// A network of another family.
    #[error(
        "architecture {found:?} is not supported: use a model of llama, qwen2, qwen3 or gemma3"
    )]
    Architecture {
        /// Architecture in the file.
        found: String,
    },
    /// A number that no network has.
    #[error("metadata {key:?} is {value}: {reason}")]
    Value {
        /// Name of the key.
        key: String,
        /// Value of the key.
        value: String,
        /// Rule that the value breaks.
        reason: String,
    },
    /// A tensor of a shape that contradicts the metadata.
    #[error(
        "tensor {tensor:?} has dimensions {found:?}, but the metadata asks for {wanted:?}: the file contradicts itself, \
         convert the model again"
    )]
    Shape {
        /// Name of the tensor.
        tensor: String,
        /// Dimensions in the file.
        found: Vec<u64>,
        /// Dimensions according to the metadata.
        wanted: Vec<u64>,
    },
    /// A tensor that the engines would ignore, so that the result would differ from the model's.
    #[error(
        "tensor {tensor:?} has no place in a {architecture} network: this variant of it is not supported"
    )]
    UnexpectedTensor {
        /// Name of the tensor.
        tensor: String,
        /// Name of the family.
        architecture: &'static str,
    },
    /// A feature that the engines do not have.
    #[error("the model needs {feature}, which is not supported: choose another model")]
    Unsupported {
        /// Description of the feature.
        feature: String,
    },
}

/// Limits far above real models, that keep products of two of them well within a `u64` and an allocation honest.
pub(crate) const MAX_LAYERS: u64 = 1 << 12;
pub(crate) const MAX_WIDTH: u64 = 1 << 20;
pub(crate) const MAX_VOCAB: u64 = 1 << 24;
pub(crate) const MAX_CONTEXT: u64 = 1 << 27;

impl ModelConfig {
    /// Reads the shape and checks every tensor against it.
    ///
    /// # Errors
    /// If a key or tensor is missing, contradicts another, or asks for what the engines do not have.
    pub fn read(checkpoint: &dyn Checkpoint) -> Result<Self, ConfigError> {
        let name = checkpoint.require_string("general.architecture")?;
        let architecture = Architecture::from_name(name)
            .ok_or_else(|| ConfigError::Architecture { found: name.into() })?;
        let keys = Keys {
            checkpoint,
            architecture,
        };
        keys.refuse_experts()?;
        keys.refuse_softcapping()?;

        let layers = keys.count("block_count", MAX_LAYERS)?;
        let hidden = keys.count("embedding_length", MAX_WIDTH)? as usize;
        let heads = keys.count("attention.head_count", MAX_WIDTH)? as usize;
        let kv_heads = keys
            .optional_count("attention.head_count_kv", MAX_WIDTH)?
            .map_or(heads, |n| n as usize);
        if !heads.is_multiple_of(kv_heads) {
            return Err(keys.bad(
                "attention.head_count_kv",
                kv_heads,
                format!("it must divide the {heads} query heads"),
            ));
        }
        let head_dim = keys.head_dim(hidden, heads)?;
        let embedding = checkpoint.require_tensor("token_embd.weight")?;
        let rope = Rope::from_keys(&keys, head_dim)?;
        let gemma = architecture == Architecture::Gemma3;
        let tensors = checkpoint.tensors();
        let config = ModelConfig {
            architecture,
            name: checkpoint.string("general.name")?.map(str::to_owned),
            layers: layers as u32,
            hidden,
            heads,
            kv_heads,
            head_dim,
            ffn: keys.count("feed_forward_length", MAX_WIDTH)? as usize,
            vocab: keys.vocab(embedding.dims.get(1).copied().unwrap_or(0))?,
            context: keys.count("context_length", MAX_CONTEXT)? as u32,
            norm_eps: keys.norm_eps()?,
            window: SlidingWindow::from_keys(&keys, layers as u32, &rope)?,
            rope,
            query_scalar: keys.query_scalar(layers, hidden, heads, head_dim)?,
            embedding_scale: match gemma {
                true => ModelConfig::gemma_embedding_scale(hidden),
                false => 1.0,
            },
            norm_offset: match gemma {
                true => checkpoint.norm_offset(),
                false => 0.0,
            },
            post_norms: gemma,
            activation: match gemma {
                true => Activation::GeluTanh,
                false => Activation::Silu,
            },
            qkv_bias: tensors.get("blk.0.attn_q.bias").is_some(),
            qk_norm: tensors.get("blk.0.attn_q_norm.weight").is_some(),
            tied_embeddings: tensors.get("output.weight").is_none(),
        };
        shapes::check(&config, checkpoint)?;
        Ok(config)
    }

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

    /// The square root of the width, in the precision that Gemma was trained with: bfloat16.
    pub fn gemma_embedding_scale(hidden: usize) -> f32 {
        half::bf16::from_f64((hidden as f64).sqrt()).to_f32()
    }

    /// Elements of all weights, by shape.
    pub fn parameters(&self) -> u64 {
        let (hidden, ffn) = (self.hidden as u64, self.ffn as u64);
        let q = (self.heads * self.head_dim) as u64;
        let kv = (self.kv_heads * self.head_dim) as u64;
        let norms = if self.post_norms { 4 } else { 2 };
        let mut layer = hidden * (2 * q + 2 * kv) + 3 * hidden * ffn + norms * hidden;
        if self.qkv_bias {
            layer += q + 2 * kv;
        }
        if self.qk_norm {
            layer += 2 * self.head_dim as u64;
        }
        let embeddings = if self.tied_embeddings { 1 } else { 2 };
        u64::from(self.layers) * layer + embeddings * self.vocab as u64 * hidden + hidden
    }
}

/// The keys of one architecture: `<architecture>.<key>`.
struct Keys<'a> {
    checkpoint: &'a dyn Checkpoint,
    architecture: Architecture,
}

impl Keys<'_> {
    fn full(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture.name())
    }

    /// A count from 1 to `limit` that must be there.
    fn count(&self, key: &str, limit: u64) -> Result<u64, ConfigError> {
        self.optional_count(key, limit)?.ok_or_else(|| {
            GgufError::MissingKey {
                key: self.full(key),
            }
            .into()
        })
    }

    /// A count, or one count per layer that are all the same.
    fn optional_count(&self, key: &str, limit: u64) -> Result<Option<u64>, ConfigError> {
        let full = self.full(key);
        let count = match self.checkpoint.metadata(&full) {
            None => return Ok(None),
            Some(Value::Array(array)) => {
                let mut counts = array.iter().map(|value| value.as_unsigned());
                let first = counts.next().flatten();
                if first.is_none() || counts.any(|count| count != first) {
                    return Err(self.bad(
                        key,
                        "an array",
                        "layers that differ from each other are not supported".into(),
                    ));
                }
                first
            }
            Some(_) => self.checkpoint.unsigned(&full)?,
        };
        match count {
            Some(count) if (1..=limit).contains(&count) => Ok(Some(count)),
            Some(count) => Err(self.bad(key, count, format!("it must be from 1 to {limit}"))),
            None => Ok(None),
        }
    }

    fn float(&self, key: &str) -> Result<Option<f32>, ConfigError> {
        Ok(self
            .checkpoint
            .float(&self.full(key))?
            .map(|value| value as f32))
    }

    /// A finite number over 0.
    fn positive(&self, key: &str) -> Result<Option<f32>, ConfigError> {
        match self.float(key)? {
            Some(value) if !(value.is_finite() && value > 0.0) => {
                Err(self.bad(key, value, "it must be a number over 0".into()))
            }
            other => Ok(other),
        }
    }

    fn head_dim(&self, hidden: usize, heads: usize) -> Result<usize, ConfigError> {
        let head_dim = match self.optional_count("attention.key_length", MAX_WIDTH)? {
            Some(length) => length as usize,
            None if hidden.is_multiple_of(heads) => hidden / heads,
            None => {
                let reason = format!("it must divide the embedding length {hidden}");
                return Err(self.bad("attention.head_count", heads, reason));
            }
        };
        if let Some(value) = self.optional_count("attention.value_length", MAX_WIDTH)?
            && value as usize != head_dim
        {
            let reason = format!("values as wide as keys are needed, and those have {head_dim}");
            return Err(self.bad("attention.value_length", value, reason));
        }
        Ok(head_dim)
    }

    fn vocab(&self, embedding_rows: u64) -> Result<usize, ConfigError> {
        if let Some(vocab) = self.optional_count("vocab_size", MAX_VOCAB)?
            && vocab != embedding_rows
        {
            return Err(self.bad(
                "vocab_size",
                vocab,
                format!("the embedding has {embedding_rows} rows"),
            ));
        }
        if embedding_rows > MAX_VOCAB {
            return Err(self.bad(
                "vocab_size",
                embedding_rows,
                format!("it must be from 1 to {MAX_VOCAB}"),
            ));
        }
        if let Some(tokens) = self.checkpoint.array("tokenizer.ggml.tokens")?
            && tokens.len() as u64 > embedding_rows
        {
            return Err(ConfigError::Value {
                key: "tokenizer.ggml.tokens".into(),
                value: format!("{} tokens", tokens.len()),
                reason: format!("the embedding has only {embedding_rows} rows"),
            });
        }
        Ok(embedding_rows as usize)
    }

    fn norm_eps(&self) -> Result<f32, ConfigError> {
        const KEY: &str = "attention.layer_norm_rms_epsilon";
        match self.positive(KEY)? {
            Some(eps) if eps < 1.0 => Ok(eps),
            Some(eps) => Err(self.bad(KEY, eps, "it must be below 1".into())),
            None => Err(GgufError::MissingKey {
                key: self.full(KEY),
            }
            .into()),
        }
    }

    fn refuse_experts(&self) -> Result<(), ConfigError> {
        match self.checkpoint.unsigned(&self.full("expert_count"))? {
            Some(experts) if experts > 0 => Err(ConfigError::Unsupported {
                feature: format!("a mixture of {experts} experts"),
            }),
            _ => Ok(()),
        }
    }

    /// Gemma 2's way of bounding scores and logits.
    fn refuse_softcapping(&self) -> Result<(), ConfigError> {
        for key in ["attn_logit_softcapping", "final_logit_softcapping"] {
            if let Some(most) = self.float(key)?
                && most != 0.0
            {
                return Err(ConfigError::Unsupported {
                    feature: format!("soft capping ({} = {most})", self.full(key)),
                });
            }
        }
        Ok(())
    }

    fn query_scalar(
        &self,
        layers: u64,
        hidden: usize,
        heads: usize,
        head_dim: usize,
    ) -> Result<f32, ConfigError> {
        if let Some(scale) = self.positive("attention.scale")? {
            return Ok(1.0 / (scale * scale));
        }
        // Files of the 27B model do not say that it divides by more than its heads' width: readers know it by its layers.
        Ok(
            match self.architecture == Architecture::Gemma3 && layers == 62 {
                true => hidden as f32 / heads as f32,
                false => head_dim as f32,
            },
        )
    }

    fn bad(&self, key: &str, value: impl ToString, reason: String) -> ConfigError {
        ConfigError::Value {
            key: self.full(key),
            value: value.to_string(),
            reason,
        }
    }
}
