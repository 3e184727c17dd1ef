//! gpt-oss: what its files say, experts in MXFP4 in both forms of files, and lies about them.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use mesh_model::gguf::writer::{OwnedValue, Writer};
use mesh_model::safetensors::{self, Dtype, Planned, Safetensors};
use mesh_model::synth::{Shape, Tokens, random_model, random_model_bytes, write_folder};
use mesh_model::{Activation, Architecture, GgmlType, Gguf, Model, ModelConfig, RopeScaling};
use serde_json::{Value, json};

fn shape() -> Shape {
    Shape {
        layers: 4,
        ..Shape::tiny(Architecture::GptOss)
    }
}

/// The configuration of the tiny file with other keys, and with the tensors as `change` gives them; none to
/// leave one out.
fn read(
    keys: &[(&str, OwnedValue)],
    change: impl Fn(&str, &[u64]) -> Option<Vec<u64>>,
) -> Result<ModelConfig, String> {
    let source = random_model_bytes(&shape(), GgmlType::MXFP4, Tokens::Bytes);
    let source = Gguf::from_bytes(source).unwrap();
    let mut writer = Writer::new();
    for (name, value) in source.metadata_iter() {
        let replaced = |(key, _): &(&str, OwnedValue)| name == format!("gpt-oss.{key}");
        if !keys.iter().any(replaced) {
            writer.copy_key(name, value);
        }
    }
    for (key, value) in keys {
        writer.key(&format!("gpt-oss.{key}"), value.clone());
    }
    for tensor in source.tensors().iter() {
        if let Some(dims) = change(tensor.name, tensor.dims) {
            writer.tensor(tensor.name, tensor.ty, &dims);
        }
    }
    let zeros = |_: &str, ty: GgmlType, dims: &[u64]| {
        let elements = dims.iter().product::<u64>() as usize;
        vec![0; elements / ty.block_size() * ty.type_size()]
    };
    let gguf = Gguf::from_bytes(writer.to_bytes(zeros).unwrap()).unwrap();
    ModelConfig::read(&gguf).map_err(|error| error.to_string())
}

fn same(_: &str, dims: &[u64]) -> Option<Vec<u64>> {
    Some(dims.to_vec())
}

#[test]
fn a_file_describes_the_network_as_llama_cpp_writes_it() {
    let text = |text: &str| OwnedValue::String(text.into());
    let keys = [
        ("attention.sliding_window", OwnedValue::U32(128)),
        ("rope.freq_base", OwnedValue::F32(150_000.0)),
        ("rope.scaling.type", text("yarn")),
        ("rope.scaling.factor", OwnedValue::F32(32.0)),
        (
            "rope.scaling.original_context_length",
            OwnedValue::U32(4096),
        ),
    ];
    let config = read(&keys, same).unwrap();
    assert_eq!(config.activation, Activation::ClampedSwiglu);
    assert!(config.attention_sinks && config.output_bias && config.qkv_bias);
    let mixture = config.mixture.as_ref().unwrap();
    assert!(mixture.biases && mixture.normalised);
    // Without a pattern every second layer has the window, the first among them.
    let windows = [0, 1, 2, 3].map(|layer| config.window_of(layer));
    assert_eq!(windows, [Some(128), None, Some(128), None]);
    for layer in 0..4 {
        assert_eq!(
            config.rope_of(layer).scaling,
            RopeScaling::Yarn {
                factor: 32.0,
                original_context: 4096,
                beta_fast: 32.0,
                beta_slow: 1.0,
                attention_factor: RopeScaling::yarn_attention_factor(32.0),
                truncate: false,
            }
        );
    }
    let idle = config.parameters() - config.active_parameters();
    assert_eq!(idle, 4 * (8 - 3) * (3 * 256 * 256 + 256 + 2 * 256));
}

