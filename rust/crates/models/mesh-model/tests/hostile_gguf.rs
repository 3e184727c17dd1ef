//! Files that are cut short, contradict themselves or were damaged: always an error that names the fault,
//! never a panic, and never memory as large as a count in the file asks for.

use std::time::{Duration, Instant};

use mesh_model::file::FileError;
use mesh_model::gguf::writer::{OwnedValue, Writer};
use mesh_model::synth::{Shape, Tokens, random_model_bytes};
use mesh_model::{
    Architecture, ChatTemplate, Checkpoint, GgmlType, Gguf, GgufError, ModelConfig, Tokenizer,
};
use proptest::prelude::*;

/// A small file with a key of every kind and two tensors.
fn small() -> Vec<u8> {
    let mut writer = Writer::new();
    writer
        .key("general.architecture", OwnedValue::String("llama".into()))
        .key("some.count", OwnedValue::U32(7))
        .key("some.number", OwnedValue::F32(0.5))
        .key("some.flag", OwnedValue::Bool(true))
        .key(
            "some.words",
            OwnedValue::Strings(vec!["a".into(), "bc".into()]),
        )
        .key("some.numbers", OwnedValue::I32s(vec![-1, 2]))
        .tensor("first", GgmlType::Q4_0, &[32, 3])
        .tensor("second", GgmlType::F32, &[5]);
    writer
        .to_bytes(|_, ty, dims| vec![1; ty.bytes_for(dims.iter().product()).unwrap() as usize])
        .unwrap()
}

fn parse(bytes: Vec<u8>) -> Result<Gguf, GgufError> {
    Gguf::from_bytes(bytes)
}

fn error_of(bytes: Vec<u8>) -> String {
    parse(bytes).expect_err("the file is malformed").to_string()
}

/// Position of the only occurrence of `needle`.
fn find(bytes: &[u8], needle: &[u8]) -> usize {
    let mut places = (0..bytes.len()).filter(|&at| bytes[at..].starts_with(needle));
    let at = places.next().unwrap();
    assert_eq!(places.next(), None);
    at
}

/// The file with `new` written over what lies `after` bytes behind `needle`.
fn patched(needle: &str, after: usize, new: &[u8]) -> Vec<u8> {
    let mut bytes = small();
    let at = find(&bytes, needle.as_bytes()) + needle.len() + after;
    bytes[at..at + new.len()].copy_from_slice(new);
    bytes
}

#[test]
fn a_sound_file_reads_back_as_it_was_written() {
    let gguf = parse(small()).unwrap();
    assert_eq!(gguf.unsigned("some.count").unwrap(), Some(7));
    assert_eq!(gguf.float("some.number").unwrap(), Some(0.5));
    assert_eq!(gguf.bool("some.flag").unwrap(), Some(true));
    assert_eq!(gguf.string("general.architecture").unwrap(), Some("llama"));
    assert_eq!(gguf.string("no.such.key").unwrap(), None);
    let words: Vec<_> = gguf
        .array("some.words")
        .unwrap()
        .unwrap()
        .strings()
        .unwrap()
        .collect();
    assert_eq!(words, [&b"a"[..], b"bc"]);
    let numbers: Vec<_> = gguf
        .array("some.numbers")
        .unwrap()
        .unwrap()
        .integers()
        .unwrap()
        .collect();
    assert_eq!(numbers, [-1, 2]);
    let tensor = gguf.tensors().get("second").unwrap();
    assert_eq!(
        (tensor.ty, tensor.dims, tensor.data.len()),
        (GgmlType::F32, &[5][..], 20)
    );
    assert_eq!(gguf.tensors().iter().len(), 2);
    let error = gguf.bool("some.count").unwrap_err().to_string();
    assert_eq!(
        error,
        "metadata \"some.count\" is the integer 7, but a bool is needed: convert the model again"
    );
}

#[test]
fn version_2_is_read_and_others_are_refused() {
    let mut bytes = small();
    bytes[4] = 2;
    parse(bytes.clone()).unwrap();
    for (version, name) in [(1u32, "1"), (4, "4"), (3u32.swap_bytes(), "50331648")] {
        bytes[4..8].copy_from_slice(&version.to_le_bytes());
        assert!(
            error_of(bytes.clone()).starts_with(&format!("GGUF version {name} is not supported"))
        );
    }
}

