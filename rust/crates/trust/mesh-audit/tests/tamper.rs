//! Trails that somebody changed: each change is detected, and its place is told.

#[allow(dead_code, reason = "each test uses some of it")]
mod common;

use std::fs;
use std::path::Path;

use common::{START, append, assert_whole, copy, keys, open, report};
use mesh_audit::archive::Archive;
use mesh_audit::chain::ChainKey;
use mesh_audit::home::Tier;
use mesh_audit::kept::{Contradiction, Kept, SHOWN, ShownEpochs};
use mesh_audit::note::{Checkpoint, Note};
use mesh_audit::proof::Proof;
use mesh_audit::tiles::{bundle, bundle_path, tile_path, unbundle};
use mesh_audit::verify::{Finding, Options};

/// The numbers of the records that findings name, each once.
fn records(findings: &[Finding]) -> Vec<u64> {
    let spans = findings.iter().filter_map(|finding| finding.records);
    let mut all: Vec<u64> = spans.flat_map(|(first, last)| first..=last).collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// Changes one byte after the other, and calls `check` with its offset and the findings.
fn change_each(
    dir: &Path,
    file: &Path,
    offsets: impl Iterator<Item = usize>,
    check: impl Fn(usize, &[Finding]),
) -> usize {
    let path = dir.join(file);
    let whole = fs::read(&path).unwrap();
    let mut changed = whole.clone();
    let mut count = 0;
    for at in offsets.filter(|at| *at < whole.len()) {
        changed[at] ^= 1 << (at % 8);
        fs::write(&path, &changed).unwrap();
        let found = report(dir, &Options::default()).findings;
        assert!(
            !found.is_empty(),
            "byte {at} of {} was changed unnoticed",
            file.display()
        );
        check(at, &found);
        changed[at] = whole[at];
        count += 1;
    }
    fs::write(&path, &whole).unwrap();
    count
}

#[test]
fn every_changed_byte_of_a_small_trail_is_detected_and_located() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = open(dir.path());
    append(&mut store, 9);
    store.publish(START).unwrap();
    drop(store);
    assert_whole(dir.path());
    // Signatures are thousands of letters that are all treated alike: every seventh of those.
    let sparse = |from: usize| (0..from).chain((from..100_000).step_by(7));
    let note = fs::read(dir.path().join("checkpoint")).unwrap();
    let text = note.windows(2).position(|two| two == b"\n\n").unwrap() + 60;
    let mut count = change_each(dir.path(), Path::new("checkpoint"), sparse(text), |_, _| {});
    count += change_each(dir.path(), Path::new("keys"), sparse(60), |_, _| {});
    let tile = tile_path(0, 0, 9);
    count += change_each(dir.path(), &tile, 0..100_000, |at, found| {
        assert_eq!(found[0].file, tile);
        assert_eq!(
            found[0].bytes,
            Some((at as u64 / 32 * 32, at as u64 / 32 * 32 + 31))
        );
        assert_eq!(records(found), [at as u64 / 32]);
    });
    let file = bundle_path(0, 9);
    let bytes = fs::read(dir.path().join(&file)).unwrap();
    let starts: Vec<usize> = unbundle(&bytes).0.into_iter().map(|(at, _)| at).collect();
    count += change_each(dir.path(), &file, 0..100_000, |at, found| {
        let n = starts.partition_point(|start| start - 2 <= at) as u64 - 1;
        assert!(
            found.iter().any(|found| found.file == file),
            "{at}: {found:?}"
        );
        let told = records(found);
        assert_eq!(told[0], n, "{at}: {found:?}");
        // A changed length moves all records behind it.
        assert!(told == [n] || at < starts[n as usize], "{at}: {found:?}");
    });
    let journal = Path::new("journal");
    let entries = fs::metadata(dir.path().join(journal)).unwrap().len() as usize - 3300;
    count += change_each(dir.path(), journal, sparse(entries), |at, found| {
        let mut places = found.iter().filter(|found| found.file == journal);
        let is_told = places.any(|found| {
            found
                .bytes
                .is_some_and(|(first, last)| (first..=last).contains(&(at as u64)))
        });
        assert!(is_told, "{at}: {found:?}");
    });
    assert!(count > 5_000, "{count}");
    assert_whole(dir.path());
}

