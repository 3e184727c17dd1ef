//! Chat messages, in the forms that clients send.

use mesh_api::fields::Neutral;
use mesh_proto::{Chat, ChatMessage};
use serde_json::{Map, Value};

use super::reader::Fields;
use crate::api::invalid::Invalid;

/// Chat messages: a non-empty list of roles and texts.
///
/// # Errors
/// [`Invalid`] names what is wrong by its place.
pub(crate) fn messages(value: &Value) -> Result<Chat, Invalid> {
    let Some(list) = value.as_array() else {
        return Err(Invalid::wrong_type("messages", "an array", value));
    };
    if list.is_empty() {
        let text = "'messages' is empty: give at least one message";
        return Err(Invalid::new("messages", text));
    }
    if list.len() > MOST_MESSAGES {
        let (count, most) = (list.len(), MOST_MESSAGES);
        return Err(Invalid::too_many("messages", count, "messages", most));
    }
    let messages = list.iter().enumerate();
    let messages = messages.map(|(index, value)| message(&format!("messages[{index}]"), value));
    Ok(Chat {
        messages: messages.collect::<Result<_, _>>()?,
        // Mistral's and DeepSeek's way to ask for it.
        continue_final_message: list.last().is_some_and(|last| last["prefix"] == true),
        ..Default::default()
    })
}

/// The conversation that a request holds, with the options of its template.
///
/// # Errors
/// [`Invalid`] names the field that is wrong.
pub(crate) fn conversation(fields: Fields<'_>) -> Result<Chat, Invalid> {
    let list = fields.get("messages");
    let mut chat = messages(list.ok_or_else(|| Invalid::missing("messages"))?)?;
    let mut variables = variables(fields)?;
    // vLLM reads it from there, too.
    let inner = match variables.remove("add_generation_prompt") {
        Some(Value::Bool(add)) => Some(add),
        Some(other) => {
            let path = "chat_template_kwargs.add_generation_prompt";
            return Err(Invalid::wrong_type(path, "a boolean", &other));
        }
        None => None,
    };
    let add = fields.choice("add_generation_prompt")?.or(inner);
    chat.continue_final_message |= fields.flag("continue_final_message")?;
    if chat.continue_final_message && add == Some(true) {
        let text = "'continue_final_message' and 'add_generation_prompt' exclude each other: leave one of them out";
        return Err(Invalid::new("continue_final_message", text));
    }
    chat.no_generation_prompt = add == Some(false) && !chat.continue_final_message;
    if !variables.is_empty() {
        chat.template_variables = Value::Object(variables).to_string();
    }
    Ok(chat)
}

/// Variables for the template: `chat_template_kwargs`, and what other servers put beside it.
fn variables(fields: Fields<'_>) -> Result<Map<String, Value>, Invalid> {
    let kwargs = fields.object("chat_template_kwargs")?;
    let mut variables = kwargs.map_or_else(Map::new, |kwargs| kwargs.map().clone());
    for name in RESERVED {
        if variables.contains_key(*name) {
            let path = format!("chat_template_kwargs.{name}");
            let text = format!("'{path}' cannot be set: the server sets it itself");
            return Err(Invalid::new(path, text));
        }
    }
    if let Some(effort) = fields.text("reasoning_effort")? {
        // Templates know either the one or the other.
        if effort == "none" {
            variables.entry("enable_thinking").or_insert(false.into());
        } else {
            variables.entry("reasoning_effort").or_insert(effort.into());
        }
    }
    if let Some(thinking) = fields.choice("enable_thinking")? {
        let known = variables.entry("enable_thinking");
        known.or_insert(thinking.into());
    }
    Ok(variables)
}

/// No context holds more.
const MOST_MESSAGES: usize = 4096;

/// Variables of a template that are not the client's to set.
const RESERVED: &[&str] = &["messages", "bos_token", "eos_token"];

