//! Folders and single files as they should be, and as an attacker or a broken disk would leave them.

use std::fs;
use std::path::{Path, PathBuf};

use mesh_model::safetensors::{Dtype, Planned, write};
use serde_json::{Value, json};

use super::{Checkpoint, ModelError, Module, open_tiny_vae};
use crate::config::Family;
use crate::synth;

const FAMILIES: [Family; 3] = [Family::Sd1, Family::Sd2, Family::Xl];

fn folder(family: Family) -> (tempfile::TempDir, PathBuf) {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("model");
    synth::write_folder(&synth::tiny(family), &path, Dtype::F32).unwrap();
    (root, path)
}

fn single(family: Family) -> (tempfile::TempDir, PathBuf) {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("model.safetensors");
    synth::write_single(&synth::tiny(family), &path, Dtype::F32).unwrap();
    (root, path)
}

/// Changes values of a JSON file.
fn edit(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    change(&mut value);
    fs::write(path, serde_json::to_vec(&value).unwrap()).unwrap();
}

fn refusal(path: &Path) -> String {
    Checkpoint::open(path)
        .expect_err("it should have been refused")
        .to_string()
}

fn assert_mentions(message: &str, words: &[&str]) {
    for word in words {
        assert!(
            message.contains(word),
            "{message:?} does not mention {word:?}"
        );
    }
}

/// The elements of all tensors of a module, by name.
fn elements(checkpoint: &Checkpoint, module: Module) -> Vec<(String, Vec<u64>, Vec<u8>)> {
    let weights = checkpoint.weights(module).unwrap().iter();
    let mut all: Vec<_> = weights
        .map(|weight| {
            let mut bytes = weight.data.read().unwrap().into_owned();
            if weight.transposed {
                let [rows, columns] = [weight.shape[0] as usize, weight.shape[1] as usize];
                let at = |i: usize| &bytes[4 * ((i % columns) * rows + i / columns)..][..4];
                bytes = (0..rows * columns).flat_map(at).copied().collect();
            }
            (weight.name.to_owned(), weight.shape.to_vec(), bytes)
        })
        .collect();
    all.sort();
    all
}

#[test]
fn a_folder_gives_the_configuration_that_it_was_written_with() {
    for family in FAMILIES {
        let (_root, path) = folder(family);
        let checkpoint = Checkpoint::open(&path).unwrap();
        assert_eq!(checkpoint.config(), &synth::tiny(family));
    }
}

#[test]
fn a_single_file_has_the_configuration_and_the_tensors_of_the_folder() {
    for family in FAMILIES {
        let (_folder_root, folder) = folder(family);
        let (_single_root, single) = single(family);
        let (folder, single) = (
            Checkpoint::open(&folder).unwrap(),
            Checkpoint::open(&single).unwrap(),
        );
        assert_eq!(single.config(), folder.config());
        let second = (family == Family::Xl).then_some(Module::TextEncoder2);
        for module in [Module::TextEncoder, Module::Unet, Module::Vae]
            .into_iter()
            .chain(second)
        {
            assert!(
                elements(&folder, module) == elements(&single, module),
                "{family} {module:?}"
            );
        }
    }
}

#[test]
fn real_shapes_are_those_of_the_published_models() {
    let config = synth::stable_diffusion_1_5();
    let count = |tensors: Vec<crate::config::TensorShape>| -> u64 {
        tensors
            .iter()
            .map(|tensor| tensor.shape.iter().product::<u64>())
            .sum()
    };
    // Parameters of the three modules as diffusers and transformers count them.
    assert_eq!(count(config.unet.tensors()), 859_520_964);
    assert_eq!(count(config.vae.tensors()), 83_653_863);
    assert_eq!(count(config.text[0].tensors()), 123_060_480);
    assert_eq!(config.default_size(), 512);
}

