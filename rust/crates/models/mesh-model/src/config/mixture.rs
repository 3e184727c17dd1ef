//! Mixtures of experts: layers that send each row through a few of many feed-forward networks.

use super::architecture::Architecture;
use super::error::ConfigError;
use super::keys::{ArchitectureKeys, MAX_LAYERS, MAX_WIDTH};

/// Most experts of a layer; the largest known models have 512.
pub(crate) const MAX_EXPERTS: u64 = 1 << 10;

/// An expert that computes every row: a dense feed-forward network beside the mixture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SharedExpert {
    /// Its width. Several shared experts are one of their widths together.
    pub ffn: usize,
    /// Its output is multiplied by the sigmoid of a score that a vector gives the row
    /// (`blk.N.ffn_gate_inp_shexp.weight`).
    pub gated: bool,
}

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
    /// The expert that computes every row, if there is one.
    pub shared: Option<SharedExpert>,
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
        const WIDTH: &str = "expert_feed_forward_length";
        let ffn = match keys.optional_count(WIDTH, MAX_WIDTH)? {
            Some(ffn) => ffn,
            // Beside dense layers and shared experts, whose width is another.
            None if family.may_lead_dense() => keys.count(WIDTH, MAX_WIDTH)?,
            None => keys.count("feed_forward_length", MAX_WIDTH)?,
        };
        Ok(Some(Mixture {
            experts: experts as usize,
            used: used as usize,
            ffn: ffn as usize,
            normalised: keys
                .checkpoint
                .bool(&keys.full("expert_weights_norm"))?
                .unwrap_or(!matches!(
                    family,
                    Architecture::Olmoe | Architecture::Qwen2Moe | Architecture::Deepseek2
                )),
            scale: keys.positive("expert_weights_scale")?.unwrap_or(1.0),
            leading_dense: leading_dense(keys)?,
            biases: family == Architecture::GptOss,
            shared: SharedExpert::from_keys(keys, ffn)?,
        }))
    }
}

impl SharedExpert {
    /// Reads the width where the family has it; `None` if there is no shared expert. `ffn` is the width of the
    /// others.
    fn from_keys(keys: &ArchitectureKeys<'_>, ffn: u64) -> Result<Option<Self>, ConfigError> {
        const WIDTH: &str = "expert_shared_feed_forward_length";
        const COUNT: &str = "expert_shared_count";
        let gated = keys.architecture == Architecture::Qwen2Moe;
        let ffn = match keys.architecture {
            Architecture::Qwen2Moe => keys.count(WIDTH, MAX_WIDTH)?,
            Architecture::GraniteMoe => keys.count_from_zero(WIDTH, MAX_WIDTH)?,
            Architecture::Deepseek2 => {
                let count = keys.count_from_zero(COUNT, MAX_EXPERTS)?;
                let width = count * ffn;
                if width > MAX_WIDTH {
                    let reason = format!(
                        "with experts of width {ffn} that is {width}, and at most {MAX_WIDTH} is possible"
                    );
                    return Err(keys.bad(COUNT, count, reason));
                }
                width
            }
            _ => 0,
        };
        let ffn = ffn as usize;
        Ok((ffn > 0).then_some(SharedExpert { ffn, gated }))
    }
}

fn leading_dense(keys: &ArchitectureKeys<'_>) -> Result<u32, ConfigError> {
    const KEY: &str = "leading_dense_block_count";
    match keys.checkpoint.unsigned(&keys.full(KEY))? {
        None | Some(0) => Ok(0),
        Some(count) if !keys.architecture.may_lead_dense() => Err(ConfigError::Unsupported {
            feature: format!("a mixture with {} = {count}", keys.full(KEY)),
        }),
        Some(count) if count <= MAX_LAYERS => Ok(count as u32),
        Some(count) => Err(keys.bad(KEY, count, format!("it must be at most {MAX_LAYERS}"))),
    }
}

/// Rejects ways of choosing experts that the engines do not have.
fn refuse_variants(keys: &ArchitectureKeys<'_>) -> Result<(), ConfigError> {
    // How scores become weights: 1 is the softmax.
    let mut variants = vec![
        ("expert_gating_func", 1),
        ("expert_group_count", 1),
        ("interleave_moe_layer_step", 1),
        ("moe_every_n_layers", 1),
    ];
    match keys.architecture {
        Architecture::Deepseek2 => {}
        Architecture::Qwen2Moe | Architecture::GraniteMoe => {
            variants.push(("expert_shared_count", 1));
        }
        _ => variants.extend([
            ("expert_shared_count", 0),
            ("expert_shared_feed_forward_length", 0),
        ]),
    }
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
