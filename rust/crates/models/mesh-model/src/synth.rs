//! Model files with random weights, of any shape: for benchmarks of sizes that cannot be fetched, and for
//! tests.
//!
//! The files are whole: llama.cpp loads them too.

mod config_json;
mod folder;
mod gpt_oss;
mod llama2c;
mod output;
mod random;
mod shape;
mod split;

use std::io::{self, BufWriter, Write};
use std::path::Path;

use mesh_base::files;

use crate::config::Architecture;
use crate::gguf::writer::{OwnedValue, Writer};
use crate::gguf::{GgmlType, Gguf, Value};

pub use folder::{tokenizer_json, write_folder};
pub use llama2c::write_llama2c;
use random::Random;
use shape::ROUTER;
pub use shape::{Experts, Latent, Shape, Window};
pub use split::{Split, split_bytes, write_split};

/// Granite's factors on embedding, residual stream, scores and logits.
const GRANITE: [(&str, f32); 4] = [
    ("embedding_scale", 12.0),
    ("residual_scale", 0.25),
    ("attention.scale", 1.0 / 64.0),
    ("logit_scale", 6.0),
];

/// Source of the tokenizer for a synthetic model.
#[derive(Debug, Clone, Copy)]
pub enum Tokens<'a> {
    /// One token per byte and ChatML's control tokens; needs a vocabulary of at least 260.
    Bytes,
    /// Another file's tokenizer and chat template, cut or padded to the shape's vocabulary.
    CopyOf(&'a Gguf),
}

/// Writes a model of `shape` with random weights to `path`. Matrices, the embedding among them, have type
/// `ty`; norms are 1 (those behind a half layer about 1) and biases small, both F32. The same arguments give
/// the same file.
///
/// # Errors
/// If the file cannot be written.
///
/// # Panics
/// If a width of the shape is not a multiple of `ty`'s block length.
pub fn random_model(
    shape: &Shape,
    ty: GgmlType,
    tokens: Tokens<'_>,
    path: &Path,
) -> io::Result<()> {
    files::replace_with(path, None, files::PUBLIC, |file| {
        let mut out = BufWriter::with_capacity(1 << 20, file);
        let mut random = Random::new(17);
        plan(shape, ty, tokens).write(&mut out, |name, ty, dims, out| {
            write_tensor(&mut random, name, ty, dims, out)
        })?;
        out.flush()
    })
}

/// As [`random_model`], in memory.
///
/// # Panics
/// As [`random_model`].
pub fn random_model_bytes(shape: &Shape, ty: GgmlType, tokens: Tokens<'_>) -> Vec<u8> {
    let mut random = Random::new(17);
    let mut out = io::Cursor::new(Vec::new());
    plan(shape, ty, tokens)
        .write(&mut out, |name, ty, dims, out| {
            write_tensor(&mut random, name, ty, dims, out)
        })
        .expect("writing to memory does not fail");
    out.into_inner()
}

/// A writer with all keys and tensors of `shape`.
pub fn plan(shape: &Shape, ty: GgmlType, tokens: Tokens<'_>) -> Writer {
    let mut writer = Writer::new();
    put_shape(&mut writer, shape);
    match tokens {
        Tokens::Bytes => put_byte_tokens(&mut writer, shape.vocab as usize),
        Tokens::CopyOf(source) => put_copied_tokens(&mut writer, source, shape.vocab as usize),
    }
    for (name, dims) in shape.tensors() {
        let is_float = dims.len() == 1 || name.ends_with(ROUTER) || name.ends_with(".bias");
        let ty = if is_float { GgmlType::F32 } else { ty };
        writer.tensor(&name, ty, &dims);
    }
    writer
}

