//! Attention against its definition, and the independence of rows.

mod support;

use half::f16;
use mesh_kernels::{
    Attention, Isa, KvCache, KvFormat, KvSegment, KvShape, Pool, PoolOptions, Rope, RopeOptions,
    RopeStyle, attention,
};
use proptest::prelude::*;
use support::{Rng, bits, error, groups};

fn pool(threads: usize, isa: Isa) -> Pool {
    Pool::with_options(PoolOptions {
        threads,
        isa: Some(isa),
        ..PoolOptions::default()
    })
}

fn rope(style: RopeStyle, dim: usize, positions: usize) -> Rope {
    Rope::new(&RopeOptions {
        style,
        dim,
        base: 10_000.0,
        scale: 1.0,
        factors: None,
        positions,
    })
    .expect("an even dimension")
}

fn cache(layers: usize, slots: usize, context: usize, kv_heads: usize, head_dim: usize) -> KvCache {
    cache_of(KvFormat::F16, [layers, slots, context, kv_heads, head_dim])
}

fn cache_of(format: KvFormat, dimensions: [usize; 5]) -> KvCache {
    let [layers, slots, context, kv_heads, head_dim] = dimensions;
    KvCache::new(KvShape {
        layers,
        slots,
        context,
        kv_heads,
        head_dim,
        value_dim: head_dim,
        format,
    })
    .expect("sane dimensions")
}

const FORMATS: [KvFormat; 2] = [KvFormat::F16, KvFormat::F32];

fn plain(heads: usize, rope: &Rope) -> Attention<'_> {
    Attention {
        heads,
        scale: None,
        window: None,
        rope: Some(rope),
        q_norm: None,
        k_norm: None,
        eps: 1e-6,
        sinks: None,
    }
}

/// The definition, in f64, with keys and values rounded to the cache's format.
fn reference(
    format: KvFormat,
    spec: &Attention<'_>,
    kv_heads: usize,
    dim: usize,
    qkv: &[f32],
    rows: usize,
) -> Vec<f64> {
    let width = (spec.heads + 2 * kv_heads) * dim;
    let turned = |x: &[f32], norm: Option<&[f32]>, position: usize| {
        let mut head = x.to_vec();
        if let Some(weight) = norm {
            let mean: f32 = x.iter().map(|v| v * v).sum::<f32>() / dim as f32;
            let factor = 1.0 / (mean + spec.eps).sqrt();
            for (v, w) in head.iter_mut().zip(weight) {
                *v *= factor * w;
            }
        }
        if let Some(rope) = spec.rope {
            rope.rotate(&mut head, position).expect("within the table");
        }
        head
    };
    let rounded = |v: &f32| match format {
        KvFormat::F16 => f64::from(f16::from_f32(*v).to_f32()),
        KvFormat::F32 => f64::from(*v),
    };
    let scale = f64::from(spec.scale.unwrap_or(1.0 / (dim as f32).sqrt()));
    let mut out = Vec::new();
    for row in 0..rows {
        for head in 0..spec.heads {
            let kv = head / (spec.heads / kv_heads);
            let q = turned(&qkv[row * width + head * dim..][..dim], spec.q_norm, row);
            let seen = spec
                .window
                .map_or(0, |window| (row + 1).saturating_sub(window))..=row;
            let scores: Vec<f64> = seen
                .clone()
                .map(|p| {
                    let k = &qkv[p * width + (spec.heads + kv) * dim..][..dim];
                    let k = turned(k, spec.k_norm, p);
                    let dot: f64 = q
                        .iter()
                        .zip(&k)
                        .map(|(q, k)| f64::from(*q) * rounded(k))
                        .sum();
                    dot * scale
                })
                .collect();
            let peak = scores.iter().copied().fold(f64::MIN, f64::max);
            let weights: Vec<f64> = scores.iter().map(|s| (s - peak).exp()).collect();
            let sink = spec.sinks.map(|sinks| f64::from(sinks[head]));
            let sum = weights.iter().sum::<f64>() + sink.map_or(0.0, |sink| (sink - peak).exp());
            for d in 0..dim {
                let value =
                    |p: usize| rounded(&qkv[p * width + (spec.heads + kv_heads + kv) * dim + d]);
                let values = seen
                    .clone()
                    .zip(&weights)
                    .map(|(p, weight)| weight * value(p));
                out.push(values.sum::<f64>() / sum);
            }
        }
    }
    out
}

