//! `config.json` as GGUF keys.
//!
//! Sources: the configuration classes of `transformers` (keys and defaults) and llama.cpp's converter (which key says the same in
//! GGUF).

use std::f64::consts::TAU;

use serde_json::{Map, Value};

use super::HfError;
use crate::config::{MAX_CONTEXT, MAX_LAYERS, MAX_VOCAB, MAX_WIDTH};
use crate::gguf::GgmlType;
use crate::gguf::writer::{OwnedValue, Writer};

const FILE: &str = "config.json";

/// What the names of tensors depend on.
#[derive(Debug, Clone, Copy)]
pub(super) struct Network {
    /// Whether the embedding is the output matrix, whatever the files hold besides.
    pub(super) tied: bool,
    /// Whether a layer has norms behind its halves, too.
    pub(super) post_norms: bool,
    /// Whether the model has a half that sees images, which is left out.
    pub(super) sees: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Family {
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
    Gemma3,
}

impl Family {
    /// The family, and whether it is one that also sees.
    fn of(root: &Object<'_>) -> Result<(Self, bool), HfError> {
        let class = match root.map.get("architectures") {
            Some(Value::Array(classes)) => classes.first().and_then(Value::as_str),
            _ => None,
        };
        let found = match class {
            Some(class) => class,
            None => root.string("model_type")?.unwrap_or("none"),
        };
        Ok(match found {
            "LlamaForCausalLM" | "llama" => (Family::Llama, false),
            "MistralForCausalLM" | "mistral" => (Family::Mistral, false),
            "Qwen2ForCausalLM" | "qwen2" => (Family::Qwen2, false),
            "Qwen3ForCausalLM" | "qwen3" => (Family::Qwen3, false),
            "Gemma3ForCausalLM" | "gemma3_text" => (Family::Gemma3, false),
            "Gemma3ForConditionalGeneration" | "gemma3" => (Family::Gemma3, true),
            other => {
                return Err(HfError::Architecture {
                    found: other.into(),
                });
            }
        })
    }

    /// GGUF's name. Mistral is a llama there.
    fn name(self) -> &'static str {
        match self {
            Family::Llama | Family::Mistral => "llama",
            Family::Qwen2 => "qwen2",
            Family::Qwen3 => "qwen3",
            Family::Gemma3 => "gemma3",
        }
    }
}

