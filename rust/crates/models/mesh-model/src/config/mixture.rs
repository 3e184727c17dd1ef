//! Mixtures of experts: layers that send each row through a few of many feed-forward networks.

use super::architecture::Architecture;
use super::error::ConfigError;
use super::keys::{ArchitectureKeys, MAX_LAYERS, MAX_WIDTH};

/// Most experts of a layer; the largest known models have 512.
pub(crate) const MAX_EXPERTS: u64 = 1 << 10;

/// The mixture of experts in the feed-forward half of layers.
///
/// A router scores all experts for a row. The `used` best ones compute, and the sum of their outputs, each
/// times its weight, is the layer's output.
#[derive(Debug, Clone, PartialEq)]
pub struct Mixture {
    /// Experts of a layer.
    pub experts: usize,
    /// Experts that compute a row.
    pub used: usize,
    /// Width of one expert.
    pub ffn: usize,
    /// The weights of the used experts add up to 1: a softmax over their scores. Otherwise they are those of a
    /// softmax over the scores of all experts.
    pub normalised: bool,
    /// Factor on all weights.
    pub scale: f32,
    /// So many layers at the beginning are dense.
    pub leading_dense: u32,
    /// The router and the experts' matrices have biases (`blk.N.ffn_gate_inp.bias`, `blk.N.ffn_up_exps.bias` …).
    pub biases: bool,
}

impl Mixture {
    /// Reads the keys of a mixture; `None` if the network has none.
    pub(super) fn from_keys(keys: &ArchitectureKeys<'_>) -> Result<Option<Self>, ConfigError> {
        const COUNT: &str = "expert_count";
        const USED: &str = "expert_used_count";
        let family = keys.architecture;
        let experts = match keys.checkpoint.unsigned(&keys.full(COUNT))? {
            None | Some(0) if !family.is_mixture() => return Ok(None),
            None => keys.count(COUNT, MAX_EXPERTS)?,
            Some(experts) if !family.may_be_mixture() => {
                return Err(ConfigError::Unsupported {
                    feature: format!(
                        "a mixture of {experts} experts in a {} network",
                        family.name()
                    ),
                });
            }
            Some(_) => keys.count(COUNT, MAX_EXPERTS)?,
        };
        let used = keys.count(USED, MAX_EXPERTS)?;
        if used > experts {
            let reason = format!("there are only {experts} experts (expert_count)");
            return Err(keys.bad(USED, used, reason));
        }
        refuse_variants(keys)?;
        let ffn = match keys.optional_count("expert_feed_forward_length", MAX_WIDTH)? {
            Some(ffn) => ffn,
            None => keys.count("feed_forward_length", MAX_WIDTH)?,
        };
        Ok(Some(Mixture {
            experts: experts as usize,
            used: used as usize,
            ffn: ffn as usize,
            normalised: keys
                .checkpoint
                .bool(&keys.full("expert_weights_norm"))?
                .unwrap_or(family != Architecture::Olmoe),
            scale: keys.positive("expert_weights_scale")?.unwrap_or(1.0),
            leading_dense: leading_dense(keys)?,
            biases: family == Architecture::GptOss,
        }))
    }
}

fn leading_dense(keys: &ArchitectureKeys<'_>) -> Result<u32, ConfigError> {
    const KEY: &str = "leading_dense_block_count";
    match keys.checkpoint.unsigned(&keys.full(KEY))? {
        None | Some(0) => Ok(0),
        Some(count) if keys.architecture != Architecture::Qwen3Moe => {
            Err(ConfigError::Unsupported {
                feature: format!("a mixture with {} = {count}", keys.full(KEY)),
            })
        }
        Some(count) if count <= MAX_LAYERS => Ok(count as u32),
        Some(count) => Err(keys.bad(KEY, count, format!("it must be at most {MAX_LAYERS}"))),
    }
}

/// Rejects ways of choosing experts that the engines do not have.
fn refuse_variants(keys: &ArchitectureKeys<'_>) -> Result<(), ConfigError> {
    // How scores become weights: 1 is the softmax.
    let variants = [
        ("expert_shared_count", 0),
        ("expert_shared_feed_forward_length", 0),
        ("expert_gating_func", 1),
        ("expert_group_count", 1),
        ("interleave_moe_layer_step", 1),
        ("moe_every_n_layers", 1),
    ];
    for (key, known) in variants {
        if let Some(value) = keys.checkpoint.unsigned(&keys.full(key))?
            && value != known
            && value != 0
        {
            return Err(ConfigError::Unsupported {
                feature: format!("a mixture with {} = {value}", keys.full(key)),
            });
        }
    }
    Ok(())
}
