//! Checks of the network's tensors against the shapes that the metadata gives.

use super::architecture::Architecture;
use super::error::ConfigError;
use super::latent::LatentAttention;
use super::mixture::Mixture;
use super::network::ModelConfig;
use crate::checkpoint::Checkpoint;
use crate::gguf::{expert_name, stack_name};

/// Checks that all tensors that the engines need exist with the right dimensions, and that no other would be
/// ignored.
pub(super) fn check(config: &ModelConfig, checkpoint: &dyn Checkpoint) -> Result<(), ConfigError> {
    let expected = expected(config, checkpoint);
    for (name, dims) in &expected.globals {
        check_one(checkpoint, name, dims)?;
    }
    for layer in 0..config.layers {
        let of_kind = match config.mixture_of(layer) {
            None => &expected.dense,
            Some(_) => &expected.mixture,
        };
        for (suffix, dims) in expected.per_layer.iter().chain(of_kind) {
            check_one(checkpoint, &format!("blk.{layer}.{suffix}"), dims)?;
        }
        if let Some(mixture) = config.mixture_of(layer) {
            check_experts(config, mixture, checkpoint, layer)?;
        }
    }
    for tensor in checkpoint.tensors().iter() {
        if !is_known(tensor.name, config, &expected, checkpoint) {
            return Err(ConfigError::UnexpectedTensor {
                tensor: tensor.name.into(),
                architecture: config.architecture.name(),
            });
        }
    }
    Ok(())
}