/// The keys of `config.json` as a GGUF file in memory. Its only tensor is `rope_freqs.weight`, where the rotary embedding is
/// stretched in llama 3's way.
pub(super) fn head(json: &[u8], name: &str) -> Result<(Vec<u8>, Network), HfError> {
    let root: Map<String, Value> = serde_json::from_slice(json).map_err(|error| HfError::Json {
        file: FILE.into(),
        message: error.to_string(),
    })?;
    let root = Object { map: &root };
    let (family, sees) = Family::of(&root)?;
    let text = match root.map.get("text_config") {
        Some(Value::Object(text)) if sees => Object { map: text },
        _ => Object { map: root.map },
    };
    text.refuse_foreign(family)?;
    let gemma = family == Family::Gemma3;
    let tied = |object: &Object<'_>| object.boolean("tie_word_embeddings");
    let network = Network {
        tied: tied(&text)?.or(tied(&root)?).unwrap_or(gemma),
        post_norms: gemma,
        sees,
    };

    let mut keys = Keys {
        writer: Writer::new(),
        prefix: family.name(),
    };
    let owned = |text: &str| OwnedValue::String(text.to_owned());
    keys.writer
        .key("general.architecture", owned(family.name()));
    keys.writer.key("general.name", owned(name));
    let layers = text.required("num_hidden_layers", MAX_LAYERS)?;
    keys.count("block_count", layers);
    keys.count("embedding_length", text.required("hidden_size", MAX_WIDTH)?);
    keys.count(
        "feed_forward_length",
        text.required("intermediate_size", MAX_WIDTH)?,
    );
    // What the class assumes where the file is silent.
    let (heads, kv_heads, head_dim, context) = match family {
        Family::Gemma3 => (Some(8), Some(4), Some(256), Some(131_072)),
        Family::Qwen3 => (None, None, Some(128), None),
        _ => (None, None, None, None),
    };
    let heads = match text.count("num_attention_heads", MAX_WIDTH)?.or(heads) {
        Some(heads) => heads,
        None => text.required("num_attention_heads", MAX_WIDTH)?,
    };
    keys.count("attention.head_count", heads);
    let kv_heads = text
        .count("num_key_value_heads", MAX_WIDTH)?
        .or(kv_heads)
        .unwrap_or(heads);
    if !heads.is_multiple_of(kv_heads) {
        let reason = format!("it must divide the {heads} query heads");
        return Err(bad("num_key_value_heads", kv_heads, reason));
    }
    keys.count("attention.head_count_kv", kv_heads);
    let hidden = text.required("hidden_size", MAX_WIDTH)?;
    let head_dim = match text.count("head_dim", MAX_WIDTH)?.or(head_dim) {
        Some(head_dim) => head_dim,
        None if hidden.is_multiple_of(heads) => hidden / heads,
        None => {
            let reason =
                format!("it must divide the hidden size {hidden}, or head_dim must be given");
            return Err(bad("num_attention_heads", heads, reason));
        }
    };
    keys.count("attention.key_length", head_dim);
    keys.count("attention.value_length", head_dim);
    keys.count(
        "vocab_size",
        match text.count("vocab_size", MAX_VOCAB)? {
            Some(vocab) => vocab,
            None if gemma => 262_208,
            None => text.required("vocab_size", MAX_VOCAB)?,
        },
    );
    let context = match text
        .count("max_position_embeddings", MAX_CONTEXT)?
        .or(context)
    {
        Some(context) => context,
        None => text.required("max_position_embeddings", MAX_CONTEXT)?,
    };
    keys.float(
        "attention.layer_norm_rms_epsilon",
        text.positive("rms_norm_eps")?.unwrap_or(1e-6),
    );
    if gemma {
        let scalar = text.positive("query_pre_attn_scalar")?.unwrap_or(256.0);
        keys.float("attention.scale", 1.0 / scalar.sqrt());
    }
    for (theirs, ours) in [
        ("attn_logit_softcapping", "attn_logit_softcapping"),
        ("final_logit_softcapping", "final_logit_softcapping"),
    ] {
        if let Some(most) = text.positive(theirs)? {
            keys.float(ours, most);
        }
    }
    window(&text, family, layers, &mut keys)?;
    let (context, factors) = rope(&text, family, head_dim, context, &mut keys)?;
    keys.count("context_length", context);
    finish(keys.writer, factors).map(|head| (head, network))
}

fn finish(mut writer: Writer, factors: Option<Vec<f32>>) -> Result<Vec<u8>, HfError> {
    if let Some(factors) = &factors {
        writer.tensor("rope_freqs.weight", GgmlType::F32, &[factors.len() as u64]);
    }
    let data = || {
        factors
            .iter()
            .flatten()
            .flat_map(|x| x.to_le_bytes())
            .collect()
    };
    writer
        .to_bytes(|_, _, _| data())
        .map_err(|error| HfError::Json {
            file: FILE.into(),
            message: error.to_string(),
        })
}

