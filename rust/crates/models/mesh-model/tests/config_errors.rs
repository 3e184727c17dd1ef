//! Metadata and tensors that contradict each other or ask for what the engines lack.

use mesh_model::gguf::writer::{OwnedValue, Writer};
use mesh_model::synth::{Shape, Tokens, random_model_bytes};
use mesh_model::{Architecture, GgmlType, Gguf, ModelConfig, RopeScaling, RopeStyle};

/// A sound llama model.
fn source() -> Gguf {
    Gguf::from_bytes(random_model_bytes(
        &Shape::tiny(Architecture::Llama),
        GgmlType::Q8_0,
        Tokens::Bytes,
    ))
    .unwrap()
}

/// Changes to a copy of the model.
#[derive(Default)]
struct Change<'a> {
    without_key: &'a str,
    key: Option<(&'a str, OwnedValue)>,
    /// More keys, which the model does not have.
    news: Vec<(&'a str, OwnedValue)>,
    without_tensor: &'a str,
    tensor: Option<(&'a str, &'a [u64], f32)>,
}

fn changed(change: Change<'_>) -> Gguf {
    let source = source();
    let mut writer = Writer::new();
    let replaced = change.key.as_ref().map_or("", |(name, _)| name);
    for (name, value) in source.metadata_iter() {
        if name != change.without_key && name != replaced {
            writer.copy_key(name, value);
        }
    }
    if let Some((name, value)) = change.key {
        writer.key(name, value);
    }
    for (name, value) in change.news {
        writer.key(name, value);
    }
    let added = change.tensor.map_or("", |(name, _, _)| name);
    for tensor in source.tensors().iter() {
        if tensor.name != change.without_tensor && tensor.name != added {
            writer.tensor(tensor.name, tensor.ty, tensor.dims);
        }
    }
    if let Some((name, dims, _)) = change.tensor {
        writer.tensor(name, GgmlType::F32, dims);
    }
    let bytes = writer.to_bytes(|name, _, dims| match change.tensor {
        Some((added, _, value)) if name == added => value
            .to_le_bytes()
            .repeat(dims.iter().product::<u64>() as usize),
        _ => source
            .tensors()
            .get(name)
            .unwrap()
            .data
            .read()
            .unwrap()
            .into_owned(),
    });
    Gguf::from_bytes(bytes.unwrap()).unwrap()
}

fn error_with_key(name: &str, value: OwnedValue) -> String {
    let gguf = changed(Change {
        key: Some((name, value)),
        ..Change::default()
    });
    ModelConfig::read(&gguf).unwrap_err().to_string()
}

fn config_with_key(name: &str, value: OwnedValue) -> ModelConfig {
    ModelConfig::read(&changed(Change {
        key: Some((name, value)),
        ..Change::default()
    }))
    .unwrap()
}

#[test]
fn a_missing_key_is_named() {
    for key in [
        "block_count",
        "embedding_length",
        "attention.head_count",
        "feed_forward_length",
        "context_length",
    ] {
        let key = format!("llama.{key}");
        let gguf = changed(Change {
            without_key: &key,
            ..Change::default()
        });
        let error = ModelConfig::read(&gguf).unwrap_err().to_string();
        assert!(
            error.starts_with(&format!("metadata {key:?} is missing")),
            "{error}"
        );
    }
    let gguf = changed(Change {
        without_key: "general.architecture",
        ..Change::default()
    });
    assert!(
        ModelConfig::read(&gguf)
            .unwrap_err()
            .to_string()
            .contains("\"general.architecture\" is missing")
    );
}

#[test]
fn other_architectures_are_refused_by_name() {
    let error = error_with_key("general.architecture", OwnedValue::String("mamba".into()));
    assert_eq!(
        error,
        "architecture \"mamba\" is not supported: use a model of llama, qwen2, qwen3, gemma3, qwen3moe, qwen2moe, \
         olmoe, granitemoe, deepseek2 or gpt-oss"
    );
    let error = error_with_key(
        "llama.rope.scaling.type",
        OwnedValue::String("longrope".into()),
    );
    assert!(error.contains("rope scaling \"longrope\""), "{error}");
}

#[test]
fn numbers_no_network_has_are_refused() {
    let cases = [
        ("llama.block_count", OwnedValue::U32(0), "it must be from 1"),
        (
            "llama.block_count",
            OwnedValue::U32(u32::MAX),
            "it must be from 1",
        ),
        (
            "llama.attention.head_count_kv",
            OwnedValue::U32(3),
            "it must divide the 4 query heads",
        ),
        (
            "llama.rope.dimension_count",
            OwnedValue::U32(63),
            "it must be even",
        ),
        (
            "llama.rope.dimension_count",
            OwnedValue::U32(66),
            "at most the head's width 64",
        ),
        (
            "llama.rope.freq_base",
            OwnedValue::F32(f32::NAN),
            "a number over 0",
        ),
        (
            "llama.rope.freq_base",
            OwnedValue::F32(1.0),
            "it must be over 1",
        ),
        (
            "llama.attention.layer_norm_rms_epsilon",
            OwnedValue::F32(0.0),
            "a number over 0",
        ),
        (
            "llama.attention.value_length",
            OwnedValue::U32(32),
            "values as wide as keys",
        ),
        (
            "llama.vocab_size",
            OwnedValue::U32(299),
            "the embedding has 300 rows",
        ),
        (
            "llama.feed_forward_length",
            OwnedValue::I32s(vec![512, 256]),
            "layers that differ",
        ),
        (
            "tokenizer.ggml.tokens",
            OwnedValue::Strings(vec![String::new(); 301]),
            "the embedding has only 300 rows",
        ),
    ];
    for (key, value, expected) in cases {
        let error = error_with_key(key, value);
        assert!(
            error.contains(key) && error.contains(expected),
            "{key}: {error}"
        );
    }
    let error = error_with_key("llama.block_count", OwnedValue::String("two".into()));
    assert!(
        error.contains("is the string \"two\", but a non-negative integer is needed"),
        "{error}"
    );
}

#[test]
fn tensors_that_contradict_the_metadata_are_named() {
    let gguf = changed(Change {
        without_tensor: "blk.1.ffn_up.weight",
        ..Change::default()
    });
    let error = ModelConfig::read(&gguf).unwrap_err().to_string();
    assert!(
        error.starts_with("tensor \"blk.1.ffn_up.weight\" is missing"),
        "{error}"
    );

    let gguf = changed(Change {
        tensor: Some(("blk.0.attn_k.weight", &[256, 256], 0.0)),
        ..Change::default()
    });
    let error = ModelConfig::read(&gguf).unwrap_err().to_string();
    assert!(error.starts_with("tensor \"blk.0.attn_k.weight\" has dimensions [256, 256], but the metadata asks for [256, 128]"));

    for name in [
        "blk.0.attn_sinks.weight",
        "blk.2.attn_q.weight",
        "blk.x.attn_q.weight",
        "mm.0.weight",
    ] {
        let gguf = changed(Change {
            tensor: Some((name, &[256], 0.0)),
            ..Change::default()
        });
        let error = ModelConfig::read(&gguf).unwrap_err().to_string();
        assert!(
            error.starts_with(&format!("tensor {name:?} has no place in a llama network")),
            "{error}"
        );
    }
}

#[test]
fn one_count_for_all_layers_may_be_an_array() {
    assert_eq!(
        config_with_key(
            "llama.feed_forward_length",
            OwnedValue::I32s(vec![512, 512])
        )
        .ffn,
        512
    );
}

#[test]
fn rope_scaling_and_frequency_factors_are_read() {
    let config = config_with_key("llama.rope.scaling.factor", OwnedValue::F32(4.0));
    assert_eq!(config.rope.scaling, RopeScaling::Linear { factor: 4.0 });
    let config = config_with_key("llama.rope.scaling.type", OwnedValue::String("yarn".into()));
    assert!(matches!(
        config.rope.scaling,
        RopeScaling::Yarn {
            original_context: 512,
            truncate: true,
            ..
        }
    ));
    const MULTIPLIER: &str = "llama.rope.scaling.yarn_log_multiplier";
    let with_multiplier = |multiplier: f32| {
        changed(Change {
            news: vec![
                ("llama.rope.scaling.type", OwnedValue::String("yarn".into())),
                ("llama.rope.scaling.factor", OwnedValue::F32(40.0)),
                (MULTIPLIER, OwnedValue::F32(multiplier)),
            ],
            ..Change::default()
        })
    };
    for (multiplier, magnitude) in [(1.0, 1.0), (0.707, 1.085_726_4), (0.0, 1.368_888)] {
        let config = ModelConfig::read(&with_multiplier(multiplier)).unwrap();
        assert!((config.rope.magnitude() - magnitude).abs() < 1e-6);
    }
    let error = ModelConfig::read(&with_multiplier(f32::INFINITY)).unwrap_err();
    assert!(error.to_string().contains(MULTIPLIER), "{error}");

    let gguf = changed(Change {
        tensor: Some(("rope_freqs.weight", &[32], 8.0)),
        ..Change::default()
    });
    assert_eq!(
        ModelConfig::read(&gguf).unwrap().rope.freq_factors,
        Some(vec![8.0; 32])
    );
    for (dims, value, expected) in [
        ([31], 1.0, "[31]"),
        ([32], 0.0, "must be a number over 0"),
        ([32], f32::NAN, "NaN"),
    ] {
        let gguf = changed(Change {
            tensor: Some(("rope_freqs.weight", &dims, value)),
            ..Change::default()
        });
        let error = ModelConfig::read(&gguf).unwrap_err().to_string();
        assert!(
            error.contains("rope_freqs.weight") && error.contains(expected),
            "{error}"
        );
    }
}

#[test]
fn each_family_pairs_elements_in_its_own_way() {
    for (architecture, style) in [
        (Architecture::Llama, RopeStyle::Interleaved),
        (Architecture::Qwen2, RopeStyle::Halves),
        (Architecture::Qwen3, RopeStyle::Halves),
        (Architecture::Gemma3, RopeStyle::Halves),
    ] {
        let bytes = random_model_bytes(&Shape::tiny(architecture), GgmlType::Q4_K, Tokens::Bytes);
        let config = ModelConfig::read(&Gguf::from_bytes(bytes).unwrap()).unwrap();
        assert_eq!(config.rope.style, style);
    }
}
