//! Latent attention: both forms of its files, its cache, and what has no operators for it.

mod common;
mod reference;

use common::{cosine, last, logits, options, some_tokens, whole};
use mesh_engine::Stage;
use mesh_engine_ort::{Device, DeviceStage, OrtOptions, Provider, memory_bytes};
use mesh_kernels::KvFormat;
use mesh_model::gguf::writer::{OwnedValue, Writer};
use mesh_model::synth::{Shape, Tokens, random_model_bytes};
use mesh_model::{GgmlType, Gguf, Model};

/// The model of a GGUF file with these bytes.
fn model(bytes: Vec<u8>) -> Model {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("latent.gguf");
    std::fs::write(&path, bytes).unwrap();
    Model::open(&path).unwrap()
}

fn made(shape: &Shape, ty: GgmlType) -> Vec<u8> {
    random_model_bytes(shape, ty, Tokens::Bytes)
}

/// The model with the stacks of `split` in place of the matrices that they follow from.
fn joined(split: &Gguf) -> Vec<u8> {
    let target = Shape::tiny_deepseek(None, false);
    let plan = mesh_model::synth::plan(&target, GgmlType::F32, Tokens::Bytes);
    plan.to_bytes(|name, _, _| {
        let floats = |name: &str| split.tensors().get(name).unwrap().to_f32().unwrap();
        let values = match name.strip_suffix("attn_kv_b.weight") {
            None => floats(name),
            Some(layer) => {
                let keys = floats(&format!("{layer}attn_k_b.weight"));
                let values = floats(&format!("{layer}attn_v_b.weight"));
                let (plain, rank, value) = (64, 256, 64);
                let mut rows = Vec::new();
                let heads = keys.chunks(plain * rank).zip(values.chunks(rank * value));
                for (keys, values) in heads {
                    for row in 0..plain {
                        rows.extend(keys.iter().skip(row).step_by(plain));
                    }
                    rows.extend(values);
                }
                rows
            }
        };
        values.iter().flat_map(|x| x.to_le_bytes()).collect()
    })
    .unwrap()
}

#[test]
fn files_for_the_absorbed_form_give_the_same_logits() {
    let tokens = some_tokens(40);
    let run = |model: &Model| {
        // The cache of F32 weights is of 32 bits.
        let options = OrtOptions {
            kv: Some(KvFormat::F32),
            ..options(1, 64)
        };
        logits(&mut whole(model, options), &[last(0, 0, 40)], &tokens)
    };
    for (ty, most) in [
        (GgmlType::F32, 1e-4),
        (GgmlType::BF16, 1e-3),
        (GgmlType::F16, 1e-3),
    ] {
        let split = made(&Shape::tiny_deepseek(None, true), ty);
        let whole = joined(&Gguf::from_bytes(split.clone()).unwrap());
        let (found, expected) = (run(&model(split)), run(&model(whole)));
        let off = found.iter().zip(&expected).map(|(a, b)| (a - b).abs());
        let off = off.fold(0.0, f32::max);
        assert!(off < most, "{ty:?}: {off}");
    }
}

#[test]
fn stacks_of_keys_become_floats_and_count_as_such() {
    // Rows of 64 are whole blocks of Q8_0.
    let model = model(made(&Shape::tiny_deepseek(None, true), GgmlType::Q8_0));
    let stage = whole(&model, options(1, 64));
    let said = memory_bytes(&model, mesh_engine_ort::WeightFormat::File);
    let taken = stage.info().weight_bytes;
    let ratio = taken as f64 / said as f64;
    assert!((0.99..1.01).contains(&ratio), "{taken} of {said}");
}

#[test]
fn every_form_of_queries_and_stretched_contexts_agree_with_a_plain_forward_pass() {
    let tokens = some_tokens(40);
    let number = OwnedValue::F32;
    let key = |key: &str| format!("deepseek2.rope.scaling.{key}");
    let yarn = [
        (key("type"), OwnedValue::String("yarn".into())),
        (key("factor"), number(8.0)),
        (key("original_context_length"), OwnedValue::U32(32)),
        (key("yarn_beta_fast"), number(4.0)),
        (key("yarn_log_multiplier"), number(0.0707)),
        (key("attn_factor"), number(1.2)),
        ("deepseek2.expert_weights_scale".into(), number(2.0)),
    ];
    for (query_rank, keys) in [(None, &yarn[..0]), (Some(256), &yarn), (None, &yarn)] {
        let source = Gguf::from_bytes(made(
            &Shape::tiny_deepseek(query_rank, false),
            GgmlType::F32,
        ))
        .unwrap();
        let mut writer = Writer::new();
        for (name, value) in source.metadata_iter() {
            writer.copy_key(name, value);
        }
        for (name, value) in keys {
            writer.key(name, value.clone());
        }
        for tensor in source.tensors().iter() {
            writer.tensor(tensor.name, tensor.ty, tensor.dims);
        }
        let read = |name: &str, _, _: &[u64]| {
            let tensor = source.tensors().get(name).unwrap();
            tensor.data.read().unwrap().into_owned()
        };
        let model = model(writer.to_bytes(read).unwrap());
        let options = OrtOptions {
            kv: Some(KvFormat::F32),
            ..options(1, 64)
        };
        let found = logits(&mut whole(&model, options), &[last(0, 0, 40)], &tokens);
        let plain = reference::last_row(&model, &tokens);
        let found = cosine(&found, &plain);
        assert!(found > 0.999_999, "{query_rank:?}: {found}");
    }
}

#[test]
fn the_cache_has_a_key_and_a_value_for_every_head() {
    let model = model(made(&Shape::tiny_deepseek(None, false), GgmlType::Q4_0));
    let config = model.config();
    assert_eq!((config.head_dim, config.value_dim), (96, 64));
    let stage = whole(&model, options(1, 64));
    let bytes = 2 * config.layers as usize * config.kv_elements();
    assert_eq!(stage.info().kv_bytes_per_token, bytes as u64);
}

#[test]
fn execution_providers_refuse_it_by_name() {
    let model = model(made(&Shape::tiny_deepseek(None, false), GgmlType::Q4_0));
    let device = Device::new(Provider::Cpu);
    let error = DeviceStage::load(&model, 0..2, options(1, 32), device)
        .err()
        .unwrap();
    let error = error.to_string();
    assert!(error.contains("multi-head latent attention"), "{error}");
}