/// Which layers see a window only.
fn window(text: &Object<'_>, family: Family, layers: u64, keys: &mut Keys) -> Result<(), HfError> {
    let size = match (family, text.map.get("sliding_window")) {
        // What the classes assume.
        (Family::Mistral | Family::Gemma3, None) => Some(4096),
        _ => text.count("sliding_window", MAX_CONTEXT)?,
    };
    let flags: Vec<bool> = match family {
        Family::Llama => return Ok(()),
        _ if text.map.contains_key("layer_types") => text.layer_types(layers)?,
        Family::Mistral => vec![true; layers as usize],
        Family::Qwen2 | Family::Qwen3 => {
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
        Family::Gemma3 => {
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
        let flags = flags.into_iter().map(i32::from).collect();
        keys.put("attention.sliding_window_pattern", OwnedValue::I32s(flags));
    }
    Ok(())
}

/// The rotary embedding. Gives the context length, which YaRN stretches, and llama 3's divisors of the frequencies.
fn rope(
    text: &Object<'_>,
    family: Family,
    head_dim: u64,
    context: u64,
    keys: &mut Keys,
) -> Result<(u64, Option<Vec<f32>>), HfError> {
    // `rope_parameters` is what newer releases write, by kind of layer where kinds differ.
    let parameters = text.object("rope_parameters")?;
    let full = match &parameters {
        Some(parameters) => parameters
            .object("full_attention")?
            .or_else(|| Some(parameters.clone())),
        None => text.object("rope_scaling")?,
    };
    let sliding = match &parameters {
        Some(parameters) => parameters.object("sliding_attention")?,
        None => None,
    };
    let empty = Map::new();
    let scaling = full.unwrap_or(Object { map: &empty });
    let default = if family == Family::Gemma3 { 1e6 } else { 1e4 };
    let base = match text.positive("rope_theta")? {
        Some(base) => Some(base),
        None => scaling.positive("rope_theta")?,
    };
    let base = base.unwrap_or(default);
    keys.float("rope.freq_base", base);
    if family == Family::Gemma3 {
        let local = match &sliding {
            Some(sliding) => sliding.positive("rope_theta")?,
            None => text.positive("rope_local_base_freq")?,
        };
        keys.float("rope.freq_base_swa", local.unwrap_or(1e4));
    }
    let part = text.positive("partial_rotary_factor")?.unwrap_or(1.0);
    if part > 1.0 {
        return Err(bad(
            "partial_rotary_factor",
            part,
            "it must be at most 1".into(),
        ));
    }
    let dim = (head_dim as f64 * part) as u64;
    keys.count("rope.dimension_count", dim);

    let kind = match scaling.string("rope_type")? {
        Some(kind) => Some(kind),
        None => scaling.string("type")?,
    };
    let factor = || -> Result<f64, HfError> {
        match scaling.positive("factor")? {
            Some(factor) if factor >= 1.0 => Ok(factor),
            Some(factor) => Err(bad(
                "rope_scaling.factor",
                factor,
                "it must be at least 1".into(),
            )),
            None => Err(missing("rope_scaling.factor")),
        }
    };
    let original = scaling.count("original_max_position_embeddings", MAX_CONTEXT)?;
    match kind {
        // Dynamic scaling begins beyond the context.
        None | Some("default" | "dynamic") => Ok((context, None)),
        Some("linear") => {
            keys.put("rope.scaling.type", OwnedValue::String("linear".into()));
            keys.float("rope.scaling.factor", factor()?);
            Ok((context, None))
        }
        Some("yarn") => {
            let (factor, original) = (factor()?, original.unwrap_or(context));
            if scaling.boolean("truncate")? == Some(false) {
                return Err(HfError::Unsupported {
                    feature: "YaRN without truncation (rope_scaling.truncate)".into(),
                });
            }
            keys.put("rope.scaling.type", OwnedValue::String("yarn".into()));
            keys.float("rope.scaling.factor", factor);
            keys.count("rope.scaling.original_context_length", original);
            for (theirs, ours) in [
                ("beta_fast", "yarn_beta_fast"),
                ("beta_slow", "yarn_beta_slow"),
            ] {
                if let Some(beta) = scaling.positive(theirs)? {
                    keys.float(&format!("rope.scaling.{ours}"), beta);
                }
            }
            // GGUF's is a factor on what follows from the formula.
            let of = |scale: f64| 1.0 + 0.1 * scale * factor.ln();
            let attention = match scaling.positive("attention_factor")? {
                Some(attention) => attention,
                None => match (
                    scaling.positive("mscale")?,
                    scaling.positive("mscale_all_dim")?,
                ) {
                    (Some(one), Some(all)) => of(one) / of(all),
                    _ => of(1.0),
                },
            };
            keys.float("rope.scaling.attn_factor", attention / of(1.0));
            let stretched = (original as f64 * factor).min(MAX_CONTEXT as f64) as u64;
            Ok((context.max(stretched), None))
        }
        Some("llama3") => {
            let need = |key: &str| scaling.positive(key)?.ok_or_else(|| missing(key));
            let (low, high) = (need("low_freq_factor")?, need("high_freq_factor")?);
            if high <= low {
                let reason = format!("it must be over low_freq_factor, {low}");
                return Err(bad("rope_scaling.high_freq_factor", high, reason));
            }
            let factor = factor()?;
            let original = original.ok_or_else(|| missing("original_max_position_embeddings"))?;
            let divisor = |pair: u64| {
                let frequency = base.powf(-2.0 * pair as f64 / dim as f64);
                let turns = original as f64 * frequency / TAU;
                let keep = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                (1.0 / ((1.0 - keep) / factor + keep)) as f32
            };
            Ok((context, Some((0..dim / 2).map(divisor).collect())))
        }
        Some(other) => Err(HfError::Unsupported {
            feature: format!("rope scaling {other:?}"),
        }),
    }
}

/// The keys of one architecture.
struct Keys {
    writer: Writer,
    prefix: &'static str,
}

impl Keys {
    fn put(&mut self, key: &str, value: OwnedValue) {
        self.writer.key(&format!("{}.{key}", self.prefix), value);
    }

    /// All counts have limits far below 2^32.
    fn count(&mut self, key: &str, count: u64) {
        self.put(
            key,
            OwnedValue::U32(u32::try_from(count).unwrap_or(u32::MAX)),
        );
    }

    fn float(&mut self, key: &str, value: f64) {
        self.put(key, OwnedValue::F32(value as f32));
    }
}

/// An object of `config.json`. A key whose value is null counts as absent.
#[derive(Clone)]
struct Object<'a> {
    map: &'a Map<String, Value>,
}

impl<'a> Object<'a> {
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    fn wrong(&self, key: &str, wanted: &str) -> HfError {
        let value = self.get(key).map(Value::to_string).unwrap_or_default();
        let short: String = value.chars().take(60).collect();
        bad(key, short, format!("{wanted} is needed"))
    }

    fn string(&self, key: &str) -> Result<Option<&'a str>, HfError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        value
            .as_str()
            .map(Some)
            .ok_or_else(|| self.wrong(key, "text"))
    }

    fn boolean(&self, key: &str) -> Result<Option<bool>, HfError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        value
            .as_bool()
            .map(Some)
            .ok_or_else(|| self.wrong(key, "true or false"))
    }

    fn object(&self, key: &str) -> Result<Option<Object<'a>>, HfError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Object { map })),
            Some(_) => Err(self.wrong(key, "an object")),
        }
    }

    /// A whole number from 1 to `limit`. Some files have 4096.0.
    fn count(&self, key: &str, limit: u64) -> Result<Option<u64>, HfError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        let whole = value.as_f64().filter(|x| x.fract() == 0.0 && *x >= 0.0);
        let count = value.as_u64().or(whole.map(|x| x as u64));
        match count.filter(|count| (1..=limit).contains(count)) {
            Some(count) => Ok(Some(count)),
            None => Err(self.wrong(key, &format!("a whole number from 1 to {limit}"))),
        }
    }

    fn required(&self, key: &str, limit: u64) -> Result<u64, HfError> {
        self.count(key, limit)?.ok_or_else(|| missing(key))
    }

    /// A finite number over 0, also as a 32-bit float.
    fn positive(&self, key: &str) -> Result<Option<f64>, HfError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        let number = value
            .as_f64()
            .filter(|x| (*x as f32).is_finite() && *x as f32 > 0.0);
        number
            .map(Some)
            .ok_or_else(|| self.wrong(key, "a number over 0"))
    }

    /// For each layer, whether it has the window.
    fn layer_types(&self, layers: u64) -> Result<Vec<bool>, HfError> {
        const KEY: &str = "layer_types";
        let types: Option<Vec<bool>> = self.get(KEY).and_then(Value::as_array).and_then(|types| {
            let flag = |ty: &Value| match ty.as_str()? {
                "sliding_attention" => Some(true),
                "full_attention" => Some(false),
                _ => None,
            };
            types.iter().map(flag).collect()
        });
        types
            .filter(|types| types.len() as u64 == layers)
            .ok_or_else(|| {
                let wanted = format!(
                    "\"full_attention\" or \"sliding_attention\" for each of the {layers} layers"
                );
                self.wrong(KEY, &wanted)
            })
    }

    /// What would make another network of it.
    fn refuse_foreign(&self, family: Family) -> Result<(), HfError> {
        if let Some(quantised) = self.object("quantization_config")? {
            let method = quantised
                .string("quant_method")?
                .unwrap_or("an unknown method");
            return Err(HfError::Unsupported {
                feature: format!("weights quantised by {method} (quantization_config)"),
            });
        }
        let (key, known): (_, &[&str]) = match family {
            Family::Gemma3 => ("hidden_activation", &["gelu_pytorch_tanh"]),
            _ => ("hidden_act", &["silu", "swish"]),
        };
        match self.string(key)? {
            Some(activation) if !known.contains(&activation) => Err(HfError::Unsupported {
                feature: format!("the activation {activation:?} ({key})"),
            }),
            _ => Ok(()),
        }
    }
}

fn bad(key: &str, value: impl ToString, reason: String) -> HfError {
    HfError::Value {
        file: FILE,
        key: key.into(),
        value: value.to_string(),
        reason,
    }
}

fn missing(key: &str) -> HfError {
    bad(
        key,
        "missing",
        "the network cannot be told without it".into(),
    )
}
