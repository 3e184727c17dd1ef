//! Differences of Python from the template engine: how values are printed, methods that it lacks, tags of
//! `transformers`.

use std::fmt::Write as _;

use minijinja::value::{ValueKind, from_args};
use minijinja::{Error, ErrorKind, State, Value};

/// The source as the template engine has to see it to do what Jinja does.
///
/// - The tags `{% generation %}` and `{% endgeneration %}`, by which templates mark what a model is trained
///   on, become a block without a meaning of its own: a scope, like the one that `transformers` makes of
///   them. Whitespace control stays.
/// - A line break behind `{% raw %}` is text; the engine drops it as it does behind other blocks, so there
///   are two then.
/// - Line breaks of other systems become plain ones.
pub(super) fn prepared(source: &str) -> String {
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let source = &*source;
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find('{') {
        let (before, found) = rest.split_at(at);
        out.push_str(before);
        let len = match found.as_bytes().get(1) {
            Some(b'#') => found.find("#}").map(|end| end + 2),
            Some(b'{') => code_end(found, "}}"),
            Some(b'%') => code_end(found, "%}"),
            _ => Some(1),
        };
        let (code, behind) = found.split_at(len.unwrap_or(found.len()));
        rest = behind;
        match tag_name(code) {
            Some("generation") => out.push_str(&code.replacen("generation", "with", 1)),
            Some("endgeneration") => out.push_str(&code.replacen("endgeneration", "endwith", 1)),
            Some("raw") => {
                let end = raw_end(rest);
                out.push_str(code);
                if rest.starts_with('\n') && !code.ends_with("-%}") {
                    out.push('\n');
                }
                out.push_str(&rest[..end]);
                rest = &rest[end..];
            }
            _ => out.push_str(code),
        }
    }
    out.push_str(rest);
    out
}

/// The end of the code that begins here; `closing` in a string does not end it.
fn code_end(text: &str, closing: &str) -> Option<usize> {
    let bytes = text.as_bytes();
    let mut quote = None;
    let mut at = 2;
    while at < bytes.len() {
        match (quote, bytes[at]) {
            (Some(_), b'\\') => at += 1,
            (Some(open), byte) if byte == open => quote = None,
            (None, byte @ (b'"' | b'\'')) => quote = Some(byte),
            (None, _) if bytes[at..].starts_with(closing.as_bytes()) => {
                return Some(at + closing.len());
            }
            _ => {}
        }
        at += 1;
    }
    None
}

/// The first word in `{% … %}`, if that is all of it.
fn tag_name(code: &str) -> Option<&str> {
    let inner = code.strip_prefix("{%")?.strip_suffix("%}")?;
    Some(inner.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+'))
}

/// The position of `{% endraw %}`.
fn raw_end(text: &str) -> usize {
    let is_sign = |c: char| matches!(c, '-' | '+');
    let ends = |tag: &str| {
        let inner = tag.trim_start_matches(is_sign).trim_start();
        let behind = inner.strip_prefix("endraw").map(str::trim_start);
        behind.is_some_and(|behind| behind.trim_start_matches(is_sign).starts_with("%}"))
    };
    let mut tags = text.match_indices("{%");
    let found = tags.find(|(at, _)| ends(&text[at + 2..]));
    found.map_or(text.len(), |(at, _)| at)
}

/// The value as Python's `str` writes it.
pub(super) fn text(value: &Value) -> String {
    match value.as_str() {
        Some(text) => text.to_owned(),
        None => {
            let mut out = String::new();
            write(value, &mut out, 0);
            out
        }
    }
}

/// Deeper than any value of a conversation.
const DEEPEST: usize = 100;

fn write(value: &Value, out: &mut String, depth: usize) {
    if depth > DEEPEST {
        out.push_str("...");
        return;
    }
    match value.kind() {
        ValueKind::None => out.push_str("None"),
        ValueKind::Bool => out.push_str(if value.is_true() { "True" } else { "False" }),
        ValueKind::String => quoted(value.as_str().unwrap_or_default(), out),
        ValueKind::Seq | ValueKind::Iterable => {
            out.push('[');
            for (i, item) in value.try_iter().into_iter().flatten().enumerate() {
                if i > 0 {
                    out.push_str(", ");
                }
                write(&item, out, depth + 1);
            }
            out.push(']');
        }
        ValueKind::Map => {
            out.push('{');
            for (i, key) in value.try_iter().into_iter().flatten().enumerate() {
                if i > 0 {
                    out.push_str(", ");
                }
                write(&key, out, depth + 1);
                out.push_str(": ");
                write(&value.get_item(&key).unwrap_or_default(), out, depth + 1);
            }
            out.push('}');
        }
        _ => {
            let _ = write!(out, "{value}");
        }
    }
}

/// A string as `repr` writes it.
fn quoted(text: &str, out: &mut String) {
    let quote = match text.contains('\'') && !text.contains('"') {
        true => '"',
        false => '\'',
    };
    out.push(quote);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == quote => out.extend(['\\', c]),
            c if c < ' ' || c == '\u{7f}' => {
                let _ = write!(out, "\\x{:02x}", c as u32);
            }
            c => out.push(c),
        }
    }
    out.push(quote);
}

