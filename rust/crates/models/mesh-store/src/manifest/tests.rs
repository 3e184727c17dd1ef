use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};

use mesh_model::{Architecture, Gguf, Model};

use super::*;
use crate::testing::{gguf, noise, safetensors};

fn of_files(root: &std::path::Path, paths: &[&str]) -> Manifest {
    let paths: Vec<PathBuf> = paths.iter().map(PathBuf::from).collect();
    Manifest::of_files("model", root, &paths, &|_| ()).unwrap()
}

#[test]
fn a_manifest_has_the_digests_of_file_pieces_and_tensors() {
    let dir = tempfile::tempdir().unwrap();
    let path = gguf(dir.path(), Architecture::Llama);
    let bytes = std::fs::read(&path).unwrap();
    let read = AtomicU64::new(0);
    let count = |n| {
        read.fetch_add(n, Ordering::Relaxed);
    };
    let manifest = Manifest::of_path("tiny", &path, &count).unwrap();
    assert_eq!(read.into_inner(), bytes.len() as u64);
    assert_eq!(manifest.name, "tiny");
    let [file] = &manifest.files[..] else {
        panic!("{manifest:?}");
    };
    assert_eq!(file.path, "tiny.gguf");
    assert_eq!(file.sha256, Digest::of(&bytes));
    assert_eq!(manifest.bytes(), bytes.len() as u64);
    let slice = |range: Range<u64>| &bytes[range.start as usize..range.end as usize];
    assert!(
        file.pieces
            .iter()
            .all(|piece| piece.is(slice(piece.range())))
    );
    let gguf = Gguf::open(&path).unwrap();
    assert_eq!(file.tensors.len(), gguf.tensors().iter().len());
    for tensor in &file.tensors {
        assert_eq!(tensor.sha256, Digest::of(slice(tensor.range())));
        assert_eq!(tensor.layer, layout::layer(&tensor.name));
    }
    let config = mesh_model::ModelConfig::read(&gguf).unwrap();
    assert_eq!(manifest.layers(), config.layers);
    let all: Vec<u32> = (0..file.pieces.len() as u32).collect();
    assert!(file.bad_pieces(&path, &all, &|_| ()).unwrap().is_empty());
}

#[test]
fn pieces_are_cut_where_the_layer_changes_and_at_4_mib() {
    let dir = tempfile::tempdir().unwrap();
    let names = [
        "model.embed_tokens.weight",
        "model.layers.0.a.weight",
        "model.layers.0.b.weight",
        "model.layers.1.a.weight",
        "model.norm.weight",
    ];
    let each = 5 << 20;
    std::fs::write(dir.path().join("m.safetensors"), safetensors(&names, each)).unwrap();
    let manifest = of_files(dir.path(), &["m.safetensors"]);
    let file = &manifest.files[0];
    let mib = |bytes: u32| f64::from(bytes) / f64::from(1 << 20);
    let lengths: Vec<f64> = file.pieces.iter().map(|piece| mib(piece.bytes)).collect();
    // The header; then 5, 10, 5 and 5 MiB.
    assert_eq!(lengths[1..], [4.0, 1.0, 4.0, 4.0, 2.0, 4.0, 1.0, 4.0, 1.0]);
    assert_eq!(u64::from(file.pieces[0].bytes), file.header());
}

/// Names of the tensors of the models under `root` that are complete if only `pieces` are present.
fn whole_tensors<'a>(manifest: &'a Manifest, pieces: &[PieceId]) -> Vec<&'a str> {
    let mut names = Vec::new();
    for (index, file) in (0..).zip(&manifest.files) {
        let have: crate::RangeSet = pieces
            .iter()
            .filter(|id| id.file == index)
            .map(|id| manifest.piece(*id).unwrap().1.range())
            .collect();
        assert!(have.contains(&(0..file.header())), "every header is needed");
        let whole = file.tensors.iter().filter(|t| have.contains(&t.range()));
        names.extend(whole.map(|tensor| tensor.name.as_str()));
    }
    names
}

