//! A plain forward pass in f32 over dequantised weights, straight from the papers, to compare the stage with.

use mesh_model::{Model, RopeStyle};

/// Logits of every row for `tokens` from an empty context.
pub(crate) fn forward(model: &Model, tokens: &[u32]) -> Vec<f32> {
    let c = model.config();
    let tensor = |name: &str| model.gguf().tensor(name).unwrap().to_f32();
    let embedding = tensor("token_embd.weight");
    let mut x: Vec<Vec<f32>> = tokens
        .iter()
        .map(|&token| embedding[token as usize * c.hidden..][..c.hidden].to_vec())
        .collect();
    for layer in 0..c.layers {
        let t = |suffix: &str| tensor(&format!("blk.{layer}.{suffix}"));
        let norm = t("attn_norm.weight");
        let normed: Vec<_> = x
            .iter()
            .map(|row| rms_norm(row, &norm, c.norm_eps))
            .collect();
        let project = |which: &str, norm_name: Option<&str>| -> Vec<Vec<f32>> {
            let matrix = t(&format!("attn_{which}.weight"));
            let bias = c.qkv_bias.then(|| t(&format!("attn_{which}.bias")));
            let head_norm = norm_name.filter(|_| c.qk_norm).map(t);
            normed
                .iter()
                .enumerate()
                .map(|(position, row)| {
                    let mut out = times(&matrix, row);
                    if let Some(bias) = &bias {
                        out.iter_mut()
                            .zip(bias)
                            .for_each(|(out, bias)| *out += bias);
                    }
                    if norm_name.is_some() {
                        for head in out.chunks_mut(c.head_dim) {
                            if let Some(norm) = &head_norm {
                                head.copy_from_slice(&rms_norm(head, norm, c.norm_eps));
                            }
                            rotate(model, head, position);
                        }
                    }
                    out
                })
                .collect()
        };
        let q = project("q", Some("attn_q_norm.weight"));
        let k = project("k", Some("attn_k_norm.weight"));
        let v = project("v", None);
        let output = t("attn_output.weight");
        for (i, row) in x.iter_mut().enumerate() {
            let gathered: Vec<f32> = (0..c.heads)
                .flat_map(|head| {
                    let shared = head / (c.heads / c.kv_heads);
                    attend(
                        &q[i][head * c.head_dim..][..c.head_dim],
                        |j| &k[j][shared * c.head_dim..][..c.head_dim],
                        |j| &v[j][shared * c.head_dim..][..c.head_dim],
                        i + 1,
                    )
                })
                .collect();
            row.iter_mut()
                .zip(times(&output, &gathered))
                .for_each(|(x, y)| *x += y);
        }
        let norm = t("ffn_norm.weight");
        let (gate, up, down) = (
            t("ffn_gate.weight"),
            t("ffn_up.weight"),
            t("ffn_down.weight"),
        );
        for row in &mut x {
            let normed = rms_norm(row, &norm, c.norm_eps);
            let middle: Vec<f32> = times(&gate, &normed)
                .into_iter()
                .zip(times(&up, &normed))
                .map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up)
                .collect();
            row.iter_mut()
                .zip(times(&down, &middle))
                .for_each(|(x, y)| *x += y);
        }
    }
    let norm = tensor("output_norm.weight");
    let head = if c.tied_embeddings {
        embedding
    } else {
        tensor("output.weight")
    };
    x.iter()
        .flat_map(|row| times(&head, &rms_norm(row, &norm, c.norm_eps)))
        .collect()
}

fn rms_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let mean = x.iter().map(|x| x * x).sum::<f32>() / x.len() as f32;
    let factor = 1.0 / (mean + eps).sqrt();
    x.iter()
        .zip(weight)
        .map(|(x, weight)| x * factor * weight)
        .collect()
}

/// `matrix · x`, the matrix row-major with rows as long as `x`.
fn times(matrix: &[f32], x: &[f32]) -> Vec<f32> {
    matrix
        .chunks_exact(x.len())
        .map(|row| row.iter().zip(x).map(|(a, b)| a * b).sum())
        .collect()
}

fn rotate(model: &Model, head: &mut [f32], position: usize) {
    let rope = &model.config().rope;
    let half = rope.dim / 2;
    for (i, frequency) in rope.frequencies().into_iter().enumerate() {
        let (a, b) = match rope.style {
            RopeStyle::Interleaved => (2 * i, 2 * i + 1),
            RopeStyle::Halves => (i, i + half),
        };
        let (sin, cos) = (position as f64 * f64::from(frequency)).sin_cos();
        let (x, y) = (f64::from(head[a]), f64::from(head[b]));
        head[a] = (x * cos - y * sin) as f32;
        head[b] = (x * sin + y * cos) as f32;
    }
}

fn attend<'a>(
    q: &[f32],
    key: impl Fn(usize) -> &'a [f32],
    value: impl Fn(usize) -> &'a [f32],
    count: usize,
) -> Vec<f32> {
    let scale = 1.0 / (q.len() as f32).sqrt();
    let scores: Vec<f32> = (0..count)
        .map(|j| scale * q.iter().zip(key(j)).map(|(q, k)| q * k).sum::<f32>())
        .collect();
    let peak = scores.iter().copied().fold(f32::MIN, f32::max);
    let weights: Vec<f32> = scores.iter().map(|score| (score - peak).exp()).collect();
    let total: f32 = weights.iter().sum();
    let mut out = vec![0.0; q.len()];
    for (j, weight) in weights.iter().enumerate() {
        out.iter_mut()
            .zip(value(j))
            .for_each(|(out, v)| *out += weight / total * v);
    }
    out
}
