use super::*;
use crate::signature::SignedManifest;
use crate::testing::{manifest_of, store};

/// Stores a model called so, and gives its fingerprint.
fn add(store: &Store, name: &str) -> Digest {
    let manifest = manifest_of(name, name.as_bytes());
    store
        .put_manifest(&SignedManifest::unsigned(manifest))
        .unwrap()
}

fn hub(id: &str) -> Target {
    Target::Hub { id: id.into() }
}

#[test]
fn every_kind_of_name_means_something_and_says_why() {
    let (dir, store) = store();
    let folder = dir.path().join("local-models");
    std::fs::create_dir(&folder).unwrap();
    let file = folder.join("SmolLM2-135M.Q4_1.gguf");
    std::fs::write(&file, "GGUF").unwrap();
    let pulled = add(&store, "Qwen3-8B-Q4_K_M");
    store
        .name("Qwen/Qwen3-8B-GGUF:Q4_K_M", &pulled, None)
        .unwrap();
    let folders = [folder];
    let places = Places {
        folders: &folders,
        store: Some(&store),
    };
    let local = |name: &str| match places.resolve(name).unwrap() {
        Resolved {
            target: Target::Local(model),
            why,
        } => {
            assert_eq!(model.path, file, "{name}");
            why
        }
        other => panic!("{name}: {other:?}"),
    };
    assert_eq!(local(file.to_str().unwrap()), "the path of a GGUF file");
    assert_eq!(
        local("SmolLM2-135M.Q4_1"),
        "the name of a GGUF file in a model folder"
    );
    assert_eq!(
        local("SmolLM2-135M.Q4_1.gguf"),
        "the name of a GGUF file in a model folder"
    );
    assert!(
        local("smollm2").starts_with("the beginning"),
        "what is here goes before the hub"
    );

    let stored = |name: &str| match places.resolve(name).unwrap() {
        Resolved {
            target: Target::Stored { fingerprint, .. },
            why,
        } => {
            assert_eq!(fingerprint, pulled, "{name}");
            why
        }
        other => panic!("{name}: {other:?}"),
    };
    assert_eq!(
        stored("Qwen3-8B-Q4_K_M"),
        "Qwen3-8B-Q4_K_M is a name in the store"
    );
    stored("Qwen/Qwen3-8B-GGUF:Q4_K_M");
    stored("hf.co/Qwen/Qwen3-8B-GGUF");
    stored("Qwen/Qwen3-8B-GGUF");
    stored("qwen3-8b");
    stored(&pulled.short());
    assert_eq!(
        stored("qwen3:8b"),
        "the short name of Qwen/Qwen3-8B-GGUF:Q4_K_M; Qwen/Qwen3-8B-GGUF:Q4_K_M is in the store"
    );

    for (name, id) in [
        ("qwen2.5:7b", "bartowski/Qwen2.5-7B-Instruct-GGUF:Q4_K_M"),
        ("Qwen/Qwen3-8B-GGUF:Q8_0", "Qwen/Qwen3-8B-GGUF:Q8_0"),
        ("org/repo", "org/repo"),
        ("org/repo@v1.0", "org/repo@v1.0"),
        ("org/repo/file.gguf", "org/repo:file.gguf"),
        ("org/repo/sub/file.gguf", "org/repo:sub/file.gguf"),
        ("https://huggingface.co/org/repo", "org/repo"),
        ("all-minilm", "sentence-transformers/all-MiniLM-L6-v2"),
        ("mistral", "bartowski/Mistral-7B-Instruct-v0.3-GGUF:Q4_K_M"),
    ] {
        assert_eq!(places.resolve(name).unwrap().target, hub(id), "{name}");
    }
}

#[test]
fn what_means_several_models_or_none_is_an_error_with_the_candidates() {
    let (dir, store) = store();
    let folder = dir.path().join("local-models");
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(folder.join("tiny-a.gguf"), "").unwrap();
    let (q4, q8) = (add(&store, "tiny-q4"), add(&store, "tiny-q8"));
    store.name("org/tiny:Q4_0", &q4, None).unwrap();
    store.name("org/tiny:Q8_0", &q8, None).unwrap();
    let folders = [folder];
    let places = Places {
        folders: &folders,
        store: Some(&store),
    };
    let candidates = |name: &str| match places.resolve(name) {
        Err(NameError::Ambiguous { candidates, .. }) => candidates.len(),
        other => panic!("{name}: {other:?}"),
    };
    assert_eq!(candidates("tiny"), 3);
    assert_eq!(candidates("org/tiny"), 2);
    assert!(candidates("qwen2.5") > 2, "short names count, too");

    for (name, expected) in [
        ("nothing", "no model \"nothing\": there are tiny-a,"),
        ("", "no model \"\""),
        ("/no/such.gguf", "no file or folder \"/no/such.gguf\""),
        ("./x", "no file or folder"),
        ("../up", "no file or folder"),
        (dir.path().to_str().unwrap(), "is no model"),
        ("a b/c", "no model"),
        ("../../etc/passwd", "no file or folder"),
        ("org/re\u{1b}po", "no model"),
    ] {
        let error = places.resolve(name).unwrap_err().to_string();
        assert!(error.contains(expected), "{name}: {error}");
    }
    let empty = Places {
        folders: &[],
        store: None,
    };
    let error = empty.resolve("nothing").unwrap_err().to_string();
    assert!(error.contains("ORGANISATION/MODEL"), "{error}");
}

