//! `config.json` under GGUF's keys.
//!
//! Sources: the configuration classes of `transformers` (keys and defaults) and llama.cpp's converter (which
//! key says the same in GGUF).

mod class;
mod heads;
mod mixture;
mod object;
mod rope;

use serde_json::{Map, Value};

use super::HfError;
use super::keys::GgufKeys;
use super::naming::TensorNaming;
use crate::config::{MAX_CONTEXT, MAX_LAYERS, MAX_VOCAB, MAX_WIDTH};
use class::Class;
use object::{FILE, Object};

/// The contents of `config.json`.
pub(super) struct Configuration {
    pub(super) keys: GgufKeys,
    pub(super) network: TensorNaming,
    /// Divisors of the frequencies, where the rotary embedding is stretched in llama 3's way. GGUF files have
    /// them as the tensor `rope_freqs.weight`.
    pub(super) freq_factors: Option<Vec<f32>>,
}

/// Reads `config.json` of the model called `name`.
pub(super) fn read(json: &[u8], name: &str) -> Result<Configuration, HfError> {
    let root: Map<String, Value> = serde_json::from_slice(json).map_err(|error| HfError::Json {
        file: FILE.into(),
        message: error.to_string(),
    })?;
    let root = Object { map: &root };
    let (class, sees) = Class::of(&root)?;
    let text = match root.map.get("text_config") {
        Some(Value::Object(text)) if sees => Object { map: text },
        _ => root.clone(),
    };
    refuse_foreign(&text, class)?;
    let gemma = class == Class::Gemma3;
    let tied = |object: &Object<'_>| object.boolean("tie_word_embeddings");
    let network = TensorNaming {
        tied: tied(&text)?.or(tied(&root)?).unwrap_or(gemma),
        post_attention_norms: gemma || class == Class::GptOss,
        sees,
        experts: class.expert_naming(),
    };
    // The default is that of the class in `transformers`.
    let count =
        |key: &str, limit: u64, default: Option<u64>| match text.count(key, limit)?.or(default) {
            Some(count) => Ok(count),
            None => text.required(key, limit),
        };

    let mut keys = GgufKeys::new(class.name());
    keys.general("general.name", name);
    let layers = count("num_hidden_layers", MAX_LAYERS, None)?;
    keys.count("block_count", layers);
    let hidden = count("hidden_size", MAX_WIDTH, None)?;
    keys.count("embedding_length", hidden);
    keys.count(
        "feed_forward_length",
        count("intermediate_size", MAX_WIDTH, None)?,
    );
    mixture::mixture(&text, class, layers, &mut keys)?;
    let rotated = heads::heads(&text, class, hidden, &mut keys)?;
    let (vocab, context) = match class {
        Class::Gemma3 => (Some(262_208), Some(131_072)),
        Class::GptOss => (Some(201_088), Some(131_072)),
        _ => (None, None),
    };
    keys.count("vocab_size", count("vocab_size", MAX_VOCAB, vocab)?);
    let context = count("max_position_embeddings", MAX_CONTEXT, context)?;
    let eps = text.positive("rms_norm_eps")?.unwrap_or(match class {
        Class::Mixtral | Class::Olmoe | Class::GptOss => 1e-5,
        _ => 1e-6,
    });
    keys.float("attention.layer_norm_rms_epsilon", eps);
    if gemma {
        let scalar = text.positive("query_pre_attn_scalar")?.unwrap_or(256.0);
        keys.float("attention.scale", 1.0 / scalar.sqrt());
    }
    for key in ["attn_logit_softcapping", "final_logit_softcapping"] {
        if let Some(most) = text.positive(key)? {
            keys.float(key, most);
        }
    }
    window(&text, class, layers, &mut keys)?;
    let (context, freq_factors) = rope::rope(&text, class, rotated, context, &mut keys)?;
    keys.count("context_length", context);
    Ok(Configuration {
        keys,
        network,
        freq_factors,
    })
}

/// Rejects settings that this class's network does not implement.
fn refuse_foreign(text: &Object<'_>, class: Class) -> Result<(), HfError> {
    if let Some(quantised) = text.object("quantization_config")? {
        let method = quantised
            .string("quant_method")?
            .unwrap_or("an unknown method");
        if (class, method) != (Class::GptOss, "mxfp4") {
            return Err(HfError::Unsupported {
                feature: format!("weights quantised by {method} (quantization_config)"),
            });
        }
    }
    let (key, known): (_, &[&str]) = match class {
        Class::Gemma3 => ("hidden_activation", &["gelu_pytorch_tanh"]),
        _ => ("hidden_act", &["silu", "swish"]),
    };
    match text.string(key)? {
        Some(activation) if !known.contains(&activation) => Err(HfError::Unsupported {
            feature: format!("the activation {activation:?} ({key})"),
        }),
        _ => Ok(()),
    }
}

/// Writes the keys of the sliding window and its layers.
fn window(
    text: &Object<'_>,
    class: Class,
    layers: u64,
    keys: &mut GgufKeys,
) -> Result<(), HfError> {
    let size = match (class, text.map.get("sliding_window")) {
        // What the classes assume.
        (Class::Mistral | Class::Gemma3, None) => Some(4096),
        (Class::GptOss, None) => Some(128),
        // What the class writes where the switch is off.
        (Class::Qwen2Moe, Some(size)) if *size == 0 => None,
        _ => text.count("sliding_window", MAX_CONTEXT)?,
    };
    let flags: Vec<bool> = match class {
        Class::Llama | Class::Olmoe | Class::GraniteMoe | Class::DeepseekV2 => return Ok(()),
        _ if text.map.contains_key("layer_types") => text.layer_types(layers)?,
        Class::Mistral | Class::Mixtral => vec![true; layers as usize],
        Class::GptOss => (0..layers).map(|layer| layer % 2 == 0).collect(),
        // A switch for all layers.
        Class::Qwen3Moe => {
            let has = text.boolean("use_sliding_window")?.unwrap_or(false);
            vec![has; layers as usize]
        }
        Class::Qwen2 | Class::Qwen3 | Class::Qwen2Moe => {
            if !text.boolean("use_sliding_window")?.unwrap_or(false) {
                return Ok(());
            }
            let key = "max_window_layers";
            let full = match text.map.get(key).and_then(Value::as_u64) {
                Some(full) => full,
                None => text.required(key, MAX_LAYERS)?,
            };
            (0..layers).map(|layer| layer >= full).collect()
        }
        Class::Gemma3 => {
            let key = match text.map.contains_key("sliding_window_pattern") {
                true => "sliding_window_pattern",
                false => "_sliding_window_pattern",
            };
            let period = text.count(key, MAX_LAYERS)?.unwrap_or(6);
            (1..=layers)
                .map(|number| !number.is_multiple_of(period))
                .collect()
        }
    };
    if let Some(size) = size.filter(|_| flags.contains(&true)) {
        keys.count("attention.sliding_window", size);
        keys.flags("attention.sliding_window_pattern", &flags);
    }
    Ok(())
}
