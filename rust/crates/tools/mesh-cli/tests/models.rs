//! `hydramesh models` for files on this machine, as a process.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use mesh_model::synth::{self, Shape, Tokens};
use mesh_model::{Architecture, GgmlType};
use mesh_store::Store;
use serde_json::{Value, json};
use tempfile::TempDir;

/// A home with a model file in its model folder.
struct Home {
    dir: TempDir,
}

impl Home {
    fn new() -> Self {
        let home = Home {
            dir: tempfile::tempdir().unwrap(),
        };
        std::fs::create_dir(home.path("local-models")).unwrap();
        let shape = Shape::tiny(Architecture::Llama);
        let bytes = synth::random_model_bytes(&shape, GgmlType::Q4_0, Tokens::Bytes);
        std::fs::write(home.path("local-models/tiny-q4.gguf"), bytes).unwrap();
        home
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// `hydramesh models …` there; the store is the folder `store` unless another one is named.
    fn run(&self, arguments: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_hydramesh"))
            .arg("models")
            .args(arguments)
            .current_dir(self.dir.path())
            .env_clear()
            .env("HOME", self.dir.path())
            .env("HYDRAMESH_STORE", self.path("store"))
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    fn json(&self, arguments: &[&str]) -> Value {
        let output = self.run(&[arguments, &["--json"]].concat());
        assert!(output.status.success(), "{output:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// Error output of a command that fails.
    fn failure(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    }

    /// Signs the model file, and gives the path of its manifest in the store.
    fn sign(&self) -> PathBuf {
        if !self.path("operator.pem").exists() {
            assert!(self.run(&["key", "operator.pem"]).status.success());
        }
        let signed = self.json(&["sign", "tiny-q4", "--key", "operator.pem"]);
        let fingerprint = signed["fingerprint"].as_str().unwrap();
        self.path(&format!("store/manifests/{fingerprint}.json"))
    }
}

#[test]
fn the_parts_of_a_split_file_are_listed_shown_and_signed_as_one_model() {
    let home = Home::new();
    let whole = home.path("local-models/tiny-q4.gguf");
    let gguf = mesh_model::Gguf::open(&whole).unwrap();
    let split = synth::Split {
        tensors: 8,
        keys_first: false,
    };
    let parts = synth::write_split(&gguf, split, &home.path("local-models"), "big-q4").unwrap();
    let bytes: u64 = parts
        .iter()
        .map(|part| part.metadata().unwrap().len())
        .sum();
    let listed = home.json(&["list"]);
    let names: Vec<&str> = listed
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|m| m["name"].as_str())
        .collect();
    assert_eq!(names, ["big-q4", "tiny-q4"]);
    assert_eq!(listed[0]["bytes"], json!(bytes));
    assert_eq!(listed[0]["kind"], "split GGUF file");
    for name in ["big", "big-q4-00002-of-00003.gguf", "local-models/big-q4"] {
        let shown = home.json(&["show", name]);
        assert_eq!(
            (&shown["name"], &shown["layers"]),
            (&json!("big-q4"), &json!(2)),
            "{name}"
        );
    }
    let verified = home.json(&["verify", "big"]);
    assert!(home.run(&["key", "operator.pem"]).status.success());
    let signed = home.json(&["sign", "big", "--key", "operator.pem"]);
    assert_eq!(signed["fingerprint"], verified["fingerprint"]);
    std::fs::remove_file(&parts[1]).unwrap();
    let error = home.failure(&["verify", "big"]);
    assert!(error.contains("1 of 3 parts is missing"), "{error}");
    assert!(error.contains("big-q4-00002-of-00003.gguf"), "{error}");
    let listed = home.run(&["list"]);
    let text = String::from_utf8(listed.stdout).unwrap();
    assert!(
        text.contains("cannot be served: 1 of 3 parts is missing"),
        "{text}"
    );
}

fn alter(manifest: &Path) {
    let text = std::fs::read_to_string(manifest).unwrap();
    let altered = text.replacen("blk.0", "blk.1", 1);
    assert_ne!(altered, text);
    std::fs::write(manifest, altered).unwrap();
}

#[test]
fn a_file_that_was_signed_still_goes_by_the_beginning_of_its_name() {
    let home = Home::new();
    home.sign();
    for command in ["show", "verify"] {
        let found = home.json(&[command, "tiny"]);
        assert_eq!(found["name"], "tiny-q4", "{command}: {found}");
    }
    let again = home.json(&["sign", "tiny", "--key", "operator.pem"]);
    assert_eq!(again["signatures"], 1, "{again}");
}

#[test]
fn a_store_that_is_missing_is_an_empty_one_to_who_only_looks() {
    let home = Home::new();
    assert_eq!(home.json(&["show", "tiny"])["where"], "folder");
    assert_eq!(home.json(&["verify", "tiny"])["name"], "tiny-q4");
    assert_eq!(home.json(&["list"])[0]["name"], "tiny-q4");
    assert!(!home.path("store").exists());
    // Perhaps the path of the store was mistyped.
    let error = home.failure(&["show", "other"]);
    let store = home.path("store");
    let hint = format!("There is no store at {}", store.display());
    assert!(error.contains(&hint), "{error}");
    assert!(
        home.failure(&["rm", "other"])
            .contains("there is no store at")
    );
}

#[test]
fn what_is_no_store_is_refused_and_left_as_it_is() {
    let home = Home::new();
    std::fs::create_dir(home.path("letters")).unwrap();
    std::fs::write(home.path("letters/one.txt"), "Dear").unwrap();
    for (path, commands) in [
        (
            "letters",
            [
                &["show", "tiny"][..],
                &["verify", "tiny"],
                &["list"],
                &["gc"],
            ],
        ),
        (
            "letters/one.txt",
            [&["show", "tiny"], &["verify", "tiny"], &["list"], &["gc"]],
        ),
    ] {
        for command in commands {
            let error = home.failure(&[command, &["--store", path]].concat());
            assert!(
                error.contains(&format!("{path} is no store of models")),
                "{command:?}: {error}"
            );
        }
    }
    assert_eq!(std::fs::read_dir(home.path("letters")).unwrap().count(), 1);
}

#[test]
fn an_altered_manifest_is_named_with_what_to_do_and_listed() {
    let home = Home::new();
    let manifest = home.sign();
    std::fs::remove_file(home.path("local-models/tiny-q4.gguf")).unwrap();
    alter(&manifest);

    for command in ["verify", "show"] {
        for name in ["tiny", "tiny-q4"] {
            let error = home.failure(&[command, name]);
            let told = format!("{} is damaged", manifest.display());
            assert!(error.contains(&told), "{command} {name}: {error}");
            assert!(
                error.contains("it was altered"),
                "{command} {name}: {error}"
            );
            assert!(
                error.contains("hydramesh models rm"),
                "{command} {name}: {error}"
            );
        }
    }
    let listed = home.json(&["list"]);
    assert_eq!(listed[0]["name"], "tiny-q4", "{listed}");
    assert_eq!(listed[0]["damaged"], true, "{listed}");
    let table = home.run(&["list"]);
    assert!(table.status.success());
    let rows = String::from_utf8(table.stdout).unwrap();
    assert!(
        rows.contains("tiny-q4") && rows.contains("damaged"),
        "{rows}"
    );
    let warning = String::from_utf8(table.stderr).unwrap();
    assert!(warning.contains(manifest.to_str().unwrap()), "{warning}");

    // The advice in the message works.
    assert!(home.run(&["rm", "tiny"]).status.success());
    assert_eq!(home.json(&["list"]), json!([]));
}

#[test]
fn an_altered_manifest_of_a_file_at_hand_is_named_and_mended_by_signing_again() {
    let home = Home::new();
    let manifest = home.sign();
    alter(&manifest);
    let error = home.failure(&["verify", "tiny"]);
    assert!(error.contains(manifest.to_str().unwrap()), "{error}");
    home.sign();
    assert_eq!(home.json(&["verify", "tiny"])["name"], "tiny-q4");
}

/// An embedding model as Hugging Face has it.
fn write_encoder(folder: &Path) {
    std::fs::create_dir_all(folder.join("1_Pooling")).unwrap();
    let write = |name: &str, value: Value| {
        std::fs::write(folder.join(name), value.to_string()).unwrap();
    };
    write(
        "config.json",
        json!({
            "model_type": "bert", "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64,
            "vocab_size": 2, "max_position_embeddings": 48, "type_vocab_size": 2, "hidden_act": "gelu",
        }),
    );
    write(
        "tokenizer.json",
        json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null, "decoder": null,
            "model": {"type": "WordLevel", "vocab": {"a": 0, "[UNK]": 1}, "unk_token": "[UNK]"},
        }),
    );
    write(
        "modules.json",
        json!([
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
            {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
        ]),
    );
    write(
        "1_Pooling/config.json",
        json!({"word_embedding_dimension": 32, "pooling_mode_cls_token": true}),
    );
    let header = json!({
        "embeddings.word_embeddings.weight": {"dtype": "F32", "shape": [2, 32], "data_offsets": [0, 256]},
    });
    let mut header = header.to_string();
    header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.into_bytes());
    bytes.extend([0; 256]);
    std::fs::write(folder.join("model.safetensors"), bytes).unwrap();
}

#[test]
fn embedding_models_are_listed_and_shown_as_such() {
    let home = Home::new();
    write_encoder(&home.path("local-models/little-bert"));
    let listed = home.json(&["list"]);
    let facts = &listed[0];
    assert_eq!(facts["name"], "little-bert", "{listed}");
    assert_eq!(facts["error"], Value::Null, "{facts}");
    assert_eq!(facts["purpose"], "embeddings", "{facts}");
    assert_eq!(facts["dimensions"], 32, "{facts}");
    assert_eq!(listed[1]["purpose"], "chat", "{listed}");
    let table = String::from_utf8(home.run(&["list"]).stdout).unwrap();
    let row = table.lines().find(|line| line.contains("little-bert"));
    let row = row.unwrap();
    assert!(
        row.contains("bert, for embeddings") && row.contains("F32"),
        "{row}"
    );
    assert!(!table.contains("cannot be served"), "{table}");

    let shown = home.json(&["show", "little"]);
    for (key, value) in [
        ("purpose", json!("embeddings")),
        ("architecture", json!("bert")),
        ("dimensions", json!(32)),
        ("context", json!(48)),
        ("layers", json!(3)),
        ("pooling", json!("the first token")),
        ("normalised", json!(true)),
        ("parameters", json!(64)),
    ] {
        assert_eq!(shown[key], value, "{key}: {shown}");
    }

    // The same from the store, where it is a folder of links.
    let store = Store::open(home.path("store")).unwrap();
    let folder = home.path("local-models/little-bert");
    store.adopt("little-bert", &folder, &|_| ()).unwrap();
    let nowhere = home.path("nowhere");
    let shown = home.json(&["show", "little", "--dir", nowhere.to_str().unwrap()]);
    assert_eq!(shown["where"], "store", "{shown}");
    assert_eq!(shown["dimensions"], 32, "{shown}");
}

#[test]
fn a_model_whose_chat_template_is_nested_without_end_is_shown() {
    let home = Home::new();
    let folder = home.path("local-models/nested");
    let model = mesh_model::Model::open(home.path("local-models/tiny-q4.gguf")).unwrap();
    synth::write_folder(&model, mesh_model::safetensors::Dtype::F32, 1, &folder).unwrap();
    for template in [
        format!("{{{{ {}1 }}}}", "-".repeat(6_000)),
        format!("{{{{ {}x }}}}", "not ".repeat(20_000)),
        "{{ 'x' * 9999999 }}".repeat(10_000),
    ] {
        std::fs::write(folder.join("chat_template.jinja"), template).unwrap();
        let shown = home.json(&["show", "nested"]);
        assert_eq!(shown["chat_template"], true, "{shown}");
    }
}