#[test]
fn what_the_store_knows_of_a_folder_is_no_second_meaning() {
    let (dir, store) = store();
    let folder = dir.path().join("local-models");
    std::fs::create_dir(&folder).unwrap();
    let file = folder.join("tiny-q4.gguf");
    let made = crate::testing::gguf(dir.path(), mesh_model::Architecture::Llama);
    std::fs::rename(made, &file).unwrap();
    // As `hydramesh models sign` does, and again after the file was replaced by another one.
    store.adopt("tiny-q4", &file, &|_| ()).unwrap();
    let folders = [folder.clone()];
    let places = Places {
        folders: &folders,
        store: Some(&store),
    };
    let is_the_file = |name: &str| match places.resolve(name).unwrap().target {
        Target::Local(model) => assert_eq!(model.path, file, "{name}"),
        other => panic!("{name}: {other:?}"),
    };
    is_the_file("tiny");
    let made = crate::testing::gguf(dir.path(), mesh_model::Architecture::Qwen2);
    std::fs::rename(made, &file).unwrap();
    is_the_file("tiny");
    store.adopt("tiny-q4", &file, &|_| ()).unwrap();
    is_the_file("tiny");
    // Under another name it is that file still, however the folder is called.
    store.adopt("tiny-other", &file, &|_| ()).unwrap();
    is_the_file("tiny");
    let round_about = [folder.join("../local-models")];
    let places = Places {
        folders: &round_about,
        store: Some(&store),
    };
    assert!(matches!(
        places.resolve("tiny").unwrap().target,
        Target::Local(_)
    ));
    // Another model is another meaning.
    add(&store, "tiny-q8");
    let error = places.resolve("tiny").unwrap_err().to_string();
    assert!(
        error.contains("tiny-q8") && error.contains("tiny-q4"),
        "{error}"
    );
    assert!(!error.contains("tiny-other"), "{error}");
}

#[test]
fn a_damaged_model_is_found_by_its_names_unless_another_one_has_them() {
    let (_dir, store) = store();
    let (damaged, nameless) = (add(&store, "tiny"), add(&store, "small"));
    store.name("org/tiny:Q4_0", &damaged, None).unwrap();
    let path = store.manifest_path(&damaged);
    let altered = std::fs::read_to_string(&path).unwrap() + " ";
    std::fs::write(&path, altered).unwrap();
    std::fs::write(store.manifest_path(&nameless), "no JSON").unwrap();
    let places = Places {
        folders: &[],
        store: Some(&store),
    };
    let means = |name: &str| match places.resolve(name).unwrap().target {
        Target::Stored { fingerprint, .. } => fingerprint,
        other => panic!("{name}: {other:?}"),
    };
    for name in ["tiny", "tin", "org/tiny", &damaged.short()] {
        assert_eq!(means(name), damaged, "{name}");
    }
    assert_eq!(means(&nameless.short()), nameless);

    let manifest = manifest_of("tiny", b"others");
    let sound = store.put_manifest(&SignedManifest::unsigned(manifest));
    let sound = sound.unwrap();
    assert_eq!(means("tiny"), sound);
    assert_eq!(means("org/tiny"), damaged);
}

#[test]
fn short_names_like_a_mistyped_one_are_named() {
    let places = Places {
        folders: &[],
        store: None,
    };
    let error = places.resolve("qwen2.5:8b").unwrap_err().to_string();
    assert!(
        error.contains("short names like it are qwen2.5:"),
        "{error}"
    );
    assert!(error.contains("qwen2.5:7b"), "{error}");
}

#[test]
fn a_folder_is_no_model_where_a_name_is_meant() {
    // The tests run in the crate's folder, which has one of this name.
    let places = Places {
        folders: &[],
        store: None,
    };
    assert!(matches!(
        places.resolve("src"),
        Err(NameError::NotFound { .. })
    ));
    assert!(matches!(
        places.resolve("./src"),
        Err(NameError::NoModel { .. })
    ));
}

#[test]
fn every_short_name_is_a_name_on_the_hub() {
    let names = short_names();
    assert!(names.len() > 15);
    for (short, id) in names {
        assert_eq!(hub_id(id).as_ref(), Some(id), "{short}");
    }
}

#[test]
fn a_name_of_the_hub_means_itself_or_nothing() {
    for name in ["org/model", "org/model:file.gguf", "org/model@v1:Q8_0"] {
        let id = hub_id(name).unwrap();
        assert_eq!(hub_id(&id).as_ref(), Some(&id));
    }
    for name in [
        "org/model/\tfile",
        "org/model:a\u{7f}b",
        "hf.co/hf.co/model",
        "hf:huggingface.co/model",
    ] {
        assert_eq!(hub_id(name), None, "{name:?}");
    }
}