#[test]
fn a_file_cut_short_anywhere_is_refused() {
    let bytes = small();
    for len in 0..bytes.len() {
        let error = error_of(bytes[..len].to_vec());
        assert!(error.starts_with("the file ends inside "), "{len}: {error}");
    }
    parse(bytes).unwrap();
}

#[test]
fn a_file_on_disk_cut_short_is_refused_with_the_remedy() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let bytes = small();
    std::fs::write(&file, &bytes[..bytes.len() - 1]).unwrap();
    let error = Gguf::open(file.path()).unwrap_err().to_string();
    assert!(
        error.contains("the data of tensor \"second\"") && error.ends_with("fetch it again"),
        "{error}"
    );

    std::fs::write(&file, b"").unwrap();
    assert!(
        Gguf::open(file.path())
            .unwrap_err()
            .to_string()
            .starts_with("the file ends inside the header")
    );
    std::fs::write(&file, b"PK\x03\x04 this is another format").unwrap();
    assert!(
        Gguf::open(file.path())
            .unwrap_err()
            .to_string()
            .starts_with("not a GGUF file")
    );
    let folder = tempfile::tempdir().unwrap();
    assert!(matches!(
        Gguf::open(folder.path()),
        Err(GgufError::File(FileError::NotAFile { .. }))
    ));
    assert!(matches!(
        Gguf::open(folder.path().join("none")),
        Err(GgufError::File(FileError::Open { .. }))
    ));
}

#[test]
fn a_file_that_changes_while_open_is_noticed() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(&file, small()).unwrap();
    let gguf = Gguf::open(file.path()).unwrap();
    gguf.tensors().check_unchanged().unwrap();
    assert_eq!(
        gguf.unsigned("some.count").unwrap(),
        Some(7),
        "released pages come back"
    );
    let mut longer = small();
    longer.push(0);
    std::fs::write(&file, longer).unwrap();
    assert!(matches!(
        gguf.tensors().check_unchanged(),
        Err(GgufError::File(FileError::Changed { .. }))
    ));
}

#[test]
fn lying_counts_and_lengths_fail_at_once() {
    let begun = Instant::now();
    let huge = u64::MAX.to_le_bytes();
    let mut tensors = small();
    tensors[8..16].copy_from_slice(&huge);
    assert!(
        error_of(tensors)
            .starts_with("the number of tensors is 18446744073709551615, over the limit of")
    );
    let mut keys = small();
    keys[16..24].copy_from_slice(&huge);
    assert!(error_of(keys).starts_with("the number of metadata keys is"));

    // Within the limit, but more than there are: whatever follows is read as a key, and fails as one.
    let mut keys = small();
    keys[16..24].copy_from_slice(&1000u64.to_le_bytes());
    error_of(keys);

    // The length of the first key's name.
    let mut name = small();
    name[24..32].copy_from_slice(&huge);
    assert!(error_of(name).starts_with("the length of the name of metadata key 0 is"));
    // A string's length, an array's length.
    assert!(
        error_of(patched("general.architecture", 4, &huge))
            .contains("the file ends inside general.architecture")
    );
    assert!(error_of(patched("some.words", 8, &huge)).contains("the file ends inside some.words"));
    assert!(
        error_of(patched("some.numbers", 8, &huge)).contains("the file ends inside some.numbers")
    );
    assert!(
        error_of(patched("first", 0, &u32::MAX.to_le_bytes()))
            .starts_with("the number of dimensions")
    );
    assert!(begun.elapsed() < Duration::from_secs(1));
}

