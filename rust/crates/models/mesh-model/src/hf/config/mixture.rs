//! Mixtures of experts, and the factors of Granite's networks, in `config.json`.

use super::class::Class;
use super::object::{Object, bad};
use crate::config::{MAX_EXPERTS, MAX_LAYERS, MAX_WIDTH};
use crate::hf::HfError;
use crate::hf::keys::GgufKeys;

/// Writes the keys of a class with a mixture of experts; nothing for other classes.
pub(super) fn mixture(
    text: &Object<'_>,
    class: Class,
    layers: u64,
    keys: &mut GgufKeys,
) -> Result<(), HfError> {
    // The defaults are those of the class in `transformers`.
    let (experts, used) = match class {
        Class::Mixtral | Class::GraniteMoe => (("num_local_experts", 8), 2),
        Class::Qwen3Moe => (("num_experts", 128), 8),
        Class::Olmoe => (("num_experts", 64), 8),
        Class::GptOss => (("num_local_experts", 128), 4),
        _ => return Ok(()),
    };
    let (key, default) = experts;
    let experts = match text.count(key, MAX_EXPERTS)? {
        // Newer releases write Mixtral's name for all classes.
        None => text.count("num_local_experts", MAX_EXPERTS)?,
        experts => experts,
    };
    keys.count("expert_count", experts.unwrap_or(default));
    let used = text
        .count("num_experts_per_tok", MAX_EXPERTS)?
        .unwrap_or(used);
    keys.count("expert_used_count", used);
    match class {
        Class::Qwen3Moe => {
            let width = text.count("moe_intermediate_size", MAX_WIDTH)?;
            keys.count("expert_feed_forward_length", width.unwrap_or(768));
            let dense = leading_dense(text, layers)?;
            keys.count("leading_dense_block_count", dense);
        }
        Class::GraniteMoe => granite(text, keys)?,
        Class::GptOss => gpt_oss(text)?,
        Class::Olmoe => {
            if let Some(most) = text.positive("clip_qkv")? {
                keys.float("attention.clamp_kqv", most);
            }
        }
        _ => {}
    }
    if matches!(class, Class::Qwen3Moe | Class::Olmoe) {
        let normalised = text.boolean("norm_topk_prob")?.unwrap_or(false);
        keys.flag("expert_weights_norm", normalised);
    }
    Ok(())
}

/// Number of dense layers at the beginning.
fn leading_dense(text: &Object<'_>, layers: u64) -> Result<u64, HfError> {
    let step = text.count("decoder_sparse_step", MAX_LAYERS)?.unwrap_or(1);
    if step != 1 {
        return Err(HfError::Unsupported {
            feature: format!(
                "dense layers between those with experts (decoder_sparse_step = {step})"
            ),
        });
    }
    const KEY: &str = "mlp_only_layers";
    let dense = text.numbers(KEY, layers)?;
    let leading = |(number, layer): (usize, &u64)| number as u64 == *layer;
    match dense.iter().enumerate().all(leading) {
        true => Ok(dense.len() as u64),
        false => Err(bad(
            KEY,
            format!("{dense:?}"),
            "only the first layers can be dense".into(),
        )),
    }
}

/// The activation's numbers are those of the published models in all of them.
fn gpt_oss(text: &Object<'_>) -> Result<(), HfError> {
    for (key, known) in [("swiglu_alpha", 1.702), ("swiglu_limit", 7.0)] {
        if let Some(value) = text.positive(key)?
            && value != known
        {
            return Err(HfError::Unsupported {
                feature: format!("{key} = {value} instead of {known}"),
            });
        }
    }
    Ok(())
}

/// Factors on the embedding, on what is added to hidden rows, on scores, and below logits.
fn granite(text: &Object<'_>, keys: &mut GgufKeys) -> Result<(), HfError> {
    for (theirs, ours) in [
        ("embedding_multiplier", "embedding_scale"),
        ("residual_multiplier", "residual_scale"),
        ("attention_multiplier", "attention.scale"),
        ("logits_scaling", "logit_scale"),
    ] {
        keys.float(ours, text.positive(theirs)?.unwrap_or(1.0));
    }
    Ok(())
}
