//! Folders made here, against the GGUF files that they were made from, and hostile ones.

use std::path::Path;

use serde_json::{Value, json};

use super::*;
use crate::config::{Architecture, ModelConfig, RopeScaling, RopeStyle};
use crate::model::Model;
use crate::safetensors::Dtype;
use crate::synth::{Shape, Tokens, random_model, write_folder};
use crate::tokenizer::EncodeOptions;

fn gguf_model(architecture: Architecture, dir: &Path) -> Model {
    let path = dir.join("tiny.gguf");
    let shape = Shape::tiny(architecture);
    random_model(&shape, GgmlType::F16, Tokens::Bytes, &path).unwrap();
    Model::open(&path).unwrap()
}

/// A tiny model in a folder.
fn folder(architecture: Architecture, shards: usize) -> (tempfile::TempDir, std::path::PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("Tiny-1");
    let model = gguf_model(architecture, dir.path());
    write_folder(&model, Dtype::BF16, shards, &path).unwrap();
    (dir, path)
}

fn edit(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut json = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    change(&mut json);
    std::fs::write(path, json.to_string()).unwrap();
}

fn error(path: &Path) -> String {
    Model::open(path).expect_err("hostile").to_string()
}

#[test]
fn a_folder_is_the_model_that_it_was_made_from() {
    for architecture in Architecture::ALL {
        let dir = tempfile::tempdir().unwrap();
        let original = gguf_model(architecture, dir.path());
        for (shards, dtype) in [(1, Dtype::F32), (3, Dtype::F16)] {
            let path = dir.path().join(format!("Folder-{shards}.v1"));
            write_folder(&original, dtype, shards, &path).unwrap();
            let model = Model::open(&path).unwrap();
            assert_eq!(model.name(), format!("Folder-{shards}.v1"));
            let mut expected = ModelConfig {
                name: Some(model.name()),
                ..original.config().clone()
            };
            let turns = [Architecture::Llama, Architecture::GraniteMoe].contains(&architecture);
            if turns {
                assert_eq!(expected.rope.style, RopeStyle::Interleaved);
                expected.rope.style = RopeStyle::Halves;
            }
            if architecture == Architecture::Gemma3 {
                expected.norm_offset = 1.0;
            }
            assert_eq!(*model.config(), expected);
            for tensor in original.tensors().iter() {
                // The file has F32 for routers, the folder one type for all matrices.
                let rounded = tensor.name.ends_with("ffn_gate_inp.weight") && dtype != Dtype::F32;
                if rounded || tensor.name.ends_with("_exps.weight") {
                    continue;
                }
                let ours = model.tensors().get(tensor.name).unwrap();
                assert_eq!(ours.dims, tensor.dims);
                let mut theirs = tensor.to_f32().unwrap();
                if architecture == Architecture::Gemma3 && tensor.name.ends_with("norm.weight") {
                    theirs.iter_mut().for_each(|x| *x -= 1.0);
                }
                let turned = tensor.name.ends_with("attn_q.weight")
                    || tensor.name.ends_with("attn_k.weight");
                if !turns || !turned {
                    assert_eq!(ours.to_f32().unwrap(), theirs, "{}", tensor.name);
                }
            }
            assert_same_experts(&model, &original);
            let text = "hello 🦀\n<|im_end|> 12";
            for options in [EncodeOptions::RENDERED_CHAT, EncodeOptions::PLAIN] {
                let ids = model.tokenizer().encode(text, options).unwrap();
                assert_eq!(ids, original.tokenizer().encode(text, options).unwrap());
                assert_eq!(
                    model.tokenizer().decode(&ids),
                    original.tokenizer().decode(&ids)
                );
            }
            assert_eq!(model.tokenizer().eos_ids(), original.tokenizer().eos_ids());
            assert!(model.template().is_fallback());
            model.tensors().check_unchanged().unwrap();
        }
    }
}

/// A folder has a tensor for each expert, or one for all with gate and up together; the file has stacks.
fn assert_same_experts(folder: &Model, file: &Model) {
    let Some(mixture) = &file.config().mixture else {
        return;
    };
    for layer in mixture.leading_dense..file.config().layers {
        for matrix in ["ffn_gate", "ffn_up", "ffn_down"] {
            let matrix = format!("blk.{layer}.{matrix}");
            for expert in 0..mixture.experts {
                let [ours, theirs] = [folder, file].map(|model| {
                    let tensor = model.tensors().expert(&matrix, expert).unwrap();
                    (tensor.dims.to_owned(), tensor.to_f32().unwrap())
                });
                assert_eq!(ours, theirs, "{matrix} of expert {expert}");
            }
        }
    }
}

