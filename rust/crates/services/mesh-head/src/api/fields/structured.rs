//! The form that an answer must have, by all names that servers give it.

use mesh_proto::{Grammar, GrammarKind, MOST_GRAMMAR_BYTES};
use serde_json::Value;

use super::reader::Fields;
use crate::api::invalid::Invalid;

/// Reads `response_format` or one of the fields that say the same.
///
/// # Errors
/// [`Invalid`] names the field that is wrong, or the second one of two.
pub(crate) fn grammar(fields: Fields<'_>) -> Result<Option<Grammar>, Invalid> {
    let mut found: Option<(&str, Grammar)> = None;
    for (name, read) in FIELDS {
        let Some(value) = fields.get(name) else {
            continue;
        };
        let Some(grammar) = read(name, value)? else {
            continue;
        };
        if grammar.text.len() > MOST_GRAMMAR_BYTES {
            let bytes = grammar.text.len();
            let text = format!(
                "'{name}' has {bytes} bytes, and {MOST_GRAMMAR_BYTES} are allowed; shorten it"
            );
            return Err(Invalid::new(*name, text));
        }
        if let Some((other, _)) = found {
            let text =
                format!("'{other}' and '{name}' both say how the answer looks; send one of them");
            return Err(Invalid::new(*name, text));
        }
        found = Some((name, grammar));
    }
    Ok(found.map(|(_, grammar)| grammar))
}

type Read = fn(&str, &Value) -> Result<Option<Grammar>, Invalid>;

const FIELDS: &[(&str, Read)] = &[
    ("response_format", response_format),
    // vLLM
    ("structured_outputs", structured_outputs),
    ("guided_json", schema),
    ("guided_json_object", json_object),
    ("guided_regex", regex),
    ("guided_choice", choice),
    ("guided_grammar", notation),
    // llama.cpp
    ("grammar", notation),
    ("json_schema", schema),
    // SGLang
    ("regex", regex),
    ("ebnf", notation),
];

fn response_format(name: &str, value: &Value) -> Result<Option<Grammar>, Invalid> {
    if is_empty(value) {
        return Ok(None);
    }
    let Some(format) = value.as_object() else {
        return Err(Invalid::wrong_type(name, "an object", value));
    };
    match format.get("type").and_then(Value::as_str) {
        Some("text") => Ok(None),
        // llama.cpp and TGI have a schema here, too.
        Some("json_object") => match format.get("schema").filter(|schema| !is_empty(schema)) {
            Some(value) => schema("response_format.schema", value),
            None => json_object(name, &Value::Bool(true)),
        },
        Some("json_schema") => {
            let path = "response_format.json_schema.schema";
            let described = format
                .get("json_schema")
                .and_then(|named| named.get("schema"));
            match described.or_else(|| format.get("schema")) {
                Some(value) => schema(path, value),
                None => Err(Invalid::new(
                    path,
                    format!("'{path}' is missing: put the JSON Schema there"),
                )),
            }
        }
        _ => {
            let kind = format.get("type").unwrap_or(&Value::Null);
            let text = format!(
                "'response_format.type' must be \"text\", \"json_object\" or \"json_schema\", not {kind}"
            );
            Err(Invalid::new("response_format.type", text))
        }
    }
}

fn structured_outputs(name: &str, value: &Value) -> Result<Option<Grammar>, Invalid> {
    if is_empty(value) {
        return Ok(None);
    }
    let Some(object) = value.as_object() else {
        return Err(Invalid::wrong_type(name, "an object", value));
    };
    let kinds: [(&str, Read); 5] = [
        ("json", schema),
        ("json_object", json_object),
        ("regex", regex),
        ("choice", choice),
        ("grammar", notation),
    ];
    let mut found = None;
    for (key, value) in object.iter().filter(|(_, value)| !is_empty(value)) {
        let path = format!("{name}.{key}");
        let Some((_, read)) = kinds.iter().find(|(kind, _)| kind == key) else {
            let remedy = "use json, json_object, regex, choice or grammar";
            return Err(Invalid::unsupported(&path, remedy));
        };
        if found.is_some() {
            let text =
                format!("'{name}' says more than once how the answer looks; send one of them");
            return Err(Invalid::new(&path, text));
        }
        found = read(&path, value)?;
    }
    Ok(found)
}

fn schema(name: &str, value: &Value) -> Result<Option<Grammar>, Invalid> {
    let text = match value {
        // Fields beside the others may be there without a meaning.
        Value::Object(keys) if keys.is_empty() && !name.contains('.') => return Ok(None),
        Value::Object(_) | Value::Bool(_) => value.to_string(),
        // SGLang and vLLM take it as text, too.
        Value::String(text) if text.trim().is_empty() => return Ok(None),
        Value::String(text) => text.clone(),
        other => return Err(Invalid::wrong_type(name, "a JSON Schema", other)),
    };
    Ok(Some(of(GrammarKind::JsonSchema, text)))
}

fn json_object(name: &str, value: &Value) -> Result<Option<Grammar>, Invalid> {
    match value {
        Value::Bool(true) => Ok(Some(of(GrammarKind::JsonObject, String::new()))),
        Value::Bool(false) => Ok(None),
        other => Err(Invalid::wrong_type(name, "a boolean", other)),
    }
}

fn regex(name: &str, value: &Value) -> Result<Option<Grammar>, Invalid> {
    let text = text(name, value)?;
    Ok(text.map(|text| of(GrammarKind::Regex, text.to_owned())))
}

