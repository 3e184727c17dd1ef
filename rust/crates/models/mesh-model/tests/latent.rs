//! Latent attention and shared experts: what keys, tensors and folders say, and lies about them.

use mesh_model::gguf::writer::{OwnedValue, Writer};
use mesh_model::hf::keys_of_config;
use mesh_model::synth::{Shape, Tokens, random_model_bytes};
use mesh_model::{
    Architecture, ConfigError, GgmlType, Gguf, LatentAttention, ModelConfig, RopeStyle,
};
use serde_json::{Value, json};

fn source(shape: &Shape) -> Gguf {
    Gguf::from_bytes(random_model_bytes(shape, GgmlType::F16, Tokens::Bytes)).unwrap()
}

/// The configuration of `source` with some keys replaced, and without the tensors whose names end in `without`.
fn read(
    source: &Gguf,
    keys: &[(&str, OwnedValue)],
    without: &str,
) -> Result<ModelConfig, ConfigError> {
    let mut writer = Writer::new();
    for (name, value) in source.metadata_iter() {
        if keys.iter().all(|(replaced, _)| *replaced != name) {
            writer.copy_key(name, value);
        }
    }
    for (name, value) in keys {
        writer.key(name, value.clone());
    }
    for tensor in source.tensors().iter() {
        if without.is_empty() || !tensor.name.ends_with(without) {
            writer.tensor(tensor.name, tensor.ty, tensor.dims);
        }
    }
    let zeros = |_: &str, ty: GgmlType, dims: &[u64]| {
        let elements = dims.iter().product::<u64>() as usize;
        vec![0; elements / ty.block_size() * ty.type_size()]
    };
    ModelConfig::read(&Gguf::from_bytes(writer.to_bytes(zeros).unwrap()).unwrap())
}

#[test]
fn both_forms_of_files_describe_one_network() {
    for query_rank in [None, Some(256)] {
        let [plain, split] = [false, true].map(|split| {
            let file = source(&Shape::tiny_deepseek(query_rank, split));
            ModelConfig::read(&file).unwrap()
        });
        assert_eq!(plain, split);
        let expected = LatentAttention {
            rank: 256,
            query_rank: query_rank.map(|rank| rank as usize),
        };
        assert_eq!(plain.latent, Some(expected));
        assert_eq!((plain.heads, plain.kv_heads), (4, 4));
        assert_eq!((plain.head_dim, plain.value_dim), (96, 64));
        assert_eq!(
            (plain.rope.dim, plain.rope.style),
            (32, RopeStyle::Interleaved)
        );
        assert_eq!(plain.kv_elements(), 4 * (96 + 64));
        let mixture = plain.mixture.clone().unwrap();
        assert_eq!(mixture.leading_dense, 1);
        let file = source(&Shape::tiny_deepseek(query_rank, false));
        let elements = file.tensors().iter().map(|tensor| tensor.elements());
        assert_eq!(plain.parameters(), elements.sum::<u64>());
    }
}

#[test]
fn scores_take_yarns_factor_squared() {
    let key = |key: &str| format!("deepseek2.rope.scaling.{key}");
    let (kind, factor, weight) = (key("type"), key("factor"), key("yarn_log_multiplier"));
    let yarn = OwnedValue::String("yarn".into());
    let keys = [
        (&*kind, yarn),
        (&*factor, OwnedValue::F32(40.0)),
        (&*weight, OwnedValue::F32(0.0707)),
    ];
    let file = source(&Shape::tiny(Architecture::Deepseek2));
    let config = read(&file, &keys, "").unwrap();
    // As in modeling_deepseek.py: 0.1 * 0.707 * ln 40 + 1.
    let mscale = 1.260_803_8_f32;
    let scale = 1.0 / config.query_scalar.sqrt();
    assert!((scale / (mscale * mscale / 96f32.sqrt()) - 1.0).abs() < 1e-6);
    assert!((config.rope.magnitude() - 1.0).abs() < 1e-6);
    // Without a weight the rotated parts take the factor, as elsewhere.
    let config = read(&file, &keys[..2], "").unwrap();
    assert_eq!(config.query_scalar, 96.0);
    assert!((config.rope.magnitude() - 1.368_888).abs() < 1e-6);
}

#[test]
fn lying_widths_and_variants_are_named() {
    let latent = source(&Shape::tiny_deepseek(None, false));
    let number = OwnedValue::U32;
    for (key, value, expected) in [
        ("attention.kv_lora_rank", 0, "it must be from 1 to 1048576"),
        (
            "attention.kv_lora_rank",
            128,
            "\"blk.0.attn_kv_a_mqa.weight\" has dimensions [256, 288]",
        ),
        (
            "attention.q_lora_rank",
            128,
            "tensor \"blk.0.attn_q_a.weight\" is missing",
        ),
        (
            "attention.q_lora_rank",
            u32::MAX,
            "it must be at most 1048576",
        ),
        (
            "attention.head_count_kv",
            3,
            "it must be 1 or that of the query heads, 4",
        ),
        (
            "attention.key_length",
            u32::MAX,
            "it must be from 1 to 1048576",
        ),
        (
            "attention.key_length_mla",
            128,
            "\"blk.0.attn_q.weight\" has dimensions [256, 384]",
        ),
        ("attention.value_length", 32, "\"blk.0.attn_output.weight\""),
        (
            "rope.dimension_count",
            128,
            "it must be even and at most the head's width 96",
        ),
        (
            "rope.dimension_count",
            96,
            "it must be below the key's width 96",
        ),
        (
            "expert_group_count",
            8,
            "a mixture with deepseek2.expert_group_count = 8",
        ),
        (
            "expert_gating_func",
            2,
            "a mixture with deepseek2.expert_gating_func = 2",
        ),
        (
            "expert_shared_count",
            3,
            "\"blk.1.ffn_gate_shexp.weight\" has dimensions [256, 512]",
        ),
        (
            "expert_shared_count",
            0,
            "\"blk.1.ffn_gate_shexp.weight\" has no place",
        ),
        ("expert_shared_count", u32::MAX, "it must be at most 1024"),
        (
            "leading_dense_block_count",
            2,
            "\"blk.1.ffn_gate.weight\" is missing",
        ),
    ] {
        let full = format!("deepseek2.{key}");
        let error = read(&latent, &[(&full, number(value))], "").unwrap_err();
        let error = error.to_string();
        assert!(error.contains(expected), "{key} = {value}: {error}");
    }
    for (without, expected) in [
        ("attn_kv_b.weight", "\"blk.0.attn_kv_b.weight\" is missing"),
        (
            "1.ffn_down_shexp.weight",
            "\"blk.1.ffn_down_shexp.weight\" is missing",
        ),
    ] {
        let error = read(&latent, &[], without).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    let split = source(&Shape::tiny_deepseek(None, true));
    let error = read(&split, &[], "attn_v_b.weight")
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("\"blk.0.attn_v_b.weight\" is missing"),
        "{error}"
    );
}

