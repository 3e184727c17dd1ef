//! Conversion of a GGUF model to Hugging Face's form, the reverse of a converter's work.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{self, BufWriter};
use std::path::Path;

use serde_json::{Value, json};

use crate::checkpoint::Checkpoint;
use crate::config::{Architecture, ModelConfig, RopeStyle};
use crate::gguf::{Gguf, Tensor, Tensors, expert_name};
use crate::hf::{self, ExpertNaming};
use crate::model::Model;
use crate::safetensors::{self, Dtype, Planned};

use super::config_json::config_json;
use super::gpt_oss::{self, Fused};
use super::output::{put, unknown};

/// Writes `model`, which lies in a GGUF file, to the folder `dir`: `config.json`, `tokenizer.json` and what
/// belongs to it, and the weights in `shards` files. Matrices have type `dtype` (F32, F16 or BF16), vectors
/// are F32; gpt-oss's experts in MXFP4 stay so.
///
/// # Errors
/// If a file cannot be written, or the model has what this function does not know: frequency factors, or a
/// pre-tokenizer other than those of GPT-2, SmolLM, Llama 3 and Qwen.
pub fn write_folder(model: &Model, dtype: Dtype, shards: usize, dir: &Path) -> io::Result<()> {
    std::fs::create_dir_all(dir)?;
    let gguf = Gguf::open(model.path()).map_err(io::Error::other)?;
    let config = model.config();
    let write = |name: &str, value: Value| write_json(&dir.join(name), value);
    write("config.json", config_json(config)?)?;
    write("tokenizer.json", tokenizer_json(&gguf)?)?;
    let tokenizer = model.tokenizer();
    let text = |id: Option<u32>| {
        id.map(|id| String::from_utf8_lossy(tokenizer.token_bytes(id)).into_owned())
    };
    let template = model.template();
    write(
        "tokenizer_config.json",
        json!({
            "bos_token": text(tokenizer.bos()),
            "eos_token": text(tokenizer.eos()),
            "add_bos_token": tokenizer.adds_bos(),
            "chat_template": (!template.is_fallback()).then(|| template.source()),
        }),
    )?;
    write(
        "generation_config.json",
        json!({"eos_token_id": tokenizer.eos_ids()}),
    )?;
    write_weights(gguf.tensors(), config, dtype, shards.max(1), dir)
}

/// Writes a file of JSON with sorted keys, so that its fingerprint does not depend on their order in memory.
pub(super) fn write_json(path: &Path, mut value: Value) -> io::Result<()> {
    value.sort_all_objects();
    std::fs::write(path, serde_json::to_vec_pretty(&value)?)
}

/// The token tables as the file has them.
pub(super) struct Tables {
    pub(super) tokens: Vec<String>,
    pub(super) types: Vec<i64>,
}

pub(super) const UNKNOWN: i64 = 2;
pub(super) const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;

/// The tokenizer of a GGUF file as the text of a `tokenizer.json`.
///
/// # Errors
/// If its model or pre-tokenizer is not one of the common ones.
pub fn tokenizer_json(gguf: &Gguf) -> io::Result<Value> {
    let array = |name: &str| gguf.array(&format!("tokenizer.ggml.{name}")).ok().flatten();
    let texts = |name: &str| -> Vec<String> {
        let strings = array(name).and_then(|array| array.strings());
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        strings.into_iter().flatten().map(text).collect()
    };
    let tokens = texts("tokens");
    let mut types: Vec<i64> = array("token_type")
        .and_then(|array| array.integers())
        .into_iter()
        .flatten()
        .collect();
    types.resize(tokens.len(), 1);
    let tables = Tables { tokens, types };
    match gguf.string("tokenizer.ggml.model").ok().flatten() {
        Some("gpt2") => {
            let merges = texts("merges");
            let pre = gguf.string("tokenizer.ggml.pre").ok().flatten();
            byte_tokenizer(&tables, merges, pre.unwrap_or("gpt-2"))
        }
        Some("llama") => {
            let scores = array("scores").and_then(|array| array.floats());
            let scores: Vec<f32> = scores.into_iter().flatten().collect();
            Ok(sentencepiece_tokenizer(&tables, &scores))
        }
        other => Err(unknown(format!("the tokenizer model {other:?}"))),
    }
}