#[test]
fn a_stage_of_a_folder_gets_its_layers_the_ends_and_all_that_is_no_tensor() {
    let dir = tempfile::tempdir().unwrap();
    let first = [
        "model.embed_tokens.weight",
        "model.layers.0.a.weight",
        "model.layers.1.a.weight",
    ];
    let second = [
        "lm_head.weight",
        "model.layers.2.a.weight",
        "model.norm.weight",
    ];
    std::fs::write(dir.path().join("1.safetensors"), safetensors(&first, 100)).unwrap();
    std::fs::write(dir.path().join("2.safetensors"), safetensors(&second, 100)).unwrap();
    std::fs::write(dir.path().join("config.json"), "{}").unwrap();
    let paths = ["1.safetensors", "2.safetensors", "config.json"];
    let manifest = of_files(dir.path(), &paths);
    assert_eq!(manifest.layers(), 3);
    let stage = |layers| whole_tensors(&manifest, &manifest.pieces_for(layers, 3));
    assert_eq!(stage(0..1), first[..2]);
    assert_eq!(stage(1..2), first[2..]);
    assert_eq!(stage(2..3), second);
    assert_eq!(stage(0..3).len(), 6);
    let all: Vec<PieceId> = manifest.pieces().collect();
    assert_eq!(manifest.pieces_for(0..3, 3), all);
    assert_eq!(manifest.bytes_of(&all), manifest.bytes());

    // Without an output matrix of its own the model ends with the embedding.
    let tied = ["model.layers.2.a.weight", "model.norm.weight"];
    std::fs::write(dir.path().join("2.safetensors"), safetensors(&tied, 100)).unwrap();
    let manifest = of_files(dir.path(), &paths);
    let stage = whole_tensors(&manifest, &manifest.pieces_for(2..3, 3));
    assert_eq!(stage, ["model.embed_tokens.weight", tied[0], tied[1]]);
}

#[test]
fn a_file_with_the_pieces_of_a_stage_opens_and_has_its_tensors() {
    for architecture in [
        Architecture::Llama,
        Architecture::Qwen2,
        Architecture::Qwen3,
    ] {
        let dir = tempfile::tempdir().unwrap();
        let path = gguf(dir.path(), architecture);
        let whole = Model::open(&path).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        let manifest = Manifest::of_path("tiny", &path, &|_| ()).unwrap();
        let file = &manifest.files[0];
        let total = manifest.layers();
        for layers in [0..1, 1..total, 0..total] {
            let partial = dir.path().join("partial.gguf");
            let sparse = std::fs::File::create(&partial).unwrap();
            sparse.set_len(file.bytes).unwrap();
            for id in manifest.pieces_for(layers.clone(), total) {
                let range = manifest.piece(id).unwrap().1.range();
                let data = &bytes[range.start as usize..range.end as usize];
                sparse.write_all_at(data, range.start).unwrap();
            }
            let opened = Model::open(&partial).unwrap();
            assert_eq!(opened.config(), whole.config());
            for tensor in whole.tensors().iter() {
                let config = whole.config();
                let needed = match tensor.name.strip_prefix("blk.") {
                    Some(rest) => {
                        layers.contains(&rest.split('.').next().unwrap().parse().unwrap())
                    }
                    None => match tensor.name {
                        "token_embd.weight" => {
                            layers.start == 0 || config.tied_embeddings && layers.end == total
                        }
                        _ => layers.end == total,
                    },
                };
                let found = opened.tensors().get(tensor.name).unwrap();
                let same = found.data.read().unwrap() == tensor.data.read().unwrap();
                assert_eq!(same, needed, "{}", tensor.name);
            }
        }
    }
}

#[test]
fn the_canonical_form_is_the_only_one() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("a"), "abc").unwrap();
    std::fs::write(dir.path().join("empty"), "").unwrap();
    let manifest = of_files(dir.path(), &["a", "empty"]);
    let bytes = manifest.to_bytes();
    let abc = Digest::of("abc");
    let empty = Digest::of("");
    assert_eq!(
        String::from_utf8(bytes.clone()).unwrap(),
        format!(
            r#"{{"version":1,"name":"model","files":[{{"path":"a","bytes":3,"sha256":"{abc}","pieces":[{{"offset":0,"bytes":3,"sha256":"{abc}"}}],"tensors":[]}},{{"path":"empty","bytes":0,"sha256":"{empty}","pieces":[],"tensors":[]}}]}}"#
        )
    );
    assert_eq!(Manifest::parse(&bytes).unwrap(), manifest);
    assert_eq!(manifest.fingerprint(), Digest::of(&bytes));
    let spaced = serde_json::to_vec_pretty(&manifest).unwrap();
    assert_eq!(Manifest::parse(&spaced), Err(ManifestError::NotCanonical));
    let upper = String::from_utf8(bytes.clone()).unwrap();
    let upper = upper.replace(&abc.to_string(), &abc.to_string().to_uppercase());
    assert_eq!(
        Manifest::parse(upper.as_bytes()),
        Err(ManifestError::NotCanonical)
    );
    let wanted = Digest::of("another");
    assert!(matches!(
        Manifest::parse_expected(&bytes, &wanted),
        Err(ManifestError::Fingerprint { .. })
    ));
}

/// Error of a manifest after `change`.
fn refused(change: impl FnOnce(&mut Manifest)) -> String {
    let dir = tempfile::tempdir().unwrap();
    let names = ["blk.0.a", "blk.1.a"];
    std::fs::write(dir.path().join("a.safetensors"), safetensors(&names, 8)).unwrap();
    let mut manifest = of_files(dir.path(), &["a.safetensors"]);
    change(&mut manifest);
    Manifest::parse(&manifest.to_bytes())
        .unwrap_err()
        .to_string()
}

