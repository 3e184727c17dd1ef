//! Split GGUF files: the parts are the model that was cut, and parts that are missing, foreign, doubled or
//! altered are errors that name the file and what to do.

use std::fs;
use std::path::{Path, PathBuf};

use mesh_model::gguf::writer::{OwnedValue, Writer};
use mesh_model::synth::{
    Shape, Split, Tokens, random_model, random_model_bytes, split_bytes, write_split,
};
use mesh_model::{Architecture, Checkpoint, GgmlType, Gguf, Model, ModelConfig};
use proptest::prelude::*;

const STEM: &str = "Tiny-Q8_0";

fn whole() -> Gguf {
    let shape = Shape::tiny(Architecture::Llama);
    Gguf::from_bytes(random_model_bytes(&shape, GgmlType::Q8_0, Tokens::Bytes)).unwrap()
}

/// A folder with the model in three parts.
fn three() -> (tempfile::TempDir, Vec<PathBuf>) {
    let dir = tempfile::tempdir().unwrap();
    let gguf = whole();
    let parts = write_split(&gguf, cut(&gguf, 3), dir.path(), STEM).unwrap();
    assert_eq!(parts.len(), 3);
    (dir, parts)
}

fn cut(gguf: &Gguf, parts: usize) -> Split {
    Split {
        tensors: gguf.tensors().iter().len().div_ceil(parts),
        keys_first: false,
    }
}

/// The error of opening this path, which names the path of `named`.
#[track_caller]
fn error_of(path: &Path, named: &Path, says: &[&str]) {
    let error = Model::open(path)
        .expect_err("the parts are no model")
        .to_string();
    assert!(error.contains(named.to_str().unwrap()), "{error}");
    for text in says {
        assert!(error.contains(text), "{text:?} is not in: {error}");
    }
}

/// Writes a part with these keys and tensors of one element.
fn put(path: &Path, keys: &[(&str, OwnedValue)], tensors: &[&str]) {
    let mut writer = Writer::new();
    for (key, value) in keys {
        writer.key(key, value.clone());
    }
    for name in tensors {
        writer.tensor(name, GgmlType::F32, &[1]);
    }
    fs::write(path, writer.to_bytes(|_, _, _| vec![0; 4]).unwrap()).unwrap();
}

fn keys(number: u16, count: u16, tensors: i32) -> Vec<(&'static str, OwnedValue)> {
    vec![
        ("split.no", OwnedValue::U16(number)),
        ("split.count", OwnedValue::U16(count)),
        ("split.tensors.count", OwnedValue::I32(tensors)),
    ]
}

#[test]
fn the_parts_together_are_the_model() {
    let dir = tempfile::tempdir().unwrap();
    for architecture in Architecture::ALL {
        for (tensors, keys_first) in [(1000, true), (1, false), (4, true), (7, false)] {
            let shape = Shape::tiny(architecture);
            let file = dir.path().join("whole.gguf");
            random_model(&shape, GgmlType::Q4_K, Tokens::Bytes, &file).unwrap();
            let gguf = Gguf::open(&file).unwrap();
            let split = Split {
                tensors,
                keys_first,
            };
            let folder = dir
                .path()
                .join(format!("{}-{tensors}", architecture.name()));
            fs::create_dir(&folder).unwrap();
            let parts = write_split(&gguf, split, &folder, STEM).unwrap();
            assert!(parts.len() > 1);

            let joined = Gguf::open(&parts[0]).unwrap();
            let list = |gguf: &Gguf| -> Vec<_> {
                let tensors = gguf.tensors().iter();
                tensors
                    .map(|t| {
                        (
                            t.name.to_owned(),
                            t.ty,
                            t.dims.to_vec(),
                            t.data.read().unwrap().into_owned(),
                        )
                    })
                    .collect()
            };
            assert_eq!(list(&joined), list(&gguf));
            for (key, value) in gguf.metadata_iter() {
                assert_eq!(Some(value), joined.metadata(key), "{key}");
            }
            let bytes: u64 = parts
                .iter()
                .map(|part| fs::metadata(part).unwrap().len())
                .sum();
            assert_eq!(joined.tensors().file_len(), bytes);

            let model = Model::open(&file).unwrap();
            let last = parts.last().unwrap().clone();
            for path in [parts[0].clone(), last, folder.clone(), folder.join(STEM)] {
                let opened = Model::open(&path).unwrap();
                assert_eq!(opened.name(), STEM);
                assert_eq!(opened.path(), parts[0]);
                assert_eq!(opened.config(), model.config());
                assert_eq!(
                    opened.tokenizer().vocab_size(),
                    model.tokenizer().vocab_size()
                );
            }
        }
    }
}

