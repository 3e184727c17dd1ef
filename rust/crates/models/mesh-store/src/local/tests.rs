use super::*;

/// A folder with files of these names, each holding its own name.
fn folder(names: &[&str]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for name in names {
        std::fs::write(dir.path().join(name), name).unwrap();
    }
    dir
}

#[test]
fn models_are_listed_by_name_and_the_first_folder_wins() {
    let (a, b) = (
        folder(&["beta.gguf", "notes.txt"]),
        folder(&["alpha.GGUF", "beta.gguf"]),
    );
    let dirs = [a.path().into(), b.path().into(), "/does/not/exist".into()];
    let entries = list(&dirs).unwrap();
    let names: Vec<&str> = entries.iter().map(|entry| entry.name.as_str()).collect();
    assert_eq!(names, ["alpha", "beta"]);
    assert!(entries[1].path.starts_with(a.path()));
    assert_eq!(entries[1].bytes, 9);
}

#[test]
fn files_and_folders_of_hugging_face_are_models_too() {
    let dir = folder(&["one.safetensors", "one.gguf"]);
    for (name, files) in [
        ("hf", &["config.json", "model.safetensors"][..]),
        ("no-weights", &["config.json"]),
        ("no-config", &["model.safetensors"]),
    ] {
        std::fs::create_dir(dir.path().join(name)).unwrap();
        for file in files {
            std::fs::write(dir.path().join(name).join(file), "12345").unwrap();
        }
    }
    let models = list(&[dir.path().into()]).unwrap();
    let facts: Vec<_> = models
        .iter()
        .map(|m| (m.name.as_str(), m.bytes, m.kind))
        .collect();
    assert_eq!(
        facts,
        [("hf", 10, LocalKind::Folder), ("one", 8, LocalKind::Gguf)]
    );
}

#[test]
fn a_name_resolves_exactly_or_by_a_unique_beginning() {
    let dir = folder(&[
        "SmolLM2-135M.Q4_1.gguf",
        "SmolLM2-360M.gguf",
        "Qwen.gguf",
        "Qwen-2.gguf",
    ]);
    let dirs = [dir.path().to_owned()];
    let file = |name: &str| dir.path().join(name);
    assert_eq!(resolve("Qwen", &dirs).unwrap(), file("Qwen.gguf"));
    assert_eq!(
        resolve("smollm2-135", &dirs).unwrap(),
        file("SmolLM2-135M.Q4_1.gguf")
    );
    assert_eq!(
        resolve(file("Qwen.gguf").to_str().unwrap(), &[]).unwrap(),
        file("Qwen.gguf")
    );

    let error = resolve("smol", &dirs).unwrap_err();
    assert!(
        matches!(&error, LocalError::Ambiguous { known, .. } if known.len() == 2),
        "{error}"
    );
    let error = resolve("llama", &dirs).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("no model \"llama\": there are Qwen, Qwen-2"),
        "{error}"
    );
    let error = resolve("", &[]).unwrap_err();
    assert!(error.to_string().contains("or give a path"), "{error}");
}

#[test]
fn fingerprints_are_remembered_until_the_file_changes() {
    let dir = folder(&["model"]);
    let model = dir.path().join("model");
    let cache = FingerprintCache::new(dir.path().join("fingerprints.json"));
    let first = cache.fingerprint(&model).unwrap();
    assert_eq!(first, Digest::of_file(&model).unwrap().to_string());

    // A remembered digest is used without looking into the file: make it recognisable.
    let marked = std::fs::read_to_string(&cache.path)
        .unwrap()
        .replace(&first, "remembered");
    std::fs::write(&cache.path, marked).unwrap();
    assert_eq!(cache.fingerprint(&model).unwrap(), "remembered");

    std::fs::write(&model, "another model").unwrap();
    assert_eq!(
        cache.fingerprint(&model).unwrap(),
        Digest::of_file(&model).unwrap().to_string()
    );
}

