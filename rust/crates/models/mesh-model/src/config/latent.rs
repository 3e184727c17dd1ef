//! Multi-head latent attention.

use super::architecture::Architecture;
use super::error::ConfigError;
use super::keys::{ArchitectureKeys, MAX_WIDTH};
use super::rope::RopeScaling;

/// Attention whose keys and values are products of one narrow row per token (DeepSeek-V2,
/// <https://arxiv.org/abs/2405.04434>).
///
/// A layer projects its input to `rank` numbers, which are normed, and to a rotated part of a key that all heads
/// share. A second matrix makes of the normed row the rest of each head's key, and its value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LatentAttention {
    /// Width of the row that keys and values are made of.
    pub rank: usize,
    /// Width of the row that queries are made of; `None` if they are made of the input itself.
    pub query_rank: Option<usize>,
}

impl LatentAttention {
    /// Reads the ranks; `None` in families without latent attention. `head_dim` is the width of a key, `rotated`
    /// that of its rotated part.
    pub(super) fn from_keys(
        keys: &ArchitectureKeys<'_>,
        head_dim: usize,
        rotated: usize,
    ) -> Result<Option<Self>, ConfigError> {
        if keys.architecture != Architecture::Deepseek2 {
            return Ok(None);
        }
        if rotated >= head_dim {
            let reason = format!("it must be below the key's width {head_dim}");
            return Err(keys.bad("rope.dimension_count", rotated, reason));
        }
        let rank = keys.count("attention.kv_lora_rank", MAX_WIDTH)?;
        let query_rank = keys.count_from_zero("attention.q_lora_rank", MAX_WIDTH)?;
        Ok(Some(LatentAttention {
            rank: rank as usize,
            query_rank: (query_rank > 0).then_some(query_rank as usize),
        }))
    }

    /// What [`ModelConfig::query_scalar`](super::ModelConfig::query_scalar) is: scores take YaRN's factor squared,
    /// with `mscale_all_dim` as weight, whatever the rotated parts take.
    pub(super) fn query_scalar(
        keys: &ArchitectureKeys<'_>,
        head_dim: usize,
    ) -> Result<f32, ConfigError> {
        let kind = keys.checkpoint.string(&keys.full("rope.scaling.type"))?;
        let weight = keys.yarn_weight()?.filter(|_| kind == Some("yarn"));
        let factor = keys.positive("rope.scaling.factor")?.unwrap_or(1.0);
        let mscale = RopeScaling::yarn_mscale(factor, weight.unwrap_or(0.0));
        Ok(head_dim as f32 / mscale.powi(4))
    }

    /// Key/value heads: as many as query heads. Files for the absorbed form say 1.
    pub(super) fn check_kv_heads(
        keys: &ArchitectureKeys<'_>,
        heads: usize,
    ) -> Result<usize, ConfigError> {
        const KEY: &str = "attention.head_count_kv";
        match keys.optional_count(KEY, MAX_WIDTH)? {
            Some(count) if count != 1 && count as usize != heads => {
                let reason = format!("it must be 1 or that of the query heads, {heads}");
                Err(keys.bad(KEY, count, reason))
            }
            _ => Ok(heads),
        }
    }
}