#[test]
fn types_that_do_not_exist_are_named() {
    assert!(
        error_of(patched("some.count", 0, &99u32.to_le_bytes()))
            .contains("\"some.count\" has the unknown type 99")
    );
    assert!(
        error_of(patched("some.words", 4, &99u32.to_le_bytes()))
            .contains("\"some.words\" has the unknown type 99")
    );
    assert!(
        error_of(patched("some.words", 4, &9u32.to_le_bytes()))
            .contains("\"some.words\" is an array of arrays")
    );
    // Behind a tensor's name: the number of dimensions, the dimensions, the type, the offset.
    let error = error_of(patched("first", 4 + 16, &15u32.to_le_bytes()));
    assert!(
        error.starts_with("tensor \"first\" has type Q8_K (15), which is not supported"),
        "{error}"
    );
    let error = error_of(patched("first", 4 + 16, &4u32.to_le_bytes()));
    assert!(error.contains("has type unknown (4)"), "{error}");
}

#[test]
fn dimensions_and_offsets_that_make_no_sense_are_named() {
    let dims = |dims: [u64; 2]| patched("first", 4, dims.map(u64::to_le_bytes).as_flattened());
    assert!(
        error_of(dims([32, u64::MAX]))
            .contains("[32, 18446744073709551615]: the number of elements overflows")
    );
    assert!(error_of(dims([1 << 63, 2])).contains("overflows"));
    assert!(
        error_of(dims([1 << 40, 1 << 20]))
            .starts_with("the file ends inside the data of tensor \"first\"")
    );
    assert!(error_of(dims([0, 3])).contains("a dimension is 0"));
    assert!(error_of(dims([33, 3])).contains("no whole number of quantisation blocks"));

    let offset = |offset: u64| patched("first", 4 + 16 + 4, &offset.to_le_bytes());
    assert!(error_of(offset(1)).contains("not a multiple of the alignment 32"));
    let overlapping = patched("second", 4 + 8 + 4, &32u64.to_le_bytes());
    assert!(error_of(overlapping).starts_with("tensors \"first\" and \"second\" overlap"));
    assert!(
        error_of(offset(u64::MAX - 31))
            .starts_with("the file ends inside the data of tensor \"first\"")
    );
}

#[test]
fn names_that_appear_twice_are_refused() {
    let mut keys = Writer::new();
    keys.key("a", OwnedValue::U32(1))
        .key("a", OwnedValue::U32(2));
    let bytes = keys.to_bytes(|_, _, _| unreachable!()).unwrap();
    assert!(error_of(bytes).starts_with("metadata key \"a\" appears twice"));
    let mut tensors = Writer::new();
    tensors
        .tensor("t", GgmlType::F32, &[1])
        .tensor("t", GgmlType::F32, &[1]);
    let bytes = tensors.to_bytes(|_, _, _| vec![0; 4]).unwrap();
    assert!(error_of(bytes).starts_with("tensor \"t\" appears twice"));
}

#[test]
fn an_alignment_that_is_none_is_refused() {
    for alignment in [0, 3, 1 << 17] {
        let mut writer = Writer::new();
        writer.key("general.alignment", OwnedValue::U32(alignment));
        let bytes = writer.to_bytes(|_, _, _| unreachable!()).unwrap();
        assert!(error_of(bytes).starts_with(&format!("general.alignment is {alignment}")));
    }
    let mut writer = Writer::new();
    writer.key("general.alignment", OwnedValue::String("32".into()));
    let bytes = writer.to_bytes(|_, _, _| unreachable!()).unwrap();
    assert!(error_of(bytes).contains("\"general.alignment\" is the string \"32\""));
}

#[test]
fn names_that_are_not_text_are_refused() {
    let mut bytes = small();
    let at = find(&bytes, b"some.flag");
    bytes[at] = 0xff;
    assert!(error_of(bytes).contains("is not valid UTF-8"));
}

/// Everything that [`mesh_model::Model::open`] does with a file.
fn open_all(bytes: Vec<u8>) -> Result<(), String> {
    let gguf = parse(bytes).map_err(|e| e.to_string())?;
    let config = ModelConfig::read(&gguf).map_err(|e| e.to_string())?;
    let tokenizer = Tokenizer::from_keys(&gguf).map_err(|e| e.to_string())?;
    ChatTemplate::read(&gguf, &tokenizer);
    config.rope.frequencies();
    tokenizer
        .encode(
            "Hello <|im_end|>!",
            mesh_model::EncodeOptions::RENDERED_CHAT,
        )
        .map_err(|e| e.to_string())?;
    for tensor in gguf.tensors().iter() {
        tensor.to_f32().unwrap();
    }
    Ok(())
}