/// Python's methods of strings, lists and dictionaries.
pub(super) fn method(
    state: &State,
    value: &Value,
    name: &str,
    args: &[Value],
) -> Result<Value, Error> {
    if let Some(text) = value.as_str()
        && let Some(found) = string_method(text, name, args)
    {
        return found;
    }
    match (value.kind(), name) {
        (ValueKind::Seq, "index") => {
            let (wanted,): (Value,) = from_args(args)?;
            let position = value.try_iter()?.position(|item| item == wanted);
            position
                .map(Value::from)
                .ok_or_else(|| failed(format!("{} is not in list", text(&wanted))))
        }
        (ValueKind::Seq | ValueKind::Map, "copy") => Ok(value.clone()),
        _ => minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args),
    }
}

fn string_method(text: &str, name: &str, args: &[Value]) -> Option<Result<Value, Error>> {
    let one = || from_args::<(String,)>(args).map(|(arg,)| arg);
    Some(match name {
        "removeprefix" => one().map(|prefix| text.strip_prefix(&*prefix).unwrap_or(text).into()),
        "removesuffix" => one().map(|suffix| text.strip_suffix(&*suffix).unwrap_or(text).into()),
        "index" | "rindex" => one().and_then(|wanted| {
            let found = match name {
                "index" => text.find(&wanted),
                _ => text.rfind(&wanted),
            };
            found
                .map(|at| text[..at].chars().count().into())
                .ok_or_else(|| failed("substring not found".into()))
        }),
        "partition" => one().map(|separator| match text.split_once(&separator) {
            Some((before, after)) => strings(&[before, &separator, after]),
            None => strings(&[text, "", ""]),
        }),
        "rpartition" => one().map(|separator| match text.rsplit_once(&separator) {
            Some((before, after)) => strings(&[before, &separator, after]),
            None => strings(&["", "", text]),
        }),
        "rsplit" => from_args::<(Option<&str>, Option<i64>)>(args).map(|(separator, most)| {
            let most = most.and_then(|most| usize::try_from(most).ok());
            let most = most.map_or(usize::MAX, |most| most.saturating_add(1));
            let mut parts: Vec<&str> = match separator {
                Some(separator) => text.rsplitn(most, separator).collect(),
                None if most == usize::MAX => text.split_whitespace().rev().collect(),
                None => {
                    let mut rest = text.trim_end();
                    let mut parts = Vec::new();
                    while parts.len() + 1 < most
                        && let Some(at) = rest.rfind(char::is_whitespace)
                    {
                        parts.push(rest[at..].trim_start());
                        rest = rest[..at].trim_end();
                    }
                    parts.push(rest);
                    parts.retain(|part| !part.is_empty());
                    parts
                }
            };
            parts.reverse();
            strings(&parts)
        }),
        "zfill" => from_args::<(usize,)>(args).map(|(width,)| {
            let (sign, digits) = match text.strip_prefix('-') {
                Some(digits) => ("-", digits),
                None => ("", text),
            };
            let missing = width.min(1 << 16).saturating_sub(text.chars().count());
            format!("{sign}{}{digits}", "0".repeat(missing)).into()
        }),
        "ljust" | "rjust" | "center" => from_args::<(usize,)>(args).map(|(width,)| {
            let missing = width.min(1 << 16).saturating_sub(text.chars().count());
            let left = match name {
                "ljust" => 0,
                "rjust" => missing,
                _ => missing / 2 + (missing & width & 1),
            };
            let (left, right) = (" ".repeat(left), " ".repeat(missing - left));
            format!("{left}{text}{right}").into()
        }),
        "casefold" => Ok(text.to_lowercase().into()),
        _ => return None,
    })
}

fn strings(parts: &[&str]) -> Value {
    parts.iter().map(|part| Value::from(*part)).collect()
}

fn failed(message: String) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}
