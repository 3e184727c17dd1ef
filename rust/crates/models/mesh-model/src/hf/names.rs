//! Hugging Face's names of tensors as GGUF's, and back.

use super::config::TensorNaming;

/// The tensors of a layer: the name after `model.layers.N.`, and the one after `blk.N.`.
const LAYER: [(&str, &str); 16] = [
    ("input_layernorm.weight", "attn_norm.weight"),
    ("self_attn.q_proj.weight", "attn_q.weight"),
    ("self_attn.k_proj.weight", "attn_k.weight"),
    ("self_attn.v_proj.weight", "attn_v.weight"),
    ("self_attn.o_proj.weight", "attn_output.weight"),
    ("self_attn.q_proj.bias", "attn_q.bias"),
    ("self_attn.k_proj.bias", "attn_k.bias"),
    ("self_attn.v_proj.bias", "attn_v.bias"),
    ("self_attn.q_norm.weight", "attn_q_norm.weight"),
    ("self_attn.k_norm.weight", "attn_k_norm.weight"),
    ("mlp.gate_proj.weight", "ffn_gate.weight"),
    ("mlp.up_proj.weight", "ffn_up.weight"),
    ("mlp.down_proj.weight", "ffn_down.weight"),
    ("pre_feedforward_layernorm.weight", "ffn_norm.weight"),
    ("post_feedforward_layernorm.weight", "post_ffw_norm.weight"),
    // What this one is depends on whether a layer has four norms: see `layer`.
    (POST_ATTENTION, "ffn_norm.weight"),
];

const POST_ATTENTION: &str = "post_attention_layernorm.weight";

const GLOBAL: [(&str, &str); 2] = [
    ("embed_tokens.weight", "token_embd.weight"),
    ("norm.weight", "output_norm.weight"),
];

/// Prefixes of tensor names: of models saved with and without their head, and of the text part of multimodal
/// models.
const PREFIXES: [&str; 4] = [
    "model.language_model.",
    "language_model.model.",
    "model.",
    "",
];

/// Prefixes of tensors outside the text part of multimodal models; these are not used.
const NOT_TEXT: [&str; 4] = [
    "vision_tower.",
    "model.vision_tower.",
    "multi_modal_projector.",
    "model.multi_modal_projector.",
];

/// GGUF's name of a tensor; `None` for one that is not needed. Unknown names stay as they are: the check of
/// shapes then rejects them.
pub(super) fn gguf_name(name: &str, network: &TensorNaming) -> Option<String> {
    if network.sees && NOT_TEXT.iter().any(|prefix| name.starts_with(prefix)) {
        return None;
    }
    // Written out by old converters; it follows from the configuration.
    if name.ends_with(".rotary_emb.inv_freq") {
        return None;
    }
    if matches!(name, "lm_head.weight" | "language_model.lm_head.weight") {
        return (!network.tied).then(|| "output.weight".to_owned());
    }
    let known = PREFIXES.iter().find_map(|prefix| {
        let rest = name.strip_prefix(prefix)?;
        let global = GLOBAL.iter().find(|(known, _)| *known == rest);
        match global {
            Some((_, ours)) => Some((*ours).to_owned()),
            None => layer(rest.strip_prefix("layers.")?, network),
        }
    });
    Some(known.unwrap_or_else(|| name.to_owned()))
}

fn layer(rest: &str, network: &TensorNaming) -> Option<String> {
    let (number, suffix) = rest.split_once('.')?;
    // One way of writing a number only, so that two tensors cannot have one name by it.
    if number.starts_with('0') && number != "0" || !number.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let ours = match suffix {
        POST_ATTENTION if network.post_norms => "post_attention_norm.weight",
        _ => LAYER.iter().find(|(known, _)| *known == suffix)?.1,
    };
    Some(format!("blk.{number}.{ours}"))
}

/// The folder's name for a tensor of GGUF's name; `None` if it has no such tensor.
pub(crate) fn their_name(name: &str) -> Option<String> {
    if name == "output.weight" {
        return Some("lm_head.weight".into());
    }
    if let Some((theirs, _)) = GLOBAL.iter().find(|(_, ours)| *ours == name) {
        return Some(format!("model.{theirs}"));
    }
    let (layer, suffix) = name.strip_prefix("blk.")?.split_once('.')?;
    let theirs = match suffix {
        "post_attention_norm.weight" => POST_ATTENTION,
        // Of llama's two names the last, which all families except Gemma use.
        _ => LAYER.iter().rev().find(|(_, ours)| *ours == suffix)?.0,
    };
    Some(format!("model.layers.{layer}.{theirs}"))
}
