use std::fs::Permissions;
use std::ops::Range;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use super::*;
use crate::digest::Digest;
use crate::error::StoreError;
use crate::manifest::Manifest;
use crate::partial::PartialKey;
use crate::signature::{SignedManifest, SigningKey};
use crate::testing::{begin, manifest_of, noise, store};

/// Stores a model of one file, whole.
fn add(store: &Store, name: &str, bytes: &[u8]) -> Digest {
    let manifest = manifest_of(name, bytes);
    store.put(bytes).unwrap();
    store
        .put_manifest(&SignedManifest::unsigned(manifest))
        .unwrap()
}

#[test]
fn a_model_is_listed_with_its_names_and_how_much_of_it_is_there() {
    let (_dir, store) = store();
    let whole = add(&store, "whole", &noise(1, 1000));
    store
        .name("org/whole", &whole, Some("org/whole at abc"))
        .unwrap();
    let bytes = noise(2, 1000);
    let manifest = manifest_of("part", &bytes);
    let partial = begin(&store, &manifest.files[0]);
    partial.write_at(100, &bytes[100..300]).unwrap();
    partial.flush().unwrap();
    let part = store
        .put_manifest(&SignedManifest::unsigned(manifest))
        .unwrap();

    let models = store.models().unwrap();
    let facts: Vec<_> = models
        .iter()
        .map(|m| (m.fingerprint, m.present, m.pinned))
        .collect();
    assert_eq!(facts, [(part, 200, false), (whole, 1000, false)]);
    assert_eq!(models[1].names[0].name, "org/whole");

    let pin = store.pin(&whole).unwrap();
    assert_eq!(pin.fingerprint(), whole);
    assert!(store.models().unwrap()[1].pinned);
    drop(pin);
    assert!(!store.models().unwrap()[1].pinned);
    let other = Digest::of("other");
    assert!(matches!(store.pin(&other), Err(StoreError::NoModel { .. })));
}

#[test]
fn the_folder_of_a_model_leads_to_its_files_whole_or_not() {
    let (dir, store) = store();
    let folder = dir.path().join("hf");
    std::fs::create_dir_all(folder.join("sub")).unwrap();
    let (a, b) = (noise(1, 500), noise(2, 900));
    std::fs::write(
        folder.join("model.safetensors"),
        crate::testing::safetensors(&["a"], 5),
    )
    .unwrap();
    std::fs::write(folder.join("a.json"), &a).unwrap();
    std::fs::write(folder.join("sub/b.json"), &b).unwrap();
    let manifest = Manifest::of_path("hf", &folder, &|_| ()).unwrap();
    let fingerprint = store
        .put_manifest(&SignedManifest::unsigned(manifest.clone()))
        .unwrap();
    store.put(&a).unwrap();
    let partial = begin(&store, &manifest.files[2]);
    partial.write_at(0, &b[..10]).unwrap();
    partial.flush().unwrap();

    let links = store.folder(&fingerprint).unwrap();
    assert_eq!(std::fs::read(links.join("a.json")).unwrap(), a);
    let sparse = std::fs::read(links.join("sub/b.json")).unwrap();
    assert_eq!((sparse.len(), &sparse[..10]), (900, &b[..10]));
    assert!(!links.join("model.safetensors").exists());

    partial.write_at(0, &b).unwrap();
    partial.complete().unwrap();
    assert_eq!(
        std::fs::read(store.folder(&fingerprint).unwrap().join("sub/b.json")).unwrap(),
        b
    );
    store.remove(&fingerprint).unwrap();
    assert!(!links.exists());
    assert_eq!(store.list("blobs").unwrap(), [] as [PathBuf; 0]);
    assert!(matches!(
        store.folder(&fingerprint),
        Err(StoreError::NoModel { .. })
    ));
}

#[test]
fn signatures_gather_and_a_tampered_manifest_is_refused() {
    let (_dir, store) = store();
    let manifest = manifest_of("m", b"abc");
    let (one, two) = (SigningKey::generate(), SigningKey::generate());
    for key in [&one, &two, &one] {
        let mut signed = SignedManifest::unsigned(manifest.clone());
        signed.add(key.sign(&manifest));
        store.put_manifest(&signed).unwrap();
    }
    let fingerprint = store
        .put_manifest(&SignedManifest::unsigned(manifest))
        .unwrap();
    let signed = store.manifest(&fingerprint).unwrap().unwrap();
    let keys: Vec<Digest> = signed.signatures.iter().map(|s| s.key).collect();
    assert_eq!(keys, [two.public().id(), one.public().id()]);

    let path = store.manifest_path(&fingerprint);
    let text = std::fs::read_to_string(&path)
        .unwrap()
        .replace("weights.bin", "weights.bim");
    std::fs::write(&path, text).unwrap();
    let error = store.manifest(&fingerprint).unwrap_err();
    assert!(error.to_string().contains("it was altered"), "{error}");
    assert!(
        error.to_string().contains(path.to_str().unwrap()),
        "{error}"
    );
    assert_eq!(store.models().unwrap().len(), 0);
}