#[test]
fn variants_and_shards_are_found() {
    let (_root, path) = folder(Family::Sd1);
    let unet = path.join("unet");
    let whole = unet.join("diffusion_pytorch_model.safetensors");
    let half = unet.join("diffusion_pytorch_model.fp16.safetensors");
    fs::rename(&whole, &half).unwrap();
    Checkpoint::open(&path).unwrap();

    let shard = "diffusion_pytorch_model-00001-of-00001.safetensors";
    fs::rename(&half, unet.join(shard)).unwrap();
    let index = unet.join("diffusion_pytorch_model.safetensors.index.json");
    fs::write(
        &index,
        json!({"weight_map": {"conv_in.weight": shard}}).to_string(),
    )
    .unwrap();
    Checkpoint::open(&path).unwrap();

    for name in [
        "../secret.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "model.bin",
        "..",
    ] {
        fs::write(
            &index,
            json!({"weight_map": {"conv_in.weight": name}}).to_string(),
        )
        .unwrap();
        assert_mentions(&refusal(&path), &["index.json", "weight_map", name]);
    }
    fs::remove_file(&index).unwrap();
    assert_mentions(
        &refusal(&path),
        &[
            "diffusion_pytorch_model.safetensors is missing",
            "fetch the whole folder",
        ],
    );
}

#[test]
fn old_names_of_the_autoencoder_are_read() {
    let (_root, path) = folder(Family::Sd1);
    let before = elements(&Checkpoint::open(&path).unwrap(), Module::Vae);
    let rename = |name: &str| {
        let pairs = [
            ("to_q", "query"),
            ("to_k", "key"),
            ("to_v", "value"),
            ("to_out.0", "proj_attn"),
        ];
        pairs
            .iter()
            .fold(name.to_owned(), |name, (new, old)| name.replace(new, old))
    };
    let planned: Vec<Planned> = before
        .iter()
        .map(|(name, shape, _)| Planned {
            name: rename(name),
            dtype: Dtype::F32,
            shape: shape.clone(),
        })
        .collect();
    let mut out = fs::File::create(path.join("vae/diffusion_pytorch_model.safetensors")).unwrap();
    write(&mut out, &planned, |planned, out| {
        let (.., bytes) = before
            .iter()
            .find(|(name, ..)| rename(name) == planned.name)
            .unwrap();
        out.write_all(bytes)
    })
    .unwrap();
    assert!(elements(&Checkpoint::open(&path).unwrap(), Module::Vae) == before);
}

#[test]
fn tensors_of_another_shape_or_type_are_named() {
    let (_root, path) = folder(Family::Sd1);
    edit(&path.join("unet/config.json"), |config| {
        config["layers_per_block"] = json!(2)
    });
    assert_mentions(
        &refusal(&path),
        &[
            "unet/diffusion_pytorch_model.safetensors",
            "down_blocks.0.resnets.1",
            "missing",
        ],
    );

    edit(&path.join("unet/config.json"), |config| {
        config["layers_per_block"] = json!(1);
        config["block_out_channels"] = json!([32, 96]);
    });
    assert_mentions(
        &refusal(&path),
        &[
            "down_blocks.1.resnets.0.conv1.weight has shape [64, 32, 3, 3]",
            "[96, 32, 3, 3] was expected",
        ],
    );

    let (_root, path) = folder(Family::Sd1);
    let file = path.join("unet/diffusion_pytorch_model.safetensors");
    let bytes = fs::read(&file).unwrap();
    let at = bytes
        .windows(5)
        .position(|window| window == b"\"F32\"")
        .unwrap();
    let mut changed = bytes.clone();
    changed[at..at + 5].copy_from_slice(b"\"I32\"");
    fs::write(&file, changed).unwrap();
    assert_mentions(
        &refusal(&path),
        &[
            "elements of type I32",
            "quantised weights are not supported",
        ],
    );
}

