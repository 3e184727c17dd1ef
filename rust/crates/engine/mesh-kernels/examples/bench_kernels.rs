//! Speed of the products at the shapes of SmolLM2-135M and a 1.5 B Qwen2, against the machine's limits.
//!
//! Anchors are measured in the same run, in turn with the products: memory read bandwidth for a decode step,
//! integer dot product throughput for a prompt. Every figure is the best of several short turns; only ratios
//! count.
//!
//! With `cpu` as the third argument the processor time of the process is taken instead of the clock on the
//! wall: for one thread on a machine that others use.
//!
//! `cargo run --release -p mesh-kernels --example bench_kernels [threads] [smollm2|qwen|all] [cpu]`

use std::hint::black_box;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use mesh_kernels::{
    Activation, Attention, EightBit, FeedForward, Gate, Isa, KvCache, KvFormat, KvSegment, KvShape,
    Linear, PackOptions, Pool, QMatrix, Residual, RmsNorm, Rope, RopeOptions, RopeStyle,
    WeightType, attention, feed_forward, linear,
};

struct Shape {
    name: &'static str,
    hidden: usize,
    ffn: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    vocab: usize,
    layers: usize,
    /// Layers really held; times are scaled to `layers`.
    held: usize,
}

const SHAPES: [Shape; 2] = [
    Shape {
        name: "smollm2",
        hidden: 576,
        ffn: 1536,
        heads: 9,
        kv_heads: 3,
        head_dim: 64,
        vocab: 49_152,
        layers: 30,
        held: 30,
    },
    Shape {
        name: "qwen",
        hidden: 1536,
        ffn: 8960,
        heads: 12,
        kv_heads: 2,
        head_dim: 128,
        vocab: 151_936,
        layers: 28,
        held: 4,
    },
];

struct Layer {
    qkv: QMatrix,
    o: QMatrix,
    gate: QMatrix,
    up: QMatrix,
    down: QMatrix,
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let threads = args.first().and_then(|a| a.parse().ok()).unwrap_or(2);
    let pool = Pool::new(threads);
    println!("{} threads, {}", pool.threads(), pool.isa().name());
    println!("empty loop: {:.2} us", empty_loop(&pool));
    for shape in &SHAPES {
        if args
            .get(1)
            .is_some_and(|name| name != shape.name && name != "all")
        {
            continue;
        }
        for (ty, head, options) in [
            (WeightType::Q4_1, WeightType::Q8_0, PackOptions::default()),
            (
                WeightType::Q4_1,
                WeightType::Q8_0,
                PackOptions {
                    coded_scales: true,
                    q8_0: EightBit::Six,
                },
            ),
            (WeightType::Q4_K, WeightType::Q6_K, PackOptions::default()),
        ] {
            if shape.hidden % ty.block_size() != 0 {
                continue;
            }
            model(&pool, shape, ty, head, options);
        }
    }
}

fn model(pool: &Pool, shape: &Shape, ty: WeightType, head: WeightType, options: PackOptions) {
    let start = now();
    let width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim;
    let pack = |ty: WeightType, n: usize, k: usize| {
        let rows = vec![0x11; n * ty.row_bytes(k).expect("whole blocks")];
        QMatrix::pack_with(pool, ty, n, k, &rows, options).expect("packs")
    };
    let layers: Vec<Layer> = (0..shape.held)
        .map(|_| Layer {
            qkv: pack(ty, width, shape.hidden),
            o: pack(ty, shape.hidden, shape.heads * shape.head_dim),
            gate: pack(ty, shape.ffn, shape.hidden),
            up: pack(ty, shape.ffn, shape.hidden),
            down: pack(ty, shape.hidden, shape.ffn),
        })
        .collect();
    let lm_head = pack(head, shape.vocab, shape.hidden);
    let packing = now() - start;
    let layer_bytes: usize = layers
        .iter()
        .map(|l| l.qkv.bytes() + l.o.bytes() + l.gate.bytes() + l.up.bytes() + l.down.bytes())
        .sum();
    let scale = shape.layers as f64 / shape.held as f64;
    let bytes = layer_bytes as f64 * scale + lm_head.bytes() as f64;
    let macs: usize =
        shape.layers * shape.hidden * (width + shape.heads * shape.head_dim + 3 * shape.ffn);
    println!(
        "\n{} {ty:?} head {head:?} {options:?}: {:.1} MB a token ({:.4} B/weight in layers), packed in {packing:.0?}",
        shape.name,
        bytes / 1e6,
        layer_bytes as f64 * scale / macs as f64
    );

    let mut bench = Bench::new(pool, shape);
    let memory = Memory::new();
    for rows in [1, 8, 32, 128, 512] {
        let mut times = [Duration::MAX; 5];
        let mut anchor_read = Duration::MAX;
        let mut anchor_dot = 0.0_f64;
        let turns = if rows <= 8 { 10 } else { 3 };
        for _ in 0..turns {
            let step = bench.step(&layers, &lm_head, rows);
            for (best, time) in times.iter_mut().zip(step) {
                *best = time.min(*best);
            }
            anchor_read = anchor_read.min(memory.read(pool));
            anchor_dot = anchor_dot.max(dot_throughput(pool));
        }
        let ms = |t: Duration| t.as_secs_f64() * 1e3 * scale;
        let [qkv, att, o, ffn, head] = times;
        let head = head.as_secs_f64() * 1e3;
        let total = ms(qkv) + ms(att) + ms(o) + ms(ffn) + head;
        let products = ms(qkv) + ms(o) + ms(ffn);
        print!(
            "rows {rows:3}: {:8.1} tok/s | ms: qkv {:.2} att {:.2} o {:.2} ffn {:.2} head {head:.2}",
            rows as f64 / total * 1e3,
            ms(qkv),
            ms(att),
            ms(o),
            ms(ffn),
        );
        let read = memory.bytes() as f64 / anchor_read.as_secs_f64();
        if rows <= 8 {
            let rate = bytes / ((products + head) / 1e3);
            println!(
                " | {:.1} GB/s = {:.2} of the read bandwidth {:.1}",
                rate / 1e9,
                rate / read,
                read / 1e9
            );
        } else {
            let rate = (macs * rows) as f64 / (products / 1e3);
            println!(
                " | {:.0} GMAC/s = {:.2} of the dot product peak {:.0}",
                rate / 1e9,
                rate / anchor_dot,
                anchor_dot / 1e9
            );
        }
    }
}

