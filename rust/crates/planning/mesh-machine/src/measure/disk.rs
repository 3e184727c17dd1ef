//! Read speed of the disk that holds the models, past the system's cache.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::libc::{O_DIRECT, O_NONBLOCK};

/// Bytes per second, read from the middle of `file`; 0 if it cannot be read. Takes a quarter of a second at most, and one request.
pub(crate) fn read_speed(file: &Path) -> f64 {
    // Direct reads do not see the cache at all. Where a file system has none, its pages are dropped first.
    direct(file)
        .or_else(|| dropped(file))
        .filter(|speed| speed.is_finite())
        .unwrap_or(0.0)
}

fn direct(file: &Path) -> Option<f64> {
    timed(open(file, O_DIRECT)?)
}

fn open(file: &Path, flags: i32) -> Option<File> {
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(flags | O_NONBLOCK);
    options.open(file).ok()
}

fn dropped(file: &Path) -> Option<f64> {
    let file = open(file, 0)?;
    // Pages that a model in use has mapped stay; then the cache is measured, which loading would use, too.
    let _ = posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
    timed(file)
}

fn timed(mut file: File) -> Option<f64> {
    let metadata = file.metadata().ok()?;
    if !metadata.is_file() {
        return None;
    }
    let middle = metadata.len().saturating_sub(MOST_BYTES) / 2;
    let aligned = middle - middle % ALIGNMENT as u64;
    file.seek(SeekFrom::Start(aligned)).ok()?;
    let mut memory = vec![0u8; REQUEST + ALIGNMENT];
    let from = memory.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
    let buffer = &mut memory[from..from + REQUEST];
    let begin = Instant::now();
    let mut bytes = 0u64;
    while bytes < MOST_BYTES && begin.elapsed() < TIME {
        match file.read(buffer).ok()? {
            0 => break,
            read => bytes += read as u64,
        }
    }
    (bytes > 0).then(|| bytes as f64 / begin.elapsed().as_secs_f64().max(1e-9))
}

const TIME: Duration = Duration::from_millis(250);
const MOST_BYTES: u64 = 256 << 20;
const REQUEST: usize = 1 << 20;
/// Alignment for direct reads; no disk has larger sectors.
const ALIGNMENT: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_and_what_is_none_is_unknown() {
        let dir = tempfile::tempdir().expect("a folder");
        let file = dir.path().join("weights");
        std::fs::write(&file, vec![7; 3_000_001]).expect("written");
        assert!(read_speed(&file) > 1e5);
        assert!(dropped(&file).expect("read") > 1e5);
        assert_eq!(read_speed(dir.path()), 0.0);
        assert_eq!(read_speed(Path::new("/nowhere")), 0.0);
        assert_eq!(read_speed(Path::new("/dev/zero")), 0.0);
        std::fs::write(&file, "").expect("written");
        assert_eq!(read_speed(&file), 0.0);
    }
}
