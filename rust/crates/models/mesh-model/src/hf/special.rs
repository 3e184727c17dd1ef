//! Tokens that begin and end text, and the chat template, from five files of which each may lack some.

use serde_json::{Map, Value};

use super::{Folder, HfError};
use crate::checkpoint::SpecialTokens;

/// More end tokens than any model has.
const MAX_ENDS: usize = 64;

/// Reads special tokens and the chat template from `tokenizer_config.json`, `special_tokens_map.json`,
/// `generation_config.json`, `config.json` and `chat_template.jinja`, as far as they are there.
///
/// # Errors
/// If one of them cannot be read or is malformed.
pub(super) fn read(folder: &Folder) -> Result<(SpecialTokens, Option<String>), HfError> {
    let object = |name: &'static str| -> Result<Map<String, Value>, HfError> {
        let malformed = |message: String| HfError::Json {
            file: name.into(),
            message,
        };
        let Some(json) = folder.read(name)? else {
            return Ok(Map::new());
        };
        serde_json::from_slice(&json).map_err(|error| malformed(error.to_string()))
    };
    let tokenizer = object("tokenizer_config.json")?;
    let map = object("special_tokens_map.json")?;
    let generation = object("generation_config.json")?;
    let config = object("config.json")?;
    let text = |key: &str| token_text(tokenizer.get(key)).or_else(|| token_text(map.get(key)));
    let ids = |key: &str| {
        let of = |object: &Map<String, Value>| token_ids(object.get(key));
        of(&generation).or_else(|| of(&config)).unwrap_or_default()
    };
    let flag = |key: &str| tokenizer.get(key).and_then(Value::as_bool);
    let jinja = folder.read("chat_template.jinja")?;
    let jinja = jinja.map(String::from_utf8).transpose();
    let jinja = jinja.map_err(|_| HfError::Json {
        file: "chat_template.jinja".into(),
        message: "it is not valid UTF-8".into(),
    })?;
    let special = SpecialTokens {
        bos: text("bos_token"),
        eos: text("eos_token"),
        bos_id: ids("bos_token_id").first().copied(),
        eos_ids: ids("eos_token_id"),
        add_bos: flag("add_bos_token"),
        add_eos: flag("add_eos_token"),
    };
    let template = jinja.or_else(|| template(tokenizer.get("chat_template")));
    Ok((special, template))
}

/// A token is its text, or an object with it.
fn token_text(value: Option<&Value>) -> Option<String> {
    match value? {
        Value::String(text) => Some(text.clone()),
        Value::Object(token) => Some(token.get("content")?.as_str()?.to_owned()),
        _ => None,
    }
}

/// One id or a list of them.
fn token_ids(value: Option<&Value>) -> Option<Vec<u64>> {
    match value? {
        Value::Array(ids) => Some(
            ids.iter()
                .filter_map(Value::as_u64)
                .take(MAX_ENDS)
                .collect(),
        ),
        id => Some(vec![id.as_u64()?]),
    }
}

/// A template is text, or a list of named ones of which "default" is the one for conversations.
fn template(value: Option<&Value>) -> Option<String> {
    match value? {
        Value::String(text) => Some(text.clone()),
        Value::Array(named) => named.iter().find_map(|one| {
            let is_default = one.get("name")?.as_str()? == "default";
            is_default.then(|| one.get("template")?.as_str().map(str::to_owned))?
        }),
        _ => None,
    }
}