#[test]
fn attention_agrees_with_its_definition() {
    let mut rng = Rng(1);
    for (heads, kv_heads, dim, rows, style) in [
        (9, 3, 64, 300, RopeStyle::Interleaved),
        (12, 2, 128, 150, RopeStyle::Halves),
        (4, 4, 80, 40, RopeStyle::Halves),
        (14, 2, 16, 20, RopeStyle::Interleaved),
    ] {
        let rope = rope(style, dim, rows);
        let (q_norm, k_norm) = (rng.floats(dim), rng.floats(dim));
        let mut spec = plain(heads, &rope);
        let qkv = rng.floats(rows * (heads + 2 * kv_heads) * dim);
        for normed in [false, true] {
            if normed {
                spec.q_norm = Some(&q_norm);
                spec.k_norm = Some(&k_norm);
            }
            for (format, isa) in each(FORMATS, &Isa::available()) {
                let want = reference(format, &spec, kv_heads, dim, &qkv, rows);
                let mut cache = cache_of(format, [2, 3, rows, kv_heads, dim]);
                let mut out = vec![f32::NAN; rows * heads * dim];
                let segment = KvSegment {
                    slot: 1,
                    position: 0,
                    rows,
                };
                let pool = pool(2, isa);
                attention(&pool, &spec, &mut cache, 1, &[segment], &qkv, &mut out)
                    .expect("shapes fit");
                let off = error(&out, &want);
                let limit = match format {
                    // A key at the edge between two f16 values may round the other way than in the reference.
                    KvFormat::F16 => 2e-3,
                    KvFormat::F32 => 2e-6,
                };
                assert!(
                    off < limit,
                    "{heads}/{kv_heads}x{dim} normed {normed}, {format:?} on {isa:?}: {off}"
                );
            }
        }
    }
}

/// All pairs of a format and an instruction set.
fn each(formats: [KvFormat; 2], isas: &[Isa]) -> impl Iterator<Item = (KvFormat, Isa)> {
    let pairs = formats.map(|format| isas.iter().map(move |&isa| (format, isa)));
    pairs.into_iter().flatten()
}

#[test]
fn a_row_with_a_window_sees_nothing_before_it() {
    let mut rng = Rng(11);
    for (heads, kv_heads, dim, rows, window) in [
        (4, 1, 256, 140, 20),
        (9, 3, 64, 300, 1),
        (9, 3, 64, 300, 5),
        (6, 2, 32, 400, 128),
        (6, 2, 32, 400, 130),
        (4, 4, 16, 70, 512),
    ] {
        let rope = rope(RopeStyle::Halves, dim, rows);
        let mut spec = plain(heads, &rope);
        spec.window = Some(window);
        // Scores far apart: hidden positions would count most, and must not even overflow.
        let mut qkv = rng.floats(rows * (heads + 2 * kv_heads) * dim);
        let width = (heads + 2 * kv_heads) * dim;
        for row in (0..rows).step_by(7) {
            let keys = &mut qkv[row * width + heads * dim..][..kv_heads * dim];
            keys.iter_mut().for_each(|key| *key *= 40.0);
        }
        let want = reference(KvFormat::F16, &spec, kv_heads, dim, &qkv, rows);
        for isa in Isa::available() {
            let mut cache = cache(1, 1, rows, kv_heads, dim);
            let mut out = vec![f32::NAN; rows * heads * dim];
            let segment = KvSegment {
                slot: 0,
                position: 0,
                rows,
            };
            let pool = pool(2, isa);
            attention(&pool, &spec, &mut cache, 0, &[segment], &qkv, &mut out).expect("fits");
            let off = error(&out, &want);
            assert!(
                off < 1e-2,
                "{heads}/{kv_heads}x{dim}, window {window} on {isa:?}: {off}"
            );
        }
    }
}

