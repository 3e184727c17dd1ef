use std::fs::File;
use std::os::unix::fs::FileExt;

use super::*;
use crate::signature::SignedManifest;
use crate::store::Begun;
use crate::testing::{begin, manifest_of, noise, store, store_of};

const KIB: u64 = 1 << 10;

/// Stores a model of `kib` KiB that was used `age` hours ago.
fn add(store: &Store, name: &str, kib: u64, age: u64) -> Digest {
    let bytes = noise(kib * 1000 + name.len() as u64, (kib * KIB) as usize);
    let manifest = manifest_of(name, &bytes);
    store.put(&bytes).unwrap();
    let fingerprint = store
        .put_manifest(&SignedManifest::unsigned(manifest))
        .unwrap();
    drop(store.pin(&fingerprint).unwrap());
    set_age(
        &store.pin_path(&fingerprint),
        Duration::from_secs(age * 3600),
    );
    fingerprint
}

fn set_age(path: &Path, age: Duration) {
    File::open(path)
        .unwrap()
        .set_modified(SystemTime::now() - age)
        .unwrap();
}

fn names(store: &Store) -> Vec<String> {
    let models = store.models().unwrap();
    models
        .into_iter()
        .map(|model| model.signed.manifest.name)
        .collect()
}

#[test]
fn the_least_recently_used_goes_first_and_what_is_loaded_stays() {
    let (_dir, store) = store_of(Some(1000 * KIB));
    let loaded = add(&store, "loaded", 300, 9);
    add(&store, "old", 200, 8);
    add(&store, "older", 100, 8 * 24);
    add(&store, "new", 300, 1);
    let _pin = store.pin(&loaded).unwrap();
    store.admit(100 * KIB).unwrap();
    assert_eq!(names(&store).len(), 4);
    store.admit(150 * KIB).unwrap();
    assert_eq!(names(&store), ["loaded", "new", "old"]);

    let error = store.admit(800 * KIB).unwrap_err();
    let StoreError::NoRoom(no_room) = &error else {
        panic!("{error}");
    };
    assert_eq!(no_room.limit, Some(1000 * KIB));
    assert_eq!(
        (no_room.available, no_room.evictable),
        (200 * KIB, 500 * KIB)
    );
    assert_eq!(
        names(&store),
        ["loaded", "new", "old"],
        "nothing went in vain"
    );
    store.admit(700 * KIB).unwrap();
    assert_eq!(names(&store), ["loaded"]);
    assert!(matches!(
        store.remove(&loaded),
        Err(StoreError::Pinned { .. })
    ));
}

#[test]
fn a_file_of_two_models_goes_with_the_second() {
    let (_dir, store) = store();
    let one = add(&store, "one", 64, 2);
    let bytes = noise(64 * 1000 + 3, 64 << 10);
    let two = store
        .put_manifest(&SignedManifest::unsigned(manifest_of("two", &bytes)))
        .unwrap();
    assert_eq!(store.models().unwrap()[1].present, 64 << 10);
    assert_eq!(store.remove(&one).unwrap(), 0);
    assert_eq!(store.models().unwrap()[0].present, 64 << 10);
    assert_eq!(store.remove(&two).unwrap(), 64 << 10);
    assert_eq!(store.used().unwrap(), 0);
    assert!(matches!(
        store.remove(&two),
        Err(StoreError::NoModel { .. })
    ));
}

#[test]
fn room_that_a_running_fetch_was_promised_is_taken() {
    let (_dir, store) = store_of(Some(1000 * KIB));
    let bytes = noise(1, 600 << 10);
    let manifest = manifest_of("m", &bytes);
    let fingerprint = store
        .put_manifest(&SignedManifest::unsigned(manifest.clone()))
        .unwrap();
    let partial = begin(&store, &manifest.files[0]);
    partial.write_at(0, &bytes[..100 << 10]).unwrap();
    partial.flush().unwrap();
    let key = PartialKey::Blob(Digest::of("another"));
    let error = store.begin(key, 500 * KIB, 500 * KIB).unwrap_err();
    assert!(matches!(error, StoreError::NoRoom(_)), "{error}");
    assert!(matches!(
        store.begin(key, 500 * KIB, 400 * KIB),
        Ok(Begun::Partial(_))
    ));
    assert!(
        matches!(store.remove(&fingerprint), Err(StoreError::Pinned { .. })),
        "it is fetched"
    );
    drop(partial);
    // The fetch is over: what it has may go for others.
    store.admit(1000 * KIB).unwrap();
    assert_eq!(names(&store), [""; 0]);
}

