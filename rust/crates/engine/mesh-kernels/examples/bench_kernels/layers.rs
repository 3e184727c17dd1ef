//! The layers of a model, and one step through them.

use std::hint::black_box;
use std::time::Duration;

use mesh_kernels::{
    Activation, Attention, FeedForward, Gate, KvCache, KvFormat, KvSegment, KvShape, Linear,
    PackOptions, Pool, QMatrix, Residual, RmsNorm, Rope, RopeOptions, RopeStyle, WeightType,
    attention, feed_forward, linear,
};

use crate::anchors::now;

#[derive(Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) name: &'static str,
    pub(crate) hidden: usize,
    pub(crate) ffn: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) vocab: usize,
    pub(crate) layers: usize,
    /// Layers really held; times are scaled to `layers`.
    pub(crate) held: usize,
}

pub(crate) const SHAPES: [Shape; 2] = [
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

pub(crate) struct Layer {
    pub(crate) qkv: QMatrix,
    pub(crate) o: QMatrix,
    pub(crate) gate: QMatrix,
    pub(crate) up: QMatrix,
    pub(crate) down: QMatrix,
}

/// Weights, with the same numbers in every row: time does not depend on them.
pub(crate) struct Model {
    pub(crate) layers: Vec<Layer>,
    pub(crate) lm_head: QMatrix,
}

impl Model {
    pub(crate) fn new(
        pool: &Pool,
        shape: &Shape,
        ty: WeightType,
        head: WeightType,
        options: PackOptions,
    ) -> Model {
        let width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim;
        let pack = |ty: WeightType, n: usize, k: usize| {
            let rows = vec![0x11; n * ty.row_bytes(k).expect("whole blocks")];
            QMatrix::pack_with(pool, ty, n, k, &rows, options).expect("packs")
        };
        let layers = (0..shape.held)
            .map(|_| Layer {
                qkv: pack(ty, width, shape.hidden),
                o: pack(ty, shape.hidden, shape.heads * shape.head_dim),
                gate: pack(ty, shape.ffn, shape.hidden),
                up: pack(ty, shape.ffn, shape.hidden),
                down: pack(ty, shape.hidden, shape.ffn),
            })
            .collect();
        Model {
            layers,
            lm_head: pack(head, shape.vocab, shape.hidden),
        }
    }
}

pub(crate) struct Bench<'a> {
    shape: &'a Shape,
    rope: Rope,
    cache: KvCache,
    norm: Vec<f32>,
}

impl<'a> Bench<'a> {
    pub(crate) fn new(shape: &'a Shape) -> Bench<'a> {
        let context = 512;
        Bench {
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
                value_dim: shape.head_dim,
                format: KvFormat::F16,
            })
            .expect("sane dimensions"),
            norm: vec![1.0; shape.hidden],
        }
    }

    /// One step of `rows` rows: up to 32 sequences at position 128, or one prompt. Times of QKV, attention,
    /// output, feed-forward and the head.
    pub(crate) fn step(
        &mut self,
        pool: &Pool,
        layers: &[Layer],
        lm_head: &QMatrix,
        rows: usize,
    ) -> [Duration; 5] {
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
            sinks: None,
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
                linear(pool, &l.qkv, &x, rows, &mut qkv, &normed).expect("fits");
            });
            timed(1, &mut || {
                attention(pool, &spec, &mut self.cache, i, &segments, &qkv, &mut att)
                    .expect("fits");
            });
            timed(2, &mut || {
                linear(pool, &l.o, &att, rows, &mut x, &added).expect("fits");
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
                feed_forward(pool, &layer, &mut x, rows).expect("fits");
            });
        }
        let start = now();
        linear(
            pool,
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