fn put_shape(writer: &mut Writer, shape: &Shape) {
    let architecture = shape.architecture.name();
    writer.key(
        "general.architecture",
        OwnedValue::String(architecture.into()),
    );
    writer.key(
        "general.name",
        OwnedValue::String(format!("random {architecture}")),
    );
    let counts = [
        ("block_count", shape.layers),
        ("context_length", shape.context),
        ("embedding_length", shape.hidden),
        ("feed_forward_length", shape.ffn),
        ("attention.head_count", shape.heads),
    ];
    let vocab = [("vocab_size", shape.vocab)];
    for (key, count) in counts.into_iter().chain(head_counts(shape)).chain(vocab) {
        writer.key(&format!("{architecture}.{key}"), OwnedValue::U32(count));
    }
    if let Some(window) = shape.window {
        for (key, count) in [
            ("attention.sliding_window", window.size),
            ("attention.sliding_window_pattern", window.period),
        ] {
            writer.key(&format!("{architecture}.{key}"), OwnedValue::U32(count));
        }
    }
    if let Some(mixture) = shape.mixture {
        let counts = [
            ("expert_count", mixture.count),
            ("expert_used_count", mixture.used),
            ("expert_feed_forward_length", mixture.ffn),
            ("leading_dense_block_count", mixture.leading_dense),
            match shape.architecture {
                Architecture::Deepseek2 => ("expert_shared_count", mixture.shared / mixture.ffn),
                _ => ("expert_shared_feed_forward_length", mixture.shared),
            },
        ];
        for (key, count) in counts.into_iter().filter(|(_, count)| *count > 0) {
            writer.key(&format!("{architecture}.{key}"), OwnedValue::U32(count));
        }
    }
    if shape.architecture == Architecture::GraniteMoe {
        for (key, factor) in GRANITE {
            writer.key(&format!("{architecture}.{key}"), OwnedValue::F32(factor));
        }
    }
    writer.key(
        &format!("{architecture}.rope.freq_base"),
        OwnedValue::F32(shape.rope_base),
    );
    writer.key(
        &format!("{architecture}.attention.layer_norm_rms_epsilon"),
        OwnedValue::F32(1e-6),
    );
}

/// Keys of attention's heads.
fn head_counts(shape: &Shape) -> Vec<(&'static str, u32)> {
    let Some(latent) = shape.latent else {
        return vec![
            ("attention.head_count_kv", shape.kv_heads),
            ("attention.key_length", shape.head_dim),
            ("attention.value_length", shape.head_dim),
            ("rope.dimension_count", shape.head_dim),
        ];
    };
    let mut counts = vec![
        ("attention.kv_lora_rank", latent.rank),
        ("rope.dimension_count", latent.rotated),
    ];
    counts.extend(
        latent
            .query_rank
            .map(|rank| ("attention.q_lora_rank", rank)),
    );
    match latent.split {
        false => counts.extend([
            ("attention.head_count_kv", shape.kv_heads),
            ("attention.key_length", shape.head_dim),
            ("attention.value_length", latent.value),
        ]),
        // Widths of what the absorbed form caches, and of heads.
        true => counts.extend([
            ("attention.head_count_kv", 1),
            ("attention.key_length", latent.rank + latent.rotated),
            ("attention.value_length", latent.rank),
            ("attention.key_length_mla", shape.head_dim),
            ("attention.value_length_mla", latent.value),
        ]),
    }
    counts
}

const NORMAL: i32 = 1;
const CONTROL: i32 = 3;
const UNUSED: i32 = 5;

fn put_byte_tokens(writer: &mut Writer, vocab: usize) {
    let mut tokens: Vec<String> = (0..=255)
        .map(crate::tokenizer::byte_char)
        .map(String::from)
        .collect();
    let mut types = vec![NORMAL; tokens.len()];
    let end = tokens.len() as u32 + 2;
    for control in ["<|endoftext|>", "<|im_start|>", "<|im_end|>"] {
        tokens.push(control.into());
        types.push(CONTROL);
    }
    // A tokenizer without a single merge is refused by other readers.
    tokens.push("he".into());
    types.push(NORMAL);
    assert!(
        vocab >= tokens.len(),
        "a vocabulary of {vocab} has no room for {} tokens",
        tokens.len()
    );
    pad_tokens(&mut tokens, &mut types, vocab);
    writer.key("tokenizer.ggml.model", OwnedValue::String("gpt2".into()));
    writer.key("tokenizer.ggml.pre", OwnedValue::String("gpt-2".into()));
    writer.key("tokenizer.ggml.tokens", OwnedValue::Strings(tokens));
    writer.key("tokenizer.ggml.token_type", OwnedValue::I32s(types));
    writer.key(
        "tokenizer.ggml.merges",
        OwnedValue::Strings(vec!["h e".into()]),
    );
    writer.key("tokenizer.ggml.eos_token_id", OwnedValue::U32(end));
}