#[test]
fn a_sink_takes_its_part_of_the_weights() {
    let mut rng = Rng(13);
    let (heads, kv_heads, dim, rows) = (6, 2, 64, 300);
    let rope = rope(RopeStyle::Halves, dim, rows);
    let qkv = rng.floats(rows * (heads + 2 * kv_heads) * dim);
    // Far below the scores, among them, and far above.
    let sinks = [-200.0, -1.0, 0.0, 0.5, 7.0, 200.0];
    for (window, format) in [(None, KvFormat::F32), (Some(20), KvFormat::F16)] {
        let mut spec = plain(heads, &rope);
        spec.window = window;
        spec.sinks = Some(&sinks);
        let want = reference(format, &spec, kv_heads, dim, &qkv, rows);
        for isa in Isa::available() {
            let mut cache = cache_of(format, [1, 1, rows, kv_heads, dim]);
            let mut out = vec![f32::NAN; rows * heads * dim];
            let segment = KvSegment {
                slot: 0,
                position: 0,
                rows,
            };
            let pool = pool(2, isa);
            attention(&pool, &spec, &mut cache, 0, &[segment], &qkv, &mut out).expect("fits");
            let off = error(&out, &want);
            assert!(off < 2e-3, "{window:?} {format:?} on {isa:?}: {off}");
            // The last head's sink is all that it sees.
            let last = out.chunks_exact(dim).skip(heads - 1).step_by(heads);
            assert!(last.flatten().all(|x| x.abs() < 1e-30), "{isa:?}");
        }
    }
}

#[test]
fn a_window_as_long_as_the_sequence_changes_no_bit() {
    let mut rng = Rng(12);
    let (heads, kv_heads, dim, rows) = (6, 2, 64, 290);
    let rope = rope(RopeStyle::Halves, dim, rows);
    let qkv = rng.floats(rows * (heads + 2 * kv_heads) * dim);
    for isa in Isa::available() {
        let run = |window| {
            let mut spec = plain(heads, &rope);
            spec.window = window;
            let mut cache = cache(1, 1, rows, kv_heads, dim);
            let mut out = vec![0.0; rows * heads * dim];
            let segment = KvSegment {
                slot: 0,
                position: 0,
                rows,
            };
            attention(
                &pool(1, isa),
                &spec,
                &mut cache,
                0,
                &[segment],
                &qkv,
                &mut out,
            )
            .expect("fits");
            bits(&out)
        };
        assert_eq!(run(Some(rows)), run(None), "{isa:?}");
    }
}

#[test]
fn instruction_sets_of_a_group_give_the_same_bits() {
    let mut rng = Rng(2);
    let (heads, kv_heads, dim, rows) = (9, 3, 64, 200);
    let rope = rope(RopeStyle::Interleaved, dim, rows);
    let spec = plain(heads, &rope);
    let qkv = rng.floats(rows * (heads + 2 * kv_heads) * dim);
    let run = |&isa: &Isa| {
        let mut cache = cache(1, 1, rows, kv_heads, dim);
        let mut out = vec![0.0; rows * heads * dim];
        let segment = KvSegment {
            slot: 0,
            position: 0,
            rows,
        };
        let pool = pool(1, isa);
        attention(&pool, &spec, &mut cache, 0, &[segment], &qkv, &mut out).expect("shapes fit");
        bits(&out)
    };
    for group in groups() {
        let results: Vec<_> = group.iter().map(run).collect();
        assert!(
            results.windows(2).all(|pair| pair[0] == pair[1]),
            "{group:?}"
        );
    }
}