impl Tables {
    fn numbered(&self) -> impl Iterator<Item = (usize, &str, i64)> {
        let texts = self.tokens.iter().zip(&self.types);
        texts.enumerate().map(|(id, (text, ty))| (id, &**text, *ty))
    }

    fn added(&self) -> Value {
        self.numbered()
            .filter(|(_, _, ty)| matches!(*ty, CONTROL | USER_DEFINED | UNKNOWN))
            .map(|(id, text, ty)| {
                json!({
                    "id": id, "content": text, "special": ty != USER_DEFINED, "single_word": false,
                    "lstrip": false, "rstrip": false, "normalized": false,
                })
            })
            .collect()
    }
}

fn byte_tokenizer(tables: &Tables, merges: Vec<String>, pre: &str) -> io::Result<Value> {
    let bytes = |words: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": words});
    let sequence = |first: Value, words: bool| json!({"type": "Sequence", "pretokenizers": [first, bytes(words)]});
    let split = |digits: &str| {
        let pattern = MODERN.replace("DIGITS", digits);
        let split = json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
        sequence(split, false)
    };
    let pre_tokenizer = match pre {
        "gpt-2" => bytes(true),
        "smollm" => sequence(json!({"type": "Digits", "individual_digits": true}), true),
        "llama-bpe" => split(r"\p{N}{1,3}"),
        "qwen2" => split(r"\p{N}"),
        other => return Err(unknown(format!("the pre-tokenizer {other:?}"))),
    };
    let vocab: BTreeMap<&str, usize> = tables.numbered().map(|(id, text, _)| (text, id)).collect();
    Ok(json!({
        "version": "1.0",
        "added_tokens": tables.added(),
        "normalizer": (pre == "qwen2").then(|| json!({"type": "NFC"})),
        "pre_tokenizer": pre_tokenizer,
        "post_processor": null,
        "decoder": bytes(true),
        "model": {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": pre == "llama-bpe"},
    }))
}

/// The words of Llama 3 and Qwen, which differ in how many digits make one.
const MODERN: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// SentencePiece's merging by score as merging by rank: every pair that makes a token, those with the highest
/// score first.
pub(super) fn sentencepiece_tokenizer(tables: &Tables, scores: &[f32]) -> Value {
    let ids: HashMap<&str, usize> = tables.numbered().map(|(id, text, _)| (text, id)).collect();
    let mut merges = Vec::new();
    for (id, text, ty) in tables.numbered() {
        if ty != 1 {
            continue;
        }
        for (cut, _) in text.char_indices().skip(1) {
            let (left, right) = text.split_at(cut);
            if let (Some(l), Some(r)) = (ids.get(left), ids.get(right)) {
                merges.push((scores.get(id).copied().unwrap_or(0.0), *l, *r, left, right));
            }
        }
    }
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
    let merges: Vec<[&str; 2]> = merges.iter().map(|merge| [merge.3, merge.4]).collect();
    let unknown = tables.numbered().find(|(_, _, ty)| *ty == UNKNOWN);
    json!({
        "version": "1.0",
        "added_tokens": tables.added(),
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "\u{2581}"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"},
        ]},
        "pre_tokenizer": null,
        "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
        "model": {
            "type": "BPE", "vocab": ids, "merges": merges, "byte_fallback": true, "fuse_unk": true,
            "unk_token": unknown.map(|(_, text, _)| text),
        },
    })
}