#[test]
fn the_disk_is_a_limit_too() {
    let dir = tempfile::tempdir().unwrap();
    let limits = Limits {
        bytes: None,
        keep_free: u64::MAX / 2,
    };
    let store = Store::open_with(dir.path(), limits).unwrap();
    let error = store.put(b"abc").unwrap_err();
    assert!(
        error.to_string().contains("bytes of the disk may be used"),
        "{error}"
    );
}

#[test]
fn gc_removes_what_nobody_needs_and_tells_before() {
    let (_dir, store) = store();
    let old = Duration::from_secs(8 * 24 * 3600);
    let kept = add(&store, "kept", 16, 0);
    let orphan = store.blob_path(&store.put(b"orphan").unwrap());
    let fresh = store.put(b"fresh").unwrap();
    set_age(&orphan, old);
    let abandoned = begin(&store, &manifest_of("x", b"abandoned").files[0]).path();
    set_age(&abandoned, old);
    let recent = begin(&store, &manifest_of("x", b"recent").files[0]).path();
    let map = store
        .root()
        .join("partial")
        .join(format!("{}.have", Digest::of("gone")));
    std::fs::write(&map, "{}").unwrap();
    let tmp = store.tmp().join("left");
    std::fs::write(&tmp, "left").unwrap();
    set_age(&tmp, old);
    let gone = Digest::of("gone");
    store.name("gone", &gone, None).unwrap();
    std::fs::create_dir(store.root().join("models").join(gone.to_string())).unwrap();

    let told = store.gc(None, true).unwrap();
    assert!(orphan.exists() && abandoned.exists());
    let report = store.gc(None, false).unwrap();
    assert_eq!(report, told);
    assert_eq!(report.removed.len(), 7, "{report:?}");
    for path in [&orphan, &abandoned, &have_path(&abandoned), &map, &tmp] {
        assert!(!path.exists(), "{}", path.display());
    }
    assert!(store.blob(&fresh).is_some() && recent.exists());
    assert_eq!(store.names().unwrap(), []);
    assert_eq!(store.gc(None, false).unwrap().removed, []);

    let report = store.gc(Some(0), false).unwrap();
    assert_eq!(report.removed[0].model, Some(kept));
    assert_eq!(
        report.removed[0].what,
        format!("model kept ({})", kept.short())
    );
    assert_eq!(report.freed(), 16 << 10);
}

#[test]
fn files_of_a_manifest_that_cannot_be_read_are_not_left_over() {
    let (_dir, store) = store();
    let fingerprint = add(&store, "m", 16, 0);
    let blob = store.list("blobs").unwrap().remove(0);
    set_age(&blob, 2 * LEFTOVER_AGE);
    std::fs::write(store.manifest_path(&fingerprint), "{}").unwrap();
    assert_eq!(store.gc(None, false).unwrap().removed, []);
    assert!(blob.exists());
}

#[test]
fn a_hole_takes_no_room() {
    let (_dir, store) = store_of(Some(100 * KIB));
    let key = PartialKey::Blob(Digest::of("huge"));
    let Begun::Partial(partial) = store.begin(key, 1 << 40, 50 * KIB).unwrap() else {
        panic!("it is not there");
    };
    partial.write_at(1 << 39, &[1; 4096]).unwrap();
    partial.flush().unwrap();
    assert!(store.used().unwrap() < 20 * KIB);
    let mut read = [0; 2];
    File::open(partial.path())
        .unwrap()
        .read_exact_at(&mut read, (1 << 39) - 1)
        .unwrap();
    assert_eq!(read, [0, 1]);
}

#[test]
fn a_clock_that_jumps_takes_nothing_from_who_is_at_work() {
    let (_dir, store) = store();
    let leftover = store.put(b"of nobody, long since").unwrap();
    set_age(&store.blob_path(&leftover), 60 * DAY);
    let work = store.work().unwrap();
    let working: Vec<PathBuf> = store.list("tmp").unwrap();
    let mine = store.put(b"of a model that is being fetched").unwrap();
    let temporary = tempfile::NamedTempFile::new_in(store.tmp()).unwrap();
    temporary.as_file().lock().unwrap();
    // The clock said 1970 when the work began, and is right now.
    for path in working.iter().chain([&store.blob_path(&mine)]) {
        set_age(path, 50 * DAY);
    }
    set_age(temporary.path(), 50 * DAY);
    store.gc(None, false).unwrap();
    assert_eq!(store.blob(&leftover), None, "it is older than the work");
    assert!(store.blob(&mine).is_some());
    assert!(temporary.path().exists() && working[0].exists());
    // Whoever was killed left these.
    drop(work);
    temporary.as_file().unlock().unwrap();
    store.gc(None, false).unwrap();
    assert_eq!(store.blob(&mine), None);
    assert!(!temporary.path().exists() && !working[0].exists());
}

const DAY: Duration = Duration::from_secs(24 * 3600);
