//! Windowed layers and other features of gemma3, from the metadata of models of several sizes.

use mesh_model::gguf::writer::{OwnedValue, Writer};
use mesh_model::synth::{Shape, Tokens, random_model_bytes};
use mesh_model::{Architecture, GgmlType, Gguf, ModelConfig, RopeScaling};

/// A small network of `layers` layers whose heads are wider than their share of a hidden row.
fn shape(architecture: Architecture, layers: u32) -> Shape {
    Shape {
        layers,
        hidden: 64,
        heads: 4,
        kv_heads: 2,
        head_dim: 32,
        ffn: 64,
        window: None,
        ..Shape::tiny(architecture)
    }
}

/// The configuration of its file with additional `keys`.
fn read(shape: &Shape, keys: &[(&str, OwnedValue)]) -> Result<ModelConfig, String> {
    let bytes = random_model_bytes(shape, GgmlType::Q8_0, Tokens::Bytes);
    let source = Gguf::from_bytes(bytes).unwrap();
    let key = |name: &str| format!("{}.{name}", shape.architecture.name());
    let mut writer = Writer::new();
    for (name, value) in source.metadata_iter() {
        if !keys.iter().any(|(other, _)| key(other) == name) {
            writer.copy_key(name, value);
        }
    }
    for (name, value) in keys {
        writer.key(&key(name), value.clone());
    }
    for tensor in source.tensors().iter() {
        writer.tensor(tensor.name, tensor.ty, tensor.dims);
    }
    let bytes = writer
        .to_bytes(|name, _, _| {
            source
                .tensors()
                .get(name)
                .unwrap()
                .data
                .read()
                .unwrap()
                .into_owned()
        })
        .unwrap();
    ModelConfig::read(&Gguf::from_bytes(bytes).unwrap()).map_err(|error| error.to_string())
}

/// The layers that see all positions.
fn global(config: &ModelConfig) -> Vec<u32> {
    let layers = 0..config.layers;
    layers
        .filter(|&layer| config.window_of(layer).is_none())
        .collect()
}

fn size(positions: u32) -> (&'static str, OwnedValue) {
    ("attention.sliding_window", OwnedValue::U32(positions))
}

const PATTERN: &str = "attention.sliding_window_pattern";

#[test]
fn every_sixth_layer_of_gemma3_sees_all_and_only_those_are_stretched() {
    // As files of the 4B model have it: no pattern, no base for layers with a window.
    let scaling = [
        ("rope.scaling.type", OwnedValue::String("linear".into())),
        ("rope.scaling.factor", OwnedValue::F32(8.0)),
        ("rope.freq_base", OwnedValue::F32(1e6)),
        size(1024),
    ];
    let config = read(&shape(Architecture::Gemma3, 34), &scaling).unwrap();
    assert_eq!(global(&config), [5, 11, 17, 23, 29]);
    assert_eq!(config.window_of(0), Some(1024));
    let (local, all) = (config.rope_of(33), config.rope_of(5));
    assert_eq!((local.base, local.scaling), (1e4, RopeScaling::None));
    assert_eq!(
        (all.base, all.scaling),
        (1e6, RopeScaling::Linear { factor: 8.0 })
    );
    assert_eq!((config.query_scalar, config.embedding_scale), (32.0, 8.0));

    let other = [size(9), ("rope.freq_base_swa", OwnedValue::F32(5e4))];
    let config = read(&shape(Architecture::Gemma3, 6), &other).unwrap();
    assert_eq!(config.rope_of(0).base, 5e4);
}

#[test]
fn the_largest_gemma3_divides_scores_by_something_else_than_its_heads_width() {
    let config = read(&shape(Architecture::Gemma3, 62), &[size(1024)]).unwrap();
    assert_eq!(config.query_scalar, 16.0);
    let scale = [("attention.scale", OwnedValue::F32(0.5))];
    assert_eq!(
        read(&shape(Architecture::Gemma3, 2), &scale)
            .unwrap()
            .query_scalar,
        4.0
    );
}

#[test]
fn other_families_have_the_window_everywhere_unless_the_file_has_a_pattern() {
    for architecture in [
        Architecture::Llama,
        Architecture::Qwen2,
        Architecture::Qwen3,
    ] {
        let shape = shape(architecture, 4);
        let config = read(&shape, &[size(40)]).unwrap();
        assert!(global(&config).is_empty());
        assert_eq!(config.rope_of(0), &config.rope);
        for (pattern, expected) in [
            (OwnedValue::U32(2), vec![1, 3]),
            (OwnedValue::U32(0), vec![]),
            (OwnedValue::U32(1), vec![0, 1, 2, 3]),
            (
                OwnedValue::Bools(vec![false, true, true, false]),
                vec![0, 3],
            ),
        ] {
            let config = read(&shape, &[size(40), (PATTERN, pattern)]).unwrap();
            assert_eq!(global(&config), expected);
        }
        for keys in [vec![], vec![size(0)]] {
            assert_eq!(read(&shape, &keys).unwrap().window, None);
        }
    }
}

#[test]
fn windows_and_patterns_that_fit_no_network_are_named() {
    let shape = shape(Architecture::Gemma3, 4);
    for (keys, expected) in [
        (
            vec![size(u32::MAX)],
            "gemma3.attention.sliding_window\" is 4294967295",
        ),
        (
            vec![size(9), (PATTERN, OwnedValue::Bools(vec![true; 3]))],
            "a flag for each of the 4 layers",
        ),
        (
            vec![size(9), (PATTERN, OwnedValue::U32(u32::MAX))],
            "it must be at most 4096",
        ),
        (
            vec![size(9), (PATTERN, OwnedValue::String("all".into()))],
            "is the string \"all\"",
        ),
        (
            vec![size(9), ("rope.freq_base_swa", OwnedValue::F32(0.5))],
            "it must be over 1",
        ),
        (
            vec![("final_logit_softcapping", OwnedValue::F32(30.0))],
            "soft capping (gemma3.final_logit_softcapping = 30)",
        ),
    ] {
        let error = read(&shape, &keys).unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
}
