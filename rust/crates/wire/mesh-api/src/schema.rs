//! Schemas that the types alone do not give.

use schemars::{Schema, SchemaGenerator, json_schema};
use serde_json::{Value, json};

use crate::fields::{ALIASES, Neutral, Table};

/// A whole number without bounds.
pub(crate) fn integer(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": ["integer", "null"]})
}

/// A number of tokens, or -1.
pub(crate) fn limit(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"anyOf": [
        {"const": -1},
        {"type": "integer", "minimum": 1, "maximum": u32::MAX},
        {"type": "null"},
    ]})
}

/// A token id.
fn token() -> Value {
    json!({"type": "integer", "minimum": 0, "maximum": u32::MAX})
}

/// One prompt, or as many as there may be answers.
pub(crate) fn prompt(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"anyOf": [
        {"type": "string"},
        {"type": "array", "minItems": 1, "maxItems": 128, "items": {"type": "string"}},
        {"type": "array", "minItems": 1, "items": token()},
        {
            "type": "array", "minItems": 1, "maxItems": 128,
            "items": {"type": "array", "items": token()},
        },
    ]})
}

/// One text to embed, or several, none of them empty.
pub(crate) fn input(_: &mut SchemaGenerator) -> Schema {
    let text = json!({"type": "string", "minLength": 1});
    let tokens = json!({"type": "array", "minItems": 1, "items": token()});
    json_schema!({"anyOf": [
        text,
        {"type": "array", "minItems": 1, "maxItems": 2048, "items": text},
        tokens,
        {"type": "array", "minItems": 1, "maxItems": 2048, "items": tokens},
    ]})
}

/// A truth value, also as 0 or 1.
pub(crate) fn flag_or_bit(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"enum": [true, false, 0, 1, null]})
}

/// A number of alternatives, or a truth value.
pub(crate) fn flag_or_count(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"anyOf": [{"type": "integer", "minimum": 0, "maximum": 20}, {"type": ["boolean", "null"]}]})
}

/// Numbers by token ids. The head takes pairs, too.
pub(crate) fn logit_bias(_: &mut SchemaGenerator) -> Schema {
    let bias = json!({"type": "number", "minimum": -100, "maximum": 100});
    json_schema!({
        "type": ["object", "null"],
        "propertyNames": {"pattern": "^(0|[1-9][0-9]{0,8})$"},
        "additionalProperties": bias,
    })
}

/// Adds the other names of a request's fields, those that have no effect and those that are refused.
pub(crate) fn add_fields(schema: &mut Value, table: &Table) {
    let Some(properties) = schema["properties"].as_object_mut() else {
        return;
    };
    for (alias, field) in ALIASES {
        if let Some(meant) = properties.get(*field) {
            let mut same = meant.clone();
            same["description"] = format!("Another name of `{field}`.").into();
            properties.insert((*alias).to_owned(), same);
        }
    }
    for name in table.harmless() {
        let field = json!({"description": "Has no effect."});
        properties.insert(name.to_owned(), field);
    }
    for (name, refused) in table.refused() {
        let mut field = values(refused.neutral);
        field["description"] = match refused.neutral {
            Neutral::Anything => "Has no effect.".into(),
            _ => format!("Any other value is refused: {}.", refused.remedy).into(),
        };
        properties.insert(name.to_owned(), field);
    }
    schema["patternProperties"] = json!({"^speculative": {"description": "Has no effect."}});
}

/// The values that ask for nothing.
pub(crate) fn values(neutral: Neutral) -> Value {
    let or_empty = |other: Value| json!({"anyOf": [{"$ref": EMPTY}, other]});
    match neutral {
        Neutral::Anything => json!({}),
        Neutral::Null => json!({"type": "null"}),
        Neutral::NullOr(number) => json!({"enum": [null, number]}),
        Neutral::False => json!({"enum": [null, false]}),
        Neutral::TrueOr(words) => json!({"anyOf": [{"enum": [null, true]}, word(words)]}),
        Neutral::Empty => json!({"$ref": EMPTY}),
        Neutral::Number(number) => or_empty(json!({"const": number})),
        Neutral::AtMost(most) => or_empty(json!({"type": "number", "maximum": most})),
        Neutral::Word(words) => or_empty(word(words)),
        Neutral::Format(words) => {
            let one = or_empty(word(words));
            json!({"anyOf": [one, {"type": "array", "items": one}]})
        }
        Neutral::TextOnly => or_empty(json!({"type": "array", "items": {"const": "text"}})),
    }
}

/// One of these words, in letters of any case.
fn word(words: &[&str]) -> Value {
    let any_case = |word: &&str| {
        let letter = |c: char| match c.is_ascii_alphabetic() {
            true => format!("[{}{}]", c.to_ascii_lowercase(), c.to_ascii_uppercase()),
            false => c.to_string(),
        };
        word.chars().map(letter).collect::<String>()
    };
    match words {
        [] => json!(false),
        _ => {
            let words: Vec<String> = words.iter().map(any_case).collect();
            json!({"type": "string", "pattern": format!("^({})$", words.join("|"))})
        }
    }
}

/// The component for values that are empty.
pub(crate) const EMPTY: &str = "#/components/schemas/Empty";

/// The schema of that component.
pub(crate) fn empty() -> Value {
    json!({
        "description": "A value that asks for nothing.",
        "anyOf": [
            {"type": "string", "pattern": "^\\s*$"},
            {"const": false},
            {"type": "array", "maxItems": 0},
            {"type": "object", "maxProperties": 0},
            {"type": "null"},
        ],
    })
}
