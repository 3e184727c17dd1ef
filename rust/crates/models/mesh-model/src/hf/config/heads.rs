//! Heads and their widths in `config.json`.

use super::class::Class;
use super::object::{Object, bad};
use crate::config::MAX_WIDTH;
use crate::hf::HfError;
use crate::hf::keys::GgufKeys;

/// Writes the keys of attention's heads. Gives the width of the part of a head that turns, before any fraction
/// of it is taken.
pub(super) fn heads(
    text: &Object<'_>,
    class: Class,
    hidden: u64,
    keys: &mut GgufKeys,
) -> Result<u64, HfError> {
    let count = |key: &str, default: Option<u64>| match text.count(key, MAX_WIDTH)?.or(default) {
        Some(count) => Ok(count),
        None => text.required(key, MAX_WIDTH),
    };
    // The defaults are those of the class in `transformers`.
    let (heads, kv_heads, head_dim) = match class {
        Class::Gemma3 => (Some(8), Some(4), Some(256)),
        Class::Qwen3 => (None, None, Some(128)),
        Class::Mixtral => (None, Some(8), None),
        Class::Qwen3Moe => (None, Some(4), None),
        Class::GptOss => (Some(64), Some(8), Some(64)),
        _ => (None, None, None),
    };
    let heads = count("num_attention_heads", heads)?;
    keys.count("attention.head_count", heads);
    if class == Class::DeepseekV2 {
        keys.count("attention.head_count_kv", heads);
        return latent(text, keys);
    }
    let kv_heads = count("num_key_value_heads", kv_heads.or(Some(heads)))?;
    if !heads.is_multiple_of(kv_heads) {
        let reason = format!("it must divide the {heads} query heads");
        return Err(bad("num_key_value_heads", kv_heads, reason));
    }
    keys.count("attention.head_count_kv", kv_heads);
    let head_dim = match text.count("head_dim", MAX_WIDTH)?.or(head_dim) {
        Some(head_dim) => head_dim,
        None if hidden.is_multiple_of(heads) => hidden / heads,
        None => {
            let reason =
                format!("it must divide the hidden size {hidden}, or head_dim must be given");
            return Err(bad("num_attention_heads", heads, reason));
        }
    };
    keys.count("attention.key_length", head_dim);
    keys.count("attention.value_length", head_dim);
    Ok(head_dim)
}

/// Widths of latent attention: of the rows that keys, values and perhaps queries are made of, and of heads.
fn latent(text: &Object<'_>, keys: &mut GgufKeys) -> Result<u64, HfError> {
    let width = |key: &str, default: u64| {
        let width = text.count(key, MAX_WIDTH)?;
        Ok::<_, HfError>(width.unwrap_or(default))
    };
    keys.count("attention.kv_lora_rank", width("kv_lora_rank", 512)?);
    // Null means that there is none, unlike an absent key.
    let query_rank = match text.map.contains_key("q_lora_rank") {
        true => text.count("q_lora_rank", MAX_WIDTH)?.unwrap_or(0),
        false => 1536,
    };
    keys.count("attention.q_lora_rank", query_rank);
    let rotated = width("qk_rope_head_dim", 64)?;
    let key = width("qk_nope_head_dim", 128)? + rotated;
    keys.count("attention.key_length", key);
    keys.count("attention.value_length", width("v_head_dim", 128)?);
    Ok(rotated)
}
