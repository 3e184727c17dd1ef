//! Mixtures of experts: every family against the logits of `transformers` and a plain forward pass.

mod common;
mod reference;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::BufWriter;
use std::path::Path;

use common::{cosine, last, logits, options, some_tokens, whole};
use mesh_engine::{LogitRows, Segment, Stage};
use mesh_engine_ort::{OrtOptions, WeightFormat, memory_bytes};
use mesh_model::safetensors::{Dtype, Planned};
use mesh_model::synth::{
    Shape, Tokens, random_model, random_model_bytes, tokenizer_json, write_folder,
};
use mesh_model::{Architecture, GgmlType, Gguf, Model, safetensors};
use serde_json::Value;

const GOLDEN: [&str; 3] = [
    include_str!("data/mixtures.json"),
    include_str!("data/shared_experts.json"),
    include_str!("data/gpt_oss.json"),
];

/// The numbers of tests/data/make_mixtures.py.
fn weights(name: &str, count: usize) -> impl Iterator<Item = f32> {
    let seed = name.bytes().fold(2_166_136_261_u32, |state, byte| {
        (state ^ u32::from(byte)).wrapping_mul(16_777_619)
    });
    (0..count as u32).map(move |i| {
        let mut state = (i + 1).wrapping_mul(2_654_435_761).wrapping_add(seed);
        state = (state ^ (state >> 15)).wrapping_mul(2_246_822_519);
        state = (state ^ (state >> 13)).wrapping_mul(3_266_489_917);
        state ^= state >> 16;
        (state >> 8) as f32 * 2f32.powi(-23) - 1.0
    })
}

