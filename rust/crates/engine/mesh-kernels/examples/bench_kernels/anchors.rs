//! The limits of the machine, measured in turn with the kernels; and the clock.

use std::hint::black_box;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use mesh_kernels::{Isa, Pool};

/// Wall clock or processor time since some moment.
pub(crate) fn now() -> Duration {
    static CLOCK: OnceLock<libc::clockid_t> = OnceLock::new();
    let clock = *CLOCK.get_or_init(|| {
        if std::env::args().any(|a| a == "cpu") {
            libc::CLOCK_PROCESS_CPUTIME_ID
        } else {
            libc::CLOCK_MONOTONIC
        }
    });
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: a valid place for the result; both clocks exist on every Unix.
    unsafe { libc::clock_gettime(clock, &raw mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Microseconds of a loop that does nothing.
pub(crate) fn empty_loop(pool: &Pool) -> f64 {
    (0..20)
        .map(|_| {
            let start = now();
            for _ in 0..1000 {
                pool.run(pool.threads(), &|_| {});
            }
            (now() - start).as_secs_f64() * 1e3
        })
        .fold(f64::MAX, f64::min)
}

/// Memory that no cache holds.
pub(crate) struct Memory(Vec<u64>);

impl Memory {
    pub(crate) fn new() -> Memory {
        Memory((0..16 << 20).collect())
    }

    pub(crate) fn bytes(&self) -> usize {
        self.0.len() * 8
    }

    pub(crate) fn read(&self, pool: &Pool) -> Duration {
        let start = now();
        let sum = AtomicU64::new(0);
        let part = self.0.len() / 64;
        pool.run(64, &|i| {
            let words = &self.0[i * part..][..part];
            let mut lanes = [0_u64; 32];
            for words in words.chunks_exact(32) {
                for (lane, word) in lanes.iter_mut().zip(words) {
                    *lane ^= word;
                }
            }
            sum.fetch_xor(lanes.iter().fold(0, |a, b| a ^ b), Ordering::Relaxed);
        });
        black_box(sum.into_inner());
        now() - start
    }
}

/// Multiply-accumulates per second of the integer dot product instructions, all threads together.
pub(crate) fn dot_throughput(pool: &Pool) -> f64 {
    let rounds = 100_000_usize;
    let start = now();
    let per_round = AtomicU64::new(0);
    pool.run_static(&|_| {
        per_round.fetch_add(dots(pool.isa(), rounds), Ordering::Relaxed);
    });
    (per_round.into_inner() as usize * rounds) as f64 / (now() - start).as_secs_f64()
}

#[cfg(target_arch = "x86_64")]
fn dots(isa: Isa, rounds: usize) -> u64 {
    use std::arch::x86_64::*;

    #[target_feature(enable = "avx512f,avx512vnni")]
    fn avx512(rounds: usize) -> u64 {
        let (a, b) = (
            _mm512_set1_epi32(black_box(3)),
            _mm512_set1_epi32(black_box(5)),
        );
        let mut acc = [_mm512_setzero_si512(); 12];
        for _ in 0..rounds {
            for acc in &mut acc {
                *acc = _mm512_dpbusd_epi32(*acc, a, b);
            }
        }
        for acc in acc {
            black_box(_mm512_reduce_add_epi32(acc));
        }
        12 * 64
    }

    #[target_feature(enable = "avx2")]
    fn avx2(rounds: usize) -> u64 {
        let (a, b) = (
            _mm256_set1_epi32(black_box(3)),
            _mm256_set1_epi32(black_box(5)),
        );
        let ones = _mm256_set1_epi16(1);
        let mut acc = [_mm256_setzero_si256(); 12];
        for _ in 0..rounds {
            for acc in &mut acc {
                let pairs = _mm256_maddubs_epi16(black_box(a), b);
                *acc = _mm256_add_epi32(*acc, _mm256_madd_epi16(pairs, ones));
            }
        }
        for acc in acc {
            black_box(_mm256_extract_epi32::<0>(acc));
        }
        12 * 32
    }

    match isa {
        // SAFETY: the pool runs on this instruction set, so the CPU has it.
        Isa::Avx512 => unsafe { avx512(rounds) },
        // SAFETY: as above.
        Isa::Avx2 => unsafe { avx2(rounds) },
        // The others have no anchor.
        _ => 0,
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn dots(_isa: Isa, _rounds: usize) -> u64 {
    0
}