#[test]
fn lying_shared_experts_are_named() {
    let width = |family: &str| format!("{family}.expert_shared_feed_forward_length");
    for (shape, family, value, expected) in [
        (
            Shape::tiny(Architecture::Qwen2Moe),
            "qwen2moe",
            OwnedValue::U32(0),
            "it must be from 1 to",
        ),
        (
            Shape::tiny(Architecture::Qwen2Moe),
            "qwen2moe",
            OwnedValue::I32(-8),
            "qwen2moe.expert_shared",
        ),
        (
            Shape::tiny(Architecture::Qwen2Moe),
            "qwen2moe",
            OwnedValue::U32(256),
            "has dimensions [256, 512]",
        ),
        (
            Shape::tiny_granite_shared(),
            "granitemoe",
            OwnedValue::U32(u32::MAX),
            "it must be at most",
        ),
        (
            Shape::tiny_granite_shared(),
            "granitemoe",
            OwnedValue::U32(0),
            "has no place",
        ),
        (
            Shape::tiny(Architecture::Olmoe),
            "olmoe",
            OwnedValue::U32(64),
            "a mixture with olmoe.expert_shared",
        ),
    ] {
        let error = read(&source(&shape), &[(&width(family), value)], "").unwrap_err();
        assert!(error.to_string().contains(expected), "{family}: {error}");
    }
    let gate = "ffn_gate_inp_shexp.weight";
    let error = read(&source(&Shape::tiny(Architecture::Qwen2Moe)), &[], gate).unwrap_err();
    assert!(error.to_string().contains(gate), "{error}");
}

/// The configuration of DeepSeek-V2-Lite, in the words of its config.json.
fn lite() -> Value {
    json!({
        "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "first_k_dense_replace": 1,
        "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 10944, "kv_lora_rank": 512,
        "max_position_embeddings": 163840, "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1,
        "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": false, "num_attention_heads": 16,
        "num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16, "q_lora_rank": null,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-6, "routed_scaling_factor": 1.0,
        "rope_scaling": {
            "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 4096, "type": "yarn",
        },
        "rope_theta": 10000, "scoring_func": "softmax", "tie_word_embeddings": false, "topk_group": 1,
        "topk_method": "greedy", "v_head_dim": 128, "vocab_size": 102400,
    })
}

#[test]
fn a_folders_words_become_keys() {
    use mesh_model::Checkpoint;
    let keys = keys_of_config(lite().to_string().as_bytes()).unwrap();
    for (key, expected) in [
        ("attention.kv_lora_rank", 512),
        ("attention.q_lora_rank", 0),
        ("attention.key_length", 192),
        ("attention.value_length", 128),
        ("rope.dimension_count", 64),
        ("expert_count", 64),
        ("expert_used_count", 6),
        ("expert_shared_count", 2),
        ("expert_feed_forward_length", 1408),
        ("leading_dense_block_count", 1),
        ("context_length", 163_840),
    ] {
        let found = keys.unsigned(&format!("deepseek2.{key}")).unwrap();
        assert_eq!(found, Some(expected), "{key}");
    }
    let float = |key: &str| {
        keys.float(&format!("deepseek2.rope.scaling.{key}"))
            .unwrap()
    };
    assert!((float("yarn_log_multiplier").unwrap() - 0.0707).abs() < 1e-9);
    assert!((float("attn_factor").unwrap() - 1.0).abs() < 1e-9);
    for (key, value, expected) in [
        ("n_group", json!(8), "n_group = 8"),
        (
            "topk_method",
            json!("noaux_tc"),
            "topk_method = \"noaux_tc\"",
        ),
        ("scoring_func", json!("sigmoid"), "scoring_func"),
        ("moe_layer_freq", json!(2), "moe_layer_freq = 2"),
        ("kv_lora_rank", json!(0), "kv_lora_rank"),
        ("n_shared_experts", json!(-1), "n_shared_experts"),
        ("first_k_dense_replace", json!(28), "first_k_dense_replace"),
        ("qk_rope_head_dim", json!(1u64 << 40), "qk_rope_head_dim"),
    ] {
        let mut config = lite();
        config[key] = value;
        let error = keys_of_config(config.to_string().as_bytes())
            .unwrap_err()
            .to_string();
        assert!(error.contains(expected), "{error}");
    }
}