#[test]
fn missing_and_lying_tensors_are_named() {
    for (tensor, lie, expected) in [
        (
            "blk.1.attn_sinks.weight",
            None,
            "\"blk.1.attn_sinks.weight\" is missing",
        ),
        ("blk.0.attn_sinks.weight", Some(vec![3]), "asks for [4]"),
        (
            "blk.2.ffn_gate_exps.bias",
            None,
            "\"blk.2.ffn_gate_exps.bias\" is missing",
        ),
        (
            "blk.2.ffn_up_exps.bias",
            Some(vec![256, 7]),
            "asks for [256, 8]",
        ),
        (
            "blk.2.ffn_down_exps.bias",
            Some(vec![256 * 8]),
            "asks for [256, 8]",
        ),
        ("blk.3.ffn_gate_inp.bias", Some(vec![9]), "asks for [8]"),
        (
            "blk.3.ffn_down_exps.weight",
            Some(vec![256, 256, 9]),
            "asks for [256, 256, 8]",
        ),
        (
            "blk.0.attn_output.bias",
            None,
            "\"blk.0.attn_output.bias\" is missing",
        ),
        (
            "blk.0.post_attention_norm.weight",
            None,
            "\"blk.0.post_attention_norm.weight\" is missing",
        ),
    ] {
        let change = |name: &str, dims: &[u64]| match name == tensor {
            true => lie.clone(),
            false => Some(dims.to_vec()),
        };
        let error = read(&[], change).unwrap_err();
        assert!(
            error.contains(tensor) && error.contains(expected),
            "{error}"
        );
    }
    for (key, value, expected) in [
        ("expert_count", 0, "\"gpt-oss.expert_count\" is 0"),
        (
            "expert_used_count",
            9,
            "\"gpt-oss.expert_used_count\" is 9: there are only 8",
        ),
        (
            "expert_feed_forward_length",
            128,
            "\"blk.0.ffn_gate_exps.bias\" has dimensions [256, 8]",
        ),
        (
            "attention.sliding_window",
            u32::MAX,
            "\"gpt-oss.attention.sliding_window\" is 4294967295",
        ),
    ] {
        let error = read(&[(key, OwnedValue::U32(value))], same).unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
}

/// A folder whose experts are in MXFP4, and the file that it was made from.
fn folder(dir: &Path) -> (PathBuf, Model) {
    let file = dir.join("tiny.gguf");
    random_model(&shape(), GgmlType::MXFP4, Tokens::Bytes, &file).unwrap();
    let (folder, original) = (dir.join("Tiny"), Model::open(&file).unwrap());
    write_folder(&original, Dtype::BF16, 1, &folder).unwrap();
    (folder, original)
}

#[test]
fn a_folder_has_the_experts_of_the_file_block_by_block() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, original) = folder(dir.path());
    let model = Model::open(&folder).unwrap();
    let expected = ModelConfig {
        name: Some(model.name()),
        ..original.config().clone()
    };
    assert_eq!(*model.config(), expected);
    for matrix in ["ffn_gate", "ffn_up", "ffn_down"] {
        let matrix = format!("blk.3.{matrix}");
        for expert in 0..8 {
            let [ours, theirs] = [&model, &original].map(|model| {
                let tensor = model.tensors().expert(&matrix, expert).unwrap();
                assert_eq!(tensor.ty, GgmlType::MXFP4);
                (tensor.dims.to_owned(), tensor.data.read().unwrap())
            });
            assert!(ours == theirs, "{matrix} of expert {expert}");
        }
    }
    for bias in ["ffn_gate_exps.bias", "ffn_up_exps.bias"] {
        let [ours, theirs] = [&model, &original].map(|model| {
            let tensor = model.tensors().get(&format!("blk.1.{bias}")).unwrap();
            tensor.to_f32().unwrap()
        });
        assert_eq!(ours, theirs, "{bias}");
    }
    // No more bytes than the file's: nothing is unpacked.
    let bytes = |model: &Model| model.tensors().file_len() as f64;
    assert!(bytes(&model) < 2.0 * bytes(&original));
}

/// A tensor of a safetensors file with its bytes.
type Stored = (Planned, Vec<u8>);

/// Writes the folder's weights anew as `change` leaves them, and gives the error of opening it.
fn opened(folder: &Path, change: impl FnOnce(&mut Vec<Stored>)) -> String {
    let path = folder.join("model.safetensors");
    let original = fs::read(&path).unwrap();
    let file = Safetensors::open(&path).unwrap();
    let stored = |tensor: safetensors::TensorView<'_>| {
        let plan = Planned {
            name: tensor.name.into(),
            dtype: tensor.dtype,
            shape: tensor.shape.into(),
        };
        (plan, tensor.data.read().unwrap().into_owned())
    };
    let mut tensors: Vec<Stored> = file.tensors().map(stored).collect();
    change(&mut tensors);
    let plans: Vec<Planned> = tensors.iter().map(|(plan, _)| plan.clone()).collect();
    safetensors::write(&mut File::create(&path).unwrap(), &plans, |plan, out| {
        let tensor = tensors.iter().find(|(other, _)| other.name == plan.name);
        out.write_all(&tensor.unwrap().1)
    })
    .unwrap();
    let error = Model::open(folder).expect_err("hostile").to_string();
    fs::write(&path, original).unwrap();
    error
}

fn named<'a>(tensors: &'a mut [Stored], name: &str) -> &'a mut Stored {
    let found = tensors.iter_mut().find(|(plan, _)| plan.name == name);
    found.unwrap()
}

