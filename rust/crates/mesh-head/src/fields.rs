//! Reading the fields of a JSON request, with errors that name the field.
//!
//! DCF tasks and the OpenAI API share their parameters; both read them here.

use std::ops::RangeInclusive;

use mesh_proto::{Chat, ChatMessage, GenerateParams, LogitBias};
use serde_json::{Map, Value};

/// A request that cannot be answered as it is.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Invalid {
    /// The field, as a path: `messages[0].content`.
    pub param: String,
    /// What is wrong with it.
    pub message: String,
    /// Whether the field asks for something this mesh does not do.
    pub unsupported: bool,
}

impl Invalid {
    /// A wrong value.
    pub fn new(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            param: param.into(),
            message: message.into(),
            unsupported: false,
        }
    }

    /// A feature that does not exist here.
    pub fn unsupported(param: impl Into<String>, remedy: &str) -> Self {
        let param = param.into();
        let message = format!("'{param}' is not supported by this mesh; {remedy}");
        Self {
            param,
            message,
            unsupported: true,
        }
    }

    fn wrong_type(param: &str, expected: &str, got: &Value) -> Self {
        Self::new(
            param,
            format!(
                "Invalid type for '{param}': expected {expected}, got {}",
                kind(got)
            ),
        )
    }
}

/// The fields of a JSON object. A `null` is an absent field.
#[derive(Debug, Clone, Copy)]
pub struct Fields<'a>(&'a Map<String, Value>);

impl<'a> Fields<'a> {
    /// The fields of this object.
    pub fn new(map: &'a Map<String, Value>) -> Self {
        Self(map)
    }

    /// The raw value of a field.
    pub fn get(self, name: &str) -> Option<&'a Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }

    /// Text.
    pub fn text(self, name: &str) -> Result<Option<&'a str>, Invalid> {
        self.typed(name, "a string", Value::as_str)
    }

    /// A truth value, false when absent.
    pub fn flag(self, name: &str) -> Result<bool, Invalid> {
        Ok(self
            .typed(name, "a boolean", Value::as_bool)?
            .unwrap_or(false))
    }

    /// An object.
    pub fn object(self, name: &str) -> Result<Option<Fields<'a>>, Invalid> {
        Ok(self.typed(name, "an object", Value::as_object)?.map(Fields))
    }

    /// A number within a range.
    pub fn number(self, name: &str, range: RangeInclusive<f64>) -> Result<Option<f32>, Invalid> {
        match self.typed(name, "a number", Value::as_f64)? {
            Some(value) if range.contains(&value) => Ok(Some(value as f32)),
            Some(value) => Err(out_of_range(name, value, *range.start(), *range.end())),
            None => Ok(None),
        }
    }

    /// A whole number within a range.
    pub fn whole(self, name: &str, range: RangeInclusive<u32>) -> Result<Option<u32>, Invalid> {
        let Some(value) = self.get(name) else {
            return Ok(None);
        };
        let Some(number) = whole_number(value) else {
            return Err(Invalid::wrong_type(name, "an integer", value));
        };
        match u32::try_from(number) {
            Ok(number) if range.contains(&number) => Ok(Some(number)),
            _ => Err(out_of_range(name, number, *range.start(), *range.end())),
        }
    }

    fn typed<T>(
        self,
        name: &str,
        expected: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, Invalid> {
        match self.get(name) {
            Some(value) => read(value)
                .map(Some)
                .ok_or_else(|| Invalid::wrong_type(name, expected, value)),
            None => Ok(None),
        }
    }
}

/// The sampling parameters that all front ends share; `max_tokens`, `logprobs` and `echo` are the caller's.
pub fn sampling(fields: Fields<'_>) -> Result<GenerateParams, Invalid> {
    Ok(GenerateParams {
        temperature: fields.number("temperature", 0.0..=2.0)?,
        top_p: fields.number("top_p", 0.0..=1.0)?,
        top_k: fields.whole("top_k", 0..=u32::MAX)?,
        min_p: fields.number("min_p", 0.0..=1.0)?,
        repetition_penalty: fields.number("repetition_penalty", 0.01..=10.0)?,
        presence_penalty: fields.number("presence_penalty", -2.0..=2.0)?,
        frequency_penalty: fields.number("frequency_penalty", -2.0..=2.0)?,
        seed: seed(fields)?,
        stop: stop(fields)?,
        logit_bias: logit_bias(fields)?,
        ignore_eos: fields.flag("ignore_eos")?,
        ..Default::default()
    })
}