#[test]
fn large_scores_do_not_overflow() {
    let (heads, dim, rows) = (2, 32, 140);
    let rope = rope(RopeStyle::Halves, dim, rows);
    let mut spec = plain(heads, &rope);
    spec.scale = Some(50.0);
    let mut rng = Rng(3);
    let qkv: Vec<f32> = rng
        .floats(rows * 3 * heads * dim)
        .iter()
        .map(|v| v * 30.0)
        .collect();
    for isa in Isa::available() {
        let mut cache = cache(1, 1, rows, heads, dim);
        let mut out = vec![0.0; rows * heads * dim];
        let segment = KvSegment {
            slot: 0,
            position: 0,
            rows,
        };
        attention(
            &pool(1, isa),
            &spec,
            &mut cache,
            0,
            &[segment],
            &qkv,
            &mut out,
        )
        .expect("shapes fit");
        assert!(out.iter().all(|v| v.abs() <= 30.1));
    }
}

#[test]
fn exported_rows_can_be_imported_elsewhere() {
    for format in FORMATS {
        export_and_import(format);
    }
}

fn export_and_import(format: KvFormat) {
    let mut rng = Rng(4);
    let (heads, dim, rows) = (2, 32, 50);
    let rope = rope(RopeStyle::Halves, dim, 64);
    let spec = plain(heads, &rope);
    let pool = pool(1, Isa::current());
    let mut first = cache_of(format, [1, 2, 64, heads, dim]);
    let qkv = rng.floats(rows * 3 * heads * dim);
    let next = rng.floats(3 * heads * dim);
    let mut out = vec![0.0; rows * heads * dim];
    let segment = KvSegment {
        slot: 1,
        position: 0,
        rows,
    };
    attention(&pool, &spec, &mut first, 0, &[segment], &qkv, &mut out).expect("shapes fit");
    let bytes = first.export(1, 0..rows).expect("rows exist");
    assert_eq!(bytes.len(), rows * 2 * heads * dim * format.bytes());
    assert_eq!(bytes.len(), rows * first.bytes_per_position());

    let step = |cache: &mut KvCache, slot| {
        let mut out = vec![0.0; heads * dim];
        let segment = KvSegment {
            slot,
            position: rows,
            rows: 1,
        };
        attention(&pool, &spec, cache, 0, &[segment], &next, &mut out).expect("shapes fit");
        bits(&out)
    };
    let mut second = cache_of(format, [1, 3, 100, heads, dim]);
    let rope_long = rope_positions(dim, 100);
    assert_eq!(second.import(2, 0, &bytes), Ok(rows));
    assert!(second.import(2, 60, &bytes).is_err(), "beyond the context");
    assert!(second.import(2, 0, &bytes[1..]).is_err(), "half a row");
    assert_eq!(second.export(2, 0..rows), Ok(bytes));
    first.copy_prefix(1, 0, rows).expect("slots exist");
    assert!(first.copy_prefix(1, 0, 65).is_err());
    let want = step(&mut first, 1);
    assert_eq!(step(&mut first, 0), want, "a copied prefix");
    let mut out = vec![0.0; heads * dim];
    let segment = KvSegment {
        slot: 2,
        position: rows,
        rows: 1,
    };
    attention(
        &pool,
        &plain(heads, &rope_long),
        &mut second,
        0,
        &[segment],
        &next,
        &mut out,
    )
    .expect("shapes fit");
    assert_eq!(bits(&out), want, "an imported prefix");
    first.release(1).expect("slot exists");
    assert!(first.release(2).is_err());
}

fn rope_positions(dim: usize, positions: usize) -> Rope {
    rope(RopeStyle::Halves, dim, positions)
}

