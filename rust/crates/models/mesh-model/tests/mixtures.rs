//! Mixtures of experts: what their keys and tensors say, and lies about them.

use mesh_model::gguf::expert_name;
use mesh_model::gguf::writer::OwnedValue;
use mesh_model::synth::{Shape, Tokens, random_model_bytes};
use mesh_model::{Architecture, ConfigError, GgmlType, Gguf, Mixture, ModelConfig, SharedExpert};

fn source(shape: &Shape) -> Gguf {
    Gguf::from_bytes(random_model_bytes(shape, GgmlType::F16, Tokens::Bytes)).unwrap()
}

/// A file with zeros for weights, the keys of `source` with some replaced, and the tensors of `source` as
/// `change` gives them.
fn rewritten(
    source: &Gguf,
    keys: &[(&str, OwnedValue)],
    change: impl Fn(&str, &[u64]) -> Vec<(String, Vec<u64>)>,
) -> Gguf {
    let mut writer = mesh_model::gguf::Writer::new();
    for (name, value) in source.metadata_iter() {
        if keys.iter().all(|(replaced, _)| *replaced != name) {
            writer.copy_key(name, value);
        }
    }
    for (name, value) in keys {
        writer.key(name, value.clone());
    }
    for tensor in source.tensors().iter() {
        for (name, dims) in change(tensor.name, tensor.dims) {
            writer.tensor(&name, tensor.ty, &dims);
        }
    }
    let zeros = |_: &str, ty: GgmlType, dims: &[u64]| {
        let elements = dims.iter().product::<u64>() as usize;
        vec![0; elements / ty.block_size() * ty.type_size()]
    };
    Gguf::from_bytes(writer.to_bytes(zeros).unwrap()).unwrap()
}

fn same(name: &str, dims: &[u64]) -> Vec<(String, Vec<u64>)> {
    vec![(name.to_owned(), dims.to_owned())]
}

fn read(keys: &[(&str, OwnedValue)]) -> Result<ModelConfig, ConfigError> {
    let source = source(&Shape::tiny(Architecture::Qwen3Moe));
    ModelConfig::read(&rewritten(&source, keys, same))
}

#[test]
fn every_family_says_how_it_weighs_experts() {
    let of = |shape: &Shape| ModelConfig::read(&source(shape)).unwrap();
    let tiny = Mixture {
        experts: 8,
        used: 3,
        ffn: 256,
        normalised: true,
        scale: 1.0,
        leading_dense: 0,
        biases: false,
        shared: None,
    };
    for (architecture, normalised) in [
        (Architecture::Qwen3Moe, true),
        (Architecture::Olmoe, false),
        (Architecture::GraniteMoe, true),
    ] {
        let config = of(&Shape::tiny(architecture));
        let expected = Mixture {
            normalised,
            ..tiny.clone()
        };
        assert_eq!(config.mixture, Some(expected), "{architecture:?}");
    }
    assert_eq!(of(&Shape::tiny_mixtral()).mixture, Some(tiny));
    assert_eq!(of(&Shape::tiny(Architecture::Llama)).mixture, None);
    let shared = |shape: &Shape| {
        let mixture = of(shape).mixture.unwrap();
        (mixture.normalised, mixture.shared)
    };
    let expert = |gated| Some(SharedExpert { ffn: 512, gated });
    for (shape, normalised, gated) in [
        (Shape::tiny_granite_shared(), true, false),
        (Shape::tiny(Architecture::Qwen2Moe), false, true),
        (Shape::tiny(Architecture::Deepseek2), false, false),
    ] {
        assert_eq!(shared(&shape), (normalised, expert(gated)));
    }
    let granite = of(&Shape::tiny(Architecture::GraniteMoe));
    assert_eq!(
        (granite.embedding_scale, granite.residual_scale),
        (12.0, 0.25)
    );
    assert_eq!(granite.logit_divisor, 6.0);
    assert!((1.0 / granite.query_scalar.sqrt() - 1.0 / 64.0).abs() < 1e-6);
    assert!(of(&Shape::tiny(Architecture::Olmoe)).qk_norm_over_heads);
}

#[test]
fn of_all_weights_only_those_of_used_experts_are_active() {
    let shape = Shape::qwen3_30b_a3b(1);
    let shape = Shape {
        vocab: 300,
        hidden: 256,
        ..shape
    };
    let config = ModelConfig::read(&source(&shape)).unwrap();
    let expert = 3 * 256 * 768;
    let idle = config.parameters() - config.active_parameters();
    assert_eq!(idle, (128 - 8) * expert);
    // A shared expert is active always.
    for shape in [
        Shape::tiny_granite_shared(),
        Shape::tiny(Architecture::Deepseek2),
    ] {
        let file = source(&shape);
        let config = ModelConfig::read(&file).unwrap();
        let elements = file.tensors().iter().map(|tensor| tensor.elements());
        assert_eq!(config.parameters(), elements.sum::<u64>());
        let mixtures =
            u64::from(shape.layers) - shape.mixture.map_or(0, |m| m.leading_dense.into());
        let idle = config.parameters() - config.active_parameters();
        assert_eq!(idle, mixtures * (8 - 3) * 3 * 256 * 256);
    }
    let dense = source(&Shape::tiny(Architecture::Qwen3));
    let dense = ModelConfig::read(&dense).unwrap();
    assert_eq!(dense.parameters(), dense.active_parameters());
}