#[test]
fn configurations_are_bounded_and_name_what_they_ask_for() {
    let cases: [(&str, &str, Value, &str); 12] = [
        (
            "unet",
            "block_out_channels",
            json!([u64::MAX, 64]),
            "block_out_channels",
        ),
        (
            "unet",
            "block_out_channels",
            json!([]),
            "a list of 1 to 8 numbers",
        ),
        (
            "unet",
            "layers_per_block",
            json!(4_000_000_000u32),
            "from 1 to 16",
        ),
        ("unet", "attention_head_dim", json!(7), "must divide"),
        ("unet", "attention_head_dim", json!(0), "from 1 to 256"),
        ("unet", "norm_num_groups", json!(5), "must divide"),
        ("unet", "in_channels", json!(8), "takes 8 channels"),
        (
            "unet",
            "class_embed_type",
            json!("timestep"),
            "not supported",
        ),
        (
            "unet",
            "cross_attention_dim",
            json!(64),
            "hidden rows are 128 wide",
        ),
        ("vae", "latent_channels", json!(16), "16 channels"),
        ("vae", "scaling_factor", json!(0), "must be over 0"),
        (
            "text_encoder",
            "num_hidden_layers",
            json!("many"),
            "whole number",
        ),
    ];
    for (module, key, value, reason) in cases {
        let (_root, path) = folder(Family::Sd1);
        edit(&path.join(module).join("config.json"), |config| {
            config[key] = value.clone()
        });
        let message = refusal(&path);
        assert!(
            message.contains(reason),
            "{module} {key} {value}: {message}"
        );
    }
    let (_root, path) = folder(Family::Sd1);
    fs::write(path.join("vae/config.json"), "[1, 2]").unwrap();
    assert_mentions(&refusal(&path), &["vae/config.json", "not a JSON object"]);
    fs::write(path.join("vae/config.json"), vec![b' '; 2 << 20]).unwrap();
    assert_mentions(&refusal(&path), &["more than 1 MiB"]);
    fs::remove_file(path.join("model_index.json")).unwrap();
    assert_mentions(&refusal(&path), &["model_index.json is missing"]);
}

#[test]
fn cut_and_changed_files_are_errors() {
    let (_root, path) = single(Family::Xl);
    let bytes = fs::read(&path).unwrap();
    let other = path.with_file_name("other.safetensors");
    for len in [0, 7, 8, 100, bytes.len() / 2, bytes.len() - 1] {
        fs::write(&other, &bytes[..len]).unwrap();
        assert!(
            Checkpoint::open(&other).is_err(),
            "{len} of {} bytes",
            bytes.len()
        );
    }
    let header = u64::from_le_bytes(*bytes.first_chunk::<8>().unwrap()) as usize;
    let mut opened = 0;
    for round in 0..300u64 {
        let mut bytes = bytes.clone();
        let at =
            |part: u64| (synth::random("where", 4 * round + part).abs() * header as f32) as usize;
        for part in 0..1 + round % 3 {
            bytes[8 + at(part)] = b"0123456789[],.\"az"
                [(synth::random("what", 4 * round + part).abs() * 17.0) as usize];
        }
        fs::write(&other, bytes).unwrap();
        // Neither a panic nor a huge allocation. A change in an unused name is not an error.
        if let Ok(checkpoint) = Checkpoint::open(&other) {
            opened += 1;
            assert!(checkpoint.bytes() <= header as u64 + (64 << 20));
        }
    }
    assert!(opened < 300);
}

#[test]
fn parts_and_other_models_are_told_apart() {
    let (_root, path) = folder(Family::Sd1);
    let part = path.join("unet/diffusion_pytorch_model.safetensors");
    assert_mentions(
        &refusal(&part),
        &["model.diffusion_model", "whole checkpoint"],
    );
    assert!(matches!(
        Checkpoint::open(&path.join("model.ckpt")),
        Err(ModelError::Unknown { .. })
    ));
}

#[test]
fn a_file_that_changes_is_noticed() {
    let (_root, path) = single(Family::Sd1);
    let checkpoint = Checkpoint::open(&path).unwrap();
    checkpoint.check_unchanged().unwrap();
    fs::OpenOptions::new()
        .append(true)
        .open(&path)
        .unwrap()
        .set_len(10)
        .unwrap();
    assert_mentions(
        &checkpoint.check_unchanged().unwrap_err().to_string(),
        &["model.safetensors", "changed"],
    );
}

#[test]
fn a_tiny_autoencoder_is_read_and_checked() {
    let root = tempfile::tempdir().unwrap();
    synth::write_tiny_vae(&synth::tiny_vae(), root.path(), Dtype::F16).unwrap();
    let (config, weights) = open_tiny_vae(root.path()).unwrap();
    assert_eq!(config, synth::tiny_vae());
    assert_eq!(weights.bytes(), 2 * weights.elements());
    edit(&root.path().join("config.json"), |config| {
        config["num_encoder_blocks"] = json!([1, 3])
    });
    assert_mentions(
        &open_tiny_vae(root.path()).unwrap_err().to_string(),
        &["encoder.layers"],
    );
}