#[test]
fn a_fingerprint_is_of_the_parts_and_not_of_their_name() {
    let (dir, parts) = three();
    let of = |path: &Path| Model::open(path).unwrap().fingerprint().unwrap().to_owned();
    let first = of(&parts[0]);
    assert_eq!(of(&parts[2]), first);
    let renamed = dir.path().join("renamed");
    fs::create_dir(&renamed).unwrap();
    for (index, part) in parts.iter().enumerate() {
        fs::copy(
            part,
            renamed.join(format!("Other-0000{}-of-00003.gguf", index + 1)),
        )
        .unwrap();
    }
    assert_eq!(of(&renamed), first);
    let mut bytes = fs::read(&parts[1]).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&parts[1], bytes).unwrap();
    assert_ne!(of(&parts[0]), first);
    assert_eq!(
        first,
        "f6066d6739f90f913bcded88c31eb9edccfaa240a39c8dbb392913bd4035a6b3"
    );
}

#[test]
fn missing_parts_are_named() {
    let (_dir, parts) = three();
    fs::remove_file(&parts[1]).unwrap();
    error_of(
        &parts[0],
        &parts[1],
        &["1 of 3 parts is missing", "put ", "fetch the model again"],
    );
    error_of(&parts[2], &parts[1], &["1 of 3 parts is missing"]);
    fs::remove_file(&parts[0]).unwrap();
    error_of(
        &parts[2],
        &parts[0],
        &["2 of 3 parts are missing", "(and part 2)"],
    );
    // A link to nothing is no part.
    std::os::unix::fs::symlink("nowhere", &parts[0]).unwrap();
    error_of(&parts[2], &parts[0], &["2 of 3 parts are missing"]);
}

#[test]
fn numbers_that_no_part_has_are_refused() {
    let (dir, parts) = three();
    for (numbers, said) in [
        ("00000-of-00003", "part 0 of 3"),
        ("00004-of-00003", "part 4 of 3"),
        ("00001-of-00000", "part 1 of 0"),
        ("00001-of-99999", "part 1 of 99999"),
    ] {
        let path = dir.path().join(format!("{STEM}-{numbers}.gguf"));
        fs::copy(&parts[0], &path).unwrap();
        error_of(&path, &path, &[said, "at most 512"]);
    }
}

#[test]
fn a_part_under_a_name_that_says_nothing_of_it_is_refused() {
    let (dir, parts) = three();
    let path = dir.path().join("model.gguf");
    fs::rename(&parts[1], &path).unwrap();
    error_of(&path, &path, &["part 2 of 3", "-00002-of-00003.gguf"]);
    // What gguf-split --merge writes is whole, and so is the only part of a model.
    let gguf = whole();
    for (name, number, count) in [("merged.gguf", 0, 0), ("T-00001-of-00001.gguf", 0, 1)] {
        let mut writer = Writer::new();
        for (key, value) in gguf.metadata_iter() {
            writer.copy_key(key, value);
        }
        for (key, value) in keys(number, count, 7) {
            writer.key(key, value);
        }
        for tensor in gguf.tensors().iter() {
            writer.tensor(tensor.name, tensor.ty, tensor.dims);
        }
        let data = |name: &str, _: GgmlType, _: &[u64]| {
            gguf.tensors()
                .get(name)
                .unwrap()
                .data
                .read()
                .unwrap()
                .into_owned()
        };
        let path = dir.path().join(name);
        fs::write(&path, writer.to_bytes(data).unwrap()).unwrap();
        Model::open(&path).unwrap();
    }
}

#[test]
fn copies_and_exchanged_parts_are_told_by_their_keys() {
    let (dir, parts) = three();
    let kept = dir.path().join("kept");
    fs::rename(&parts[1], &kept).unwrap();
    fs::copy(&parts[2], &parts[1]).unwrap();
    error_of(
        &parts[0],
        &parts[1],
        &["contains part 3", "its name is that of part 2"],
    );
    fs::rename(&parts[2], &parts[1]).unwrap();
    fs::rename(&kept, &parts[2]).unwrap();
    error_of(
        &parts[0],
        &parts[1],
        &["contains part 3", "put part 2 there"],
    );
}