fn put_copied_tokens(writer: &mut Writer, source: &Gguf, vocab: usize) {
    for (key, value) in source.metadata_iter() {
        let Some(name) = key.strip_prefix("tokenizer.") else {
            continue;
        };
        match (name, value) {
            ("ggml.tokens" | "ggml.token_type" | "ggml.scores", _) => {}
            // An id that was cut off.
            (name, value)
                if name.ends_with("_token_id")
                    && value.as_unsigned().is_some_and(|id| id >= vocab as u64) => {}
            (_, value) => {
                writer.copy_key(key, value);
            }
        }
    }
    let array = |name: &str| match source.metadata(&format!("tokenizer.ggml.{name}")) {
        Some(Value::Array(array)) => Some(array),
        _ => None,
    };
    let mut tokens: Vec<String> = array("tokens")
        .and_then(|array| array.strings())
        .into_iter()
        .flatten()
        .take(vocab)
        .map(|text| String::from_utf8_lossy(text).into_owned())
        .collect();
    let mut types: Vec<i32> = array("token_type")
        .and_then(|array| array.integers())
        .into_iter()
        .flatten()
        .take(vocab)
        .map(|ty| ty as i32)
        .collect();
    types.resize(tokens.len(), NORMAL);
    let scores: Option<Vec<f32>> = array("scores")
        .and_then(|array| array.floats())
        .map(|scores| scores.take(vocab).collect());
    pad_tokens(&mut tokens, &mut types, vocab);
    if let Some(mut scores) = scores {
        scores.resize(vocab, f32::MIN);
        writer.key("tokenizer.ggml.scores", OwnedValue::F32s(scores));
    }
    writer.key("tokenizer.ggml.tokens", OwnedValue::Strings(tokens));
    writer.key("tokenizer.ggml.token_type", OwnedValue::I32s(types));
}

fn pad_tokens(tokens: &mut Vec<String>, types: &mut Vec<i32>, vocab: usize) {
    for id in tokens.len()..vocab {
        tokens.push(format!("[PAD{id}]"));
        types.push(UNUSED);
    }
}

