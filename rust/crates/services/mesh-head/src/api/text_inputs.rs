//! Fields that are a text, several texts, token ids, or several lists of those: `prompt` and `input`.

use serde_json::Value;

use crate::api::fields::{Fields, token_ids};
use crate::api::invalid::Invalid;
use crate::api::json::Lists;

/// A text, or the token ids that stand for one.
pub(super) enum TextInput {
    Text(String),
    Tokens(Vec<u32>),
}

/// Reads a field; `shapes` is the error about a value of another shape. At most `most` inputs are copied:
/// `too_many` is the error about more.
pub(super) fn text_inputs(
    fields: Fields<'_>,
    name: &str,
    shapes: &str,
    (most, too_many): (usize, impl Fn(usize) -> Invalid),
) -> Result<Vec<TextInput>, Invalid> {
    match fields.lists(name) {
        Some(Lists::One(tokens)) => return Ok(vec![TextInput::Tokens(tokens.clone())]),
        Some(Lists::Many(lists)) if lists.len() > most => return Err(too_many(lists.len())),
        Some(Lists::Many(lists)) => {
            return Ok(lists.iter().cloned().map(TextInput::Tokens).collect());
        }
        None => {}
    }
    let text = |value: &Value| value.as_str().map(|text| TextInput::Text(text.to_owned()));
    let tokens = |value: &Value| token_ids(value).map(TextInput::Tokens);
    let value = fields.get(name).ok_or_else(|| Invalid::missing(name))?;
    if let Some(list) = value.as_array()
        && list.len() > most
        && list.first().is_some_and(|first| !first.is_number())
    {
        return Err(too_many(list.len()));
    }
    let pieces = match (value, value.as_array().map(|list| list.first())) {
        (Value::String(_), _) => text(value).map(|text| vec![text]),
        (_, Some(None)) => Some(Vec::new()),
        (_, Some(Some(Value::Number(_)))) => tokens(value).map(|tokens| vec![tokens]),
        (Value::Array(list), Some(Some(Value::String(_)))) => list.iter().map(text).collect(),
        (Value::Array(list), Some(Some(Value::Array(_)))) => list.iter().map(tokens).collect(),
        _ => None,
    };
    pieces.ok_or_else(|| Invalid::new(name, shapes))
}