#[test]
fn impossible_calls_are_errors() {
    let rope = rope(RopeStyle::Halves, 32, 64);
    let spec = plain(2, &rope);
    let pool = pool(1, Isa::current());
    let mut cache = cache(1, 2, 64, 2, 32);
    let qkv = vec![0.0; 2 * 6 * 32];
    let mut out = vec![0.0; 2 * 64];
    let segment = |slot, position, rows| KvSegment {
        slot,
        position,
        rows,
    };
    let mut run = |spec: &Attention<'_>, layer, segments: &[KvSegment], out: &mut [f32]| {
        attention(&pool, spec, &mut cache, layer, segments, &qkv, out)
    };
    assert!(run(&spec, 0, &[segment(0, 62, 2)], &mut out).is_ok());
    assert!(run(&spec, 0, &[segment(0, 63, 2)], &mut out).is_err());
    assert!(run(&spec, 0, &[segment(0, usize::MAX, 2)], &mut out).is_err());
    assert!(run(&spec, 0, &[segment(2, 0, 2)], &mut out).is_err());
    assert!(run(&spec, 1, &[segment(0, 0, 2)], &mut out).is_err());
    assert!(run(&spec, 0, &[segment(0, 0, 1), segment(0, 1, 1)], &mut out).is_err());
    assert!(run(&spec, 0, &[segment(0, 0, 1)], &mut out).is_err());
    assert!(run(&spec, 0, &[segment(0, 0, 2)], &mut out[1..]).is_err());
    let mut blind = spec;
    blind.window = Some(0);
    assert!(run(&blind, 0, &[segment(0, 0, 2)], &mut out).is_err());
    let mut few = spec;
    few.sinks = Some(&[0.0]);
    assert!(run(&few, 0, &[segment(0, 0, 2)], &mut out).is_err());
    let mut odd = spec;
    odd.heads = 3;
    assert!(run(&odd, 0, &[segment(0, 0, 2)], &mut out).is_err());
    for width in [0, 8, 24, 272] {
        for (head_dim, value_dim) in [(width, 16), (16, width)] {
            let shape = KvShape {
                layers: 1,
                slots: 1,
                context: 16,
                kv_heads: 1,
                head_dim,
                value_dim,
                format: KvFormat::F16,
            };
            assert!(KvCache::new(shape).is_err());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn rows_do_not_depend_on_chunks_company_or_threads(
        rows in 1_usize..300,
        cuts in prop::collection::vec(prop_oneof![3 => 1_usize..3, 1 => 1_usize..60], 300),
        threads in 1_usize..5,
        group in 1_usize..8,
        window in prop_oneof![Just(None), (1_usize..280).prop_map(Some)],
        format in prop::sample::select(&FORMATS[..]),
        sinks in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let (kv_heads, dim) = (2, 32);
        let heads = group * kv_heads;
        let width = (heads + 2 * kv_heads) * dim;
        let mut rng = Rng(seed);
        let rope = rope(RopeStyle::Interleaved, dim, 320);
        let scores = rng.floats(heads);
        let spec = Attention { window, sinks: sinks.then_some(&scores), ..plain(heads, &rope) };
        let (a, b) = (rng.floats(rows * width), rng.floats(rows * width));
        for isa in Isa::available() {
            let whole = |x: &[f32]| {
                let mut cache = cache_of(format, [1, 1, 320, kv_heads, dim]);
                let mut out = vec![0.0; rows * heads * dim];
                let segment = KvSegment { slot: 0, position: 0, rows };
                attention(&pool(1, isa), &spec, &mut cache, 0, &[segment], x, &mut out).expect("fits");
                bits(&out)
            };
            // Both sequences side by side, in pieces, with other threads.
            let pool = pool(threads, isa);
            let mut cache = cache_of(format, [1, 2, 320, kv_heads, dim]);
            let (mut got_a, mut got_b) = (Vec::new(), Vec::new());
            let mut at = 0;
            for cut in &cuts {
                let n = (*cut).min(rows - at);
                if n == 0 {
                    break;
                }
                let mut x = a[at * width..][..n * width].to_vec();
                x.extend_from_slice(&b[at * width..][..n * width]);
                let mut out = vec![0.0; 2 * n * heads * dim];
                let segments = [0, 1].map(|slot| KvSegment { slot, position: at, rows: n });
                attention(&pool, &spec, &mut cache, 0, &segments, &x, &mut out).expect("fits");
                let (x, y) = out.split_at(n * heads * dim);
                got_a.extend(bits(x));
                got_b.extend(bits(y));
                at += n;
            }
            let covered = at * heads * dim;
            prop_assert_eq!(&got_a[..], &whole(&a)[..covered], "{:?}", isa);
            prop_assert_eq!(&got_b[..], &whole(&b)[..covered], "{:?}", isa);
        }
    }
}
