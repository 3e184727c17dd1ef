use proptest::prelude::*;

use super::*;
use crate::store::Begun;
use crate::testing::{begin, manifest_of, noise, store};

#[test]
fn a_file_is_taken_up_where_it_was_left() {
    let (_dir, store) = store();
    let bytes = noise(1, 3 << 20);
    let manifest = manifest_of("m", &bytes);
    let file = &manifest.files[0];
    let partial = begin(&store, file);
    partial.write_at(1 << 20, &bytes[1 << 20..2 << 20]).unwrap();
    partial.flush().unwrap();
    assert_eq!(partial.read_at(0..10).unwrap(), None);
    assert_eq!(
        partial.read_at(1 << 20..(1 << 20) + 3).unwrap().unwrap(),
        bytes[1 << 20..][..3]
    );
    assert!(matches!(
        store.begin(partial.key(), file.bytes, file.bytes),
        Err(StoreError::Busy { .. })
    ));
    drop(partial);

    let partial = begin(&store, file);
    assert_eq!(partial.missing(), [0..1 << 20, 2 << 20..3 << 20]);
    assert!(matches!(
        partial.complete(),
        Err(StoreError::Incomplete { missing, .. }) if missing == 2 << 20
    ));
    let partial = begin(&store, file);
    for gap in partial.missing() {
        partial
            .write_at(gap.start, &bytes[gap.start as usize..gap.end as usize])
            .unwrap();
    }
    assert_eq!(partial.complete().unwrap(), file.sha256);
    let blob = store.blob(&file.sha256).unwrap();
    assert_eq!(std::fs::read(&blob).unwrap(), bytes);
    assert!(matches!(
        store.begin(PartialKey::Blob(file.sha256), file.bytes, file.bytes),
        Ok(Begun::Whole(path)) if path == blob
    ));
    assert_eq!(store.list("partial").unwrap(), [] as [PathBuf; 0]);
}

#[test]
fn a_file_that_is_another_one_is_refused_and_fetched_again() {
    let (_dir, store) = store();
    let bytes = noise(1, 1000);
    let file = &manifest_of("m", &bytes).files[0];
    let partial = begin(&store, file);
    partial.write_at(0, &noise(2, 1000)).unwrap();
    let error = partial.complete().unwrap_err();
    assert!(
        matches!(error, StoreError::Mismatch { wanted, .. } if wanted == file.sha256),
        "{error}"
    );
    assert_eq!(store.blob(&file.sha256), None);
    assert_eq!(begin(&store, file).missing(), [0..1000]);
}

#[test]
fn a_disk_that_spoils_a_piece_does_not_convict_the_manifest() {
    let (_dir, store) = store();
    let bytes = noise(1, 10 << 20);
    let file = &manifest_of("m", &bytes).files[0];
    let partial = begin(&store, file);
    partial.write_at(0, &bytes).unwrap();
    partial.write_at(5 << 20, b"damaged").unwrap();
    let error = partial.complete_as(file).unwrap_err();
    assert!(
        matches!(error, StoreError::Spoiled { pieces: 1, .. }),
        "{error}"
    );
    let partial = begin(&store, file);
    assert_eq!(partial.missing(), [4 << 20..8 << 20]);
    partial.write_at(4 << 20, &bytes[4 << 20..8 << 20]).unwrap();
    // A manifest whose pieces are those of another file than the one it tells of lies.
    let lie = crate::manifest::ManifestFile {
        sha256: Digest::of("another file"),
        ..file.clone()
    };
    let lying = begin(&store, &lie);
    lying.write_at(0, &bytes).unwrap();
    let error = lying.complete_as(&lie).unwrap_err();
    assert!(matches!(error, StoreError::Mismatch { .. }), "{error}");
    assert_eq!(begin(&store, &lie).missing(), [0..10 << 20]);
    assert_eq!(partial.complete_as(file).unwrap(), file.sha256);
}

#[test]
fn a_repair_forgets_the_bad_pieces_and_no_others() {
    let (_dir, store) = store();
    let bytes = noise(1, 10 << 20);
    let file = &manifest_of("m", &bytes).files[0];
    let partial = begin(&store, file);
    partial.write_at(0, &bytes[..8 << 20]).unwrap();
    partial.write_at(5 << 20, b"damaged").unwrap();
    assert_eq!(partial.repair(file).unwrap(), [1]);
    // The end was never there.
    let missing = [4 << 20..10 << 20];
    assert_eq!(partial.missing(), missing);
    drop(partial);
    assert_eq!(begin(&store, file).missing(), missing);
}

