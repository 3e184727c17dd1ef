//! A network's description as `config.json`.

use std::io;

use serde_json::{Value, json};

use super::output::unknown;
use crate::config::{Architecture, Mixture, ModelConfig, Rope, RopeScaling};

/// The contents of `config.json`.
pub(super) fn config_json(config: &ModelConfig) -> io::Result<Value> {
    let (class, kind, activation) = match config.architecture {
        Architecture::Qwen3Moe => ("Qwen3MoeForCausalLM", "qwen3_moe", "hidden_act"),
        Architecture::Olmoe => ("OlmoeForCausalLM", "olmoe", "hidden_act"),
        Architecture::GptOss => ("GptOssForCausalLM", "gpt_oss", "hidden_act"),
        Architecture::GraniteMoe => ("GraniteMoeForCausalLM", "granitemoe", "hidden_act"),
        Architecture::Qwen2Moe => ("Qwen2MoeForCausalLM", "qwen2_moe", "hidden_act"),
        Architecture::Deepseek2 => ("DeepseekV2ForCausalLM", "deepseek_v2", "hidden_act"),
        Architecture::Llama if config.mixture.is_some() => {
            ("MixtralForCausalLM", "mixtral", "hidden_act")
        }
        Architecture::Llama => ("LlamaForCausalLM", "llama", "hidden_act"),
        Architecture::Qwen2 => ("Qwen2ForCausalLM", "qwen2", "hidden_act"),
        Architecture::Qwen3 => ("Qwen3ForCausalLM", "qwen3", "hidden_act"),
        Architecture::Gemma3 => ("Gemma3ForCausalLM", "gemma3_text", "hidden_activation"),
    };
    // A llama with a window is a Mistral.
    let class = match (config.architecture, &config.window) {
        (Architecture::Llama, Some(_)) if config.mixture.is_none() => "MistralForCausalLM",
        _ => class,
    };
    let mut json = json!({
        "architectures": [class],
        "model_type": kind,
        "num_hidden_layers": config.layers,
        "hidden_size": config.hidden,
        "intermediate_size": config.ffn,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope.base,
        "rope_scaling": scaling_json(&config.rope)?,
        "tie_word_embeddings": config.tied_embeddings,
    });
    json[activation] = match config.architecture {
        Architecture::Gemma3 => "gelu_pytorch_tanh".into(),
        _ => "silu".into(),
    };
    match config.architecture {
        Architecture::Gemma3 => json["query_pre_attn_scalar"] = config.query_scalar.into(),
        // Without a scaling the class assumes its own.
        Architecture::GptOss if config.rope.scaling == RopeScaling::None => {
            json["rope_scaling"] = json!({"rope_type": "default"});
        }
        _ => {}
    }
    if let Some(latent) = config.latent {
        json["kv_lora_rank"] = latent.rank.into();
        json["q_lora_rank"] = latent.query_rank.into();
        json["qk_nope_head_dim"] = (config.head_dim - config.rope.dim).into();
        json["qk_rope_head_dim"] = config.rope.dim.into();
        json["v_head_dim"] = config.value_dim.into();
    }
    if let Some(mixture) = &config.mixture {
        put_mixture(&mut json, config, mixture);
    }
    if let Some(window) = &config.window {
        let kind = |&has: &bool| {
            if has {
                "sliding_attention"
            } else {
                "full_attention"
            }
        };
        json["sliding_window"] = window.size.into();
        json["layer_types"] = window.layers.iter().map(kind).collect();
        json["rope_local_base_freq"] = window.rope.base.into();
    }
    Ok(json)
}

fn put_mixture(json: &mut Value, config: &ModelConfig, mixture: &Mixture) {
    let experts = match config.architecture {
        Architecture::Qwen3Moe | Architecture::Qwen2Moe | Architecture::Olmoe => "num_experts",
        Architecture::Deepseek2 => "n_routed_experts",
        _ => "num_local_experts",
    };
    json[experts] = mixture.experts.into();
    json["num_experts_per_tok"] = mixture.used.into();
    json["norm_topk_prob"] = mixture.normalised.into();
    let shared = mixture.shared.map_or(0, |shared| shared.ffn);
    match config.architecture {
        Architecture::Qwen3Moe | Architecture::Qwen2Moe => {
            json["moe_intermediate_size"] = mixture.ffn.into();
            json["mlp_only_layers"] = (0..mixture.leading_dense).collect();
            if shared > 0 {
                json["shared_expert_intermediate_size"] = shared.into();
            }
        }
        Architecture::Deepseek2 => {
            json["moe_intermediate_size"] = mixture.ffn.into();
            json["first_k_dense_replace"] = mixture.leading_dense.into();
            json["n_shared_experts"] = (shared / mixture.ffn).into();
            json["routed_scaling_factor"] = mixture.scale.into();
        }
        Architecture::GraniteMoe => {
            json["embedding_multiplier"] = config.embedding_scale.into();
            json["residual_multiplier"] = config.residual_scale.into();
            json["attention_multiplier"] = (1.0 / config.query_scalar.sqrt()).into();
            json["logits_scaling"] = config.logit_divisor.into();
            json["intermediate_size"] = mixture.ffn.into();
            if shared > 0 {
                json["shared_intermediate_size"] = shared.into();
            }
        }
        _ => json["intermediate_size"] = mixture.ffn.into(),
    }
}

fn scaling_json(rope: &Rope) -> io::Result<Value> {
    if rope.freq_factors.is_some() {
        return Err(unknown("frequency factors have no place in config.json"));
    }
    Ok(match rope.scaling {
        RopeScaling::None => Value::Null,
        RopeScaling::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
        RopeScaling::Yarn {
            factor,
            original_context,
            beta_fast,
            beta_slow,
            attention_factor,
            truncate,
        } => json!({
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original_context,
            "beta_fast": beta_fast,
            "beta_slow": beta_slow,
            "attention_factor": attention_factor,
            "truncate": truncate,
        }),
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_context,
        } => json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low_freq_factor,
            "high_freq_factor": high_freq_factor,
            "original_max_position_embeddings": original_context,
        }),
    })
}
