//! Keys and values of different widths.

mod support;

use mesh_kernels::{
    Attention, KvCache, KvFormat, KvSegment, KvShape, Pool, Rope, RopeOptions, RopeStyle, attention,
};
use support::{Rng, bits};

const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const KEY: usize = 48;
const VALUE: usize = 32;
const ROWS: usize = 150;

/// The outputs of a prompt and of a row behind it, whose cache was moved twice in between.
fn outputs(format: KvFormat, value_dim: usize, qkv: &[f32]) -> Vec<f32> {
    let rope = Rope::new(&RopeOptions {
        style: RopeStyle::Halves,
        dim: KEY,
        base: 10_000.0,
        scale: 1.0,
        factors: None,
        positions: ROWS + 1,
    })
    .expect("an even dimension");
    let spec = Attention {
        heads: HEADS,
        scale: None,
        window: None,
        rope: Some(&rope),
        q_norm: None,
        k_norm: None,
        eps: 1e-6,
        sinks: None,
    };
    let pool = Pool::new(3);
    let shape = KvShape {
        layers: 2,
        slots: 2,
        context: ROWS + 1,
        kv_heads: KV_HEADS,
        head_dim: KEY,
        value_dim,
        format,
    };
    let mut cache = KvCache::new(shape).expect("sane dimensions");
    let mut other = KvCache::new(shape).expect("sane dimensions");
    let segment = |position, rows| KvSegment {
        slot: 1,
        position,
        rows,
    };
    let mut out = vec![0.0; (ROWS + 1) * HEADS * value_dim];
    let (first, last) = out.split_at_mut(ROWS * HEADS * value_dim);
    let (before, after) = qkv.split_at(qkv.len() / (ROWS + 1) * ROWS);
    let prompt = [segment(0, ROWS)];
    attention(&pool, &spec, &mut cache, 1, &prompt, before, first).expect("it fits");
    let exported = cache.export(1, 0..ROWS).expect("written");
    assert_eq!(exported.len(), ROWS * cache.bytes_per_position());
    other.import(0, 0, &exported).expect("whole rows");
    other.copy_prefix(0, 1, ROWS).expect("within the cache");
    let next = [segment(ROWS, 1)];
    attention(&pool, &spec, &mut other, 1, &next, after, last).expect("it fits");
    out
}

#[test]
fn narrow_values_give_the_same_bits_as_with_zeros_behind_them() {
    let width = (HEADS + 2 * KV_HEADS) * KEY;
    let mut padded = Rng(5).floats((ROWS + 1) * width);
    let mut narrow = Vec::new();
    for row in padded.chunks_exact_mut(width) {
        let (others, values) = row.split_at_mut((HEADS + KV_HEADS) * KEY);
        narrow.extend_from_slice(others);
        for value in values.chunks_exact_mut(KEY) {
            value[VALUE..].fill(0.0);
            narrow.extend_from_slice(&value[..VALUE]);
        }
    }
    for format in [KvFormat::F16, KvFormat::F32] {
        let expected = outputs(format, KEY, &padded);
        let found = outputs(format, VALUE, &narrow);
        assert!(found.iter().any(|x| *x != 0.0));
        for (expected, found) in expected.chunks(KEY).zip(found.chunks(VALUE)) {
            assert_eq!(bits(&expected[..VALUE]), bits(found));
        }
    }
}
