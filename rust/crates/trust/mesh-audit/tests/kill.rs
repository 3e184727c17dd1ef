//! SIGKILL: a process that appends and syncs in groups dies at any moment, again and again, on one trail.

#[allow(dead_code, reason = "each test uses some of it")]
mod common;

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{START, append, assert_whole, keys, open};
use mesh_audit::archive::Archive;
use mesh_audit::record;
use mesh_audit::store::{Limits, Store};
use serde_json::Value;

/// Folder of the trail, for the process that is killed.
const FOLDER: &str = "HYDRAMESH_AUDIT_TEST_FOLDER";
const KILLS: u32 = 200;

/// The process that is killed. It tells the sizes that were synced in a file beside the trail.
#[test]
#[ignore = "the other test runs it as a process"]
fn a_process_that_appends_until_it_is_killed() {
    let Some(dir) = std::env::var_os(FOLDER).map(PathBuf::from) else {
        return;
    };
    let mut random = fastrand::Rng::new();
    let told = File::options().append(true).create(true).open(told(&dir));
    let mut told = told.unwrap();
    let mut store = open(&dir);
    loop {
        append(&mut store, random.u64(1..20));
        let synced = store.sync(START).unwrap();
        told.write_all(&synced.to_le_bytes()).unwrap();
        match random.u8(..) {
            0..20 => store.publish(START).unwrap(),
            20 => store.end_epoch(START).unwrap(),
            _ => {}
        }
    }
}

#[test]
fn a_process_that_is_killed_at_two_hundred_moments_loses_no_record_that_it_called_synced() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("trail");
    let mut random = fastrand::Rng::with_seed(16);
    let (mut cuts, mut notable) = (0, 0);
    for turn in 0..KILLS {
        let before = acknowledged(&dir).len();
        let mut child = start(&dir);
        let wanted = before + random.usize(1..4);
        let started = Instant::now();
        while acknowledged(&dir).len() < wanted {
            assert!(
                started.elapsed() < Duration::from_secs(20),
                "it does not run"
            );
            std::thread::sleep(Duration::from_micros(200));
        }
        std::thread::sleep(Duration::from_micros(random.u64(0..1500)));
        child.kill().unwrap();
        child.wait().unwrap();

        let safe = *acknowledged(&dir).last().unwrap();
        let limits = Limits {
            epoch_time: u64::MAX,
            epoch_records: u64::MAX,
            bytes: 0,
        };
        let opened = Store::open(&dir, "mesh/audit/test", keys(), None, limits, START);
        let (store, recovered) = opened.unwrap_or_else(|error| panic!("turn {turn}: {error}"));
        assert!(
            recovered.records >= safe,
            "{recovered:?}, {safe} were acknowledged"
        );
        assert!(
            recovered.records - recovered.unsigned >= safe,
            "they are signed"
        );
        drop(store);
        let kept = entries(&dir, safe.saturating_sub(40));
        for (n, entry) in &kept {
            assert_eq!(entry["n"], *n);
            if entry["kind"] == "request" {
                assert_eq!(entry["request"], format!("r{n:08x}"));
            }
        }
        if recovered.is_notable() {
            let (_, told) = kept.iter().find(|(n, _)| *n == recovered.records).unwrap();
            assert_eq!(told["kind"], "recovered");
            assert_eq!(told["unsigned"], recovered.unsigned);
            assert_eq!(told["cut_bytes"], recovered.cut_bytes);
            notable += 1;
            cuts += u32::from(recovered.cut_bytes > 0);
        }
        if turn % 20 == 19 {
            assert_whole(&dir);
        }
    }
    println!("{KILLS} kills: {notable} with records to recover, {cuts} in the middle of a write");
    assert!(notable > 0, "all of them missed the writes");
}

fn start(dir: &Path) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", "a_process_that_appends_until_it_is_killed"])
        .arg("--ignored")
        .env(FOLDER, dir)
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    command.spawn().unwrap()
}

fn told(dir: &Path) -> PathBuf {
    dir.with_extension("told")
}

/// The sizes that were called synced.
fn acknowledged(dir: &Path) -> Vec<u64> {
    let bytes = fs::read(told(dir)).unwrap_or_default();
    let sizes = bytes.chunks_exact(8);
    sizes
        .map(|size| u64::from_le_bytes(size.try_into().unwrap()))
        .collect()
}

/// The records from this number on.
fn entries(dir: &Path, from: u64) -> Vec<(u64, Value)> {
    let mut all = Vec::new();
    let archive = Archive::open(dir).unwrap();
    let read = archive.entries(from, |n, entry| {
        let (text, _) = record::split(entry).unwrap();
        all.push((n, serde_json::from_slice(text).unwrap()));
        true
    });
    read.unwrap();
    all
}