/// A grammar in GBNF, or else in Lark's syntax.
fn notation(name: &str, value: &Value) -> Result<Option<Grammar>, Invalid> {
    Ok(text(name, value)?.map(|text| {
        let kind = match text.contains("::=") {
            true => GrammarKind::Gbnf,
            false => GrammarKind::Lark,
        };
        of(kind, text.to_owned())
    }))
}

/// One of several texts.
fn choice(name: &str, value: &Value) -> Result<Option<Grammar>, Invalid> {
    let expected = "an array of strings";
    let wrong = || Invalid::wrong_type(name, expected, value);
    let texts = value.as_array().ok_or_else(wrong)?;
    if texts.is_empty() {
        return Ok(None);
    }
    let mut lark = "start: CHOICE\nCHOICE: ".to_owned();
    for (i, text) in texts.iter().enumerate() {
        if !text.is_string() {
            return Err(wrong());
        }
        if i > 0 {
            lark.push_str(" | ");
        }
        // JSON's literals are Lark's.
        lark.push_str(&text.to_string());
    }
    Ok(Some(of(GrammarKind::Lark, lark)))
}

fn text<'a>(name: &str, value: &'a Value) -> Result<Option<&'a str>, Invalid> {
    let text = value
        .as_str()
        .ok_or_else(|| Invalid::wrong_type(name, "a string", value))?;
    Ok(Some(text).filter(|text| !text.trim().is_empty()))
}

/// True for values that ask for nothing.
fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(text) => text.trim().is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::Bool(true) | Value::Number(_) => false,
    }
}

fn of(kind: GrammarKind, text: String) -> Grammar {
    Grammar {
        kind: kind.into(),
        text,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(body: &Value) -> Result<Option<Grammar>, Invalid> {
        grammar(Fields::new(body.as_object().expect("an object")))
    }

    #[test]
    fn all_names_of_a_form_mean_the_same() {
        let schema = json!({"type": "object", "properties": {"b": {}, "a": {}}});
        let text = schema.to_string();
        // The order of keys is that of the answer.
        assert!(text.find("\"b\"") < text.find("\"a\""));
        for (body, kind, text) in [
            (
                json!({"response_format": {"type": "json_object"}}),
                GrammarKind::JsonObject,
                "",
            ),
            (
                json!({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": true, "schema": schema}}}),
                GrammarKind::JsonSchema,
                text.as_str(),
            ),
            (
                json!({"response_format": {"type": "json_object", "schema": schema}}),
                GrammarKind::JsonSchema,
                &text,
            ),
            (
                json!({"json_schema": schema}),
                GrammarKind::JsonSchema,
                &text,
            ),
            (json!({"guided_json": text}), GrammarKind::JsonSchema, &text),
            (
                json!({"structured_outputs": {"json": schema, "regex": null}}),
                GrammarKind::JsonSchema,
                &text,
            ),
            (
                json!({"structured_outputs": {"json_object": true}}),
                GrammarKind::JsonObject,
                "",
            ),
            (
                json!({"guided_json_object": true}),
                GrammarKind::JsonObject,
                "",
            ),
            (json!({"regex": "a+"}), GrammarKind::Regex, "a+"),
            (json!({"guided_regex": "a+"}), GrammarKind::Regex, "a+"),
            (
                json!({"grammar": "root ::= \"a\""}),
                GrammarKind::Gbnf,
                "root ::= \"a\"",
            ),
            (
                json!({"ebnf": "start: \"a\""}),
                GrammarKind::Lark,
                "start: \"a\"",
            ),
            (
                json!({"guided_choice": ["a b", "\"c"]}),
                GrammarKind::Lark,
                "start: CHOICE\nCHOICE: \"a b\" | \"\\\"c\"",
            ),
        ] {
            let expected = of(kind, text.to_owned());
            assert_eq!(read(&body).unwrap(), Some(expected), "{body}");
        }
    }

    #[test]
    fn empty_forms_ask_for_nothing() {
        for body in [
            json!({}),
            json!({"response_format": {"type": "text"}}),
            json!({"response_format": null, "grammar": "", "json_schema": {}, "guided_choice": [], "regex": " "}),
            json!({"guided_json_object": false, "structured_outputs": {"json": null}}),
        ] {
            assert_eq!(read(&body).unwrap(), None, "{body}");
        }
    }

    #[test]
    fn every_mistake_is_named() {
        for (body, param) in [
            (json!({"response_format": "json"}), "response_format"),
            (
                json!({"response_format": {"type": "xml"}}),
                "response_format.type",
            ),
            (
                json!({"response_format": {"type": "json_schema"}}),
                "response_format.json_schema.schema",
            ),
            (
                json!({"response_format": {"type": "json_schema", "json_schema": {"schema": 5}}}),
                "response_format.json_schema.schema",
            ),
            (json!({"grammar": 5}), "grammar"),
            (json!({"guided_choice": ["a", 5]}), "guided_choice"),
            (json!({"guided_json_object": 1}), "guided_json_object"),
            (json!({"regex": "a", "grammar": "start: \"a\""}), "regex"),
            (
                json!({"structured_outputs": {"structural_tag": "x"}}),
                "structured_outputs.structural_tag",
            ),
            (
                json!({"structured_outputs": {"json": {}, "regex": "a", "choice": ["a"]}}),
                "structured_outputs.choice",
            ),
            (
                json!({"regex": "a".repeat(MOST_GRAMMAR_BYTES + 1)}),
                "regex",
            ),
        ] {
            let invalid = read(&body).expect_err("it is wrong");
            assert_eq!(invalid.param, param, "{}", invalid.message);
        }
    }
}