#[test]
fn a_file_without_a_known_digest_gets_one() {
    let (_dir, store) = store();
    let bytes = noise(3, 500);
    let key = PartialKey::source("org/repo@commit/config.json");
    let open = || match store.begin(key, 500, 500).unwrap() {
        Begun::Partial(partial) => partial,
        Begun::Whole(path) => panic!("{path:?}"),
    };
    open().write_at(0, &bytes[..100]).unwrap();
    let partial = open();
    // Dropped without flush: it counts for nothing, and does no harm.
    assert_eq!(partial.missing(), [0..500]);
    partial.write_at(0, &bytes).unwrap();
    let mut other = manifest_of("m", &bytes).files[0].clone();
    other.sha256 = Digest::of("other");
    let error = partial.complete_as(&other).unwrap_err();
    assert!(matches!(error, StoreError::Mismatch { .. }), "{error}");
    let partial = open();
    partial.write_at(0, &bytes).unwrap();
    let digest = partial.complete().unwrap();
    assert_eq!(digest, Digest::of(&bytes));
    assert_eq!(std::fs::read(store.blob(&digest).unwrap()).unwrap(), bytes);
}

#[test]
fn writing_outside_of_the_file_is_an_error() {
    let (_dir, store) = store();
    let file = &manifest_of("m", &[0; 10]).files[0];
    let partial = begin(&store, file);
    for (offset, len) in [(10, 1), (0, 11), (u64::MAX, 2)] {
        let written = partial.write_at(offset, &vec![1; len]);
        assert!(
            matches!(written, Err(StoreError::Outside { .. })),
            "{offset}"
        );
    }
    assert!(partial.read_at(5..11).is_err());
    partial.write_at(10, &[]).unwrap();
    assert_eq!(partial.missing(), [0..10]);
}

#[test]
fn a_have_map_that_fits_no_file_is_none() {
    let (_dir, store) = store();
    let bytes = noise(1, 100);
    let file = &manifest_of("m", &bytes).files[0];
    let path = begin(&store, file).path();
    let have = have_path(&path);
    for map in [
        "",
        "{}",
        r#"{"version":1,"bytes":100,"wanted":100,"have":[[0,101]]}"#,
        r#"{"version":1,"bytes":100,"wanted":100,"have":[[5,5]]}"#,
        r#"{"version":1,"bytes":100,"wanted":100,"have":[[5,9],[9,10]]}"#,
        r#"{"version":1,"bytes":100,"wanted":100,"have":[[50,60],[0,10]]}"#,
        r#"{"version":1,"bytes":99,"wanted":100,"have":[[0,10]]}"#,
        r#"{"version":2,"bytes":100,"wanted":100,"have":[[0,10]]}"#,
        r#"{"version":1,"bytes":100,"wanted":100,"have":[[-1,10]]}"#,
    ] {
        std::fs::write(&have, map).unwrap();
        assert_eq!(begin(&store, file).missing(), [0..100], "{map}");
    }
    // Of a file that is gone, or was cut, it says nothing either.
    let sound = r#"{"version":1,"bytes":100,"wanted":100,"have":[[0,10]]}"#;
    std::fs::write(&have, sound).unwrap();
    assert_eq!(begin(&store, file).missing(), [10..100]);
    std::fs::File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(50)
        .unwrap();
    assert_eq!(begin(&store, file).missing(), [0..100]);
    std::fs::write(&have, sound).unwrap();
    std::fs::remove_file(&path).unwrap();
    assert_eq!(begin(&store, file).missing(), [0..100]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// Writes, flushes, forgets and reopens in any order: exactly the written ranges count as present, and
    /// flushed ranges survive.
    #[test]
    fn what_counts_as_present_is_right(steps in prop::collection::vec((0..4u8, 0..200usize, 1..60usize), 1..30)) {
        const LEN: usize = 240;
        let (_dir, store) = store();
        let bytes = noise(9, LEN);
        let file = &manifest_of("m", &bytes).files[0];
        let mut partial = begin(&store, file);
        let mut flushed = RangeSet::default();
        let mut written = RangeSet::default();
        for (step, start, len) in steps {
            let range = start..(start + len).min(LEN);
            let positions = range.start as u64..range.end as u64;
            match step {
                0 => {
                    partial.write_at(positions.start, &bytes[range]).unwrap();
                    written.insert(positions);
                }
                1 => {
                    partial.flush().unwrap();
                    flushed = written.clone();
                }
                2 => {
                    partial.forget(positions.clone()).unwrap();
                    written.remove(positions);
                    flushed = written.clone();
                }
                _ => {
                    drop(partial);
                    partial = begin(&store, file);
                    written = flushed.clone();
                }
            }
            prop_assert_eq!(&partial.have(), &written);
        }
        for range in written.iter() {
            let read = partial.read_at(range.clone()).unwrap().unwrap();
            prop_assert_eq!(&read, &bytes[range.start as usize..range.end as usize]);
        }
        for gap in partial.missing() {
            partial.write_at(gap.start, &bytes[gap.start as usize..gap.end as usize]).unwrap();
        }
        prop_assert_eq!(partial.complete().unwrap(), file.sha256);
    }
}
