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