#[test]
fn foreign_parts_are_told_by_their_keys_and_tensors() {
    let dir = tempfile::tempdir().unwrap();
    let [a, b] = [1, 2].map(|number| dir.path().join(format!("m-0000{number}-of-00002.gguf")));
    let architecture = |name: &str| ("general.architecture", OwnedValue::String(name.into()));
    let with = |mut keys: Vec<_>, key| {
        keys.push(key);
        keys
    };
    let first = with(keys(0, 2, 3), architecture("llama"));
    put(&a, &first, &["x", "y"]);

    put(&b, &keys(1, 3, 3), &["z"]);
    error_of(&a, &b, &["split.count is 3, but its name says 2"]);
    put(&b, &keys(1, 0, 3), &["z"]);
    error_of(&a, &b, &["split.count is 0", "merged"]);
    put(&b, &[], &["z"]);
    error_of(
        &a,
        &b,
        &["no split.count", "rename it if it is a whole model"],
    );
    put(
        &b,
        &[("split.count", OwnedValue::String("2".into()))],
        &["z"],
    );
    error_of(&a, &b, &["split.count is the string \"2\""]);
    put(&b, &keys(1, 2, 3)[1..], &["z"]);
    error_of(&a, &b, &["split.no is missing, but must be 1"]);
    put(&b, &keys(9, 2, 3), &["z"]);
    error_of(&a, &b, &["split.no is 9, but must be 1"]);
    put(&b, &keys(1, 2, 4), &["z"]);
    error_of(
        &a,
        &b,
        &["split.tensors.count is 4, and the first part's 3"],
    );
    put(&b, &with(keys(1, 2, 3), architecture("qwen2")), &["z"]);
    error_of(&a, &b, &["\"qwen2\"", "\"llama\""]);
    put(&b, &keys(1, 2, 3), &["y"]);
    error_of(&a, &b, &["tensor \"y\" is both in", a.to_str().unwrap()]);
    put(&b, &keys(1, 2, 3), &["z", "w"]);
    error_of(
        &a,
        &a,
        &["the 2 parts hold 4 tensors", "split.tensors.count"],
    );
    put(&b, &keys(1, 2, 3), &[]);
    error_of(&a, &a, &["hold 2 tensors", "is 3"]);
    // Parts that belong together are a file, if not yet a model.
    put(&b, &with(keys(1, 2, 3), architecture("llama")), &["z"]);
    assert_eq!(Gguf::open(&b).unwrap().tensors().iter().len(), 3);

    // The first part must say how many tensors there are.
    put(&a, &keys(0, 2, 3)[..2], &["x", "y"]);
    error_of(&a, &a, &["\"split.tensors.count\" is missing"]);
    put(&a, &keys(0, 2, -1), &["x", "y"]);
    error_of(&a, &a, &["split.tensors.count", "non-negative"]);
    put(&a, &keys(0, 2, i32::MAX), &["x", "y"]);
    error_of(
        &a,
        &a,
        &["split.tensors.count is 2147483647", "over the limit"],
    );
}

#[test]
fn a_broken_part_is_named() {
    let (_dir, parts) = three();
    let bytes = fs::read(&parts[1]).unwrap();
    fs::write(&parts[1], &bytes[..bytes.len() - 100]).unwrap();
    error_of(
        &parts[0],
        &parts[1],
        &["ends inside the data of tensor", "fetch it again"],
    );
    fs::write(&parts[1], b"PK").unwrap();
    error_of(&parts[0], &parts[1], &["the header"]);
    fs::remove_file(&parts[1]).unwrap();
    fs::create_dir(&parts[1]).unwrap();
    error_of(&parts[0], &parts[1], &["not a regular file"]);
}

#[test]
fn a_part_that_changes_is_noticed() {
    let (_dir, parts) = three();
    let model = Model::open(&parts[0]).unwrap();
    model.tensors().check_unchanged().unwrap();
    let mut bytes = fs::read(&parts[2]).unwrap();
    bytes.extend([0; 32]);
    fs::write(&parts[2], bytes).unwrap();
    let error = model.tensors().check_unchanged().unwrap_err().to_string();
    assert!(error.contains(parts[2].to_str().unwrap()), "{error}");
    assert!(error.contains("changed while it was read"), "{error}");
}

proptest! {
    /// Whatever a damaged part says, opening ends with the model or an error.
    #[test]
    fn damaged_parts_are_errors(at in 0usize..4000, value: u8, part in 0usize..2, shorter in 0usize..3) {
        let gguf = whole();
        let mut parts = split_bytes(&gguf, cut(&gguf, 2)).unwrap();
        let bytes = &mut parts[part];
        let at = at % bytes.len();
        bytes[at] = value;
        bytes.truncate(bytes.len() - shorter * 1000);
        if let Ok(joined) = Gguf::from_parts(parts) {
            let _ = ModelConfig::read(&joined);
            prop_assert!(joined.unsigned("split.count").is_ok());
        }
    }
}