#[test]
fn changes_to_the_end_of_an_epoch_are_detected() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = open(dir.path());
    append(&mut store, 3);
    store.end_epoch(START).unwrap();
    append(&mut store, 2);
    store.publish(START).unwrap();
    drop(store);
    assert_eq!(assert_whole(dir.path()).epochs, 1);
    let epoch = Path::new("epoch/0");
    let count = change_each(
        dir.path(),
        epoch,
        (0..90).chain((90..100_000).step_by(97)),
        |_, found| {
            assert!(found.iter().all(|found| found.file == epoch), "{found:?}");
        },
    );
    assert!(count > 300, "{count}");
    fs::remove_file(dir.path().join(epoch)).unwrap();
    let found = report(dir.path(), &Options::default()).findings;
    assert!(found.iter().any(|found| found.file == epoch), "{found:?}");
}

#[test]
fn changed_removed_and_swapped_records_among_100_000_are_located() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = open(dir.path());
    for _ in 0..10 {
        append(&mut store, 10_000);
        store.publish(START).unwrap();
    }
    drop(store);
    assert_eq!(assert_whole(dir.path()).size, 100_000);
    let mut random = fastrand::Rng::with_seed(7);
    let mut tamper = |kind: &str| {
        let n = random.u64(0..99_840);
        let (index, at) = (n / 256, (n % 256) as usize);
        let path = dir.path().join(bundle_path(index, 256));
        let whole = fs::read(&path).unwrap();
        let mut entries: Vec<Vec<u8>> = unbundle(&whole)
            .0
            .into_iter()
            .map(|(_, entry)| entry.to_vec())
            .collect();
        let mut wanted = vec![n];
        match kind {
            "changed" => {
                let byte = random.usize(0..entries[at].len());
                entries[at][byte] ^= 1 << random.u8(0..8);
            }
            "removed" => {
                entries.remove(at);
                wanted = (n..index * 256 + 256).collect();
            }
            "inserted" => {
                let copy = entries[at].clone();
                entries.insert(at, copy);
                entries.pop();
                wanted = (n + 1..index * 256 + 256).collect();
            }
            _ => {
                let other = (at + random.usize(1..256)) % 256;
                entries.swap(at, other);
                wanted.push(index * 256 + other as u64);
                wanted.sort_unstable();
            }
        }
        fs::write(&path, bundle(&entries)).unwrap();
        let report = report(dir.path(), &Options::default());
        assert_eq!(
            records(&report.findings),
            wanted,
            "{kind}: {:?}",
            report.findings
        );
        assert!(
            report
                .findings
                .iter()
                .all(|found| found.file == bundle_path(index, 256))
        );
        if kind == "swapped" {
            assert!(
                report.findings[0].text.contains("stands here"),
                "{:?}",
                report.findings
            );
        }
        fs::write(&path, whole).unwrap();
    };
    for kind in [
        "changed", "swapped", "removed", "inserted", "changed", "swapped",
    ] {
        tamper(kind);
    }
    // Two bundles that change places.
    let (one, two) = (
        dir.path().join(bundle_path(3, 256)),
        dir.path().join(bundle_path(17, 256)),
    );
    let (first, second) = (fs::read(&one).unwrap(), fs::read(&two).unwrap());
    fs::write(&one, &second).unwrap();
    fs::write(&two, &first).unwrap();
    let found = report(dir.path(), &Options::default()).findings;
    let wanted: Vec<u64> = (768..1024).chain(4352..4608).collect();
    assert_eq!(records(&found), wanted);
    fs::write(&one, &first).unwrap();
    fs::write(&two, &second).unwrap();
    // Hashes of both levels.
    for (file, at, wanted) in [
        (tile_path(0, 5, 256), 33, 1281..1282),
        (tile_path(1, 0, 256), 65, 512..768),
    ] {
        let path = dir.path().join(&file);
        let whole = fs::read(&path).unwrap();
        let mut changed = whole.clone();
        changed[at] ^= 4;
        fs::write(&path, changed).unwrap();
        let found = report(dir.path(), &Options::default()).findings;
        assert!(found.iter().all(|found| found.file == file), "{found:?}");
        assert_eq!(records(&found), wanted.collect::<Vec<u64>>());
        fs::write(&path, whole).unwrap();
    }
}