#[test]
fn a_manifest_that_contradicts_itself_is_refused_with_what_is_wrong() {
    let path = |path: &str| {
        let path = path.to_owned();
        refused(move |m| m.files[0].path = path)
    };
    for bad in [
        "../up",
        "/etc/passwd",
        "a/../b",
        "a//b",
        "",
        ".",
        "a/",
        "a\\b",
        "c:x",
        "a\nb",
    ] {
        assert!(path(bad).contains("path"), "{bad:?}: {}", path(bad));
    }
    assert!(refused(|m| m.version = 2).contains("version 2"));
    assert!(refused(|m| m.name = "\u{1b}[2J".into()).contains("control characters"));
    assert!(refused(|m| m.name = "x".repeat(300)).contains("too long"));
    assert!(refused(|m| m.files.clear()).contains("no files"));
    assert!(refused(|m| m.files.push(m.files[0].clone())).contains("twice"));
    assert!(
        refused(|m| {
            let mut below = m.files[0].clone();
            below.path += "/below";
            m.files.push(below);
        })
        .contains("as a folder of another")
    );
    assert!(refused(|m| m.files[0].pieces[1].offset += 1).contains("piece 1"));
    assert!(refused(|m| m.files[0].pieces[1].bytes = 0).contains("piece 1"));
    assert!(refused(|m| m.files[0].pieces[1].bytes = u32::MAX).contains("piece 1"));
    assert!(refused(|m| m.files[0].pieces.truncate(1)).contains("is missing"));
    assert!(refused(|m| m.files[0].bytes -= 1).contains("behind its file"));
    assert!(refused(|m| m.files[0].bytes = u64::MAX).contains("is missing"));
    assert!(refused(|m| m.files[0].tensors[1].offset -= 1).contains("over the one before"));
    assert!(refused(|m| m.files[0].tensors[1].bytes = u64::MAX).contains("behind its file"));
    assert!(refused(|m| m.files[0].tensors[1].name = "blk.0.a".into()).contains("twice"));
    assert!(refused(|m| m.files[0].tensors[1].layer = Some(u32::MAX)).contains("layer"));
    assert!(
        refused(|m| {
            let huge = m.files[0].clone();
            m.files = (0..5000)
                .map(|i| ManifestFile {
                    path: i.to_string(),
                    ..huge.clone()
                })
                .collect();
        })
        .contains("5000 files")
    );
}

#[test]
fn what_is_no_manifest_is_refused() {
    for bytes in [
        &b""[..],
        b"{}",
        b"[]",
        b"\xff",
        br#"{"version":1,"name":"a","files":[],"more":0}"#,
        br#"{"version":1,"version":1,"name":"a","files":[]}"#,
        br#"{"version":-1,"name":"a","files":[]}"#,
    ] {
        let error = Manifest::parse(bytes).unwrap_err();
        assert!(matches!(error, ManifestError::Malformed { .. }), "{error}");
    }
    let deep = "[".repeat(1 << 20);
    assert!(Manifest::parse(deep.as_bytes()).is_err());
    let long = vec![b' '; MAX_MANIFEST + 1];
    assert!(matches!(
        Manifest::parse(&long),
        Err(ManifestError::TooLong { .. })
    ));
}

#[test]
fn a_tampered_piece_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("weights.bin");
    let mut bytes = noise(1, 9 << 20);
    std::fs::write(&path, &bytes).unwrap();
    let manifest = of_files(dir.path(), &["weights.bin"]);
    let file = &manifest.files[0];
    bytes[5 << 20] ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    assert_eq!(file.bad_pieces(&path, &[0, 1, 2], &|_| ()).unwrap(), [1]);
    let message = "piece 1 of weights.bin (bytes 4194304 to 8388608) does not have the SHA-256";
    let error = file.bad_piece(1);
    assert!(error.to_string().starts_with(message), "{error}");
    assert!(!file.pieces[1].is(&bytes[4 << 20..8 << 20]));
    assert_eq!(file.bad_pieces(&path, &[99], &|_| ()).unwrap(), [99]);

    std::fs::write(&path, &bytes[1..]).unwrap();
    let found = file.bad_pieces(&path, &[0], &|_| ());
    assert!(matches!(found, Err(VerifyError::Length { .. })));
}