#[test]
fn a_mixtral_in_a_folder_is_a_llama_with_experts() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("tiny.gguf");
    random_model(&Shape::tiny_mixtral(), GgmlType::F16, Tokens::Bytes, &file).unwrap();
    let original = Model::open(&file).unwrap();
    let path = dir.path().join("Mix");
    write_folder(&original, Dtype::F16, 2, &path).unwrap();
    let model = Model::open(&path).unwrap();
    assert_eq!(model.config().architecture, Architecture::Llama);
    assert_eq!(model.config().mixture, original.config().mixture);
    assert_same_experts(&model, &original);
}

#[test]
fn a_file_of_weights_stands_for_its_folder() {
    let (_dir, path) = folder(Architecture::Qwen2, 3);
    let whole = Model::open(&path).unwrap();
    let shard = Model::open(path.join("model-00002-of-00003.safetensors")).unwrap();
    assert_eq!(shard.fingerprint().unwrap(), whole.fingerprint().unwrap());
    assert_eq!(shard.tensors().iter().len(), whole.tensors().iter().len());

    let (_dir, path) = folder(Architecture::Qwen2, 1);
    let whole = Model::open(&path).unwrap();
    let file = Model::open(path.join("model.safetensors")).unwrap();
    assert_eq!(file.fingerprint().unwrap(), whole.fingerprint().unwrap());
    std::fs::rename(
        path.join("model.safetensors"),
        path.join("other.safetensors"),
    )
    .unwrap();
    Model::open(&path).expect("the only one there is");
    std::fs::copy(
        path.join("other.safetensors"),
        path.join("third.safetensors"),
    )
    .unwrap();
    assert!(error(&path).contains("several .safetensors files"));
    Model::open(path.join("third.safetensors")).expect("asked for by name");
}

#[test]
fn the_fingerprint_is_over_all_files() {
    let (_dir, path) = folder(Architecture::Qwen3, 2);
    let fingerprint = || {
        Model::open(&path)
            .unwrap()
            .fingerprint()
            .unwrap()
            .to_owned()
    };
    let first = fingerprint();
    assert_eq!(first.len(), 64);
    assert_eq!(first, fingerprint());
    edit(&path.join("generation_config.json"), |json| {
        json["eos_token_id"] = 5.into()
    });
    assert_ne!(first, fingerprint());
}

fn config_of(change: impl FnOnce(&mut Value)) -> ModelConfig {
    let (_dir, path) = folder(Architecture::Llama, 1);
    edit(&path.join("config.json"), change);
    Model::open(&path).unwrap().config().clone()
}

#[test]
fn rope_scalings_are_those_of_the_configuration() {
    let linear = config_of(|json| json["rope_scaling"] = json!({"type": "linear", "factor": 2.0}));
    assert_eq!(linear.rope.scaling, RopeScaling::Linear { factor: 2.0 });

    let yarn = config_of(|json| {
        json["rope_scaling"] =
            json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512});
    });
    let RopeScaling::Yarn {
        factor,
        original_context,
        attention_factor,
        ..
    } = yarn.rope.scaling
    else {
        panic!("{:?}", yarn.rope.scaling);
    };
    assert_eq!((factor, original_context, yarn.context), (4.0, 512, 2048));
    assert!((attention_factor - (1.0 + 0.1 * 4f32.ln())).abs() < 1e-6);
    let yarn = config_of(|json| {
        json["rope_scaling"] = json!({"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5});
    });
    assert!((yarn.rope.magnitude() - 1.5).abs() < 1e-6);
    for (all, magnitude) in [(json!(0.707), 1.085_726_4), (json!(0), 1.368_888)] {
        let yarn = config_of(|json| {
            json["rope_parameters"] = json!({
                "rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": all,
                "truncate": false, "rope_theta": 10000.0,
            });
        });
        assert!((yarn.rope.magnitude() - magnitude).abs() < 1e-6);
        let RopeScaling::Yarn { truncate, .. } = yarn.rope.scaling else {
            panic!("{:?}", yarn.rope.scaling);
        };
        assert!(!truncate);
    }

    // The same frequencies as the formula gives where it is in the configuration itself.
    let llama3 = config_of(|json| {
        json["rope_scaling"] = json!({
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        });
    });
    let mut formula = llama3.rope.clone();
    assert_eq!(
        formula.freq_factors.take().map(|factors| factors.len()),
        Some(32)
    );
    formula.scaling = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_context: 128,
    };
    for (ours, theirs) in llama3.rope.frequencies().iter().zip(formula.frequencies()) {
        assert!((ours / theirs - 1.0).abs() < 1e-5, "{ours} {theirs}");
    }

    // What newer releases write.
    let newer = config_of(|json| {
        json["rope_theta"] = Value::Null;
        json["rope_parameters"] = json!({"rope_type": "linear", "factor": 3.0, "rope_theta": 5e5});
    });
    assert_eq!(newer.rope.scaling, RopeScaling::Linear { factor: 3.0 });
    assert_eq!(newer.rope.base, 5e5);
}