#[test]
fn records_whose_hashes_were_changed_with_them_do_not_pass() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = open(dir.path());
    append(&mut store, 600);
    store.publish(START).unwrap();
    drop(store);
    let path = dir.path().join(bundle_path(1, 256));
    let bytes = fs::read(&path).unwrap();
    let mut entries: Vec<Vec<u8>> = unbundle(&bytes)
        .0
        .into_iter()
        .map(|(_, entry)| entry.to_vec())
        .collect();
    entries[10][20] ^= 1;
    fs::write(&path, bundle(&entries)).unwrap();
    let tile: Vec<u8> = entries
        .iter()
        .flat_map(|entry| mesh_audit::merkle::leaf_hash(entry))
        .collect();
    fs::write(dir.path().join(tile_path(0, 1, 256)), tile).unwrap();
    let found = report(dir.path(), &Options::default()).findings;
    assert!(
        found
            .iter()
            .any(|found| found.file == tile_path(1, 0, 2) && found.records == Some((256, 511))),
        "{found:?}"
    );
    assert!(
        found
            .iter()
            .any(|found| found.file == Path::new("checkpoint")),
        "{found:?}"
    );
}

#[test]
fn a_trail_that_was_cut_or_written_anew_does_not_continue_an_earlier_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = open(dir.path());
    append(&mut store, 300);
    store.publish(START).unwrap();
    let short = tempfile::tempdir().unwrap();
    copy(dir.path(), short.path());
    append(&mut store, 50);
    store.publish(START).unwrap();
    let later = store.checkpoint().unwrap().to_owned();
    drop(store);
    let seen = || Options {
        earlier: vec![Note::parse(later.as_bytes()).unwrap()],
        ..Options::default()
    };
    assert_eq!(report(dir.path(), &seen()).findings, []);
    let found = report(short.path(), &seen()).findings;
    assert_eq!(records(&found), (300..350).collect::<Vec<u64>>());
    // With the trail's own keys, but another history.
    let forged = tempfile::tempdir().unwrap();
    let mut store = open(forged.path());
    for n in 0..400 {
        store.append(&common::request(n + 1), START).unwrap();
    }
    store.publish(START).unwrap();
    drop(store);
    assert_whole(forged.path());
    assert!(!report(forged.path(), &seen()).findings.is_empty());
    let trusted = Options {
        trusted: vec![mesh_audit::keys::TrailKeys::generate().log_vkey("mesh/audit/test")],
        ..Options::default()
    };
    assert!(
        !report(dir.path(), &trusted).findings.is_empty(),
        "signed with a key that is not trusted"
    );
}

#[test]
fn a_trail_that_was_written_anew_with_the_real_keys_is_not_the_one_that_other_nodes_kept() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = open(dir.path());
    for _ in 0..6 {
        append(&mut store, 100);
        store.end_epoch(START).unwrap();
    }
    store.publish(START).unwrap();
    let shown = |store: &mesh_audit::store::Store| ShownEpochs {
        tier: Tier::Master,
        trail: store.origin().to_owned(),
        epochs: store.ended_epochs(SHOWN).unwrap(),
    };
    let mut kept = Kept::default();
    assert_eq!(kept.take("head", 1, &shown(&store)), []);
    let epochs = kept.epochs_of("mesh/audit/test");
    assert_eq!(
        epochs.last().map(|last| (last.epoch, last.size)),
        Some((5, 606))
    );
    drop(store);
    let options = || Options {
        kept: epochs.clone(),
        ..Options::default()
    };
    let good = report(dir.path(), &options());
    assert_eq!((good.findings, good.kept), (Vec::new(), SHOWN));

    // The same keys and the same number of records; one of them says something else.
    let forged = tempfile::tempdir().unwrap();
    let mut store = open(forged.path());
    for epoch in 0..6 {
        append(&mut store, 99);
        let other = if epoch == 1 { 1 } else { store.size() };
        let at = START + 10 * store.size();
        store.append(&common::request(other), at).unwrap();
        store.end_epoch(START).unwrap();
    }
    store.publish(START).unwrap();
    let found = kept.take("head", 2, &shown(&store));
    assert_eq!(found.len(), SHOWN, "{found:?}");
    assert!(matches!(
        found[0],
        Contradiction::Rewritten { epoch: 2, .. }
    ));
    drop(store);
    assert_whole(forged.path());
    assert!(!report(forged.path(), &options()).findings.is_empty());
}