/// Chat messages: a non-empty list of roles and texts.
pub fn messages(value: &Value) -> Result<Chat, Invalid> {
    let Some(list) = value.as_array() else {
        return Err(Invalid::wrong_type("messages", "an array", value));
    };
    if list.is_empty() {
        return Err(Invalid::new(
            "messages",
            "'messages' is empty: give at least one message",
        ));
    }
    let messages = list
        .iter()
        .enumerate()
        .map(|(index, value)| message(&format!("messages[{index}]"), value));
    Ok(Chat {
        messages: messages.collect::<Result<_, _>>()?,
    })
}

fn message(path: &str, value: &Value) -> Result<ChatMessage, Invalid> {
    let Some(map) = value.as_object() else {
        return Err(Invalid::wrong_type(path, "an object", value));
    };
    let fields = Fields(map);
    for name in ["tool_calls", "function_call", "audio"] {
        if fields
            .get(name)
            .is_some_and(|value| value.as_array().is_none_or(|list| !list.is_empty()))
        {
            return Err(Invalid::unsupported(
                format!("{path}.{name}"),
                "send text messages only",
            ));
        }
    }
    let role_path = format!("{path}.role");
    let role = match map.get("role") {
        Some(Value::String(role)) => role.as_str(),
        Some(other) => return Err(Invalid::wrong_type(&role_path, "a string", other)),
        None => {
            return Err(Invalid::new(
                &role_path,
                format!("Missing required parameter: '{role_path}'"),
            ));
        }
    };
    let role = match role {
        "system" | "user" | "assistant" => role,
        // The newer name of the same thing.
        "developer" => "system",
        "tool" | "function" => {
            return Err(Invalid::unsupported(
                role_path,
                "roles are system, user and assistant",
            ));
        }
        other => {
            let text = format!(
                "Invalid value for '{role_path}': {other:?}; roles are system, user and assistant"
            );
            return Err(Invalid::new(role_path, text));
        }
    };
    let content_path = format!("{path}.content");
    let content = match map.get("content") {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Array(parts)) => content_parts(&content_path, parts)?,
        Some(Value::Null) | None if role == "assistant" => String::new(),
        Some(Value::Null) | None => {
            return Err(Invalid::new(
                &content_path,
                format!("Missing required parameter: '{content_path}'"),
            ));
        }
        Some(other) => {
            return Err(Invalid::wrong_type(
                &content_path,
                "a string or an array",
                other,
            ));
        }
    };
    Ok(ChatMessage {
        role: role.to_owned(),
        content,
    })
}

fn content_parts(path: &str, parts: &[Value]) -> Result<String, Invalid> {
    let mut content = String::new();
    for (index, part) in parts.iter().enumerate() {
        let path = format!("{path}[{index}]");
        match part.get("type").and_then(Value::as_str) {
            Some("text") => match part.get("text").and_then(Value::as_str) {
                Some(text) => content += text,
                None => {
                    return Err(Invalid::new(
                        &path,
                        format!("'{path}.text' must be a string"),
                    ));
                }
            },
            Some("refusal") => {}
            Some(_) => {
                return Err(Invalid::unsupported(
                    format!("{path}.type"),
                    "send parts of type text only",
                ));
            }
            None => {
                return Err(Invalid::new(
                    &path,
                    format!("Missing required parameter: '{path}.type'"),
                ));
            }
        }
    }
    Ok(content)
}

fn seed(fields: Fields<'_>) -> Result<Option<u64>, Invalid> {
    let Some(value) = fields.get("seed") else {
        return Ok(None);
    };
    // Negative seeds exist in the wild; two's complement keeps them apart.
    let seed = value
        .as_u64()
        .or_else(|| value.as_i64().map(i64::cast_unsigned))
        .or_else(|| whole_number(value).map(i64::cast_unsigned));
    seed.map(Some)
        .ok_or_else(|| Invalid::wrong_type("seed", "an integer", value))
}

fn stop(fields: Fields<'_>) -> Result<Vec<String>, Invalid> {
    let texts = match fields.get("stop") {
        None => return Ok(Vec::new()),
        Some(Value::String(text)) => vec![text.clone()],
        Some(Value::Array(list)) => list
            .iter()
            .enumerate()
            .map(|(index, value)| match value {
                Value::String(text) => Ok(text.clone()),
                other => Err(Invalid::wrong_type(
                    &format!("stop[{index}]"),
                    "a string",
                    other,
                )),
            })
            .collect::<Result<_, _>>()?,
        Some(other) => {
            return Err(Invalid::wrong_type(
                "stop",
                "a string or an array of strings",
                other,
            ));
        }
    };
    if texts.len() > STOP_TEXTS {
        return Err(Invalid::new(
            "stop",
            format!(
                "'stop' has {} texts, at most {STOP_TEXTS} are allowed",
                texts.len()
            ),
        ));
    }
    if texts.iter().any(String::is_empty) {
        return Err(Invalid::new(
            "stop",
            "'stop' holds an empty text, which would end every answer at once",
        ));
    }
    Ok(texts)
}

