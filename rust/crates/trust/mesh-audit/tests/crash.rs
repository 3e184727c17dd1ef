//! Crashes: what a trail is after the process or the machine died at any moment.

#[allow(dead_code, reason = "each test uses some of it")]
mod common;

use std::fs;
use std::path::Path;

use common::{START, append, assert_whole, copy, keys, open, report};
use mesh_audit::archive::Archive;
use mesh_audit::recover::Recovered;
use mesh_audit::store::{Limits, Store, StoreError};
use mesh_audit::verify::Options;

fn entries(dir: &Path) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    let archive = Archive::open(dir).unwrap();
    archive
        .entries(0, |_, entry| {
            all.push(entry.to_vec());
            true
        })
        .unwrap();
    all
}

fn reopen(dir: &Path) -> Result<(Store, Recovered), StoreError> {
    let limits = Limits {
        epoch_time: u64::MAX,
        epoch_records: u64::MAX,
        bytes: 0,
    };
    Store::open(dir, "mesh/audit/test", keys(), None, limits, START)
}

#[test]
fn no_cut_loses_a_record_that_was_called_synced() {
    let dir = tempfile::tempdir().unwrap();
    let mut random = fastrand::Rng::with_seed(11);
    let mut store = open(dir.path());
    // Some of it is published, so that the journal begins in the middle.
    append(&mut store, 700);
    store.publish(START).unwrap();
    let journal = dir.path().join("journal");
    let length = || fs::metadata(&journal).unwrap().len();
    let mut acknowledged = vec![(length(), store.size())];
    for _ in 0..30 {
        append(&mut store, random.u64(1..20));
        store.sync(START).unwrap();
        acknowledged.push((length(), store.size()));
    }
    append(&mut store, 7);
    drop(store);
    let (whole, all) = (fs::read(&journal).unwrap(), entries(dir.path()));
    let first = acknowledged[0].0 as usize;
    let copied = tempfile::tempdir().unwrap();
    for turn in 0..200 {
        let cut = random.usize(first..=whole.len());
        let target = copied.path().join(turn.to_string());
        copy(dir.path(), &target);
        fs::write(target.join("journal"), &whole[..cut]).unwrap();
        let (store, recovered) = reopen(&target).unwrap();
        let safe = acknowledged
            .iter()
            .rfind(|(end, _)| *end as usize <= cut)
            .unwrap()
            .1;
        assert!(
            recovered.records >= safe,
            "cut at {cut}: {recovered:?}, {safe} were acknowledged"
        );
        assert_eq!(recovered.unsigned, recovered.records - safe);
        assert!(recovered.cut_bytes < 20_000);
        let kept = entries(&target);
        let count = recovered.records as usize;
        assert_eq!(kept[..count], all[..count], "cut at {cut}");
        // What happened is in the trail.
        assert_eq!(
            store.size(),
            recovered.records + u64::from(recovered.is_notable())
        );
        if recovered.is_notable() {
            assert!(String::from_utf8_lossy(&kept[count]).contains("\"recovered\""));
        }
        drop(store);
        if turn % 10 == 0 {
            assert_whole(&target);
        }
        fs::remove_dir_all(&target).unwrap();
    }
}

#[test]
fn a_hole_before_a_signed_group_is_damage_and_not_a_crash() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = open(dir.path());
    append(&mut store, 20);
    store.sync(START).unwrap();
    append(&mut store, 20);
    store.sync(START).unwrap();
    drop(store);
    let journal = dir.path().join("journal");
    let mut bytes = fs::read(&journal).unwrap();
    bytes[2000..2100].fill(0);
    fs::write(&journal, &bytes).unwrap();
    let error = reopen(dir.path()).unwrap_err();
    assert!(matches!(error, StoreError::Damaged { .. }), "{error}");
    assert_eq!(fs::read(&journal).unwrap(), bytes, "nothing is cut off");
}

#[test]
fn a_record_with_a_wrong_code_is_not_continued() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = open(dir.path());
    append(&mut store, 3);
    drop(store);
    // Somebody without the key of the chain appends a record, with a correct checksum.
    let other = tempfile::tempdir().unwrap();
    let mut store = open(other.path());
    append(&mut store, 4);
    drop(store);
    let journal = |dir: &Path| dir.join("journal");
    let before = fs::read(journal(dir.path())).unwrap();
    let longer = fs::read(journal(other.path())).unwrap();
    let forged = [&before[..], &longer[before.len()..]].concat();
    fs::write(journal(dir.path()), forged).unwrap();
    let error = reopen(dir.path()).unwrap_err().to_string();
    assert!(error.contains("code of the chain"), "{error}");
}