#[test]
fn codes_are_checked_from_the_epoch_whose_key_was_kept() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = open(dir.path());
    append(&mut store, 5);
    let kept = store.rekey(START).unwrap();
    append(&mut store, 5);
    store.end_epoch(START).unwrap();
    append(&mut store, 5);
    store.publish(START).unwrap();
    drop(store);
    let options = |bytes| Options {
        chain: Some(ChainKey::new(kept.epoch(), bytes)),
        ..Options::default()
    };
    let whole = report(dir.path(), &options(*kept.bytes()));
    assert_eq!((whole.findings.len(), whole.coded, whole.size), (0, 11, 17));
    let wrong = report(dir.path(), &options([1; 32]));
    assert_eq!(records(&wrong.findings), (6..17).collect::<Vec<u64>>());
    // The present key says nothing about epochs before.
    let text = fs::read_to_string(dir.path().join("chain.key")).unwrap();
    assert!(text.contains("\"epoch\":2"), "{text}");
}

#[test]
fn a_proof_holds_for_its_record_and_no_changed_one_does() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = open(dir.path());
    append(&mut store, 700);
    store.publish(START).unwrap();
    drop(store);
    let archive = Archive::open(dir.path()).unwrap();
    let key = keys().log_vkey("mesh/audit/test");
    for n in [0, 255, 256, 511, 698, 699] {
        let proof = Proof::of(&archive, n).unwrap();
        let text = proof.to_text();
        let read = Proof::parse(&text).unwrap();
        assert_eq!(read, proof);
        read.verify(&key).unwrap();
        assert!(String::from_utf8_lossy(&read.entry).contains(&format!("r{n:08x}")));
        let other = keys().log_vkey("mesh/audit/other");
        assert!(read.verify(&other).is_err());
    }
    assert!(Proof::of(&archive, 700).is_err());
    let text = Proof::of(&archive, 300).unwrap().to_text();
    let mut bytes = text.clone().into_bytes();
    for at in (0..bytes.len()).filter(|at| *at < 1200 || at % 23 == 0) {
        bytes[at] ^= 1;
        let accepted = std::str::from_utf8(&bytes)
            .is_ok_and(|text| Proof::parse(text).is_ok_and(|proof| proof.verify(&key).is_ok()));
        assert!(!accepted, "byte {at}");
        bytes[at] ^= 1;
    }
}

#[test]
fn deleted_bundles_are_told_from_missing_ones() {
    let dir = tempfile::tempdir().unwrap();
    let limits = mesh_audit::store::Limits {
        epoch_time: u64::MAX,
        epoch_records: u64::MAX,
        bytes: 200_000,
    };
    let (mut store, _) =
        mesh_audit::store::Store::open(dir.path(), "mesh/audit/test", keys(), None, limits, START)
            .unwrap();
    for _ in 0..20 {
        append(&mut store, 256);
        store.maintain(START).unwrap();
    }
    drop(store);
    let whole = assert_whole(dir.path());
    assert!(
        whole.pruned > 1000 && whole.pruned < 5000,
        "{}",
        whole.pruned
    );
    assert!(!dir.path().join(bundle_path(0, 256)).exists());
    // Proofs of later records hold.
    let archive = Archive::open(dir.path()).unwrap();
    let last = archive.published_size() - 1;
    Proof::of(&archive, last).unwrap();
    assert!(Proof::of(&archive, 3).is_err());
    let first = whole.pruned / 256;
    fs::remove_file(dir.path().join(bundle_path(first, 256))).unwrap();
    let found = report(dir.path(), &Options::default()).findings;
    assert_eq!(
        records(&found),
        (first * 256..first * 256 + 256).collect::<Vec<u64>>()
    );
}

#[test]
fn a_checkpoint_of_another_trail_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = open(dir.path());
    append(&mut store, 3);
    store.publish(START).unwrap();
    drop(store);
    let other = Checkpoint {
        origin: "mesh/audit/other".to_owned(),
        size: 3,
        root: [0; 32],
    };
    let note = other.note(&[other.cosign("mesh/audit/other", &keys(), 1)]);
    fs::write(dir.path().join("checkpoint"), note).unwrap();
    let found = report(dir.path(), &Options::default()).findings;
    assert!(
        found
            .iter()
            .any(|found| found.file == Path::new("checkpoint")),
        "{found:?}"
    );
}