struct ExpectedTensors {
    globals: Vec<(&'static str, Vec<u64>)>,
    /// Tensors that all layers have.
    per_layer: Vec<(&'static str, Vec<u64>)>,
    /// Tensors of dense layers besides.
    dense: Vec<(&'static str, Vec<u64>)>,
    /// Tensors of layers with a mixture besides, without their experts' matrices.
    mixture: Vec<(&'static str, Vec<u64>)>,
}

/// Dimensions in GGUF order: inputs first.
fn expected(config: &ModelConfig, checkpoint: &dyn Checkpoint) -> ExpectedTensors {
    let [hidden, ffn, vocab] = [config.hidden, config.ffn, config.vocab].map(|n| n as u64);
    let mut globals = vec![
        ("token_embd.weight", vec![hidden, vocab]),
        ("output_norm.weight", vec![hidden]),
    ];
    if !config.tied_embeddings {
        globals.push(("output.weight", vec![hidden, vocab]));
    }
    let mut per_layer = vec![("attn_norm.weight", vec![hidden])];
    per_layer.extend(match config.latent {
        None => attention(config),
        Some(latent) => latent_attention(config, latent, checkpoint),
    });
    per_layer.push((config.ffn_norm(), vec![hidden]));
    let dense = vec![
        ("ffn_gate.weight", vec![hidden, ffn]),
        ("ffn_up.weight", vec![hidden, ffn]),
        ("ffn_down.weight", vec![ffn, hidden]),
    ];
    if config.post_norms {
        per_layer.extend([
            ("post_attention_norm.weight", vec![hidden]),
            ("post_ffw_norm.weight", vec![hidden]),
        ]);
    }
    ExpectedTensors {
        globals,
        per_layer,
        dense,
        mixture: match &config.mixture {
            Some(mixture) => around_experts(hidden, mixture),
            None => Vec::new(),
        },
    }
}

/// Tensors of attention with queries, keys and values of their own.
fn attention(config: &ModelConfig) -> Vec<(&'static str, Vec<u64>)> {
    let [hidden, heads, head_dim] =
        [config.hidden, config.heads, config.head_dim].map(|n| n as u64);
    let (q, kv) = (heads * head_dim, config.kv_heads as u64 * head_dim);
    let mut tensors = vec![
        ("attn_q.weight", vec![hidden, q]),
        ("attn_k.weight", vec![hidden, kv]),
        ("attn_v.weight", vec![hidden, kv]),
        ("attn_output.weight", vec![q, hidden]),
    ];
    if config.qkv_bias || config.architecture.has_qkv_bias() {
        tensors.extend([
            ("attn_q.bias", vec![q]),
            ("attn_k.bias", vec![kv]),
            ("attn_v.bias", vec![kv]),
        ]);
    }
    if config.output_bias || config.architecture == Architecture::GptOss {
        tensors.push(("attn_output.bias", vec![hidden]));
    }
    if config.attention_sinks {
        tensors.push(("attn_sinks.weight", vec![heads]));
    }
    if config.qk_norm || config.architecture.has_qk_norm() {
        let [q, k] = config.qk_norm_widths().map(|width| width as u64);
        tensors.extend([
            ("attn_q_norm.weight", vec![q]),
            ("attn_k_norm.weight", vec![k]),
        ]);
    }
    tensors
}

/// Tensors of latent attention. The matrix that makes keys and values of the latent row is whole, or in two
/// stacks over heads, of which that for keys is transposed.
fn latent_attention(
    config: &ModelConfig,
    latent: LatentAttention,
    checkpoint: &dyn Checkpoint,
) -> Vec<(&'static str, Vec<u64>)> {
    let [hidden, heads, key, value, rotated, rank] = [
        config.hidden,
        config.heads,
        config.head_dim,
        config.value_dim,
        config.rope.dim,
        latent.rank,
    ]
    .map(|n| n as u64);
    let plain = key - rotated;
    let mut tensors = match latent.query_rank.map(|rank| rank as u64) {
        None => vec![("attn_q.weight", vec![hidden, heads * key])],
        Some(rank) => vec![
            ("attn_q_a.weight", vec![hidden, rank]),
            ("attn_q_a_norm.weight", vec![rank]),
            ("attn_q_b.weight", vec![rank, heads * key]),
        ],
    };
    tensors.extend([
        ("attn_kv_a_mqa.weight", vec![hidden, rank + rotated]),
        ("attn_kv_a_norm.weight", vec![rank]),
        ("attn_output.weight", vec![heads * value, hidden]),
    ]);
    match checkpoint.tensors().get("blk.0.attn_k_b.weight") {
        None => tensors.push(("attn_kv_b.weight", vec![rank, heads * (plain + value)])),
        Some(_) => tensors.extend([
            ("attn_k_b.weight", vec![plain, rank, heads]),
            ("attn_v_b.weight", vec![rank, value, heads]),
        ]),
    }
    tensors
}

/// The tensors of a layer's mixture without its experts' matrices.
fn around_experts(hidden: u64, mixture: &Mixture) -> Vec<(&'static str, Vec<u64>)> {
    let (experts, ffn) = (mixture.experts as u64, mixture.ffn as u64);
    let mut tensors = vec![(ROUTER, vec![hidden, experts])];
    if mixture.biases {
        tensors.extend([
            ("ffn_gate_inp.bias", vec![experts]),
            ("ffn_gate_exps.bias", vec![ffn, experts]),
            ("ffn_up_exps.bias", vec![ffn, experts]),
            ("ffn_down_exps.bias", vec![hidden, experts]),
        ]);
    }
    if let Some(shared) = mixture.shared {
        let ffn = shared.ffn as u64;
        tensors.extend([
            ("ffn_gate_shexp.weight", vec![hidden, ffn]),
            ("ffn_up_shexp.weight", vec![hidden, ffn]),
            ("ffn_down_shexp.weight", vec![ffn, hidden]),
        ]);
        if shared.gated {
            tensors.push(("ffn_gate_inp_shexp.weight", vec![hidden]));
        }
    }
    tensors
}

const ROUTER: &str = "ffn_gate_inp.weight";

/// The experts' matrices: in one stack, or each in a tensor of its own.
fn check_experts(
    config: &ModelConfig,
    mixture: &Mixture,
    checkpoint: &dyn Checkpoint,
    layer: u32,
) -> Result<(), ConfigError> {
    let (hidden, ffn) = (config.hidden as u64, mixture.ffn as u64);
    for (suffix, inputs, outputs) in [
        ("ffn_gate", hidden, ffn),
        ("ffn_up", hidden, ffn),
        ("ffn_down", ffn, hidden),
    ] {
        let matrix = format!("blk.{layer}.{suffix}");
        let single = |expert| expert_name(&matrix, expert);
        if checkpoint.tensors().get(&single(0)).is_none() {
            let dims = [inputs, outputs, mixture.experts as u64];
            check_one(checkpoint, &stack_name(&matrix), &dims)?;
            continue;
        }
        for expert in 0..mixture.experts {
            check_one(checkpoint, &single(expert), &[inputs, outputs])?;
        }
    }
    Ok(())
}

fn check_one(checkpoint: &dyn Checkpoint, name: &str, dims: &[u64]) -> Result<(), ConfigError> {
    let tensor = checkpoint.require_tensor(name)?;
    if tensor.dims != dims {
        return Err(ConfigError::Shape {
            tensor: checkpoint.stored_name(name),
            found: tensor.dims.into(),
            wanted: dims.into(),
        });
    }
    Ok(())
}

fn is_known(
    name: &str,
    config: &ModelConfig,
    expected: &ExpectedTensors,
    checkpoint: &dyn Checkpoint,
) -> bool {
    // Frequencies that follow from the metadata; some converters wrote them out.
    if name == "rope_freqs.weight" || name.ends_with(".attn_rot_embd.weight") {
        return true;
    }
    let Some((number, suffix)) = name
        .strip_prefix("blk.")
        .and_then(|rest| rest.split_once('.'))
    else {
        return expected.globals.iter().any(|(known, _)| *known == name);
    };
    let Some(layer) = number.parse().ok().filter(|layer| *layer < config.layers) else {
        return false;
    };
    let among = |tensors: &[(&str, _)]| tensors.iter().any(|(known, _)| *known == suffix);
    match config.mixture_of(layer) {
        _ if among(&expected.per_layer) => true,
        None => among(&expected.dense),
        Some(mixture) => among(&expected.mixture) || is_expert(number, suffix, mixture, checkpoint),
    }
}

/// True for the matrices that [`check_experts`] has found: those of the experts, or their stack.
fn is_expert(number: &str, suffix: &str, mixture: &Mixture, checkpoint: &dyn Checkpoint) -> bool {
    let Some(rest) = suffix.strip_suffix(".weight") else {
        return false;
    };
    let known = |matrix: &str| matches!(matrix, "ffn_gate" | "ffn_up" | "ffn_down");
    // Where there is a tensor of the first expert, tensors of single experts are read, and otherwise the stack.
    let single = |matrix: &str| {
        let first = expert_name(&format!("blk.{number}.{matrix}"), 0);
        checkpoint.tensors().get(&first).is_some()
    };
    if let Some((matrix, expert)) = rest.split_once('.') {
        // One way of writing a number only: the others are ignored.
        let is_read = |n: usize| n < mixture.experts && n.to_string() == expert;
        return known(matrix) && single(matrix) && expert.parse().is_ok_and(is_read);
    }
    let stack = rest.strip_suffix("_exps");
    stack.is_some_and(|matrix| known(matrix) && !single(matrix))
}
