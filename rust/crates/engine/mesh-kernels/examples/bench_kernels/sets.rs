//! The instruction sets of this CPU against each other.

use std::time::Duration;

use mesh_kernels::{
    Isa, Linear, Pool, PoolOptions, QMatrix, WeightType, encode_attention, layer_norm, linear,
};

use crate::FORMATS;
use crate::anchors::now;
use crate::layers::{Bench, Model, SHAPES, Shape};

/// Layers that are held; times are scaled to those of the whole model.
const HELD: usize = 4;

/// Prints each set's speed in relation to the portable kernels and to AVX2, from one run.
pub(crate) fn compare(threads: usize) {
    let pools: Vec<Pool> = Isa::available()
        .into_iter()
        .map(|isa| {
            Pool::with_options(PoolOptions {
                threads,
                isa: Some(isa),
                ..PoolOptions::default()
            })
        })
        .collect();
    println!(
        "{} threads; speed of each part, scalar = 1",
        pools[0].threads()
    );
    for (ty, head, options) in FORMATS {
        // Blocks of 256 do not fit SmolLM2.
        let shape = &SHAPES[usize::from(!SHAPES[0].hidden.is_multiple_of(ty.block_size()))];
        let shape = &Shape {
            held: HELD,
            ..*shape
        };
        let scale = shape.layers as u32 / HELD as u32;
        let Model { layers, lm_head } = Model::new(&pools[0], shape, ty, head, options);
        let mut bench = Bench::new(shape);
        for rows in [1, 8, 128] {
            println!("\n{} {ty:?} {options:?}, {rows} rows", shape.name);
            let turns = if rows > 8 { 3 } else { 15 };
            let times = best(&pools, turns, |pool| {
                let [qkv, attention, o, ffn, head] = bench.step(pool, &layers, &lm_head, rows);
                let (products, attention) = ((qkv + o + ffn) * scale, attention * scale);
                vec![products, attention, head, products + attention + head]
            });
            table(&["products", "attention", "output", "all"], &pools, &times);
        }
    }
    floats(&pools);
    encoder(&pools);
}

/// Matrices of floats.
fn floats(pools: &[Pool]) {
    let (n, k) = (1536, 768);
    for ty in [WeightType::F16, WeightType::F32] {
        let matrix = QMatrix::pack(ty, n, k, &vec![0x11; n * k * ty.type_size()]).expect("packs");
        let x = vec![0.5; 128 * k];
        let mut out = vec![0.0; 128 * n];
        println!("\n{ty:?} matrix");
        let times = best(pools, 15, |pool| {
            let mut time = |rows: usize| {
                let start = now();
                let (x, out) = (&x[..rows * k], &mut out[..rows * n]);
                linear(pool, &matrix, x, rows, out, &Linear::default()).expect("fits");
                now() - start
            };
            vec![time(1), time(128)]
        });
        table(&["1 row", "128 rows"], pools, &times);
    }
}

/// The operators of encoders other than products.
fn encoder(pools: &[Pool]) {
    let (heads, dim, lengths) = (12, 32, [128, 60]);
    let (rows, width) = (188, heads * dim);
    let qkv: Vec<f32> = (0..rows * 3 * width)
        .map(|i| (i * 7919 % 1999) as f32 / 1000.0 - 1.0)
        .collect();
    let mut out = vec![0.0; rows * width];
    println!("\nencoder");
    let times = best(pools, 15, |pool| {
        let start = now();
        encode_attention(pool, heads, dim, &lengths, &qkv, &mut out).expect("fits");
        let attention = now() - start;
        let ones = vec![1.0; width];
        let start = now();
        layer_norm(pool, &mut out, &ones, &ones, 1e-5).expect("fits");
        vec![attention, now() - start]
    });
    table(&["attention", "norm"], pools, &times);
}

/// Best times out of `turns` of each pool's run of `step`, the pools in turn.
fn best(
    pools: &[Pool],
    turns: usize,
    mut step: impl FnMut(&Pool) -> Vec<Duration>,
) -> Vec<Vec<Duration>> {
    let mut best: Vec<Vec<Duration>> = pools.iter().map(&mut step).collect();
    for _ in 1..turns {
        for (best, pool) in best.iter_mut().zip(pools) {
            for (best, time) in best.iter_mut().zip(step(pool)) {
                *best = time.min(*best);
            }
        }
    }
    best
}

/// Speeds in relation to scalar; of the last column in relation to AVX2, too.
fn table(columns: &[&str], pools: &[Pool], times: &[Vec<Duration>]) {
    print!("{:8}", "");
    for column in columns {
        print!(" {column:>10}");
    }
    println!(" {:>10} {:>12}", "of avx2", columns.last().unwrap_or(&""));
    let ratio = |base: Duration, time: Duration| base.as_secs_f64() / time.as_secs_f64();
    let avx2 = pools.iter().position(|pool| pool.isa() == Isa::Avx2);
    for (pool, row) in pools.iter().zip(times) {
        print!("{:8}", pool.isa().name());
        for (time, base) in row.iter().zip(&times[0]) {
            print!(" {:10.2}", ratio(*base, *time));
        }
        let (Some(&last), base) = (row.last(), avx2.and_then(|i| times[i].last())) else {
            continue;
        };
        match base {
            Some(&base) => print!(" {:10.2}", ratio(base, last)),
            None => print!(" {:>10}", "-"),
        }
        println!(" {:9.3} ms", last.as_secs_f64() * 1e3);
    }
}
