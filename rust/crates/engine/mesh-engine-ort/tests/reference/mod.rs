//! A plain forward pass in f32 over dequantised weights, straight from the papers, to compare the stage with.

use mesh_model::{
    Activation, LatentAttention, Mixture, Model, ModelConfig, Rope, RopeStyle, Tensor, dequantize,
};

/// Logits of every row for `tokens` from an empty context.
#[allow(dead_code, reason = "each test file uses a part")]
pub(crate) fn forward(model: &Model, tokens: &[u32]) -> Vec<f32> {
    rows_from(model, tokens, 0)
}

/// Logits of the last row.
#[allow(dead_code, reason = "each test file uses a part")]
pub(crate) fn last_row(model: &Model, tokens: &[u32]) -> Vec<f32> {
    rows_from(model, tokens, tokens.len() - 1)
}

fn rows_from(model: &Model, tokens: &[u32], first: usize) -> Vec<f32> {
    let c = model.config();
    let tensor = |name: &str| model.tensors().get(name).unwrap().to_f32().unwrap();
    let norm_weight = |name: &str| -> Vec<f32> {
        let weight = tensor(name).into_iter();
        weight.map(|weight| weight + c.norm_offset).collect()
    };
    let embedding = model.tensors().get("token_embd.weight").unwrap();
    let mut x: Vec<Vec<f32>> = tokens
        .iter()
        .map(|&token| {
            let mut row = vec![0.0; c.hidden];
            dequantize(
                embedding.ty,
                &file_rows(&embedding, token as usize, 1),
                &mut row,
            )
            .unwrap();
            row.iter().map(|x| x * c.embedding_scale).collect()
        })
        .collect();
    for layer in 0..c.layers {
        let t = |suffix: &str| tensor(&format!("blk.{layer}.{suffix}"));
        let n = |suffix: &str| norm_weight(&format!("blk.{layer}.{suffix}"));
        // The output of a half layer is added to the row, in some networks after another norm.
        let add = |row: &mut [f32], mut y: Vec<f32>, post_norm: &str| {
            if c.post_norms {
                y = rms_norm(&y, &n(post_norm), c.norm_eps);
            }
            row.iter_mut()
                .zip(y)
                .for_each(|(x, y)| *x += c.residual_scale * y);
        };
        let norm = n("attn_norm.weight");
        let normed: Vec<_> = x
            .iter()
            .map(|row| rms_norm(row, &norm, c.norm_eps))
            .collect();
        let project = |which: &str, norm_name: Option<&str>| -> Vec<Vec<f32>> {
            let matrix = t(&format!("attn_{which}.weight"));
            let bias = c.qkv_bias.then(|| t(&format!("attn_{which}.bias")));
            let head_norm = norm_name.filter(|_| c.qk_norm).map(n);
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
                        if let Some(norm) = head_norm.as_ref().filter(|_| c.qk_norm_over_heads) {
                            out = rms_norm(&out, norm, c.norm_eps);
                        }
                        for head in out.chunks_mut(c.head_dim) {
                            if let Some(norm) = head_norm.as_ref().filter(|_| !c.qk_norm_over_heads)
                            {
                                head.copy_from_slice(&rms_norm(head, norm, c.norm_eps));
                            }
                            rotate(c.rope_of(layer), head, position);
                        }
                    }
                    out
                })
                .collect()
        };
        let [q, k, v] = match c.latent {
            Some(latent) => {
                let rows = normed.iter().enumerate();
                let heads = rows.map(|(position, row)| latent_heads(c, latent, t, row, position));
                let heads: Vec<[Vec<f32>; 3]> = heads.collect();
                std::array::from_fn(|which| heads.iter().map(|row| row[which].clone()).collect())
            }
            None => [
                project("q", Some("attn_q_norm.weight")),
                project("k", Some("attn_k_norm.weight")),
                project("v", None),
            ],
        };
        let output = t("attn_output.weight");
        let output_bias = c.output_bias.then(|| t("attn_output.bias"));
        let sinks = c.attention_sinks.then(|| t("attn_sinks.weight"));
        let magnitude = match c.latent {
            // Queries and keys have it already.
            Some(_) => 1.0,
            None => c.rope_of(layer).magnitude().powi(2),
        };
        let scale = magnitude / c.query_scalar.sqrt();
        for (i, row) in x.iter_mut().enumerate() {
            let seen_from = c
                .window_of(layer)
                .map_or(0, |window| (i + 1).saturating_sub(window as usize));
            let gathered: Vec<f32> = (0..c.heads)
                .flat_map(|head| {
                    let shared = head / (c.heads / c.kv_heads);
                    attend(
                        &q[i][head * c.head_dim..][..c.head_dim],
                        |j| &k[j][shared * c.head_dim..][..c.head_dim],
                        |j| &v[j][shared * c.value_dim..][..c.value_dim],
                        seen_from..i + 1,
                        scale,
                        sinks.as_ref().map(|sinks| sinks[head]),
                    )
                })
                .collect();
            let attended = plus(times(&output, &gathered), output_bias.as_deref());
            add(row, attended, "post_attention_norm.weight");
        }
        let norm = n(c.ffn_norm());
        let feed_forward = FeedForward::read(model, layer);
        for row in &mut x {
            let normed = rms_norm(row, &norm, c.norm_eps);
            add(
                row,
                feed_forward.compute(c, &normed),
                "post_ffw_norm.weight",
            );
        }
    }
    let norm = norm_weight("output_norm.weight");
    let head = if c.tied_embeddings {
        embedding
    } else {
        model.tensors().get("output.weight").unwrap()
    };
    let x: Vec<_> = x[first..]
        .iter()
        .map(|row| rms_norm(row, &norm, c.norm_eps))
        .collect();
    // Piece by piece: as floats a large vocabulary's matrix takes a good part of a small machine's memory.
    let mut logits = vec![Vec::with_capacity(c.vocab); x.len()];
    for start in (0..c.vocab).step_by(4096) {
        let count = (c.vocab - start).min(4096);
        let mut piece = vec![0.0; count * c.hidden];
        dequantize(head.ty, &file_rows(&head, start, count), &mut piece).unwrap();
        for (logits, row) in logits.iter_mut().zip(&x) {
            logits.extend(times(&piece, row));
        }
    }
    let mut logits = logits.concat();
    logits.iter_mut().for_each(|x| *x /= c.logit_divisor);
    logits
}