#[test]
fn a_broken_cache_only_costs_time() {
    let dir = folder(&["model"]);
    let model = dir.path().join("model");
    std::fs::write(dir.path().join("fingerprints.json"), "{").unwrap();
    for cache in ["fingerprints.json", "no/such/folder.json"] {
        let cache = FingerprintCache::new(dir.path().join(cache));
        assert_eq!(
            cache.fingerprint(&model).unwrap(),
            Digest::of_file(&model).unwrap().to_string()
        );
    }
}

#[test]
fn the_parts_of_a_split_file_are_one_model() {
    let dir = folder(&[
        "Big-Q4-00002-of-00003.gguf",
        "Big-Q4-00003-of-00003.gguf",
        "small.gguf",
        "small-00001-of-00002.gguf",
    ]);
    let below = dir.path().join("below");
    std::fs::create_dir(&below).unwrap();
    for number in 1..=2 {
        let name = format!("Deep-0000{number}-of-00002.gguf");
        std::fs::write(below.join(name), "1234").unwrap();
    }
    let dirs = [dir.path().to_owned()];
    let listed = || {
        let models = list(&dirs).unwrap().into_iter();
        models
            .map(|m| {
                (
                    m.name,
                    m.path.strip_prefix(&dirs[0]).unwrap().to_owned(),
                    m.bytes,
                    m.kind,
                )
            })
            .collect::<Vec<_>>()
    };
    let known = |name: &str, path: &str, bytes: u64, kind| {
        (name.to_owned(), PathBuf::from(path), bytes, kind)
    };
    let others = [
        known(
            "Deep",
            "below/Deep-00001-of-00002.gguf",
            8,
            LocalKind::SplitGguf,
        ),
        // A whole file counts before parts.
        known("small", "small.gguf", 10, LocalKind::Gguf),
    ];
    let big = |path: &str, bytes| known("Big-Q4", path, bytes, LocalKind::SplitGguf);
    let mut expected = vec![big("Big-Q4-00002-of-00003.gguf", 52)];
    expected.extend(others.clone());
    assert_eq!(listed(), expected);

    // One more part is a change.
    let before = look_at(dirs[0].join("Big-Q4")).unwrap();
    let first = dirs[0].join("Big-Q4-00001-of-00003.gguf");
    std::fs::write(&first, "first").unwrap();
    expected[0] = big("Big-Q4-00001-of-00003.gguf", 57);
    assert_eq!(listed(), expected);
    let later = std::fs::File::options()
        .write(true)
        .open(dirs[0].join("Big-Q4-00003-of-00003.gguf"));
    let later_time = SystemTime::now() + std::time::Duration::from_secs(60);
    later.unwrap().set_modified(later_time).unwrap();
    let now = look_at(first.clone()).unwrap();
    assert!(now.bytes > before.bytes && now.changed() == Some(later_time));

    for name in [
        "Big-Q4",
        "Big-Q4.gguf",
        "big",
        "Big-Q4-00003-of-00003.gguf",
        dirs[0].join("Big-Q4").to_str().unwrap(),
        dirs[0].join("Big-Q4-00002-of-00003.gguf").to_str().unwrap(),
    ] {
        assert_eq!(resolve(name, &dirs).unwrap(), first, "{name}");
        let places = crate::names::Places {
            folders: &dirs,
            store: None,
        };
        let crate::names::Target::Local(found) = places.resolve(name).unwrap().target else {
            panic!("{name} is not found in the folder");
        };
        assert_eq!(found.path, first, "{name}");
    }
    assert_eq!(
        resolve(below.to_str().unwrap(), &[]).unwrap(),
        below.join("Deep-00001-of-00002.gguf")
    );
}

#[test]
fn the_fingerprint_of_parts_is_made_of_their_digests() {
    let dir = folder(&["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]);
    let cache = FingerprintCache::new(dir.path().join("fingerprints.json"));
    let [first, second] = [1, 2].map(|n| dir.path().join(format!("m-0000{n}-of-00002.gguf")));
    let digests = [&first, &second].map(|path| Digest::of_file(path).unwrap());
    let expected = split::fingerprint(&digests);
    assert_eq!(cache.fingerprint(&first).unwrap(), expected);
    assert_eq!(cache.fingerprint(&second).unwrap(), expected);
    std::fs::write(&second, "another").unwrap();
    assert_ne!(cache.fingerprint(&first).unwrap(), expected);
}
