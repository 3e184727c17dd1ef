//! How fast records are appended and synced, beside a bare append of as many bytes to a file and its fsync:
//! `cargo run --release -p mesh-audit --example audit_speed [-- FOLDER]`.
//!
//! Both are measured in turn in the same folder. The ratios are what can be compared between machines; the
//! times tell whether this one reaches 20 µs for an unsynced append (median) and 10,000 records a second in
//! synced groups.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_audit::keys::TrailKeys;
use mesh_audit::record::Event;
use mesh_audit::store::{Limits, Store};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let parent = std::env::args()
        .nth(1)
        .map_or_else(std::env::temp_dir, PathBuf::from);
    let folder = tempfile::tempdir_in(parent)?;
    let keys = Arc::new(TrailKeys::generate());
    let open = Store::open(
        &folder.path().join("trail"),
        "speed/audit",
        keys,
        None,
        Limits::default(),
        0,
    )?;
    let mut store = open.0;
    let mut bare = File::create(folder.path().join("bare"))?;
    let mut appends = [Vec::new(), Vec::new()];
    let mut groups = [Duration::ZERO; 2];
    let mut publications = Duration::ZERO;
    for _ in 0..GROUPS {
        groups[0] += group(&mut appends[0], |n| {
            Ok(store.append(&request(n), n).map(drop)?)
        })?;
        groups[0] += timed(|| Ok(store.sync(0).map(drop)?))?;
        publications += timed(|| Ok(store.publish(0)?))?;
        let line = vec![b'x'; LINE];
        groups[1] += group(&mut appends[1], |_| Ok(bare.write_all(&line)?))?;
        groups[1] += timed(|| Ok(bare.sync_data()?))?;
    }
    drop(store);
    let [trail, file] = appends.each_mut().map(|times| median(times));
    let count = f64::from(GROUPS * GROUP);
    let [trail_rate, file_rate] = groups.map(|time| count / time.as_secs_f64());
    let all = count / (groups[0] + publications).as_secs_f64();
    println!(
        "append, median: {trail:.1} us, {:.1} times a bare append of {LINE} bytes ({file:.1} us)",
        trail / file
    );
    println!(
        "synced in groups of {GROUP}: {trail_rate:.0} records/s, {:.2} of a bare file with fsync ({file_rate:.0}/s)",
        trail_rate / file_rate
    );
    println!(
        "with tiles published after each group: {all:.0} records/s, {:.2} of the bare file",
        all / file_rate
    );
    println!(
        "bytes on disk: {:.0} a record",
        size_of(folder.path().join("trail").as_path())? as f64 / count
    );
    Ok(())
}

type Done = Result<(), Box<dyn std::error::Error>>;

fn group(
    times: &mut Vec<f64>,
    mut append: impl FnMut(u64) -> Done,
) -> Result<Duration, Box<dyn std::error::Error>> {
    let started = Instant::now();
    for n in 0..u64::from(GROUP) {
        let before = Instant::now();
        append(n)?;
        times.push(before.elapsed().as_secs_f64() * 1e6);
    }
    Ok(started.elapsed())
}

fn timed(work: impl FnOnce() -> Done) -> Result<Duration, Box<dyn std::error::Error>> {
    let started = Instant::now();
    work()?;
    Ok(started.elapsed())
}

fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn size_of(dir: &Path) -> io::Result<u64> {
    let mut sum = 0;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        sum += match entry.file_type()?.is_dir() {
            true => size_of(&entry.path())?,
            false => entry.metadata()?.len(),
        };
    }
    Ok(sum)
}

fn request(n: u64) -> Event {
    Event::Request {
        request: format!("r{n:08x}").into(),
        front: "http".into(),
        task: "generate".into(),
        model: "smollm2".into(),
        key: Some("5f70bf18a0860070".into()),
        from: None,
        outcome: "complete".into(),
        milliseconds: n,
    }
}

const GROUPS: u32 = 50;
const GROUP: u32 = 1000;
/// Bytes of a record of the kind above with its frame.
const LINE: usize = 290;