#[test]
fn what_is_damaged_is_told_of_and_mended_or_removed() {
    let (_dir, store) = store();
    let bytes = noise(1, 100);
    let fingerprint = add(&store, "m", &bytes);
    let path = store.manifest_path(&fingerprint);
    let whole = std::fs::read_to_string(&path).unwrap();
    let damage = || std::fs::write(&path, whole.replace("weights.bin", "weights.bim")).unwrap();
    let damaged = || {
        let contents = store.contents().unwrap();
        let damaged = contents.damaged.iter();
        damaged
            .map(|model| (model.fingerprint, model.name()))
            .collect::<Vec<_>>()
    };
    damage();
    assert_eq!(damaged(), [(fingerprint, "m".to_owned())]);
    // Fetched or signed again, it is as it was.
    assert_eq!(add(&store, "m", &bytes), fingerprint);
    assert_eq!(damaged(), []);
    assert_eq!(store.models().unwrap().len(), 1);

    let signatures = store.signatures_path(&fingerprint);
    std::fs::write(&signatures, "[]x").unwrap();
    assert_eq!(damaged(), [(fingerprint, "m".to_owned())]);
    assert_eq!(add(&store, "m", &bytes), fingerprint);
    assert_eq!(damaged(), []);

    damage();
    std::fs::write(&signatures, "[]x").unwrap();
    assert_eq!(store.remove(&fingerprint).unwrap(), 0);
    assert_eq!(damaged(), []);
    assert!(store.list("manifests").unwrap().is_empty());
    let error = store.remove(&fingerprint).unwrap_err();
    assert!(matches!(error, StoreError::NoModel { .. }), "{error}");
}

#[test]
fn a_store_is_found_and_told_from_other_folders() {
    let (dir, store) = store();
    let find = |path: PathBuf| Store::find(path);
    let root = store.root().to_owned();
    assert_eq!(find(root.clone()).unwrap().unwrap().root(), root);
    let empty = dir.path().join("empty");
    assert!(find(empty.clone()).unwrap().is_none());
    std::fs::create_dir(&empty).unwrap();
    assert!(find(empty.clone()).unwrap().is_none());
    assert_eq!(std::fs::read_dir(&empty).unwrap().count(), 0);
    let file = empty.join("file");
    std::fs::write(&file, "").unwrap();
    for other in [empty, file] {
        let error = find(other).unwrap_err();
        assert!(matches!(error, StoreError::NoStore { .. }), "{error}");
    }
}

#[test]
fn a_piece_is_read_from_wherever_it_is_and_checked() {
    let (dir, store) = store();
    let bytes = noise(1, 6 << 20);
    let path = dir.path().join("weights.bin");
    std::fs::write(&path, &bytes).unwrap();
    let signed = store.adopt("m", &path, &|_| ()).unwrap();
    let (manifest, fingerprint) = (&signed.manifest, signed.manifest.fingerprint());
    let file = &manifest.files[0];
    // The piece, and whether it is as the manifest says.
    let read = |piece: u32| {
        let presence = store.presence(&fingerprint, file);
        if !file.pieces_in(&presence.have).contains(&piece) {
            return None;
        }
        let path = presence.path.unwrap();
        let bad = file.bad_pieces(&path, &[piece], &|_| ()).unwrap();
        let Range { start, end } = file.pieces[piece as usize].range();
        let bytes = std::fs::read(path).unwrap()[start as usize..end as usize].to_vec();
        Some((bytes, bad.is_empty()))
    };
    let whole = Some((bytes[4 << 20..].to_vec(), true));
    assert_eq!(read(1), whole);
    assert_eq!(read(2), None);
    // Remembered, not read again.
    store.adopt("m", &path, &|_| panic!("read again")).unwrap();

    // Changed since: it is not that model any more.
    std::fs::write(&path, &bytes[1..]).unwrap();
    assert_eq!(read(1), None);
    let partial = begin(&store, &manifest.files[0]);
    partial.write_at(4 << 20, &bytes[4 << 20..]).unwrap();
    partial.flush().unwrap();
    assert_eq!(read(0), None);
    assert_eq!(read(1), whole);
    partial.write_at(5 << 20, b"damaged").unwrap();
    assert!(read(1).is_some_and(|(_, whole)| !whole));
}

