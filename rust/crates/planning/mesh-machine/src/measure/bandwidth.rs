//! Read bandwidth of the memory, which limits decoding.

use std::hint::black_box;
use std::sync::Barrier;
use std::time::{Duration, Instant};

/// Bytes per second that `threads` threads read together from `bytes` of memory, which must be much more than
/// the caches hold. Takes about a quarter of a second; 0 if the memory cannot be allocated.
pub fn read_bandwidth(threads: usize, bytes: u64) -> f64 {
    let threads = threads.clamp(1, 256);
    let words = (bytes / 8) as usize / threads;
    let start = Barrier::new(threads);
    let one = || {
        let mut memory: Vec<u64> = Vec::new();
        let reserved = memory.try_reserve_exact(words).is_ok();
        if reserved {
            // Written, so that each page exists.
            memory.resize(words, 1);
        }
        start.wait();
        let begin = Instant::now();
        let mut read = 0u64;
        while reserved && words > 0 && begin.elapsed() < TIME {
            for part in memory.chunks(PART) {
                black_box(part.iter().fold(0u64, |sum, word| sum.wrapping_add(*word)));
                read += 8 * part.len() as u64;
                if begin.elapsed() >= TIME {
                    break;
                }
            }
        }
        read as f64 / begin.elapsed().as_secs_f64().max(1e-9)
    };
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(one)).collect();
        let own = one();
        let others = others
            .into_iter()
            .map(|thread| thread.join().unwrap_or(0.0));
        own + others.sum::<f64>()
    })
}

const TIME: Duration = Duration::from_millis(150);
/// Words between looks at the clock: 1 MiB.
const PART: usize = 1 << 17;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_at_a_believable_speed_and_in_time() {
        let begin = Instant::now();
        let found = read_bandwidth(2, 64 << 20);
        assert!((1e8..1e13).contains(&found), "{found}");
        assert!(begin.elapsed() < Duration::from_secs(5));
        assert_eq!(read_bandwidth(1, 0), 0.0);
    }
}