fn logit_bias(fields: Fields<'_>) -> Result<Vec<LogitBias>, Invalid> {
    let Some(biases) = fields.object("logit_bias")? else {
        return Ok(Vec::new());
    };
    let wrong = |key: &str| {
        Invalid::new(
            "logit_bias",
            format!(
                "'logit_bias' maps token ids to numbers from -100 to 100; the entry {key:?} does not"
            ),
        )
    };
    let read = |(key, value): (&String, &Value)| {
        let token = key.parse().map_err(|_| wrong(key))?;
        match value.as_f64() {
            Some(bias) if (-100.0..=100.0).contains(&bias) => Ok(LogitBias {
                token,
                bias: bias as f32,
            }),
            _ => Err(wrong(key)),
        }
    };
    biases.0.iter().map(read).collect()
}

/// A JSON number without a fraction: 3 and 3.0 alike.
fn whole_number(value: &Value) -> Option<i64> {
    let whole = |number: f64| number.fract() == 0.0 && number.abs() < 9e15;
    value.as_i64().or_else(|| {
        value
            .as_f64()
            .filter(|number| whole(*number))
            .map(|number| number as i64)
    })
}

fn out_of_range(
    name: &str,
    value: impl std::fmt::Display,
    least: impl std::fmt::Display,
    most: impl std::fmt::Display,
) -> Invalid {
    Invalid::new(
        name,
        format!("Invalid value for '{name}': {value} is not between {least} and {most}"),
    )
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// The OpenAI API allows 4; more do no harm.
const STOP_TEXTS: usize = 16;

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(value: Value) -> Result<GenerateParams, Invalid> {
        sampling(Fields(value.as_object().unwrap()))
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
            (json!({"top_k": -1}), "top_k"),
            (json!({"min_p": 2}), "min_p"),
            (json!({"presence_penalty": 3}), "presence_penalty"),
            (json!({"frequency_penalty": -3}), "frequency_penalty"),
            (json!({"seed": "x"}), "seed"),
            (json!({"seed": 1.5}), "seed"),
            (json!({"stop": 5}), "stop"),
            (json!({"stop": ["a", 5]}), "stop[1]"),
            (json!({"stop": [""]}), "stop"),
            (json!({"stop": vec!["a"; 17]}), "stop"),
            (json!({"logit_bias": {"x": 1}}), "logit_bias"),
            (json!({"logit_bias": {"1": 101}}), "logit_bias"),
            (json!({"logit_bias": []}), "logit_bias"),
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
    fn content_may_be_text_or_text_parts() {
        let chat = messages(&json!([
            {"role": "developer", "content": "a"},
            {"role": "user", "content": [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]},
            {"role": "assistant", "content": null, "tool_calls": []},
        ]))
        .unwrap();
        let seen: Vec<_> = chat
            .messages
            .iter()
            .map(|m| (m.role.as_str(), m.content.as_str()))
            .collect();
        assert_eq!(seen, [("system", "a"), ("user", "bc"), ("assistant", "")]);
    }

    #[test]
    fn wrong_messages_are_named_by_their_place() {
        let cases = [
            (json!("hi"), "messages", false),
            (json!([]), "messages", false),
            (json!(["hi"]), "messages[0]", false),
            (json!([{"content": "x"}]), "messages[0].role", false),
            (
                json!([{"role": "king", "content": "x"}]),
                "messages[0].role",
                false,
            ),
            (
                json!([{"role": "tool", "content": "x"}]),
                "messages[0].role",
                true,
            ),
            (json!([{"role": "user"}]), "messages[0].content", false),
            (
                json!([{"role": "user", "content": 5}]),
                "messages[0].content",
                false,
            ),
            (
                json!([{"role": "user", "content": [{"type": "image_url"}]}]),
                "messages[0].content[0].type",
                true,
            ),
            (
                json!([{"role": "user", "content": [{"type": "text"}]}]),
                "messages[0].content[0]",
                false,
            ),
            (
                json!([{"role": "assistant", "tool_calls": [{}]}]),
                "messages[0].tool_calls",
                true,
            ),
        ];
        for (body, param, unsupported) in cases {
            let invalid = messages(&body).expect_err(&body.to_string());
            assert_eq!(
                (invalid.param.as_str(), invalid.unsupported),
                (param, unsupported),
                "{body}"
            );
        }
    }
}