fn write_weights(
    tensors: &Tensors,
    config: &ModelConfig,
    dtype: Dtype,
    shards: usize,
    dir: &Path,
) -> io::Result<()> {
    let naming = naming(config);
    let mut planned: Vec<(Planned, Contents<'_>)> = Vec::new();
    for tensor in tensors.iter() {
        let biases = tensor.name.strip_suffix("_exps.bias");
        if let Some(matrix) = biases.filter(|matrix| !matrix.ends_with("ffn_down")) {
            let biases = gpt_oss::plan_biases(tensors, matrix)?;
            planned.extend(biases.map(|(plan, fused)| (plan, Contents::Turns(fused))));
            continue;
        }
        if let Some(matrix) = tensor.name.strip_suffix("_exps.weight") {
            plan_experts(tensors, config, naming, matrix, dtype, &mut planned)?;
            continue;
        }
        let layer = tensor.name.strip_suffix(".ffn_gate_shexp.weight");
        let is_up = tensor.name.ends_with(".ffn_up_shexp.weight");
        if naming == ExpertNaming::Granite && is_up {
            // In one tensor with gate.
            continue;
        }
        let up = layer.filter(|_| naming == ExpertNaming::Granite);
        let up = up.and_then(|layer| tensors.get(&format!("{layer}.ffn_up_shexp.weight")));
        let name = hf::their_name(tensor.name, naming)
            .filter(|_| tensor.name != "rope_freqs.weight")
            .ok_or_else(|| unknown(format!("tensor {}", tensor.name)))?;
        let name = match (
            config.architecture,
            tensor.name.ends_with(".ffn_norm.weight"),
        ) {
            (Architecture::Gemma3, true) => name.replace("post_attention", "pre_feedforward"),
            _ => name,
        };
        let plan = Planned {
            name,
            dtype: match tensor.dims.len() == 1 || tensor.name.ends_with(".bias") {
                true => Dtype::F32,
                false => dtype,
            },
            shape: match (tensor.dims, &up) {
                (&[width], _) if tensor.name.ends_with("ffn_gate_inp_shexp.weight") => {
                    vec![1, width]
                }
                (&[inputs, outputs], Some(_)) => vec![2 * outputs, inputs],
                (dims, _) => dims.iter().rev().copied().collect(),
            },
        };
        let parts = [tensor].into_iter().chain(up).collect();
        planned.push((plan, Contents::Parts(parts)));
    }
    let mut weight_map = BTreeMap::new();
    let per_shard = planned.len().div_ceil(shards);
    let files = planned.len().div_ceil(per_shard);
    for (i, shard) in planned.chunks(per_shard).enumerate() {
        let name = match files {
            1 => "model.safetensors".to_owned(),
            _ => format!("model-{:05}-of-{files:05}.safetensors", i + 1),
        };
        for (plan, _) in shard {
            weight_map.insert(plan.name.clone(), name.clone());
        }
        let plans: Vec<Planned> = shard.iter().map(|(plan, _)| plan.clone()).collect();
        let mut out = BufWriter::with_capacity(1 << 20, File::create(dir.join(name))?);
        safetensors::write(&mut out, &plans, |plan, out| {
            let tensor = shard.iter().find(|(other, _)| other.name == plan.name);
            match &tensor.expect("one of those planned").1 {
                Contents::Parts(parts) => {
                    (parts.iter()).try_for_each(|part| put(&values(config, part)?, plan.dtype, out))
                }
                Contents::Turns(fused) => fused.write(plan.dtype, out),
            }
        })?;
    }
    if files > 1 {
        let index = json!({"metadata": {}, "weight_map": weight_map});
        write_json(&dir.join("model.safetensors.index.json"), index)?;
    }
    Ok(())
}

/// Contents of a tensor of the folder.
enum Contents<'a> {
    /// These tensors, one after the other.
    Parts(Vec<Tensor<'a>>),
    /// The elements of several in turns.
    Turns(Fused<'a>),
}

fn naming(config: &ModelConfig) -> ExpertNaming {
    match config.architecture {
        Architecture::Llama => ExpertNaming::Mixtral,
        Architecture::GraniteMoe => ExpertNaming::Granite,
        Architecture::Deepseek2 => ExpertNaming::Deepseek,
        Architecture::GptOss => ExpertNaming::GptOss,
        _ => ExpertNaming::Qwen,
    }
}

/// Plans the tensors of the experts' `matrix`. Each consists of the given parts, one after the other.
fn plan_experts<'a>(
    tensors: &'a Tensors,
    config: &ModelConfig,
    naming: ExpertNaming,
    matrix: &str,
    dtype: Dtype,
    planned: &mut Vec<(Planned, Contents<'a>)>,
) -> io::Result<()> {
    let count = config.mixture.as_ref().map_or(0, |mixture| mixture.experts);
    if naming == ExpertNaming::GptOss {
        let fused = gpt_oss::plan(tensors, count, matrix, dtype)?.into_iter();
        planned.extend(fused.map(|(plan, fused)| (plan, Contents::Turns(fused))));
        return Ok(());
    }
    let part = |matrix: &str, expert| {
        let part = tensors.expert(matrix, expert);
        part.ok_or_else(|| unknown(format!("expert {expert} of {matrix}")))
    };
    let their_name = |expert| {
        let name = hf::their_name(&expert_name(matrix, expert), naming);
        name.ok_or_else(|| unknown(format!("experts {matrix}")))
    };
    if naming != ExpertNaming::Granite {
        for expert in 0..count {
            let part = part(matrix, expert)?;
            let shape = part.dims.iter().rev().copied().collect();
            let name = their_name(expert)?;
            planned.push((Planned { name, dtype, shape }, Contents::Parts(vec![part])));
        }
        return Ok(());
    }
    // All experts in one tensor, gate before up.
    let matrices = match matrix.strip_suffix("ffn_gate") {
        Some(layer) => vec![matrix.to_owned(), format!("{layer}ffn_up")],
        None if matrix.ends_with("ffn_up") => return Ok(()),
        None => vec![matrix.to_owned()],
    };
    let mut parts = Vec::new();
    for expert in 0..count {
        for matrix in &matrices {
            parts.push(part(matrix, expert)?);
        }
    }
    let [inputs, outputs] = [0, 1].map(|at| parts.first().map_or(0, |part| part.dims[at]));
    let shape = vec![count as u64, matrices.len() as u64 * outputs, inputs];
    let name = their_name(0)?;
    planned.push((Planned { name, dtype, shape }, Contents::Parts(parts)));
    Ok(())
}

/// The elements in the order and form of the folder.
fn values(config: &ModelConfig, tensor: &Tensor<'_>) -> io::Result<Vec<f32>> {
    let mut values = tensor.to_f32().map_err(io::Error::other)?;
    let norm = tensor.name.ends_with("norm.weight");
    if config.architecture == Architecture::Gemma3 && norm {
        values.iter_mut().for_each(|value| *value -= 1.0);
    }
    let turns = tensor.name.ends_with("attn_q.weight")
        || tensor.name.ends_with("attn_k.weight")
        || tensor.name.ends_with("attn_q.bias")
        || tensor.name.ends_with("attn_k.bias");
    // DeepSeek's folders have pairs as its files have them.
    if !turns || config.rope.style != RopeStyle::Interleaved || config.latent.is_some() {
        return Ok(values);
    }
    // Rows 2i and 2i + 1 of a head turn together in the file; in the folder they are half a head apart.
    let row = match tensor.dims.len() {
        1 => 1,
        _ => tensor.dims[0] as usize,
    };
    let half = config.head_dim / 2;
    let heads = values.chunks_exact(config.head_dim * row);
    let turned = |head: &[f32]| -> Vec<f32> {
        (0..config.head_dim)
            .flat_map(|to| {
                let from = 2 * (to % half) + to / half;
                head[from * row..][..row].to_vec()
            })
            .collect()
    };
    Ok(heads.flat_map(turned).collect())
}
