//! Progress of loading a part: a number that grows as long as something happens.
//!
//! The time that loading takes is unknown: it depends on the disk, the network and the size. Its progress is
//! known: pieces arrive, and then the thread that loads computes or faults pages of the file in.

use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::lock::lock;

#[derive(Debug, Default)]
pub(super) struct Progress {
    fetched: AtomicU64,
    /// The `stat` file of the thread that loads.
    thread: Mutex<Option<PathBuf>>,
}

/// The thread counts as loading until this is dropped.
pub(super) struct Working<'a>(&'a Progress);

impl Progress {
    /// Sets the number of pieces that are here by now.
    pub(super) fn fetched(&self, pieces: u64) {
        self.fetched.store(pieces, Ordering::Relaxed);
    }

    /// The calling thread loads from now on.
    pub(super) fn works_here(&self) -> Working<'_> {
        let own = std::fs::read_link("/proc/thread-self").ok();
        *lock(&self.thread) = own.map(|own| PathBuf::from("/proc").join(own).join("stat"));
        Working(self)
    }

    /// Above 0, and larger than before if anything has happened since.
    pub(super) fn value(&self) -> u64 {
        let thread = lock(&self.thread).clone();
        let stat = thread.and_then(|path| std::fs::read_to_string(path).ok());
        let done = stat.as_deref().and_then(done).unwrap_or(0);
        1 + self.fetched.load(Ordering::Relaxed) + done
    }
}

impl Drop for Working<'_> {
    fn drop(&mut self) {
        *lock(&self.0.thread) = None;
    }
}

/// Page faults that read from a disk, and ticks of processor time (proc(5), fields 12, 14 and 15 of `stat`).
fn done(stat: &str) -> Option<u64> {
    // The name in the second field may hold anything but ends with the last parenthesis.
    let fields = stat.get(stat.rfind(')')? + 1..)?;
    let fields: Vec<&str> = fields.split_whitespace().collect();
    let number = |field: usize| fields.get(field - 3)?.parse::<u64>().ok();
    Some(number(12)? + number(14)? + number(15)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    #[test]
    fn the_name_of_a_thread_may_hold_anything() {
        let stat = "7 (a) b (c) R 1 2 3 4 5 6 70 8 900 10 1000 2000 13 14 15 16 17 18";
        assert_eq!(done(stat), Some(900 + 1000 + 2000));
        assert_eq!(done("7 (a"), None);
        assert_eq!(done("7 (a) R 1"), None);
    }

    #[test]
    fn pieces_and_work_count_and_waiting_does_not() {
        let progress = Progress::default();
        assert_eq!(progress.value(), 1);
        progress.fetched(5);
        assert_eq!(progress.value(), 6);
        let working = progress.works_here();
        let begun = Instant::now();
        let before = progress.value();
        while progress.value() == before && begun.elapsed() < Duration::from_secs(30) {
            std::hint::black_box((0..10_000u64).sum::<u64>());
        }
        assert!(progress.value() > before);
        drop(working);
        assert_eq!(progress.value(), 6);
    }
}
