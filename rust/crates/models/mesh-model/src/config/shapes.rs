//! Checks of the network's tensors against the shapes that the metadata gives.

use super::architecture::Architecture;
use super::error::ConfigError;
use super::network::ModelConfig;
use crate::checkpoint::Checkpoint;

/// Checks that all tensors that the engines need exist with the right dimensions, and that no other would be
/// ignored.
pub(super) fn check(config: &ModelConfig, checkpoint: &dyn Checkpoint) -> Result<(), ConfigError> {
    let expected = expected(config);
    for (name, dims) in &expected.globals {
        check_one(checkpoint, name, dims)?;
    }
    for layer in 0..config.layers {
        for (suffix, dims) in &expected.per_layer {
            check_one(checkpoint, &format!("blk.{layer}.{suffix}"), dims)?;
        }
    }
    for tensor in checkpoint.tensors().iter() {
        if !is_known(tensor.name, config, &expected) {
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
    per_layer: Vec<(&'static str, Vec<u64>)>,
}

/// Dimensions in GGUF order: inputs first.
fn expected(config: &ModelConfig) -> ExpectedTensors {
    let [hidden, ffn, vocab, head_dim] =
        [config.hidden, config.ffn, config.vocab, config.head_dim].map(|n| n as u64);
    let (q, kv) = (
        config.heads as u64 * head_dim,
        config.kv_heads as u64 * head_dim,
    );
    let mut globals = vec![
        ("token_embd.weight", vec![hidden, vocab]),
        ("output_norm.weight", vec![hidden]),
    ];
    if !config.tied_embeddings {
        globals.push(("output.weight", vec![hidden, vocab]));
    }
    let mut per_layer = vec![
        ("attn_norm.weight", vec![hidden]),
        ("attn_q.weight", vec![hidden, q]),
        ("attn_k.weight", vec![hidden, kv]),
        ("attn_v.weight", vec![hidden, kv]),
        ("attn_output.weight", vec![q, hidden]),
        ("ffn_norm.weight", vec![hidden]),
        ("ffn_gate.weight", vec![hidden, ffn]),
        ("ffn_up.weight", vec![hidden, ffn]),
        ("ffn_down.weight", vec![ffn, hidden]),
    ];
    if config.qkv_bias || config.architecture == Architecture::Qwen2 {
        per_layer.extend([
            ("attn_q.bias", vec![q]),
            ("attn_k.bias", vec![kv]),
            ("attn_v.bias", vec![kv]),
        ]);
    }
    if config.qk_norm
        || matches!(
            config.architecture,
            Architecture::Qwen3 | Architecture::Gemma3
        )
    {
        per_layer.extend([
            ("attn_q_norm.weight", vec![head_dim]),
            ("attn_k_norm.weight", vec![head_dim]),
        ]);
    }
    if config.post_norms {
        per_layer.extend([
            ("post_attention_norm.weight", vec![hidden]),
            ("post_ffw_norm.weight", vec![hidden]),
        ]);
    }
    ExpectedTensors { globals, per_layer }
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

fn is_known(name: &str, config: &ModelConfig, expected: &ExpectedTensors) -> bool {
    // Frequencies that follow from the metadata; some converters wrote them out.
    if name == "rope_freqs.weight" || name.ends_with(".attn_rot_embd.weight") {
        return true;
    }
    match name
        .strip_prefix("blk.")
        .and_then(|rest| rest.split_once('.'))
    {
        Some((layer, suffix)) => {
            layer.parse().is_ok_and(|layer: u32| layer < config.layers)
                && expected.per_layer.iter().any(|(known, _)| *known == suffix)
        }
        None => expected.globals.iter().any(|(known, _)| *known == name),
    }
}