#[test]
fn lying_numbers_of_experts_are_named() {
    let count = |n| ("qwen3moe.expert_count", OwnedValue::U32(n));
    let used = |n| ("qwen3moe.expert_used_count", OwnedValue::U32(n));
    for (keys, expected) in [
        (
            count(0),
            "\"qwen3moe.expert_count\" is 0: it must be from 1 to 1024",
        ),
        (
            count(5000),
            "\"qwen3moe.expert_count\" is 5000: it must be from 1 to 1024",
        ),
        (
            used(0),
            "\"qwen3moe.expert_used_count\" is 0: it must be from 1 to 1024",
        ),
        (
            used(9),
            "\"qwen3moe.expert_used_count\" is 9: there are only 8 experts",
        ),
        (
            count(9),
            "tensor \"blk.0.ffn_gate_inp.weight\" has dimensions [256, 8]",
        ),
        (
            ("qwen3moe.expert_feed_forward_length", OwnedValue::U32(128)),
            "tensor \"blk.0.ffn_gate_exps.weight\" has dimensions [256, 256, 8], but the metadata asks for [256, 128, 8]",
        ),
        (
            ("qwen3moe.expert_shared_count", OwnedValue::U32(1)),
            "the model needs a mixture with qwen3moe.expert_shared_count = 1",
        ),
        (
            ("qwen3moe.expert_gating_func", OwnedValue::U32(2)),
            "the model needs a mixture with qwen3moe.expert_gating_func = 2",
        ),
        (
            (
                "qwen3moe.leading_dense_block_count",
                OwnedValue::U32(u32::MAX),
            ),
            "it must be at most 4096",
        ),
    ] {
        let error = read(&[keys]).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    // A family without experts.
    let dense = source(&Shape::tiny(Architecture::Qwen3));
    let key = ("qwen3.expert_count", OwnedValue::U32(8));
    let error = ModelConfig::read(&rewritten(&dense, &[key], same)).unwrap_err();
    assert!(
        error.to_string().contains("a mixture of 8 experts"),
        "{error}"
    );
}

#[test]
fn experts_may_have_tensors_of_their_own() {
    let source = source(&Shape::tiny_mixtral());
    let apart = |count: u64| {
        move |name: &str, dims: &[u64]| match name.strip_suffix("_exps.weight") {
            None => same(name, dims),
            Some(matrix) => (0..count)
                .map(|expert| (expert_name(matrix, expert as usize), dims[..2].to_vec()))
                .collect(),
        }
    };
    let whole = ModelConfig::read(&rewritten(&source, &[], apart(8))).unwrap();
    assert_eq!(whole, ModelConfig::read(&source).unwrap());
    let error = |count| {
        let gguf = rewritten(&source, &[], apart(count));
        ModelConfig::read(&gguf).unwrap_err().to_string()
    };
    let missing = error(7);
    assert!(
        missing.contains("\"blk.0.ffn_gate.7.weight\" is missing"),
        "{missing}"
    );
    let foreign = error(9);
    assert!(
        foreign.contains("\"blk.0.ffn_gate.8.weight\" has no place"),
        "{foreign}"
    );
    let both = rewritten(&source, &[], |name, dims| {
        [same(name, dims), apart(8)(name, dims)]
            .concat()
            .into_iter()
            .filter(|(made, _)| name.contains("_exps") || made == name)
            .fold(Vec::new(), |mut all, one| {
                if !all.contains(&one) {
                    all.push(one);
                }
                all
            })
    });
    let error = ModelConfig::read(&both).unwrap_err().to_string();
    assert!(
        error.contains("\"blk.0.ffn_gate_exps.weight\" has no place"),
        "{error}"
    );
}

#[test]
fn a_part_of_a_stack_is_an_expert() {
    let gguf = source(&Shape::tiny_mixtral());
    let stack = gguf.tensors().get("blk.1.ffn_down_exps.weight").unwrap();
    let all = stack.to_f32().unwrap();
    let one = all.len() / 8;
    for expert in [0, 3, 7] {
        let tensor = gguf.tensors().expert("blk.1.ffn_down", expert).unwrap();
        assert_eq!(tensor.dims, [256, 256]);
        assert_eq!(tensor.to_f32().unwrap(), all[expert * one..][..one]);
    }
    for (matrix, expert) in [
        ("blk.1.ffn_down", 8),
        ("blk.1.ffn_down", usize::MAX),
        ("blk.9.ffn_up", 0),
    ] {
        assert!(gguf.tensors().expert(matrix, expert).is_none());
    }
}

#[test]
fn the_first_layers_may_be_dense() {
    let mut shape = Shape::tiny(Architecture::Qwen3Moe);
    if let Some(mixture) = &mut shape.mixture {
        mixture.leading_dense = 1;
    }
    let config = ModelConfig::read(&source(&shape)).unwrap();
    assert!(config.mixture_of(0).is_none() && config.mixture_of(1).is_some());
}
