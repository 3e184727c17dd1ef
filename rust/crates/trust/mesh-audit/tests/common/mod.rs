//! Trails for tests.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use mesh_audit::archive::Archive;
use mesh_audit::keys::TrailKeys;
use mesh_audit::record::Event;
use mesh_audit::store::{Limits, Store};
use mesh_audit::verify::{Options, Report, verify};

/// Time of the first record, in milliseconds.
pub(crate) const START: u64 = 1_795_910_400_000;

/// The same keys in all tests.
pub(crate) fn keys() -> Arc<TrailKeys> {
    Arc::new(TrailKeys::from_seeds(&[7; 32], &[9; 48]))
}

/// Opens the trail in a folder, without limits.
pub(crate) fn open(dir: &Path) -> Store {
    let limits = Limits {
        epoch_time: u64::MAX,
        epoch_records: u64::MAX,
        bytes: 0,
    };
    let opened = Store::open(dir, "mesh/audit/test", keys(), None, limits, START);
    opened.expect("it opens").0
}

/// A request, other with each number.
pub(crate) fn request(n: u64) -> Event {
    Event::Request {
        request: format!("r{n:08x}").into(),
        front: "http".into(),
        task: "generate".into(),
        model: "smollm2".into(),
        key: Some("5f70bf18a0860070".into()),
        from: None,
        outcome: "complete".into(),
        milliseconds: n * 7 % 4000,
    }
}

/// Appends requests, one every ten milliseconds.
pub(crate) fn append(store: &mut Store, count: u64) {
    for _ in 0..count {
        let n = store.size();
        store
            .append(&request(n), START + 10 * n)
            .expect("it is written");
    }
}

/// Verifies the trail in a folder.
pub(crate) fn report(dir: &Path, options: &Options) -> Report {
    verify(&Archive::open(dir).expect("a trail"), options).expect("it can be read")
}

/// Verifies a trail that nobody changed.
pub(crate) fn assert_whole(dir: &Path) -> Report {
    let report = report(dir, &Options::default());
    assert_eq!(report.findings, []);
    assert_eq!(report.signed, report.size);
    report
}

/// Copies a folder.
pub(crate) fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy(&entry.path(), &target),
            false => drop(fs::copy(entry.path(), target).unwrap()),
        }
    }
}