fn write_tensor(
    random: &mut Random,
    name: &str,
    ty: GgmlType,
    dims: &[u64],
    out: &mut dyn Write,
) -> io::Result<()> {
    let elements: u64 = dims.iter().product();
    if name.contains(".post_") {
        let mut norms = vec![0; 4 * elements as usize];
        random.fill_blocks(GgmlType::F32, 0.2, &mut norms);
        let (norms, _) = norms.as_chunks();
        return norms
            .iter()
            .try_for_each(|norm| out.write_all(&(1.0 + f32::from_le_bytes(*norm)).to_le_bytes()));
    }
    if name.ends_with("norm.weight") {
        return (0..elements).try_for_each(|_| out.write_all(&1f32.to_le_bytes()));
    }
    // Keeps the width of hidden rows about the same through a layer.
    let deviation = 1.0 / (dims[0] as f32).sqrt();
    let blocks = elements / ty.block_size() as u64;
    let mut chunk = Vec::new();
    for start in (0..blocks).step_by(4096) {
        chunk.resize((blocks - start).min(4096) as usize * ty.type_size(), 0);
        random.fill_blocks(ty, deviation, &mut chunk);
        if name.ends_with(ROUTER) {
            // The same numbers in bf16 and f16, as folders store them: a rounded score may choose another expert.
            let (numbers, _) = chunk.as_chunks_mut::<4>();
            numbers.iter_mut().for_each(|number| number[..2].fill(0));
        }
        out.write_all(&chunk)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ModelConfig;
    use crate::tokenizer::{EncodeOptions, Tokenizer};

    #[test]
    fn a_made_model_of_every_family_and_type_can_be_read() {
        for architecture in Architecture::ALL {
            let shape = Shape::tiny(architecture);
            for ty in GgmlType::ALL {
                let gguf = Gguf::from_bytes(random_model_bytes(&shape, ty, Tokens::Bytes)).unwrap();
                let config = ModelConfig::read(&gguf).unwrap();
                assert_eq!(config.architecture, architecture);
                let gpt_oss = architecture == Architecture::GptOss;
                let biased = [Architecture::Qwen2, Architecture::Qwen2Moe];
                assert_eq!(config.qkv_bias, gpt_oss || biased.contains(&architecture));
                assert_eq!([config.output_bias, config.attention_sinks], [gpt_oss; 2]);
                let without = [
                    Architecture::Llama,
                    Architecture::Qwen2,
                    Architecture::GraniteMoe,
                    Architecture::Qwen2Moe,
                    Architecture::Deepseek2,
                    Architecture::GptOss,
                ];
                assert_eq!(config.qk_norm, !without.contains(&architecture));
                assert_eq!(config.mixture.is_some(), architecture.is_mixture());
                assert_eq!(config.post_norms, architecture == Architecture::Gemma3);
                let window = shape.window.map(|window| window.size);
                assert_eq!([0, 1].map(|layer| config.window_of(layer)), [window, None]);
                assert_eq!(config.tied_embeddings, shape.tied_embeddings);
            }
        }
    }

    #[test]
    fn weights_have_the_deviation_asked_for_whatever_their_type() {
        let shape = Shape::tiny(Architecture::Llama);
        for ty in GgmlType::ALL {
            let gguf = Gguf::from_bytes(random_model_bytes(&shape, ty, Tokens::Bytes)).unwrap();
            let values = gguf
                .tensors()
                .get("blk.0.ffn_up.weight")
                .unwrap()
                .to_f32()
                .unwrap();
            let n = values.len() as f32;
            let mean = values.iter().sum::<f32>() / n;
            let deviation = (values.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / n).sqrt();
            assert!(mean.abs() < 0.01, "{ty}: mean {mean}");
            assert!(
                (0.04..0.10).contains(&deviation),
                "{ty}: deviation {deviation}, not 1/16"
            );
        }
    }

    #[test]
    fn the_byte_tokenizer_takes_any_text() {
        let shape = Shape::tiny(Architecture::Llama);
        let gguf =
            Gguf::from_bytes(random_model_bytes(&shape, GgmlType::Q4_0, Tokens::Bytes)).unwrap();
        let tokenizer = Tokenizer::from_keys(&gguf).unwrap();
        assert_eq!(tokenizer.vocab_size(), 300);
        let text = "hello 🦀\n<|im_end|>";
        let ids = tokenizer
            .encode(text, EncodeOptions::RENDERED_CHAT)
            .unwrap();
        assert_eq!(ids[0], 259, "h and e are merged");
        assert_eq!(ids.last(), tokenizer.token_id("<|im_end|>").as_ref());
        assert_eq!(tokenizer.eos_ids(), [258, 256]);
        assert_eq!(tokenizer.decode(&ids), "hello 🦀\n");
    }

    #[test]
    fn a_copied_tokenizer_is_cut_or_padded_to_the_vocabulary() {
        let mut shape = Shape::tiny(Architecture::Llama);
        let source =
            Gguf::from_bytes(random_model_bytes(&shape, GgmlType::F16, Tokens::Bytes)).unwrap();
        for (vocab, ends) in [(257, vec![256]), (400, vec![258, 256])] {
            shape.vocab = vocab;
            let made = Gguf::from_bytes(random_model_bytes(
                &shape,
                GgmlType::F16,
                Tokens::CopyOf(&source),
            ))
            .unwrap();
            ModelConfig::read(&made).unwrap();
            let tokenizer = Tokenizer::from_keys(&made).unwrap();
            assert_eq!(tokenizer.vocab_size(), vocab as usize);
            assert_eq!(tokenizer.eos_ids(), ends);
        }
    }

    #[test]
    fn the_same_arguments_give_the_same_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("random.gguf");
        let shape = Shape::tiny(Architecture::Qwen3);
        random_model(&shape, GgmlType::Q4_1, Tokens::Bytes, &path).unwrap();
        let bytes = random_model_bytes(&shape, GgmlType::Q4_1, Tokens::Bytes);
        assert!(std::fs::read(&path).unwrap() == bytes);
        assert!(!path.with_extension("part").exists());
    }
}
