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
        Class::Qwen2Moe => (("num_experts", 60), 4),
        Class::DeepseekV2 => (("n_routed_experts", 64), 6),
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
        Class::Qwen3Moe | Class::Qwen2Moe => {
            let default = if class == Class::Qwen3Moe { 768 } else { 1408 };
            let width = text.count("moe_intermediate_size", MAX_WIDTH)?;
            keys.count("expert_feed_forward_length", width.unwrap_or(default));
            let dense = leading_dense(text, layers)?;
            keys.count("leading_dense_block_count", dense);
            if class == Class::Qwen2Moe {
                let width = text.count("shared_expert_intermediate_size", MAX_WIDTH)?;
                keys.count(SHARED_WIDTH, width.unwrap_or(5632));
            }
        }
        Class::DeepseekV2 => deepseek(text, layers, keys)?,
        Class::GraniteMoe => {
            granite(text, keys)?;
            let shared = text.count_from_zero("shared_intermediate_size", MAX_WIDTH)?;
            keys.count(SHARED_WIDTH, shared.unwrap_or(0));
        }
        Class::GptOss => gpt_oss(text)?,
        Class::Olmoe => {
            if let Some(most) = text.positive("clip_qkv")? {
                keys.float("attention.clamp_kqv", most);
            }
        }
        _ => {}
    }
    if matches!(
        class,
        Class::Qwen3Moe | Class::Qwen2Moe | Class::Olmoe | Class::DeepseekV2
    ) {
        let normalised = text.boolean("norm_topk_prob")?.unwrap_or(false);
        keys.flag("expert_weights_norm", normalised);
    }
    Ok(())
}

const SHARED_WIDTH: &str = "expert_shared_feed_forward_length";

/// DeepSeek's shared experts and dense layers; refuses other ways of choosing experts than by the highest scores.
fn deepseek(text: &Object<'_>, layers: u64, keys: &mut GgufKeys) -> Result<(), HfError> {
    let groups = text.count("n_group", MAX_EXPERTS)?.unwrap_or(1);
    let (method, function) = (text.string("topk_method")?, text.string("scoring_func")?);
    let step = text.count("moe_layer_freq", MAX_LAYERS)?.unwrap_or(1);
    for (known, setting) in [
        (groups == 1, format!("n_group = {groups}")),
        (
            // With one group that is all of them.
            matches!(method, None | Some("greedy" | "group_limited_greedy")),
            format!("topk_method = {:?}", method.unwrap_or_default()),
        ),
        (
            matches!(function, None | Some("softmax")),
            format!("scoring_func = {:?}", function.unwrap_or_default()),
        ),
        (step == 1, format!("moe_layer_freq = {step}")),
    ] {
        if !known {
            return Err(HfError::Unsupported {
                feature: format!("a mixture of experts with {setting}"),
            });
        }
    }
    let width = text.count("moe_intermediate_size", MAX_WIDTH)?;
    keys.count("expert_feed_forward_length", width.unwrap_or(1407));
    // Null means that there is none, unlike an absent key.
    let default = if text.map.contains_key("n_shared_experts") {
        0
    } else {
        2
    };
    let shared = text.count_from_zero("n_shared_experts", MAX_EXPERTS)?;
    keys.count("expert_shared_count", shared.unwrap_or(default));
    let dense = text.count_from_zero("first_k_dense_replace", layers)?;
    keys.count("leading_dense_block_count", dense.unwrap_or(0));
    let scale = text.positive("routed_scaling_factor")?;
    keys.float("expert_weights_scale", scale.unwrap_or(1.0));
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
