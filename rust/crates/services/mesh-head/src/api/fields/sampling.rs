//! The parameters that say how tokens are chosen, by all names that servers give them.

use mesh_proto::{GenerateParams, LogitBias};
use serde_json::Value;

use super::reader::{Fields, whole_number};
use super::structured::grammar;
use crate::api::invalid::Invalid;

/// The sampling parameters that all front ends share; `max_tokens`, `logprobs` and `echo` are the caller's.
///
/// # Errors
/// [`Invalid`] names the field that is wrong.
pub(crate) fn sampling(fields: Fields<'_>) -> Result<GenerateParams, Invalid> {
    Ok(GenerateParams {
        temperature: fields.number("temperature", 0.0..=2.0)?,
        top_p: fields.number("top_p", 0.0..=1.0)?,
        top_k: top_k(fields)?,
        min_p: fields.number("min_p", 0.0..=1.0)?,
        repetition_penalty: first([
            fields.number("repetition_penalty", 0.01..=10.0)?,
            // llama.cpp's and Ollama's name.
            fields.number("repeat_penalty", 0.01..=10.0)?,
        ]),
        presence_penalty: fields.number("presence_penalty", -2.0..=2.0)?,
        frequency_penalty: fields.number("frequency_penalty", -2.0..=2.0)?,
        // Mistral's and SGLang's names.
        seed: first([
            seed(fields, "seed")?,
            seed(fields, "random_seed")?,
            seed(fields, "sampling_seed")?,
        ]),
        stop: stop(fields)?,
        logit_bias: logit_bias(fields)?,
        ignore_eos: fields.flag("ignore_eos")?,
        stop_token_ids: stop_token_ids(fields)?,
        min_tokens: fields.whole("min_tokens", 0..=u32::MAX)?.unwrap_or(0),
        grammar: grammar(fields)?,
        ..Default::default()
    })
}

fn first<T, const N: usize>(of: [Option<T>; N]) -> Option<T> {
    of.into_iter().flatten().next()
}

/// vLLM's -1 and everybody's 0 keep all tokens.
fn top_k(fields: Fields<'_>) -> Result<Option<u32>, Invalid> {
    match fields.get("top_k") {
        Some(value) if whole_number(value) == Some(-1) => Ok(Some(0)),
        _ => fields.whole("top_k", 0..=u32::MAX),
    }
}

fn stop_token_ids(fields: Fields<'_>) -> Result<Vec<u32>, Invalid> {
    let ids = fields.tokens("stop_token_ids")?;
    if ids.len() > STOP_TOKENS {
        let (count, most) = (ids.len(), STOP_TOKENS);
        return Err(Invalid::too_many("stop_token_ids", count, "ids", most));
    }
    Ok(ids)
}

pub(crate) fn seed(fields: Fields<'_>, name: &str) -> Result<Option<u64>, Invalid> {
    // Negative seeds exist in the wild; two's complement keeps them apart.
    let seed = |value: &Value| {
        let signed = || whole_number(value).map(i64::cast_unsigned);
        value.as_u64().or_else(signed)
    };
    fields.typed(name, "an integer", seed)
}

fn stop(fields: Fields<'_>) -> Result<Vec<String>, Invalid> {
    let mut texts = match fields.get("stop") {
        None => return Ok(Vec::new()),
        Some(Value::String(text)) => vec![text.clone()],
        Some(Value::Array(list)) => list
            .iter()
            // Whatever is behind those, there are too many.
            .take(64 * STOP_TEXTS)
            .enumerate()
            .map(|(index, value)| match value {
                Value::String(text) => Ok(text.clone()),
                other => {
                    let path = format!("stop[{index}]");
                    Err(Invalid::wrong_type(&path, "a string", other))
                }
            })
            .collect::<Result<_, _>>()?,
        Some(other) => {
            let expected = "a string or an array of strings";
            return Err(Invalid::wrong_type("stop", expected, other));
        }
    };
    // An empty text would end every answer at once, so it counts as absent.
    texts.retain(|text| !text.is_empty());
    if texts.len() > STOP_TEXTS {
        return Err(Invalid::too_many("stop", texts.len(), "texts", STOP_TEXTS));
    }
    if let Some(long) = texts.iter().find(|text| text.len() > STOP_BYTES) {
        let text = format!(
            "'stop' holds a text of {} bytes, at most {STOP_BYTES} are allowed",
            long.len()
        );
        return Err(Invalid::new("stop", text));
    }
    Ok(texts)
}

