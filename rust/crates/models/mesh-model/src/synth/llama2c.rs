//! A llama2.c checkpoint as a folder in Hugging Face's form.
//!
//! Format: <https://github.com/karpathy/llama2.c/blob/master/run.c> (`Config`, `memory_map_weights`,
//! `build_tokenizer`): seven numbers, the weights in f32 with all layers of a kind together, the tokenizer's
//! pieces with their scores.

use std::fs::File;
use std::io::{self, BufWriter};
use std::path::Path;

use serde_json::json;

use super::folder::{CONTROL, Tables, UNKNOWN, sentencepiece_tokenizer, write_json};
use crate::safetensors::{self, Dtype, Planned};

/// Writes the checkpoint in `data`, with the tokenizer behind it, to the folder `dir`, weights in f32.
///
/// # Errors
/// If `data` is not such a checkpoint, or a file cannot be written.
pub fn write_llama2c(data: &[u8], dir: &Path) -> io::Result<()> {
    let mut reader = Reader(data);
    let numbers: Vec<i32> = (0..7).map(|_| reader.int()).collect::<io::Result<_>>()?;
    let of = |i: usize| usize::try_from(numbers[i]).map_err(|_| malformed());
    let (hidden, ffn, layers, heads, kv_heads, vocab, context) =
        (of(0)?, of(1)?, of(2)?, of(3)?, of(4)?, of(5)?, of(6)?);
    let head_dim = hidden.checked_div(heads).ok_or_else(malformed)?;
    let kv = head_dim * kv_heads;
    std::fs::create_dir_all(dir)?;

    let mut tensors: Vec<(Planned, Vec<f32>)> = Vec::new();
    let mut add = |name: String, shape: &[usize], values: Vec<f32>| {
        let plan = Planned {
            name,
            dtype: Dtype::F32,
            shape: shape.iter().map(|&dim| dim as u64).collect(),
        };
        tensors.push((plan, values));
    };
    add(
        "model.embed_tokens.weight".into(),
        &[vocab, hidden],
        reader.floats(vocab * hidden)?,
    );
    let kinds: [(&str, Vec<usize>); 9] = [
        ("input_layernorm", vec![hidden]),
        ("self_attn.q_proj", vec![hidden, hidden]),
        ("self_attn.k_proj", vec![kv, hidden]),
        ("self_attn.v_proj", vec![kv, hidden]),
        ("self_attn.o_proj", vec![hidden, hidden]),
        ("post_attention_layernorm", vec![hidden]),
        ("mlp.gate_proj", vec![ffn, hidden]),
        ("mlp.down_proj", vec![hidden, ffn]),
        ("mlp.up_proj", vec![ffn, hidden]),
    ];
    for (kind, shape) in kinds {
        for layer in 0..layers {
            let mut values = reader.floats(shape.iter().product())?;
            if kind.ends_with("q_proj") || kind.ends_with("k_proj") {
                values = halves(&values, head_dim, hidden);
            }
            add(
                format!("model.layers.{layer}.{kind}.weight"),
                &shape,
                values,
            );
        }
    }
    add(
        "model.norm.weight".into(),
        &[hidden],
        reader.floats(hidden)?,
    );
    // The rotary embedding's sines and cosines, which follow from the configuration.
    reader.floats(context * head_dim)?;

    let plans: Vec<Planned> = tensors.iter().map(|(plan, _)| plan.clone()).collect();
    let mut out = BufWriter::with_capacity(1 << 20, File::create(dir.join("model.safetensors"))?);
    safetensors::write(&mut out, &plans, |plan, out| {
        let tensor = tensors.iter().find(|(other, _)| other.name == plan.name);
        let (_, values) = tensor.expect("one of those planned");
        values
            .iter()
            .try_for_each(|value| out.write_all(&value.to_le_bytes()))
    })?;
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": ffn,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab,
        "max_position_embeddings": context, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": true, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32",
    });
    write_json(&dir.join("config.json"), config)?;
    let mut tokenizer = tokenizer(&mut reader, vocab)?;
    tokenizer.sort_all_objects();
    std::fs::write(dir.join("tokenizer.json"), serde_json::to_vec(&tokenizer)?)?;
    let special = json!({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": true});
    write_json(&dir.join("tokenizer_config.json"), special)
}

/// Rows 2i and 2i + 1 of a head turn together in the checkpoint; in the folder they are half a head apart.
fn halves(values: &[f32], head_dim: usize, row: usize) -> Vec<f32> {
    let half = head_dim / 2;
    let order = move |to: usize| 2 * (to % half) + to / half;
    values
        .chunks_exact(head_dim * row)
        .flat_map(|head| (0..head_dim).flat_map(move |to| &head[order(to) * row..][..row]))
        .copied()
        .collect()
}

fn tokenizer(reader: &mut Reader<'_>, vocab: usize) -> io::Result<serde_json::Value> {
    // The longest piece.
    reader.int()?;
    let mut tables = Tables {
        tokens: Vec::new(),
        types: Vec::new(),
    };
    let mut scores = Vec::new();
    for id in 0..vocab {
        scores.push(reader.floats(1)?[0]);
        let length = usize::try_from(reader.int()?).map_err(|_| malformed())?;
        let text = String::from_utf8_lossy(reader.take(length)?).into_owned();
        let (text, ty) = match id {
            0 => (text, UNKNOWN),
            // With line ends around them there.
            1 | 2 => (text.trim().to_owned(), CONTROL),
            _ if id < 3 + 256 => (text, BYTE),
            _ => (text.replace(' ', "\u{2581}"), NORMAL),
        };
        tables.tokens.push(text);
        tables.types.push(ty);
    }
    Ok(sentencepiece_tokenizer(&tables, &scores))
}

const NORMAL: i64 = 1;
const BYTE: i64 = 6;

fn malformed() -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        "this is no llama2.c checkpoint with its tokenizer",
    )
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, bytes: usize) -> io::Result<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(bytes).ok_or_else(malformed)?;
        self.0 = rest;
        Ok(taken)
    }

    fn int(&mut self) -> io::Result<i32> {
        let bytes = self.take(4)?;
        Ok(i32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }

    fn floats(&mut self, count: usize) -> io::Result<Vec<f32>> {
        let bytes = self.take(count.checked_mul(4).ok_or_else(malformed)?)?;
        let (words, _) = bytes.as_chunks::<4>();
        Ok(words.iter().map(|word| f32::from_le_bytes(*word)).collect())
    }
}