#[test]
fn halves_of_mxfp4_that_do_not_fit_are_errors() {
    const GATE_UP: &str = "model.layers.2.mlp.experts.gate_up_proj";
    const DOWN: &str = "model.layers.0.mlp.experts.down_proj";
    let dir = tempfile::tempdir().unwrap();
    let (folder, _) = folder(dir.path());
    for (missing, left) in [("_scales", "_blocks"), ("_blocks", "_scales")] {
        let error = opened(&folder, |tensors| {
            tensors.retain(|(plan, _)| plan.name != format!("{DOWN}{missing}"));
        });
        let expected = format!("\"{DOWN}{left}\" is there without \"{DOWN}{missing}\"");
        assert!(error.contains(&expected), "{error}");
    }
    for (name, shape, dtype) in [
        (format!("{DOWN}_scales"), vec![8, 128, 16], Dtype::U8),
        (format!("{DOWN}_scales"), vec![8, 256, 8], Dtype::I8),
        (format!("{DOWN}_blocks"), vec![8, 256, 16, 8], Dtype::U8),
        (format!("{DOWN}_blocks"), vec![8, 256, 128], Dtype::U8),
        (format!("{GATE_UP}_blocks"), vec![8, 512, 8, 8], Dtype::U16),
        (format!("{GATE_UP}_blocks"), vec![4096, 1, 8, 16], Dtype::U8),
        (format!("{GATE_UP}_scales"), vec![0, 512, 8], Dtype::U8),
    ] {
        let error = opened(&folder, |tensors| {
            let (plan, bytes) = named(tensors, &name);
            (plan.shape, plan.dtype) = (shape.clone(), dtype);
            bytes.resize(plan.bytes() as usize, 0);
        });
        assert!(
            error.contains(&name) && error.contains(&format!("{shape:?}")),
            "{error}"
        );
    }
    // Fewer experts than the configuration has.
    let error = opened(&folder, |tensors| {
        for half in ["_blocks", "_scales"] {
            let (plan, bytes) = named(tensors, &format!("{DOWN}{half}"));
            plan.shape[0] = 7;
            bytes.truncate(plan.bytes() as usize);
        }
    });
    assert!(error.contains(DOWN) && error.contains("missing"), "{error}");
}

#[test]
fn experts_of_floats_that_do_not_fit_are_errors() {
    const GATE_UP: &str = "model.layers.1.mlp.experts.gate_up_proj";
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("tiny.gguf");
    random_model(&shape(), GgmlType::F16, Tokens::Bytes, &file).unwrap();
    let folder = dir.path().join("Tiny");
    write_folder(&Model::open(&file).unwrap(), Dtype::BF16, 1, &folder).unwrap();
    for (name, shape, expected) in [
        (GATE_UP.to_owned(), vec![8, 256 * 512], "1 to 1024 experts"),
        (
            GATE_UP.to_owned(),
            vec![8, 512, 255],
            "must hold the matrices",
        ),
        (
            GATE_UP.to_owned(),
            vec![2048, 256, 2],
            "must hold the matrices",
        ),
        (GATE_UP.to_owned(), vec![8, 512, 256], "has dimensions"),
        (
            format!("{GATE_UP}_bias"),
            vec![8, 511],
            "must hold the matrices",
        ),
        (format!("{GATE_UP}_bias"), vec![4, 512], "has dimensions"),
        (GATE_UP.to_owned(), vec![8, 0, 512], "no elements"),
    ] {
        let error = opened(&folder, |tensors| {
            let (plan, bytes) = named(tensors, &name);
            plan.shape = shape.clone();
            bytes.resize(plan.bytes() as usize, 0);
        });
        assert!(
            error.contains(&name) && error.contains(expected),
            "{shape:?}: {error}"
        );
    }
}

#[test]
fn configurations_that_the_kernels_do_not_have_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, _) = folder(dir.path());
    let path = folder.join("config.json");
    let original: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    for (key, value, expected) in [
        (
            "swiglu_limit",
            json!(10.0),
            "swiglu_limit = 10 instead of 7",
        ),
        ("swiglu_alpha", json!(1.0), "swiglu_alpha = 1"),
        (
            "quantization_config",
            json!({"quant_method": "gptq"}),
            "weights quantised by gptq",
        ),
        ("hidden_act", json!("gelu"), "the activation \"gelu\""),
        ("num_local_experts", json!(0), "\"num_local_experts\" is 0"),
    ] {
        let mut changed = original.clone();
        changed[key] = value;
        fs::write(&path, changed.to_string()).unwrap();
        let error = Model::open(&folder).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    // What the published configurations say, and what the class assumes without them.
    let mut plain = original.clone();
    for key in ["layer_types", "rope_scaling", "rope_theta"] {
        plain.as_object_mut().unwrap().remove(key);
    }
    plain["experts_per_token"] = json!(3);
    plain["initial_context_length"] = json!(4096);
    fs::write(&path, plain.to_string()).unwrap();
    let config = Model::open(&folder).unwrap().config().clone();
    assert_eq!(config.rope.base, 150_000.0);
    let RopeScaling::Yarn {
        factor, truncate, ..
    } = config.rope.scaling
    else {
        panic!("{:?}", config.rope.scaling);
    };
    assert_eq!((factor, truncate), (32.0, false));
    let windows = [0, 1, 2, 3].map(|layer| config.window_of(layer).is_some());
    assert_eq!(windows, [true, false, true, false]);
}