fn logit_bias(fields: Fields<'_>) -> Result<Vec<LogitBias>, Invalid> {
    let wrong = |key: &str| {
        let text = format!(
            "'logit_bias' maps token ids to numbers from -100 to 100; the entry {key:?} does not"
        );
        Invalid::new("logit_bias", text)
    };
    let entry = |key: &str, bias: Option<f64>| {
        let token = key.trim().parse().ok();
        let bias = bias.filter(|bias| (-100.0..=100.0).contains(bias));
        let (token, bias) = token.zip(bias).ok_or_else(|| wrong(key))?;
        let bias = bias as f32;
        Ok(LogitBias { token, bias })
    };
    // llama.cpp also takes pairs, and `false` for a ban.
    let pair = |pair: &Value| match pair.as_array().map(Vec::as_slice) {
        Some([token, Value::Bool(false)]) => entry(&token.to_string(), Some(-100.0)),
        Some([token, bias]) => entry(&token.to_string(), bias.as_f64()),
        _ => Err(wrong(&pair.to_string())),
    };
    let entries = match fields.get("logit_bias") {
        Some(Value::Object(biases)) => biases.len(),
        Some(Value::Array(pairs)) => pairs.len(),
        _ => 0,
    };
    if entries > MOST_BIASES {
        let most = MOST_BIASES;
        return Err(Invalid::too_many("logit_bias", entries, "entries", most));
    }
    match fields.get("logit_bias") {
        None => Ok(Vec::new()),
        Some(Value::Object(biases)) => {
            let biases = biases.iter();
            biases
                .map(|(key, bias)| entry(key, bias.as_f64()))
                .collect()
        }
        Some(Value::Array(pairs)) => pairs.iter().map(pair).collect(),
        Some(other) => Err(Invalid::wrong_type("logit_bias", "an object", other)),
    }
}

/// More than anybody names; every one is looked at for every token.
const MOST_BIASES: usize = 4096;
/// The OpenAI API allows 4; more do no harm.
const STOP_TEXTS: usize = 16;
/// As many as workers take.
const STOP_TOKENS: usize = 64;
/// Longer ones are refused by workers.
const STOP_BYTES: usize = 1024;

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(value: Value) -> Result<GenerateParams, Invalid> {
        sampling(Fields::new(value.as_object().unwrap()))
    }

    #[test]
    fn parameters_are_read_and_null_is_absent() {
        let params = read(json!({
            "temperature": 0.5, "top_k": 40.0, "seed": -1, "stop": "end", "logit_bias": {"50": -100}, "top_p": null,
        }))
        .unwrap();
        assert_eq!(params.temperature, Some(0.5));
        assert_eq!(params.top_k, Some(40));
        assert_eq!(params.top_p, None);
        assert_eq!(params.seed, Some(u64::MAX));
        assert_eq!(params.stop, ["end"]);
        assert_eq!(
            params.logit_bias,
            [LogitBias {
                token: 50,
                bias: -100.0
            }]
        );
    }

    #[test]
    fn every_wrong_parameter_is_named() {
        let cases = [
            (json!({"temperature": 2.5}), "temperature"),
            (json!({"temperature": "hot"}), "temperature"),
            (json!({"top_p": -0.1}), "top_p"),
            (json!({"top_k": 1.5}), "top_k"),
            (json!({"top_k": -2}), "top_k"),
            (json!({"repeat_penalty": 0}), "repeat_penalty"),
            (json!({"min_tokens": -1}), "min_tokens"),
            (json!({"stop_token_ids": 5}), "stop_token_ids"),
            (json!({"stop_token_ids": [-1]}), "stop_token_ids"),
            (json!({"stop_token_ids": vec![1; 65]}), "stop_token_ids"),
            (json!({"min_p": 2}), "min_p"),
            (json!({"presence_penalty": 3}), "presence_penalty"),
            (json!({"frequency_penalty": -3}), "frequency_penalty"),
            (json!({"seed": "x"}), "seed"),
            (json!({"seed": 1.5}), "seed"),
            (json!({"stop": 5}), "stop"),
            (json!({"stop": ["a", 5]}), "stop[1]"),
            (json!({"stop": "x".repeat(1025)}), "stop"),
            (json!({"stop": vec!["a"; 17]}), "stop"),
            (json!({"logit_bias": {"x": 1}}), "logit_bias"),
            (json!({"logit_bias": {"1": 101}}), "logit_bias"),
            (json!({"logit_bias": [["a", 1]]}), "logit_bias"),
            (json!({"logit_bias": 5}), "logit_bias"),
            (json!({"ignore_eos": 1}), "ignore_eos"),
        ];
        for (body, param) in cases {
            let invalid = read(body.clone()).expect_err(&body.to_string());
            assert_eq!(invalid.param, param, "{body}");
            assert!(
                invalid.message.contains(param.split('[').next().unwrap()),
                "{}",
                invalid.message
            );
        }
    }

    #[test]
    fn what_servers_call_the_same_is_the_same() {
        let params = read(json!({
            "top_k": -1, "repeat_penalty": 1.5, "random_seed": 7, "stop": ["", "x"], "logit_bias": [[5, 1.5], [6, false]],
            "stop_token_ids": [2, 3.0], "min_tokens": 4.0, "temperature": 1,
        }))
        .unwrap();
        assert_eq!(
            (params.top_k, params.repetition_penalty),
            (Some(0), Some(1.5))
        );
        assert_eq!((params.seed, params.stop), (Some(7), vec!["x".to_owned()]));
        let bias = |token, bias| LogitBias { token, bias };
        assert_eq!(params.logit_bias, [bias(5, 1.5), bias(6, -100.0)]);
        assert_eq!((params.stop_token_ids, params.min_tokens), (vec![2, 3], 4));
        let neutral = json!({"stop": "", "logit_bias": {}, "stop_token_ids": [], "min_tokens": 0, "top_k": 0});
        let params = read(neutral).unwrap();
        assert!(params.stop.is_empty() && params.revision() == 0);
    }
}
