//! Speed of the products at the shapes of SmolLM2-135M and a 1.5 B Qwen2, against the machine's limits, and of
//! the instruction sets against each other.
//!
//! Anchors are measured in the same run, in turn with the products: memory read bandwidth for a decode step,
//! integer dot product throughput for a prompt. Every figure is the best of several short turns; only ratios
//! count.
//!
//! With `cpu` as the third argument the processor time of the process is taken instead of the clock on the
//! wall: for one thread on a machine that others use. With `isa` as the second argument the same steps run on
//! every instruction set of this CPU, in turn.
//!
//! `cargo run --release -p mesh-kernels --example bench_kernels [threads] [smollm2|qwen|all|isa] [cpu]`

mod anchors;
mod layers;
mod sets;

use std::time::Duration;

use mesh_kernels::{EightBit, PackOptions, Pool, WeightType};

use anchors::{Memory, dot_throughput, empty_loop, now};
use layers::{Bench, Model, SHAPES, Shape};

/// Types of the layers and the output matrix, and how they are packed.
const FORMATS: [(WeightType, WeightType, PackOptions); 3] = [
    (WeightType::Q4_1, WeightType::Q8_0, EXACT),
    (
        WeightType::Q4_1,
        WeightType::Q8_0,
        PackOptions {
            coded_scales: true,
            q8_0: EightBit::Six,
        },
    ),
    (WeightType::Q4_K, WeightType::Q6_K, EXACT),
];

const EXACT: PackOptions = PackOptions {
    coded_scales: false,
    q8_0: EightBit::Keep,
};

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let threads = args.first().and_then(|a| a.parse().ok()).unwrap_or(2);
    if args.get(1).is_some_and(|name| name == "isa") {
        return sets::compare(threads);
    }
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
        for (ty, head, options) in FORMATS {
            if shape.hidden.is_multiple_of(ty.block_size()) {
                model(&pool, shape, ty, head, options);
            }
        }
    }
}

fn model(pool: &Pool, shape: &Shape, ty: WeightType, head: WeightType, options: PackOptions) {
    let start = now();
    let Model { layers, lm_head } = Model::new(pool, shape, ty, head, options);
    let packing = now() - start;
    let layer_bytes: usize = layers
        .iter()
        .map(|l| l.qkv.bytes() + l.o.bytes() + l.gate.bytes() + l.up.bytes() + l.down.bytes())
        .sum();
    let scale = shape.layers as f64 / shape.held as f64;
    let bytes = layer_bytes as f64 * scale + lm_head.bytes() as f64;
    let width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim;
    let macs: usize =
        shape.layers * shape.hidden * (width + shape.heads * shape.head_dim + 3 * shape.ffn);
    println!(
        "\n{} {ty:?} head {head:?} {options:?}: {:.1} MB a token ({:.4} B/weight in layers), packed in {packing:.0?}",
        shape.name,
        bytes / 1e6,
        layer_bytes as f64 * scale / macs as f64
    );

    let mut bench = Bench::new(shape);
    let memory = Memory::new();
    for rows in [1, 8, 32, 128, 512] {
        let mut times = [Duration::MAX; 5];
        let mut anchor_read = Duration::MAX;
        let mut anchor_dot = 0.0_f64;
        let turns = if rows <= 8 { 10 } else { 3 };
        for _ in 0..turns {
            let step = bench.step(pool, &layers, &lm_head, rows);
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