fn message(path: &str, value: &Value) -> Result<ChatMessage, Invalid> {
    let Some(map) = value.as_object() else {
        return Err(Invalid::wrong_type(path, "an object", value));
    };
    let fields = Fields::new(map);
    for name in ["tool_calls", "function_call", "audio"] {
        let asks = |value| !Neutral::Empty.allows(value);
        if fields.get(name).is_some_and(asks) {
            let path = format!("{path}.{name}");
            return Err(Invalid::unsupported(path, "send text messages only"));
        }
    }
    let role_path = format!("{path}.role");
    let role = match map.get("role") {
        Some(Value::String(role)) => role.as_str(),
        Some(other) => return Err(Invalid::wrong_type(&role_path, "a string", other)),
        None => return Err(Invalid::missing(&role_path)),
    };
    let role = match role {
        "system" | "user" | "assistant" => role,
        // OpenAI's newer name.
        "developer" => "system",
        // LangChain's and Gemini's names.
        "human" => "user",
        "ai" | "model" => "assistant",
        "tool" | "function" => {
            let remedy = "roles are system, user and assistant";
            return Err(Invalid::unsupported(role_path, remedy));
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
        Some(Value::Null) | None => return Err(Invalid::missing(&content_path)),
        Some(other) => {
            let expected = "a string or an array";
            return Err(Invalid::wrong_type(&content_path, expected, other));
        }
    };
    Ok(ChatMessage {
        role: role.to_owned(),
        content,
    })
}

fn content_parts(path: &str, parts: &[Value]) -> Result<String, Invalid> {
    let mut texts = Vec::with_capacity(parts.len());
    for (index, part) in parts.iter().enumerate() {
        let path = format!("{path}[{index}]");
        if let Some(text) = part.as_str() {
            texts.push(text);
            continue;
        }
        let type_path = format!("{path}.type");
        let kind = match part.get("type") {
            Some(Value::String(kind)) => Some(kind.as_str()),
            Some(Value::Null) | None => part.get("text").map(|_| "text"),
            Some(other) => return Err(Invalid::wrong_type(&type_path, "a string", other)),
        };
        match kind {
            // The Responses API's names mean the same.
            Some("text" | "input_text" | "output_text") => {
                let text = part.get("text").and_then(Value::as_str);
                let missing = || Invalid::new(&path, format!("'{path}.text' must be a string"));
                texts.push(text.ok_or_else(missing)?);
            }
            // Parts of an assistant's message besides its answer; templates leave them out of later turns.
            Some("refusal" | "thinking" | "reasoning") => {}
            Some(_) => {
                let remedy = "send parts of type text only";
                return Err(Invalid::unsupported(type_path, remedy));
            }
            None => {
                let text = format!("Missing required parameter: '{type_path}'");
                return Err(Invalid::new(&path, text));
            }
        }
    }
    // As vLLM and llama.cpp do it.
    Ok(texts.join("\n"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

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
        assert_eq!(seen, [("system", "a"), ("user", "b\nc"), ("assistant", "")]);
    }

    #[test]
    fn forms_and_roles_of_other_apis_are_understood() {
        let chat = messages(&json!([
            {"role": "human", "content": ["a", {"text": "b"}]},
            {"role": "ai", "content": [{"type": "thinking", "thinking": "?"}, {"type": "output_text", "text": "c"}], "name": "x",
             "tool_calls": null, "prefix": true},
        ]))
        .unwrap();
        let seen: Vec<_> = chat
            .messages
            .iter()
            .map(|m| (m.role.as_str(), m.content.as_str()))
            .collect();
        assert_eq!(seen, [("user", "a\nb"), ("assistant", "c")]);
        assert!(chat.continue_final_message);
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
                json!([{"role": "user", "content": [{"type": 5, "text": "b"}]}]),
                "messages[0].content[0].type",
                false,
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

    #[test]
    fn options_of_the_template_come_by_several_names() {
        let read = |extra: Value| {
            let mut body = json!({"messages": [{"role": "assistant", "content": "Once"}]});
            let map = body.as_object_mut().unwrap();
            map.extend(extra.as_object().unwrap().clone());
            conversation(Fields::new(map))
        };
        let plain = read(json!({"chat_template_kwargs": {}, "continue_final_message": false, "add_generation_prompt": true})).unwrap();
        assert!(!plain.continue_final_message && !plain.no_generation_prompt);
        assert_eq!(plain.template_variables, "");
        assert!(
            read(json!({"continue_final_message": true}))
                .unwrap()
                .continue_final_message
        );
        assert!(
            read(json!({"add_generation_prompt": false}))
                .unwrap()
                .no_generation_prompt
        );
        for (extra, variables) in [
            (
                json!({"chat_template_kwargs": {"enable_thinking": false}}),
                json!({"enable_thinking": false}),
            ),
            (
                json!({"enable_thinking": false}),
                json!({"enable_thinking": false}),
            ),
            (
                json!({"reasoning_effort": "none"}),
                json!({"enable_thinking": false}),
            ),
            (
                json!({"reasoning_effort": "low"}),
                json!({"reasoning_effort": "low"}),
            ),
        ] {
            let chat = read(extra).unwrap();
            let read: Value = serde_json::from_str(&chat.template_variables).unwrap();
            assert_eq!(read, variables);
        }
        for (extra, param) in [
            (
                json!({"continue_final_message": true, "add_generation_prompt": true}),
                "continue_final_message",
            ),
            (
                json!({"continue_final_message": 5}),
                "continue_final_message",
            ),
            (json!({"chat_template_kwargs": []}), "chat_template_kwargs"),
            (
                json!({"chat_template_kwargs": {"messages": []}}),
                "chat_template_kwargs.messages",
            ),
            (json!({"reasoning_effort": 5}), "reasoning_effort"),
        ] {
            assert_eq!(read(extra).unwrap_err().param, param);
        }
    }
}