/// Queries, keys and values of latent attention for one normed row; `tensor` reads a tensor of the layer.
fn latent_heads(
    c: &ModelConfig,
    latent: LatentAttention,
    tensor: impl Fn(&str) -> Vec<f32>,
    row: &[f32],
    position: usize,
) -> [Vec<f32>; 3] {
    let norm = |x: &[f32], name: &str| rms_norm(x, &tensor(name), c.norm_eps);
    let plain = c.head_dim - c.rope.dim;
    let mut q = match latent.query_rank {
        None => times(&tensor("attn_q.weight"), row),
        Some(_) => {
            let narrow = times(&tensor("attn_q_a.weight"), row);
            let narrow = norm(&narrow, "attn_q_a_norm.weight");
            times(&tensor("attn_q_b.weight"), &narrow)
        }
    };
    let turn = |part: &mut [f32]| {
        rotate(&c.rope, part, position);
        part.iter_mut().for_each(|x| *x *= c.rope.magnitude());
    };
    q.chunks_mut(c.head_dim)
        .for_each(|head| turn(&mut head[plain..]));
    let down = times(&tensor("attn_kv_a_mqa.weight"), row);
    let (narrow, shared) = down.split_at(latent.rank);
    let mut shared = shared.to_vec();
    turn(&mut shared);
    let narrow = norm(narrow, "attn_kv_a_norm.weight");
    let expanded = times(&tensor("attn_kv_b.weight"), &narrow);
    let (mut k, mut v) = (Vec::new(), Vec::new());
    for head in expanded.chunks(plain + c.value_dim) {
        k.extend([&head[..plain], &shared].concat());
        v.extend(&head[plain..]);
    }
    [q, k, v]
}

/// The matrices of a feed-forward half layer: those of one network, or a router with those of all experts.
struct FeedForward<'a> {
    router: Option<(Vec<f32>, &'a Mixture)>,
    networks: Vec<[Vec<f32>; 3]>,
    router_bias: Option<Vec<f32>>,
    /// Of each of the three matrices those of all networks, one after the other.
    biases: Option<[Vec<f32>; 3]>,
    shared: Option<Shared>,
}

/// A shared expert.
struct Shared {
    network: [Vec<f32>; 3],
    /// Scores rows for it.
    score: Option<Vec<f32>>,
}

impl<'a> FeedForward<'a> {
    fn read(model: &'a Model, layer: u32) -> Self {
        let matrices = ["ffn_gate", "ffn_up", "ffn_down"].map(|m| format!("blk.{layer}.{m}"));
        let tensor = |name: String| model.tensors().get(&name).unwrap().to_f32().unwrap();
        let Some(mixture) = model.config().mixture_of(layer) else {
            return FeedForward {
                router: None,
                router_bias: None,
                biases: None,
                shared: None,
                networks: vec![matrices.map(|matrix| tensor(format!("{matrix}.weight")))],
            };
        };
        let expert = |expert| {
            let read = |matrix: &String| {
                let tensor = model.tensors().expert(matrix, expert).unwrap();
                tensor.to_f32().unwrap()
            };
            matrices.each_ref().map(read)
        };
        let shared = mixture.shared.map(|shared| {
            let network = (matrices.each_ref()).map(|m| tensor(format!("{m}_shexp.weight")));
            let score = format!("blk.{layer}.ffn_gate_inp_shexp.weight");
            let score = shared.gated.then(|| tensor(score));
            Shared { network, score }
        });
        FeedForward {
            shared,
            router_bias: mixture
                .biases
                .then(|| tensor(format!("blk.{layer}.ffn_gate_inp.bias"))),
            biases: mixture.biases.then(|| {
                let stack = |matrix: &String| tensor(format!("{matrix}_exps.bias"));
                matrices.each_ref().map(stack)
            }),
            router: Some((tensor(format!("blk.{layer}.ffn_gate_inp.weight")), mixture)),
            networks: (0..mixture.experts).map(expert).collect(),
        }
    }