#[test]
fn a_changed_file_outside_of_the_store_is_adopted_anew() {
    let (dir, store) = store();
    let path = dir.path().join("weights.bin");
    std::fs::write(&path, "one").unwrap();
    let one = store.adopt("m", &path, &|_| ()).unwrap();
    std::fs::write(&path, "another").unwrap();
    let other = store.adopt("m", &path, &|_| ()).unwrap();
    assert_ne!(one.manifest.fingerprint(), other.manifest.fingerprint());
    assert_eq!(other.manifest.files[0].sha256, Digest::of("another"));
}

#[test]
fn links_that_others_planted_are_not_followed() {
    use std::os::unix::fs::symlink;

    let (dir, store) = store();
    let victim = dir.path().join("victim");
    std::fs::write(&victim, "precious").unwrap();
    let bytes = noise(5, 1000);
    let manifest = manifest_of("m", &bytes);
    let file = &manifest.files[0];
    let partial = store.partial_path(&PartialKey::Blob(file.sha256));
    symlink(&victim, &partial).unwrap();
    let refused = store.begin(PartialKey::Blob(file.sha256), file.bytes, file.bytes);
    let refused = refused.unwrap_err().to_string();
    assert!(refused.contains("a link lies there"), "{refused}");
    assert!(refused.contains("remove it"), "{refused}");
    std::fs::remove_file(&partial).unwrap();

    // A model's folder that leads elsewhere.
    let fingerprint = add(&store, "m", &bytes);
    let elsewhere = dir.path().join("elsewhere");
    std::fs::create_dir(&elsewhere).unwrap();
    let name = &manifest.files[0].path;
    std::fs::write(elsewhere.join(name), "precious").unwrap();
    let folder = store.root().join("models").join(fingerprint.to_string());
    symlink(&elsewhere, &folder).unwrap();
    assert_eq!(store.folder(&fingerprint).unwrap(), folder);
    assert!(std::fs::symlink_metadata(&folder).unwrap().is_dir());
    assert_eq!(std::fs::read(elsewhere.join(name)).unwrap(), b"precious");

    for path in [store.pin_path(&Digest::of("x")), store.root().join("lock")] {
        let _ = std::fs::remove_file(&path);
        symlink(&victim, &path).unwrap();
    }
    assert!(store.pin(&fingerprint).is_err(), "the lock is a link");
    assert_eq!(std::fs::read(&victim).unwrap(), b"precious");
}

#[test]
fn a_file_that_is_swapped_while_it_is_completed_is_no_blob() {
    let (_dir, store) = store();
    let bytes = noise(6, 1000);
    let manifest = manifest_of("m", &bytes);
    let partial = begin(&store, &manifest.files[0]);
    partial.write_at(0, &bytes).unwrap();
    let path = partial.path();
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, noise(7, 1000)).unwrap();
    let error = partial.complete().unwrap_err().to_string();
    assert!(error.contains("another file lies there"), "{error}");
    assert_eq!(store.blob(&manifest.files[0].sha256), None);
}

#[test]
fn the_stores_folders_are_for_their_owner() {
    let dir = tempfile::tempdir().unwrap();
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    let root = dir.path().join("a/store");
    Store::open(&root).unwrap();
    assert_eq!((mode(&root), mode(&root.join("partial"))), (0o700, 0o700));
    // One that everybody could write to is closed; who may read stays.
    let open = Permissions::from_mode(0o777);
    std::fs::set_permissions(root.join("blobs"), open).unwrap();
    Store::open(&root).unwrap();
    assert_eq!(mode(&root.join("blobs")), 0o775);
}

#[test]
fn a_store_that_a_service_filled_in_roots_folder_is_read() {
    let (dir, store) = store();
    let root = store.root().to_owned();
    drop(store);
    let give = |folder: &str, uid| std::os::unix::fs::chown(root.join(folder), Some(uid), None);
    // Only root can give folders away.
    if give("blobs", 70_001).is_err() {
        return;
    }
    give("tmp", 70_001).unwrap();
    assert!(Store::open(&root).is_ok());
    give("names", 70_002).unwrap();
    let error = Store::open(&root).unwrap_err();
    assert!(matches!(error, StoreError::Foreign { .. }), "{error}");
    drop(dir);
}