/// Writes the model of a case as `transformers` saves it.
fn write_case(case: &Value, dir: &Path) {
    std::fs::write(dir.join("config.json"), case["config"].to_string()).unwrap();
    let bytes = random_model_bytes(
        &Shape::tiny(Architecture::Llama),
        GgmlType::F16,
        Tokens::Bytes,
    );
    // Its tokens beyond the case's vocabulary are padding.
    let mut tokenizer = tokenizer_json(&Gguf::from_bytes(bytes).unwrap()).unwrap();
    let vocab = case["config"]["vocab_size"].as_u64().unwrap();
    let tokens = tokenizer["model"]["vocab"].as_object_mut().unwrap();
    tokens.retain(|_, id| id.as_u64().unwrap() < vocab);
    std::fs::write(dir.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let shapes: BTreeMap<String, Vec<u64>> =
        serde_json::from_value(case["tensors"].clone()).unwrap();
    let planned = shapes.into_iter().map(|(name, shape)| Planned {
        dtype: match name.ends_with("_blocks") || name.ends_with("_scales") {
            true => Dtype::U8,
            false => Dtype::F32,
        },
        name,
        shape,
    });
    let mut out = BufWriter::new(File::create(dir.join("model.safetensors")).unwrap());
    safetensors::write(&mut out, &planned.collect::<Vec<_>>(), |tensor, out| {
        let count = tensor.shape.iter().product::<u64>() as usize;
        let base = if tensor.shape.len() == 1 { 1.0 } else { 0.0 };
        weights(&tensor.name, count).try_for_each(|x| match &*tensor.name {
            name if name.ends_with("_blocks") => out.write_all(&[((x + 1.0) * 128.0) as u8]),
            name if name.ends_with("_scales") => out.write_all(&[((x + 1.0) * 2.0) as u8 + 121]),
            name if name.ends_with("gate_up_proj_bias") => out.write_all(&(8.0 * x).to_le_bytes()),
            _ => out.write_all(&(base + 0.25 * x).to_le_bytes()),
        })
    })
    .unwrap();
}

/// Tokens, rows and cases of a file of golden numbers.
fn golden(json: &str) -> (Vec<u32>, Vec<usize>, Vec<Value>) {
    let golden: Value = serde_json::from_str(json).unwrap();
    (
        serde_json::from_value(golden["tokens"].clone()).unwrap(),
        serde_json::from_value(golden["rows"].clone()).unwrap(),
        serde_json::from_value(golden["cases"].clone()).unwrap(),
    )
}

/// The `rows` of all logits.
fn chosen(all: &[f32], rows: &[usize], vocab: usize) -> Vec<f32> {
    let rows = rows.iter().flat_map(|row| &all[row * vocab..][..vocab]);
    rows.copied().collect()
}

/// Fails if numbers differ by 1e-3 or more.
#[track_caller]
fn assert_close(ours: &[f32], case: &Value) {
    let theirs: Vec<f64> = serde_json::from_value(case["logits"].clone()).unwrap();
    assert_eq!(ours.len(), theirs.len());
    let pairs = ours.iter().zip(theirs);
    let most = pairs.map(|(ours, theirs)| (f64::from(*ours) - theirs).abs());
    let most = most.fold(0.0, f64::max);
    assert!(
        most < 1e-3,
        "{}: logits differ by up to {most}",
        case["name"]
    );
}

#[test]
fn logits_are_those_of_transformers() {
    for (tokens, rows, cases) in GOLDEN.map(golden) {
        for case in cases {
            let dir = tempfile::tempdir().unwrap();
            write_case(&case, dir.path());
            let model = Model::open(dir.path()).unwrap();
            let mut stage = whole(&model, options(1, 64));
            let all = Segment {
                logits: LogitRows::All,
                ..last(0, 0, tokens.len())
            };
            let ours = logits(&mut stage, &[all], &tokens);
            let vocab = model.config().vocab;
            if case["config"]["quantization_config"].is_null() {
                assert_close(&chosen(&ours, &rows, vocab), &case);
                continue;
            }
            // The kernels round what they multiply quantised weights with. So the weights are checked with a
            // plain forward pass, and the kernels with that.
            let plain = reference::forward(&model, &tokens);
            assert_close(&chosen(&plain, &rows, vocab), &case);
            for row in 0..tokens.len() {
                let [ours, plain] = [&ours, &plain].map(|all| chosen(all, &[row], vocab));
                let cosine = cosine(&ours, &plain);
                assert!(cosine > 0.99, "{}, row {row}: {cosine}", case["name"]);
            }
        }
    }
}

fn made(shape: &Shape, ty: GgmlType) -> Model {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mixture.gguf");
    random_model(shape, ty, Tokens::Bytes, &path).unwrap();
    Model::open(&path).unwrap()
}

#[test]
fn mixtures_behind_a_dense_layer_and_with_windows_agree_with_a_plain_forward_pass() {
    let tokens = some_tokens(40);
    let families = [
        (Architecture::Qwen3Moe, GgmlType::Q8_0),
        (Architecture::Qwen2Moe, GgmlType::Q8_0),
        (Architecture::Deepseek2, GgmlType::Q8_0),
        // There are more tokens than the windows of its layers, which alternate.
        (Architecture::GptOss, GgmlType::MXFP4),
    ];
    for (family, ty) in families {
        let mut shape = Shape {
            layers: 3,
            ..Shape::tiny(family)
        };
        if let (Some(mixture), true) = (&mut shape.mixture, family != Architecture::GptOss) {
            mixture.leading_dense = 1;
        }
        let model = made(&shape, ty);
        let mut stage = whole(&model, options(1, 64));
        let found = logits(&mut stage, &[last(0, 0, 40)], &tokens);
        let cosine = cosine(&found, &reference::last_row(&model, &tokens));
        assert!(cosine > 0.95, "{shape:?}: {cosine}");
    }
}

#[test]
fn experts_of_different_types_and_a_mixtral_agree_with_a_plain_forward_pass() {
    let tokens = some_tokens(24);
    for (ty, least) in [
        (GgmlType::F32, 0.999_999),
        // Rounding chooses another expert where two scores are almost equal.
        (GgmlType::Q5_K, 0.95),
        (GgmlType::Q4_0, 0.95),
    ] {
        let model = made(&Shape::tiny_mixtral(), ty);
        let found = logits(
            &mut whole(&model, options(1, 32)),
            &[last(0, 0, 24)],
            &tokens,
        );
        let plain = reference::last_row(&model, &tokens);
        assert!(cosine(&found, &plain) > least, "{ty:?}");
    }
    // A folder has floats, which are quantised at the load.
    for shape in [
        Shape::tiny(Architecture::GraniteMoe),
        Shape::tiny_granite_shared(),
        Shape::tiny(Architecture::Qwen2Moe),
        Shape::tiny(Architecture::Deepseek2),
    ] {
        a_folder_agrees_with_a_plain_forward_pass(&shape);
    }
}

fn a_folder_agrees_with_a_plain_forward_pass(shape: &Shape) {
    let tokens = some_tokens(24);
    let dir = tempfile::tempdir().unwrap();
    let original = made_in(dir.path(), shape, GgmlType::F32);
    let folder = dir.path().join("Folder");
    write_folder(&original, Dtype::F32, 2, &folder).unwrap();
    let model = Model::open(&folder).unwrap();
    let plain = reference::last_row(&original, &tokens);
    // The file itself, whose weights are the same.
    let of_file = logits(
        &mut whole(&original, options(1, 32)),
        &[last(0, 0, 24)],
        &tokens,
    );
    let of_folder = logits(
        &mut whole(&model, options(1, 32)),
        &[last(0, 0, 24)],
        &tokens,
    );
    let off = of_file.iter().zip(&of_folder).map(|(a, b)| (a - b).abs());
    assert!(off.fold(0.0, f32::max) < 1e-3);
    for (weights, least) in [
        (WeightFormat::File, 0.999_999),
        (WeightFormat::Int8, 0.95),
        (WeightFormat::Int4, 0.9),
    ] {
        let options = OrtOptions {
            weights,
            ..options(1, 32)
        };
        let found = logits(&mut whole(&model, options), &[last(0, 0, 24)], &tokens);
        let found = cosine(&found, &plain);
        assert!(found > least, "{weights:?}: {found}");
    }
}

fn made_in(dir: &Path, shape: &Shape, ty: GgmlType) -> Model {
    let path = dir.join("mixture.gguf");
    random_model(shape, ty, Tokens::Bytes, &path).unwrap();
    Model::open(&path).unwrap()
}

#[test]
fn all_experts_count_as_bytes_of_the_stage() {
    for (architecture, ty) in [
        (Architecture::Olmoe, GgmlType::Q8_0),
        (Architecture::GptOss, GgmlType::MXFP4),
    ] {
        let model = made(&Shape::tiny(architecture), ty);
        let stage = whole(&model, options(1, 32));
        let matrices = model
            .tensors()
            .iter()
            .filter(|tensor| tensor.dims.len() > 1 && !tensor.name.ends_with(".bias"));
        let in_file: u64 = matrices.map(|tensor| tensor.data.len() as u64).sum();
        let bytes = stage.info().weight_bytes;
        let ratio = bytes as f64 / in_file as f64;
        assert!((1.0..1.02).contains(&ratio), "{architecture:?}: {ratio}");
        assert_eq!(bytes, memory_bytes(&model, WeightFormat::File));
    }
}