    fn compute(&self, config: &ModelConfig, x: &[f32]) -> Vec<f32> {
        let network = |[gate, up, down]: &[Vec<f32>; 3], biases: Option<[&[f32]; 3]>| {
            let bias = |which: usize| biases.map(|biases| biases[which]);
            let gates = plus(times(gate, x), bias(0)).into_iter();
            let middle: Vec<f32> = gates
                .zip(plus(times(up, x), bias(1)))
                .map(|(gate, up)| gated(config.activation, gate, up))
                .collect();
            plus(times(down, &middle), bias(2))
        };
        let expert = |number: usize| {
            let biases = self.biases.as_ref().map(|stacks| {
                stacks.each_ref().map(|stack| {
                    let width = stack.len() / self.networks.len();
                    &stack[number * width..][..width]
                })
            });
            network(&self.networks[number], biases)
        };
        let Some((router, mixture)) = &self.router else {
            return expert(0);
        };
        let scores = plus(times(router, x), self.router_bias.as_deref());
        let mut order: Vec<usize> = (0..scores.len()).collect();
        order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
        let chosen = &order[..mixture.used];
        let exp = |expert: &usize| (scores[*expert] - scores[order[0]]).exp();
        let total: f32 = match mixture.normalised {
            true => chosen.iter().map(exp).sum(),
            false => order.iter().map(exp).sum(),
        };
        let mut out = vec![0.0; x.len()];
        for number in chosen {
            let weight = mixture.scale * exp(number) / total;
            let output = expert(*number);
            out.iter_mut()
                .zip(output)
                .for_each(|(out, y)| *out += weight * y);
        }
        if let Some(expert) = &self.shared {
            let factor = expert.score.as_ref().map_or(1.0, |score| {
                let score = times(score, x)[0];
                1.0 / (1.0 + (-score).exp())
            });
            out.iter_mut()
                .zip(network(&expert.network, None))
                .for_each(|(out, y)| *out += factor * y);
        }
        out
    }
}

/// The bytes of some rows of a matrix.
fn file_rows(matrix: &Tensor<'_>, first: usize, count: usize) -> Vec<u8> {
    let bytes = matrix.ty.bytes_for(matrix.dims[0]).unwrap() as usize;
    let mut rows = vec![0; count * bytes];
    matrix.data.read_at(first * bytes, &mut rows).unwrap();
    rows
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

fn plus(mut x: Vec<f32>, bias: Option<&[f32]>) -> Vec<f32> {
    let bias = bias.into_iter().flatten();
    x.iter_mut().zip(bias).for_each(|(x, bias)| *x += bias);
    x
}

/// The activated gate times what it is multiplied by.
fn gated(activation: Activation, x: f32, up: f32) -> f32 {
    match activation {
        Activation::Silu => x / (1.0 + (-x).exp()) * up,
        Activation::GeluTanh => {
            let u = (2.0 / std::f32::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3));
            x / 2.0 * (1.0 + u.tanh()) * up
        }
        Activation::ClampedSwiglu => {
            let x = x.min(7.0);
            x / (1.0 + (-1.702 * x).exp()) * (up.clamp(-7.0, 7.0) + 1.0)
        }
    }
}

fn rotate(rope: &Rope, head: &mut [f32], position: usize) {
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
    seen: std::ops::Range<usize>,
    scale: f32,
    sink: Option<f32>,
) -> Vec<f32> {
    let scores: Vec<f32> = seen
        .clone()
        .map(|j| scale * q.iter().zip(key(j)).map(|(q, k)| q * k).sum::<f32>())
        .collect();
    let peak = scores.iter().copied().fold(f32::MIN, f32::max);
    let weights: Vec<f32> = scores.iter().map(|score| (score - peak).exp()).collect();
    let sink = sink.map_or(0.0, |sink| (sink - peak).exp());
    let total = weights.iter().sum::<f32>() + sink;
    let mut out = vec![0.0; value(seen.start).len()];
    for (j, weight) in seen.zip(&weights) {
        out.iter_mut()
            .zip(value(j))
            .for_each(|(out, v)| *out += weight / total * v);
    }
    out
}