/// A whole model, and how long everything before its weights is.
fn model() -> (&'static [u8], usize) {
    static MODEL: std::sync::LazyLock<(Vec<u8>, usize)> = std::sync::LazyLock::new(|| {
        let bytes = random_model_bytes(
            &Shape::tiny(Architecture::Qwen2),
            GgmlType::Q4_0,
            Tokens::Bytes,
        );
        let gguf = Gguf::from_bytes(bytes.clone()).unwrap();
        let weights: usize = gguf.tensors().iter().map(|tensor| tensor.data.len()).sum();
        let head = bytes.len() - weights;
        (bytes, head)
    });
    (&MODEL.0, MODEL.1)
}

#[test]
fn the_model_that_is_mutated_below_is_sound() {
    open_all(model().0.to_vec()).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn damaged_files_never_panic(edits in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8)) {
        let (model, head) = model();
        let mut bytes = model.to_vec();
        for (at, value) in edits {
            bytes[at.index(head)] = value;
        }
        let _ = open_all(bytes);
    }

    #[test]
    fn numbers_overwritten_with_extremes_never_panic(
        at in any::<prop::sample::Index>(),
        value in prop_oneof![Just(u64::MAX), Just(1 << 63), Just(1 << 32), Just(u64::from(u32::MAX)), Just(0), 0u64..1 << 20],
    ) {
        let (model, head) = model();
        let mut bytes = model.to_vec();
        let at = at.index(head);
        bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        let _ = open_all(bytes);
    }

    #[test]
    fn small_files_with_any_byte_changed_never_panic(at in any::<prop::sample::Index>(), value in any::<u8>()) {
        let mut bytes = small();
        let at = at.index(bytes.len());
        bytes[at] = value;
        if let Ok(gguf) = parse(bytes) {
            for (_, value) in gguf.metadata_iter() {
                value.describe();
            }
            for tensor in gguf.tensors().iter() {
                tensor.to_f32().unwrap();
            }
        }
    }

    #[test]
    fn random_bytes_behind_the_magic_never_panic(tail in proptest::collection::vec(any::<u8>(), 0..300)) {
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend(tail);
        let _ = open_all(bytes);
    }
}

#[test]
fn a_file_that_is_cut_short_while_it_is_open_is_an_error_and_no_signal() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(&file, small()).unwrap();
    let gguf = Gguf::open(file.path()).unwrap();
    let tensor = gguf.tensors().get("second").unwrap();
    assert_eq!(tensor.to_f32().unwrap().len(), 5);
    // Behind the end of a mapped file lies SIGBUS.
    file.as_file().set_len(10).unwrap();
    let error = tensor.to_f32().unwrap_err().to_string();
    assert!(error.contains("the file ends before them"), "{error}");
    assert!(
        error.contains(&file.path().display().to_string()),
        "{error}"
    );
    assert_eq!(
        gguf.unsigned("some.count").unwrap(),
        Some(7),
        "keys are kept"
    );
    assert!(gguf.tensors().check_unchanged().is_err());
}

#[test]
fn a_file_with_a_hole_behind_its_tensors_is_refused() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(&file, small()).unwrap();
    file.as_file().set_len(1 << 40).unwrap();
    assert!(matches!(
        Gguf::open(file.path()),
        Err(GgufError::Surplus { .. })
    ));
}

#[test]
fn a_named_pipe_or_a_device_is_refused_and_not_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let pipe = dir.path().join("pipe.gguf");
    let made = std::process::Command::new("mkfifo").arg(&pipe).status();
    assert!(made.unwrap().success());
    for path in [pipe.as_path(), "/dev/zero".as_ref(), dir.path()] {
        assert!(matches!(
            Gguf::open(path),
            Err(GgufError::File(FileError::NotAFile { .. }))
        ));
        assert!(mesh_model::file::open_regular(path).is_err());
    }
}
