//! The rotary embedding in `config.json`.

use std::f64::consts::TAU;

use serde_json::{Map, Value, json};

use super::class::Class;
use super::object::{Object, bad, missing};
use crate::config::MAX_CONTEXT;
use crate::hf::HfError;
use crate::hf::keys::GgufKeys;

fn gpt_oss_default() -> Map<String, Value> {
    let yarn = [
        ("rope_type", json!("yarn")),
        ("factor", json!(32.0)),
        ("original_max_position_embeddings", json!(4096)),
        ("truncate", json!(false)),
    ];
    yarn.into_iter()
        .map(|(key, value)| (key.to_owned(), value))
        .collect()
}

/// The rotary embedding. Gives the context length, which YaRN stretches, and llama 3's divisors of the
/// frequencies.
pub(super) fn rope(
    text: &Object<'_>,
    class: Class,
    head_dim: u64,
    context: u64,
    keys: &mut GgufKeys,
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
    // What the class assumes.
    let absent = match class {
        Class::GptOss => gpt_oss_default(),
        _ => Map::new(),
    };
    let scaling = full.unwrap_or(Object { map: &absent });
    let default = match class {
        Class::Gemma3 | Class::Mixtral => 1e6,
        Class::GptOss => 150_000.0,
        _ => 1e4,
    };
    let base = match text.positive("rope_theta")? {
        Some(base) => Some(base),
        None => scaling.positive("rope_theta")?,
    };
    let base = base.unwrap_or(default);
    keys.float("rope.freq_base", base);
    if class == Class::Gemma3 {
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
            keys.text("rope.scaling.type", "linear");
            keys.float("rope.scaling.factor", factor()?);
            Ok((context, None))
        }
        Some("yarn") => {
            let (factor, original) = (factor()?, original.unwrap_or(context));
            keys.text("rope.scaling.type", "yarn");
            let truncate = scaling.boolean("truncate")?.unwrap_or(true);
            keys.flag("rope.scaling.yarn_truncate", truncate);
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
            // A weight of 0 counts as absent.
            let weight =
                |key: &str| Ok::<_, HfError>(scaling.nonnegative(key)?.filter(|x| *x > 0.0));
            let all = weight("mscale_all_dim")?;
            let attention = match scaling.positive("attention_factor")? {
                Some(attention) => attention,
                None => match (weight("mscale")?, all) {
                    (Some(one), Some(all)) => of(one) / of(all),
                    _ => of(1.0),
                },
            };
            let formula = match all.filter(|_| class == Class::DeepseekV2) {
                // What the scores take besides. The formula is then 1 by itself.
                Some(all) => {
                    keys.float("rope.scaling.yarn_log_multiplier", 0.1 * all);
                    1.0
                }
                None => of(1.0),
            };
            keys.float("rope.scaling.attn_factor", attention / formula);
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