#[test]
fn a_crash_during_publication_is_repaired() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = open(dir.path());
    append(&mut store, 300);
    store.publish(START).unwrap();
    append(&mut store, 500);
    store.sync(START).unwrap();
    let journal = dir.path().join("journal");
    let before = fs::read(&journal).unwrap();
    store.publish(START).unwrap();
    drop(store);
    // The tiles are there, and the journal was not replaced yet.
    fs::write(&journal, &before).unwrap();
    assert_whole(dir.path());
    let (mut store, recovered) = reopen(dir.path()).unwrap();
    assert!(!recovered.is_notable());
    append(&mut store, 100);
    store.publish(START).unwrap();
    drop(store);
    assert_eq!(assert_whole(dir.path()).size, 900);
    // The tiles are half there.
    fs::write(&journal, &before).unwrap();
    let copied = tempfile::tempdir().unwrap();
    copy(dir.path(), copied.path());
    for file in ["tile/0/001", "tile/entries/002", "checkpoint"] {
        fs::remove_file(copied.path().join(file)).unwrap();
    }
    let (mut store, _) = reopen(copied.path()).unwrap();
    store.publish(START).unwrap();
    drop(store);
    assert_eq!(assert_whole(copied.path()).size, 800);
}

#[test]
fn a_crash_at_the_end_of_an_epoch_ends_it_later() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = open(dir.path());
    append(&mut store, 5);
    let key = fs::read(dir.path().join("chain.key")).unwrap();
    store.end_epoch(START).unwrap();
    drop(store);
    fs::write(dir.path().join("chain.key"), key).unwrap();
    fs::remove_file(dir.path().join("epoch/0")).unwrap();
    let (mut store, _) = reopen(dir.path()).unwrap();
    assert_eq!(store.epoch(), 1);
    append(&mut store, 5);
    store.publish(START).unwrap();
    drop(store);
    let report = assert_whole(dir.path());
    assert_eq!((report.epochs, report.size), (1, 11));
}

#[test]
fn a_crash_before_the_end_of_an_epoch_is_signed_ends_it_before_the_report() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = open(dir.path());
    append(&mut store, 5);
    let key = fs::read(dir.path().join("chain.key")).unwrap();
    store.end_epoch(START).unwrap();
    drop(store);
    fs::write(dir.path().join("chain.key"), key).unwrap();
    fs::remove_file(dir.path().join("epoch/0")).unwrap();
    // The group with the last record of the epoch was not signed.
    let journal = dir.path().join("journal");
    let bytes = fs::read(&journal).unwrap();
    let seal = bytes.windows(4).rposition(|four| four == b"HMA1").unwrap();
    fs::write(&journal, &bytes[..seal]).unwrap();
    let (mut store, recovered) = reopen(dir.path()).unwrap();
    assert_eq!((recovered.unsigned, store.epoch()), (6, 1));
    store.publish(START).unwrap();
    drop(store);
    let report = assert_whole(dir.path());
    assert_eq!((report.epochs, report.size), (1, 7));
}

#[test]
fn a_live_trail_may_have_an_incomplete_end() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = open(dir.path());
    append(&mut store, 5);
    store.sync(START).unwrap();
    append(&mut store, 1);
    drop(store);
    let journal = dir.path().join("journal");
    let whole = fs::read(&journal).unwrap();
    fs::write(&journal, &whole[..whole.len() - 3]).unwrap();
    let live = Options {
        live: true,
        ..Options::default()
    };
    assert_eq!(report(dir.path(), &live).findings, []);
    let found = report(dir.path(), &Options::default()).findings;
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].records, Some((5, 5)));
}

#[test]
fn a_damaged_trail_is_set_aside_and_a_new_one_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let lock = mesh_audit::home::Lock::take(dir.path()).unwrap();
    let tier = mesh_audit::home::Tier::Master;
    let open = || {
        lock.open(tier, "attic mesh", None, Limits::default(), START)
            .unwrap()
    };
    let mut opened = open();
    assert!(opened.set_aside.is_none());
    let before = opened.store.origin().to_owned();
    assert!(before.starts_with("attic-mesh/audit/master/"), "{before}");
    append(&mut opened.store, 3);
    opened.store.sync(START).unwrap();
    append(&mut opened.store, 3);
    opened.store.sync(START).unwrap();
    drop(opened);
    let journal = lock.dir_of(tier).join("journal");
    let mut bytes = fs::read(&journal).unwrap();
    bytes[300] ^= 1;
    fs::write(&journal, bytes).unwrap();
    let opened = open();
    let (aside, reason) = opened.set_aside.unwrap();
    assert!(aside.join("journal").exists(), "{reason}");
    assert_ne!(
        opened.store.origin(),
        before,
        "a tree that begins anew has another name"
    );
    drop(opened.store);
    let first = &entries(&lock.dir_of(tier))[0];
    assert!(String::from_utf8_lossy(first).contains("set_aside"));
}