struct Bench<'a> {
    pool: &'a Pool,
    shape: &'a Shape,
    rope: Rope,
    cache: KvCache,
    norm: Vec<f32>,
}

impl<'a> Bench<'a> {
    fn new(pool: &'a Pool, shape: &'a Shape) -> Bench<'a> {
        let context = 512;
        Bench {
            pool,
            shape,
            rope: Rope::new(&RopeOptions {
                style: RopeStyle::Halves,
                dim: shape.head_dim,
                base: 10_000.0,
                scale: 1.0,
                factors: None,
                positions: context,
            })
            .expect("sane options"),
            cache: KvCache::new(KvShape {
                layers: shape.held,
                slots: 32,
                context,
                kv_heads: shape.kv_heads,
                head_dim: shape.head_dim,
                format: KvFormat::F16,
            })
            .expect("sane dimensions"),
            norm: vec![1.0; shape.hidden],
        }
    }

    /// One step of `rows` rows: up to 32 sequences at position 128, or one prompt. Times of QKV, attention,
    /// output, feed-forward and the head.
    fn step(&mut self, layers: &[Layer], lm_head: &QMatrix, rows: usize) -> [Duration; 5] {
        let Shape {
            hidden,
            heads,
            kv_heads,
            head_dim,
            vocab,
            ..
        } = *self.shape;
        let mut x: Vec<f32> = (0..rows * hidden)
            .map(|i| (i * 7919 % 1999) as f32 / 1000.0 - 1.0)
            .collect();
        let mut qkv = vec![0.0; rows * (heads + 2 * kv_heads) * head_dim];
        let mut att = vec![0.0; rows * heads * head_dim];
        let head_rows = if rows > 32 { 1 } else { rows };
        let mut logits = vec![0.0; head_rows * vocab];
        let segments: Vec<KvSegment> = if rows > 32 {
            vec![KvSegment {
                slot: 0,
                position: 0,
                rows,
            }]
        } else {
            (0..rows)
                .map(|slot| KvSegment {
                    slot,
                    position: 128,
                    rows: 1,
                })
                .collect()
        };
        let norm = RmsNorm {
            weight: &self.norm,
            eps: 1e-5,
        };
        let spec = Attention {
            heads,
            scale: None,
            window: None,
            rope: Some(&self.rope),
            q_norm: None,
            k_norm: None,
            eps: 1e-5,
        };
        let normed = Linear {
            norm: Some(norm),
            ..Linear::default()
        };
        let added = Linear {
            residual: Residual::InPlace,
            ..Linear::default()
        };
        let mut times = [Duration::ZERO; 5];
        for (i, l) in layers.iter().enumerate() {
            let mut timed = |which: usize, f: &mut dyn FnMut()| {
                let start = now();
                f();
                times[which] += now() - start;
            };
            timed(0, &mut || {
                linear(self.pool, &l.qkv, &x, rows, &mut qkv, &normed).expect("fits");
            });
            timed(1, &mut || {
                attention(
                    self.pool,
                    &spec,
                    &mut self.cache,
                    i,
                    &segments,
                    &qkv,
                    &mut att,
                )
                .expect("fits");
            });
            timed(2, &mut || {
                linear(self.pool, &l.o, &att, rows, &mut x, &added).expect("fits");
            });
            timed(3, &mut || {
                let layer = FeedForward {
                    norm,
                    gate: Gate {
                        gate: &l.gate,
                        up: &l.up,
                        activation: Activation::Silu,
                    },
                    down: &l.down,
                    post_norm: None,
                };
                feed_forward(self.pool, &layer, &mut x, rows).expect("fits");
            });
        }
        let start = now();
        linear(
            self.pool,
            lm_head,
            &x[..head_rows * hidden],
            head_rows,
            &mut logits,
            &normed,
        )
        .expect("fits");
        times[4] = now() - start;
        black_box(&logits);
        times
    }
}

/// Wall clock or processor time since some moment.
fn now() -> Duration {
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
fn empty_loop(pool: &Pool) -> f64 {
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
struct Memory(Vec<u64>);

impl Memory {
    fn new() -> Memory {
        Memory((0..16 << 20).collect())
    }

    fn bytes(&self) -> usize {
        self.0.len() * 8
    }

    fn read(&self, pool: &Pool) -> Duration {
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
fn dot_throughput(pool: &Pool) -> f64 {
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
        _ => 0,
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn dots(_isa: Isa, _rounds: usize) -> u64 {
    0
}