#[test]
fn windows_are_those_of_the_configuration() {
    let mistral = config_of(|json| {
        json["architectures"] = json!(["MistralForCausalLM"]);
        json["sliding_window"] = 64.into();
    });
    assert_eq!([0, 1].map(|layer| mistral.window_of(layer)), [Some(64); 2]);
    let without = config_of(|json| {
        json["architectures"] = json!(["MistralForCausalLM"]);
        json["sliding_window"] = Value::Null;
    });
    assert_eq!(without.window, None);
    let (_dir, path) = folder(Architecture::Qwen2, 1);
    edit(&path.join("config.json"), |json| {
        json["use_sliding_window"] = true.into();
        json["sliding_window"] = 32.into();
        json["max_window_layers"] = 1.into();
    });
    let qwen = Model::open(&path).unwrap();
    assert_eq!(
        [0, 1].map(|layer| qwen.config().window_of(layer)),
        [None, Some(32)]
    );
}

#[test]
fn end_tokens_and_templates_come_from_wherever_they_stand() {
    let (_dir, path) = folder(Architecture::Llama, 1);
    std::fs::remove_file(path.join("generation_config.json")).unwrap();
    edit(&path.join("config.json"), |json| {
        json["eos_token_id"] = json!([256, 7])
    });
    edit(&path.join("tokenizer_config.json"), |json| {
        json["eos_token"] = json!({"content": "<|im_end|>"});
        json["chat_template"] =
            json!([{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]);
    });
    let model = Model::open(&path).unwrap();
    assert_eq!(model.tokenizer().eos_ids(), [258, 256, 7]);
    assert_eq!(model.template().source(), "yes");
    std::fs::write(
        path.join("chat_template.jinja"),
        "{{ messages[0].content }}!",
    )
    .unwrap();
    let model = Model::open(&path).unwrap();
    let prompt = model
        .template()
        .render(&[crate::Message::new("user", "Hi")], true)
        .unwrap();
    assert_eq!(prompt, "Hi!");
}

#[test]
fn a_configuration_that_lies_is_refused() {
    let lie = |key: &str, value: Value| {
        let (_dir, path) = folder(Architecture::Llama, 1);
        edit(&path.join("config.json"), |json| json[key] = value);
        error(&path)
    };
    let said = lie("hidden_size", json!(512));
    assert!(
        said.contains("model.embed_tokens.weight") && said.contains("[512, 300]"),
        "{said}"
    );
    assert!(lie("num_hidden_layers", json!(3)).contains("model.layers.2.input_layernorm.weight"));
    assert!(lie("num_hidden_layers", json!(1)).contains("blk.1."));
    assert!(lie("num_hidden_layers", json!(-1)).contains("\"num_hidden_layers\" is -1"));
    assert!(lie("num_hidden_layers", json!(1u64 << 40)).contains("from 1 to 4096"));
    assert!(lie("num_hidden_layers", json!(2.5)).contains("a whole number"));
    assert!(lie("hidden_size", json!("256")).contains("a whole number"));
    assert!(lie("vocab_size", json!(299)).contains("299"));
    assert!(lie("num_key_value_heads", json!(3)).contains("must divide the 4 query heads"));
    assert!(lie("num_attention_heads", json!(0)).contains("from 1 to"));
    assert!(lie("head_dim", json!(32)).contains("self_attn.q_proj.weight"));
    assert!(lie("rms_norm_eps", json!(-1e-5)).contains("a number over 0"));
    assert!(lie("rms_norm_eps", json!(1e60)).contains("a number over 0"));
    assert!(lie("rope_theta", json!(0)).contains("a number over 0"));
    assert!(lie("hidden_act", json!("relu")).contains("\"relu\""));
    assert!(
        lie("architectures", json!(["MambaForCausalLM"]))
            .contains("\"MambaForCausalLM\" is not supported")
    );
    assert!(lie("quantization_config", json!({"quant_method": "gptq"})).contains("gptq"));
    assert!(lie("rope_scaling", json!({"rope_type": "longrope"})).contains("\"longrope\""));
    assert!(lie("rope_scaling", json!({"rope_type": "linear"})).contains("rope_scaling.factor"));
    assert!(lie("rope_scaling", json!([1])).contains("an object"));
    assert!(lie("max_position_embeddings", json!(null)).contains("max_position_embeddings"));
    assert!(lie("tie_word_embeddings", json!(1)).contains("true or false"));
    let (_dir, path) = folder(Architecture::Llama, 1);
    std::fs::write(path.join("config.json"), "[".repeat(900_000)).unwrap();
    assert!(error(&path).contains("config.json is malformed"));
}

#[test]
fn a_tied_head_is_the_embedding_whatever_the_files_hold() {
    let (_dir, path) = folder(Architecture::Llama, 1);
    edit(&path.join("config.json"), |json| {
        json["tie_word_embeddings"] = true.into()
    });
    let model = Model::open(&path).unwrap();
    assert!(model.config().tied_embeddings && model.tensors().get("output.weight").is_none());
    let (_dir, path) = folder(Architecture::Qwen2, 1);
    edit(&path.join("config.json"), |json| {
        json["tie_word_embeddings"] = false.into()
    });
    assert!(
        Model::open(&path).unwrap().config().tied_embeddings,
        "there is no other"
    );
}

#[test]
fn files_outside_the_folder_are_not_read() {
    const INDEX: &str = "model.safetensors.index.json";
    let (dir, path) = folder(Architecture::Qwen3, 2);
    let shard = "model-00001-of-00002.safetensors";
    let outside = dir.path().join("outside.safetensors");
    std::fs::copy(path.join(shard), &outside).unwrap();
    let original = std::fs::read(path.join(INDEX)).unwrap();
    let named = |name: &str| {
        edit(&path.join(INDEX), |json| {
            for file in json["weight_map"].as_object_mut().unwrap().values_mut() {
                if file == shard {
                    *file = name.into();
                }
            }
        });
        let said = error(&path);
        std::fs::write(path.join(INDEX), &original).unwrap();
        said
    };
    let absolute = outside.to_str().unwrap();
    for name in [
        "../outside.safetensors",
        absolute,
        "",
        ".",
        "..",
        "a/b.safetensors",
        "..\\outside.safetensors",
        "x.bin",
    ] {
        assert!(
            named(name).contains("only .safetensors files in the model's own folder"),
            "{name}"
        );
    }
    assert!(named("absent.safetensors").contains("absent.safetensors is missing"));
    // A link that leads out of the folder, and one into the blobs beside it.
    std::fs::remove_file(path.join(shard)).unwrap();
    std::os::unix::fs::symlink(&outside, path.join(shard)).unwrap();
    assert!(error(&path).contains("outside the model's folder"));
    std::fs::remove_file(path.join(shard)).unwrap();
    std::fs::create_dir(dir.path().join("blobs")).unwrap();
    std::fs::rename(&outside, dir.path().join("blobs/abc")).unwrap();
    std::os::unix::fs::symlink("../blobs/abc", path.join(shard)).unwrap();
    Model::open(&path).expect("a link as the hub's cache has them");
    let config = std::fs::read(path.join("config.json")).unwrap();
    std::fs::write(dir.path().join("secret"), config).unwrap();
    std::fs::remove_file(path.join("config.json")).unwrap();
    std::os::unix::fs::symlink("../secret", path.join("config.json")).unwrap();
    assert!(error(&path).contains("outside the model's folder"));
}

#[test]
fn an_index_that_contradicts_its_files_is_refused() {
    const INDEX: &str = "model.safetensors.index.json";
    let (_dir, path) = folder(Architecture::Qwen3, 2);
    let index = path.join(INDEX);
    let original = std::fs::read(&index).unwrap();
    edit(&index, |json| {
        let map = json["weight_map"].as_object_mut().unwrap();
        let other = map["model.norm.weight"].clone();
        let moved = map.values_mut().find(|file| **file != other).unwrap();
        *moved = other;
    });
    assert!(error(&path).contains("but it is in"), "{}", error(&path));
    std::fs::write(&index, &original).unwrap();
    edit(&index, |json| json["weight_map"] = json!({}));
    assert!(error(&path).contains("from 1 to 1024"));
    let many: serde_json::Map<String, Value> = (0..2000)
        .map(|i| (format!("t{i}"), format!("{i}.safetensors").into()))
        .collect();
    edit(&index, |json| json["weight_map"] = many.into());
    assert!(error(&path).contains("2000 files"));
    std::fs::write(&index, "{\"weight_map\": 1}").unwrap();
    assert!(error(&path).contains("index.json is malformed"));
}

#[test]
fn what_is_missing_is_named_with_its_remedy() {
    let (_dir, path) = folder(Architecture::Llama, 1);
    std::fs::rename(path.join("tokenizer.json"), path.join("x")).unwrap();
    assert!(error(&path).contains("fast form"));
    std::fs::rename(path.join("x"), path.join("tokenizer.json")).unwrap();
    std::fs::rename(
        path.join("model.safetensors"),
        path.join("pytorch_model.bin"),
    )
    .unwrap();
    assert!(error(&path).contains("pickled ones can run code"));
    let empty = tempfile::tempdir().unwrap();
    assert!(error(empty.path()).contains("config.json"));
}

#[test]
fn weights_of_other_types_and_other_tensors_are_refused() {
    let with = |name: &str, dtype: Dtype, shape: &[u64]| {
        let (_dir, path) = folder(Architecture::Llama, 1);
        let file = path.join("model.safetensors");
        let old = Safetensors::open(&file).unwrap();
        let mut plans: Vec<crate::safetensors::Planned> = old
            .tensors()
            .map(|tensor| crate::safetensors::Planned {
                name: tensor.name.into(),
                dtype: tensor.dtype,
                shape: tensor.shape.into(),
            })
            .collect();
        plans.push(crate::safetensors::Planned {
            name: name.into(),
            dtype,
            shape: shape.into(),
        });
        let mut bytes = Vec::new();
        crate::safetensors::write(&mut bytes, &plans, |plan, out| {
            match old.tensor(&plan.name) {
                Some(tensor) => out.write_all(&tensor.data.read().unwrap()),
                None => out.write_all(&vec![0; plan.bytes() as usize]),
            }
        })
        .unwrap();
        drop(old);
        std::fs::write(&file, bytes).unwrap();
        Model::open(&path)
            .map(drop)
            .map_err(|error| error.to_string())
    };
    let refused = |name: &str, dtype, shape: &[u64]| with(name, dtype, shape).expect_err("refused");
    assert!(refused("x", Dtype::F8_E4M3, &[1]).contains("type F8_E4M3"));
    assert!(refused("model.layers.0.adapter.weight", Dtype::F32, &[1]).contains("has no place"));
    assert!(refused("x", Dtype::F32, &[0]).contains("no elements"));
    assert!(
        refused("language_model.model.norm.weight", Dtype::F32, &[256]).contains("appears twice")
    );
    with(
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        Dtype::F32,
        &[32],
    )
    .expect("passed over");
}

#[test]
fn files_of_absurd_size_are_not_read() {
    let (_dir, path) = folder(Architecture::Llama, 1);
    for name in [
        "tokenizer.json",
        "config.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ] {
        let file = std::fs::File::options()
            .append(true)
            .create(true)
            .open(path.join(name))
            .unwrap();
        let length = file.metadata().unwrap().len();
        file.set_len(2 << 30).unwrap();
        let said = error(&path);
        assert!(
            said.contains(name) && said.contains("2147483648 bytes, over the limit"),
            "{said}"
        );
        file.set_len(length).unwrap();
        if length == 0 {
            std::fs::remove_file(path.join(name)).unwrap();
        }
    }
    Model::open(&path).unwrap();
    std::fs::remove_file(path.join("config.json")).unwrap();
    std::fs::create_dir(path.join("config.json")).unwrap();
    assert!(error(&path).contains("is not a regular file"));
}
