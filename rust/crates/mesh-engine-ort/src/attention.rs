//! Interim attention, to be replaced by the kernel.

use half::f16;
use mesh_kernels::{Linear, linear};

use crate::operators::kernel;
use crate::shared::{Shared, Step};

pub(crate) fn attend(shared: &Shared, step: &mut Step, layer: usize, x: &[f32]) -> ort::Result<()> {
    let mut clock = step.clock();
    let weights = &shared.weights.layers[layer];
    let (heads, kv_heads, dim) = (shared.heads, shared.shape.kv_heads, shared.shape.head_dim);
    let width = (heads + 2 * kv_heads) * dim;
    step.qkv.resize(step.rows * width, 0.0);
    let options = Linear {
        norm: Some(shared.norm(&weights.attention_norm)),
        bias: weights.qkv_bias.as_deref(),
        ..Linear::default()
    };
    linear(&shared.pool, &weights.qkv, x, step.rows, &mut step.qkv, &options).map_err(kernel)?;
    step.lap("query, key, value", &mut clock);
    step.attended.clear();
    step.attended.resize(step.rows * heads * dim, 0.0);
    let rope = &shared.rope;
    let mut row = 0;
    for segment in step.segments.clone() {
        for i in 0..segment.rows as usize {
            let position = segment.position as usize + i;
            let r = &mut step.qkv[row * width..(row + 1) * width];
            for h in 0..heads + kv_heads {
                let v = &mut r[h * dim..(h + 1) * dim];
                let norm = if h < heads { &weights.query_norm } else { &weights.key_norm };
                if let Some(norm) = norm {
                    let s = v.iter().map(|x| x * x).sum::<f32>() / dim as f32;
                    let f = 1.0 / (s + shared.norm_eps).sqrt();
                    v.iter_mut().zip(norm).for_each(|(x, n)| *x *= f * n);
                }
                for (p, freq) in rope.frequencies.iter().enumerate() {
                    let (sin, cos) = (position as f32 * freq).sin_cos();
                    let (a, b) = if rope.interleaved {
                        (2 * p, 2 * p + 1)
                    } else {
                        (p, p + rope.frequencies.len())
                    };
                    let (x, y) = (v[a], v[b]);
                    v[a] = (x * cos - y * sin) * rope.magnitude;
                    v[b] = (x * sin + y * cos) * rope.magnitude;
                }
            }
            let kvw = kv_heads * dim;
            let (keys, values) = step.kv.layer_mut(segment.slot, layer);
            for j in 0..kvw {
                keys[position * kvw + j] = f16::from_f32(r[heads * dim + j]);
                values[position * kvw + j] = f16::from_f32(r[(heads + kv_heads) * dim + j]);
            }
            let (keys, values) = step.kv.layer(segment.slot, layer);
            let mut scores = vec![0.0f32; position + 1];
            for h in 0..heads {
                let q = &r[h * dim..(h + 1) * dim];
                let g = h / (heads / kv_heads) * dim;
                for (p, s) in scores.iter_mut().enumerate() {
                    let k = &keys[p * kvw + g..p * kvw + g + dim];
                    *s = q.iter().zip(k).map(|(q, k)| q * k.to_f32()).sum::<f32>() / (dim as f32).sqrt();
                }
                let peak = scores.iter().copied().fold(f32::MIN, f32::max);
                let mut total = 0.0;
                for s in &mut scores {
                    *s = (*s - peak).exp();
                    total += *s;
                }
                let out = &mut step.attended[(row * heads + h) * dim..(row * heads + h + 1) * dim];
                for (p, s) in scores.iter().enumerate() {
                    let v = &values[p * kvw + g..p * kvw + g + dim];
                    out.iter_mut().zip(v).for_each(|(o, v)| *o += s / total * v.to_f32());
                }
            }
            row += 1;
        }
    }
    step.lap("attention", &mut clock);
    Ok(())
}
