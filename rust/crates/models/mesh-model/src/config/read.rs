//! Reading a configuration from a checkpoint's keys.

use super::architecture::Architecture;
use super::error::ConfigError;
use super::keys::{ArchitectureKeys, MAX_CONTEXT, MAX_LAYERS, MAX_WIDTH};
use super::latent::LatentAttention;
use super::mixture::Mixture;
use super::network::{Activation, ModelConfig};
use super::rope::Rope;
use super::shapes;
use super::window::SlidingWindow;
use crate::checkpoint::Checkpoint;

impl ModelConfig {
    /// Reads the shape and checks every tensor against it.
    ///
    /// # Errors
    /// If a key or tensor is missing, contradicts another, or asks for what the engines do not have.
    pub fn read(checkpoint: &dyn Checkpoint) -> Result<Self, ConfigError> {
        let name = checkpoint.require_string("general.architecture")?;
        let architecture = Architecture::from_name(name)
            .ok_or_else(|| ConfigError::Architecture { found: name.into() })?;
        let keys = ArchitectureKeys {
            checkpoint,
            architecture,
        };
        keys.refuse_bounds()?;

        let layers = keys.count("block_count", MAX_LAYERS)?;
        let hidden = keys.count("embedding_length", MAX_WIDTH)? as usize;
        let heads = keys.count("attention.head_count", MAX_WIDTH)? as usize;
        let kv_heads = match architecture {
            Architecture::Deepseek2 => LatentAttention::check_kv_heads(&keys, heads)?,
            _ => keys
                .optional_count("attention.head_count_kv", MAX_WIDTH)?
                .map_or(heads, |n| n as usize),
        };
        if !heads.is_multiple_of(kv_heads) {
            return Err(keys.bad(
                "attention.head_count_kv",
                kv_heads,
                format!("it must divide the {heads} query heads"),
            ));
        }
        let (head_dim, value_dim) = keys.head_widths(hidden, heads)?;
        let embedding = checkpoint.require_tensor("token_embd.weight")?;
        let rope = Rope::from_keys(&keys, head_dim)?;
        let mixture = Mixture::from_keys(&keys)?;
        let gemma = architecture == Architecture::Gemma3;
        let granite = |key: &str| match architecture {
            Architecture::GraniteMoe => Ok(keys.positive(key)?.unwrap_or(1.0)),
            _ => Ok::<_, ConfigError>(1.0),
        };
        let tensors = checkpoint.tensors();
        let config = ModelConfig {
            architecture,
            name: checkpoint.string("general.name")?.map(str::to_owned),
            layers: layers as u32,
            hidden,
            heads,
            kv_heads,
            head_dim,
            value_dim,
            latent: LatentAttention::from_keys(&keys, head_dim, rope.dim)?,
            ffn: dense_width(&keys, mixture.as_ref())?,
            mixture,
            vocab: keys.vocab(embedding.dims.get(1).copied().unwrap_or(0))?,
            context: keys.count("context_length", MAX_CONTEXT)? as u32,
            norm_eps: keys.norm_eps()?,
            window: SlidingWindow::from_keys(&keys, layers as u32, &rope)?,
            rope,
            query_scalar: match architecture {
                Architecture::Deepseek2 => LatentAttention::query_scalar(&keys, head_dim)?,
                _ => keys.query_scalar(layers, hidden, heads, head_dim)?,
            },
            embedding_scale: match gemma {
                true => ModelConfig::gemma_embedding_scale(hidden),
                false => granite("embedding_scale")?,
            },
            residual_scale: granite("residual_scale")?,
            logit_divisor: granite("logit_scale")?,
            norm_offset: match gemma {
                true => checkpoint.norm_offset(),
                false => 0.0,
            },
            post_norms: gemma,
            activation: match architecture {
                Architecture::Gemma3 => Activation::GeluTanh,
                Architecture::GptOss => Activation::ClampedSwiglu,
                _ => Activation::Silu,
            },
            qkv_bias: tensors.get("blk.0.attn_q.bias").is_some(),
            output_bias: tensors.get("blk.0.attn_output.bias").is_some(),
            attention_sinks: architecture == Architecture::GptOss,
            qk_norm: tensors.get("blk.0.attn_q_norm.weight").is_some(),
            qk_norm_over_heads: architecture == Architecture::Olmoe,
            tied_embeddings: tensors.get("output.weight").is_none(),
        };
        shapes::check(&config, checkpoint)?;
        Ok(config)
    }
}

/// Width of dense feed-forward layers; of a mixture without them, that of its experts.
fn dense_width(
    keys: &ArchitectureKeys<'_>,
    mixture: Option<&Mixture>,
) -> Result<usize, ConfigError> {
    const KEY: &str = "feed_forward_length";
    let width = match mixture {
        Some(mixture) if mixture.leading_dense == 0 => {
            let width = keys.optional_count(KEY, MAX_WIDTH)?;
            width.unwrap_or(mixture.ffn as u64)
        }
        _ => keys.count(KEY, MAX_WIDTH)?,
    };
    Ok(width as usize)
}