#[test]
fn a_folder_without_weights_is_no_model() {
    let dir = tempfile::tempdir().unwrap();
    for file in [
        "config.json",
        "tokenizer.json",
        "README.md",
        ".hidden.json",
        "pytorch_model.bin",
    ] {
        std::fs::write(dir.path().join(file), "{}").unwrap();
    }
    let error = model_files(dir.path()).unwrap_err();
    assert!(error.to_string().contains("holds no model"), "{error}");
    std::fs::create_dir(dir.path().join("1_Pooling")).unwrap();
    std::fs::write(dir.path().join("1_Pooling/config.json"), "{}").unwrap();
    std::fs::write(dir.path().join("model.safetensors"), safetensors(&["a"], 1)).unwrap();
    let files = model_files(dir.path()).unwrap();
    let expected = [
        "1_Pooling/config.json",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ];
    assert_eq!(files, expected.map(PathBuf::from));
    let manifest = Manifest::of_path("m", dir.path(), &|_| ()).unwrap();
    assert_eq!(manifest.files[0].path, "1_Pooling/config.json");
}

/// A model in parts of eight tensors, of which the first holds none.
fn split_model(dir: &std::path::Path) -> Vec<PathBuf> {
    let gguf = Gguf::open(gguf(dir, Architecture::Llama)).unwrap();
    let split = mesh_model::synth::Split {
        tensors: 8,
        keys_first: true,
    };
    mesh_model::synth::write_split(&gguf, split, dir, "Tiny").unwrap()
}

#[test]
fn the_parts_of_a_split_file_are_one_manifest() {
    let dir = tempfile::tempdir().unwrap();
    let parts = split_model(dir.path());
    let manifest = Manifest::of_path("Tiny", &parts[0], &|_| ()).unwrap();
    let names = manifest.files.iter().map(|file| &*file.path);
    let count = parts.len();
    let expected = (1..=count).map(|n| format!("Tiny-{n:05}-of-{count:05}.gguf"));
    assert!(names.eq(expected));
    assert_eq!(manifest.layers(), 2);
    for path in [&parts[count - 1], &dir.path().join("Tiny")] {
        assert_eq!(Manifest::of_path("Tiny", path, &|_| ()).unwrap(), manifest);
    }
    assert_eq!(
        manifest.path_in("/x".as_ref()),
        PathBuf::from("/x").join(&manifest.files[0].path)
    );
    let model = Model::open(&parts[0]).unwrap();
    assert_eq!(manifest.file_fingerprint(), model.fingerprint().unwrap());
    let mut backwards = manifest.clone();
    backwards.files.reverse();
    assert_eq!(backwards.file_fingerprint(), manifest.file_fingerprint());

    // A stage needs all headers, and of the tensors only its own.
    let pieces = manifest.pieces_for(0..1, 2);
    let whole = whole_tensors(&manifest, &pieces);
    let own = |name: &&str| layout::layer(name).is_none_or(|layer| layer == 0);
    assert!(
        whole.iter().all(own) && whole.contains(&"blk.0.ffn_down.weight"),
        "{whole:?}"
    );
    assert!(manifest.bytes_of(&pieces) < manifest.bytes());

    // Without one part it is no model.
    std::fs::remove_file(&parts[1]).unwrap();
    let error = Manifest::of_path("Tiny", &parts[0], &|_| ())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("is missing") && error.contains("Tiny-00002-of-"),
        "{error}"
    );
    let fewer = Manifest {
        files: manifest.files[1..].to_vec(),
        ..manifest
    };
    assert_eq!(fewer.path_in("/x".as_ref()), PathBuf::from("/x"));
}

#[test]
fn parts_of_which_only_some_bytes_are_here_open_as_one_model() {
    let dir = tempfile::tempdir().unwrap();
    let parts = split_model(dir.path());
    let manifest = Manifest::of_path("Tiny", &parts[0], &|_| ()).unwrap();
    let model = Model::open(&parts[0]).unwrap();
    let sparse = dir.path().join("sparse");
    std::fs::create_dir(&sparse).unwrap();
    let ids = manifest.pieces_for(1..2, 2);
    for (index, file) in (0..).zip(&manifest.files) {
        let from = std::fs::File::open(dir.path().join(&file.path)).unwrap();
        let to = std::fs::File::create(sparse.join(&file.path)).unwrap();
        to.set_len(file.bytes).unwrap();
        for id in ids.iter().filter(|id| id.file == index) {
            let piece = &file.pieces[id.piece as usize];
            let mut bytes = vec![0; piece.bytes as usize];
            from.read_exact_at(&mut bytes, piece.offset).unwrap();
            to.write_all_at(&bytes, piece.offset).unwrap();
        }
    }
    let opened = Model::open(manifest.path_in(&sparse)).unwrap();
    for tensor in model
        .tensors()
        .iter()
        .filter(|tensor| layout::layer(tensor.name) == Some(1))
    {
        let found = opened.tensors().get(tensor.name).unwrap();
        assert_eq!(
            found.data.read().unwrap(),
            tensor.data.read().unwrap(),
            "{}",
            tensor.name
        );
    }
}
